"""The embedding terms by hand, and that what the base encoder says is computed once a caption."""

import pytest
import torch

from sdlora.lora.embedding_norm import DISTANCES, Remembered, cosine_drift, embedding_norms, norm_drift, norm_loss, pinned_loss


def test_numbers_by_hand() -> None:
    norms = embedding_norms(torch.tensor([[[3.0, 4.0], [6.0, 8.0]]]))
    assert norms.tolist() == [[5.0, 10.0]]
    base = torch.tensor([[4.0, 20.0]])
    assert float(norm_loss(norms, base)) == pytest.approx((0.25**2 + 0.5**2) / 2)
    assert norm_drift(norms, base) == pytest.approx(((0.25 + 0.5) / 2, 0.5))


def test_loss_is_zero_for_any_rotation_and_pulls_towards_the_base_norm() -> None:
    embeds = torch.randn(2, 5, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    base = embedding_norms(embeds)
    assert float(norm_loss(embedding_norms(embeds @ rotation), base)) < 1e-10
    grown = (embeds * 1.3).requires_grad_()
    norm_loss(embedding_norms(grown), base).backward()
    assert (embedding_norms(grown.detach() - 0.1 * grown.grad) < embedding_norms(grown.detach())).all()


def test_each_caption_is_computed_once_until_it_is_forgotten() -> None:
    calls: list[list[str]] = []

    def encode(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(captions)
        lengths = torch.tensor([float(len(c)) for c in captions])
        return lengths[:, None, None].expand(-1, 3, 4), -lengths

    known = Remembered(encode, most=2)
    first, second = known(["ab", "c", "ab"])
    assert first.shape == (3, 3, 4) and first[:, 0, 0].tolist() == [2, 1, 2] and second.tolist() == [-2, -1, -2]
    known(["c", "def"])  # "ab" was asked for longest ago
    assert known(["def", "c"])[0][:, 0, 0].tolist() == [3, 1]
    assert calls == [["ab", "c"], ["def"]]
    assert known(["ab", "c", "def"])[0][:, 0, 0].tolist() == [2, 1, 3]  # more at once than are kept
    assert calls[2:] == [["ab"]]


def test_orders_distances_and_units_by_hand() -> None:
    assert embedding_norms(torch.tensor([[[3.0, -4.0]]]), order=1).tolist() == [[7.0]]
    norms, base = torch.tensor([[10.5, 12.0]]), torch.tensor([[10.0, 10.0]])
    assert float(norm_loss(norms, base, "absolute")) == pytest.approx((0.05 + 0.2) / 2)
    assert float(norm_loss(norms, base, "absolute", relative=False)) == pytest.approx((0.5 + 2) / 2)
    assert float(norm_loss(norms, base, "huber")) == pytest.approx((0.05**2 + 2 * 0.1 * 0.2 - 0.1**2) / 2)
    # The same shape in the norm's own unit: 'huber' turns straight at the same relative deviation.
    assert float(norm_loss(norms, base, "huber", relative=False)) == pytest.approx(100 * float(norm_loss(norms, base, "huber")))


@pytest.mark.parametrize("distance", DISTANCES)
def test_every_distance_is_zero_at_the_base_only(distance: str) -> None:
    base = torch.rand(2, 5) + 1
    assert float(norm_loss(base, base, distance)) == 0
    assert float(norm_loss(base * 0.9, base, distance)) > 0
    assert float(norm_loss(base * 1.3, base, distance)) > float(norm_loss(base * 1.2, base, distance))


def test_pinned_loss_by_hand_sees_what_the_norm_does_not() -> None:
    base = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    turned = torch.tensor([[[4.0, 3.0], [1.0, 0.0]]])
    assert float(norm_loss(embedding_norms(turned), embedding_norms(base))) == 0
    assert float(pinned_loss(turned, base)) == pytest.approx((2 / 25 + 0) / 2)
    assert float(pinned_loss(turned, base, "cosine")) == pytest.approx((1 - 24 / 25) / 2)
    assert float(pinned_loss(3 * base, base, "cosine")) == pytest.approx(0, abs=1e-6)
    assert cosine_drift(turned, base) == pytest.approx(0.02)


def test_padding_can_be_left_out_and_a_prompt_counted_as_one() -> None:
    norms, base = torch.tensor([[11.0, 9.0, 20.0]]), torch.tensor([[10.0, 10.0, 10.0]])
    words = torch.tensor([[True, True, False]])
    assert float(norm_loss(norms, base, "absolute", counted=words)) == pytest.approx(0.1)
    assert float(norm_loss(norms, base, "absolute", per_prompt=True)) == pytest.approx(1 / 3)
    assert float(norm_loss(norms, base, "absolute", counted=words, per_prompt=True)) == pytest.approx(0)  # 11 and 9 make 10
    two, of_two = torch.cat([norms, norms]), torch.cat([base, base])
    mixed = torch.tensor([[True, True, False], [True, True, True]])
    # tokens of both prompts alike; prompts of different length alike
    assert float(norm_loss(two, of_two, "absolute", counted=mixed)) == pytest.approx((0.1 * 4 + 1) / 5)
    assert float(norm_loss(two, of_two, "absolute", counted=mixed, per_prompt=True)) == pytest.approx((0 + 1 / 3) / 2)
