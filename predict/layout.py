"""How a model is spread over ranks and in which formats it computes: what a prediction is of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..comm.dispatch.names import PayloadName
from ..comm.traffic_sizes import Elements, PayloadSizes
from ..model import ModelConfig
from ..model.stages import Part, partition
from ..parallel.schedule import Schedule, build

DTypeName = Literal["bfloat16", "float32", "float64"]
Dispatcher = Literal["flat", "dedup", "two_hop", "deep_ep"]
Payload = PayloadName
# Layers of a stage: "head" is final norm, output head and loss; "mtp" a whole depth of multi-token
# prediction.
Kind = Literal["embedding", "dense", "moe", "mtp", "head"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to train a model.

    Attributes:
        pp, dp, ep: as of `parallel.mesh.MeshShape`: pipeline ranks, data-parallel ranks of each,
            and how many of those share a set of experts.
        schedule: name of the pipeline schedule.
        microbatches: a step and data-parallel rank.
        sequences: of a micro-batch.
        length: tokens of a sequence.
        stages_per_rank: of interleaved; None: the schedule's own number.
        layers: decoder layers of each stage; None: the balanced cut of `model.stages.partition`.
        dtype: of parameters and activations.
        fp8: linear layers compute in FP8 and keep their inputs in it.
        e5m6: of them the one after attention keeps its input in E5M6; counts with `fp8` alone.
        dispatcher: how tokens get to their experts.
        payload: in what they travel.
        comm_sms: SMs that dispatch and combine keep; None: none that computation misses.
        recompute_norms, recompute_up_projections: made again in the backward.
        moments: of AdamW.
        zero: 1 shares the optimizer's states out, 0 has them on every rank.
        ema: a moving average of the parameters in the host's memory.
        overlap: phases run on two lanes; without, a stage runs in one piece.
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1
    schedule: str = "dualpipe"
    microbatches: int = 1
    sequences: int = 1
    length: int = 4096
    stages_per_rank: int | None = None
    layers: tuple[int, ...] | None = None
    dtype: DTypeName = "bfloat16"
    fp8: bool = True
    e5m6: bool = True
    dispatcher: Dispatcher = "deep_ep"
    payload: Payload = "fp8"
    comm_sms: int | None = 20
    recompute_norms: bool = True
    recompute_up_projections: bool = True
    moments: Literal["bfloat16", "float32"] = "bfloat16"
    zero: int = 1
    ema: bool = False
    overlap: bool = True

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.sequences * self.length

    @property
    def tokens_per_step(self) -> int:
        """Of all data-parallel ranks."""
        return self.tokens * self.microbatches * self.dp

    @property
    def itemsize(self) -> int:
        """Bytes of a number of `dtype`."""
        return {"bfloat16": 2, "float32": 4, "float64": 8}[self.dtype]

    @property
    def payload_sizes(self) -> PayloadSizes:
        """How rows travel to experts and back."""
        if self.payload != "exact":
            return PayloadSizes.named(self.payload)
        own = Elements(8 * self.itemsize)
        return PayloadSizes(self.dtype, own, own)

    def make_schedule(self) -> Schedule:
        """The schedule of a step.

        Raises:
            ValueError: there is none of that name for these numbers.
        """
        more = {} if self.stages_per_rank is None else {"stages_per_rank": self.stages_per_rank}
        return build(self.schedule, ranks=self.pp, microbatches=self.microbatches, **more)

    def parts(self, model: ModelConfig, num_stages: int) -> tuple[Part, ...]:
        """The part of the model that each stage holds.

        Raises:
            ValueError: the model cannot be cut so.
        """
        return _cut(model, num_stages, self.layers)


@lru_cache(maxsize=512)  # the balanced cut takes longer than all else that a search asks for
def _cut(model: ModelConfig, num_stages: int, layers: tuple[int, ...] | None) -> tuple[Part, ...]:
    return partition(model, num_stages, layers)
