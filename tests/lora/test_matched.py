"""The matched rate: by hand, against the materialised change, and against full fine-tuning of real layers."""

from statistics import mean, median

import pytest
import torch
from studies.matched_rate import Variant, full_run, lora_run

from sdlora.lora.matched import expected_rate, matched_rate, next_direction

BETAS, EPS = (0.9, 0.999), 1e-8


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(convolution: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """down, up and their directions: I = 12 or 6 * 3 * 3, R = 4, O = 20."""
    inputs, kernel = ((6, 3, 3), (1, 1)) if convolution else ((12,), ())
    down, up = noise(0, 4, *inputs), noise(1, 20, 4, *kernel)
    return down, up, noise(2, *down.shape).tanh(), noise(3, *up.shape).tanh()


# ---------------------------------------------------------------- Adam's direction


@pytest.mark.parametrize("size", [1.0, 1e-8], ids=["usual", "near eps"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
def test_next_direction_is_what_adamw_then_does(betas: tuple[float, float], size: float) -> None:
    parameter = torch.nn.Parameter(noise(0, 3, 5, 1, 1).double())  # fp64: before - after then keeps its digits
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=betas, eps=EPS, weight_decay=0, fused=True)
    for step in range(6):
        parameter.grad = size * (noise(step, 3, 5, 1, 1).double() + 0.5)
        found = next_direction(parameter, optimizer.state[parameter], betas, EPS)
        before = parameter.detach().clone()
        optimizer.step()
        torch.testing.assert_close(found, (before - parameter.detach()) / 1e-2, rtol=1e-5, atol=1e-7)


def test_next_direction_changes_nothing() -> None:
    parameter = torch.nn.Parameter(noise(0, 4))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    for seed in (1, 2):
        parameter.grad = noise(seed, 4)
        state, gradient, value = (
            {k: v.clone() for k, v in optimizer.state[parameter].items()},
            parameter.grad.clone(),
            parameter.detach().clone(),
        )
        next_direction(parameter, optimizer.state[parameter], BETAS, EPS)
        assert state.keys() == optimizer.state[parameter].keys()
        assert all(torch.equal(state[key], optimizer.state[parameter][key]) for key in state)
        assert torch.equal(gradient, parameter.grad) and torch.equal(value, parameter.detach())
        optimizer.step()


# ---------------------------------------------------------------- by hand


def test_rank_one_by_hand() -> None:
    """2 [1, 1]^T [1, 2] + [2, 0]^T [1, -1] = [[4, 2], [2, 4]], of norm sqrt(40), mostly u_up's, of rms 1: 0.01 * 2 / (0.5 sqrt(40))."""
    down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0], [0.0]])
    rate = matched_rate(0.01, 0.5, down, up, torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0], [1.0]]), 2.0)
    assert float(rate) == pytest.approx(0.04 / 40**0.5)


def test_rank_two_with_up_zero_by_hand() -> None:
    """[[1, 1], [1, -1]] diag(3, 4) has the norm sqrt(50), and W four entries: 0.01 * 2 / sqrt(50) at scale 1."""
    down, direction = torch.diag(torch.tensor([3.0, 4.0])), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert float(matched_rate(0.01, 1.0, down, torch.zeros(2, 2), torch.zeros(2, 2), direction, 1.0)) == pytest.approx(0.02 / 50**0.5)


def test_rho_is_that_of_the_direction_which_moves_more() -> None:
    """u_down is 0.5 everywhere and does all of the moving: [1, 0]^T [0.5, 0.5], of norm sqrt(0.5), against 0.01 * 0.5 * 2."""
    down, up = torch.zeros(1, 2), torch.tensor([[1.0], [0.0]])
    rate = matched_rate(0.01, 1.0, down, up, torch.full((1, 2), 0.5), torch.ones(2, 1), 1.0)
    assert float(rate) == pytest.approx(0.01 / 0.5**0.5)


def test_expected_rate_by_hand() -> None:
    """Entries of kaiming's rms 1 / sqrt(3 I), here 0.1, give rate * sqrt(3 I / R) / |s|; equal matrices share the movement."""
    down, up = torch.full((4, 33, 1, 1), 0.1), torch.zeros(20, 4, 1, 1)
    assert float(expected_rate(1e-4, -2.0, down, up, 1.0, True)) == pytest.approx(1e-4 * (33 * 100 / (33 * 4)) ** 0.5 / 2)
    both = expected_rate(1e-4, 2.0, torch.ones(1, 5), torch.ones(5, 1), 3.0, True)
    assert float(both) == pytest.approx(1e-4 * 5 / (2 * (9 * 25 + 25) ** 0.5))
    frozen = expected_rate(1e-4, 2.0, torch.ones(1, 5), torch.ones(5, 1), 3.0, False)
    assert float(frozen) == pytest.approx(1e-4 * 5 / (2 * 15))


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("trains_down", [True, False])
@pytest.mark.parametrize("up_ratio", [0.5, 1.0, 16.0])
@pytest.mark.parametrize("scale", [0.3, -8.0])
def test_the_materialised_change_is_as_large_as_adams(convolution: bool, trains_down: bool, up_ratio: float, scale: float) -> None:
    down, up, down_direction, up_direction = case(convolution)
    rate = matched_rate(1e-4, scale, down, up, down_direction if trains_down else None, up_direction, up_ratio)
    by_up = up_ratio * up_direction.flatten(1) @ down.flatten(1)
    by_down = up.flatten(1) @ down_direction.flatten(1) * trains_down
    witness = up_direction if by_up.norm() > by_down.norm() else down_direction
    rho = witness.square().mean().sqrt()
    torch.testing.assert_close((rate * scale * (by_up + by_down)).norm(), 1e-4 * rho * by_up.numel() ** 0.5)


@pytest.mark.parametrize("up_zero", [True, False])
def test_scales(up_zero: bool) -> None:
    down, up, down_direction, up_direction = case()
    if up_zero:
        up = torch.zeros_like(up)

    def found(rate: float = 1e-4, scale: float = 1.0, size: float = 1.0, up_ratio: float = 1.0) -> float:
        return float(matched_rate(rate, scale, down, up, size * down_direction, size * up_direction, up_ratio))

    assert found(scale=2) == pytest.approx(found() / 2)
    assert found(scale=-1) == pytest.approx(found())
    assert found(rate=3e-4) == pytest.approx(3 * found())
    assert found(size=0.2) == pytest.approx(found())  # noisier gradients shorten both methods' steps alike
    assert (found(up_ratio=4) == pytest.approx(found() / 4)) == up_zero  # only where up alone counts is up's rate the same


def test_frozen_orthonormal_down_has_one_rate_for_ever() -> None:
    """||u_up Down|| = ||u_up|| then, so c = eta sqrt(I / R) / |s| whatever the directions and Up are."""
    down = torch.linalg.qr(noise(0, 12, 4)).Q.T
    for seed in range(3):
        up, up_direction = noise(seed, 20, 4), noise(seed + 9, 20, 4).tanh()
        assert float(matched_rate(1e-4, 2.0, down, up, None, up_direction, 1.0)) == pytest.approx(1e-4 * 3**0.5 / 2)
        assert float(expected_rate(1e-4, 2.0, down, up, 1.0, False)) == pytest.approx(1e-4 * 3**0.5 / 2)


def test_expected_rate_fits_independent_directions() -> None:
    down = noise(0, 4, 200) / 10
    for up in (noise(1, 300, 4) / 20, torch.zeros(300, 4)):
        found = matched_rate(1e-5, 0.5, down, up, noise(2, 4, 200).sign(), noise(3, 300, 4).sign(), 2.0)
        assert float(expected_rate(1e-5, 0.5, down, up, 2.0, True)) == pytest.approx(float(found), rel=0.05)


def test_degenerate_layers_get_a_finite_rate() -> None:
    down, up, down_direction, up_direction = case()
    none_down, none_up = torch.zeros_like(down), torch.zeros_like(up)
    limit = float(torch.maximum(down.square().mean(), up.square().mean()).sqrt())
    assert float(matched_rate(1e-4, 1.0, down, up, none_down, none_up, 1.0)) == 0  # no gradient
    assert float(matched_rate(1e-4, 1.0, none_down, none_up, down_direction, up_direction, 1.0)) == 0  # no rate moves it
    assert float(expected_rate(1e-4, 1.0, none_down, none_up, 1.0, True)) == 0
    for scale in (0.0, 1e-12):  # a learned alpha that passes zero
        assert float(matched_rate(1e-4, scale, down, up, down_direction, up_direction, 1.0)) == pytest.approx(limit)
        assert float(matched_rate(1e-4, scale, down, up, down_direction, up_direction, 16.0)) == pytest.approx(limit / 16)
        assert float(expected_rate(1e-4, scale, down, up, 0.5, True)) == pytest.approx(limit)
    cancelling = matched_rate(1e-4, 1.0, down[:1], up[:, :1], -down[:1], up[:, :1], 1.0)  # u_up Down = -Up u_down
    assert 0 < float(cancelling) <= limit * 2


def test_at_the_bound_the_second_order_rivals_the_first() -> None:
    """A kaiming start meets it at eta = |s| sqrt(R) / (3 I): there Up's second step moves W as far by u_up u_down as by u_up Down."""
    down = (torch.rand(4, 300, generator=torch.Generator().manual_seed(0)) * 2 - 1) / 300**0.5
    up_direction, down_direction = noise(1, 200, 4).sign(), noise(2, 4, 300).sign()
    at_the_bound = 2 / 900
    below, at = (
        float(matched_rate(rate, 1.0, down, torch.zeros(200, 4), torch.zeros(4, 300), up_direction, 1.0))
        for rate in (0.5e-3, 2 * at_the_bound)
    )
    assert at == pytest.approx(float(down.square().mean().sqrt()))
    assert below == pytest.approx(0.5e-3 / at_the_bound * at, rel=0.05)
    assert float(at * (up_direction @ down_direction).norm()) == pytest.approx(float((up_direction @ down).norm()), rel=0.05)


# ---------------------------------------------------------------- against full fine-tuning

LAYERS = [
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    "unet.up_blocks.2.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "unet.up_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "unet.up_blocks.3.attentions.0.transformer_blocks.0.ff.net.2",
    "unet.up_blocks.2.attentions.0.proj_in",
    "unet.down_blocks.1.attentions.0.proj_out",
    "unet.down_blocks.0.resnets.0.conv2",
    "unet.up_blocks.3.resnets.0.conv1",
    "unet.up_blocks.3.resnets.0.conv_shortcut",
    "text_encoder.text_model.encoder.layers.0.self_attn.v_proj",
    "text_encoder.text_model.encoder.layers.1.mlp.fc1",
]
STEPS = 5


@pytest.fixture(scope="module")
def full() -> dict[str, list[float]]:
    return full_run(STEPS, 1e-5, LAYERS)


@pytest.mark.parametrize(
    "variant",
    [Variant(16, 1.0), Variant(16, 8.0, up_ratio=16.0), Variant(4, 8.0), Variant(16, 1.0, "pissa"), Variant(16, 1.0, "down_zero")],
    ids=str,
)
def test_real_layers_move_as_far_as_in_full_fine_tuning(variant: Variant, full: dict[str, list[float]]) -> None:
    ratios = {
        name: [a / b for a, b in zip(row.moved, full[name], strict=True)] for name, row in lora_run(STEPS, 1e-5, variant, LAYERS).items()
    }
    for step in range(STEPS):
        assert median(r[step] for r in ratios.values()) == pytest.approx(1, abs=0.05)
    for name, ratio in ratios.items():
        assert ratio[0] == pytest.approx(1, abs=0.02), name  # both directions are the gradients' signs
        assert mean(ratio) == pytest.approx(1, abs=0.15 if variant.rank == 4 else 0.1), name


def test_no_single_rate_would_do() -> None:
    rates = [row.rates[0] for row in lora_run(1, 1e-5, Variant(16, 1.0), LAYERS).values()]
    assert max(rates) > 5 * min(rates)
