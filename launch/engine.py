"""One rank's share of training, without data and files: model, pipeline, gradients, update.

A step is: the pipeline's forward and backward, the mean of gradients over data-parallel ranks,
their sum over replicas in the pipeline, one norm over all parameters, the optimizer's update, and
the routers' biases from the load of the whole global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..comm.collectives import sum_over
from ..comm.dispatch import Dispatcher, dispatcher
from ..comm.marks import mark
from ..fp8.recipe import Recipe
from ..model import ModelConfig, build_parts, partition, shared_parameters, updated_bias
from ..model.build import Recompute
from ..model.experts import Experts
from ..model.router import Router
from ..parallel.accumulate import accumulate_in_float32
from ..parallel.gradients import WholeGradients
from ..parallel.mesh import Mesh
from ..parallel.pipeline import Pipeline
from ..parallel.replicas import holders
from ..parallel.schedule import Schedule
from ..parallel.schedule.interleaving import DEFAULT_INTERLEAVING, Interleaving
from .checkpoint.pieces import Held
from .ema import EMA
from .optim import clip_by_global_norm
from .zero import make_update

LOSS_NAMES = ("mtp", "balance")
_AT_MEAN = "mean of the gradients over data-parallel ranks"
_AT_GATHER = "gathering the updated parameters"  # a position
AT_EMA = "waiting for the parameters' moving average"  # a position


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, the same on every rank.

    Attributes:
        losses: "main", "mtp" and "balance", mean over the global batch; "main" in nats per token.
        grad_norm: of all parameters, before clipping.
        loads: tokens that each routed expert got in this step, by name of the layer's router.
        updated: whether the parameters were updated; False where `judge` would not have it.
        asked: sum over all ranks of what they gave as `asked`.
    """

    losses: dict[str, float]
    grad_norm: float
    loads: dict[str, list[int]]
    updated: bool = True
    asked: int = 0

    @property
    def loss(self) -> float:
        """What was minimised."""
        return sum(self.losses.values())

    @property
    def max_vio(self) -> float:
        """Mean over layers of (highest load - mean load) / mean load; 0 is perfect balance."""
        found = [max(load) * len(load) / sum(load) - 1 for load in self.loads.values() if sum(load)]
        return sum(found) / len(found) if found else 0.0


class Engine:
    """Trains a model over a mesh.

    Args:
        config: the model.
        mesh: this rank's place; its process groups are made.
        schedule: the pipeline's order; stages are a balanced cut of the model.
        experts: moves tokens to their experts and back; by default what the topology calls for.
        dtype: of parameters and activations.
        device: where this rank computes.
        recipe: how linear layers are computed in FP8; None computes them in `dtype`.
        recompute: what the backward makes again rather than keeps; nothing by default.
        betas, eps, weight_decay: of AdamW.
        moments: dtype in which AdamW keeps its moments, float32 or bfloat16.
        zero: 1 shares the optimizer's states out over the ranks that hold the same parameters
            (ZeRO-1, see `parallel.zero`), 0 has them on every rank. Results are the same but for
            the order in which ranks' gradients are summed.
        zero_backend: whose ZeRO-1, "counterflow" or "deepspeed" (see `zero_deepspeed`).
        ema_decay: of the parameters' moving average; None keeps none.
        layers: decoder layers of each stage; None: the balanced cut of `model.partition`.
        overlap: in which order phases are issued, so that communication hides behind compute; None
            runs every stage in one piece.
        timeout_s: limit of every wait, seconds.

    Attributes:
        parts: the model's parts on this rank, by stage.
        experts: the dispatcher that they share.
        parameters: this rank's parameters by name; a name is one parameter on every rank. Below
            float32, their gradients are float32.
        held: how each of them lies in the whole model's.
        means: what averages gradients over ranks.
        optimizer: what updates parameters with the means.
        ema: their moving average, if there is one; to be closed at the end.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        schedule: Schedule,
        *,
        experts: Dispatcher[Any] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        recipe: Recipe | None = None,
        recompute: Recompute | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: torch.dtype = torch.float32,
        zero: int = 0,
        zero_backend: str = "counterflow",
        ema_decay: float | None = None,
        layers: Sequence[int] | None = None,
        overlap: Interleaving | None = DEFAULT_INTERLEAVING,
        timeout_s: float = 300.0,
    ) -> None:
        self.mesh = mesh
        self.config = config
        held = schedule.placement.stages(mesh.pp_rank)
        cut = partition(config, schedule.num_stages, layers)
        if experts is None:
            experts = dispatcher(
                "auto", mesh, num_experts=config.n_routed_experts, timeout_s=timeout_s
            )
        if experts.layout.is_redundant:
            raise ValueError(
                "this layout has several copies of an expert, whose weights training would let "
                "drift apart; use a layout with one slot for each expert"
            )
        self.experts = experts
        built = build_parts(
            config,
            [cut[s] for s in held],
            experts,
            dtype=dtype,
            device=device,
            recipe=recipe,
            recompute=recompute,
        )
        self.parts = dict(zip(held, built, strict=True))
        last = self.parts.get(schedule.num_stages - 1)
        self.tied = shared_parameters(config, schedule.num_stages)
        self.pipeline = Pipeline(
            self.parts,
            schedule,
            mesh,
            None if last is None else last.loss,
            tied=self.tied,
            loss_names=LOSS_NAMES,
            overlap=overlap,
            timeout_s=timeout_s,
        )
        self.parameters: dict[str, Parameter] = {
            name: p for part in built for name, p in part.named_parameters()
        }
        accumulate_in_float32(self.parameters.values())
        stacked = {
            id(p): module.local
            for part in built
            for module in part.modules()
            if isinstance(module, Experts)
            for p in module.parameters()
        }
        self._experts = stacked.keys()
        self.held = {
            name: Held.rows(p, stacked[id(p)], config.n_routed_experts)
            if id(p) in stacked
            else Held.entire(p)
            for name, p in self.parameters.items()
        }
        adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "moments": moments}
        self.means, self.optimizer = make_update(
            zero, zero_backend, self.pipeline, self.parts, lambda p: id(p) in stacked, adam
        )
        self._owned = self._owned_names()
        self._routers = {
            name: module
            for part in built
            for name, module in part.named_modules()
            if isinstance(module, Router)
        }
        self._router_rows = _router_rows(config)
        self._device = device or torch.device("cpu")
        self.ema: EMA | None = None
        if ema_decay is not None:
            self.ema = EMA(
                self.optimizer.parameters.items(),
                ema_decay,
                masters=self.optimizer.masters,
                shards=None if isinstance(self.means, WholeGradients) else self.means,
                timeout_s=timeout_s,
            )

    def step(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        lr: float,
        max_norm: float = 1.0,
        mtp_weight: float = 0.3,
        bias_update_speed: float = 1e-3,
        judge: Callable[[float, float], bool] | None = None,
        asked: int = 0,
    ) -> StepResult:
        """One optimizer step.

        Args:
            inputs, targets: this data-parallel rank's sequences, [N, L] int64.
            lr: learning rate of the update.
            max_norm: limit of the gradient norm, 0 for none.
            mtp_weight: lambda of multi-token prediction.
            bias_update_speed: gamma of the routers' biases.
            judge: given the main loss and the gradient norm, which are the same on every rank, says
                whether to update parameters and biases, or raises; None updates, unless the norm is
                not finite.
            asked: a number to sum over all ranks, in a message that goes anyway: whether this rank
                was asked to stop.

        Raises:
            CommError: a peer is gone or a wait took too long; PipelineError tells where.
            ValueError: the gradient norm is not finite and there is no `judge`; nothing has been
                updated then.
        """
        for part in self.parts.values():
            part.mtp_loss_weight = mtp_weight
        self.gradients(inputs, targets)
        with self.pipeline.at("sums over the whole mesh"):
            losses = self._mean_over_dp(self.pipeline.report.losses)
            # The loss of rank 0 goes to all: a backend may sum over dp in another order elsewhere,
            # and whoever judges by it must find the same.
            mine = 0.0 if self.mesh.rank else losses["main"]
            with mark("gradient norm"):
                norm, (all_asked, losses["main"]) = clip_by_global_norm(
                    self.optimizer.parameters.items(),
                    self._owned,
                    max_norm,
                    also=(asked, mine),
                    board=self.mesh.waits,
                )
            asked = round(all_asked)
            if judge is not None:
                if not judge(losses["main"], norm):
                    loads = self._balance(0.0)
                    return StepResult(losses, norm, loads, updated=False, asked=asked)
            elif not norm < float("inf"):
                raise ValueError(
                    f"the gradient norm is {norm} with a loss of {losses['main']:g}; training "
                    "cannot go on: lower train.lr, or lengthen train.warmup_steps"
                )
            with mark("optimizer"):
                self._update(lr)
            with mark("router biases"):
                loads = self._balance(bias_update_speed)
            return StepResult(losses, norm, loads, asked=asked)

    def _update(self, lr: float) -> None:
        """The optimizer's update; average and gather go on while the next step begins."""
        if self.ema is not None:
            self.ema.before_change()
        self.optimizer.step(lr)
        if self.ema is not None:
            with self.pipeline.at(AT_EMA):
                self.ema.update()

    def gradients(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward and backward: `.grad` becomes the gradient of the global batch's mean loss.

        It is that of `optimizer.parameters`: with ZeRO-1 of this rank's shares.
        """
        with mark("zero gradients"):
            self.means.drop_gradients()
            for router in self._routers.values():
                router.load_E.zero_()
        self.pipeline.step(
            inputs,
            targets,
            sum_replicas=False,
            on_begin=self.means.finish_gather,
            on_end=self.means.end_stage,
        )
        with self.pipeline.at(_AT_MEAN), mark("mean of gradients"):
            self.means.finish_gather()  # of stages that had nothing to do
            self.means.finish_gradients()
        # Last, because two addends give the same bits on both holders, whatever order a backend
        # sums a larger group in.
        with self.pipeline.at("sum of the gradients of replicas"), mark("sum over replicas"):
            self.pipeline.replicas.sum(self.means.instead)

    def evaluate(self, inputs: Tensor, targets: Tensor) -> float:
        """Mean cross-entropy of the next token over the global batch, nats."""
        self._finish_gather()
        self.pipeline.evaluate(inputs, targets)
        with self.pipeline.at("mean of the losses over data-parallel ranks"):
            return self._mean_over_dp(self.pipeline.report.losses)["main"]

    def settle(self) -> None:
        """Return when nothing that began with an earlier step is under way; a collective.

        To be called before anything but a step reads or changes parameters or optimizer states.
        """
        self._finish_gather()
        if self.ema is not None:
            with self.pipeline.at(AT_EMA):
                self.ema.wait()

    def _finish_gather(self) -> None:
        with self.pipeline.at(_AT_GATHER):
            self.means.finish_gather()

    def loaded(self) -> None:
        """Derive what follows from parameters and states that were loaded into their pieces."""
        self.optimizer.loaded()

    def _owned_names(self) -> set[str]:
        """Names of which this rank has the first copy, so that each counts once in the norm."""
        owned: set[str] = set()
        placement, shape = self.pipeline.schedule.placement, self.mesh.shape
        for stage, part in self.parts.items():
            for name, parameter in part.named_parameters():
                ranks, _ = holders(placement, self.tied, (stage, name))
                copies = shape.ep if id(parameter) in self._experts else 1
                # A share is nobody else's; where nothing is cut, there are no copies.
                first = self.means.instead is not None or self.mesh.dp_rank < copies
                if first and ranks[0] == self.mesh.pp_rank:
                    owned.add(name)
        return owned

    def _mean_over_dp(self, losses: Mapping[str, float]) -> dict[str, float]:
        values = torch.tensor(list(losses.values()), dtype=torch.float64, device=self._device)
        sum_over(values, self.mesh.dp_group, "the losses", board=self.mesh.waits)
        return dict(zip(losses, (values / self.mesh.shape.dp).tolist(), strict=True))

    def _balance(self, speed: float) -> dict[str, list[int]]:
        """Update the biases of all routers by the whole batch's load; returns that load."""
        if not self._router_rows:
            return {}
        shape = len(self._router_rows), self.config.n_routed_experts
        loads = torch.zeros(shape, dtype=torch.int64, device=self._device)
        for name, router in self._routers.items():
            loads[self._router_rows[name]] = router.load_E
        # The world holds every token of a layer once: replicas of a stage see different
        # micro-batches.
        world = dist.group.WORLD if dist.is_initialized() else None
        sum_over(loads, world, "the experts' loads", board=self.mesh.waits)
        for name, router in self._routers.items():
            if router.has_bias and speed:
                load = loads[self._router_rows[name]]
                bias = updated_bias(router.e_score_correction_bias, load, speed)
                router.e_score_correction_bias.copy_(bias)
        return dict(zip(self._router_rows, loads.tolist(), strict=True))


def _router_rows(config: ModelConfig) -> dict[str, int]:
    """A row for every router of the model, by its name; further predictions come last."""
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    names = [f"model.layers.{i}.mlp.gate" for i in layers if config.is_moe(i)]
    return {name: row for row, name in enumerate(names)}
