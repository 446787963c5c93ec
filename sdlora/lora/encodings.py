"""What the tensors of one layer mean, in every encoding that programs write."""

from __future__ import annotations

import torch
from torch import Tensor

from sdlora.lora.change import Change, Factors

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def decode(tensors: dict[str, Tensor], alpha: float | None = None) -> Change:
    """One layer's change, from its tensors by what they are, of which those that are understood are taken out.

    alpha: where the tensors have none; None means the rank. The encodings are LyCORIS' (Yeh et al. 2024, arXiv 2309.14859, and its
    modules/), and peft's for DoRA. Raises RuntimeError for shapes that do not belong together.
    """

    def take(role: str) -> Tensor | None:
        tensor = tensors.pop(role, None)
        return None if tensor is None else tensor.float()

    def take_all(*roles: str) -> list[Tensor]:
        return [tensors.pop(role).float() for role in roles]

    def scale(rank: int) -> float:
        return 1.0 if alpha is None else alpha / rank

    own = take("alpha")
    if own is not None and own.numel() != 1:
        raise RuntimeError("an alpha is one number")
    alpha = alpha if own is None else float(own)
    factors, weight = None, None
    if {"down", "up"} <= tensors.keys():
        down, up = take_all("down", "up")
        if down.dim() < 2 or not len(down) or (up.shape[1:2] != down.shape[:1] and "lora_mid.weight" not in tensors):
            raise RuntimeError("down and up have no rank, or not the same")
        factors = Factors(down, up, len(down) if alpha is None else alpha)
        if "lora_mid.weight" in tensors:
            plain = with_core(down, *take_all("lora_mid.weight"))
            factors = Factors(plain, up, scale(len(down)) * len(plain))
    elif set(LOHA) <= tensors.keys():
        w1_a, w1_b, w2_a, w2_b = take_all(*LOHA)
        weight = scale(len(w1_b)) * loha(w1_a, w1_b, w2_a, w2_b, take("hada_t1"), take("hada_t2"))
    elif any(role.startswith("lokr_") for role in tensors):
        ranks = [len(tensors[role]) for role in ("lokr_w2_b", "lokr_w1_b") if role in tensors]
        first, second = _either(tensors, "lokr_w1"), _either(tensors, "lokr_w2")
        if first is not None and second is not None:
            weight = (scale(ranks[0]) if ranks else 1.0) * kronecker(first, second)
    elif "diff" in tensors:
        weight = take("diff")
    elif "w_norm" in tensors:
        weight = take("w_norm")
    if factors is None and weight is None:
        return Change(bias=take("diff_b"))
    magnitude = take("magnitude")  # peft's is of outputs, (O,) or (1, O, 1, 1)
    shape = (-1, 1, *[1] * (factors.down.dim() - 2)) if factors is not None else (-1, 1)
    dora_scale = take("dora_scale") if magnitude is None else magnitude.reshape(shape)
    return Change(factors, dora_scale, weight, take("b_norm") if "b_norm" in tensors else take("diff_b"))


def _either(tensors: dict[str, Tensor], role: str) -> Tensor | None:
    """A factor of LoKr, whole or as a product (with a core); None where a part is missing."""
    if role in tensors:
        return tensors.pop(role).float()
    if not {f"{role}_a", f"{role}_b"} <= tensors.keys():
        return None
    a, b = tensors.pop(f"{role}_a").float(), tensors.pop(f"{role}_b").float()
    if role == "lokr_w2" and "lokr_t2" in tensors:
        return tucker(tensors.pop("lokr_t2").float(), a, b)
    return (a @ b.flatten(1)).view(len(a), *b.shape[1:])


def with_core(down: Tensor, core: Tensor) -> Tensor:
    """LoCon's Tucker form as a plain down: (R, I, 1, 1) and (S, R, kh, kw) -> (S, I, kh, kw)."""
    return torch.einsum("sr...,ri->si...", core, down.flatten(1))


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(R, R, kh, kw), (R, O), (R, I) -> (O, I, kh, kw)."""
    return torch.einsum("rs...,ro,si->oi...", core, a, b)


def loha(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, t1: Tensor | None, t2: Tensor | None) -> Tensor:
    """The elementwise product of two low-rank matrices (FedPara, Hyeon-Woo et al. 2022): (O, I*kh*kw), or (O, I, kh, kw) with cores."""
    if t1 is None or t2 is None:
        return (w1_a @ w1_b) * (w2_a @ w2_b)
    return tucker(t1, w1_a, w1_b) * tucker(t2, w2_a, w2_b)


def kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    """LoKr (Edalati et al. 2022, KronA): (A, B) and (C, D, ...) -> (A*C, B*D, ...)."""
    return torch.kron(w1.view(*w1.shape, *[1] * (w2.dim() - 2)), w2.contiguous())
