"""What is wrong with a checkpoint, as one line for a person."""

from __future__ import annotations

import errno

_REMEDIES = {
    errno.ENOSPC: "free some space, lower checkpoint.keep, or take a run.folder on a larger disk",
    errno.EDQUOT: "free some of the quota, lower checkpoint.keep, or take another run.folder",
    errno.EACCES: "make it writable, or take another run.folder",
    errno.EPERM: "make it writable, or take another run.folder",
    errno.EROFS: "take a run.folder on a file system that can be written to",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or take more ranks",
    errno.EIO: "look at the disk, or take a run.folder on another one",
    errno.ESTALE: "look at the file server, or take a run.folder on another one",
    errno.ENOENT: "run.folder must be one folder that all nodes share",
}
_READING = {
    errno.EACCES: "give whoever starts this the right to read it",
    errno.EPERM: "give whoever starts this the right to read it",
    errno.EIO: "look at the disk; if the file is lost, move its checkpoint away",
    errno.ESTALE: "look at the file server",
}


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is damaged, or does not fit; the message names the file."""


def told(error: OSError, path: object, doing: str) -> CheckpointError:
    """An error of the operating system as a line: path, what it says, what to do about it.

    Args:
        error: as raised.
        path: what was being written, where the error itself does not say.
        doing: such as "cannot be written".
    """
    return CheckpointError(_line(error, path, doing, _REMEDIES.get(error.errno or 0, "")))


def unreadable(error: OSError, path: object) -> str:
    """The same, of what was to be read."""
    return _line(error, path, "cannot be read", _READING.get(error.errno or 0, ""))


def _line(error: OSError, path: object, doing: str, remedy: str) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    line = f"{error.filename or path}: {doing}: {reason}"
    return f"{line}; {remedy}" if remedy else line
