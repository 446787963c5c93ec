"""Starts of the matrices: what each promises of its product, its singular values, and its distribution."""

from typing import Any

import peft
import pytest
import torch

from sdlora.lora.inits import (
    CALIBRATED,
    INITS,
    Start,
    activation,
    down_zero,
    gaussian,
    gradient,
    kaiming,
    milora,
    olora,
    orthogonal,
    orthonormal,
    pissa,
    singular_triplets,
    svd_energy,
)
from sdlora.lora.layers import LoraLayer


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("name", INITS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (8, 5)])
def test_shapes_and_zero_update(name: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=generator())
    start = INITS[name](weight, 6, 2.0, generator())
    assert start.down.shape == (6, shape[1])
    assert start.up.shape == (shape[0], 6)
    if not start.subtract:
        torch.testing.assert_close(start.up @ start.down, torch.zeros(shape), atol=1e-6, rtol=0)
    assert start.up.any() or start.down.any()


def test_kaiming_is_uniform_within_its_bound() -> None:
    down = kaiming(torch.empty(4, 100), 64, 1.0, generator()).down
    assert down.abs().max() <= 0.1
    assert down.var() == pytest.approx(0.2**2 / 12, rel=0.05)


def test_gaussian_has_deviation_one_over_rank() -> None:
    assert gaussian(torch.empty(4, 400), 8, 1.0, generator()).down.std() == pytest.approx(1 / 8, rel=0.05)


def test_orthonormal_rows_are_frozen_with_singular_values_one() -> None:
    start = orthonormal(torch.empty(4, 30), 8, 1.0, generator())
    assert not start.train_down
    torch.testing.assert_close(start.down @ start.down.T, torch.eye(8), atol=1e-5, rtol=0)


def test_pissa_starts_from_the_largest_singular_triplets() -> None:
    weight = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0]))
    start = pissa(weight, 2, 0.5, generator())
    torch.testing.assert_close(0.5 * start.up @ start.down, torch.diag(torch.tensor([5.0, 3.0, 0, 0])), atol=1e-5, rtol=0)


def test_milora_starts_from_the_smallest_singular_triplets() -> None:
    weight = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0]))
    start = milora(weight, 2, 0.5, generator())
    torch.testing.assert_close(0.5 * start.up @ start.down, torch.diag(torch.tensor([0, 0, 2.0, 1.0])), atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", [pissa, milora, svd_energy])
def test_a_negative_scale_gives_the_same_product(init: Any) -> None:
    weight = torch.randn(6, 9, generator=generator())
    one, other = init(weight, 3, 0.5, generator()), init(weight, 3, -0.5, generator())
    torch.testing.assert_close(-0.5 * other.up @ other.down, 0.5 * one.up @ one.down)


def test_olora_is_the_head_of_the_qr_decomposition() -> None:
    weight = torch.randn(6, 9, generator=generator())
    start = olora(weight, 4, 1.0, generator())
    torch.testing.assert_close(start.up.T @ start.up, torch.eye(4), atol=1e-5, rtol=0)
    whole = olora(weight, 6, 1.0, generator())
    torch.testing.assert_close(whole.up @ whole.down, weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("ours", "theirs"), [(pissa, "pissa"), (olora, "olora")])
def test_the_product_is_that_of_peft(ours: Any, theirs: str) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(9, 6, bias=False))
    weight = base[0].weight.detach().clone()
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=theirs))
    layer = adapted.base_model.model[0]
    start = ours(weight, 4, 1.0, generator())
    expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(start.up @ start.down, expected.detach(), atol=1e-5, rtol=0)


def test_orthogonal_reads_what_down_does_not_write() -> None:
    start = orthogonal(torch.empty(12, 10), 5, 1.0, generator())
    assert torch.linalg.matrix_rank(start.down) == 3 and torch.linalg.matrix_rank(start.up) == 2
    alone = orthogonal(torch.empty(12, 10), 1, 1.0, generator())
    assert alone.down.any() and not alone.up.any()


def test_down_zero_draws_up_within_its_bound() -> None:
    start = down_zero(torch.empty(400, 10), 16, 1.0, generator())
    assert not start.down.any()
    assert start.up.abs().max() <= 0.25
    assert start.up.var() == pytest.approx(0.5**2 / 12, rel=0.05)


def test_same_generator_same_start() -> None:
    weight = torch.randn(9, 9)
    for init in INITS.values():
        assert torch.equal(init(weight, 3, 1.0, generator()).down, init(weight, 3, 1.0, generator()).down)


def test_svd_energy_takes_the_triplets_that_hold_half_of_the_squares() -> None:
    # Squares 9, 6.25, 4, 4, 4: the first is 33 % of their sum, the first two 56 % (of the plain sum they would be 48 %).
    weight = torch.diag(torch.tensor([3.0, 2.5, 2.0, 2.0, 2.0]))
    start = svd_energy(weight, 4, 0.5, generator())
    torch.testing.assert_close(0.5 * start.up @ start.down, torch.diag(torch.tensor([3.0, 2.5, 0, 0, 0])), atol=1e-5, rtol=0)
    assert start.subtract
    assert not start.up[:, 2:].any() and start.down[2:].any(dim=1).all()
    assert torch.equal(start.down[2:], kaiming(weight, 4, 0.5, generator()).down[2:])
    # With one rank the threshold is out of reach, and that rank takes the largest.
    torch.testing.assert_close(svd_energy(weight, 1, 1.0, generator()).up.abs(), 3**0.5 * torch.eye(5)[:, :1], atol=1e-5, rtol=0)


def test_svd_energy_is_pissa_where_no_few_triplets_outweigh_the_rest() -> None:
    weight = torch.linalg.qr(torch.randn(12, 12, generator=generator())).Q * torch.linspace(1.1, 1, 12)
    ours, theirs = svd_energy(weight, 4, 2.0, generator()), pissa(weight, 4, 2.0, generator())
    torch.testing.assert_close(ours.up @ ours.down, theirs.up @ theirs.down, atol=1e-5, rtol=0)


def statistic(name: str, shape: tuple[int, int]) -> torch.Tensor:
    """A gradient, or directions of inputs."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    return drawn if name == "gradient" else singular_triplets(drawn)[2].float()


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("scale", [2.0, -2.0])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (8, 8), (4, 3), (1, 7)])
def test_calibrated_starts_have_their_shape_and_every_rank_can_learn(name: str, scale: float, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=generator())
    start = CALIBRATED[name](weight, statistic(name, shape), 6, scale, generator())
    assert start.down.shape == (6, shape[1]) and start.up.shape == (shape[0], 6)
    assert start.down.dtype == start.up.dtype == torch.float32
    assert start.subtract == bool(start.up.any())
    assert (start.down.any(dim=1) | start.up.any(dim=0)).all()
    again = CALIBRATED[name](weight, statistic(name, shape), 6, scale, generator())
    assert torch.equal(start.down, again.down) and torch.equal(start.up, again.up)


@pytest.mark.parametrize("init", [*CALIBRATED, "svd_energy"])
@pytest.mark.parametrize("alpha", [3.0, -3.0])
def test_a_layer_so_started_gives_its_base_output(init: str, alpha: float) -> None:
    base = torch.nn.Linear(40, 24)
    weight, scale = base.weight.detach(), alpha / 6
    if init in CALIBRATED:
        start = CALIBRATED[init](weight, statistic(init, (24, 40)), 6, scale, generator())
    else:
        start = INITS[init](weight, 6, scale, generator())
    x = torch.randn(5, 40, generator=generator())
    layer = LoraLayer(base, start, alpha, 1 / 6, learned_alpha=False)
    torch.testing.assert_close(layer(x), base(x), atol=1e-5, rtol=0)
    assert layer.down.any()


def test_gradient_by_hand() -> None:
    """O = 16, so both factors are 16^(1/4) / sqrt(16) = 1/2; the gradient is diagonal, so its singular vectors are axes."""
    slope = torch.zeros(16, 6)
    slope[range(4), range(4)] = torch.tensor([-4.0, 3.0, 2.0, 1.0])
    start = gradient(torch.empty(16, 6), slope, 2, 1.0, generator())
    torch.testing.assert_close(start.down, torch.eye(6)[:2] / 2)
    torch.testing.assert_close(start.up, torch.eye(16)[:, 2:4] / 2)


def first_step(start: Start, slope: torch.Tensor, scale: float, rate: float) -> torch.Tensor:
    """How one step of gradient descent on down and up moves scale * up @ down, where `slope` is the loss's gradient by that product."""
    down = start.down - rate * scale * start.up.T @ slope
    up = start.up - rate * scale * slope @ start.down.T
    return scale * (up @ down - start.up @ start.down)


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_the_first_step_after_gradient_is_the_best_of_rank_two_r(scale: float) -> None:
    slope = torch.randn(16, 30, generator=generator())
    u, s, vh = torch.linalg.svd(slope, full_matrices=False)
    best = u[:, :8] * s[:8] @ vh[:8]  # Eckart and Young 1936
    start = gradient(torch.empty(16, 30), slope, 4, scale, generator())
    rate = 1e-3
    factor = -rate * scale**2 * 16**0.5 / 16  # 1/4 of the full step at scale 1
    torch.testing.assert_close(first_step(start, slope, scale, rate) / factor, best, atol=0.02, rtol=0)

    def likeness(start: Start) -> float:
        return float(torch.cosine_similarity(first_step(start, slope, scale, rate).flatten(), -slope.flatten(), dim=0))

    assert likeness(start) == pytest.approx(float(s[:8].norm() / s.norm()), abs=1e-3)
    assert likeness(start) > likeness(kaiming(torch.empty(16, 30), 4, scale, torch.Generator().manual_seed(9))) + 0.2


def test_gradient_does_not_see_the_unit_of_the_loss() -> None:
    slope = torch.randn(9, 12, generator=generator())
    one, other = (gradient(torch.empty(9, 12), unit * slope, 3, 1.0, generator()) for unit in (1.0, 1e-6))
    torch.testing.assert_close(one.down, other.down)
    torch.testing.assert_close(one.up, other.up)


def test_what_gradient_subtracts_has_deviation_alpha_over_gamma() -> None:
    drawn = torch.randn(4256, 200, generator=generator())
    slope, x = drawn[:256], drawn[256:]
    start = gradient(torch.empty(256, 200), slope, 16, 1.0, generator())
    output = x @ start.down.T @ start.up.T * 8 / 16**0.5  # alpha 8, scale alpha / sqrt(R)
    assert output.std() == pytest.approx(8 / 16, rel=0.02)


def test_a_gradient_of_low_rank_leaves_the_other_ranks_to_kaiming() -> None:
    """A layer that sees one row a picture, as one of the time embedding does, has a gradient of a rank no larger than the pictures."""
    slope = torch.randn(20, 30, generator=generator())[:, :3] @ torch.eye(3, 30)
    start = gradient(torch.empty(20, 30), slope, 2, 1.0, generator())
    assert start.up[:, 0].any() and not start.up[:, 1].any()
    wide = gradient(torch.empty(20, 30), slope, 5, 1.0, generator())
    assert torch.equal(wide.down[3:], kaiming(torch.empty(20, 30), 5, 1.0, generator()).down[3:])
    assert not wide.up.any() and not wide.subtract


def projector(rows: torch.Tensor) -> torch.Tensor:
    """Onto the space that the rows span: the same for all its bases."""
    basis = torch.linalg.qr(rows.double().T).Q
    return basis @ basis.T


def test_gradient_spans_what_lora_ga_of_peft_spans() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(9, 7, bias=False))
    x, aim = torch.randn(50, 16, generator=generator()).split([9, 7], dim=1)
    (base(x) - aim).square().mean().backward()
    slope = base[0].weight.grad.clone()
    config = peft.LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.tuners.lora.LoraGAConfig(direction="ArB2r"),
    )
    base.zero_grad()
    peft.tuners.lora.preprocess_loraga(base, config, lambda: (base(x) - aim).square().mean().backward())
    layer = peft.get_peft_model(base, config).base_model.model[0]
    start = gradient(torch.empty(7, 9), slope, 2, 1.0, generator())
    torch.testing.assert_close(projector(start.down), projector(layer.lora_A["default"].weight.detach()), atol=1e-4, rtol=0)
    torch.testing.assert_close(projector(start.up.T), projector(layer.lora_B["default"].weight.detach().T), atol=1e-4, rtol=0)


def test_activation_starts_from_the_first_directions_and_fills_up_with_kaiming() -> None:
    directions = torch.eye(5)[[3, 1, 0]]
    start = activation(torch.empty(4, 5), directions, 2, 1.0, generator())
    assert torch.equal(start.down, directions[:2]) and not start.up.any() and not start.subtract
    wide = activation(torch.empty(4, 5), directions, 5, 1.0, generator())
    assert torch.equal(wide.down[:3], directions)
    assert torch.equal(wide.down[3:], kaiming(torch.empty(4, 5), 5, 1.0, generator()).down[3:])


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (7, 7)])
def test_singular_triplets_are_those_of_a_full_svd_with_signs_settled(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=generator())
    u, s, vh = singular_triplets(matrix)
    torch.testing.assert_close(s.float(), torch.linalg.svdvals(matrix))
    torch.testing.assert_close((u * s @ vh).float(), matrix)
    torch.testing.assert_close(u.T @ u, torch.eye(len(s), dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(vh @ vh.T, torch.eye(len(s), dtype=torch.float64), atol=1e-9, rtol=0)
    assert (vh.max(dim=1).values >= -vh.min(dim=1).values).all()
    torch.testing.assert_close(singular_triplets(-matrix)[2], vh)


def test_singular_triplets_leave_out_rounding() -> None:
    product = torch.randn(30, 4, generator=generator()) @ torch.randn(4, 20, generator=generator())
    assert singular_triplets(product)[1].shape == (4,)
    assert singular_triplets(torch.diag(torch.tensor([1.0, 1e-5])))[1].shape == (2,)  # small, but there
    assert singular_triplets(torch.zeros(3, 2))[1].shape == (0,)
