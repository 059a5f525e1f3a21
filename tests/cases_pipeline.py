"""What ranks do in the pipeline's tests."""

from __future__ import annotations

import os
import time
import weakref
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from counterflow.parallel import Chunk, Mesh, MeshShape, Pipeline, PipelineError
from counterflow.parallel.schedule import Schedule, actions, build

from .told import part


class Block(nn.Module):
    """Widths differ from stage to stage; plain layers that know nothing of chunks."""

    def __init__(self, stage: int, num_stages: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(100 + stage)
        widths = [6 + 2 * (s % 3) for s in range(num_stages + 1)]
        self.up = nn.Linear(widths[stage], 16, dtype=dtype)
        self.norm = nn.LayerNorm(16, dtype=dtype)
        self.down = nn.Linear(16, widths[stage + 1], dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


class Square(torch.autograd.Function):
    """A custom autograd function with matrix products, to see that none is done twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight.t(), x.flatten(0, -2).t() @ grads[0].flatten(0, -2)


class Custom(Block):
    def __init__(self, stage: int, num_stages: int, dtype: torch.dtype) -> None:
        super().__init__(stage, num_stages, dtype)
        self.square = nn.Parameter(torch.randn(16, 16, dtype=dtype) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(Square.apply(self.norm(self.up(x)), self.square)))


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target[..., : output.shape[-1]])


def mesh_of(world: int) -> Mesh:
    return Mesh.create(MeshShape(pp=world), timeout_s=60)


def reference(
    modules: list[nn.Module], batch: Tensor, targets: Tensor, microbatches: int
) -> tuple[float, list[dict[str, Tensor]]]:
    """Loss and gradients of plain autograd in one process."""
    total = 0.0
    for x, y in zip(batch.chunk(microbatches), targets.chunk(microbatches), strict=True):
        for module in modules:
            x = module(x)
        loss = loss_fn(x, y) / microbatches
        loss.backward()
        total += float(loss.detach())
    return total, [
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in modules
    ]


def worst_error(pipeline: Pipeline, expected: list[dict[str, Tensor]]) -> float:
    worst = 0.0
    for stage, module in pipeline.modules.items():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, (stage, name)
            want = expected[stage][name]
            worst = max(worst, float((parameter.grad - want).norm() / want.norm()))
    return worst


def agrees(
    rank: int,
    world: int,
    schedule: str | Schedule,
    microbatches: int = 0,
    dtype: torch.dtype = torch.float64,
    block: str = "Block",
    separate_channels: bool = False,
) -> dict[str, Any]:
    """Two steps with different row counts; errors against one process, and what was measured."""
    if isinstance(schedule, str):
        schedule = build(schedule, ranks=world, microbatches=microbatches)
    mesh, num = mesh_of(world), schedule.num_stages
    kind = {"Block": Block, "Custom": Custom}[block]
    mine = schedule.placement.stages(mesh.pp_rank)
    pipeline = Pipeline(
        [kind(s, num, dtype) for s in mine],
        schedule,
        mesh,
        loss_fn,
        timeout_s=60,
        separate_channels=separate_channels,
    )
    whole: list[nn.Module] = [kind(s, num, dtype) for s in range(num)]
    result: dict[str, Any] = {"gradient": 0.0, "loss": 0.0, "peaks": [], "spans": []}
    for rows, length in ((2, 5), (3, 4)):  # shapes change from step to step
        torch.manual_seed(rows)
        batch = torch.randn(rows * schedule.num_microbatches, length, 6, dtype=dtype)
        targets = torch.randn(rows * schedule.num_microbatches, length, 16, dtype=dtype)
        loss, expected = reference(whole, batch, targets, schedule.num_microbatches)
        got = pipeline.step(batch, targets)  # gradients add up over steps, as the reference's do
        evaluated = pipeline.evaluate(batch, targets)
        # Not bit for bit: torch picks other kernels for linear layers where no gradient is needed.
        assert abs(float(evaluated - got)) < (1e-14 if dtype is torch.float64 else 1e-6)
        result["loss"] = max(result["loss"], abs(float(got) - loss))
        result["gradient"] = max(result["gradient"], worst_error(pipeline, expected))
    pipeline.step(batch, targets)
    result["peaks"] = pipeline.report.peak_chunks
    result["spans"] = [asdict(span) for span in pipeline.report.spans()]
    return result


class Mixed(nn.Module):
    """Several outputs, of sizes that vary: one with a gradient, one of integers, one unused."""

    def __init__(self, stage: int, last: int) -> None:
        super().__init__()
        torch.manual_seed(stage)
        self.stage, self.last = stage, last
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor, index: Tensor, unused: Tensor | None = None) -> Any:
        y = torch.tanh(self.linear(x[: len(x) - self.stage % 2 or None]))
        if self.stage == self.last:
            return y * index[0].to(y.dtype)
        # Width and dtype of what nobody uses differ by stage and micro-batch; its gradient is None.
        width = 1 + (self.stage + int(index[0])) % 3
        spare = y.repeat(1, width).to(torch.float32 if int(index[0]) % 2 else torch.float64)
        return y, index + 0, spare


def mixed_payloads(rank: int, world: int, schedule: str) -> float:
    plan = build(schedule, ranks=world, microbatches=4 * world)
    mesh, last = mesh_of(world), plan.num_stages - 1
    modules = [Mixed(s, last) for s in range(last + 1)]
    mine = {s: modules[s] for s in plan.placement.stages(rank)}
    pipeline = Pipeline(
        mine, plan, mesh, lambda y, t: (y - t[: len(y)]).square().mean(), timeout_s=60
    )
    num = plan.num_microbatches
    worst = 0.0
    for rows in (6, 9, 6):
        torch.manual_seed(rows)
        batch = torch.randn(num * rows, 4, dtype=torch.float64)
        index = torch.arange(1, num + 1).repeat_interleave(rows)
        for module in modules:
            module.zero_grad()
        expected = 0.0
        want: list[dict[str, Tensor]] = []
        for x, i in zip(batch.chunk(num), index.chunk(num), strict=True):
            target = x
            values: Any = (x, i)
            for module in modules:
                values = module(*values)
            loss = (values - target[: len(values)]).square().mean() / num
            loss.backward()
            expected += float(loss.detach())
        for module in modules:
            want.append(
                {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
            )
            module.zero_grad()
        got = pipeline.step((batch, index), batch)
        worst = max(worst, abs(float(got) - expected), worst_error(pipeline, want))
    return worst


def frozen_stage(rank: int, world: int, schedule: str, frozen: int) -> float:
    """One stage has no gradients; the worst error of the others. Then it thaws: of all."""
    plan = build(schedule, ranks=world, microbatches=4 * world)
    num = plan.num_stages
    mine = [Block(s, num, torch.float64) for s in plan.placement.stages(rank)]
    whole: list[nn.Module] = [Block(s, num, torch.float64) for s in range(num)]
    pipeline = Pipeline(mine, plan, mesh_of(world), loss_fn, timeout_s=60)
    torch.manual_seed(3)
    batch = torch.randn(2 * plan.num_microbatches, 5, 6, dtype=torch.float64)
    targets = torch.randn(2 * plan.num_microbatches, 5, 16, dtype=torch.float64)
    worst = 0.0
    for trained in (False, True):
        for stage, module in [*pipeline.modules.items(), *enumerate(whole)]:
            module.zero_grad()
            module.requires_grad_(trained or stage != frozen)
        _, want = reference(whole, batch, targets, plan.num_microbatches)
        pipeline.step(batch, targets)
        for stage, module in pipeline.modules.items():
            for name, parameter in module.named_parameters():
                expected = want[stage].get(name)
                assert (parameter.grad is None) == (expected is None), (stage, name)
                if parameter.grad is not None and expected is not None:
                    error = (parameter.grad - expected).norm() / expected.norm()
                    worst = max(worst, float(error))
    return worst


def chained_ties(rank: int, world: int) -> Any:
    """Stages 0 and 1 share one parameter, stages 1 and 2 another: three ranks, two groups."""
    plan = build("1f1b", ranks=world, microbatches=4)
    torch.manual_seed(rank)
    layer = nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.bias.fill_(0.25)
    tied = [[(0, "weight"), (1, "weight")], [(1, "bias"), (2, "bias")]]
    pipeline = Pipeline([layer], plan, mesh_of(world), lambda y, t: (y - t).mean(), tied=tied)
    batch = torch.ones(4, 3, dtype=torch.float64)
    pipeline.step(batch, batch)
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    return layer.weight.grad.clone(), layer.bias.grad.clone()


def separate_copies_of_a_tie(rank: int, world: int) -> None:
    plan = build("dualpipev", ranks=world, microbatches=4 * world)
    mine = [nn.Linear(2, 2) for _ in plan.placement.stages(rank)]
    tied = [[(0, "weight"), (plan.num_stages - 1, "weight")]]
    Pipeline(mine, plan, mesh_of(world), lambda y, t: y.mean(), tied=tied)


def unequal_replicas(rank: int, world: int) -> None:
    plan = build("dualpipe", ranks=world, microbatches=4)
    torch.manual_seed(rank)
    Pipeline([nn.Linear(2, 2), nn.Linear(2, 2)], plan, mesh_of(world), lambda y, t: y.mean())


def accumulates(rank: int, world: int) -> dict[str, float]:
    """Gradients of two schedules and a refused batch, beside those of one process."""
    plan = build("dualpipe", ranks=world, microbatches=2 * world)
    num = plan.num_stages
    mine = [Block(s, num, torch.float64) for s in plan.placement.stages(rank)]
    whole: list[nn.Module] = [Block(s, num, torch.float64) for s in range(num)]
    pipeline = Pipeline(mine, plan, mesh_of(world), loss_fn, timeout_s=60)
    errors: dict[str, float] = {}
    want: list[dict[str, Tensor]] = []
    for microbatches in (2 * world, 4 * world):
        pipeline.use(build("dualpipe", ranks=world, microbatches=microbatches))
        torch.manual_seed(microbatches)
        batch = torch.randn(2 * microbatches, 5, 6, dtype=torch.float64)
        targets = torch.randn(2 * microbatches, 5, 16, dtype=torch.float64)
        _, want = reference(whole, batch, targets, microbatches)
        pipeline.step(batch, targets)
        errors[f"{microbatches} micro-batches"] = worst_error(pipeline, want)
    try:
        pipeline.step(batch[1:], targets)
    except ValueError:
        errors["a refused batch"] = worst_error(pipeline, want)
    pipeline.step(batch, targets)  # it goes on after that
    reference(whole, batch, targets, microbatches)
    errors["one more"] = worst_error(pipeline, want)
    return errors


def steps_after_a_failure(rank: int, world: int) -> list[str]:
    """A stage fails once on every rank; what the next step says."""

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("broken stage")

    plan = build("1f1b", ranks=1, microbatches=2)
    pipeline = Pipeline([Fails()], plan, Mesh(MeshShape()), lambda y, t: y.mean())
    said = []
    for _ in range(2):
        try:
            pipeline.step(torch.ones(2, 2), torch.ones(2, 2))
        except Exception as error:
            said.append(f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}")
    return said


class Counted(nn.Module):
    """Keeps one activation for its backward and counts how many of them are alive."""

    def __init__(self, alive: list[int], seen: list[int]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.alive, self.seen = alive, seen

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.linear(x))  # saves its own result for the backward
        self.alive[0] += 1
        self.seen[0] = max(self.seen[0], self.alive[0])
        weakref.finalize(hidden.untyped_storage(), self._freed)
        return hidden * 2

    def _freed(self) -> None:
        self.alive[0] -= 1


def live_activations(
    rank: int, world: int, schedule: str, microbatches: int
) -> tuple[int, int, int]:
    """(peak chunks as reported, peak activations really alive, alive after the step)."""
    plan = build(schedule, ranks=world, microbatches=microbatches)
    alive, seen = [0], [0]
    mine = plan.placement.stages(rank)
    pipeline = Pipeline(
        [Counted(alive, seen) for _ in mine],
        plan,
        mesh_of(world),
        lambda y, t: (y - t).square().mean(),
    )
    batch = torch.randn(microbatches, 8)
    pipeline.step(batch, batch)
    return pipeline.report.peak_chunks, seen[0], alive[0]


def tied_parameters(rank: int, world: int, schedule: str) -> float:
    """An embedding in the first stage that the last stage uses again."""
    plan = build(schedule, ranks=world, microbatches=4 * world)
    last = plan.num_stages - 1

    class First(nn.Module):
        def __init__(self, table: nn.Parameter) -> None:
            super().__init__()
            self.table = table

        def forward(self, tokens: Tensor) -> Tensor:
            return F.embedding(tokens, self.table)

    class Last(First):
        def forward(self, tokens: Tensor) -> Tensor:  # its input is hidden, not tokens
            return tokens @ self.table.t()

    def stage(s: int, table: nn.Parameter) -> nn.Module:
        torch.manual_seed(s)
        middle = nn.Linear(6, 6, dtype=torch.float64)
        return First(table) if s == 0 else Last(table) if s == last else middle

    torch.manual_seed(9)
    values = torch.randn(11, 6, dtype=torch.float64)
    mine_table, whole_table = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    mine = {s: stage(s, mine_table) for s in plan.placement.stages(rank)}
    tied = [[(0, "table"), (last, "table")]]
    loss = F.cross_entropy
    pipeline = Pipeline(
        mine, plan, mesh_of(world), lambda y, t: loss(y, t), tied=tied, timeout_s=60
    )
    torch.manual_seed(10)
    tokens = torch.randint(0, 11, (plan.num_microbatches * 3,))
    targets = torch.randint(0, 11, (plan.num_microbatches * 3,))
    pipeline.step(tokens, targets)
    whole = [stage(s, whole_table) for s in range(last + 1)]
    num = plan.num_microbatches
    for x, y in zip(tokens.chunk(num), targets.chunk(num), strict=True):
        for module in whole:
            x = module(x)
        (loss(x, y) / num).backward()
    want = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in whole]
    return worst_error(pipeline, want)


def backward_flops(rank: int, world: int, schedule: str, block: str) -> tuple[int, int]:
    """FLOPs of a whole step of this rank, and of plain autograd for the same chunks."""
    from torch.utils.flop_counter import FlopCounterMode

    plan = build(schedule, ranks=world, microbatches=4 * world)
    kind = {"Block": Block, "Custom": Custom}[block]
    mine = plan.placement.stages(rank)
    modules = [kind(s, plan.num_stages, torch.float64) for s in mine]
    pipeline = Pipeline(modules, plan, mesh_of(world), loss_fn)
    batch = torch.randn(plan.num_microbatches * 2, 5, 6, dtype=torch.float64)
    targets = torch.randn(plan.num_microbatches * 2, 5, 16, dtype=torch.float64)
    with FlopCounterMode(display=False) as counted:
        pipeline.step(batch, targets)
    row = [a for step in plan.rows[rank] for a in actions(step) if a.op.value == "F"]
    with FlopCounterMode(display=False) as plain:
        for action in row:
            module = modules[mine.index(action.stage)]
            x = torch.randn(2, 5, module.up.in_features, dtype=torch.float64)
            module(x.requires_grad_(action.stage > 0)).sum().backward()
    return counted.get_total_flops(), plain.get_total_flops()


def aux_losses(rank: int, world: int, name: str) -> Any:
    """A stage that takes its chunk and adds a loss."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
            chunk.add_loss(name, 3.0 * self.weight)
            return x * self.weight

    plan = build("1f1b", ranks=world, microbatches=4)
    pipeline = Pipeline(
        [Adds()], plan, mesh_of(world), lambda y, t: (y - t).mean(), loss_names=["extra"]
    )
    batch = torch.ones(4, 2, dtype=torch.float64)
    loss = pipeline.step(batch, batch * 0)
    (weight,) = pipeline.modules[rank].parameters()
    assert weight.grad is not None
    return float(loss), pipeline.report.losses, float(weight.grad)


def returns(rank: int, world: int, what: str) -> None:
    outputs = {
        "view": lambda x: x[:, :2],
        "dict": lambda x: {"x": x + 1},
        "list inside": lambda x: (x + 1, [x]),
    }

    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return outputs[what](x)

    plan = build("1f1b", ranks=world, microbatches=2)
    Pipeline([Bad()], plan, mesh_of(world), lambda y, t: (y - t).mean()).step(
        torch.ones(2, 4), torch.ones(2, 4)
    )


def dies_midway(rank: int, world: int, schedule: str, victim: int, limit_s: float) -> None:
    """Rank `victim` is killed in the middle of a step; the others must not hang."""

    class Dies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            # By its eighth all have begun the step, also where rank 0 needs nobody for seven.
            if rank == victim and self.calls == 8:
                os._exit(9)
            return self.linear(x)

    plan = build(schedule, ranks=world, microbatches=4 * world)
    mine = plan.placement.stages(rank)
    pipeline = Pipeline(
        [Dies() for _ in mine],
        plan,
        mesh_of(world),
        lambda y, t: (y - t).square().mean(),
        timeout_s=limit_s,
    )
    batch = torch.ones(plan.num_microbatches, 4)
    # The victim could be gone while others still connect to each other, which is not yet a step.
    dist.barrier()
    pipeline.step(batch, batch)


def never_answers(rank: int, world: int, limit_s: float) -> tuple[str, float]:
    """What rank 0 is told when rank 1 is alive but does nothing, and after how long."""
    plan = build("1f1b", ranks=world, microbatches=4)
    mesh = mesh_of(world)
    pipeline = Pipeline([nn.Linear(4, 4)], plan, mesh, lambda y, t: y.mean(), timeout_s=limit_s)
    told, began = "no error", time.monotonic()
    if rank == 0:
        try:
            pipeline.step(torch.ones(4, 4), torch.ones(4, 4))
        except PipelineError as error:
            told = str(error)
    seconds = time.monotonic() - began
    part(rank, world)
    return told, seconds


def bad_batch(rank: int, world: int) -> None:
    plan = build("1f1b", ranks=world, microbatches=4)
    pipeline = Pipeline([nn.Linear(4, 4)], plan, mesh_of(world), lambda y, t: y.mean())
    pipeline.step(torch.ones(6, 4), torch.ones(6, 4))


def barrier(rank: int, world: int) -> int:
    dist.barrier()
    return rank
