"""Where training tokens come from, which are held out, and in which order they are read.

A `Corpus` has two `Stream`s, training and validation, that share no document. A stream is its
documents one after another with a separator after each, cut into sequences. A `Loader` reads a
stream's sequences in an order that depends on the seed alone: however many data-parallel ranks
share a step, together they read the same sequences, and its position is one number.
No torch here: sequences are numpy arrays.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .shuffle import shuffled
from .tokens import DataError, read_tokens, wrong_id

_log = logging.getLogger(__name__)

# Bytes are tokens. Text has no zero byte, so 0 is free to separate documents.
BYTE_VOCAB_SIZE = 256
_BYTE_SEPARATOR = 0

# Tests and what is generated for one build or installed by its user are not the library's text.
_NOT_LIBRARY = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
_BUILD_SPECIFIC = "_sysconfigdata"


class Stream:
    """Documents, in order, as one long run of tokens with a separator after each document.

    Attributes:
        separator: the token id after each document.
        vocab_size: every id is below it.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger],
        offsets: NDArray[np.int64],
        documents: Sequence[int] | NDArray[np.int64],
        *,
        separator: int,
        vocab_size: int,
        name: str = "the tokens",
    ) -> None:
        """Document d is tokens[offsets[d] : offsets[d + 1]]; the stream is of `documents`.

        Errors call the whole of `tokens` by `name`.
        """
        self._name = name
        chosen = np.asarray(documents, dtype=np.int64)
        self._tokens = tokens
        self._starts = offsets[chosen]
        lengths = offsets[chosen + 1] - self._starts
        self._ends = np.cumsum(lengths + 1)  # in the stream, separators included
        self.separator = separator
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        """Number of tokens, separators included."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def num_documents(self) -> int:
        return len(self._ends)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens start .. start + count - 1, [count] int64. The range must lie in the stream.

        Raises:
            DataError: one of them is not below vocab_size.
        """
        assert 0 <= start <= start + count <= len(self), (start, count, len(self))
        out = np.full(count, self.separator, dtype=np.int64)
        document = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < count:
            end = int(self._ends[document])
            begin = int(self._ends[document - 1]) if document else 0
            first = start + done
            take = min(start + count, end - 1) - first  # the document's last place is its separator
            if take > 0:
                source = int(self._starts[document]) + first - begin
                part = self._tokens[source : source + take]
                if part.max() >= self.vocab_size:
                    place = int(part.argmax())
                    raise wrong_id(self._name, int(part[place]), source + place, self.vocab_size)
                out[done : done + take] = part
            done = end - start
            document += 1
        return out

    def num_sequences(self, sequence_length: int) -> int:
        """How many sequences of this many inputs (each with its shifted targets) it is cut into."""
        return max(len(self) - 1, 0) // sequence_length

    def sequence(self, index: int, sequence_length: int) -> NDArray[np.int64]:
        """[sequence_length + 1] int64: inputs are all but the last, targets all but the first.

        Neighbouring sequences share one token, so every token but the stream's first is a target of
        exactly one sequence.
        """
        return self.read(index * sequence_length, sequence_length + 1)


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text held out.

    Attributes:
        name: what it is, for people.
        train, validation: no document is in both.
        vocab_size: token ids are below it.
    """

    name: str
    train: Stream
    validation: Stream
    vocab_size: int


def open_corpus(kind: str, path: str | Path = "", validation_fraction: float = 0.1) -> Corpus:
    """The corpus that a configuration's [data] section means.

    Args:
        kind: "stdlib", "text" (a UTF-8 file, or a folder of them) or "tokens" (see `tokens`).
        path: the file or folder, for text and tokens.
        validation_fraction: share of the tokens to hold out; whole documents in the order of a hash
            of their names. Of a corpus of a single document it is the end, from a line on.

    Raises:
        DataError: missing, empty, binary or damaged data.
    """
    if kind == "tokens":
        file = read_tokens(path)
        names = [str(d) for d in range(len(file.offsets) - 1)]
        name, parts = str(path), (file.tokens, file.offsets)
        separator, vocab_size = file.separator, file.vocab_size
    else:
        if kind == "stdlib":
            name, texts = "Python's standard library", _stdlib_texts()
        else:
            name, texts = str(path), _text_files(Path(path))
        separator, vocab_size = _BYTE_SEPARATOR, BYTE_VOCAB_SIZE
        if len(texts) == 1:
            texts = _halves(texts[0], validation_fraction)
        names = [text.name for text in texts]
        lengths = [0, *(len(text.content) for text in texts)]
        flat = np.frombuffer(b"".join(text.content for text in texts), dtype=np.uint8)
        parts = (flat, np.cumsum(lengths, dtype=np.int64))
    train, validation = split(names, np.diff(parts[1]), validation_fraction)
    if not len(train) or not len(validation):
        raise DataError(
            f"{name}: has {len(names)} document, two are needed at least: one to train on and one "
            "to hold out"
        )
    _log.info("%s: %d documents to train on, %d held out", name, len(train), len(validation))
    train, validation = (
        Stream(*parts, chosen, separator=separator, vocab_size=vocab_size, name=name)
        for chosen in (train, validation)
    )
    return Corpus(name, train, validation, vocab_size)


def split(
    names: Sequence[str], lengths: NDArray[np.int64], fraction: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which documents are trained on and which are held out, both in ascending order.

    Held out are documents in the order of a hash of their names, passing over any that would take
    the whole above `fraction` of all tokens; the shortest one if that leaves none. The choice
    depends on names and lengths only.
    """
    hashes = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    budget = fraction * float(lengths.sum())
    held: list[int] = []
    used = 0
    for document in sorted(range(len(names)), key=lambda d: (hashes[d], names[d])):
        length = int(lengths[document])
        if length and used + length <= budget:
            held.append(document)
            used += length
    if not held and len(names) > 1:
        held = [min(range(len(names)), key=lambda d: (int(lengths[d]) or 1 << 62, hashes[d]))]
    kept = np.setdiff1d(np.arange(len(names)), held)
    return kept, np.asarray(sorted(held), dtype=np.int64)


def unigram_entropy(stream: Stream) -> float:
    """Entropy of the stream's token frequencies, nats per token, separators included.

    It is the least loss that a model which ignores all context can have on this very stream. Of the
    validation stream it is the line that a validation loss must be under: no unigram model,
    whatever it was trained on, does better there.
    """
    counts = np.zeros(stream.vocab_size, dtype=np.int64)
    step = 1 << 22
    for start in range(0, len(stream), step):
        part = stream.read(start, min(step, len(stream) - start))
        counts += np.bincount(part, minlength=stream.vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


class Loader:
    """Reads a stream's sequences in shuffled order, this data-parallel rank's share of each batch.

    The order is one endless list: epoch after epoch, each a shuffle of all sequences that depends
    on the seed and the epoch. A batch is the next sequences of that list, and data-parallel rank r
    takes the r-th of dp_size equal contiguous parts. The list and the position in it do not depend
    on dp_size, so a run may go on with another one.
    """

    def __init__(
        self,
        stream: Stream,
        sequence_length: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
    ) -> None:
        """Raises DataError if the stream is shorter than one sequence."""
        assert 0 <= dp_rank < dp_size
        self._stream = stream
        self._length = sequence_length
        self._rank, self._size, self._seed = dp_rank, dp_size, seed
        self.num_sequences = stream.num_sequences(sequence_length)
        self._position = 0
        if self.num_sequences == 0:
            raise DataError(
                f"{len(stream)} tokens are too few for one sequence of data.sequence_length="
                f"{sequence_length}; give more text or a smaller data.sequence_length"
            )

    def next(self, batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """This rank's share of the next global batch.

        Args:
            batch: sequences of the global batch; dp_size divides it.

        Returns:
            inputs and targets, each [batch / dp_size, sequence_length] int64; targets are the
            inputs shifted by one token.
        """
        if batch % self._size:
            raise ValueError(
                f"a batch of {batch} sequences does not divide over {self._size} ranks"
            )
        share = batch // self._size
        positions = self._position + self._rank * share + np.arange(share)
        self._position += batch
        rows = [self._stream.sequence(i, self._length) for i in self._indices(positions)]
        both = np.stack(rows) if rows else np.zeros((0, self._length + 1), dtype=np.int64)
        return both[:, :-1], both[:, 1:]

    def state(self) -> dict[str, int]:
        """The position, the same on every rank; for `restore`, with any dp_size."""
        return {
            "sequences": self._position,
            "seed": self._seed,
            "num_sequences": self.num_sequences,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Go on from `state`.

        Raises:
            DataError: the state is of another order: another seed, corpus or sequence length.
        """
        for key, mine in (("seed", self._seed), ("num_sequences", self.num_sequences)):
            if state[key] != mine:
                raise DataError(
                    f"the saved position is of data with {key}={state[key]}, this data has {mine}; "
                    "use the same data, data.sequence_length and run.seed"
                )
        self._position = state["sequences"]

    def _indices(self, positions: NDArray[np.int64]) -> Iterable[int]:
        for position in positions.tolist():
            epoch, place = divmod(position, self.num_sequences)
            yield shuffled(place, self.num_sequences, self._seed, epoch)


class _Text(NamedTuple):
    name: str
    content: bytes


def _stdlib_texts() -> list[_Text]:
    root = Path(sysconfig.get_path("stdlib"))
    found: list[_Text] = []
    for path in _files(root, lambda folder: folder not in _NOT_LIBRARY):
        if path.suffix == ".py" and not path.name.startswith(_BUILD_SPECIFIC):
            content = path.read_bytes()
            if content and b"\0" not in content:
                found.append(_Text(path.relative_to(root).as_posix(), content))
    if not found:
        raise DataError(
            f"{root}: no source text of the standard library there (this Python came without it); "
            'set data.kind to "text" and data.path to some text'
        )
    return found


def _text_files(path: Path) -> list[_Text]:
    if path.is_dir():
        paths = [p for p in _files(path, lambda f: not f.startswith(".")) if p.name[0] != "."]
        texts = [_Text(p.relative_to(path).as_posix(), _read_text(p)) for p in paths]
    elif path.exists():
        texts = [_Text(path.name, _read_text(path))]
    else:
        raise DataError(f"{path}: no such file or folder; data.path must name one")
    texts = [text for text in texts if text.content]
    if not texts:
        raise DataError(f"{path}: is empty, there is no text to train on")
    return texts


def _read_text(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    zero = content.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{path}: is a binary file, not text (a zero byte at offset {zero}); "
            "data.path must name UTF-8 text"
        )
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 text (byte 0x{content[error.start]:02x} at offset "
            f"{error.start}); convert it first"
        ) from None
    return content


def _files(root: Path, enter: Callable[[str], bool]) -> list[Path]:
    """Regular files under `root` by relative path, without the folders that `enter` refuses."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if enter(name)]
        found += [Path(folder, name) for name in names if Path(folder, name).is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _halves(text: _Text, fraction: float) -> list[_Text]:
    """A single document as two, the second about `fraction` of it, cut after the end of a line."""
    content = text.content
    cut = content.find(b"\n", int(len(content) * (1 - fraction))) + 1
    if not 0 < cut < len(content):
        cut = int(len(content) * (1 - fraction))
    parts = (
        _Text(f"{text.name} (begin)", content[:cut]),
        _Text(f"{text.name} (end)", content[cut:]),
    )
    return [part for part in parts if part.content]
