"""A LoRA from the difference of two checkpoints of one family."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from sdlora.errors import ConfigError, WeightsError
from sdlora.lora.change import Change, triplets_of_matrix
from sdlora.lora.checkpoints import Checkpoint
from sdlora.lora.resize import Cut, Limit, cut_triplets
from sdlora.lora.targets import groups_of, selects


@dataclass
class Remainder:
    """What a LoRA of a difference does not hold, filled in while it is extracted."""

    same: list[str] = field(default_factory=list)  # layers that hardly differ
    others: list[str] = field(default_factory=list)  # parameters that differ and were not asked for
    squares: float = 0.0  # squared norm of the differences of all these


def extract(
    base: Checkpoint, tuned: Checkpoint, selectors: Iterable[str], limit: Limit, least: float | None, remainder: Remainder
) -> Iterator[tuple[str, Change, Cut]]:
    """Every layer that a selector or group names and that differs, with the LoRA that the limit leaves of its difference.

    A layer hardly differs where the norm of its difference is no more than the share `least` of its weight's; None: where rounding
    to the coarser of the two files' precisions could make as much. Raises WeightsError where no layer differs, too.
    """
    if base.family != tuned.family:
        raise WeightsError(f"{base.path} is of family {base.family} and {tuned.path} of {tuned.family}: they have no layers in common.")
    wanted = groups_of(list(selectors))
    for selector in wanted:
        if not any(selects(selector, module) for module in base.modules()):
            raise ConfigError(f"--layers: {selector!r} matches no layer of {base.path}; names look like {base.modules()[0]}.")
    differs = False
    for parameter in base.places:
        module, _, kind = parameter.rpartition(".")
        asked = kind == "weight" and len(base.shape(parameter)) > 1 and any(selects(selector, module) for selector in wanted)
        if parameter not in tuned.places or tuned.shape(parameter) != base.shape(parameter):
            if asked:
                raise WeightsError(f"{tuned.path} has no {module} of the shape that {base.path} has.")
            remainder.others.append(parameter)
            continue
        old, new = base.read(parameter), tuned.read(parameter)
        if not old.is_floating_point():  # position_ids
            continue
        difference = new.float() - old.float()
        norm = float(difference.norm())
        if not math.isfinite(norm):
            raise WeightsError(f"{parameter} holds numbers that are not finite in {base.path} or {tuned.path}.")
        threshold = max(torch.finfo(of.dtype).eps for of in (old, new)) / 2 if least is None else least
        if norm > threshold * float(old.float().norm()) and asked:
            triplets = triplets_of_matrix(difference)
            factors, cut = cut_triplets(module, triplets, len(triplets.s), tuple(difference.shape), limit)
            differs = True
            yield module, Change(factors), cut
        elif norm:
            remainder.squares += norm**2
            (remainder.same if asked else remainder.others).append(module if asked else parameter)
    if not differs:
        raise WeightsError(f"{base.path} and {tuned.path} do not differ in {', '.join(wanted)}: there is nothing to extract.")
