"""A real Slurm of four nodes on this machine, in a folder of its own, while a context lasts.

    with cluster() as slurm:
        job = slurm.submit("#!/bin/sh\\nsrun hostname\\n", "--nodes=2")
        slurm.wait(job, "COMPLETED")

Debian's slurmctld, slurmd and munge, with their own ports, keys, sockets, state and logs: neither
files of the system nor another cluster on the machine matter. Nodes' names lead to addresses of the
loopback, one each, for the cluster's processes alone. Four slurmd processes are four nodes
of four CPUs and two pretend GPUs each. Two leaf switches join them so that the order of their names
is not the order of the topology: leaf1 has node1 and node3, leaf2 has node2 and node4. Jobs of the
partition "urgent" preempt those of "batch", which get a warning and a minute of grace.

Needs Linux, root and the packages slurmctld, slurmd, slurm-client and munge; `why_not` says what is
missing.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

NODES = ("node1", "node2", "node3", "node4")
SWITCHES = {"leaf1": ("node1", "node3"), "leaf2": ("node2", "node4")}
CPUS, GPUS = 4, 2  # of a node
GRACE_S = 60
WAIT_S = 240.0  # for a job to come to its next turn, on a machine that does much else
_DAEMONS = ("munged", "slurmctld", "slurmd")
_COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
_UNSHARE = ("unshare", "--mount", "--propagation=private")
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_START_S, _COMMAND_S, _POLL_S = 120.0, 60.0, 0.1
_KEEPER_LOG = "keeper.log"
# A state of a job that queues itself again is PENDING at once.
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")
_JOB_LINES, _DAEMON_LINES = 80, 12  # of the ends of their files, in an error

_SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
TopologyPlugin=topology/tree
GresTypes=gpu
ReturnToService=1
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=10
MinJobAge=3600
MailProg=/bin/true
NodeName=DEFAULT CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=node[1-4] State=UP MaxTime=60 DefaultTime=10
PartitionName=batch Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""


class SlurmError(AssertionError):
    """What was waited for did not come; the message has what the daemons and the job wrote."""


def why_not() -> str | None:
    """Why this machine cannot have a cluster, or None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm of one's own needs Linux and root"
    path = f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"
    missing = [name for name in (*_DAEMONS, *_COMMANDS) if not shutil.which(name, path=path)]
    if missing:
        return f"{', '.join(missing)} not found; Debian: slurmctld slurmd slurm-client munge"
    done = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"{done.stderr.strip()}; that takes CAP_SYS_ADMIN, in a container a privileged one"
    return None


@dataclass(frozen=True)
class Cluster:
    """The cluster's folder and the environment in which Slurm's commands reach it.

    Jobs are named by number; a task of an array by "ARRAY_INDEX", because the array's number is
    also that of its last task.
    """

    folder: Path
    environ: Mapping[str, str] = field(repr=False)

    def run(
        self,
        *command: str | Path,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
        given: str | None = None,
        timeout_s: float = _COMMAND_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster would; `environ` adds to the environment."""
        return subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env={**self.environ, **(environ or {})},
            input=given,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def ask(self, *command: str | Path, given: str | None = None, cwd: Path | None = None) -> str:
        """The output of a command that has to succeed, such as scontrol."""
        done = self.run(*command, given=given, cwd=cwd)
        if done.returncode != 0:
            raise SlurmError(f"{command} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def submit(self, script: str, *options: str, cwd: Path | None = None) -> int:
        """Submit a batch script as it is; its job's id."""
        return int(self.ask("sbatch", "--parsable", *options, given=script, cwd=cwd).split(";")[0])

    def job(self, job: int | str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, NodeList, StdOut and so on."""
        text = self.ask("scontrol", "show", "job", str(job), "--oneliner")
        return dict(re.findall(r"(\S+?)=(.*?)(?= \S+?=|$)", text.strip()))

    def script(self, job: int) -> str:
        """The batch script that was submitted."""
        return self.ask("scontrol", "write", "batch_script", str(job), "-")

    def jobs(self) -> list[int]:
        """Ids of all jobs that wait or run."""
        return [int(line) for line in self.ask("squeue", "--noheader", "--format=%A").split()]

    def release(self, job: int | str) -> None:
        """Let a requeued job start soon; Slurm would wait two minutes with that.

        Not within the second in which it ended: its nodes refuse every start older than that.
        """

        def released() -> bool:
            known = self.job(job)
            if known["JobState"] != "PENDING":
                return True
            begin = datetime.fromisoformat(known["EligibleTime"])
            # Its nodes' last word on the earlier start makes it wait anew.
            if begin > datetime.now() + timedelta(seconds=5):
                self.ask("scontrol", "update", f"jobid={job}", "starttime=now+2")
            return False

        self.until(released, f"job {job} to start", job)

    def set_time_limit(self, job: int | str, *, left_s: int) -> None:
        """Give a job a time limit that leaves it at most this long from now, and a minute less."""
        days, _, clock = self.job(job)["RunTime"].rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        ran_s = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
        limit = (ran_s + left_s) // 60
        self.ask("scontrol", "update", f"jobid={job}", f"timelimit={limit}")

    def wait(self, job: int | str, *states: str, output: Path | None = None) -> dict[str, str]:
        """Wait until a job is in one of these states, and return what `job` does.

        Raises:
            SlurmError: as `until`.
        """

        def there() -> bool:
            return self.job(job)["JobState"] in states

        self.until(there, f"job {job} to be {' or '.join(states)}", job, output=output)
        return self.job(job)

    def until(
        self,
        holds: Callable[[], bool],
        what: str,
        job: int | str | None = None,
        *,
        output: Path | None = None,
        timeout_s: float = WAIT_S,
    ) -> None:
        """Wait until `holds()`.

        Args:
            holds: asked ten times a second.
            what: is waited for, in words.
            job: that has to bring it about.
            output: what that has written, for the error; else what Slurm knows of that.
            timeout_s: limit, seconds.

        Raises:
            SlurmError: it does not hold within the limit, or the job has ended without it.
        """
        end = time.monotonic() + timeout_s
        while True:
            over = job is not None and self.job(job)["JobState"] in _ENDED
            if holds():
                return
            if over:
                raise self.failure(f"the job has ended; waited for {what}", job, output)
            if time.monotonic() > end:
                raise self.failure(f"waited {timeout_s:g} s for {what}", job, output)
            time.sleep(_POLL_S)

    def failure(
        self, what: str, job: int | str | None = None, output: Path | None = None
    ) -> SlurmError:
        """An error with the last lines of the job and of the daemons."""
        parts = [what]
        if job is not None:
            known = self.job(job)
            parts += [" ".join(f"{name}={value}" for name, value in known.items())]
            parts += [tail(output or Path(known["StdOut"]), _JOB_LINES)]
        logs = sorted(self.folder.glob("slurm*.log"))
        logs = logs or [self.folder / _KEEPER_LOG]  # they have not come so far
        return SlurmError("\n".join([*parts, *(tail(log, _DAEMON_LINES) for log in logs)]))

    def clear(self) -> None:
        """Cancel every job, wait until none runs, and bring back every node.

        Raises:
            SlurmError: they do not.
        """

        def none_left() -> bool:
            # Again and again: one that queues itself just now outlives a cancellation.
            self.ask("scancel", "--user=root")
            return not self.jobs()

        self.until(none_left, "the jobs to end")
        down = self.ask("sinfo", "--noheader", "--states=down,drain", "--format=%N").strip()
        if down:
            self.ask("scontrol", "update", f"nodename={down}", "state=resume")
        self.until(self.idle, "idle nodes")

    def idle(self) -> bool:
        """Whether every node is up and without work."""
        states = self.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T")
        return states.stdout.split("\n")[:-1] == [f"{node} idle" for node in NODES]


def tail(file: Path, count: int) -> str:
    """The last `count` lines of a file, under its name."""
    try:
        lines = file.read_text(errors="replace").splitlines()
        lines = [line for line in lines if "mpi" not in line]  # PMIx, which Debian leaves out
    except OSError as error:
        lines = [str(error)]
    return "\n".join([f"--- {file}", *lines[-count:]])


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster with idle nodes; all of it, jobs included, ends with the context or this process.

    Raises:
        SlurmError: the daemons do not work; the message has what they wrote.
    """
    folder = Path(tempfile.mkdtemp(prefix="counterflow-slurm-"))
    configure(folder, free_ports(1 + len(NODES)))
    # Not the variables of a job in which the tests themselves run.
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    environ["PATH"] = f"{environ.get('PATH', '')}:{_SYSTEM_PATH}"
    environ["SLURM_CONF"] = str(folder / "slurm.conf")
    keeper = Path(__file__).with_name("keeper.py")
    with (folder / _KEEPER_LOG).open("w") as log:
        process = subprocess.Popen(
            [*_UNSHARE, sys.executable, keeper, folder, json.dumps(daemons(folder))],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environ,
            cwd=folder,
        )
    made = Cluster(folder, environ)
    try:
        made.until(made.idle, "idle nodes", timeout_s=_START_S)
        yield made
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(120)


def configure(folder: Path, ports: Sequence[int]) -> None:
    """Write what the daemons read: slurm.conf, topology.conf, gres.conf, munge's key, hosts."""
    (folder / "state").mkdir()
    (folder / "munge").mkdir()
    (folder / "munge" / "key").write_bytes(random.randbytes(128))
    (folder / "munge" / "key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    addresses = {name: f"127.0.0.{10 + i}" for i, name in enumerate(NODES, start=1)}
    hosts = [f"{address} {name}" for name, address in addresses.items()]
    (folder / "hosts").write_text("\n".join([Path("/etc/hosts").read_text(), *hosts, ""]))
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={port}"
        for (name, address), port in zip(addresses.items(), ports[1:], strict=True)
    ]
    text = _SLURM_CONF.format(
        folder=folder,
        host=host,
        ports=ports,
        nodes="\n".join(nodes),
        cpus=CPUS,
        gpus=GPUS,
        grace_s=GRACE_S,
    )
    (folder / "slurm.conf").write_text(text)
    leaves = [f"SwitchName={name} Nodes={','.join(nodes)}" for name, nodes in SWITCHES.items()]
    spine = f"SwitchName=spine Switches={','.join(SWITCHES)}"
    (folder / "topology.conf").write_text("\n".join([*leaves, spine, ""]))
    (folder / "gres.conf").write_text(f"Name=gpu File=/dev/tty[0-{GPUS - 1}]\n")


def daemons(folder: Path) -> list[list[str]]:
    """Commands of the daemons, each in the foreground."""
    munge = folder / "munge"
    # A key that is root's, in a folder that is not the system's, has to be forced.
    munged = ["munged", "--foreground", "--force", f"--socket={munge / 'socket'}"]
    for name in ("key", "pid", "log", "seed"):
        munged.append(f"--{name}-file={munge / name}")
    return [munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at, below those that jobs choose by their numbers (from 20000)."""
    found: list[int] = []
    for port in random.sample(range(17000, 20000), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise SlurmError("no free ports from 17000 to 19999")
