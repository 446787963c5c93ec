"""Parts of a model come to its device and go back to where they were. The device is spied on: there may be only a CPU."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sdlora.models import device
from sdlora.models.device import is_away, let_go, on_device, set_aside

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


class Counted(nn.Linear):
    """Has numbers that no file holds."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("number", torch.ones(1), persistent=False)


def test_what_was_let_go_is_read_anew_where_it_is_asked_for_and_stays() -> None:
    files = Counted()
    vae, read = Counted().eval(), []
    model: Any = SimpleNamespace(vae=vae, device=torch.device("cpu"), loaders={"vae": lambda: read.append("vae") or copy.deepcopy(files)})
    let_go(model, "vae")
    assert vae.weight.is_meta and vae.number.is_meta and is_away(vae)
    with pytest.raises(KeyboardInterrupt), on_device(model, "vae"):
        assert torch.equal(vae(torch.ones(1, 2)), files(torch.ones(1, 2))) and vae.number == 1
        raise KeyboardInterrupt
    assert not is_away(vae) and not vae.weight.requires_grad and not vae.training
    with on_device(model, "vae"):
        pass
    assert read == ["vae"]
    let_go(model, "vae")
    set_aside(model, "vae")
    assert vae.weight.device.type == "cpu" and read == ["vae", "vae"]


def test_memory_is_returned_where_more_is_held_than_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    held, returns = [100], []

    def trim(pad: int) -> None:
        returns.append(held[0])
        held[0] -= 30

    monkeypatch.setattr(device, "process_bytes", lambda: held[0])
    returned = device.Returned(SimpleNamespace(malloc_trim=trim))  # type: ignore[arg-type]
    for more, left in ((0, 70), (0, 70), (10, 50), (15, 65), (40, 75), (0, 75)):
        held[0] += more
        with returned:
            pass
        assert held[0] == left
    assert returns == [100, 80, 105]


@pytest.mark.skipif(device.glibc() is None, reason="memory is not glibc's")
def test_checkpointed_blocks_return_memory_before_either_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    monkeypatch.setattr(device.Returned, "__enter__", lambda self: entered.append(1))
    block = SimpleNamespace(train=lambda: block, enable_gradient_checkpointing=lambda function: setattr(block, "function", function))
    device.checkpoint_activations(SimpleNamespace(parts={"unet": block}, device=torch.device("cpu")))  # type: ignore[arg-type]
    x = torch.ones(2, requires_grad=True)
    block.function(lambda x: (x * x).exp(), x).sum().backward()
    assert len(entered) == 2


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
