"""What the inits of `CALIBRATED` want to know of each layer, from a few batches through the model before it is adapted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.errors import TrainingError
from sdlora.lora.inits import singular_triplets
from sdlora.lora.targets import seeded_generator

NUMBERS = 2**21  # of one layer's inputs that `contrasts` holds at once: 8 MB, thousands of vectors of a narrow layer, 180 of the widest
# Of the mean square of what must not change, counted in every direction: a direction that it did not happen to show is no free one.
RIDGE = 0.01
ROWS = 256  # inputs taken of one call: several times the usual rank, and still a fraction of a second of linear algebra

Look = Callable[[str, nn.Linear | nn.Conv2d, tuple[Tensor, ...]], None]


def gradients(modules: Mapping[str, nn.Linear | nn.Conv2d], batches: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Mean gradient of the loss with respect to each frozen weight, (O, I) or (O, I*kh*kw), fp32 on the CPU.

    A batch runs the model and returns its loss. Each layer's gradient leaves the device as soon as it is complete, so that there is
    one at a time. The weights are frozen again afterwards, whatever happens.
    Raises TrainingError for a layer whose gradient is zero or not finite.
    """
    weights = {name: module.weight for name, module in modules.items()}
    means = {name: torch.zeros(weight.flatten(1).shape) for name, weight in weights.items()}
    hooks = []
    count = 0
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(partial(_move_gradient, means[name])))
        for batch in batches:
            loss = batch()
            count += 1
            if loss.requires_grad:  # else no module of ours was called, and that is said below
                loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    for name, total in means.items():
        total /= max(count, 1)
        _check(name, "gradient", total)
    return means


def _move_gradient(total: Tensor, weight: Tensor) -> None:
    assert weight.grad is not None
    total += weight.grad.flatten(1).to("cpu", torch.float32)
    weight.grad = None


def activations(
    modules: Mapping[str, nn.Linear | nn.Conv2d], batches: Iterable[Callable[[], object]], rank: int, seed: int
) -> dict[str, Tensor]:
    """The right singular vectors of each layer's inputs with the largest singular values, (K, I) or (K, I*kh*kw), fp32 on the CPU.

    K is `rank`, or less where the inputs span less. A batch runs the model; what it returns is not looked at. Inputs are not centred,
    as the layer does not centre them either (peft's EVA does).
    Raises TrainingError for a layer that saw no input but zeros, or one that is not finite.
    """
    sketches = {name: torch.zeros(0, module.weight[0].numel()) for name, module in modules.items()}
    calls: Counter[str] = Counter()

    def look(name: str, module: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        rows = sample_inputs(module, inputs[0], ROWS, seeded_generator(seed, f"{name} inputs {calls[name]}")).to("cpu", torch.float32)
        calls[name] += 1
        if rows.any():
            _check(name, "input", rows)
            sketches[name] = _absorb(sketches[name], rows, 2 * rank)

    _watch(modules, batches, look)
    for name, sketch in sketches.items():
        _check(name, "input", sketch)
    return {name: singular_triplets(sketch)[2][:rank].float() for name, sketch in sketches.items()}


def contrasts(
    modules: Mapping[str, nn.Linear | nn.Conv2d],
    batches: Sequence[Callable[[], object]],
    held: Sequence[Callable[[], object]],
    rank: int,
    seed: int,
) -> dict[str, Tensor]:
    """The directions of each layer's inputs that `batches` use most for what `held` uses of them, (K, I) or (K, I*kh*kw) with K at most
    `rank`, fp32 on the CPU. Their lengths are such that a layer's inputs in `batches` are answered as strongly as by `inits.kaiming`.

    Raises TrainingError for a layer that saw no input but zeros, or one that is not finite.
    """
    wanted, others = (_inputs(modules, of, seed) for of in (batches, held))
    return {name: contrast(wanted[name], others[name], rank) for name in modules}


def contrast(wanted: Tensor, others: Tensor, rank: int) -> Tensor:
    """Rows v (K, I) with the largest E (v x)^2 over `wanted` (N, I) for that over `others` (M, I), largest first: generalised
    eigenvectors of both second moments, where that of `others` has RIDGE of its mean square added in every direction."""
    inputs = wanted.shape[1]
    _, s, vh = singular_triplets(others / len(others) ** 0.5)
    ridge = RIDGE * s.square().sum() / inputs
    share = 1 - (ridge / (s.square() + ridge)).sqrt()

    def whitened(rows: Tensor) -> Tensor:
        """Times (moment of others + ridge)^(-1/2), in the unit of ridge^(-1/2)."""
        return rows - (rows @ vh.T * share) @ vh

    wanted = wanted.double()
    rows = whitened(singular_triplets(whitened(wanted))[2][:rank])
    usual = wanted.square().sum(dim=1).mean() / (3 * inputs)  # E (v x)^2 of a row by `inits.kaiming`
    return (rows * (usual / (wanted @ rows.T).square().mean(dim=0)).sqrt()[:, None]).float()


def _inputs(modules: Mapping[str, nn.Linear | nn.Conv2d], batches: Sequence[Callable[[], object]], seed: int) -> dict[str, Tensor]:
    """Vectors that each layer was given, (N, I) or (N, I*kh*kw): as many of each batch's as NUMBERS has room for."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}

    def look(name: str, module: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        most = max(1, NUMBERS // (module.weight[0].numel() * len(batches)))
        rows = sample_inputs(module, inputs[0], most, seeded_generator(seed, f"{name} inputs {len(found[name])}"))
        found[name].append(rows.to("cpu", torch.float32))

    _watch(modules, batches, look)
    rows = {name: torch.cat(of) if of else torch.zeros(1, modules[name].weight[0].numel()) for name, of in found.items()}
    for name, of in rows.items():
        _check(name, "input", of)
    return rows


def _watch(modules: Mapping[str, nn.Linear | nn.Conv2d], batches: Iterable[Callable[[], object]], look: Look) -> None:
    """Run the batches, without gradients, and show each call of a module to `look`."""
    hooks = [module.register_forward_pre_hook(partial(look, name)) for name, module in modules.items()]
    try:
        for batch in batches:
            with torch.no_grad():
                batch()
    finally:
        for hook in hooks:
            hook.remove()


def sample_inputs(module: nn.Linear | nn.Conv2d, x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most `most` of the vectors that the layer multiplies by its weight, drawn without repetition: x (..., I) or (B, C, H, W) ->
    (N, I) or (N, C*kh*kw). Of a convolution only the patches that were drawn are cut out."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])[_draw(x.shape[:-1].numel(), most, generator)]
    kernel, stride, padding, dilation = module.kernel_size, module.stride, module.padding, module.dilation
    assert not isinstance(padding, str)
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    height = (x.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1  # of the output
    width = (x.shape[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    picture, top, left = torch.unravel_index(_draw(len(x) * height * width, most, generator), (len(x), height, width))
    rows = top[:, None] * stride[0] + torch.arange(kernel[0]) * dilation[0]  # (N, kh)
    columns = left[:, None] * stride[1] + torch.arange(kernel[1]) * dilation[1]  # (N, kw)
    patches = x[picture[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (N, kh, kw, C)
    return patches.permute(0, 3, 1, 2).flatten(1)


def _draw(total: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(total, generator=generator)[:most]


def _absorb(sketch: Tensor, rows: Tensor, components: int) -> Tensor:
    """The sketch diag(s) vh (K, I) of all rows so far with these (N, I) among them: an incremental SVD, truncated."""
    _, s, vh = singular_triplets(torch.cat([sketch, rows]))
    return (s[:, None] * vh)[:components].float()


def _check(name: str, what: str, statistic: Tensor) -> None:
    if not statistic.any():
        raise TrainingError(f"The {what} of {name} is zero in all calibration batches: leave the layer out, or choose another init.")
    if not statistic.isfinite().all():
        raise TrainingError(f"The {what} of {name} is not finite in the calibration batches: compute in fp32, or choose another init.")
