"""Adapted layers of each kind: the formula by hand, no change at the start, exact export, gradients where they belong."""

import copy
import math
from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn

from sdlora.lora.inits import INITS, Start
from sdlora.lora.layers import Adapter, DoraLayer, Dropouts, FullLayer, LoraLayer, MoraLayer, NormAdapter, disabled, mora_delta
from sdlora.lora.scaling import rank_stabilised, standard


def bases() -> list[tuple[nn.Linear | nn.Conv2d, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        (nn.Linear(12, 20), torch.randn(2, 7, 12)),
        (nn.Conv2d(6, 10, 1), torch.randn(2, 6, 5, 5)),
        (nn.Conv2d(6, 10, 3, stride=2, padding=1), torch.randn(2, 6, 8, 8)),
    ]


def layer_for(base: nn.Linear | nn.Conv2d, init: str, alpha: float = 3.0, rank: int = 4, scale_of_one: float | None = None) -> LoraLayer:
    scale_of_one = 1 / rank if scale_of_one is None else scale_of_one
    weight, generator = base.weight.detach().flatten(1), torch.Generator().manual_seed(1)
    return LoraLayer(base, INITS[init](weight, rank, alpha * scale_of_one, generator), alpha, scale_of_one, learned_alpha=True)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", range(3))
def test_output_is_unchanged_at_the_start(init: str, kind: int) -> None:
    base, x = bases()[kind]
    torch.testing.assert_close(layer_for(base, init)(x), base(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", range(3))
def test_factors_give_the_trained_output(init: str, kind: int) -> None:
    base, x = bases()[kind]
    layer = layer_for(base, init)
    with torch.no_grad():
        for matrix in (layer.down, layer.up):
            matrix += torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5)) * 0.3
        layer.alpha.fill_(-1.7)  # a learned alpha may even turn negative
    down, up, alpha = layer.factors()
    merged = type(base)(*((12, 20) if kind == 0 else (6, 10, base.kernel_size[0], base.stride[0], base.padding[0])))  # type: ignore
    with torch.no_grad():
        merged.weight.copy_(base.weight + (alpha / down.shape[0] * up.flatten(1) @ down.flatten(1)).view_as(base.weight))
        merged.bias.copy_(base.bias)
        torch.testing.assert_close(merged(x), layer(x), atol=2e-5, rtol=1e-5)
        assert (merged(x) - base(x)).abs().max() > 0.05


def test_hand_computed_number() -> None:
    base = nn.Linear(2, 1, bias=False)
    layer = layer_for(base, "kaiming", alpha=0.5, rank=1)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.down.copy_(torch.tensor([[3.0, -1.0]]))
        layer.up.fill_(2.0)
    x = torch.tensor([[1.0, 1.0]])
    assert layer(x).item() == pytest.approx(3 + 0.5 * 2 * 2)
    layer(x).sum().backward()
    assert float(layer.alpha.grad) == pytest.approx(4.0)  # d/d alpha of alpha / 1 * up * down(x)
    assert base.weight.grad is None


def test_disabled_gives_the_base_exactly_and_restores() -> None:
    base, x = bases()[0]
    layer = layer_for(base, "pissa")
    with torch.no_grad():
        layer.up += 1
    with disabled([layer]):
        assert torch.equal(layer(x), base(x))
    assert not torch.allclose(layer(x), base(x))


@pytest.mark.parametrize("init", INITS)
def test_only_what_the_init_trains_gets_a_gradient(init: str) -> None:
    base, x = bases()[0]
    layer = layer_for(base, init)
    layer(x).square().sum().backward()
    assert (layer.down.grad is None) == (init == "orthonormal")
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in (layer.down, layer.up))


def test_state_round_trip() -> None:
    base, x = bases()[0]
    layer, other = layer_for(base, "pissa"), layer_for(base, "pissa", alpha=9.0)
    with torch.no_grad():
        layer.up += 0.1
    other.load_state(layer.state())
    assert torch.equal(layer(x), other(x))
    with pytest.raises(KeyError):
        layer_for(base, "kaiming").load_state(layer.state())


@pytest.mark.parametrize("init", INITS)
def test_rank_stabilised_factors_are_exact(init: str) -> None:
    base, x = bases()[0]
    layer = layer_for(base, init, alpha=6.0, rank=9, scale_of_one=rank_stabilised(9))
    assert float(layer.scale.detach()) == pytest.approx(6 / 3)
    with torch.no_grad():
        layer.up += 0.1
        down, up, alpha = layer.factors()
        torch.testing.assert_close(base(x) + x @ (alpha / down.shape[0] * up @ down).T, layer(x), atol=2e-5, rtol=1e-5)


KINDS: dict[str, Callable[[nn.Linear | nn.Conv2d], Adapter]] = {
    "lora": lambda base: layer_for(base, "kaiming"),
    "pissa": lambda base: layer_for(base, "pissa"),
    "dora": lambda base: dora_for(base, "kaiming"),
    "dora pissa": lambda base: dora_for(base, "pissa"),
    "mora": lambda base: MoraLayer(base, 3, train_bias=True),
    "full": lambda base: FullLayer(base, train_bias=True),
}


def dora_for(base: nn.Linear | nn.Conv2d, init: str) -> DoraLayer:
    start = INITS[init](base.weight.detach().flatten(1), 4, 0.75, torch.Generator().manual_seed(1))
    return DoraLayer(base, start, 3.0, 0.25, learned_alpha=True, train_bias=True)


def moved(layer: Adapter, seed: int = 5) -> Adapter:
    """With everything that is trained a good way from where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.trained().values():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return layer


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", range(3))
def test_every_kind_starts_as_the_base_and_its_change_is_what_it_does(name: str, kind: int) -> None:
    base, x = bases()[kind]
    layer = KINDS[name](base)
    torch.testing.assert_close(layer(x), base(x), atol=1e-5, rtol=0)
    moved(layer)
    change = layer.change()
    merged = copy.deepcopy(base)
    with torch.no_grad():
        merged.weight += change.delta(base.weight)
        if change.bias is not None:
            assert merged.bias is not None
            merged.bias += change.bias
        torch.testing.assert_close(merged(x), layer(x), atol=5e-5, rtol=1e-4)
        assert (merged(x) - base(x)).abs().max() > 0.05
    with disabled([layer]):
        assert torch.equal(layer(x), base(x))
    other = KINDS[name](base)
    other.load_state(layer.state())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("name", KINDS)
def test_everything_that_is_trained_gets_a_gradient(name: str) -> None:
    base, x = bases()[2]
    layer = moved(KINDS[name](base))
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.trained().values())
    assert base.weight.grad is None and base.bias is not None and base.bias.grad is None


def test_dora_by_hand() -> None:
    base = nn.Linear(2, 2, bias=False)
    layer = dora_for(base, "kaiming")
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
        layer.down.zero_(), layer.up.zero_()
        layer.magnitude.copy_(torch.tensor([10.0, 1.0]))  # columns (3, 4) and (0, 2), lengths 5 and 2, become 10 and 1 long
    x = torch.tensor([[1.0, 1.0]])
    torch.testing.assert_close(layer(x), torch.tensor([[6.0, 8.0 + 1.0]]))
    layer(x).sum().backward()
    # d/d magnitude: the sum of each unit column
    torch.testing.assert_close(layer.magnitude.grad, torch.tensor([7 / 5, 1.0]))


def test_dora_holds_the_norm_constant_in_the_backward_pass() -> None:
    base, x = bases()[0]
    layer = moved(dora_for(base, "kaiming"))
    assert isinstance(layer, DoraLayer)
    layer(x).square().sum().backward()
    weight = base.weight + layer.scale.detach() * layer.up @ layer.down  # explicit formula, norm detached
    norms = weight.detach().square().sum(dim=0, keepdim=True).sqrt()
    assert layer.bias_delta is not None and base.bias is not None
    explicit = nn.functional.linear(x, layer.magnitude / norms * weight, base.bias + layer.bias_delta)
    wanted = torch.autograd.grad(explicit.square().sum(), [layer.down, layer.up, layer.magnitude])
    for parameter, gradient in zip([layer.down, layer.up, layer.magnitude], wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-3, rtol=1e-3)


def test_mora_by_hand() -> None:
    square = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    # 4 x 4 in groups of 2: the second group's inputs are turned by one radian
    cos, sin = math.cos(1), math.sin(1)
    turned = [[cos + 2 * sin, 2 * cos - sin], [3 * cos + 4 * sin, 4 * cos - 3 * sin]]
    wanted = torch.zeros(4, 4)
    wanted[:2, :2], wanted[2:, 2:] = square, torch.tensor(turned)
    torch.testing.assert_close(mora_delta(square, 4, 4), wanted)
    # a vector through the turned block is the square applied to the turned vector
    x = torch.tensor([0.5, -1.0])
    torch.testing.assert_close(wanted[2:, 2:] @ x, square @ torch.tensor([cos * 0.5 + sin * 1.0, sin * 0.5 - cos * 1.0]))


@pytest.mark.parametrize(("outputs", "inputs"), [(10, 4), (4, 10), (7, 5), (3, 3)])
def test_mora_reaches_every_input_and_output(outputs: int, inputs: int) -> None:
    delta = mora_delta(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), outputs, inputs)
    assert delta.shape == (outputs, inputs)
    assert delta.abs().sum(dim=0).min() > 0 and delta.abs().sum(dim=1).min() > 0


def test_mora_has_a_loras_numbers_and_a_higher_rank() -> None:
    base = nn.Linear(64, 64)
    mora, lora = MoraLayer(base, 4), layer_for(base, "kaiming")
    assert mora.trained_numbers <= lora.trained_numbers and mora.square.shape == (22, 22)  # isqrt(128 * 4)
    moved(mora)
    assert torch.linalg.matrix_rank(mora.change().delta(base.weight)) > 4


def test_full_rank_takes_full_fine_tunings_step() -> None:
    """With down frozen and orthonormal at full rank, one step of gradient descent on up is one on the weight, times the scale squared."""
    base, x = bases()[0]
    layer = layer_for(base, "orthonormal", alpha=24.0, rank=12)  # scale 2
    layer(x).square().sum().backward()
    rate = 1e-4
    with torch.no_grad():
        layer.up -= rate * layer.up.grad
    weight = base.weight.detach().clone().requires_grad_()
    nn.functional.linear(x, weight, base.bias).square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(layer.change().delta(base.weight), -4 * rate * weight.grad, atol=1e-6, rtol=1e-3)
    full = FullLayer(base)
    full(x).square().sum().backward()
    torch.testing.assert_close(full.delta.grad, weight.grad)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(3, 6)])
def test_norms_by_their_change(norm: nn.LayerNorm | nn.GroupNorm) -> None:
    nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(2, 6) if isinstance(norm, nn.LayerNorm) else torch.randn(2, 6, 4, 4)
    layer = NormAdapter(norm)
    assert torch.equal(layer(x), norm(x))
    change = moved(layer).change()
    assert change.weight is not None and change.bias is not None and change.weight.dim() == 1
    merged = copy.deepcopy(norm)
    with torch.no_grad():
        merged.weight += change.weight
        merged.bias += change.bias
        torch.testing.assert_close(merged(x), layer(x))
    with disabled([layer]):
        assert torch.equal(layer(x), norm(x))


@pytest.mark.parametrize("kind", range(3))
def test_folding_changes_nothing_and_the_sum_is_exact(kind: int) -> None:
    base, x = bases()[kind]

    def start(seed: int) -> Start:
        return INITS["kaiming"](base.weight.detach().flatten(1), 2, 1.5, torch.Generator().manual_seed(seed))

    layer = LoraLayer(base, start(1), 3.0, 0.5, learned_alpha=True, folds=True)
    deltas = []
    for round in range(3):
        moved(layer, seed=round)
        before = layer(x).detach()
        deltas.append(layer.factors().delta())
        if round < 2:
            layer.fold(start(2 + round))
            torch.testing.assert_close(layer(x), before, atol=2e-5, rtol=1e-4)
    change = layer.change()
    torch.testing.assert_close(change.delta(base.weight), sum(deltas[1:], deltas[0]), atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(change.delta(base.weight).flatten(1)) > 2
    with pytest.raises(ValueError, match="without `folds`"):
        layer_for(base, "kaiming").fold(start(9))


def test_max_norm_scales_what_exceeds_it_and_leaves_the_rest() -> None:
    base, _ = bases()[2]
    for init in ("kaiming", "orthonormal"):
        layer = moved(layer_for(base, init))
        assert isinstance(layer, LoraLayer)
        delta = layer.factors().delta()
        layer.limit_norm(0.5)
        assert float(layer.factors().delta().norm()) == pytest.approx(0.5, rel=1e-4)
        torch.testing.assert_close(layer.factors().delta(), delta * (0.5 / delta.norm()), atol=1e-5, rtol=1e-4)
        kept = layer.factors().delta()
        layer.limit_norm(1.0)
        assert torch.equal(layer.factors().delta(), kept)
    frozen = layer_for(base, "orthonormal")
    down = frozen.down.detach().clone()
    moved(frozen)
    frozen.limit_norm(0.01)
    assert torch.equal(frozen.down, down)


def dropped(dropouts: Dropouts, seed: int, base: nn.Linear | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The update alone."""
    start = INITS["kaiming"](base.weight.detach().flatten(1), 4, 0.75, torch.Generator().manual_seed(1))
    layer = moved(LoraLayer(base, start, 3.0, 0.25, learned_alpha=True, dropouts=dropouts))
    layer.drop_seed = seed
    return (layer(x) - base(x)).detach()


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("dropouts", [Dropouts(input=0.4), Dropouts(rank=0.4), Dropouts(module=0.4), Dropouts(0.2, 0.2, 0.2)])
def test_dropout_repeats_by_its_seed_and_keeps_the_mean(kind: int, dropouts: Dropouts) -> None:
    base, x = bases()[kind]
    whole = dropped(Dropouts(), 0, base, x)
    drawn = torch.stack([dropped(dropouts, seed, base, x) for seed in range(400)])
    assert torch.equal(drawn[7], dropped(dropouts, 7, base, x))
    assert not torch.allclose(drawn.std(dim=0).max(), torch.tensor(0.0))
    kept = 1 - dropouts.module  # a module that is left out is not made up for
    error = (drawn.mean(dim=0) - kept * whole).norm() / whole.norm()
    assert error < 0.12


def test_rank_dropout_leaves_whole_ranks_out_and_module_dropout_all() -> None:
    base, x = bases()[0]
    whole = dropped(Dropouts(), 0, base, x)
    seen = {round(float(dropped(Dropouts(module=0.5), seed, base, x).norm() / whole.norm()), 3) for seed in range(40)}
    assert seen == {0.0, 1.0}
    # each of a sample's four ranks is left out or doubled: of all 16 sums of rank-one updates, it is one
    start = INITS["kaiming"](base.weight.detach().flatten(1), 4, 0.75, torch.Generator().manual_seed(1))
    layer = moved(LoraLayer(base, start, 3.0, 0.25, learned_alpha=True))
    assert isinstance(layer, LoraLayer)
    parts = torch.stack([layer.scale * (x @ layer.down[r])[..., None] * layer.up[:, r] for r in range(4)]).detach()  # (R, B, T, O)
    halves = dropped(Dropouts(rank=0.5), 3, base, x)
    for sample in range(2):
        sums = [sum(2.0 * (mask >> r & 1) * parts[r, sample] for r in range(4)) for mask in range(16)]
        assert sum(bool(torch.allclose(torch.as_tensor(total), halves[sample], atol=1e-4)) for total in sums) == 1


@pytest.mark.parametrize("init", [init for init in INITS if init != "orthogonal"])
def test_rank_dropout_leaves_the_start_as_the_base(init: str) -> None:
    base, x = bases()[0]
    start = INITS[init](base.weight.detach().flatten(1), 4, 2.0, torch.Generator().manual_seed(1))
    layer = LoraLayer(base, start, 8.0, 0.25, learned_alpha=True, dropouts=Dropouts(rank=0.5))
    layer.drop_seed = 3
    torch.testing.assert_close(layer(x), base(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "milora", "olora", "svd_energy"])
def test_in_bf16_what_is_learned_is_not_lost_in_what_is_subtracted(init: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(128, 128, bias=False).to(torch.bfloat16)
    start = INITS[init](base.weight.detach().float(), 16, 8.0, torch.Generator().manual_seed(1))
    layer = LoraLayer(base, start, 32.0, 0.25, learned_alpha=True)
    x = torch.randn(64, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        for matrix in (layer.down, layer.up):
            matrix += 1e-4 * torch.randn(matrix.shape).sign()  # a usual step
        wanted = x.float() @ layer.factors().delta().T
        assert (layer.update(x).float() - wanted).norm() < 0.02 * wanted.norm()


def test_in_bf16_doras_magnitude_is_not_rounded_away() -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    start = INITS["kaiming"](base.weight.detach().float(), 4, 1.0, torch.Generator().manual_seed(1))
    layer = DoraLayer(base, start, 4.0, 0.25, learned_alpha=True)
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        before = layer(x).float()
        layer.magnitude *= 1.003  # less than a step of bf16 behind 1
        moved_by = float(((layer(x).float() - before) * before).sum() / before.square().sum())
    assert moved_by == pytest.approx(0.003, rel=0.3)


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("stabilised", [False, True])
def test_the_output_is_that_of_peft(kind: int, stabilised: bool) -> None:
    base, x = bases()[kind]
    scale_of_one = (rank_stabilised if stabilised else standard)(4)
    layer = moved(layer_for(base, "kaiming", alpha=8.0, scale_of_one=scale_of_one))
    assert isinstance(layer, LoraLayer)
    options = peft.LoraConfig(r=4, lora_alpha=layer.alpha.item(), target_modules=["0"], use_rslora=stabilised)
    adapted = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), options)
    theirs = adapted.base_model.model[0]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.down)
        theirs.lora_B["default"].weight.copy_(layer.up)
    torch.testing.assert_close(layer(x), adapted(x), atol=1e-5, rtol=1e-5)
