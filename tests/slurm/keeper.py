"""Keeps processes and all that come of them, and ends them all when its own maker is gone.

    unshare --mount python keeper.py FOLDER '[["munged", "-F"], ["slurmctld", "-D"]]' < PIPE

Slurm's daemons start each job step in a session of its own, away from their own process group. Here
a process whose parent ends becomes a child of the keeper (it is a "subreaper", see prctl(2)), so
none is ever lost: when the pipe closes, because its owner closed it or was killed, the keeper ends
every child that it has, and then those that become its children by that, until there are none; and
it removes FOLDER. To all of them FOLDER/hosts is /etc/hosts.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys

_SET_CHILD_SUBREAPER = 36
_LOOK_S = 0.5


def main(folder: str, commands: list[list[str]]) -> None:
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # In a mount namespace of our own: the file is another one for us and ours alone.
    subprocess.run(["mount", "--bind", os.path.join(folder, "hosts"), "/etc/hosts"], check=True)
    # An interrupt from the keyboard goes to the whole group; the pipe tells when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    daemons = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in commands]
    while not select.select([sys.stdin], [], [], _LOOK_S)[0]:
        _reap()
    for daemon in reversed(daemons):
        with contextlib.suppress(ProcessLookupError):
            os.kill(daemon.pid, signal.SIGKILL)
    while _children():
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
        _reap()
    shutil.rmtree(folder, ignore_errors=True)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _children() -> list[int]:
    found: list[int] = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and _parent(entry) == os.getpid():
                found.append(int(entry))
    return found


def _parent(pid: str) -> int:
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[1])


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
