"""Parts of a model come to its device and go back to where they were. The device is spied on: there may be only a CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sdlora.models.device import on_device, set_aside

GPU = torch.device("cuda:7")  # that nobody has


class Part(nn.Linear):
    """Tells where it was sent, and says that it is there."""

    def __init__(self, at: torch.device) -> None:
        super().__init__(1, 1)
        self.at = at

    def to(self, device: Any) -> "Part":  # type: ignore[override]
        self.at = torch.device(device)
        return self

    def parameters(self, recurse: bool = True) -> Any:
        return iter([SimpleNamespace(device=self.at)])


def test_parts_come_and_go_back_where_they_were_whatever_happens() -> None:
    vae, text_encoder, unet = Part(GPU), Part(GPU), Part(GPU)
    model: Any = SimpleNamespace(device=GPU, vae=vae, parts={"unet": unet, "text_encoder": text_encoder})
    set_aside(model, "vae")
    assert [part.at.type for part in (vae, text_encoder, unet)] == ["cpu", "cuda", "cuda"]
    with on_device(model, "vae", "text_encoder"):
        assert vae.at == text_encoder.at == GPU
    assert [part.at.type for part in (vae, text_encoder, unet)] == ["cpu", "cuda", "cuda"]  # one that is trained stays
    set_aside(model, "text_encoder")
    with pytest.raises(KeyboardInterrupt), on_device(model, "text_encoder"):
        raise KeyboardInterrupt
    assert text_encoder.at.type == "cpu"
