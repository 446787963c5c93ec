"""Every optimizer goes on in the same bits, rests, forgets, and takes its first step by hand; rates, schedules, the average."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor, nn

from sdlora.errors import ConfigError
from sdlora.optim import (
    OPTIMIZERS,
    SCHEDULES,
    Average,
    Optimizer,
    as_matrices,
    check,
    class_arguments,
    make_optimizer,
    rate_factor,
)

NAMES = ["unet.down.attn1.to_q", "unet.up.attn2.to_q", "text_encoder.fc1"]


class Layer:
    """Stands for an adapter: seeded parameters of the given shapes."""

    def __init__(self, seed: int, **shapes: tuple[int, ...]):
        generator = torch.Generator().manual_seed(seed)
        self.parameters = {role: nn.Parameter(torch.randn(shape, generator=generator)) for role, shape in shapes.items()}

    def trained(self) -> dict[str, nn.Parameter]:
        return self.parameters


def mixture() -> dict[str, Layer]:
    """Linears, convolutions, scalars, vectors and whole weights, in both parts."""
    return {
        "unet.linear": Layer(0, down=(2, 4), up=(5, 2), alpha=()),
        "unet.conv": Layer(1, down=(2, 3, 3, 3), up=(4, 2, 1, 1), alpha=()),
        "unet.rank_one": Layer(2, down=(1, 6), up=(5, 1), magnitude=(6,)),
        "unet.whole": Layer(3, delta=(4, 3, 3, 3), square=(3, 3)),
        "unet.norm": Layer(4, weight_delta=(4,), bias_delta=(4,)),
        "text_encoder.linear": Layer(5, down=(2, 4), up=(5, 2), alpha=()),
        "text_encoder.other": Layer(6, down=(2, 4), up=(5, 2), alpha=()),
    }


# Arguments that bring out each optimizer's state; a row without them runs as it is.
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "adamw_8bit": [{"min_8bit_size": 8}],  # or tensors as small as these keep 32 bits
    "prodigy": [{}, {"d0": 1e-3, "growth_rate": 1.5}],
    "came": [{}, {"ams_bound": True}],
    "adafactor": [{}, {"betas": [0.9, 0.99], "momentum_dtype": "bfloat16"}],
    "schedule_free": [{}, {"r": 1.0, "foreach": False}],
}
CASES = [pytest.param(name, arguments, id=f"{name}-{n}") for name in OPTIMIZERS for n, arguments in enumerate(ARGUMENTS.get(name, [{}]))]


@pytest.fixture(autouse=True)
def _eight_bits_on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes is an extra; where it is installed its CPU kernels stand for those of a GPU."""
    if getattr(request.node, "callspec", None) and "adamw_8bit" in request.node.callspec.params.values():
        bitsandbytes = pytest.importorskip("bitsandbytes")
        kind = dataclasses.replace(OPTIMIZERS["adamw_8bit"], load=lambda: bitsandbytes.optim.AdamW8bit)
        monkeypatch.setitem(OPTIMIZERS, "adamw_8bit", kind)


def made(layers: Mapping[str, Layer], name: str = "adamw", arguments: Mapping[str, Any] | None = None, **changes: Any) -> Optimizer:
    unit = 100.0 if name == "prodigy" else 1.0  # its rates are multiples of a distance
    rates = {layer: unit * (1e-2 if layer.startswith("unet.") else 1e-3) for layer in layers} | {"unet.conv": unit * 2e-2}
    options = {"alpha_rates": dict.fromkeys(layers, 0.5), "up_ratio": 4.0, "betas": None, "weight_decay": 0.1}
    return make_optimizer(layers, rates, name=name, arguments=arguments or {}, **{**options, **changes})


def give_gradients(layers: Mapping[str, Layer], step: int) -> None:
    """A pull towards zero, from which Prodigy can tell a distance, and noise."""
    generator = torch.Generator().manual_seed(1000 + step)
    for layer in layers.values():
        for role, parameter in layer.trained().items():
            gradient = parameter.detach() + torch.randn(parameter.shape, generator=generator)
            # A matrix beside one that starts from zero has no gradient at first.
            parameter.grad = gradient * 0 if step == 0 and role == "down" else gradient


REST_FROM = 5


def run(layers: Mapping[str, Layer], optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.set_rates(rate_factor("cosine", step, 8, 2), resting="text_encoder" if step >= REST_FROM else None)
        give_gradients(layers, step)
        optimizer.step()
        optimizer.zero_grad()


def values(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    return {f"{name}/{role}": p.detach().clone() for name, layer in layers.items() for role, p in layer.trained().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def set_values(layers: Mapping[str, Layer], tensors: Mapping[str, Tensor]) -> None:
    for name, layer in layers.items():
        for role, parameter in layer.trained().items():
            parameter.data.copy_(tensors[f"{name}/{role}"])


def through_bytes(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, scalars = optimizer.state()
    return deserialise(serialise(tensors)), json.loads(json.dumps(scalars))


# ---------------------------------------------------------------- every optimizer


@pytest.mark.parametrize("saved_at", [0, 1, 3, 6])
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_a_resumed_run_has_the_same_bits(name: str, arguments: dict[str, Any], saved_at: int) -> None:
    straight = mixture()
    run(straight, made(straight, name, arguments), 0, 8)

    before = mixture()
    optimizer = made(before, name, arguments)
    run(before, optimizer, 0, saved_at)
    after = mixture()
    set_values(after, values(before))
    resumed = made(after, name, arguments)
    resumed.load_state(*through_bytes(optimizer))
    run(after, resumed, saved_at, 8)
    assert same(values(after), values(straight))


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_state_is_what_it_takes(name: str, arguments: dict[str, Any]) -> None:
    """The test above could not fail if a run without its state came out the same."""
    straight, forgetful = mixture(), mixture()
    run(straight, made(straight, name, arguments), 0, 8)
    run(forgetful, made(forgetful, name, arguments), 0, 3)
    run(forgetful, made(forgetful, name, arguments), 3, 8)
    moved, lost, start = values(straight), values(forgetful), values(mixture())
    for key, value in moved.items():
        assert not torch.equal(value, start[key]), f"{key} was not trained"
    needed = {key.partition("/")[0] for key, value in moved.items() if not torch.equal(value, lost[key])}
    assert needed == set(straight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loading_forgets_what_was_there(name: str) -> None:
    layers, used = mixture(), mixture()
    fresh, other = made(layers, name), made(used, name)
    run(used, other, 0, 3)
    other.load_state(*fresh.state())
    set_values(used, values(layers))
    run(layers, fresh, 0, 3)
    run(used, other, 0, 3)
    assert same(values(layers), values(used))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resting_part_stays_to_the_bit(name: str) -> None:
    layers = mixture()
    optimizer = made(layers, name)
    run(layers, optimizer, 0, REST_FROM)
    before = values(layers)
    with optimizer.evaluating():
        evaluated = values(layers)
    run(layers, optimizer, REST_FROM, 8)
    with optimizer.evaluating():
        evaluated_after = values(layers)
    for key, value in values(layers).items():
        rests = key.startswith("text_encoder")
        assert torch.equal(value, before[key]) == rests
        assert torch.equal(evaluated_after[key], evaluated[key]) == rests
    assert {g["part"]: g["lr"] == 0 for g in optimizer.groups} == {"unet": False, "text_encoder": True}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_forgets_all_but_the_alphas(name: str) -> None:
    layers, again, straight = mixture(), mixture(), mixture()
    optimizer, whole = made(layers, name), made(straight, name)
    run(layers, optimizer, 0, 3)
    optimizer.reset()
    set_values(again, values(layers))
    run(layers, optimizer, 3, 6)
    run(again, made(again, name), 3, 6)
    run(straight, whole, 0, 6)
    for key, value in values(layers).items():
        expected = straight if key.endswith("alpha") else again
        assert torch.equal(value, values(expected)[key])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_keeps_the_rate_of_the_moment(name: str) -> None:
    optimizer = made(mixture(), name)
    optimizer.set_rates(0.25)
    optimizer.reset()
    assert all(group["lr"] == group["peak_lr"] * 0.25 for group in optimizer.groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_alphas_learn_alike_beside_every_optimizer(name: str) -> None:
    layers, beside_adamw = mixture(), mixture()
    run(layers, made(layers, name), 0, 4)
    run(beside_adamw, made(beside_adamw), 0, 4)
    for layer in ("unet.linear", "unet.conv", "text_encoder.linear"):
        assert torch.equal(layers[layer].parameters["alpha"], beside_adamw[layer].parameters["alpha"])


# How far a first gradient of one magnitude everywhere moves each number, in rates.
FIRST_STEP = {
    "adamw": 1.0,
    "adamw_8bit": 1.0,
    "prodigy": 100 * 1e-6,  # at 100 times the rate, the first estimate of the distance
    "came": 0.1 / (0.9 * 0.01),  # (1 - beta1) over the root of (1 - beta3) * beta1^2, the update itself being clipped to 1
    "adafactor": 1.0,
    "lion": 1.0,
    "schedule_free": 1.0,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_step_by_hand(name: str) -> None:
    layers = {"unet.a": Layer(0, down=(2, 4), up=(4, 2, 1, 1)), "unet.b": Layer(1, down=(2, 4))}
    optimizer = made(layers, name, weight_decay=0.0, up_ratio=2.0)
    for layer in layers.values():
        for parameter in layer.trained().values():
            parameter.data.zero_()
            parameter.grad = torch.where(torch.arange(8).view(parameter.shape) % 3 == 0, 0.5, -0.5)
    optimizer.step()
    for layer in layers.values():
        for role, parameter in layer.trained().items():
            assert parameter.grad is not None
            moved = -FIRST_STEP[name] * 1e-2 * (2 if role == "up" else 1) * parameter.grad.sign()
            torch.testing.assert_close(parameter.detach(), moved, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_by_hand(name: str) -> None:
    """Without a gradient's pull, decoupled decay alone moves a matrix, and never an alpha."""
    layers = {"unet.a": Layer(0, down=(2, 4), alpha=(), magnitude=(4,))}
    before = values(layers)
    optimizer = made(layers, name, weight_decay=0.5)
    for parameter in layers["unet.a"].trained().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = values(layers)
    # Prodigy takes no step as long as it has seen no gradient.
    shrunk = before["unet.a/down"] * (1.0 if name == "prodigy" else 1 - 1e-2 * 0.5)
    torch.testing.assert_close(after["unet.a/down"], shrunk)
    assert torch.equal(after["unet.a/alpha"], before["unet.a/alpha"]) and torch.equal(after["unet.a/magnitude"], before["unet.a/magnitude"])


# ---------------------------------------------------------------- what one optimizer alone does


def test_prodigy_knows_the_rate_of_each_layer() -> None:
    """One instance would take the first group's rate for all."""
    layers = {"unet.a": Layer(0, down=(2, 4)), "unet.conv": Layer(0, down=(2, 4))}  # at 1e-2 and 2e-2
    before = values(layers)
    optimizer = made(layers, "prodigy", {"d0": 1e-3}, weight_decay=0.0)
    for _ in range(12):
        for parameter in optimizer.parameters:
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    moved = {name: (value - before[name]).norm() for name, value in values(layers).items()}
    assert 1e-3 < optimizer.groups[0]["d"] != optimizer.groups[1]["d"]
    assert moved["unet.conv/down"] > 1.9 * moved["unet.a/down"]


@pytest.mark.parametrize("name", ["came", "adafactor"])
def test_a_convolution_is_factored_as_its_matrix(name: str) -> None:
    convolution, matrix = Layer(0, down=(2, 3, 3, 3), up=(4, 2, 1, 1)), Layer(0, down=(2, 27), up=(4, 2))
    optimizers = [made({"unet.a": layer}, name) for layer in (convolution, matrix)]
    for step in range(3):
        for layer, optimizer in zip((convolution, matrix), optimizers, strict=True):
            give_gradients({"unet.a": layer}, step)
            optimizer.step()
    for role, parameter in convolution.parameters.items():
        assert torch.equal(parameter.flatten(1), matrix.parameters[role])
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape
    tensors, _ = optimizers[0].state()
    assert tensors["unet.a/down/exp_avg_sq_row"].shape == (2,) and tensors["unet.a/down/exp_avg_sq_col"].shape == (27,)


def test_as_matrices_restores_after_an_error() -> None:
    parameter = nn.Parameter(torch.randn(2, 3, 3, 3))
    parameter.grad = torch.randn(2, 3, 3, 3)
    before = parameter.grad
    with pytest.raises(ValueError), as_matrices([parameter]):
        assert parameter.shape == (2, 27)
        raise ValueError
    assert parameter.shape == (2, 3, 3, 3) and parameter.grad is before


def test_schedule_free_shows_its_average_by_hand() -> None:
    """Base sequence z: -r, -2r, …; average x: -r, -1.5r; trained between, at y = 0.1 z + 0.9 x."""
    layers = {"unet.a": Layer(0, down=(1, 1))}
    parameter = layers["unet.a"].parameters["down"]
    optimizer = made(layers, "schedule_free", weight_decay=0.0)
    parameter.data.zero_()
    for _ in range(2):
        parameter.grad = torch.ones(1, 1)
        optimizer.step()
    trained = parameter.detach().clone()
    assert trained.item() == pytest.approx(-1.55e-2)
    with optimizer.evaluating():
        assert parameter.item() == pytest.approx(-1.5e-2)
    assert torch.equal(parameter, trained)


def test_the_average_is_taken_out_without_rounding() -> None:
    """Of numbers this many, some come out of train() in other bits."""
    layers = {"unet.a": Layer(0, down=(64, 64))}
    optimizer = made(layers, "schedule_free")
    run(layers, optimizer, 0, 5)
    before = values(layers)
    averaging: Any = optimizer.members[0].optimizer
    averaging.eval()
    averaging.train()
    assert not same(values(layers), before)
    set_values(layers, before)
    with optimizer.evaluating():
        assert not same(values(layers), before)
    assert same(values(layers), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_looking_at_the_average_changes_nothing(name: str) -> None:
    """Even where drawing fails; only schedule-free shows other weights than it trains."""
    watched, unwatched = mixture(), mixture()
    optimizer = made(watched, name)
    run(watched, optimizer, 0, 3)
    before = values(watched)
    with pytest.raises(KeyError), optimizer.evaluating():
        assert same(values(watched), before) == (name != "schedule_free")
        raise KeyError
    assert same(values(watched), before)
    run(watched, optimizer, 3, 8)
    run(unwatched, made(unwatched, name), 0, 8)
    assert same(values(watched), values(unwatched))


def test_momentum_in_bf16_is_stored_as_bf16() -> None:
    layers = mixture()
    optimizer = made(layers, "adafactor", {"momentum_dtype": "bfloat16"}, betas=(0.9, 0.99))
    run(layers, optimizer, 0, 2)
    assert through_bytes(optimizer)[0]["unet.linear/down/exp_avg"].dtype == torch.bfloat16


def test_betas_by_name() -> None:
    """Two betas leave CAME its third; Adafactor keeps no momentum unless asked."""
    betas = {name: made({"unet.a": Layer(0, down=(2, 4))}, name, betas=(0.8, 0.9)).groups[0]["betas"] for name in ("adamw", "came")}
    assert betas == {"adamw": (0.8, 0.9), "came": (0.8, 0.9, 0.9999)}
    for given, momentum in ((None, False), ((0.9, 0.99), True)):
        layers = {"unet.a": Layer(0, down=(2, 4))}
        optimizer = made(layers, "adafactor", betas=given)
        run(layers, optimizer, 0, 1)
        assert ("unet.a/down/exp_avg" in optimizer.state()[0]) == momentum


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("prodigy", {"d_coeff": 2.0}, r"prodigy has no argument d_coeff. Did you mean d_coef"),
        ("lion", {"cautious": True}, "lion has no argument cautious"),  # which the class would take
        ("adamw", {"momentum": 0.9}, "adamw has no argument momentum"),
        ("adamw", {"lr": 1.0}, "lr cannot be given; rates are set by optimizer.rate"),
        ("adamw", {"params": []}, "params cannot be given"),
        ("adafactor", {"relative_step": True}, "relative_step cannot be given; rates are set by optimizer.rate"),
        ("schedule_free", {"warmup_steps": 10}, "set by optimizer.warmup_steps"),
        ("adamw", {"eps": "small"}, "eps = 'small'"),
        ("adafactor", {"momentum_dtype": "float31"}, "momentum_dtype = 'float31'"),
        ("came", {"betas": [0.9, 0.99]}, r"betas = \[0.9, 0.99\]"),
        ("prodigy", {"betas": [0.9, 0.99, 0.999]}, r"betas = \[0.9, 0.99, 0.999\]"),
        ("adamw", {"foreach": True}, "does not take these options: .*foreach"),  # beside fused
        ("adamw", {"betas": [0.9, 1.5]}, "does not take these options"),
    ],
)
def test_arguments_are_refused_in_a_sentence(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(mixture(), name, arguments)


def test_arguments_reach_the_matrices_alone() -> None:
    optimizer = made(mixture(), "adamw", {"eps": 1, "weight_decay": 0.3, "betas": [0.5, 0.6]})
    for group in optimizer.groups:
        if group["role"] == "alpha":
            assert (group["eps"], group["weight_decay"], group["betas"]) == (1e-8, 0.0, (0.9, 0.99))
        else:
            decayed = group["role"] in ("down", "up", "delta", "square")
            assert (group["eps"], group["weight_decay"], group["betas"]) == (1.0, 0.3 if decayed else 0.0, (0.5, 0.6))


def test_eight_bits_need_a_gpu_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        class_arguments("adamw_8bit", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'sdlora\[bitsandbytes\]'"):
        class_arguments("adamw_8bit", {})


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"set optimizer\.schedule = 'constant'"):
        check("schedule_free", "cosine", 0.0)
    with pytest.raises(ConfigError, match=r"set optimizer\.ema = 0"):
        check("schedule_free", "constant", 0.9)
    with pytest.raises(ConfigError, match=r"set optimizer\.algorithm = 'adamw'"):
        check("lion", "constant", 0.0, matched=True)
    check("schedule_free", "constant", 0.0)
    check("adamw", "cosine", 0.9, matched=True)


# ---------------------------------------------------------------- groups and rates


def rate_of(optimizer: Optimizer, name: str) -> tuple[float, float]:
    (group,) = [g for g in optimizer.groups if name in g["names"]]
    return group["lr"], group["weight_decay"]


def test_rates_of_each_role() -> None:
    layers = mixture()
    optimizer = made(layers, alpha_rates={name: 0.25 if name == "unet.conv" else 0.5 for name in layers})
    assert rate_of(optimizer, "unet.linear/down") == (1e-2, 0.1)
    assert rate_of(optimizer, "unet.linear/up") == (4e-2, 0.1)
    assert rate_of(optimizer, "unet.conv/up") == (8e-2, 0.1)
    assert rate_of(optimizer, "text_encoder.linear/down") == (1e-3, 0.1)
    assert rate_of(optimizer, "unet.conv/alpha") == (0.25, 0.0)
    assert rate_of(optimizer, "text_encoder.linear/alpha") == (0.5, 0.0)
    assert rate_of(optimizer, "unet.whole/delta") == rate_of(optimizer, "unet.whole/square") == (1e-2, 0.1)
    assert rate_of(optimizer, "unet.norm/weight_delta") == rate_of(optimizer, "unet.rank_one/magnitude") == (1e-2, 0.0)
    optimizer.set_rates(0.5)
    assert rate_of(optimizer, "unet.linear/up")[0] == pytest.approx(2e-2)


def test_all_that_is_trained_is_in_one_group() -> None:
    layers = mixture()
    trained = {f"{name}/{role}": p for name, layer in layers.items() for role, p in layer.trained().items()}
    for per_layer in (False, True):
        optimizer = made(layers, per_layer=per_layer)
        pairs = [pair for g in optimizer.groups for pair in zip(g["names"], g["params"], strict=True)]
        assert len(pairs) == len(trained) and all(trained[name] is p for name, p in pairs)
        assert [id(p) for p in optimizer.parameters] == [id(p) for _, p in pairs]
        assert (len(optimizer.groups) == len(trained)) == per_layer
    assert {g["layer"] for g in optimizer.groups} == set(layers)


def test_groups_of_their_own_learn_the_same() -> None:
    together, apart = mixture(), mixture()
    run(together, made(together), 0, 4)
    optimizer = made(apart, per_layer=True)
    run(apart, optimizer, 0, 2)
    resumed = made(apart, per_layer=True)
    resumed.load_state(*through_bytes(optimizer))
    run(apart, resumed, 2, 4)
    assert same(values(together), values(apart))


def test_schedules_by_hand() -> None:
    assert [rate_factor("constant", s, 10, 4) for s in (0, 3, 4, 9)] == [0.25, 1.0, 1.0, 1.0]
    assert rate_factor("linear", 7, 10, 4) == pytest.approx(0.5)
    assert rate_factor("cosine", 7, 10, 4) == pytest.approx(0.5)
    assert rate_factor("polynomial", 7, 10, 4, power=2) == pytest.approx(0.25)
    assert rate_factor("cosine_restarts", 7, 12, 0, cycles=2) == pytest.approx(rate_factor("cosine", 1, 6, 0))
    for schedule in SCHEDULES.values():
        assert schedule(0.0, 3, 2.0) == pytest.approx(1.0)


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
