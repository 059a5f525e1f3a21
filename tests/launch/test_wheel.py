"""The project installs as a wheel, and what is in the wheel works."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("comm", "fp8", "launch", "model", "parallel", "predict")


@pytest.fixture(scope="module")
def unzipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of a wheel that is built from a copy, so that the work tree stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    caches = shutil.ignore_patterns("__pycache__")
    for name in ("counterflow", *ROOMS):
        shutil.copytree(ROOT / name, source / name, ignore=caches)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    build = subprocess.run(
        [*command, "--no-index", "--wheel-dir", str(folder), str(source)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(unzipped: Path, *arguments: str) -> str:
    """Python with the wheel's contents before everything else, away from the repository."""
    environ = os.environ | {"PYTHONPATH": str(unzipped)}
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=unzipped.parent,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def modules() -> list[str]:
    """Every module of the project by its import name."""
    files = [path.relative_to(ROOT) for path in ROOT.glob("counterflow/*.py")]
    names = [".".join(path.with_suffix("").parts) for path in files]
    for room in ROOMS:
        for path in ROOT.glob(f"{room}/**/*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(["counterflow", *parts]))
    return sorted(name.removesuffix(".__init__") for name in names)


def test_every_module_and_the_type_marker_are_in_the_wheel(unzipped: Path) -> None:
    found = [path.relative_to(unzipped) for path in unzipped.glob("counterflow/**/*.py")]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in found]
    assert sorted(names) == modules()
    assert (unzipped / "counterflow" / "py.typed").exists()
    top = {p.name for p in unzipped.iterdir() if not p.name.endswith(".dist-info")}
    assert top == {"counterflow"}  # a top-level `comm` would collide with other people's packages


def test_every_module_imports_from_the_wheel(unzipped: Path) -> None:
    skipped = "counterflow.__main__"  # importing it is running it
    program = (
        "import importlib, sys\n"
        f"for name in {[name for name in modules() if name != skipped]!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(unzipped)!r}), module.__file__\n"
        "print('all')"
    )
    assert run(unzipped, "-c", program) == "all\n"


def test_the_command_runs_from_the_wheel(unzipped: Path) -> None:
    shown = run(unzipped, "-m", "counterflow", "simulate", "--ranks", "2", "--microbatches", "4")
    assert "makespan" in shown
    assert (
        "counterflow.launch.cli:main"
        in next(unzipped.glob("*.dist-info/entry_points.txt")).read_text()
    )
