"""Encodings of other programs: numbers by hand, LyCORIS' own formulas in another order, and what is left over."""

import pytest
import torch
from torch import Tensor

from sdlora.lora.change import Change
from sdlora.lora.encodings import decode


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def delta(tensors: dict[str, Tensor], alpha: float | None = None) -> Tensor:
    """Of a layer whose tensors are all understood."""
    tensors = dict(tensors)
    change = decode(tensors, alpha)
    assert tensors == {}
    if change.factors is not None:
        return change.factors.delta()
    assert change.weight is not None
    return change.weight


def test_plain_by_hand() -> None:
    tensors = {"down": torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "up": torch.tensor([[3.0, 0.0]])}
    assert delta(tensors).tolist() == [[3, 6]]
    assert delta(tensors, alpha=1.0).tolist() == [[1.5, 3]]
    assert delta(tensors | {"alpha": torch.tensor([4.0])}, alpha=1.0).tolist() == [[6, 12]]


def test_tuckers_form_is_three_convolutions() -> None:
    """Its up, mid and down applied one behind the other."""
    down, core, up = random(2, 5, 1, 1), random(3, 2, 3, 3), random(4, 3, 1, 1)
    x = random(1, 5, 7, 7)
    wanted = torch.conv2d(torch.conv2d(torch.conv2d(x, down), core, stride=2, padding=1), up) * 0.5 / 2
    merged = delta({"down": down, "up": up, "lora_mid.weight": core, "alpha": torch.tensor(0.5)})
    torch.testing.assert_close(torch.conv2d(x, merged, stride=2, padding=1), wanted)
    change = decode({"down": down, "up": up, "lora_mid.weight": core})
    assert change.factors is not None and change.factors.down.shape == (3, 5, 3, 3) and change.is_plain


def test_loha_by_hand_and_with_cores() -> None:
    tensors = {
        "hada_w1_a": torch.tensor([[1.0], [2.0]]),
        "hada_w1_b": torch.tensor([[3.0, 4.0]]),
        "hada_w2_a": torch.tensor([[5.0], [1.0]]),
        "hada_w2_b": torch.tensor([[1.0, 2.0]]),
    }
    assert delta(tensors).tolist() == [[15, 40], [6, 16]]
    assert delta(tensors | {"alpha": torch.tensor(0.5)}).tolist() == [[7.5, 20], [3, 8]]
    a1, b1, a2, b2, t1, t2 = random(2, 4), random(2, 5), random(2, 4) + 1, random(2, 5) - 1, random(2, 2, 3, 3), random(2, 2, 3, 3) * 2
    first, second = (torch.einsum("ijkl,jr,ip->prkl", t, b, a) for t, a, b in ((t1, a1, b1), (t2, a2, b2)))
    cored = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "hada_t1": t1, "hada_t2": t2, "alpha": torch.tensor(1.0)}
    torch.testing.assert_close(delta(cored), first * second / 2)


def test_lokr_by_hand_in_all_its_forms() -> None:
    w1, w2 = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    assert delta({"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9.0)}).tolist() == [[3, 6], [4, 8]]  # both whole: no scale
    halves = {"lokr_w2_a": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "lokr_w2_b": torch.tensor([[1.0], [1.0]])}  # w2 of rank 2
    assert delta({"lokr_w1": w1, **halves, "alpha": torch.tensor(1.0)}).tolist() == [[1.5, 3], [2, 4]]
    both = {"lokr_w1_a": torch.tensor([[1.0]]), "lokr_w1_b": w1, "lokr_w2": w2}  # w1 of rank 1
    assert delta(both | {"alpha": torch.tensor(3.0)}).tolist() == [[9, 18], [12, 24]]


def test_lokr_of_convolutions() -> None:
    w1, a, b, core = random(2, 3), random(4, 2), random(2, 5 * 9), random(2, 2, 3, 3)
    kernel = (a @ b).view(4, 5, 3, 3)
    wanted = torch.stack([torch.kron(w1, kernel[:, :, y, x]) for y in range(3) for x in range(3)], dim=-1).view(8, 15, 3, 3)
    torch.testing.assert_close(delta({"lokr_w1": w1, "lokr_w2": kernel}), wanted)
    # without a kernel's shape the columns are input channels, and in each its 9 weights
    torch.testing.assert_close(delta({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}).view(8, 15, 3, 3), wanted)
    torch.testing.assert_close(delta({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b.view(2, 5, 3, 3)}), wanted)
    t_a, t_b = random(2, 4), random(2, 5)
    cored = delta({"lokr_w1": w1, "lokr_w2_a": t_a, "lokr_w2_b": t_b, "lokr_t2": core})
    centre = torch.kron(w1, t_a.T @ core[:, :, 1, 1] @ t_b)
    torch.testing.assert_close(cored[:, :, 1, 1], centre)


def test_dora_on_either_axis_by_hand() -> None:
    base = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    plain = {"down": torch.zeros(1, 2), "up": torch.zeros(2, 1)}
    of_inputs = decode(plain | {"dora_scale": torch.tensor([[10.0, 1.0]])})  # columns (3, 4), (0, 2)
    torch.testing.assert_close(of_inputs.delta(base) + base, torch.tensor([[6.0, 0.0], [8.0, 1.0]]))
    rows = torch.tensor([[6.0, 0.0], [20**0.5 / 5 * 4, 20**0.5 / 5 * 2]])  # (3, 0) to length 6, (4, 2) to length 2
    rows[1] = torch.tensor([4.0, 2.0]) * 2 / 20**0.5
    for magnitude in ({"dora_scale": torch.tensor([[6.0], [2.0]])}, {"magnitude": torch.tensor([6.0, 2.0])}):
        torch.testing.assert_close(decode(plain | magnitude).delta(base) + base, rows)
    core = {"down": torch.zeros(1, 2, 3, 3), "up": torch.zeros(5, 1, 1, 1), "magnitude": torch.ones(1, 5, 1, 1)}
    dora_scale = decode(core).dora_scale
    assert dora_scale is not None and dora_scale.shape == (5, 1, 1, 1)


def test_norms_biases_and_full_deltas() -> None:
    change = decode({"w_norm": torch.ones(3), "b_norm": torch.zeros(3)})
    assert change.weight is not None and change.bias is not None and change.weight.shape == (3,)
    assert decode({"diff_b": torch.ones(2)}).bias is not None
    both = decode({"diff": torch.ones(2, 2).half(), "diff_b": torch.ones(2)})
    assert both.weight is not None and both.weight.dtype == torch.float32 and both.bias is not None


@pytest.mark.parametrize(
    "tensors",
    [
        {"down": torch.ones(1, 2)},
        {"dora_scale": torch.ones(1, 2)},
        {"down": torch.ones(1, 2), "up": torch.ones(2, 1), "hada_w1_a": torch.ones(2, 1)},
        {"hada_w1_a": torch.ones(2, 1), "hada_w1_b": torch.ones(1, 2)},
        {"lokr_w1": torch.ones(1, 2)},
        {"lokr_w1": torch.ones(1, 2), "lokr_w2_a": torch.ones(2, 1)},
        {"diff": torch.ones(1, 2), "w_norm": torch.ones(1)},
    ],
)
def test_what_is_not_understood_is_left_over_or_changes_nothing(tensors: dict[str, Tensor]) -> None:
    left = dict(tensors)
    change = decode(left)
    assert left or all(value is None for value in vars(change).values())
    assert decode({}) == Change()
