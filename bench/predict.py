"""Every prediction beside what is published or measured, good and bad.

    python -m bench.predict [--rounds 8] [--trace FILE] [--only facts|v3|runs]

Facts are arithmetic that follows from published configurations: they have to be exact to the digits
that are published. DeepSeek-V3's step is predicted from the trace of one pair of its chunks and the
papers alone (`bench.predict_v3`). Small runs are predicted from what this machine was measured to
take for single layers, and then run (`bench.predict_runs`; needs no GPU, network namespaces for
those across hosts). The exit status is 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from counterflow.model import ModelConfig
from counterflow.model.counts import (
    grouped_kv_cache_bytes,
    kv_cache_bytes,
    num_active_parameters,
    num_parameters,
)
from counterflow.model.flops import token_flops
from counterflow.predict import published
from counterflow.predict.network import Network

from .machine import write_result

TRACE = Path(__file__).resolve().parents[2] / "shared" / "data" / "h800-train-pair.json.gz"
PARTS = ("facts", "v3", "runs")

V2 = ModelConfig.from_hf(
    Path(__file__).parents[1] / "tests" / "model" / "data" / "deepseek-v2.json"
)


class Fact(NamedTuple):
    """One number that follows from others.

    Attributes:
        row: which of the published tables it is of, in words.
        what: of which it tells.
        predicted: to as many digits as are published.
        published: what it has to be.
    """

    row: str
    what: str
    predicted: float
    published: float


def facts() -> list[Fact]:
    """All that has to be exact."""
    return [*_sizes(), *_flops(), *_hours(), *_decoding(), *_networks()]


def _sizes() -> list[Fact]:
    v3, parameters, cache = ModelConfig(), "parameters, 1e9", "KV cache, bytes a token"
    active = num_active_parameters(v3), num_active_parameters(v3, embedding=True)
    qwen = grouped_kv_cache_bytes(layers=80, kv_heads=8, head_dim=128)
    llama = grouped_kv_cache_bytes(layers=126, kv_heads=8, head_dim=128)
    return [
        Fact(parameters, "V3", round(num_parameters(v3) / 1e9, 2), 671.03),
        Fact(parameters, "V3, of a token", round(active[0] / 1e9, 1), 36.6),
        Fact(parameters, "V3, of a token, with embedding", round(active[1] / 1e9, 2), 37.55),
        Fact(parameters, "V2", round(num_parameters(V2) / 1e9, 2), 235.74),
        Fact(cache, "V3", kv_cache_bytes(v3), 70_272),
        Fact(cache, "Qwen-2.5 72B", qwen, 327_680),
        Fact(cache, "LLaMA-3.1 405B", llama, 516_096),
    ]


def _flops() -> list[Fact]:
    v3, v2, what = token_flops(ModelConfig(), 4096), token_flops(V2, 4096), "1e9 FLOPs a token"
    return [
        Fact(what, "V3, causal", round(v3.published / 1e9, 2), 249.81),
        Fact(what, "V3, not causal", round(v3.not_causal / 1e9, 2), 280.51),
        Fact(what, "V2", round(v2.published / 1e9, 2), 155.01),
    ]


def _hours() -> list[Fact]:
    gpus = published.V3_RUN.num_gpus
    trillion = published.hours_per_trillion(published.V3_TOKENS_PER_DAY, gpus)
    told = published.gpu_hours(published.V3_TOKENS, published.V3_HOURS_PER_TRILLION)
    hours = published.gpu_hours(published.V3_TOKENS, trillion)
    return [
        Fact("1e3 GPU hours", "1e12 tokens, by tokens a day", round(trillion / 1e3, 1), 180.2),
        Fact("1e3 GPU hours", "14.8e12 tokens, by tokens a day", round(hours / 1e3, 1), 2666.6),
        Fact("1e3 GPU hours", "14.8e12 tokens, by 180e3 for 1e12", told / 1e3, 2664.0),
    ]


def _decoding() -> list[Fact]:
    found: list[Fact] = []
    of_links = ((50, 120.96, 241.92, 14.76, 67), (900, 6.72, 13.44, 0.82, 1219))
    for gbps, exchange, layer, token, rate in of_links:
        one = published.exchange_us(gbps)
        each = published.output_token_ms(one)
        row = f"decoding at {gbps} GB/s"
        found += [
            Fact(row, "dispatch and combine, us", round(one, 2), exchange),
            Fact(row, "a layer, us", round(published.layer_us(one), 2), layer),
            Fact(row, "an output token, ms", round(each, 2), token),
            Fact(row, "tokens a second", int(1e3 / each), rate),
        ]
    return found


def _networks() -> list[Fact]:
    networks = {
        "two tiers": (Network(2, 64), 2_048, 96),
        "two tiers, 8 planes": (Network(2, 64, planes=8), 16_384, 768),
        "three tiers": (Network(3, 64), 65_536, 5_120),
    }
    return [
        fact
        for name, (network, endpoints, switches) in networks.items()
        for fact in (
            Fact("fat trees of 64 ports", f"{name}, endpoints", network.endpoints, endpoints),
            Fact("fat trees of 64 ports", f"{name}, switches", network.switches, switches),
        )
    ]


def print_facts(found: Sequence[Fact]) -> None:
    """A line a fact."""
    print(f"{'what follows from published configurations':62}{'predicted':>12}{'published':>12}")
    for fact in found:
        missed = "" if fact.predicted == fact.published else "   missed"
        name = f"{fact.row}: {fact.what}"
        print(f"  {name:60}{fact.predicted:>12,.10g}{fact.published:>12,.10g}{missed}")


def judged(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every target by its name: what was reached, what was to be reached, whether it was."""
    found: dict[str, dict[str, Any]] = {}
    if "facts" in result:
        wrong = sum(fact["predicted"] != fact["published"] for fact in result["facts"])
        found["facts that are not exact"] = {
            "measured": wrong,
            "relation": "<=",
            "target": 0,
            "met": not wrong,
        }
    if "v3" in result:
        error = abs(result["v3"]["predicted_to_implied"] - 1)
        found["V3's step: error"] = {
            "measured": error,
            "relation": "<=",
            "target": result["v3"]["target"][1] - 1,
            "met": result["v3"]["met"],
        }
    return found | result.get("runs", {}).get("targets", {})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8, help="of the small runs")
    parser.add_argument("--trace", type=Path, default=TRACE, help="of a pair of V3's chunks")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be from 1 up")
    parts = options.only or PARTS
    if "v3" in parts and not options.trace.exists():
        parser.error(f"--trace {options.trace} is not there; give DeepSeek's trace of an H800")
    result: dict[str, Any] = {}
    if "facts" in parts:
        found = facts()
        print_facts(found)
        result["facts"] = [fact._asdict() for fact in found]
    if "v3" in parts:
        from .predict_v3 import v3

        result["v3"] = v3(options.trace)
    if "runs" in parts:
        from .predict_runs import small_runs

        result["runs"] = small_runs(options.rounds)
    result["targets"] = judged(result)
    print(f"{'target':50}{'reached':>10}{'':4}{'to reach':<10}")
    for name, of in result["targets"].items():
        missed = "" if of["met"] else "missed"
        print(f"{name:50}{of['measured']:>10.3g} {of['relation']} {of['target']:<10.3g}{missed}")
    if set(parts) == set(PARTS):
        print(f"wrote {write_result('predict', result)}")
    if not all(of["met"] for of in result["targets"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
