"""What saving a checkpoint costs the training beside it, on 2 ranks with real steps.

    python -m bench.checkpoint [--hidden 256] [--layers 6] [--sequences 16] [--rounds 5]
                               [--folder DIR]

Two ranks of one thread train a mixture-of-experts model with the project's engine, experts over
both. In each round, in turns and in the same processes, the same state is saved by

    counterflow asynchronous, counterflow synchronous   what a run uses, with checksums
    torch async_save, torch save                        torch.distributed.checkpoint's own
                                                        FileSystemWriter, without checksums

and copied plainly into host memory that is there already, which is the least that any asynchronous
save must do. All that is measured is the slowest rank's:

    call      time of the call that saves, during which training stands still
    stall     call less the plain copy of the same round
    beside    steps taken from the call's end until the files are on disk, less as many steps of the
              same round without saving: processor and memory shared with the writing. Where cores
              are as many as ranks, all that writing computes shows here
    written   from the call until all is on disk

Percentages are of a step without saving. Torch has the same pieces under a name each. Besides: the
time to verify and to load. The files go to a temporary folder, or one below --folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from counterflow.launch.checkpoint.pieces import Piece, State
from counterflow.launch.checkpoint.store import Checkpoints
from counterflow.launch.engine import Engine
from counterflow.model import ModelConfig, num_parameters
from counterflow.parallel import Mesh, MeshShape
from counterflow.parallel.schedule import build
from tests.ranks import RankPool

from .machine import write_result

PLAIN = "plain copy"
OURS, OURS_WAITING = "counterflow asynchronous", "counterflow synchronous"
TORCH, TORCH_WAITING = "torch async_save", "torch save"
SAVING = (OURS, OURS_WAITING, TORCH, TORCH_WAITING)
MOST_STALL = 0.05  # of a step
LENGTH, MICROBATCHES = 64, 2
LIMIT_S = 600.0


class Sizes(NamedTuple):
    """Of the model, and of a rank's part of a step."""

    hidden: int = 256
    layers: int = 6
    sequences: int = 16

    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=4096,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            moe_intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            first_k_dense_replace=1,
            num_attention_heads=4,
            q_lora_rank=self.hidden // 2,
            kv_lora_rank=self.hidden // 4,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            n_routed_experts=16,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            num_nextn_predict_layers=1,
            max_position_embeddings=LENGTH,
        )


class Training:
    """One rank's engine, its batches, and what there is to save of it."""

    def __init__(self, rank: int, sizes: Sizes) -> None:
        mesh = Mesh.create(MeshShape(1, 2, 2), timeout_s=LIMIT_S)
        schedule = build("1f1b", ranks=1, microbatches=MICROBATCHES)
        self.engine = Engine(sizes.config(), mesh, schedule, timeout_s=LIMIT_S)
        self._generator = torch.Generator().manual_seed(rank)
        self._shape = (sizes.sequences, LENGTH + 1)

    def step(self) -> float:
        """Take one; its seconds."""
        tokens = torch.randint(4096, self._shape, generator=self._generator)
        begun = time.perf_counter()
        self.engine.step(tokens[:, :-1], tokens[:, 1:], lr=1e-4)
        return time.perf_counter() - begun

    def pieces(self) -> list[Piece]:
        engine = self.engine
        found = [
            piece
            for name, parameter in engine.parameters.items()
            for piece in engine.held[name].pieces(f"parameters/{name}", parameter.detach().view(-1))
        ]
        return [*found, *engine.optimizer.pieces(engine.held)]


class Saving:
    """The contenders: each begins a save and gives what tells whether it has ended."""

    def __init__(self, training: Training, folder: Path) -> None:
        self._training, self._folder = training, folder
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        options: dict[str, Any] = {"keep": 1, "timeout_s": LIMIT_S}
        self.stores = {
            name: Checkpoints(folder / name, asynchronous=name == OURS, **options)
            for name in (OURS, OURS_WAITING)
        }
        self._there: list[Tensor] = [torch.zeros_like(p.data) for p in training.pieces()]
        self._count = 0

    def plain_copy(self) -> None:
        for there, piece in zip(self._there, self._training.pieces(), strict=True):
            there.copy_(piece.data)

    def begin(self, name: str) -> Callable[[], bool]:
        """Begin to save; returns a function that says whether all is on disk."""
        self._count += 1
        pieces = self._training.pieces()
        if name in self.stores:
            store = self.stores[name]
            store.save(self._count, State(pieces))
            return lambda: _ended(store)
        state: dict[str, Any] = {f"{p.name}@{p.offset}": p.data for p in pieces}
        writer = FileSystemWriter(self._folder / name / str(self._count))
        if name == TORCH_WAITING:
            torch_save(state, storage_writer=writer, process_group=self._group)
            return lambda: True
        future = async_save(state, storage_writer=writer, process_group=self._group)
        assert isinstance(future, Future)
        return future.done


def _ended(store: Checkpoints) -> bool:
    told = store.poll()
    for saved in told:
        if saved.error:
            raise RuntimeError(saved.error)
    return bool(told)


def _all(flag: bool) -> bool:
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    return bool(flags)


def _slowest(seconds: float) -> float:
    found = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _timed(run: Callable[[], object]) -> float:
    dist.barrier()
    begun = time.perf_counter()
    run()
    return _slowest(time.perf_counter() - begun)


def one_save(training: Training, saving: Saving, name: str, step_s: float) -> dict[str, float]:
    """One contender's save beside training; seconds."""
    ended: list[Callable[[], bool]] = []
    begun = time.perf_counter()
    call = _timed(lambda: ended.append(saving.begin(name)))
    beside, count = 0.0, 0
    while not _all(ended[0]()):
        beside += _slowest(training.step())
        count += 1
    written = _slowest(time.perf_counter() - begun)
    return {"call": call, "beside": beside - count * step_s, "steps": count, "written": written}


def rounds_case(rank: int, world: int, sizes: Sizes, rounds: int, folder: str) -> dict[str, Any]:
    """Seconds of everything, by round; the first round warms up and does not count."""
    training = Training(rank, sizes)
    training.step()
    saving = Saving(training, Path(folder))
    found: dict[str, list[Any]] = {"step": [], PLAIN: [], **{name: [] for name in SAVING}}
    for turn in range(rounds + 1):
        step = statistics.median(_slowest(training.step()) for _ in range(5))
        taken: dict[str, Any] = {"step": step, PLAIN: _timed(saving.plain_copy)}
        shift = turn % len(SAVING)
        for name in SAVING[shift:] + SAVING[:shift]:
            taken[name] = one_save(training, saving, name, step)
        for name, value in taken.items():
            if turn:
                found[name].append(value)
    store = saving.stores[OURS]
    newest = []
    verify = _timed(lambda: newest.append(store.newest()))
    load = _timed(lambda: store.load(newest[0], training.pieces()))
    for one in saving.stores.values():
        one.close()
    return {
        "seconds": found,
        "verify_s": verify,
        "load_s": load,
        "num_bytes": newest[0].content.num_bytes,
        "copied_bytes": sum(piece.data.nbytes for piece in training.pieces()),
    }


def summary(sizes: Sizes, found: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds, and what they are of a step."""
    seconds, total = found["seconds"], found["num_bytes"]
    steps: Sequence[float] = seconds["step"]
    contenders: dict[str, Any] = {}
    for name in SAVING:
        runs = seconds[name]
        stalls = [r["call"] - copy for r, copy in zip(runs, seconds[PLAIN], strict=True)]
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        contenders[name] = {
            "median_s": median,
            "stall_of_step": statistics.median(
                s / step for s, step in zip(stalls, steps, strict=True)
            ),
            "beside_of_step": statistics.median(
                run["beside"] / step for run, step in zip(runs, steps, strict=True)
            ),
            "mb_per_s": total / median["written"] / 1e6,
            "all": runs,
        }
    return {
        **sizes._asdict(),
        "parameters": num_parameters(sizes.config()),
        "checkpoint_mb": total / 1e6,
        "copied_mb_a_rank": found["copied_bytes"] / 1e6,
        "step_s": statistics.median(steps),
        "plain_copy_s": statistics.median(seconds[PLAIN]),
        "contenders": contenders,
        "verify": {"seconds": found["verify_s"], "mb_per_s": total / found["verify_s"] / 1e6},
        "load": {"seconds": found["load_s"], "mb_per_s": total / found["load_s"] / 1e6},
    }


def print_run(run: dict[str, Any]) -> None:
    print(
        f"2 ranks, {run['parameters'] / 1e6:.1f} M parameters, a checkpoint of "
        f"{run['checkpoint_mb']:.0f} MB ({run['copied_mb_a_rank']:.0f} MB on each rank); a step "
        f"{run['step_s'] * 1e3:.0f} ms, a plain copy {run['plain_copy_s'] * 1e3:.0f} ms"
    )
    print(
        f"{'':26}{'call, ms':>10}{'stall':>9}{'beside':>9}{'steps':>7}{'written, ms':>13}"
        f"{'MB/s':>7}"
    )
    for name, of in run["contenders"].items():
        median = of["median_s"]
        print(
            f"{name:26}{median['call'] * 1e3:10.0f}{of['stall_of_step']:9.1%}"
            f"{of['beside_of_step']:9.1%}{median['steps']:7.0f}{median['written'] * 1e3:13.0f}"
            f"{of['mb_per_s']:7.0f}"
        )
    for name in ("verify", "load"):
        print(f"{name:26}{run[name]['seconds'] * 1e3:10.0f} ms{run[name]['mb_per_s']:8.0f} MB/s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = Sizes()
    parser.add_argument("--hidden", type=int, default=default.hidden, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=default.layers)
    parser.add_argument("--sequences", type=int, default=default.sequences, help="of a rank's step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the file system to measure")
    options = parser.parse_args()
    if options.hidden < 64 or options.hidden % 64:
        parser.error("--hidden must be a multiple of 64")
    if options.layers < 2 or options.rounds < 1:
        parser.error("--layers must be from 2 up, --rounds from 1 up")
    if options.sequences < MICROBATCHES or options.sequences % MICROBATCHES:
        parser.error(f"--sequences must be a multiple of {MICROBATCHES}")
    sizes = Sizes(options.hidden, options.layers, options.sequences)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, RankPool() as pool:
        [found, _] = pool.run(
            rounds_case, world=2, timeout_s=3600, sizes=sizes, rounds=options.rounds, folder=folder
        )
    run = summary(sizes, found)
    print_run(run)
    stall = run["contenders"][OURS]["stall_of_step"]
    met = stall <= MOST_STALL
    print(f"stall of {OURS}: {stall:.1%} of a step, target <= {MOST_STALL:.0%}")
    target = {"measured": stall, "relation": "<=", "target": MOST_STALL, "met": met}
    print(f"wrote {write_result('checkpoint', {**run, 'targets': {'stall of a step': target}})}")
    if not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
