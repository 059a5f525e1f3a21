"""`counterflow launch`: what is refused, and the script that is submitted; no Slurm needed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.launch.cli import main
from counterflow.launch.config import load
from counterflow.launch.settings import ConfigError
from counterflow.launch.slurm.examples import COMMANDS, examples
from counterflow.launch.slurm.script import (
    Stamp,
    Task,
    environment_lines,
    job_script,
    sbatch_quote,
    step_lines,
    task_lines,
)
from counterflow.launch.slurm.section import SlurmConfig
from counterflow.launch.slurm.submit import JobId, clean, parse_job_id, wait_for
from tests.launch.commands import Command

LAUNCH = Command("launch")
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
FOUR = ("slurm", "--nodes", "2", "--ranks-per-node", "2")  # the default mesh has four ranks
STAMP = Stamp(["counterflow", "launch"], "/home", "1", "today")
_texts = st.text(st.characters(blacklist_categories=["Cc", "Cs"]), max_size=12)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH for stand-ins of Slurm's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "launch local or launch slurm: nothing is given"),
        (["here"], "launch local or launch slurm: got 'here'"),
        (["slurm"], "end with `-- train ...`"),
        (["slurm", "--", "doctor"], "`train ...`; got `doctor`"),
        (["slurm", "x", "--", "train"], "unknown argument 'x' before `--`"),
        (["slurm", "--nodez", "2", "--", "train"], "unknown key nodez; did you mean nodes?"),
        (["slurm", "--nodes", "--", "train"], "--nodes needs a value"),
        (["slurm", "--nodes", "two", "--", "train"], "--nodes: nodes must be a whole number"),
        (["slurm", "--nodes", "2", "--", "train"], "give --gpus-per-node, or --ranks-per-node"),
        ([*FOUR, "--gpus-per-node", "2", "--", "train"], "give one of them"),
        ([*FOUR, "--time", "soon", "--", "train"], "time must be minutes, [D-]H:MM:SS"),
        ([*FOUR, "--mem", "lots", "--", "train"], "mem must be a number with K, M, G or T"),
        ([*FOUR, "--nodelist", "n[2-1]", "--", "train"], "'2-1' is a range that goes down"),
        ([*FOUR, "--env", "A-B=1", "--", "train"], "env must be KEY=VALUE"),
        ([*FOUR, "--sbatch", "hold", "--", "train"], "sbatch must be one option"),
        ([*FOUR, "--setup", "a\nb", "--", "train"], "a line break or another control character"),
        ([*FOUR, "--container-mounts", "/a:/b", "--", "train"], "without container_image"),
        ([*FOUR, "--signal-seconds", "70000", "--", "train"], "signal_seconds must be 0 (never)"),
        ([*FOUR, "--config", "none.toml", "--", "train"], "none.toml: no such configuration file"),
        ([*FOUR, "--", "train", "--train.stepz", "3"], "unknown key train.stepz"),
        ([*FOUR, "--", "train", "--data.kind", "text", "--data.path", "x"], "no such file"),
        ([*FOUR, "--", "train", "--run.nproc", "4"], "run.nproc=4 is for one machine"),
        ([*FOUR, "--", "train", "--run.device", "cuda"], "run.device=cuda with --ranks-per-node"),
        ([*FOUR, "--", "train", "--run.folder", "a\\b"], "sbatch cannot write to a folder"),
        (["local", "--nodes", "2", "--", "train"], "unknown key nodes"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(
    capsys: pytest.CaptureFixture[str], commands: Path, arguments: list[str], what: str
) -> None:
    stand_in(commands, "sbatch", "touch submitted; echo 1")
    assert what in LAUNCH.error_of(capsys, *arguments)
    assert not Path("submitted").exists()
    assert not Path("runs").exists()


def test_nodes_that_do_not_make_up_the_mesh_are_refused_with_the_number_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = LAUNCH.error_of(capsys, "slurm", "--nodes", "3", "--gpus-per-node", "2", "--", "train")
    assert "are 6 ranks, but the mesh has 4; give --nodes 2" in error


def test_the_dry_run_is_the_script_that_is_submitted(
    capsys: pytest.CaptureFixture[str], commands: Path
) -> None:
    stand_in(commands, "sbatch", 'cat >given; echo "$*" >options; echo "17;west"')
    options = [*FOUR, "--job-name", 'a "b" $c', "--env", "X=y z", "--setup", "module load cuda"]
    shown = LAUNCH.shown(capsys, *options, "--dry-run", "--", "train", "--run.name", "it's")
    assert not Path("runs").exists()
    told = LAUNCH.shown(capsys, *options, "--", "train", "--run.name", "it's")
    assert Path("given").read_text() == shown
    assert Path("runs/it's/slurm/17/submit.sh").read_text() == shown
    assert Path("options").read_text() == "--parsable\n"
    assert "submitted job 17: run it's" in told
    assert "scancel --clusters=west 17" in told


def test_the_configuration_that_was_checked_is_the_one_that_runs(
    capsys: pytest.CaptureFixture[str], commands: Path
) -> None:
    stand_in(commands, "sbatch", "cat >given; echo 17")
    Path("corpus").write_text("some words\n" * 2000)
    text = ("--data.kind", "text", "--data.path", "corpus")
    LAUNCH.shown(capsys, *FOUR, "--max-restarts", "5", "--", "train", *text)
    (file,) = Path("runs/small/slurm").glob("train-*.toml")
    assert f"config={file.absolute()}\n" in Path("given").read_text()
    config = load(file)
    assert config.run.path == Path("runs/small").absolute()
    assert config.data.path == str(Path("corpus").absolute())
    assert (config.run.max_restarts, config.run.logs, config.run.device) == (5, True, "cpu")
    # A job that waits keeps its configuration when the next one of its name is submitted.
    LAUNCH.shown(capsys, *FOUR, "--", "train", *text, "--train.steps", "70")
    assert load(file) == config


def test_the_stamp_makes_the_same_script_again(
    capsys: pytest.CaptureFixture[str], commands: Path
) -> None:
    options = [*FOUR, "--env", "A='b' $(c)", "--setup", "echo # d", "--config", "job.toml"]
    Path("job.toml").write_text('account = "my account"\nexclusive = true\n')
    script = LAUNCH.shown(capsys, *options, "--dry-run", "--", "train", "--train.steps", "30")
    command = shlex.split(script.splitlines()[2].removeprefix("#"))
    assert command[:2] == ["counterflow", "launch"]
    assert LAUNCH.shown(capsys, "slurm", "--dry-run", *command[3:]) == script
    assert '#SBATCH --account="my account"' in script
    assert "#SBATCH --exclusive" in script


def test_without_sbatch_the_remedy_is_told(
    capsys: pytest.CaptureFixture[str], commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(commands))
    error = LAUNCH.error_of(capsys, *FOUR, "--", "train")
    assert error.startswith("sbatch is not on PATH: submit from a login node")


def test_what_sbatch_objects_to_is_passed_on(
    capsys: pytest.CaptureFixture[str], commands: Path
) -> None:
    stand_in(commands, "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    error = LAUNCH.error_of(capsys, *FOUR, "--partition", "x", "--", "train")
    assert error.startswith("sbatch refuses the job: invalid partition specified: x; change")


def test_of_several_configurations_all_bad_ones_are_named_and_none_is_submitted(
    capsys: pytest.CaptureFixture[str], commands: Path
) -> None:
    stand_in(commands, "sbatch", "touch submitted; echo 1")
    Path("a.toml").write_text('[run]\nname = "a"\n')
    Path("b.toml").write_text('[run]\nname = "b"\n[mesh]\ndp = 3\nep = 1\n')
    Path("c.toml").write_text("[train]\nstepz = 3\n")
    arrays = [word for name in "abc" for word in ("--array", f"{name}.toml")]
    assert main(["launch", *FOUR, *arrays, "--", "train"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "2 of 3 configurations; nothing submitted:" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["b.toml:", "c.toml:"]
    assert not Path("submitted").exists()


def test_each_configuration_of_an_array_is_a_task_with_a_run_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("a.toml").write_text('[run]\nname = "a"\n')
    Path("b.toml").write_text('[run]\nname = "b c"\n')
    arrays = ("--array", "a.toml", "--array", "b.toml")
    script = LAUNCH.shown(capsys, *FOUR, *arrays, "--dry-run", "--", "train")
    assert "#SBATCH --array=0-1" in script
    assert re.search(r"  0\) name=a; run=\S+/runs/a; config=\S+ ;;", script)
    assert re.search(r"  1\) name='b c'; run='\S+/runs/b c'; config='", script)
    Path("b.toml").write_text('[run]\nname = "a"\n')
    error = LAUNCH.error_of(capsys, *FOUR, *arrays, "--dry-run", "--", "train")
    assert "a.toml and b.toml have the same run" in error


@given(name=_texts, value=_texts, folder=_texts)
@settings(max_examples=50, deadline=None)
def test_no_text_reaches_the_shell_unquoted(name: str, value: str, folder: str) -> None:
    run = PurePosixPath("/runs") / folder
    slurm = SlurmConfig(ranks_per_node=2, env=(f"VALUE={value}",), interface="ib0")
    lines = [*environment_lines(slurm), *task_lines([Task(name, run, run / "c.toml")])]
    lines += ['printf "%s\\0" "$VALUE" "$name" "$run" "$config"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, check=True)
    expected = [value, name, str(run), str(run / "c.toml")]
    assert done.stdout.decode() == "".join(f"{text}\0" for text in expected)


@given(_texts)
@settings(deadline=None)
def test_a_word_of_sbatch_ends_where_its_text_does(text: str) -> None:
    """By the rules of sbatch 22.05: quotes group, a backslash takes what follows as it is."""
    quoted = sbatch_quote(text) + " # rest"
    found, at, quote = "", 0, ""
    while at < len(quoted) and (quote or not (quoted[at].isspace() or quoted[at] == "#")):
        character = quoted[at]
        if character == "\\":
            at += 1
            found += quoted[at]
        elif quote == character or (not quote and character in "\"'"):
            quote = "" if quote else character
        else:
            found += character
        at += 1
    assert found == text
    assert quoted[at:] == " # rest"


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_containers_words_reach_srun_whole(tmp_path: Path, runtime: str) -> None:
    slurm = SlurmConfig(
        gpus_per_node=8,
        container_image="my image.sqsh",
        container_mounts=("/my data:/data:ro",),
        container_runtime=runtime,  # pyright: ignore[reportArgumentType]
    )
    lines = [*step_lines(slurm, "python3"), "run='/my runs/a'", "folder=$run/f", "config=$run/c"]
    stand_in(tmp_path, "srun", 'printf "%s\\0" "$@"')
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    script = "\n".join([*lines, "start"])
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env=environ)
    words = done.stdout.decode().split("\0")[:-1]
    own = words.index("python3")
    node = ["--ranks-per-node=8", "--folder=/my runs/a/f", "--", "train", "/my runs/a/c"]
    assert words[own + 4 :] == node
    if runtime == "pyxis":
        assert words[own - 3 : own] == [
            "--container-image=my image.sqsh",
            "--container-mounts=/my runs/a:/my runs/a,/my data:/data:ro",
            "--container-workdir=/my runs/a",
        ]
    else:
        assert words[own - 1] == "my image.sqsh"
        assert words[words.index("apptainer") :][:5] == (
            ["apptainer", "exec", "--nv", "--bind", "/my runs/a:/my runs/a"]
        )


_SRUN = """
for word in "$@"; do case $word in --folder=*) folder=${word#--folder=} ;; esac; done
i=0
for status in $STATUSES; do echo "$status" >"$folder/status/n$((i++))"; done
[[ -z $BAD ]] || printf '%s\\n' $BAD >"$COUNTERFLOW_BAD_NODES"
[[ -z $AGAIN ]] || touch "$folder/again"
[[ -z $SAVED ]] || mkdir -p "$RUN/checkpoints/step-$SAVED"
[[ -z $TERMINATE ]] || { kill -TERM "$PPID"; sleep 0.3; }
exit "$ENDS"
"""
_SCONTROL = """
case "$1 $2" in
  "show topology") echo "SwitchName=s Level=0 Nodes=n[1-2]" ;;
  "show job") echo "JobId=7 Reason=${REASON:-None} ExcNodeList=${EXCLUDED:-(null)} NumNodes=2" ;;
  *) echo "scontrol $*" ;;
esac
"""


class Job:
    """The script run as a batch job, with stand-ins for srun and scontrol."""

    def __init__(self, folder: Path, slurm: SlurmConfig | None = None) -> None:
        self.run, self.bin = folder / "a run", folder / "commands"
        self.bin.mkdir()
        stand_in(self.bin, "srun", _SRUN)
        stand_in(self.bin, "scontrol", _SCONTROL)
        task = Task("a run", PurePosixPath(self.run), PurePosixPath(self.run / "c.toml"))
        slurm = slurm or SlurmConfig(nodes=2, ranks_per_node=1, max_requeues=3)
        self.script = job_script(slurm, [task], python=sys.executable, stamp=STAMP)

    def ends(self, **environ: str) -> tuple[int, list[str]]:
        """Exit status and lines, scontrol's calls among them."""
        told = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "RUN": str(self.run),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "ENDS": "0",
            "STATUSES": "",
            "BAD": "",
            "SAVED": "",
            "TERMINATE": "",
            "AGAIN": "",
        }
        done = subprocess.run(
            ["bash"], input=self.script, env=told | environ, capture_output=True, text=True
        )
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_job_that_is_done_says_where_its_results_are(job: Job) -> None:
    status, lines = job.ends(STATUSES="0 0")
    assert (status, lines[-1]) == (0, f"counterflow: job 7 is done: results are in {job.run}")
    assert (job.run / "slurm/7/start-0/topology").read_text().startswith("SwitchName=s")


@pytest.mark.parametrize(
    ("environ", "status", "calls", "last"),
    [
        ({"STATUSES": "0 75", "ENDS": "143"}, 75, ["requeue 7"], "requeue 7"),
        ({"STATUSES": "75 75", "SLURM_RESTART_COUNT": "2"}, 75, ["requeue 7"], "requeue 7"),
        ({"STATUSES": "2 75", "ENDS": "143"}, 2, [], "ended by a mistake"),
        ({"ENDS": "1"}, 1, [], "failed (status 1) without a new checkpoint"),
        ({"ENDS": "137", "STATUSES": "1"}, 1, [], "there is no checkpoint"),
        ({"ENDS": "1", "SAVED": "00000100"}, 1, ["requeue 7"], "requeue 7"),
        ({"ENDS": "1", "AGAIN": "y"}, 1, ["requeue 7"], "requeue 7"),
        (
            {"STATUSES": "75", "TERMINATE": "y", "REASON": "TimeLimit"},
            *(75, ["requeue 7"], "requeue 7"),
        ),
        ({"STATUSES": "1", "TERMINATE": "y", "REASON": "TimeLimit"}, 143, [], "unless Slurm"),
        ({"ENDS": "76", "STATUSES": "76"}, 76, [], "does not name: look above"),
        ({"STATUSES": "75", "TERMINATE": "y"}, 143, [], "job 7 was ended from outside"),
    ],
)
def test_what_a_job_does_at_its_end(
    job: Job, environ: Mapping[str, str], status: int, calls: list[str], last: str
) -> None:
    ended, lines = job.ends(**environ)
    assert ended == status
    assert [line[9:] for line in lines if line.startswith("scontrol ")] == calls
    assert last in lines[-1]


def test_a_bad_node_is_excluded_besides_those_that_were(job: Job) -> None:
    bad = "n1 bad;name $(touch x) n-2.b -x"
    status, lines = job.ends(STATUSES="76", ENDS="143", BAD=bad, EXCLUDED="old[1-2]")
    assert status == 76
    assert [line for line in lines if line.startswith("scontrol ")] == [
        "scontrol requeuehold 7",
        "scontrol update jobid=7 excnodelist=old[1-2],n1,n-2.b",
        "scontrol release 7",
    ]


def test_an_array_task_queues_itself_and_not_its_array(job: Job) -> None:
    _, lines = job.ends(STATUSES="75", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    assert lines[-1] == "scontrol requeue 5_2"


def test_progress_means_a_newer_checkpoint_than_at_this_start(job: Job) -> None:
    for step in ("00000100", "00000080"):
        (job.run / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (job.run / "checkpoints" / ".step-00000200.part").mkdir()
    status, lines = job.ends(ENDS="1")
    assert status == 1
    assert "the newest checkpoint is of step 100" in lines[-1]
    assert "not queued again" in lines[-1]
    # A run that has rolled back saves steps that it had saved before.
    assert job.ends(ENDS="1", SAVED="00000090")[1][-1] == "scontrol requeue 7"


def test_only_starts_in_a_row_that_come_no_further_count(job: Job) -> None:
    def again(count: int, **environ: str) -> bool:
        _, lines = job.ends(STATUSES="75", SLURM_RESTART_COUNT=str(count), **environ)
        return lines[-1] == "scontrol requeue 7"

    assert all(again(count) for count in range(2))
    assert all(again(count, SAVED=f"{count:08}") for count in range(2, 10))
    assert all(again(count) for count in range(10, 13))
    status, lines = job.ends(STATUSES="75", SLURM_RESTART_COUNT="13")
    assert status == 75
    assert "(--max-requeues 3, and it has come no further 4 times): submit" in lines[-1]
    assert again(0)  # numbers of jobs come again: this is another one


def test_a_job_that_is_never_to_be_queued_again_is_not(tmp_path: Path) -> None:
    job = Job(tmp_path, SlurmConfig(nodes=2, ranks_per_node=1, max_requeues=0))
    status, lines = job.ends(STATUSES="75", SAVED="00000090")
    assert (status, "not queued again" in lines[-1]) == (75, True)


def test_without_scontrol_the_job_says_what_it_cannot_do(job: Job) -> None:
    (job.bin / "scontrol").unlink()
    commands = ("bash", "rm", "mkdir", "sleep", "stat")
    for name in commands:
        (job.bin / name).symlink_to(f"/bin/{name}")
    status, lines = job.ends(STATUSES="75", PATH=str(job.bin))
    assert status == 75
    assert "scontrol is not on" in lines[1]
    assert "not queued again without scontrol: submit the run again" in lines[-1]


def test_a_folder_that_cannot_be_made_is_one_line(job: Job) -> None:
    job.run.write_text("in the way")
    done = subprocess.run(
        ["bash"],
        input=job.script,
        env={"PATH": f"{job.bin}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "cannot be made; choose another run.folder" in done.stdout.splitlines()[-1]


def test_a_persons_setup_may_use_what_strict_shells_refuse(tmp_path: Path) -> None:
    lines = ('if [ -z "$NOT_SET" ]; then false; fi', "export FROM_SETUP=$1")
    slurm = SlurmConfig(nodes=2, ranks_per_node=1, setup=lines)
    assert Job(tmp_path, slurm).ends(STATUSES="0")[0] == 0


def test_a_setup_that_is_strict_itself_does_not_keep_the_job_from_queueing_again(
    tmp_path: Path,
) -> None:
    slurm = SlurmConfig(nodes=2, ranks_per_node=1, setup=("set -efC -o pipefail",))
    job = Job(tmp_path, slurm)
    for _ in range(2):  # the second one finds the files of the first
        status, lines = job.ends(STATUSES="75", ENDS="143")
        assert (status, lines[-1]) == (75, "scontrol requeue 7")


@pytest.mark.parametrize("text", ["", "x", "12 13", "12;", "-1", "12;a b", "Submitted job 1"])
def test_only_a_jobs_number_is_taken_for_one(text: str) -> None:
    with pytest.raises(ConfigError, match="is no job's number"):
        parse_job_id(text)
    assert parse_job_id("12\n") == JobId(12)
    assert parse_job_id("12;east") == JobId(12, "east")


def test_the_environment_cannot_change_the_job_behind_the_scripts_back() -> None:
    own = {"PATH": "/bin", "SBATCH_ACCOUNT": "me", "SLURM_CONF": "/etc/s"}
    inside = {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "1", "SLURMD_NODENAME": "n"}
    assert clean({**own, "SBATCH_OUTPUT": "x", "SBATCH_SIGNAL": "B:TERM"}, "") == own
    assert clean({**own, **inside}, "") == own
    assert clean({**own, "SLURM_CLUSTERS": "west"}, "") == {**own, "SLURM_CLUSTERS": "west"}
    script = "\n".join(f"#SBATCH {line}" for line in ("--time=1", "--gpus-per-node=8", "-p x"))
    rivals = ("TIMELIMIT", "GPUS_PER_NODE", "GPUS", "PARTITION")
    assert clean({**own, **{f"SBATCH_{name}": "1" for name in rivals}}, script) == own
    assert "SBATCH_ACCOUNT" not in clean(own, "#SBATCH --account=you\n")


def test_a_line_break_in_the_name_of_the_current_folder_runs_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a\ntouch here"
    odd.mkdir()
    monkeypatch.chdir(odd)
    options = [*FOUR, "--dry-run", "--", "train", "--run.folder", str(tmp_path / "runs")]
    assert "a line break or another control character" in LAUNCH.error_of(capsys, *options)
    good = {"command": ["x"], "folder": "/f", "version": "1", "date": "d"}
    task = Task("n", PurePosixPath("/r"), PurePosixPath("/c"))
    slurm = SlurmConfig(ranks_per_node=1)
    stamps = [Stamp(**{**good, name: ["a\nb"] if name == "command" else "a\nb"}) for name in good]
    tasks = [Task("n\n", task.run, task.config), replace(task, run=PurePosixPath("/r\nx"))]
    for each, stamp, python in (
        *((task, stamp, "py") for stamp in stamps),
        *((each, STAMP, "py") for each in tasks),
        (task, STAMP, "p\ny"),
    ):
        with pytest.raises(ConfigError, match="a line break or another control character"):
            job_script(slurm, [each], python=python, stamp=stamp)


def test_the_jobs_number_is_told_even_if_its_script_cannot_be_kept(
    capsys: pytest.CaptureFixture[str], commands: Path
) -> None:
    Path("runs/small/slurm").mkdir(parents=True)
    Path("runs/small/slurm/17").write_text("in the way")
    stand_in(commands, "sbatch", "cat >/dev/null; echo 17")
    told = LAUNCH.shown(capsys, *FOUR, "--", "train")
    assert "submitted job 17" in told
    assert "not kept" in told


def test_waiting_asks_the_jobs_own_cluster_and_outlasts_a_controller_that_starts_again(
    tmp_path: Path, commands: Path
) -> None:
    answers = (
        'echo "$*" >>asked; n=$(wc -l <asked)\n'
        "(( n < 3 )) && { echo 'Unable to contact slurm controller' >&2; exit 1; }\n"
        "(( n < 5 )) && { echo 'JobId=17 JobState=RUNNING ExitCode=0:0'; exit; }\n"
        "echo 'JobId=17 JobState=FAILED ExitCode=75:0'"
    )
    stand_in(commands, "scontrol", answers)
    assert wait_for(JobId(17, "west"), poll_s=0.01) == 75
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["--clusters=west show job --oneliner 17"] * 5
    stand_in(commands, "scontrol", "echo 'Invalid job id specified' >&2; exit 1")
    with pytest.raises(ConfigError, match=r"tells nothing of job 17 \(Invalid job id"):
        wait_for(JobId(17), poll_s=0.001)


def test_a_local_dry_run_prints_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    shown = LAUNCH.shown(capsys, "local", "--dry-run", "--", "train", "--train.steps", "30")
    assert shlex.split(shown)[1:] == [
        *("-m", "counterflow", "launch", "local", "--max-restarts", "3", "--max-requeues", "0"),
        *("--", "train", "--train.steps", "30"),
    ]


def test_help_needs_no_torch_and_has_every_option() -> None:
    code = (
        "import sys; from counterflow.launch.cli import main; main(['launch', 'slurm', '--help']);"
        "main(['launch', '-h']); main(['node', '--help']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in SlurmConfig.__dataclass_fields__:
        assert f"  --{name.replace('_', '-')} = " in done.stdout


def test_a_value_guards_itself_also_where_code_gives_it() -> None:
    good = SlurmConfig(ranks_per_node=1)
    for change in ({"nodes": 0}, {"max_requeues": -1}, {"interface": "a" * 16}, {"switches": "x"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            replace(good, **change)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_example_scripts_are_what_the_launcher_makes(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    remedy = "python -m counterflow.launch.slurm.examples docs/examples"
    assert text == examples()[name], f"out of date: {remedy}"
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
