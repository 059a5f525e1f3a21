"""Files that a command writes: judged before the work, and there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple


class Output(NamedTuple):
    """A file to write.

    Attributes:
        flag: what it was asked for with, such as "--plot".
        path: where.
        suffixes: that it may have; empty for any.
    """

    flag: str
    path: Path
    suffixes: tuple[str, ...] = ()


def check_outputs(outputs: list[Output], inputs: Mapping[str, Path]) -> None:
    """Raise unless each file can be written, and no two are the same one.

    Args:
        outputs: what is to be written.
        inputs: what is read, by the flag that names it; none of it may be written over.

    Raises:
        ValueError: one line that names flag, path and what is wrong with it.
    """
    taken = {path.resolve(): flag for flag, path in inputs.items()}
    for output in outputs:
        problem = _problem(output)
        if problem:
            raise ValueError(f"{output.flag} {output.path}: {problem}")
        other = taken.setdefault(output.path.resolve(), output.flag)
        if other != output.flag:
            raise ValueError(f"{output.flag} {output.path}: is the same file as that of {other}")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a new file beside `path`, with its suffix, and then put it there at once.

    Raises:
        OSError: it cannot be written; what was at `path` is still there.
    """
    target = path.resolve()  # of a link, what it leads to
    part = target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")
    try:
        write(part)
        if target.exists():
            shutil.copymode(target, part)
        part.replace(target)
    except OSError as error:
        if error.filename == str(part):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        part.unlink(missing_ok=True)


def _problem(output: Output) -> str:
    path, folder = output.path, output.path.resolve().parent
    try:
        if output.suffixes and path.suffix.lower() not in output.suffixes:
            return f"must end in {' or '.join(output.suffixes)}"
        if path.is_dir():
            return "is a directory; a file is needed"
        if path.exists() and not path.is_file():
            return "is no ordinary file"
        if not folder.exists():
            return f"there is no directory {folder}; make it first"
        if not folder.is_dir():
            return f"{folder} is no directory"
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"the directory {folder} may not be written to"
        if path.exists() and not os.access(path, os.W_OK):
            return "may not be written to"
    except OSError as error:  # a name that is too long, a directory that may not be looked into
        return error.strerror or str(error)
    return ""
