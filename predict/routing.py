"""How unevenly tokens fall on the ranks of an expert group, and what that costs.

Two things make it uneven. Some experts are more popular than others: what a router learns, and what
balancing takes back. And chance: were all experts as popular, a rank's rows would still vary, as a
token's K experts are drawn from E, and N tokens of a group are finitely many. So

    rows of a rank / their mean  =  popularity of its experts  +  noise,

where the noise is normal with the covariance that drawing M of G groups and then K experts in them
gives, for N tokens (`Choice` of `comm.traffic_synthetic`; popularity p scales its variance by p).
V3's router, which takes the groups with the best experts, spreads a little more evenly than that:
its deviation is smaller by 2 % with 4 experts a rank, by 11 % with a whole group on each.

Computation is proportional to a rank's rows. Bytes are those of the busiest link:

    flat                        a record a row: rows;
    dedup, and two hops inside  a record for each token that reaches the rank at all: with q the
    one node                    chance that it does, (1 - (1 - q)^rows) / q of the mean;
    two_hop, deep_ep            the same for the rank's node, that crosses on the link of each
                                source's index: the rank's share of it, with a noise of its own.

Shapes: L layers, g expert groups, R ranks of a group, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

from ..comm.dispatch.layout import ExpertLayout
from ..comm.traffic_synthetic import Choice
from ..model import ModelConfig
from .chance import mean_chance, reached, root_of_covariance, shares_of
from .layout import Dispatcher, Layout
from .loads import Floats, Loads
from .spread import choice_of

Kind = Literal["balanced", "even", "skewed", "measured"]

# Seeds of what is drawn by itself, so that the one does not depend on whether the other is.
_POPULARITY, _CHANCE = 0, 1
# Draws of a group from which its mean slowest rank is taken: within 0.5 % of a deviation.
_DRAWS = 2048


@dataclass(frozen=True)
class Routing:
    """How uneven routing is.

    Attributes:
        kind: "balanced": every rank gets the mean. "even": all experts are as popular, and chance
            does the rest. "skewed": popularity is log-normal. "measured": popularity is that of
            `loads`. The last two have chance's part too.
        spread: of skewed: the deviation of the logarithm of experts' popularity, which is about the
            relative deviation of their loads.
        persistent: of skewed: popularity is the same for all tokens of a step, as where a model's
            balance is off; else each micro-batch of each group has its own, as where its texts
            differ. Of measured: the mean of all steps; else each micro-batch has that of one step.
        loads: of measured.

    Raises:
        ValueError: a spread or loads without their kind, or none with it.
    """

    kind: Kind = "even"
    spread: float = 0.0
    persistent: bool = True
    loads: Loads | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.spread) and self.spread >= 0):
            raise ValueError(f"routing: spread={self.spread!r} must be finite and from 0 up")
        if self.kind in ("balanced", "even") and not self.persistent:
            raise ValueError(f"routing: {self.kind} routing has no popularity that could change")
        if self.spread and self.kind != "skewed":
            raise ValueError(f"routing: a spread is of skewed routing, not of {self.kind}")
        if (self.loads is not None) != (self.kind == "measured"):
            raise ValueError("routing: measured routing has loads, and no other has")

    @classmethod
    def with_max_vio(cls, max_vio: float, num_experts: int, *, persistent: bool = True) -> Routing:
        """Skewed routing, whose busiest expert is expected to have this load over the mean, less 1.

        The largest of E standard normal numbers is z = Phi^-1((E - 3/8) / (E + 1/4)) or so (Blom),
        and the busiest expert's popularity exp(s z - s^2 / 2), s being the spread. The paper of
        loss-free balancing (arXiv 2408.15664, tables 2 and 3) has 0.04 with it, over a whole
        validation set, and 0.5 to 0.7 with an auxiliary loss; single micro-batches are less even.

        Raises:
            ValueError: no such spread exists.
        """
        if num_experts < 2 or not 0 <= max_vio < num_experts - 1:
            raise ValueError(
                f"max_vio={max_vio!r} must be from 0 to below the number of experts less 1, of "
                f"which there are {num_experts}"
            )
        z = NormalDist().inv_cdf((num_experts - 0.375) / (num_experts + 0.25))
        under = z * z - 2 * math.log1p(max_vio)
        if under < 0:
            raise ValueError(
                f"max_vio={max_vio:g} is beyond log-normal popularity of {num_experts} experts, "
                f"which reaches {math.expm1(z * z / 2):.3g}"
            )
        return cls("skewed", z - math.sqrt(under), persistent)

    @classmethod
    def measured(cls, loads: Loads | str | Path, *, persistent: bool = True) -> Routing:
        """Popularity as a run has it.

        Args:
            loads: or where they are: see `Loads.read`.
            persistent: as the attribute.
        """
        found = loads if isinstance(loads, Loads) else Loads.read(loads)
        return cls("measured", persistent=persistent, loads=found)

    def of(
        self,
        model: ModelConfig,
        layout: Layout,
        *,
        gpus_per_node: int = 8,
        experts: ExpertLayout | None = None,
    ) -> GroupRouting:
        """What it comes to for a model and a layout.

        Args:
            model: gives how experts are chosen.
            layout: gives ranks of a group, tokens of a micro-batch, and the dispatcher.
            gpus_per_node: ranks of a node.
            experts: which rank has which expert; by default E / R neighbours each.

        Raises:
            ValueError: sizes that do not fit together, or loads of another model.
        """
        ep = layout.ep
        placed = experts or ExpertLayout.contiguous(model.n_routed_experts, ep)
        if placed.num_experts != model.n_routed_experts or placed.num_ranks != ep:
            raise ValueError(
                f"the experts' layout has {placed.num_experts} experts on {placed.num_ranks} "
                f"ranks, but the model has {model.n_routed_experts} and ep is {ep}"
            )
        inside = min(ep, gpus_per_node)
        if inside < 1 or ep % inside:
            raise ValueError(
                f"ep={ep} ranks do not fill nodes of {gpus_per_node}; choose ep a divisor or a "
                "multiple of that"
            )
        if self.loads is not None:
            _check_loads(self.loads, model)
        return GroupRouting(
            self, choice_of(model), placed, layout.tokens, inside, layout.dispatcher
        )


class Drawn(NamedTuple):
    """Loads of one micro-batch, relative to their means.

    Attributes:
        rows: [L, g, R], rows of each rank's experts.
        busiest: [L, g], bytes of the busiest link in dispatch and combine.
    """

    rows: Floats
    busiest: Floats


@dataclass(frozen=True)
class GroupRouting:
    """The routing of expert groups: `Routing` for one model and layout.

    Attributes:
        routing: how uneven.
        choice: how a token chooses its experts.
        experts: which rank has which.
        tokens: of a micro-batch on one rank.
        ranks_per_node: of a group.
        dispatcher: how tokens get to their experts.
    """

    routing: Routing
    choice: Choice
    experts: ExpertLayout
    tokens: int
    ranks_per_node: int
    dispatcher: Dispatcher

    @property
    def ep(self) -> int:
        """R."""
        return self.experts.num_ranks

    @property
    def is_random(self) -> bool:
        """Whether ranks differ at all."""
        return self.routing.kind != "balanced" and self.ep > 1

    def draw(self, layers: range, microbatch: int, groups: int, seed: int = 0) -> Drawn:
        """The loads of one micro-batch; the same arguments give the same.

        Args:
            layers: which ones, counted among those that have experts.
            microbatch: which one of a step.
            groups: g.
            seed: of the draw.
        """
        shape = (len(layers), groups, self.ep)
        if not self.is_random:
            return Drawn(np.ones(shape), np.ones(shape[:2]))
        rng = np.random.default_rng([seed, _CHANCE, layers.start, microbatch])
        popular = self._popularity(layers, microbatch, groups, seed)
        noise = rng.standard_normal(shape) @ self._noise.T
        rows = np.maximum(popular + noise * np.sqrt(popular), 0.0)
        return Drawn(rows, self._records(popular, rows, rng).max(axis=-1))

    def _records(self, popular: Floats, rows: Floats, rng: np.random.Generator) -> Floats:
        """[L, g, R], records on the link that decides, relative to their mean."""
        if self.dispatcher == "flat":
            return rows
        inside, nodes = self.ranks_per_node, self.ep // self.ranks_per_node
        if nodes == 1 or self.dispatcher == "dedup":
            return reached(rows, self._chance(1))
        chance = self._chance(inside)
        by_node = popular.reshape(*popular.shape[:-1], nodes, inside).mean(axis=-1, keepdims=True)
        # A link takes what the ranks of its index on the other nodes send there.
        deviation = math.sqrt((1 - chance) / (chance * (nodes - 1) * self.tokens))
        noise = deviation * rng.standard_normal((*rows.shape[:2], nodes, inside))
        return (reached(by_node, chance) + noise).reshape(rows.shape)

    def _chance(self, ranks: int) -> float:
        """That a token reaches the experts of so many neighbouring ranks, the mean over these."""
        return mean_chance(self.choice, self.experts, ranks)

    def _popularity(self, layers: range, microbatch: int, groups: int, seed: int) -> Floats:
        """[L, g or 1, R], the popularity of each rank's experts; the mean over ranks is 1."""
        routing = self.routing
        if routing.persistent:
            return _persistent(self, layers, seed)
        return self._of_ranks(self._of_experts(layers, (microbatch,), groups, seed))

    def _of_experts(self, layers: range, more: tuple[int, ...], groups: int, seed: int) -> Floats:
        """[L, g, E], the popularity of experts; the mean is 1. None is in more than all tokens."""
        routing, experts = self.routing, self.choice.num_experts
        if routing.kind == "even":
            return np.ones((len(layers), 1, experts))
        rng = np.random.default_rng([seed, _POPULARITY, layers.start, *more])
        if routing.loads is not None:
            shares = routing.loads.shares
            # A run may leave the loads of multi-token prediction out: as those of the last layer.
            held = np.minimum(np.array(layers), routing.loads.num_layers - 1)
            if not more:
                found = shares.mean(axis=0)[held][:, None]
            else:
                found = shares[rng.integers(len(shares), size=groups)][:, held].swapaxes(0, 1)
        else:
            found = np.exp(routing.spread * rng.standard_normal((len(layers), groups, experts)))
            found = found / found.mean(axis=2, keepdims=True)
        most = experts / self.choice.top_k
        if found.max() > most:
            found = np.minimum(found, most)
            found = found / found.mean(axis=2, keepdims=True)
        return found

    def _of_ranks(self, popular: Floats) -> Floats:
        """[..., E] to [..., R]: sums of what each rank's slots have, relative to their mean."""
        return popular @ (shares_of(self.experts) * (self.ep / self.choice.num_experts)).T

    @cached_property
    def _noise(self) -> Floats:
        """[R, R], what makes relative noise of independent normal numbers."""
        tokens = self.tokens * self.ep
        mean = tokens * self.choice.top_k / self.ep
        return root_of_covariance(self.choice, self.experts) * (math.sqrt(tokens) / mean)


class Slowdown(NamedTuple):
    """What the slowest rank of an expert group has, relative to the mean.

    Attributes:
        rows: of the busiest rank's experts.
        bytes: of the busiest link.
    """

    rows: float
    bytes: float


def expected_slowdown(
    routing: Routing, model: ModelConfig, layout: Layout, *, gpus_per_node: int = 8
) -> Slowdown:
    """The expected maximum over a group's ranks, of one layer and micro-batch.

    From a seeded draw of 2,048 layers, which is kept for the same sizes; measured popularity: the
    mean over its layers.

    Raises:
        ValueError: sizes that do not fit together, or loads of another model.
    """
    if routing.kind == "balanced" or layout.ep == 1:
        return Slowdown(1.0, 1.0)
    return _expected(routing.of(model, layout, gpus_per_node=gpus_per_node))


@lru_cache(maxsize=1024)
def _expected(group: GroupRouting) -> Slowdown:
    loads = group.routing.loads
    layers = range(_DRAWS if loads is None else loads.num_layers)
    drawn = group.draw(layers, 0, 1 if loads is None else max(1, _DRAWS // loads.num_layers))
    return Slowdown(float(drawn.rows.max(axis=-1).mean()), float(drawn.busiest.mean()))


@lru_cache(maxsize=1024)
def _persistent(group: GroupRouting, layers: range, seed: int) -> Floats:
    return group._of_ranks(group._of_experts(layers, (), 1, seed))  # pyright: ignore[reportPrivateUsage]


def _check_loads(loads: Loads, model: ModelConfig) -> None:
    layers = model.num_hidden_layers - model.first_k_dense_replace
    known = {layers, layers + model.num_nextn_predict_layers}
    if loads.num_experts != model.n_routed_experts or loads.num_layers not in known:
        raise ValueError(
            f"{loads.source} has loads of {loads.num_layers} layers of {loads.num_experts} "
            f"experts, but the model has {' or '.join(map(str, sorted(known)))} layers of "
            f"{model.n_routed_experts}; use loads of a run of this model"
        )
