"""`counterflow convert`: weights between a run's checkpoints and Hugging Face's layout."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from .checkpoint.errors import CheckpointError
from .checkpoint.read import Manifest, open_checkpoint, verify
from .convert_hf import from_hf, require_new, to_hf
from .convert_weights import candidates, newest_good
from .tables import print_table

_GIB = 2**30


def run(parsed: argparse.Namespace) -> int:
    """Convert, or tell what a checkpoint holds.

    Args:
        parsed: as `convert_options` declares it.

    Returns:
        The exit status: 1 for `info` of a damaged checkpoint, else 0.

    Raises:
        ValueError: what was given cannot be used; one line.
    """
    forms: dict[str, Callable[[argparse.Namespace], int]] = {
        "to-hf": _to_hf,
        "from-hf": _from_hf,
        "info": _info,
    }
    return forms[parsed.form](parsed)


def _to_hf(parsed: argparse.Namespace) -> int:
    out, began = Path(parsed.out), time.monotonic()
    require_new(out)
    with _working(f"verifying {parsed.checkpoint}"):
        manifest = newest_good(Path(parsed.checkpoint))
    with _working(f"writing {out}"):
        to_hf(
            manifest,
            out,
            ema=parsed.ema,
            fp8=parsed.fp8,
            dtype=_dtype(parsed.dtype),
            max_file_bytes=round(parsed.max_file_gb * 1e9),
        )
    what = "the averaged weights" if parsed.ema else "the weights"
    _done(f"{out}: {what} of step {manifest.step} ({manifest.path})", out, began)
    return 0


def _from_hf(parsed: argparse.Namespace) -> int:
    out, began = Path(parsed.out), time.monotonic()
    require_new(out)
    with _working(f"writing {out}"):
        made = from_hf(Path(parsed.folder), out, dtype=_dtype(parsed.dtype))
    _done(f"{made}: begin with it by counterflow train --checkpoint.weights {out}", made, began)
    return 0


def _info(parsed: argparse.Namespace) -> int:
    path = candidates(Path(parsed.checkpoint))[0]
    problems = verify(path)
    manifest = _opened(path)
    if parsed.json:
        print(json.dumps(_facts(path, manifest, problems)))
    else:
        _print(path, manifest, problems)
    return 1 if problems else 0


def _opened(path: Path) -> Manifest | None:
    """None where the manifest is damaged, of which `verify` tells."""
    try:
        return open_checkpoint(path)
    except CheckpointError:
        return None


def _facts(path: Path, manifest: Manifest | None, problems: list[str]) -> dict[str, Any]:
    """What `info --json` prints; no more than the first three where the manifest is damaged."""
    facts: dict[str, Any] = {"path": str(path), "verified": not problems, "problems": problems}
    if manifest is None:
        return facts
    content, config = manifest.content, manifest.values.get("config", {})
    return facts | {
        "step": manifest.step,
        "bytes": content.num_bytes,
        "ranks": len(content.own),
        "mesh": config.get("mesh"),
        "versions": dict(content.versions),
        "tensors": {
            name: {
                "dtype": str(record.dtype).removeprefix("torch."),
                "shape": list(record.shape),
                "bytes": record.numel * record.dtype.itemsize,
            }
            for name, record in content.records.items()
        },
    }


def _print(path: Path, manifest: Manifest | None, problems: list[str]) -> None:
    if manifest is None:
        print(f"{path}: nothing is known of what it holds")
    else:
        _print_content(manifest)
    print("verified: every file is as it was written" if not problems else "DAMAGED:")
    for problem in problems:
        print(f"  {problem}")


def _print_content(manifest: Manifest) -> None:
    facts = _facts(manifest.path, manifest, [])
    mesh = facts["mesh"]
    layout = "parameters alone"
    if mesh:
        sizes = ", ".join(f"{name} {size}" for name, size in mesh.items())
        layout = f"{facts['ranks']} ranks ({sizes})"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{manifest.path}: step {manifest.step}, written by {layout}; {versions}")
    kinds: dict[tuple[str, str], list[int]] = {}
    for name, tensor in facts["tensors"].items():
        kind = kinds.setdefault((_kind(name), tensor["dtype"]), [0, 0])
        kind[0] += 1
        kind[1] += tensor["bytes"]
    body = [
        (kind, dtype, f"{count:,}", f"{size / _GIB:.3f}")
        for (kind, dtype), (count, size) in kinds.items()
    ]
    body.append(("files", "", f"{len(manifest.content.files):,}", f"{facts['bytes'] / _GIB:.3f}"))
    print_table("What it holds", ("", "dtype", "number", "GiB"), body, names=2)


def _kind(name: str) -> str:
    """ "optimizer/exp_avg/model.norm.weight" -> "optimizer/exp_avg"."""
    return name.rpartition("/")[0]


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _done(text: str, folder: Path, began: float) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{text}; {size / _GIB:.2f} GiB in {time.monotonic() - began:.1f} s")


def _working(what: str) -> AbstractContextManager[object]:
    """A sign of life where there is a terminal and rich."""
    try:
        from rich.console import Console
    except ImportError:
        return nullcontext()
    console = Console(stderr=True)
    return console.status(what) if console.is_terminal else nullcontext()
