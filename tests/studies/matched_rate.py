"""Does the matched rate move weights as far as full fine-tuning does? Measured step by step on the embedded model's own layers.

    python tests/studies/matched_rate.py    # prints the tables; a few minutes on one core

From the same start and with the same batches: Adam on the weights themselves, and LoRA at matched rates. Two ratios come of it, and both
should be 1: *to the run* divides each LoRA step by the step of the full run; *at the point* by the step that Adam, fed with the full
gradients along LoRA's own path, would take from where LoRA stands. The first also shows that the two runs come to learn different things.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.data import images
from sdlora.diffusion.losses import denoising_loss, min_snr_weight
from sdlora.diffusion.timesteps import stratified
from sdlora.lora.inits import INITS
from sdlora.lora.layers import LoraLayer
from sdlora.lora.matched import expected_rate, matched_rate, next_direction
from sdlora.lora.targets import find_targets, inject, seeded_generator
from sdlora.models import families
from sdlora.models.family import Model
from sdlora.models.images import encode_images

PICTURES = Path(__file__).parent.parent.parent / "datasets" / "fish"
BETAS, EPS, BATCH = (0.9, 0.99), 1e-8, 4
SIZES = torch.zeros(1, 6)  # SD 1.x does not look at them
GROUPS = {"unet": ("attention", "feed_forward", "projection", "resnet"), "text_encoder": ("attention", "feed_forward")}


@dataclass(frozen=True)
class Variant:
    rank: int
    scale: float
    init: str = "kaiming"
    up_ratio: float = 1.0


@dataclass
class Steps:
    """What one layer did, a number a step."""

    moved: list[float] = field(default_factory=list)  # ||W after - W before||
    at_the_point: list[float] = field(default_factory=list)  # moved, over what Adam on W would have moved it from there
    rates: list[float] = field(default_factory=list)  # those used
    stale: list[float] = field(default_factory=list)  # the rate used over the one that fits this step
    expected: list[float] = field(default_factory=list)  # the rate that needs no directions over the one that fits this step
    by_up: list[float] = field(default_factory=list)  # rms of up's direction over that of Adam's direction on W
    by_down: list[float] = field(default_factory=list)  # of down's
    signal: list[float] = field(default_factory=list)  # rms of Adam's direction on W: below 1 at the first step where gradients near eps


def start(names: Sequence[str] | None = None) -> tuple[Model, dict[str, str], Callable[[int], Tensor]]:
    """The embedded model afresh, module paths of its layers (of `names` only, where given), and the loss of each step's batch."""
    family, model = families.load("mini", torch.float32, torch.device("cpu"))
    found = {name: path for part, module in model.parts.items() for name, path in find_targets(part, module, GROUPS[part]).items()}
    pictures = sorted(PICTURES.glob("*.png"))
    latents, _ = encode_images(model, torch.stack([images.to_tensor(images.decode(path)) for path in pictures]))
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in pictures]
    schedule = model.noise_schedule

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randperm(len(pictures), generator=generator)[:BATCH]
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = stratified([step * BATCH + k for k in range(BATCH)], 0, BATCH)
        noisy = schedule.add_noise(latents[rows], noise, timesteps)
        predicted = family.predict(model, noisy, timesteps, family.encode_prompts(model, [captions[row] for row in rows]), SIZES)
        return denoising_loss(predicted, noise, min_snr_weight(schedule.snr(timesteps), 5, schedule.prediction_type))

    return model, found if names is None else {name: found[name] for name in names}, loss_of


def module_of(model: Model, name: str, path: str) -> nn.Module:
    return model.parts[name.partition(".")[0]].get_submodule(path)


def adam(groups: Sequence[Mapping[str, object]] | Sequence[Tensor], rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPS, weight_decay=0, fused=True)


def full_run(steps: int, rate: float, names: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Fine-tune the weights of all `names` at once; how far each step moved each of them."""
    model, found, loss_of = start(names)
    weights = {name: module_of(model, name, path).weight.requires_grad_(True) for name, path in found.items()}
    optimizer = adam(list(weights.values()), rate)
    moved: dict[str, list[float]] = {name: [] for name in weights}
    for step in range(steps):
        loss_of(step).backward()
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        optimizer.step()
        optimizer.zero_grad()
        for name, weight in weights.items():
            moved[name].append(float((weight.detach() - before[name]).norm()))
    return moved


def adapt(model: Model, found: Mapping[str, str], variant: Variant) -> dict[str, LoraLayer]:
    def make(name: str, base: Any) -> LoraLayer:
        weight = base.weight.detach().flatten(1)
        rank = min(variant.rank, *weight.shape)
        begin = INITS[variant.init](weight, rank, variant.scale, seeded_generator(0, name))
        return LoraLayer(base, begin, variant.scale * rank, 1 / rank, learned_alpha=False)

    layers: dict[str, LoraLayer] = {}
    for part, module in model.parts.items():
        layers |= inject(module, {name: path for name, path in found.items() if name.startswith(part)}, make)
    return layers


def direction_of(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor | None:
    return next_direction(parameter, optimizer.state[parameter], BETAS, EPS) if parameter.requires_grad else None


def fitting_rates(layers: Mapping[str, LoraLayer], optimizer: torch.optim.Optimizer, rate: float, up_ratio: float) -> list[float]:
    """The matched rate of each layer for the step about to be taken."""
    found = []
    for layer in layers.values():
        down_direction, up_direction = direction_of(layer.down, optimizer), direction_of(layer.up, optimizer)
        assert up_direction is not None
        found.append(matched_rate(rate, layer.scale, layer.down, layer.up, down_direction, up_direction, up_ratio))
    return torch.stack(found).tolist()  # one wait for all


def rms(direction: Tensor | None) -> float:
    return float(direction.square().mean().sqrt()) if direction is not None else 0.0


@torch.no_grad()
def update_of(layer: LoraLayer) -> Tensor:
    return (layer.scale * (layer.up.flatten(1) @ layer.down.flatten(1))).detach()


def lora_run(steps: int, rate: float, variant: Variant, names: Sequence[str] | None = None, fresh: int = 1_000_000) -> dict[str, Steps]:
    """Train LoRAs on all `names` at once at matched rates, computed anew at each of the first `fresh` steps and then at every tenth."""
    model, found, loss_of = start(names)
    layers = adapt(model, found, variant)
    groups = []
    for layer in layers.values():
        groups += [{"params": [layer.down] if layer.down.requires_grad else []}, {"params": [layer.up]}]
    optimizer = adam(groups, 0.0)
    weights = {name: layer.base.weight.requires_grad_(True) for name, layer in layers.items()}
    witness = adam(list(weights.values()), 0.0)  # learns nothing, but keeps Adam's means of the full gradients
    record = {name: Steps() for name in layers}
    rates: list[float] = []
    for step in range(steps):
        loss_of(step).backward()
        fitting = fitting_rates(layers, optimizer, rate, variant.up_ratio)
        if step < fresh or step % 10 == 0:
            rates = fitting
        for number, layer_rate in enumerate(rates):
            optimizer.param_groups[2 * number]["lr"] = layer_rate
            optimizer.param_groups[2 * number + 1]["lr"] = layer_rate * variant.up_ratio
        wanted = {name: rms(direction_of(weight, witness)) for name, weight in weights.items()}
        seen = {name: (rms(direction_of(layer.up, optimizer)), rms(direction_of(layer.down, optimizer))) for name, layer in layers.items()}
        before = {name: update_of(layer) for name, layer in layers.items()}
        static = [
            expected_rate(rate, layer.scale, layer.down, layer.up, variant.up_ratio, layer.down.requires_grad) for layer in layers.values()
        ]
        optimizer.step()
        witness.step()
        optimizer.zero_grad()
        witness.zero_grad()
        for (name, layer), used, fits, expected in zip(layers.items(), rates, fitting, static, strict=True):
            row, rho = record[name], wanted[name]
            row.moved.append(float((update_of(layer) - before[name]).norm()))
            row.at_the_point.append(row.moved[-1] / (rate * rho * weights[name].numel() ** 0.5))
            row.rates.append(used)
            row.stale.append(used / fits)
            row.expected.append(float(expected) / fits)
            row.by_up.append(seen[name][0] / rho)
            row.by_down.append(seen[name][1] / rho)
            row.signal.append(rho)
    return record


def cost(variant: Variant, repeats: int = 10) -> tuple[float, float]:
    """Seconds of a training step, and of computing all rates once: the least of some, as other work only adds to them."""
    model, found, loss_of = start()
    layers = adapt(model, found, variant)
    optimizer = adam([p for layer in layers.values() for p in (layer.down, layer.up)], 1e-4)
    training, matching = [], []
    for step in range(repeats + 1):
        began = time.perf_counter()
        loss_of(step).backward()
        between = time.perf_counter()
        fitting_rates(layers, optimizer, 1e-5, variant.up_ratio)
        after = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        training.append(between - began + time.perf_counter() - after)
        matching.append(after - between)
    return min(training[1:]), min(matching[1:])


KINDS = ("attn1", "attn2", ".ff.", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "self_attn", ".mlp.")


def report(title: str, run: Mapping[str, Steps], full: Mapping[str, Sequence[float]]) -> None:
    steps = len(next(iter(run.values())).moved)
    to_the_run = {name: [a / b for a, b in zip(row.moved, full[name], strict=False)] for name, row in run.items()}
    print(f"\n{title}: {len(run)} layers, {steps} steps")
    for label, ratios in (("to the run", to_the_run), ("at the point", {name: row.at_the_point for name, row in run.items()})):
        print(f"  {label:12s} median a step:", " ".join(f"{median(r[t] for r in ratios.values()):.3f}" for t in range(steps)))
        print(f"  {'':12s} layer means: {spread([mean(r) for r in ratios.values()])}")
        clear = [mean(r) for name, r in ratios.items() if run[name].signal[0] > 0.99]
        print(f"  {'':12s} of layers whose gradients are far above eps: {spread(clear)}")
    print("  at the point, by kind:", ", ".join(f"{k.strip('.')} {by_kind(k, run):.2f}" for k in KINDS))
    expected = [median(row.expected[t] for row in run.values()) for t in (0, steps - 1)]
    print(f"  expected_rate over the fitting rate, median: first step {expected[0]:.3f}, last {expected[1]:.3f}")


def by_kind(kind: str, run: Mapping[str, Steps]) -> float:
    return mean(mean(row.at_the_point) for name, row in run.items() if kind in name)


def spread(ratios: Sequence[float]) -> str:
    low, *_, high = ordered = sorted(ratios)
    within = mean(abs(r - 1) <= 0.1 for r in ordered)
    return f"median {median(ordered):.3f}, from {low:.3f} to {high:.3f}, within 10 %: {100 * within:.0f} % of {len(ordered)}"


def main() -> None:
    torch.set_num_threads(1)
    full = full_run(10, 1e-5)
    for variant in (
        Variant(4, 1.0),
        Variant(4, 8.0),
        Variant(16, 1.0),
        Variant(16, 8.0),
        Variant(16, 1.0, up_ratio=16.0),
        Variant(16, 1.0, "orthonormal"),
        Variant(16, 1.0, "down_zero"),
        Variant(16, 1.0, "pissa"),
    ):
        report(f"{variant}, eta 1e-5", lora_run(10, 1e-5, variant), full)
    report(f"{Variant(16, 1.0)}, eta 1e-4", lora_run(10, 1e-4, Variant(16, 1.0)), full_run(10, 1e-4))

    for rate in (1e-5, 1e-4):
        run = lora_run(50, rate, Variant(16, 1.0), fresh=10)
        stale = [abs(s - 1) for row in run.values() for s in row.stale[10:]]
        worst = max(range(10, 50), key=lambda t: median(abs(row.stale[t] - 1) for row in run.values()))
        high = sorted(stale)[len(stale) * 95 // 100]
        print(f"\nRates of every tenth step, eta {rate:.0e}, steps 11 to 50:")
        print(f"  off by {100 * median(stale):.1f} % (median), {100 * high:.1f} % (95th percentile); the worst step is {worst + 1}")
        for label in ("at_the_point", "by_up", "by_down"):
            medians = [median(getattr(row, label)[t] for row in run.values()) for t in range(9, 50, 10)]
            print(f"  {label:12s} at steps 10, 20 … 50, median:", " ".join(f"{ratio:.3f}" for ratio in medians))
    for rank in (4, 16, 64):
        training, matching = cost(Variant(rank, 1.0))
        print(f"\nrank {rank}: a step takes {training * 1e3:.0f} ms, its rates {matching * 1e3:.1f} ms: {100 * matching / training:.1f} %")


if __name__ == "__main__":
    main()
