"""Parts of a model come to its device and go back to where they were. The device is spied on: there may be only a CPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sdlora.models.device import let_go, on_device, set_aside

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


def test_what_was_let_go_computes_nothing() -> None:
    vae = nn.Linear(2, 2)
    let_go(SimpleNamespace(vae=vae), "vae")  # type: ignore[arg-type]
    assert vae.weight.is_meta
    with pytest.raises(NotImplementedError), on_device(SimpleNamespace(vae=vae, device=torch.device("cpu")), "vae"):  # type: ignore[arg-type]
        pass


def has_large_pages() -> bool:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return enabled.exists() and "[never]" not in enabled.read_text()


@pytest.mark.skipif(not has_large_pages(), reason="the system gives no pages of 2 MiB")
def test_large_tensors_lie_in_large_pages() -> None:
    """A page of 4 KiB at a time, 64 MiB would be 16,384."""
    code = (
        "import resource, sdlora.models.sources, torch\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "tensor = torch.ones(2**24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    unset = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    told = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=unset).stdout
    assert int(told) < 4000
