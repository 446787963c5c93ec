"""Rates: by part, by glob, up over down, alpha on its own; schedules by hand; optimizer state round trip."""

import pytest
import torch
from torch import nn

from sdlora.errors import ConfigError
from sdlora.lora.layers import LoraLayer
from sdlora.optim import (
    SCHEDULES,
    Average,
    block_globs,
    layer_rates,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    rate_factor,
    set_rates,
)

NAMES = ["unet.down.attn1.to_q", "unet.up.attn2.to_q", "text_encoder.fc1"]


def layers(init: str = "kaiming", learned: bool = True) -> dict[str, LoraLayer]:
    torch.manual_seed(0)
    return {name: LoraLayer(nn.Linear(4, 5), 2, 2.0, init, learned, torch.Generator().manual_seed(1)) for name in NAMES}


def optimizer_for(of: dict[str, LoraLayer], up_ratio: float = 1.0) -> torch.optim.AdamW:
    rates = layer_rates(list(of), {"unet": 1e-2, "text_encoder": 1e-3}, {})
    return make_optimizer(of, rates, alpha_rate=0.5, up_ratio=up_ratio, betas=(0.9, 0.99), weight_decay=0.1)


def test_last_matching_glob_wins() -> None:
    rates = layer_rates(NAMES, {"unet": 1.0, "text_encoder": 2.0}, {"unet.*": 3.0, "*.attn2.*": 4.0})
    assert rates == {NAMES[0]: 3.0, NAMES[1]: 4.0, NAMES[2]: 2.0}
    with pytest.raises(ConfigError, match="matches no adapted layer"):
        layer_rates(NAMES, {"unet": 1.0, "text_encoder": 2.0}, {"unet.mid.*": 1.0})


def rate_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[float, float]:
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group["lr"], group["weight_decay"]


def test_rates_of_each_matrix() -> None:
    of = layers()
    optimizer = optimizer_for(of, up_ratio=16)
    assert rate_of(optimizer, of[NAMES[0]].down) == (1e-2, 0.1)
    assert rate_of(optimizer, of[NAMES[0]].up) == (0.16, 0.1)
    assert rate_of(optimizer, of[NAMES[2]].down) == (1e-3, 0.1)
    assert rate_of(optimizer, of[NAMES[2]].alpha) == (0.5, 0.0)
    set_rates(optimizer, 0.5)
    assert rate_of(optimizer, of[NAMES[0]].up)[0] == pytest.approx(0.08)


def test_what_is_frozen_is_not_optimized() -> None:
    of = layers("orthonormal", learned=False)
    assert {id(p) for g in optimizer_for(of).param_groups for p in g["params"]} == {id(layer.up) for layer in of.values()}


def test_schedules_by_hand() -> None:
    assert [rate_factor("constant", s, 10, 4) for s in (0, 3, 4, 9)] == [0.25, 1.0, 1.0, 1.0]
    assert rate_factor("linear", 7, 10, 4) == pytest.approx(0.5)
    assert rate_factor("cosine", 7, 10, 4) == pytest.approx(0.5)
    assert rate_factor("polynomial", 7, 10, 4, power=2) == pytest.approx(0.25)
    assert rate_factor("cosine_restarts", 7, 12, 0, cycles=2) == pytest.approx(rate_factor("cosine", 1, 6, 0))
    for schedule in SCHEDULES.values():
        assert schedule(0.0, 3, 2.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "globs"),
    [
        ("mid", ["unet.mid_block.*"]),
        ("up.3", ["unet.up_blocks.3.*"]),
        ("te.0-1", ["text_encoder.text_model.encoder.layers.0.*", "text_encoder.text_model.encoder.layers.1.*"]),
        ("unet.down_blocks.0.*", ["unet.down_blocks.0.*"]),
        ("down", ["down"]),
    ],
)
def test_block_shorthand(text: str, globs: list[str]) -> None:
    assert block_globs(text) == globs


def test_layer_one_of_te_is_not_layer_ten() -> None:
    names = [f"text_encoder.text_model.encoder.layers.{n}.mlp.fc1" for n in (1, 10)]
    assert layer_rates(names, {"text_encoder": 1.0}, {"te.1": 2.0}) == {names[0]: 2.0, names[1]: 1.0}


def test_a_resting_part_learns_nothing() -> None:
    of = layers()
    optimizer = optimizer_for(of)
    set_rates(optimizer, 0.5, resting="text_encoder")
    assert rate_of(optimizer, of[NAMES[2]].up)[0] == rate_of(optimizer, of[NAMES[2]].alpha)[0] == 0
    assert rate_of(optimizer, of[NAMES[0]].alpha)[0] == pytest.approx(0.25)


def test_state_round_trip_continues_in_the_same_bits() -> None:
    def step(of: dict[str, LoraLayer], optimizer: torch.optim.AdamW) -> None:
        sum(layer(torch.ones(1, 4)).square().sum() for layer in of.values()).backward()  # type: ignore
        optimizer.step()
        optimizer.zero_grad()

    one, other = layers(), layers()
    first, second = optimizer_for(one), optimizer_for(other)
    step(one, first)
    for name in NAMES:
        other[name].load_state(one[name].state())
    load_optimizer_tensors(second, {key: value.clone() for key, value in optimizer_tensors(first).items()})
    step(one, first)
    step(other, second)
    for name in NAMES:
        assert torch.equal(one[name].up, other[name].up) and torch.equal(one[name].alpha, other[name].alpha)


def test_average_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([0.0]))
    average = Average([parameter], 0.9)
    parameter.data.fill_(11.0)
    average.update(1)  # decay min(0.9, 2 / 11)
    assert average.values[0].tolist() == pytest.approx([9.0])
    with average.in_place():
        assert parameter.tolist() == pytest.approx([9.0])
    assert parameter.tolist() == [11.0]
    without = Average([parameter], 0.0)
    parameter.data.fill_(5.0)
    without.update(1)
    assert torch.equal(without.values[0], parameter.detach())
