"""Bytes a token that a decoder layer keeps for its backward, predicted and measured.

    python -m bench.activation_memory [--tokens 256] [--device cuda]

Options: BF16 or FP8, with and without E5M6 for the input of the product after attention; outputs
of norms, and of MLA's up-projections too, made again in the backward (+norms,
+up); rows dispatched in FP8.

Predicted are the bytes of counterflow.model.memory. Measured are those of all storages that were
made since the layer's forward began and that are alive when its output's node in autograd's graph
is all that is held (`layer_memory.Alive`); the layer's own input counts if it is kept.
On a GPU `torch.cuda.memory_allocated` is read beside, which counts blocks of 512 bytes. "waiting"
is what the weight-gradient queue holds between the halves I and W of the backward. "/alike" is the
ratio to BF16 with the same made again. Left out of the table is what only CPUs keep, heads padded
to one size.

Two sizes: a small model, and DeepSeek-V3's dimensions. There 8 experts are measured, of which a
token uses all: 256 do not fit a small machine, and what is kept depends on the rows alone but for
the router's affinities and the balance loss, which the column "256 experts" has as of V3. On a CPU
products at that size give zeros and weights are not quantised (a minute a layer, for no difference
in storages), few tokens are taken, and there is no backward.
Results go to bench/results/activation_memory.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from counterflow.comm.dispatch.names import PayloadName
from counterflow.fp8 import Recipe
from counterflow.launch.tables import print_table
from counterflow.model import ModelConfig
from counterflow.model.build import Build, Recompute
from counterflow.model.memory import PADDING, Load, kept_between_halves, kept_for_backward

from .layer_memory import Measured, make_layer, measure, without_arithmetic
from .machine import write_result

MOST = 0.6  # bytes that an FP8 layer keeps / those of the BF16 layer with the same recomputation

RESULT_TABLES = ("small_moe", "small_dense", "v3_moe", "v3_dense")

SMALL = ModelConfig(
    vocab_size=256,
    hidden_size=512,
    intermediate_size=1280,
    moe_intermediate_size=256,
    num_attention_heads=4,
    q_lora_rank=256,
    kv_lora_rank=128,
    n_routed_experts=8,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
)
V3 = ModelConfig()
V3_FEW_EXPERTS = replace(V3, n_routed_experts=8, n_group=1, topk_group=1)


@dataclass(frozen=True)
class Option:
    """One line of the table."""

    recipe: Recipe | None
    recompute: Recompute
    payload: PayloadName = "exact"

    @property
    def name(self) -> str:
        parts = ["BF16" if self.recipe is None else "FP8"]
        if self.recipe is not None and not self.recipe.e5m6:
            parts.append("(no E5M6)")
        if self.payload != "exact":
            parts.append(f"(sent in {self.payload.upper()})")
        if self.recompute.norms:
            parts.append("+norms")
        if self.recompute.up_projections:
            parts.append("+up")
        return " ".join(parts)


NOTHING, NORMS, BOTH = Recompute(), Recompute(norms=True), Recompute(True, True)
OPTIONS = [
    *(Option(None, again) for again in (NOTHING, NORMS, BOTH)),
    *(Option(Recipe(), again) for again in (NOTHING, NORMS, BOTH)),
    *(Option(Recipe(e5m6=False), again) for again in (NOTHING, NORMS, BOTH)),
    Option(None, NOTHING, "bf16"),
    Option(Recipe(), NOTHING, "fp8"),
    Option(Recipe(), BOTH, "fp8"),
]


@dataclass(frozen=True)
class Line:
    """One option at one size, bytes a token; see `Measured`."""

    option: str
    predicted: float
    measured: float
    exact: bool
    to_bf16: float
    to_bf16_alike: float
    waiting_predicted: float
    waiting_measured: float | None
    allocated: float | None
    peak: float | None
    items: dict[str, float]


def lines(
    config: ModelConfig, load: Load, device: torch.device, *, moe: bool, real: bool
) -> list[Line]:
    """All options at one size."""
    found: list[Line] = []
    bf16: dict[Recompute, float] = {}
    for option in (o for o in OPTIONS if moe or o.payload == "exact"):
        recipe = option.recipe
        if recipe is not None and not real:
            recipe = without_arithmetic(recipe)
        build = Build(torch.bfloat16, device, recipe, option.recompute)
        layer = make_layer(config, build, moe=moe, payload=option.payload, real=real)
        seen = measure(layer, config, build, load, real=real)
        del layer
        load = replace(load, counts=seen.counts) if moe else load
        found.append(line(option.name, seen, config, build, load, bf16, moe=moe))
    return found


def line(
    name: str,
    seen: Measured,
    config: ModelConfig,
    build: Build,
    load: Load,
    bf16: dict[Recompute, float],
    *,
    moe: bool,
) -> Line:
    """What was `seen` beside what was predicted; BF16's bytes are noted in `bf16` as they come."""
    kept = kept_for_backward(config, build, load, moe=moe)
    padding = kept.items.get(PADDING, 0)
    measured = seen.kept - (0 if seen.allocated is not None else padding)
    measured_per_token = measured / load.tokens
    if build.recipe is None:
        bf16.setdefault(build.recompute, measured_per_token)
    # Columns are filled up to 128 rows, of which a few tokens would be a small part.
    of = load if seen.waiting is not None else Load(4096)
    waiting = kept_between_halves(config, build, of, moe=moe)

    def per_token(size: int | None) -> float | None:
        return None if size is None else size / load.tokens

    return Line(
        option=name,
        predicted=kept.per_token(),
        measured=measured_per_token,
        exact=measured == kept.total - padding,
        to_bf16=measured_per_token / bf16[NOTHING],
        to_bf16_alike=measured_per_token / bf16[build.recompute],
        waiting_predicted=waiting.per_token(),
        waiting_measured=per_token(seen.waiting),
        allocated=per_token(seen.allocated),
        peak=per_token(seen.peak),
        items={what: size / load.tokens for what, size in kept.items.items() if what != PADDING},
    )


def predicted_per_token(config: ModelConfig, option: Option, *, moe: bool) -> float:
    """At one sequence of 4096 tokens."""
    build = Build(torch.bfloat16, None, option.recipe, option.recompute)
    return kept_for_backward(config, build, Load(4096), moe=moe).per_token()


def show(title: str, found: Sequence[Line], whole: Sequence[float] | None) -> None:
    """Print one table; `whole` are predictions with all experts."""

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:,.0f}"

    head = ["option", "predicted", "measured", "equal", "/BF16", "/alike", "waiting", "seen"]
    body = [
        [
            li.option,
            number(li.predicted),
            number(li.measured),
            "yes" if li.exact else "no",
            f"{li.to_bf16:.3f}",
            f"{li.to_bf16_alike:.3f}",
            number(li.waiting_predicted),
            number(li.waiting_measured),
        ]
        for li in found
    ]
    if found[0].allocated is not None:
        head += ["allocated", "peak"]
        for row, li in zip(body, found, strict=True):
            row += [number(li.allocated), number(li.peak)]
    if whole is not None:
        head.append("256 experts")
        for row, value in zip(body, whole, strict=True):
            row.append(number(value))
    print_table(f"{title}, bytes a token", head, body, names=1)
    print()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="in two sequences")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    torch.set_num_threads(1)  # what is computed is small, and storages are the same
    result: dict[str, Any] = {"tokens": options.tokens, "device": str(device)}
    for name, config, real in (("small", SMALL, True), ("v3", V3_FEW_EXPERTS, on_gpu)):
        load = Load(options.tokens, 2) if real else Load(8)
        for kind in ("moe", "dense"):
            moe = kind == "moe"
            found = lines(config, load, device, moe=moe, real=real)
            chosen = [option for option in OPTIONS if moe or option.payload == "exact"]
            whole = None
            if moe and name == "v3":
                whole = [predicted_per_token(V3, option, moe=True) for option in chosen]
            show(f"{name}, {kind}", found, whole)
            result[f"{name}_{kind}"] = [asdict(line) for line in found]
            if whole is not None:
                result["v3_moe_256_experts"] = dict(
                    zip([o.name for o in chosen], whole, strict=True)
                )
    result["targets"] = targets(result)
    path = write_result("activation_memory" + ("_gpu" if on_gpu else ""), result)
    print(f"wrote {path}")


def targets(result: dict[str, Any]) -> dict[str, Any]:
    """What has to hold, and whether it does."""
    everything = [line for name in RESULT_TABLES for line in result[name]]
    experts = result["small_moe"] + result["v3_moe"]
    worst = max(line["to_bf16_alike"] for line in experts if line["option"].startswith("FP8"))
    return {
        "moe_fp8_to_bf16_alike_at_most": MOST,
        "worst": worst,
        "met": worst <= MOST,
        "predictions_exact": all(line["exact"] for line in everything),
    }


if __name__ == "__main__":
    main()
