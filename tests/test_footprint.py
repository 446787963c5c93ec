"""The estimate against a real step, tensor by tensor; which options would help, and that what runs out of memory says so."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_model
from torch import nn

from sdlora import config as configs
from sdlora import footprint
from sdlora.adapt import adapt, load_model
from sdlora.errors import TrainingError
from sdlora.footprint import Work, estimate, savings
from sdlora.models import attention, memory
from sdlora.models.family import Model

GIB = 2**30


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("footprint") / "tiny")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("footprint") / "sdxl", family="sdxl")


def make(base: Path, **options: Any) -> Work:
    flags = {"model.base": base, "precision": "fp32", "rank": 4, "resolution": 64, "bucket_step": 8, "device": "cpu"}
    flags |= {name.replace("__", "."): value for name, value in options.items()}
    config = configs.load([], [(name, str(value)) for name, value in flags.items()])
    _, model = load_model(config)
    return Work(config, model, list(adapt(model, config).layers), (64, 64), reads_prompts=False)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": "true", "precision": "bf16"},
    "batches, prior, pinned": {"batch_size": 3, "accumulation": 2, "loss__prior": 1, "prior_samples": 2, "loss__pinned_embedding": 1},
    "fp8": {"base_precision": "fp8", "gradient_checkpointing": "true"},
    "text encoder alone": {"lora.unet": "[]"},
    "UNet alone, long prompts": {"lora.text_encoder": "[]", "max_tokens": 150, "prompt_weights": "true"},
    "DoRA, biases": {"lora.kind": "dora", "biases": "true", "output.format": "exact"},
    "full": {"lora.kind": "full"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_step_on_meta_takes_what_a_real_one_takes(base: Path, options: dict[str, Any]) -> None:
    assert_alike(make(base, **options))


def test_so_it_does_in_sdxl(sdxl: Path) -> None:
    assert_alike(make(sdxl, precision="bf16", loss__prior=1, gradient_checkpointing="true"))


def test_so_it_does_where_attention_is_in_blocks(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LEAST_SIZE", 1)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert_alike(make(base, precision="bf16"))


def assert_alike(work: Work) -> None:
    """The peak of a step on meta, and of a real one."""
    shadow = footprint.shadow_of(work)
    of_shadow = memory.peak_bytes(lambda: footprint.step(work, shadow, trained(shadow)), "cpu", shadow.dtype)
    ledger = memory.Ledger(memory.convolution_on_cpu)
    with ledger:
        footprint.step(work, work.model, trained(work.model))
    assert of_shadow == pytest.approx(ledger.peak, rel=0.01)


def trained(model: Model) -> list[nn.Parameter]:
    return [parameter for part in model.parts.values() for parameter in part.parameters() if parameter.requires_grad]


def test_what_makes_a_step_larger(base: Path) -> None:
    def taken(**options: Any) -> int:
        work = make(base, **options)
        return estimate(replace(work, model=replace(work.model, program_bytes=0)))

    plain = taken()
    for larger in ({"batch_size": 2}, {"loss__prior": 1}, {"rank": 8}, {"ema": 0.9}, {"accumulation": 2}):
        assert taken(**larger) > plain, larger
    for smaller in ({"gradient_checkpointing": "true"}, {"precision": "bf16"}, {"algorithm": "lion"}):
        assert taken(**smaller) < plain, smaller


def test_a_gpu_holds_no_vae_and_no_text_encoder_that_rests(base: Path) -> None:
    work = make(base, **{"lora.text_encoder": "[]"})
    gpu = replace(work, model=replace(work.model, device=torch.device("cuda")))
    encoders = memory.weight_bytes(*(work.model.parts[part] for part in work.model.text_encoders))
    shadow = footprint.shadow_of(gpu)
    rests, reads = (footprint.held_bytes(replace(gpu, reads_prompts=on), shadow) for on in (False, True))
    assert rests == memory.weight_bytes(work.model.parts["unet"]) and reads == rests + encoders
    away = make(base, offload="true", **{"lora.text_encoder": "[]"})
    away = replace(away, model=replace(away.model, device=torch.device("cuda")))
    outside = sum(p.nbytes for name, p in work.model.parts["unet"].named_parameters() if "blocks." not in name and "mid_block." not in name)
    biases = sum(p.nbytes for name, p in work.model.parts["unet"].named_parameters() if p.dim() < 2)
    assert outside < footprint.held_bytes(away, footprint.shadow_of(away)) < rests / 2 + biases


def test_a_cpu_holds_the_program_and_for_previews_all_parts(base: Path) -> None:
    work, drawing = (make(base, **{"lora.text_encoder": "[]"}, **options) for options in ({}, {"prompts": "a cat"}))
    shadow = footprint.shadow_of(work)
    rests, draws = (footprint.held_bytes(each, shadow) - each.model.program_bytes for each in (work, drawing))
    encoders = memory.weight_bytes(*(work.model.parts[part] for part in work.model.text_encoders))
    assert rests == memory.weight_bytes(work.model.parts["unet"])
    assert draws == rests + encoders + memory.weight_bytes(work.model.vae)
    assert work.model.program_bytes > 100 * 2**20  # PyTorch alone takes more


def test_the_options_that_help_most_come_first_and_keep_their_word(base: Path) -> None:
    work = make(base, batch_size=4, loss__prior=1)
    work = replace(work, model=replace(work.model, program_bytes=0))
    found = savings(work)
    amounts, texts = zip(*found, strict=True)
    assert list(amounts) == sorted(amounts, reverse=True)
    assert {"train.batch_size = 1 with train.accumulation = 4", "train.gradient_checkpointing = true", "loss.prior = 0"} <= set(texts)
    kept = make(base, batch_size=1, accumulation=4, loss__prior=1)
    promised = {text: saved for saved, text in found}["train.batch_size = 1 with train.accumulation = 4"]
    assert estimate(replace(kept, model=replace(kept.model, program_bytes=0))) == estimate(work) - promised
    frugal = make(base, gradient_checkpointing="true", precision="bf16", base_precision="fp8", **{"lora.text_encoder": "[]"})
    assert [text for text, _ in footprint.alternatives(frugal)] == ["data.resolution = 48"]


def test_too_much_is_told_before_and_enough_is_not(base: Path) -> None:
    work = make(base, batch_size=4)
    (warned,) = footprint.warnings(work, 2**50)
    assert warned.message.startswith("A step takes about 1048576.0 GiB at its peak and cpu has ")
    assert list(footprint.warnings(work, estimate(work))) == []


def test_running_out_of_memory_names_the_three_that_help_most(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = make(base)
    monkeypatch.setattr(footprint, "savings", lambda work: [(4 * GIB, "a = 1"), (2 * GIB, "b = 2"), (GIB, "c = 3"), (GIB // 2, "d = 4")])

    def out_of_gpu() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for fail in (partial(torch.empty, 2**50, dtype=torch.uint8), out_of_gpu):
        with pytest.raises(TrainingError) as error, footprint.memory_errors_explained(work):
            fail()
        assert str(error.value).startswith("cpu has no memory left for a step, which takes about ")
        assert str(error.value).endswith(
            "; what would help most: a = 1 (about 4.0 GiB less), b = 2 (about 2.0 GiB less), c = 3 (about 1.0 GiB less)."
        )
    with pytest.raises(RuntimeError, match="shapes"), footprint.memory_errors_explained(work):
        raise RuntimeError("shapes cannot be multiplied")
