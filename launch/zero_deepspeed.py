"""DeepSpeed's ZeRO-1 in the place of this project's: an optional backend.

Its `DeepSpeedZeroOptimizer` (stage 1) does the cutting, the reduction of whole gradients, the
update and the gathering of parameters; here it is given AdamW and the gradients, and what it keeps
is shown by parameter. It flattens all parameters of a kind into one tensor, of which every rank
updates a stretch, and puts the model's parameters there. Nothing of it overlaps with the pipeline.

It knows one group of ranks for all parameters, and no sums over a pipeline's replicas: experts that
are spread over ranks, stages held twice and weights tied over ranks are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..comm.collectives import guarded
from ..comm.waiting import WaitBoard
from ..parallel.zero import Share
from .checkpoint.pieces import Held, Piece
from .optim import adam_state, decays, make_adam, state_counter, state_pieces

_BUCKET_ELEMENTS = 8 << 20


class _Slice(NamedTuple):
    """Where a parameter's share lies in the stretch that this rank updates of a flat group."""

    group: int
    first: int
    last: int


class DeepSpeedZero:
    """AdamW by DeepSpeed's ZeRO-1; in the places of `Optimizer` and of `parallel.zero.Shards`.

    Args:
        parameters: this rank's by name, float32 or lower; their storage changes here.
        group: data-parallel ranks.
        betas, eps, weight_decay, moments: as of `Optimizer`.
        board: where waits are announced.

    Attributes:
        shares: float32 shares by name, of the parameters of which this rank updates something;
            they are masters, whatever the parameters' dtype.

    Raises:
        ValueError: DeepSpeed is not installed or of an unknown version, or there is nothing to
            share, or a parameter is float64.
    """

    instead: Mapping[Parameter, Parameter] = {}  # there are no replicas

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        group: dist.ProcessGroup | None,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: torch.dtype = torch.float32,
        board: WaitBoard | None = None,
    ) -> None:
        if group is None:
            raise ValueError(
                'zero.backend = "deepspeed" needs two data-parallel ranks or more; start more, or '
                'take zero.backend = "counterflow"'
            )
        if any(p.dtype == torch.float64 for p in parameters.values()):
            raise ValueError("DeepSpeed's ZeRO-1 does not train float64 parameters")
        self._whole, self._group, self._board = dict(parameters), group, board
        kinds = _kinds(parameters)
        # Low precision first: DeepSpeed takes the first group's dtype for that of the model.
        names = [
            kinds[kind] for kind in sorted(kinds, key=lambda kind: (kind[0].itemsize, kind[1]))
        ]
        # DeepSpeed exchanges what AdamW updates for float32 stretches; until then stand-ins are
        # there, as AdamW need not take what it will never update.
        groups: list[dict[str, Any]] = [
            {
                "params": [Parameter(torch.empty(0))],
                "weight_decay": weight_decay if decays(parameters[alike[0]]) else 0.0,
            }
            for alike in names
        ]
        self._adam = make_adam(groups, betas=betas, eps=eps, moments=moments)
        for made, alike in zip(self._adam.param_groups, names, strict=True):
            made["params"] = [parameters[name] for name in alike]
        self._zero = _make(self._adam, self._whole, group)
        self._slices = dict(self._find_slices(names))
        self.shares: Mapping[str, Share] = {
            name: Share(Parameter(self._masters[s.group][s.first : s.last]), start)
            for name, (s, start) in self._slices.items()
        }
        self._counters: dict[str, Tensor] = {}
        self._moved()

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What has the gradients: this rank's shares by name."""
        return {name: share.parameter for name, share in self.shares.items()}

    @property
    def masters(self) -> dict[str, Tensor]:
        """The float32 shares that AdamW updates, by name."""
        return {name: share.parameter.detach() for name, share in self.shares.items()}

    def drop_gradients(self) -> None:
        """Begin anew: gradients become None."""
        self._zero.zero_grad(set_to_none=True)
        self._zero.averaged_gradients = {}
        self._zero.all_grad_tensors = {}
        for share in self.shares.values():
            share.parameter.grad = None

    def end_stage(self, stage: int) -> None:
        """A stage's gradients are complete, which changes nothing: all are reduced at the end."""

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Every share's `.grad` becomes its mean gradient; zeros where no rank has one.

        Raises:
            CommError: a rank is gone or did not answer in time.
        """
        for parameter in self._whole.values():
            if parameter.grad is None:  # or ranks that have one would wait for those without
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        if self._zero.use_grad_accum_attribute:
            self._zero.fill_grad_accum_attribute()
        self._waiting(self._zero.reduce_gradients, "the mean of the gradients, by DeepSpeed")
        flat: dict[int, Tensor] = {}
        for i, found in self._zero.averaged_gradients.items():
            flat[i] = torch.cat([grad.reshape(-1) for grad in found])
            self._zero.averaged_gradients[i] = [flat[i]]  # so that clipping what is shown clips it
        for name, (s, _) in self._slices.items():
            self.shares[name].parameter.grad = flat[s.group][s.first : s.last]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the gradients of the shares, and the gathering of the parameters.

        Raises:
            CommError: a rank is gone or did not answer in time.
        """
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._waiting(self._zero.step, "the updated parameters, by DeepSpeed")
        self._moved()

    def start_gather(self) -> None:
        """Bring every rank's shares into all ranks' wholes."""
        self._waiting(self._zero.update_lp_params, "the parameters, by DeepSpeed")
        self._moved()

    def finish_gather(self, stage: int | None = None) -> None:
        """Parameters are whole after each call."""

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Moments, step and master of each share, by name; not copies."""
        state: dict[str, dict[str, Tensor]] = {}
        for name, (s, _) in self._slices.items():
            flat = adam_state(self._adam, self._masters[s.group])
            state[name] = {key: flat[key][s.first : s.last] for key in ("exp_avg", "exp_avg_sq")}
            state[name]["master"] = self.shares[name].parameter.detach()
            state[name]["step"] = flat["step"]
        return state

    def pieces(self, held: Mapping[str, Held]) -> Iterator[Piece]:
        """As `Optimizer.pieces`. Masters of float32 parameters are the parameters: left out."""
        self._counters = {}
        for name, state in self.state_dict().items():
            self._counters[name] = state_counter(held[name], state.pop("step"))
            if self._whole[name].dtype == torch.float32:
                del state["master"]
            start = self.shares[name].start
            yield from state_pieces(name, held[name], start, state, self._counters[name])

    @torch.no_grad()
    def loaded(self) -> None:
        """Take over the counters that were loaded, and float32 parameters as their own masters."""
        for name, counter in self._counters.items():
            master = self._masters[self._slices[name][0].group]
            adam_state(self._adam, master)["step"].fill_(counter.max())
        self._counters = {}
        self._follow([n for n in self.shares if self._whole[n].dtype == torch.float32])

    def take_wholes(self) -> None:
        """As `Optimizer.take_wholes`."""
        self._follow(self.shares)

    @property
    def _masters(self) -> list[Parameter]:
        """The stretch of each flat group that this rank updates, float32."""
        return self._zero.single_partition_of_fp32_groups

    @torch.no_grad()
    def _follow(self, names: Iterable[str]) -> None:
        """These parameters' masters become what the parameters are."""
        for name in names:
            share = self.shares[name]
            end = share.start + share.parameter.numel()
            share.parameter.copy_(self._whole[name].view(-1)[share.start : end])

    def _find_slices(self, names: Sequence[Sequence[str]]) -> Iterator[tuple[str, Any]]:
        """(slice, start in the flattened parameter) of all that this rank updates, by name."""
        rank = dist.get_rank(self._group)
        for i, group in enumerate(names):
            size = self._masters[i].numel()
            offset = -rank * size  # of the parameter, in this rank's stretch
            for name in group:
                numel = self._whole[name].numel()
                first, last = max(offset, 0), min(offset + numel, size)
                if first < last:
                    yield name, (_Slice(i, first, last), first - offset)
                offset += numel

    def _moved(self) -> None:
        """Parameters have changed through storage of which autograd does not know."""
        torch.autograd.graph.increment_version(self._whole.values())

    def _waiting(self, run: Callable[[], object], what: str) -> None:
        guarded(run, self._group, what, self._board)


def _kinds(parameters: Mapping[str, Parameter]) -> dict[tuple[torch.dtype, bool], list[str]]:
    """Names by dtype and by whether they decay."""
    kinds: dict[tuple[torch.dtype, bool], list[str]] = {}
    for name, parameter in parameters.items():
        kinds.setdefault((parameter.dtype, decays(parameter)), []).append(name)
    return kinds


def _make(
    adam: torch.optim.Optimizer, parameters: Mapping[str, Parameter], group: dist.ProcessGroup
) -> Any:
    """DeepSpeed's optimizer of stage 1 around `adam`.

    Raises:
        ValueError: it is not installed, or takes other arguments.
    """
    try:
        deepspeed = import_module("deepspeed")
        stage_1 = import_module("deepspeed.runtime.zero.stage_1_and_2")
        timer = import_module("deepspeed.utils.timer")
    except Exception as error:  # an import that fails in any way is a library that is not there
        raise ValueError(
            f'zero.backend = "deepspeed" cannot import it ({type(error).__name__}: {error}); '
            "install it with pip install 'counterflow[deepspeed]', or take zero.backend = "
            '"counterflow"'
        ) from error
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    names = {parameter: name for name, parameter in parameters.items()}
    try:
        zero = stage_1.DeepSpeedZeroOptimizer(
            adam,
            names,
            timer.NoopTimer(),
            {},
            contiguous_gradients=False,
            reduce_bucket_size=_BUCKET_ELEMENTS,
            allgather_bucket_size=_BUCKET_ELEMENTS,
            dp_process_group=group,
            reduce_scatter=False,
            overlap_comm=False,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
            partition_grads=False,
            check_grad_overflow=False,
            compute_grad_norm=False,
        )
    except TypeError as error:
        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} makes its ZeRO optimizer in another way ({error}); "
            'install deepspeed 0.19, or take zero.backend = "counterflow"'
        ) from error
    # Its hooks would take gradients away while micro-batches still add to them.
    for hook in zero._grad_acc_hooks:
        hook.remove()
    return zero
