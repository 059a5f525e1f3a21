"""Events out of the text of a trace, without ever holding the whole of it decoded.

The plain way decodes one event after another. The quick way cuts a block of text into events where
one ends and the next begins, drops those that begin like events nobody wants, and decodes the rest
in one go. It is taken for a block only if the cuts are certain, by this argument:

- The cut is the text `}`, gap, `{` as it stands between two events. A gap with a line
  break cannot be inside a string, where JSON escapes line breaks. For any other gap the cut goes on
  to the first key's opening quote and first letter, which in a string would need a backslash.
- So a cut closes an object that is an element of some array and opens the next element. If between
  two cuts every `{` follows a colon, no array in that text has an object as an element; then the
  object that is closed is the one that the cut before opened: an event, whole and alone.
- Text with any other `{`, such as a kernel's name, is decoded by itself, which proves it whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

Event: TypeAlias = dict[str, Any]

_DECODER = json.JSONDecoder(strict=False, parse_float=str)  # decimals stay text, and so exact
_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s,]*")
_GAP = re.compile(r"\s*,\s*\{")
_FIRST_KEY = re.compile(r'\s*"\w')
# How an event begins whose phase and category come first; what they are decides whether to drop it.
_BEGINNINGS = (
    re.compile(r'\{\s*"ph"\s*:\s*"[^"\\X]"'),
    re.compile(r'\{\s*"ph"\s*:\s*"X"\s*,\s*"cat"\s*:\s*"[^"\\]*"'),
    re.compile(r'\{\s*"cat"\s*:\s*"[^"\\]*"\s*,\s*"ph"\s*:\s*"X"'),
)
_NAME = re.compile(r'\s*,\s*"name"\s*:\s*"[^"\\]*"')
_MOST_BEGINNINGS = 40
_SAMPLE = 5  # of so many decoded events one is looked at
_BATCH = 1000  # events decoded one by one that are handed over together
# An error this near the end of what is there, in characters, may be a value that goes on.
_CUT_SHORT = 64


class BrokenTextError(Exception):
    """The text ends or stops being JSON here; the message says which."""


@dataclass
class Scanned:
    """What stands around the events.

    Attributes:
        top: top-level keys with their values, other than the events.
        found: there is a list of events.
        num_events: how many of them were passed, wanted or not.
        broken: why the text could not be read to its end; "" if it could.
        offset: characters that were read up to there.
    """

    top: dict[str, Any] = field(default_factory=dict[str, Any])
    found: bool = False
    num_events: int = 0
    broken: str = ""
    offset: int = 0


class _Text:
    """A window on the text, which moves forward."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self.blocks = blocks
        self.text = ""
        self.pos = 0
        self.before = 0  # characters that were dropped before `text`

    def more(self) -> bool:
        """Get more text; at least as much as is pending, so that long values stay linear."""
        pending = self.text[self.pos :]
        parts, size = [pending], 0
        for block in self.blocks:
            parts.append(block)
            size += len(block)
            if size > len(pending):
                break
        self.before += self.pos
        self.text, self.pos = "".join(parts), 0
        return size > 0

    def peek(self, skipped: re.Pattern[str] = _SPACE) -> str:
        """The next character after spaces; "" at the end."""
        while True:
            self.pos = _end(skipped, self.text, self.pos)
            if self.pos < len(self.text):
                return self.text[self.pos]
            if not self.more():
                return ""

    def value(self) -> Any:
        """Decode the value that begins here; raises BrokenTextError if none is whole here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.pos)
            except json.JSONDecodeError as error:
                open_string = error.msg.startswith("Unterminated string")
                if not open_string and error.pos < len(self.text) - _CUT_SHORT:
                    raise BrokenTextError(f"is not JSON there ({error.msg})") from None
                if not self.more():
                    raise BrokenTextError("ends in the middle") from None
            except (ValueError, RecursionError) as error:
                raise BrokenTextError(f"cannot be decoded there ({error})") from None
            else:
                whole = end < len(self.text) or self.text[end - 1] in '"}]'
                if whole or not self.more():  # otherwise a number, which might go on
                    self.pos = end if whole else len(self.text)
                    return value


def _end(pattern: re.Pattern[str], text: str, pos: int) -> int:
    """Where a pattern that matches anything, even nothing, ends."""
    match = pattern.match(text, pos)
    assert match is not None
    return match.end()


@dataclass(frozen=True)
class Wanted:
    """Which events must not be left out; of the rest, those may be that are cheap to tell.

    Attributes:
        categories: of events with a beginning and a duration ("X"), each with the names of those
            that are not needed though of this category.
        phases: of other events, whatever their category.
        containing: any event whose text contains this.
    """

    categories: Mapping[str, frozenset[str]]
    phases: frozenset[str]
    containing: str


def scan(
    blocks: Iterator[str],
    take: Callable[[list[Event]], None],
    wanted: Callable[[Event], Wanted],
    quick: bool = True,
) -> Scanned:
    """Hand the events of a trace to `take`, some at a time, in their order.

    Args:
        blocks: the file's text in pieces of any size.
        take: gets lists of events. Decimals in them are text. An element that is not an object
            is left out, though counted.
        wanted: given the top-level keys before the events, which events are surely handed over;
            others may be.
        quick: cut blocks of text where that is certain; otherwise decode event after event.

    Returns:
        What stands around the events; broken text is told there, not raised.
    """
    scanned, text = Scanned(), _Text(blocks)
    events = _Events(text, take, wanted, quick, scanned)
    try:
        first = text.peek()
        if first == "[":
            events.take_all()
        elif first == "{":
            _document(text, events, scanned)
        else:
            scanned.broken = "is not JSON" if first else "is empty"
    except BrokenTextError as error:
        scanned.broken = str(error)
    scanned.offset = text.before + text.pos
    return scanned


def _document(text: _Text, events: _Events, scanned: Scanned) -> None:
    text.pos += 1
    while (following := text.peek(_BETWEEN)) != "}":
        if following != '"':
            raise BrokenTextError("is not JSON there" if following else "ends in the middle")
        key = str(text.value())
        if (following := text.peek()) != ":":
            raise BrokenTextError("is not JSON there" if following else "ends in the middle")
        text.pos += 1
        if text.peek() == "[" and key == "traceEvents":
            events.take_all()
        else:
            scanned.top[key] = text.value()
    text.pos += 1


@dataclass
class _Events:
    """Passes the array of events."""

    text: _Text
    take: Callable[[list[Event]], None]
    wanted: Callable[[Event], Wanted]
    quick: bool
    scanned: Scanned
    batch: list[Event] = field(default_factory=list[Event])

    def take_all(self) -> None:
        """Pass the array that begins here."""
        text = self.text
        text.pos += 1
        self.scanned.found = True
        wanted = self.wanted(self.scanned.top)
        cutter = _Cutter(wanted) if self.quick else None
        plain_until = 0  # cutting failed for what is before this, in characters of the file
        try:
            while (following := text.peek(_BETWEEN)) != "]":
                if not following:
                    raise BrokenTextError("ends in the middle")
                place = text.before + text.pos
                if cutter is not None and place >= plain_until and cutter.fits(text):
                    if self._cut(cutter):
                        continue
                    plain_until = text.before + len(text.text)
                self._decode_one()
            text.pos += 1
        finally:  # what was whole before the text breaks off
            self._hand_over()

    def _decode_one(self) -> None:
        event = self.text.value()
        self.scanned.num_events += 1
        if isinstance(event, dict):
            self.batch.append(cast(Event, event))
        if len(self.batch) == _BATCH:
            self._hand_over()

    def _cut(self, cutter: _Cutter) -> bool:
        passed = cutter.cut(self.text)
        if passed:
            self._hand_over()
            self.take(cutter.events)
            self.scanned.num_events += passed
        return passed > 0

    def _hand_over(self) -> None:
        if self.batch:
            self.take(self.batch)
            self.batch = []


class _Cutter:
    """Cuts text into events at one separator, and drops those that begin like unwanted ones."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.separator = ""
        self.opening = ""
        self.dropped: tuple[str, ...] = ()
        self.events: list[Event] = []

    def cut(self, text: _Text) -> int:
        """Pass the whole events that are there; those not dropped are then in `events`.

        Returns:
            How many were passed. 0 if the cuts are not certain or there is none; then nothing has
            been passed.
        """
        end = text.text.rfind(self.separator, text.pos) if self.separator else -1
        if end < 0:
            if not self._learn_separator(text) or not self.fits(text):
                return 0
            end = text.text.rfind(self.separator, text.pos)
        start = text.pos + len(self.opening)
        if end < start:
            return 0
        body = text.text[start:end]
        pieces = body.split(self.separator)
        kept, certain = self._kept(body, pieces)
        try:
            extra = 0 if certain else self._extra(kept)
            self.events = self._decode(kept)
        except (ValueError, RecursionError):
            return 0
        if extra:
            self.events = _objects(self.events)
        else:
            self._learn_beginnings(kept)
        text.pos = end + self.separator.index("{")
        return len(pieces) + extra

    def fits(self, text: _Text) -> bool:
        """Whether the event that begins here opens like those that are cut."""
        return text.text.startswith(self.opening, text.pos)

    def _learn_separator(self, text: _Text) -> bool:
        """Take the separator from what stands behind the event that begins here, if it is whole."""
        try:
            _, end = _DECODER.raw_decode(text.text, text.pos)
        except (ValueError, RecursionError):
            return False
        gap = _GAP.match(text.text, end)
        if gap is None or text.text[end - 1] != "}":
            return False
        separator = "}" + gap.group()
        if "\n" not in separator:
            key = _FIRST_KEY.match(text.text, gap.end())
            if key is None:
                return False
            separator += key.group()
        if separator != self.separator:
            self.separator = separator
            self.opening = separator[separator.index("{") :]
            self.dropped = ()
        return True

    def _kept(self, body: str, pieces: list[str]) -> tuple[list[str], bool]:
        """The pieces to decode, and whether each is certainly one event.

        What is dropped is certainly one event a piece.
        """
        dropped, contained = self.dropped, self.wanted.containing
        if contained in body:
            kept = [p for p in pieces if not p.startswith(dropped) or contained in p]
        else:
            kept = [p for p in pieces if not p.startswith(dropped)]
        # Where all doubts are about what is kept, none are about what is dropped.
        text = "\n".join(kept)
        in_body, in_kept = _openings(body) - (len(pieces) - 1), _openings(text)
        harmless = text.count(":{") if in_kept else 0
        if in_body == in_kept or in_body - body.count(":{") == in_kept - harmless:
            return kept, in_kept == harmless
        kept = [p for p in pieces if not p.startswith(dropped) or contained in p or _doubtful(p)]
        return kept, False

    def _extra(self, pieces: list[str]) -> int:
        """How many events there are besides one a piece.

        Raises:
            ValueError: a piece is not a whole event, or whole events.
        """
        return sum(len(self._decode([piece])) - 1 for piece in pieces if _doubtful(piece))

    def _decode(self, pieces: list[str]) -> list[Event]:
        if not pieces:
            return []
        joined = ("}," + self.opening).join(pieces)
        return _DECODER.decode(f"[{self.opening}{joined}}}]")

    def _learn_beginnings(self, pieces: list[str]) -> None:
        """Note how unwanted events begin, to drop the next ones undecoded."""
        wanted = self.wanted
        # A sample is enough: what is frequent is found, and what is rare costs little.
        for piece, event in zip(pieces[::_SAMPLE], self.events[::_SAMPLE], strict=True):
            if len(self.dropped) >= _MOST_BEGINNINGS:
                return
            phase, category, name = (str(event.get(key)) for key in ("ph", "cat", "name"))
            named = phase == "X" and category in wanted.categories
            if name not in wanted.categories[category] if named else phase in wanted.phases:
                continue
            beginning = _beginning(self.opening + piece, named)[len(self.opening) :]
            if beginning and not piece.startswith(self.dropped):
                self.dropped = (*self.dropped, beginning)


def _objects(elements: list[Any]) -> list[Event]:
    return [cast(Event, element) for element in elements if isinstance(element, dict)]


def _beginning(text: str, with_name: bool) -> str:
    """The beginning of an event's text, up to its phase and category and maybe its name; or ""."""
    for pattern in _BEGINNINGS:
        if match := pattern.match(text):
            name = _NAME.match(text, match.end())
            if with_name:
                return text[: name.end()] if name else ""
            return match.group()
    return ""


def _openings(text: str) -> int:
    """Number of `{` but those after colon and space, which begin no element of an array."""
    return text.count("{") - text.count(": {")


def _doubtful(piece: str) -> bool:
    """Whether an array within may have objects as elements."""
    return _openings(piece) != piece.count(":{")
