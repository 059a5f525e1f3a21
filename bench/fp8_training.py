"""Does training in FP8 follow BF16? One model, one seed, real text, one run a recipe.

    python -m bench.fp8_training [--steps 500] [--control-steps 250] [--batch 8] [--jobs 2]
                                 [--runs bf16,fp8,...] [--folder DIR] [--device cuda] [--scale 4]

The runs:

    bf16              every product in BF16: what the others are compared with
    float32           every product in float32: how far rounding alone drives two runs apart
    fp8               DeepSeek-V3's recipe
    block_gradients   negative control: output gradients quantised in blocks of 128x128
    fp8_outliers      DeepSeek-V3's recipe on a model with outlier channels
    tensor_outliers   negative control: one scale for each tensor, on that model

Outlier channels: in the output of each layer's norms some channels are 2**18 times larger, and the
weights that multiply them as much smaller, but for the optimizer, which sees them without; all
powers of two, so that in BF16 the training and its loss are the same to the last bit, and the run
bf16 is the baseline of all. Gaussian inputs cannot tell fine-grained scaling from a scale for
each tensor.

The recipe is whole: in FP8 AdamW's moments are bfloat16, in bf16 and float32 they are float32. The
controls stop earlier, under the same learning rates.

Losses are smoothed by an exponential moving average with coefficient 0.9 and compared relative to
bf16's at each step, as in arXiv 2412.19437, appendix B.1. Besides, at the weights that bf16 ends
with, the relative error of the gradient of the loss against BF16's, over all parameters of decoder
layers, of the runs without outliers.

Each run is a process of its own with one thread. Its losses lie in DIR while it goes on; a run that
is complete there is not run again, and one of other options is refused. Results go to
bench/results/fp8_training.json and the curves to .svg beside it; with CUDA, fp8_training_cuda.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
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
OUTLIER = 2.0**18
OUTLIERS = slice(0, 128, 64)  # two channels, both in a row's first tile


@dataclass(frozen=True)
class Variant:
    """One run.

    Attributes:
        recipe: of FP8, or None.
        outliers: whether its model has outlier channels.
        dtype: of what is not in FP8.
    """

    recipe: Recipe | None = None
    outliers: bool = False
    dtype: torch.dtype = torch.bfloat16


TENSOR = Recipe(activations="tensor", gradients="tensor", weights="tensor")
VARIANTS = {
    "bf16": Variant(),
    "float32": Variant(dtype=torch.float32),
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
        self._scale(forth=True)
        self._update = engine.optimizer.step
        engine.optimizer.step = self._step

    def _step(self, lr: float) -> None:
        """The optimizer's update of the model without outliers, so that it is that model's."""
        for p in (*self._gains, *self._weights):
            assert p.grad is not None
            p.grad[..., OUTLIERS] *= self.scales[id(p)]
        self._scale(forth=False)
        self._update(lr)
        self._scale(forth=True)

    @torch.no_grad()
    def _scale(self, *, forth: bool) -> None:
        for p in (*self._gains, *self._weights):
            master, scale = self._masters[id(p)], self.scales[id(p)]
            master[..., OUTLIERS] *= scale if forth else 1 / scale
            if master is not p:
                p.copy_(master)


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
            dtype=variant.dtype,
            device=self.device,
            recipe=variant.recipe,
            moments=torch.bfloat16 if variant.recipe else torch.float32,
            weight_decay=0.0,
        )
        corpus = open_corpus("stdlib")
        self.text = corpus.name
        self.loader = Loader(corpus.train, LENGTH, seed=0)
        self.validation = Loader(corpus.validation, LENGTH, seed=0)
        self.outliers = Outliers(self.engine) if variant.outliers else None

    def batch_of(self, loader: Loader) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [batch, LENGTH] each."""
        inputs, targets = loader.next(self.batch)
        return self._tensor(inputs), self._tensor(targets)

    def step(self, lr: float) -> float:
        """One optimizer step; the loss before it, nats a byte."""
        # No clipping: the outliers' gradients would rule the norm.
        result = self.engine.step(*self.batch_of(self.loader), lr=lr, max_norm=0.0)
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
        print(json.dumps(setting(name, options)), file=out)
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
    return options.steps if name in ("bf16", "float32", "fp8") else options.control_steps


def setting(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a run's losses depend on, written before them."""
    return {
        "steps": number_of_steps(name, options),
        "schedule_steps": options.steps,
        "batch": options.batch,
        "scale": options.scale,
        "device": options.device,
    }


def read(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of a complete run: a loss a step, and the last with the validation loss.

    Raises:
        ValueError: it is of other options.
    """
    path = options.folder / f"{name}.jsonl"
    first, *lines = (json.loads(li) for li in path.read_text(encoding="utf-8").splitlines())
    if first != setting(name, options):
        raise ValueError(
            f"{path} is of a run with other options, {first}, and now {setting(name, options)} are "
            "asked for; give another --folder, or delete it"
        )
    return lines


def gradient_errors(options: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """By run: |gradient - BF16's| / |BF16's| at bf16's last weights, over the decoder layers."""
    torch.set_num_threads(1)
    weights = torch.load(options.folder / "bf16.pt", map_location=options.device)
    exact: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name in ("bf16", *(n for n in names if n != "bf16")):
        if VARIANTS[name].outliers:  # weights that were trained without say little of it
            continue
        study = Study(
            VARIANTS[name], scale=options.scale, batch=options.batch, device=options.device
        )
        with torch.no_grad():
            for n, p in study.engine.parameters.items():
                p.copy_(weights[n])
        study.engine.gradients(*study.batch_of(study.validation))
        grads = {
            n: p.grad.double()
            for n, p in study.engine.parameters.items()
            if ".layers." in n and p.grad is not None
        }
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


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The runs' curves and how they differ from bf16's, from what `read` gives."""
    losses = {name: [line["loss"] for line in lines[:-1]] for name, lines in runs.items()}
    base = smoothed(losses["bf16"])
    found: dict[str, Any] = {}
    for name, lines in runs.items():
        curve = smoothed(losses[name])
        difference = curve / base[: len(curve)] - 1
        size = np.abs(difference)
        warm = len(base) // 10  # where the loss falls steeply, a step more or less is per cents
        last = 3 * len(curve) // 4
        found[name] = {
            "steps": len(curve),
            "final_loss": round(float(curve[-1]), 5),
            "validation_loss": round(lines[-1]["validation_loss"], 5),
            "relative_difference_final": round(float(difference[-1]), 6),
            "relative_difference_largest_last_quarter": round(float(size[last:].max()), 6),
            "relative_difference_largest_after_warm_up": round(float(size[warm:].max()), 6),
            "relative_difference_mean_after_warm_up": round(float(difference[warm:].mean()), 6),
            "share_within_0.25_percent_after_warm_up": round(
                float((size[warm:] <= 0.0025).mean()), 4
            ),
            "seconds": lines[-2]["seconds"],
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


def run_all(names: list[str], jobs: int) -> None:
    """Each of these runs in a process, `jobs` at once; the first that fails ends all."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end with this
    try:
        while names or running:
            while names and len(running) < jobs:
                command = [sys.executable, "-m", "bench.fp8_training", *sys.argv[1:]]
                running[names[0]] = subprocess.Popen([*command, "--run", names[0]])
                print(f"{names.pop(0)} runs", flush=True)
            time.sleep(1)
            for name, process in list(running.items()):
                if process.poll():
                    sys.exit(f"{name} ended with code {process.returncode}")
                if process.poll() == 0:
                    del running[name]
    finally:
        for process in running.values():
            process.kill()


def main() -> None:
    """Run what is missing, then sum up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of bf16, float32 and fp8")
    parser.add_argument("--control-steps", type=int, default=250, help="of the three other runs")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {LENGTH} a step")
    parser.add_argument("--scale", type=int, default=1, help="factor of the model's sizes")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--runs", default=",".join(VARIANTS), help="which, bf16 among them")
    parser.add_argument("--folder", type=Path, default=Path("runs/fp8_training"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in this process
    options = parser.parse_args()
    for name in ("jobs", "batch", "scale"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(options, name)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave it out to run on the CPU")
    names = options.runs.split(",")
    unknown = [n for n in names if n not in VARIANTS]
    if unknown or "bf16" not in names or not 2 <= options.control_steps <= options.steps:
        parser.error(
            f"--runs takes bf16 and others of {', '.join(VARIANTS)}; --steps and --control-steps "
            "must be 2 or more, --control-steps at most --steps"
        )
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--folder {options.folder} cannot be made: {error.strerror}")
    if options.run:
        run(options.run, options)
        return
    done = [n for n in names if (options.folder / f"{n}.jsonl").exists()]
    try:
        for name in done:
            read(name, options)
    except ValueError as error:
        parser.error(str(error))
    run_all([n for n in names if n not in done], options.jobs)
    runs = summary({n: read(n, options) for n in names})
    errors = gradient_errors(options, names)
    for name, result in runs.items():
        if name in errors:
            result["gradient_error"] = round(errors[name], 5)
        print(
            f"{name:16} loss {result['final_loss']:.4f}  validation "
            f"{result['validation_loss']:.4f}  from bf16 "
            f"{100 * result['relative_difference_final']:+.3f} %, at most "
            f"{100 * result['relative_difference_largest_last_quarter']:.3f} % in the last quarter "
            f"and {100 * result['relative_difference_largest_after_warm_up']:.3f} % after warm-up"
        )
    config = model(options.scale)
    about = {
        "steps": options.steps,
        "tokens_per_step": options.batch * LENGTH,
        "parameters": num_parameters(config),
        "active_parameters": num_active_parameters(config),
        "device": options.device,
        "smoothing": SMOOTHING,
    }
    result = "fp8_training" if options.device == "cpu" else f"fp8_training_{options.device}"
    print(write_result(result, {**about, "runs": runs}))
    draw(runs, RESULTS / f"{result}.svg")


if __name__ == "__main__":
    main()
