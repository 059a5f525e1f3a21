"""The text of trace files, and the files of a folder that holds one a rank."""

from __future__ import annotations

import codecs
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from .trace import TraceError

_BLOCK = 1 << 20  # bytes that are read at a time
_GZIP = b"\x1f\x8b"
_SUFFIXES = (".json", ".json.gz")


class TraceFile:
    """A file's text in blocks, decompressed on the way.

    Attributes:
        path: of the file.
        damage: after reading, what was wrong with the compressed data; "" if nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damage = ""

    def blocks(self) -> Iterator[str]:
        """Yield the text from its beginning; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TraceError: the file cannot be opened or read.
        """
        self.damage = ""
        decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        try:
            with self.path.open("rb", buffering=0) as file:
                head = file.read(_BLOCK)
                rest = iter(lambda: file.read(_BLOCK), b"")
                for raw in self._inflated(head, rest) if head.startswith(_GZIP) else (head, *rest):
                    if text := decoder.decode(raw):
                        yield text
        except IsADirectoryError:
            raise TraceError(
                f"{self.path} is a folder, not a trace. Name a file in it, or read all of them "
                "with `read_all`."
            ) from None
        except OSError as error:
            raise TraceError(
                f"{self.path} cannot be read: {error.strerror}. Name a trace that "
                "torch.profiler exported (.json or .json.gz)."
            ) from None

    def _inflated(self, head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
        """Decompress gzip data of one or more members, as far as it is whole."""
        inflater = zlib.decompressobj(wbits=31)
        pending: bytes | None = head
        while pending is not None:
            try:
                yield inflater.decompress(pending)
            except zlib.error as error:
                self.damage = f"its compressed data is damaged ({error})"
                return
            if not inflater.eof:
                pending = next(rest, None)
                continue
            pending = inflater.unused_data or next(rest, None)
            if pending is not None:
                if not pending.startswith(_GZIP[: len(pending)]):
                    return  # padding
                inflater = zlib.decompressobj(wbits=31)
        if not inflater.eof:
            self.damage = "its compressed data breaks off"


def trace_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files to read for a path: itself, or for a folder its .json and .json.gz files.

    A folder without any may hold folders of one rank each; theirs are taken then. Numbers in
    names count as numbers, so that rank10 comes after rank9.

    Raises:
        TraceError: a folder that holds none.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    found = [each for each in path.iterdir() if is_trace_file(each)]
    if not found:
        found = [each for each in path.glob("*/*") if is_trace_file(each)]
    if not found:
        raise TraceError(
            f"the folder {path} holds no file that ends in .json or .json.gz. Name the folder into "
            "which torch.profiler exported its traces, one a rank."
        )
    return sorted(found, key=_by_number)


def is_trace_file(path: Path) -> bool:
    """Whether a file's name is that of a trace; hidden files are those that are being written."""
    return path.name.endswith(_SUFFIXES) and not path.name.startswith(".")


def _by_number(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
