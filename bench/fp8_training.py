"""Does training in FP8 follow BF16? One model, one seed, real text, one run a recipe.

    python -m bench.fp8_training [--steps 500] [--control-steps 250] [--batch 8] [--jobs 2]
                                 [--runs bf16,fp8,...] [--folder DIR] [--device cuda] [--scale 4]

The runs:

    bf16              every product in BF16: what the others are compared with
    fp8               DeepSeek-V3's recipe
    block_gradients   negative control: output gradients quantised in blocks of 128x128
    fp8_outliers      DeepSeek-V3's recipe on a model with outlier channels
    tensor_outliers   negative control: one scale for each tensor, on that model

Outlier channels: in the output of each layer's norms some channels are 2**15 times larger, and the
weights that multiply them as much smaller; powers of two, so that in BF16 the model, its training
(Adam's updates of these weights scaled as well) and its loss are the same to the last bit, and the
run bf16 is the baseline of all. Gaussian inputs cannot tell fine-grained scaling from a scale for
each tensor.

Losses are smoothed by an exponential moving average with coefficient 0.9 and compared relative to
bf16's at each step, as in arXiv 2412.19437, appendix B.1. Besides, at the weights that bf16 ends
with, the relative error of the gradient of the loss by each recipe against BF16's, over all
parameters of decoder layers.

Each run is a process of its own with one thread. Its losses lie in DIR while it goes on; a run that
is complete there is not run again. Results go to bench/results/fp8_training.json and the curves to
bench/results/fp8_training.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from counterflow.fp8 import Recipe
from counterflow.launch.data import Loader, open_corpus
from counterflow.launch.engine import Engine
from counterflow.model import ModelConfig, num_active_parameters, num_parameters
from counterflow.model.attention import Attention
from counterflow.model.experts import MLP
from counterflow.model.layer import DecoderLayer
from counterflow.model.moe import MoE
from counterflow.parallel import Mesh, MeshShape
from counterflow.parallel.schedule import build

from .machine import RESULTS, write_result

LENGTH = 128
SMOOTHING = 0.9
OUTLIER = 2.0**15
OUTLIERS = slice(0, 128, 64)  # two channels, both in a row's first tile


@dataclass(frozen=True)
class Variant:
    """One run: its recipe, None for BF16, and whether its model has outlier channels."""

    recipe: Recipe | None = None
    outliers: bool = False


TENSOR = Recipe(activations="tensor", gradients="tensor", weights="tensor")
VARIANTS = {
    "bf16": Variant(),
    "fp8": Variant(Recipe()),
    "block_gradients": Variant(Recipe(gradients="block")),
    "fp8_outliers": Variant(Recipe(), outliers=True),
    "tensor_outliers": Variant(TENSOR, outliers=True),
}


def model(scale: int) -> ModelConfig:
    """5.6 million active parameters at scale 1; sizes grow with `scale`."""
    return ModelConfig(
        vocab_size=256,
        hidden_size=512 * scale,
        num_hidden_layers=3,
        intermediate_size=1280 * scale,
        moe_intermediate_size=256 * scale,
        num_attention_heads=4 * scale,
        q_lora_rank=128 * scale,
        kv_lora_rank=128 * scale,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        max_position_embeddings=LENGTH,
        initializer_range=0.02,
    )


class Outliers:
    """Some channels after each norm are `OUTLIER` times larger, their weights as much smaller."""

    def __init__(self, engine: Engine) -> None:
        self._masters = {
            id(p): engine.optimizer.masters.get(name, p) for name, p in engine.parameters.items()
        }
        layers = [m for part in engine.parts.values() for m in part.decoder_layers()]
        self._gains = [
            n.weight for m in layers for n in (m.input_layernorm, m.post_attention_layernorm)
        ]
        self._weights = [w for m in layers for w in _after_norms(m)]
        self.scales = {id(p): OUTLIER for p in self._gains}
        self.scales.update({id(p): 1 / OUTLIER for p in self._weights})
        self._before: list[Tensor] = []
        for p in self._both():
            self._set(p, self._get(p) * self.scales[id(p)])

    def before_update(self) -> None:
        """Remember the outlier channels' values."""
        self._before = [self._get(p).clone() for p in self._both()]

    def after_update(self) -> None:
        """Scale the step that Adam made in them, which does not depend on a gradient's size."""
        for p, old in zip(self._both(), self._before, strict=True):
            self._set(p, old + (self._get(p) - old) * self.scales[id(p)])

    def _both(self) -> list[nn.Parameter]:
        return [*self._gains, *self._weights]

    def _get(self, p: nn.Parameter) -> Tensor:
        return self._masters[id(p)].detach()[..., OUTLIERS]

    @torch.no_grad()
    def _set(self, p: nn.Parameter, values: Tensor) -> None:
        self._masters[id(p)][..., OUTLIERS] = values
        if self._masters[id(p)] is not p:
            p.copy_(self._masters[id(p)])


def _after_norms(layer: DecoderLayer) -> list[nn.Parameter]:
    """The weights that multiply what the layer's two norms give."""
    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, Attention)
    found = [attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight]
    if isinstance(mlp, MoE):
        found += [mlp.gate.weight, mlp.experts.gate_up_proj]
        mlp = mlp.shared_experts
    assert isinstance(mlp, MLP)
    return [*found, mlp.gate_proj.weight, mlp.up_proj.weight]


class Study:
    """The model in training.

    Args:
        variant: which run.
        scale, batch: of the model; sequences a step.
        device: where.
    """

    def __init__(self, variant: Variant, *, scale: int, batch: int, device: str) -> None:
        torch.manual_seed(0)
        config = model(scale)
        self.batch, self.device = batch, torch.device(device)
        self.engine = Engine(
            config,
            Mesh(MeshShape()),
            build("1f1b", ranks=1, microbatches=1),
            dtype=torch.bfloat16,
            device=self.device,
            recipe=variant.recipe,
            moments=torch.bfloat16 if variant.recipe else torch.float32,
            weight_decay=0.0,
        )
        corpus = open_corpus("stdlib")
        self.text = corpus.name
        self.loader = Loader(corpus.train, LENGTH, seed=0)
        self.validation = Loader(corpus.validation, LENGTH, seed=0)
        self.outliers = None
        if variant.outliers:
            self.outliers = Outliers(self.engine)

    def batch_of(self, loader: Loader) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [batch, LENGTH] each."""
        inputs, targets = loader.next(self.batch)
        return self._tensor(inputs), self._tensor(targets)

    def step(self, lr: float) -> float:
        """One optimizer step; the loss before it, nats a byte."""
        if self.outliers is not None:
            self.outliers.before_update()
        # No clipping: the outliers' gradients would rule the norm.
        result = self.engine.step(*self.batch_of(self.loader), lr=lr, max_norm=0.0)
        if self.outliers is not None:
            self.outliers.after_update()
        return result.losses["main"]

    def validate(self, batches: int) -> float:
        """Mean loss on held-out text."""
        return float(
            np.mean([self.engine.evaluate(*self.batch_of(self.validation)) for _ in range(batches)])
        )

    def _tensor(self, x: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over a tenth of the steps to DeepSeek-V3's 2.2e-4, then a cosine to a tenth."""
    peak, warm = 2.2e-4, max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def run(name: str, options: argparse.Namespace) -> None:
    """One run, in this process; its losses go to FOLDER/NAME.jsonl as they come."""
    torch.set_num_threads(1)
    study = Study(VARIANTS[name], scale=options.scale, batch=options.batch, device=options.device)
    part = options.folder / f"{name}.part"
    begin = time.perf_counter()
    with part.open("w", encoding="utf-8") as out:
        for step in range(number_of_steps(name, options)):
            loss = study.step(learning_rate(step, options.steps))
            seconds = time.perf_counter() - begin
            print(json.dumps({"loss": loss, "seconds": round(seconds, 2)}), file=out, flush=True)
        print(json.dumps({"validation_loss": study.validate(8), "text": study.text}), file=out)
    if name == "bf16":
        weights = {n: p.detach() for n, p in study.engine.optimizer.masters.items()}
        weights = {**{n: p.detach() for n, p in study.engine.parameters.items()}, **weights}
        torch.save(weights, options.folder / "bf16.pt")
    part.replace(options.folder / f"{name}.jsonl")


def number_of_steps(name: str, options: argparse.Namespace) -> int:
    """Steps of a run; the learning rate follows the longer ones' schedule in all."""
    return options.steps if name in ("bf16", "fp8") else options.control_steps


def gradient_errors(options: argparse.Namespace) -> dict[str, float]:
    """By run: |gradient - BF16's| / |BF16's| at bf16's last weights, over the decoder layers."""
    torch.set_num_threads(1)
    weights = torch.load(options.folder / "bf16.pt", map_location=options.device)
    exact: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name, variant in VARIANTS.items():
        # Outliers are scaled back in the gradients, so that all runs' are of one model.
        plain = replace(variant, outliers=False)
        study = Study(plain, scale=options.scale, batch=options.batch, device=options.device)
        with torch.no_grad():
            for n, p in study.engine.parameters.items():
                p.copy_(weights[n])
            for n, master in study.engine.optimizer.masters.items():
                master.copy_(weights[n])
        scales = Outliers(study.engine).scales if variant.outliers else {}
        study.engine.gradients(*study.batch_of(study.validation))
        grads: dict[str, Tensor] = {}
        for n, p in study.engine.parameters.items():
            if ".layers." not in n or p.grad is None:
                continue
            grads[n] = p.grad.double()
            if id(p) in scales:
                grads[n][..., OUTLIERS] *= scales[id(p)]
        exact = exact or grads
        wrong = sum(float((grads[n] - exact[n]).square().sum()) for n in exact)
        errors[name] = math.sqrt(wrong / sum(float(g.square().sum()) for g in exact.values()))
    return errors


def smoothed(losses: list[float]) -> NDArray[np.float64]:
    """Exponential moving average that starts at the first loss."""
    average, found = losses[0], []
    for loss in losses:
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        found.append(average)
    return np.array(found)


def summary(folder: Path, names: list[str]) -> dict[str, Any]:
    """The runs' curves and how they differ from bf16's."""
    read: dict[str, tuple[list[float], dict[str, Any], float]] = {}
    for name in names:
        lines = [json.loads(li) for li in (folder / f"{name}.jsonl").read_text().splitlines()]
        read[name] = [li["loss"] for li in lines[:-1]], lines[-1], lines[-2]["seconds"]
    base = smoothed(read["bf16"][0])
    found: dict[str, Any] = {}
    for name, (losses, last, seconds) in read.items():
        curve = smoothed(losses)
        difference = curve / base[: len(curve)] - 1
        half = len(curve) // 2
        found[name] = {
            "steps": len(curve),
            "final_loss": round(float(curve[-1]), 5),
            "validation_loss": round(last["validation_loss"], 5),
            "relative_difference_final": round(float(difference[-1]), 6),
            "relative_difference_largest_second_half": round(
                float(np.abs(difference[half:]).max()), 6
            ),
            "relative_difference_mean_second_half": round(float(difference[half:].mean()), 6),
            "seconds": seconds,
            "smoothed_loss": [round(float(x), 5) for x in curve],
        }
    return found


def draw(runs: dict[str, Any], path: Path) -> None:
    """Loss curves, and their relative differences from bf16's."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    base = np.array(runs["bf16"]["smoothed_loss"])
    for name, result in runs.items():
        curve = np.array(result["smoothed_loss"])
        upper.plot(curve, label=name, linewidth=1)
        if name != "bf16":
            lower.plot(100 * (curve / base[: len(curve)] - 1), label=name, linewidth=1)
    upper.set_ylabel("loss, nats a byte (smoothed)")
    upper.legend()
    lower.axhspan(-0.25, 0.25, alpha=0.15)
    lower.set_ylabel("difference from bf16, %")
    lower.set_ylim(-1, 3)
    lower.set_xlabel("step")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run what is missing, then sum up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--control-steps", type=int, default=250, help="of the three other runs")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {LENGTH} a step")
    parser.add_argument("--scale", type=int, default=1, help="factor of the model's sizes")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--runs", default=",".join(VARIANTS), help="which, bf16 among them")
    parser.add_argument("--folder", type=Path, default=Path("runs/fp8_training"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in this process
    options = parser.parse_args()
    names = options.runs.split(",")
    unknown = [n for n in names if n not in VARIANTS]
    if unknown or "bf16" not in names or not 2 <= options.control_steps <= options.steps:
        parser.error(
            f"--runs takes bf16 and others of {', '.join(VARIANTS)}; --steps and --control-steps "
            "must be 2 or more, --control-steps at most --steps"
        )
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.run:
        run(options.run, options)
        return
    waiting = [n for n in names if not (options.folder / f"{n}.jsonl").exists()]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            command = [sys.executable, "-m", "bench.fp8_training", *sys.argv[1:], "--run", name]
            running.append((name, subprocess.Popen(command)))
            print(f"{name} runs", flush=True)
        time.sleep(1)
        for name, process in running:
            if process.poll():
                sys.exit(f"{name} ended with code {process.returncode}")
        running = [(n, p) for n, p in running if p.poll() is None]
    runs = summary(options.folder, names)
    errors = gradient_errors(options)
    for name, result in runs.items():
        result["gradient_error"] = round(errors[name], 5)
        print(
            f"{name:16} loss {result['final_loss']:.4f}  validation "
            f"{result['validation_loss']:.4f}  from bf16 "
            f"{100 * result['relative_difference_final']:+.3f} %, at most "
            f"{100 * result['relative_difference_largest_second_half']:.3f} % in the second half"
            f"  gradient error {result['gradient_error']:.4f}"
        )
    config = model(options.scale)
    setting = {
        "steps": options.steps,
        "tokens_per_step": options.batch * LENGTH,
        "parameters": num_parameters(config),
        "active_parameters": num_active_parameters(config),
        "device": options.device,
        "smoothing": SMOOTHING,
    }
    print(write_result("fp8_training", {**setting, "runs": runs}))
    draw(runs, RESULTS / "fp8_training.svg")


if __name__ == "__main__":
    main()
