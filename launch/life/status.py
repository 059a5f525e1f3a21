"""Exit statuses of a run, for whoever started it: a shell, torchrun, Slurm.

Besides these: 128 + N of a process that signal N ended, and a failed rank's own status.
"""

from __future__ import annotations

DONE = 0
FAILED = 1
MISTAKE = 2  # a user's: never tried again
STOPPED = 75  # asked to stop by a signal, checkpoint saved: to be queued again
BAD_NODE = 76  # preflight found one, whose name stands in the job's folder: exclude it, queue again

FINAL = frozenset({MISTAKE, STOPPED, BAD_NODE})  # of a rank: starting again at once cannot help
