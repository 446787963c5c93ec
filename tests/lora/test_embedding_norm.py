"""The embedding-norm term by hand, and that base norms are computed once a caption."""

import pytest
import torch

from sdlora.lora.embedding_norm import BaseNorms, embedding_norms, norm_drift, norm_loss


def test_numbers_by_hand() -> None:
    norms = embedding_norms(torch.tensor([[[3.0, 4.0], [6.0, 8.0]]]))
    assert norms.tolist() == [[5.0, 10.0]]
    base = torch.tensor([[4.0, 20.0]])
    assert float(norm_loss(norms, base)) == pytest.approx((0.25**2 + 0.5**2) / 2)
    assert float(norm_drift(norms, base)) == pytest.approx((0.25 + 0.5) / 2)


def test_loss_is_zero_for_any_rotation_and_pulls_towards_the_base_norm() -> None:
    embeds = torch.randn(2, 5, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    base = embedding_norms(embeds)
    assert float(norm_loss(embedding_norms(embeds @ rotation), base)) < 1e-10
    grown = (embeds * 1.3).requires_grad_()
    norm_loss(embedding_norms(grown), base).backward()
    assert (embedding_norms(grown.detach() - 0.1 * grown.grad) < embedding_norms(grown.detach())).all()


def test_base_norms_encode_each_caption_once() -> None:
    calls: list[list[str]] = []

    def encode(captions: list[str]) -> torch.Tensor:
        calls.append(captions)
        return torch.stack([torch.full((3, 4), float(len(c))) for c in captions])

    norms = BaseNorms(encode)
    first = norms(["ab", "c", "ab"])
    assert first.shape == (3, 3) and float(first[0, 0]) == pytest.approx(4.0)
    norms(["c", "def"])
    assert calls == [["ab", "c"], ["def"]]
