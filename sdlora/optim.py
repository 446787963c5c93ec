"""Optimizers and their groups, rates of layers, how rates move over a run, and the running average."""

from __future__ import annotations

import difflib
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from sdlora.errors import ConfigError
from sdlora.lora.layers import LoraLayer
from sdlora.lora.matched import matched_rate, next_direction


class Trains(Protocol):
    """A layer of which something is trained."""

    def trained(self) -> dict[str, nn.Parameter]:
        """Role -> parameter. Roles: the matrices `down`, `up`, `square` and `delta`, the scalar `alpha`, the vector `magnitude`, and
        `weight_delta` and `bias_delta` of norms and biases."""
        ...


DECAYED = {"down", "up", "square", "delta"}  # roles; scalars and vectors go without, as is usual for norms and biases


class Average:
    """A running average of parameters. Its decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that the start is
    forgotten soon (as in TensorFlow's ExponentialMovingAverage)."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """After update number `updates`, which counts from 1."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average; afterwards they are what they were."""
        kept = [p.detach().clone() for p in self.parameters]
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(kept)

    def tensors(self) -> dict[str, Tensor]:
        return {str(number): value for number, value in enumerate(self.values)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for number, value in enumerate(self.values):
            value.copy_(tensors[str(number)])

    @torch.no_grad()
    def _fill(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


@dataclass(frozen=True)
class Kind:
    """One optimizer: its class, and what that is given where the user gives nothing."""

    load: Callable[[], Callable[..., torch.optim.Optimizer]]  # imports late; raises ConfigError where it cannot run
    betas: tuple[float | None, ...]  # optimizer.betas, where set, takes the place of the first two; None: no first moment
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reserved: Mapping[str, str] = field(default_factory=dict)  # an argument that users cannot give -> why
    factored: bool = False  # keeps means over rows and columns in the place of a second moment
    kept: float = 2.0  # fp32 numbers that it remembers of each that is trained
    averages: bool = False  # eval() puts averaged weights into the parameters, train() takes them out


class Member:
    """A torch optimizer over a single group.

    A single one, since Prodigy takes the rate of its first group for all and estimates one distance for all of them; and since a
    group that is not stepped rests truly, whatever its optimizer would do to it at a rate of 0.
    """

    def __init__(self, name: str, kind: Kind, group: Mapping[str, Any], arguments: Mapping[str, Any]):
        self.name, self.kind = name, kind
        self.optimizer = kind.load()([dict(group)], **arguments)
        self.fresh = {key: value for key, value in self.group.items() if key not in ("params", "lr", "peak_lr")}

    @property
    def group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]

    def step(self) -> None:
        if self.group["lr"] == 0:
            return
        with as_matrices(self.group["params"]) if self.kind.factored else nullcontext():
            self.optimizer.step()

    def entries(self) -> dict[str, Any]:
        """What has changed since it was made: "group/<name>/<entry>" and "<layer>/<role>/<entry>" -> tensor or plain value."""
        found = {
            f"group/{self.name}/{key}": value
            for key, value in self.group.items()
            if key != "params" and (key not in self.fresh or value != self.fresh[key])
        }
        for name, parameter in zip(self.group["names"], self.group["params"], strict=True):
            found |= {f"{name}/{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        return found

    def restore(self, owners: Mapping[str, Mapping[str, Any]]) -> None:
        """Take entries back, here by what stands before their last slash; with none be as freshly made, at the rate of the moment."""
        numbers = range(len(self.group["params"]))
        rates = {key: self.group[key] for key in ("lr", "peak_lr")}
        saved = {**self.fresh, **rates, **owners.get(f"group/{self.name}", {}), "params": list(numbers)}
        state = {n: dict(owners[name]) for n, name in zip(numbers, self.group["names"], strict=True) if name in owners}
        self.optimizer.load_state_dict({"state": state, "param_groups": [saved]})


class Optimizer:
    """Torch optimizers that step as one."""

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Each with params, names ("<layer>/<role>"), lr, peak_lr, weight_decay, part, role, and what its optimizer keeps there. Read
        them anew after `load_state` and `reset`, which replace them."""
        return [member.group for member in self.members]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group["params"]]

    def step(self) -> None:
        """Groups whose rate is 0 rest: neither their parameters nor what is remembered of them move."""
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def set_rates(self, factor: float, resting: str | None = None) -> None:
        """Rates of this step; parts of the model whose names start with `resting` learn no more."""
        for group in self.groups:
            rests = resting is not None and group["part"].startswith(resting)
            group["lr"] = 0.0 if rests else group["peak_lr"] * factor

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `load_state` needs to go on to the same bits: tensors, copied to the CPU, and what JSON can hold."""
        entries = {key: value for member in self.members for key, value in member.entries().items()}
        # Copied, since bitsandbytes shares tensors between parameters, which safetensors refuses.
        tensors = {key: value.detach().to("cpu", copy=True) for key, value in entries.items() if isinstance(value, Tensor)}
        return tensors, {key: value for key, value in entries.items() if key not in tensors}

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Take back the state of an optimizer that was made of the same layers and options; what this one had is forgotten."""
        owners: dict[str, dict[str, Any]] = defaultdict(dict)
        # Copied, since tensors out of a file may lie unaligned, and BLAS then sums in another order.
        for key, value in {**scalars, **{key: tensor.clone() for key, tensor in tensors.items()}}.items():
            owner, _, entry = key.rpartition("/")
            owners[owner][entry] = value
        for member in self.members:
            member.restore(owners)

    def reset(self) -> None:
        """Forget all moments, estimates and averages but those of the alphas, as if freshly made; rates stay."""
        for member in self.members:
            if member.group["role"] != "alpha":
                member.restore({})

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The parameters hold what is to be drawn and exported: the averaged weights where the optimizer averages, else what they hold
        anyway. Afterwards they are what they were."""
        averaging: list[Any] = [member.optimizer for member in self.members if member.kind.averages]
        kept = [(p, p.detach().clone()) for optimizer in averaging for group in optimizer.param_groups for p in group["params"]]
        for optimizer in averaging:
            optimizer.eval()
        try:
            yield
        finally:
            for optimizer in averaging:
                optimizer.train()
            for parameter, value in kept:  # since train() gets them back but for rounding
                parameter.detach().copy_(value)


@contextmanager
def as_matrices(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Convolutions (O, I, kh, kw) are the matrices (O, I * kh * kw) that they compute with; afterwards they are as they were.

    A factored optimizer takes the last two axes for rows and columns. Of 3 x 3 kernels it would so keep two thirds as many numbers as
    an unfactored one, and of the 1 x 1 kernels of every up twice as many.
    """
    convolutions = [(p, p.data, p.grad) for p in parameters if p.dim() > 2]
    for parameter, data, grad in convolutions:
        parameter.grad = None  # or the gradient's shape would be held against the new one
        parameter.data = data.view(len(data), -1)  # the same memory, or an error
        parameter.grad = None if grad is None else grad.reshape(len(data), -1)
    try:
        yield
    finally:
        for parameter, data, grad in convolutions:
            parameter.grad = None
            parameter.data, parameter.grad = data, grad


def make_optimizer(
    layers: Mapping[str, Trains],
    rates: Mapping[str, float],
    *,
    name: str,
    alpha_rates: Mapping[str, float],
    up_ratio: float,
    betas: tuple[float, float] | None,
    weight_decay: float,
    arguments: Mapping[str, Any],
    per_layer: bool = False,
) -> Optimizer:
    """The optimizer `name` for all that is trained, in groups of one part, role and peak rate, or of one layer and role.

    Up matrices learn `up_ratio` times as fast as down (LoRA+, Hayou et al. 2024). Alphas have rates of their own and always AdamW:
    of a scalar there is nothing to factor and no distance to estimate, and their rate so means the same beside every optimizer.
    Raises ConfigError for arguments that the optimizer does not take, and where it cannot run.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    own = class_arguments(name, arguments)
    decay = own.pop("weight_decay", weight_decay)
    for layer, adapter in layers.items():
        part = layer.partition(".")[0]
        for role, parameter in adapter.trained().items():
            rate = alpha_rates[layer] if role == "alpha" else rates[layer] * (up_ratio if role == "up" else 1.0)
            group = groups.setdefault((layer, role) if per_layer else (part, role, rate), {"params": [], "names": []})
            group |= {"lr": rate, "peak_lr": rate, "part": part, "role": role, "weight_decay": decay if role in DECAYED else 0.0}
            if per_layer:
                group["layer"] = layer
            group["params"].append(parameter)
            group["names"].append(f"{layer}/{role}")
    members = []
    for key, group in groups.items():
        kind, given = (OPTIMIZERS["adamw"], {}) if group["role"] == "alpha" else (OPTIMIZERS[name], own)
        usual = {"betas": kind.betas if betas is None else (*betas, *kind.betas[2:])}
        try:
            members.append(Member("/".join(map(str, key)), kind, group, {**usual, **kind.arguments, **given}))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"optimizer.algorithm = {name!r} does not take these options: {error}.") from None
    return Optimizer(members)


def match_rates(optimizer: Optimizer, layers: Mapping[str, Trains], rates: Mapping[str, float], up_ratio: float) -> None:
    """Set the peak rates of down and up for the step to come so that each layer's weight moves as far as full fine-tuning at
    `rates` would move it (see lora/matched.py). Wants gradients at hand, and an AdamW whose groups are `per_layer`; other roles, and
    layers without gradients, keep their rates."""
    members: dict[str, dict[str, Member]] = defaultdict(dict)
    for member in optimizer.members:
        if member.group["role"] in ("down", "up"):
            members[member.group["layer"]][member.group["role"]] = member
    found: dict[str, Tensor] = {}
    for name, roles in members.items():
        layer = layers[name]
        assert isinstance(layer, LoraLayer)
        directions = {}
        for role, member in roles.items():
            (parameter,) = member.group["params"]
            if parameter.grad is not None:
                state = member.optimizer.state.get(parameter, {})
                directions[role] = next_direction(parameter, state, member.group["betas"], member.group["eps"])
        if "up" in directions:
            found[name] = matched_rate(
                rates[name], layer.scale.detach(), layer.down, layer.up, directions.get("down"), directions["up"], up_ratio
            )
    matched = torch.stack(list(found.values())).tolist() if found else []  # one wait for the device and not one a layer
    for name, rate in zip(found, matched, strict=True):
        for role, member in members[name].items():
            member.group["peak_lr"] = rate * (up_ratio if role == "up" else 1.0)


def class_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` as the class of the optimizer `name` takes them: lists become tuples, and names of dtypes dtypes.

    Raises ConfigError for one that it does not have, that another option sets, or that is of another type. The signature is what
    counts, since pytorch_optimizer's classes accept any name and ignore those that they do not know.
    """
    kind = OPTIMIZERS[name]
    reserved = {"params": "what is trained is set under [lora]", "lr": "rates are set by optimizer.rate", **kind.reserved}
    known = {
        key: parameter.annotation
        for key, parameter in inspect.signature(kind.load(), eval_str=True).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and key not in reserved
    }
    known["betas"] = tuple[tuple(float for _ in kind.betas)]  # type: ignore[misc]  # some classes say two or three and mean two
    for key in arguments:
        if key in reserved:
            raise ConfigError(f"optimizer.arguments: {key} cannot be given; {reserved[key]}.")
        if key not in known:
            near = difflib.get_close_matches(key, known, 3, 0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"It has {', '.join(known)}."
            raise ConfigError(f"optimizer.arguments: {name} has no argument {key}. {hint}")
    return {key: _typed(key, value, known[key]) for key, value in arguments.items()}


def _typed(key: str, value: Any, annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return value
    if annotation is torch.dtype:
        value = getattr(torch, str(value), value)
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ConfigError(f"optimizer.arguments: {key} = {value!r}: {message[0].lower()}{message[1:]}.") from None


def check(name: str, schedule: str, ema: float, *, matched: bool = False) -> None:
    """Raises ConfigError where the optimizer `name` cannot be had with a schedule, a running average, or matched rates."""
    if OPTIMIZERS[name].averages and schedule != "constant":
        raise ConfigError(
            f"optimizer.schedule = {schedule!r}: {name} averages weights instead of lowering rates; set optimizer.schedule = 'constant'."
        )
    if OPTIMIZERS[name].averages and ema > 0:
        raise ConfigError(f"optimizer.ema = {ema}: {name} averages weights by itself; set optimizer.ema = 0.")
    if matched and name != "adamw":
        raise ConfigError(f"optimizer.algorithm = {name!r}: matched rates are derived for Adam's steps; set optimizer.algorithm = 'adamw'.")


def rate_factor(schedule: str, step: int, steps: int, warmup_steps: int, *, cycles: int = 1, power: float = 1.0) -> float:
    """Share of the peak rate at `step` of `steps`: a rise from zero, then the schedule over what is left."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return SCHEDULES[schedule]((step - warmup_steps) / max(1, steps - warmup_steps), cycles, power)


# From the share of the run that is done, 0..1, the number of restarts and the exponent to the share of the peak rate.
SCHEDULES: dict[str, Callable[[float, int, float], float]] = {
    "constant": lambda done, cycles, power: 1.0,
    "linear": lambda done, cycles, power: 1 - done,
    "cosine": lambda done, cycles, power: 0.5 * (1 + math.cos(math.pi * done)),
    "cosine_restarts": lambda done, cycles, power: 0.5 * (1 + math.cos(math.pi * (done * cycles % 1.0))),
    "polynomial": lambda done, cycles, power: (1 - done) ** power,
}


def _of_pytorch_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    import pytorch_optimizer  # late: half a second that most runs need not wait for

    found: Callable[..., torch.optim.Optimizer] = getattr(pytorch_optimizer, name)
    return found


def _adamw_8bit() -> Callable[..., torch.optim.Optimizer]:
    if not torch.cuda.is_available():
        raise ConfigError("optimizer.algorithm = 'adamw_8bit' needs an NVIDIA GPU, and there is none here: set it to 'adamw'.")
    try:
        import bitsandbytes
    except ModuleNotFoundError:
        raise ConfigError(
            "optimizer.algorithm = 'adamw_8bit' needs bitsandbytes: pip install 'sdlora[bitsandbytes]', or set it to 'adamw'."
        ) from None
    found: Callable[..., torch.optim.Optimizer] = bitsandbytes.optim.AdamW8bit
    return found


OPTIMIZERS: dict[str, Kind] = {
    # Loshchilov & Hutter 2019.
    "adamw": Kind(lambda: torch.optim.AdamW, (0.9, 0.99), {"fused": True}),
    # Dettmers et al. 2022: moments in 8 bits, but for tensors below 4096 numbers.
    "adamw_8bit": Kind(_adamw_8bit, (0.9, 0.99), kept=0.5),
    # Mishchenko & Defazio 2023: a rate is a multiple, usually 1, of an estimated distance. As its authors advise for diffusion models.
    "prodigy": Kind(lambda: _of_pytorch_optimizer("Prodigy"), (0.9, 0.99), {"bias_correction": True, "safeguard_warmup": True}, kept=4.0),
    # Luo et al. 2023: factored, with a confidence (the third beta) that scales steps; the first steps are some ten times the rate.
    "came": Kind(lambda: _of_pytorch_optimizer("CAME"), (0.9, 0.999, 0.9999), factored=True, kept=1.0),
    # Shazeer & Stern 2018, at rates from outside: those of its own are for weights that do not start from zero.
    "adafactor": Kind(
        lambda: _of_pytorch_optimizer("AdaFactor"),
        (None, 0.999),
        arguments={"relative_step": False, "scale_parameter": False, "warmup_init": False, "momentum_dtype": torch.float32},
        reserved={"relative_step": "rates are set by optimizer.rate", "warmup_init": "the warm-up is set by optimizer.warmup_steps"},
        factored=True,
        kept=0.0,  # but for means over rows and columns
    ),
    # Chen et al. 2023: each number moves by the rate itself, so that a third to a tenth of AdamW's rate is usual.
    "lion": Kind(lambda: _of_pytorch_optimizer("Lion"), (0.9, 0.99), kept=1.0),
    # Defazio et al. 2024: averages weights where others let rates fall.
    "schedule_free": Kind(
        lambda: _of_pytorch_optimizer("ScheduleFreeAdamW"),
        (0.9, 0.999),
        reserved={"warmup_steps": "the warm-up is set by optimizer.warmup_steps"},
        averages=True,
    ),
}
