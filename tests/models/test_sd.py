"""Stable Diffusion 1.x: what loads, what is refused, and that encoding and drawing agree with diffusers."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from tiny import build_model

from sdlora.adapt import heard
from sdlora.errors import ConfigError, WeightsError
from sdlora.lora.targets import find_targets
from sdlora.models import convolutions, families
from sdlora.models.family import PicturePrompt
from sdlora.models.images import encode_images
from sdlora.models.sampling import generate
from sdlora.models.text import token_masks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny")


def test_tiny_is_tiny(tiny: Path) -> None:
    assert sum(p.stat().st_size for p in tiny.rglob("*.safetensors")) < 1_000_000


def test_prompts_and_pictures_agree_with_diffusers(tiny: Path) -> None:
    family, model = families.load(str(tiny), torch.float32, CPU)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    theirs, _ = pipeline.encode_prompt(["a cat", ""], CPU, 1, False)
    torch.testing.assert_close(family.encode_prompts(model, ["a cat", ""]).prompt_embeds, theirs)
    (drawn,) = generate(family, model, [PicturePrompt("a cat", "dog", seed=3, steps=4, guidance=5.0)])
    picture = pipeline(
        "a cat", negative_prompt="dog", num_inference_steps=4, guidance_scale=5.0, generator=torch.Generator().manual_seed(3)
    ).images[0]
    assert drawn.size == (32, 32)
    assert max(high for _, high in ImageChops.difference(drawn, picture).getextrema()) <= 1
    (wide,) = generate(family, model, [PicturePrompt("a", width=64, height=32, steps=1)])
    assert wide.size == (64, 32)


def test_clip_skip_takes_the_hidden_states_of_an_earlier_layer_through_the_final_norm(tiny: Path) -> None:
    _, whole = families.load(str(tiny), torch.float32, CPU)
    encoder: Any = whole.parts["text_encoder"]
    ids = whole.tokenizer(["a cat", ""], padding="max_length", return_tensors="pt").input_ids
    states = encoder(ids, output_hidden_states=True).hidden_states  # of the embeddings, then of each of two layers
    for clip_skip in (1, 2):
        family, model = families.load(str(tiny), torch.float32, CPU, clip_skip=clip_skip)
        torch.testing.assert_close(family.encode_prompts(model, ["a cat", ""]).prompt_embeds, encoder.final_layer_norm(states[-clip_skip]))
    found = heard(find_targets("text_encoder", model.parts["text_encoder"], ["attention"]), model)
    assert [name for name in found if "layers.0." in name] == list(found)
    with pytest.raises(WeightsError, match=r"clip_skip = 3: the text encoder has 2 layers only"):
        families.load(str(tiny), torch.float32, CPU, clip_skip=3)


def test_long_prompts_are_encoded_in_chunks_each_with_its_own_start_and_end(tiny: Path) -> None:
    family, one = families.load(str(tiny), torch.float32, CPU)
    _, three = families.load(str(tiny), torch.float32, CPU, chunks=3)
    word = "abcdefghijklmn"  # 14 letters, a token each: a chunk of the tiny model's 16
    prompts = ["", "cat", word, word + "cat", word * 2 + "xyz", word * 9]
    embeds = family.encode_prompts(three, prompts).prompt_embeds
    assert embeds.shape == (6, three.prompt_tokens, 16) == (6, 48, 16)
    start, end = one.tokenizer.bos_token_id, one.tokenizer.eos_token_id
    letters = one.tokenizer(word * 2 + "xyz", add_special_tokens=False).input_ids
    assert len(letters) == 31
    by_hand = [[start, *letters[:14], end], [start, *letters[14:28], end], [start, *letters[28:], *[end] * 12]]
    torch.testing.assert_close(embeds[4], one.parts["text_encoder"](torch.tensor(by_hand)).last_hidden_state.flatten(0, 1))
    torch.testing.assert_close(embeds[1], torch.cat(list(family.encode_prompts(one, ["cat", "", ""]).prompt_embeds)))
    counts = [mask.unflatten(0, (3, 16)).sum(dim=1).tolist() for mask in token_masks(three, prompts)]
    assert counts == [[2, 0, 0], [5, 0, 0], [16, 0, 0], [16, 5, 0], [16, 16, 5], [16, 16, 16]]
    assert token_masks(three, ["cat"])[0].tolist() == [True] * 5 + [False] * 43
    (drawn,) = generate(family, three, [PicturePrompt(word * 2, steps=1)])
    assert drawn.size == (32, 32)


def test_brackets_weigh_what_is_in_them_where_they_are_asked_to(tiny: Path) -> None:
    """In each chunk by itself, and its mean stays; the word itself is found in the same place without its brackets."""
    family, plain = families.load(str(tiny), torch.float32, CPU, chunks=2)
    _, weighs = families.load(str(tiny), torch.float32, CPU, chunks=2, prompt_weights=True)
    assert plain.text_fingerprint != weighs.text_fingerprint
    rest = "abcdefghijklmn"  # 14 letters fill the first chunk
    (before,) = family.encode_prompts(plain, [f"{rest} cat"]).prompt_embeds.unflatten(1, (2, 16))
    (after,) = family.encode_prompts(weighs, [f"{rest} (cat:1.5)"]).prompt_embeds.unflatten(1, (2, 16))
    torch.testing.assert_close(after[0], before[0])
    factor = after[1] / before[1]
    torch.testing.assert_close(factor[1:4], factor[:1].expand(3, -1) * 1.5)
    torch.testing.assert_close(after[1].mean(), before[1].mean())
    torch.testing.assert_close(*(family.encode_prompts(model, ["a cat"]).prompt_embeds for model in (plain, weighs)))


def test_pictures_drawn_together_are_those_drawn_alone(tiny: Path) -> None:
    family, model = families.load(str(tiny), torch.float32, CPU)
    prompts = [PicturePrompt("a cat", "b" * n, seed=n, steps=2, width=64 if n == 2 else None) for n in range(5)]
    together, alone = generate(family, model, prompts, 3), generate(family, model, prompts)
    assert [picture.size for picture in together] == [(64 if n == 2 else 32, 32) for n in range(5)]
    for one, other in zip(together, alone, strict=True):
        assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1
    assert alone[0].tobytes() != alone[1].tobytes()


def test_latents_have_the_models_scale(tiny: Path) -> None:
    _, model = families.load(str(tiny), torch.float32, CPU)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, std = encode_images(model, pixels)
    assert mean.shape == std.shape == (2, 4, 16, 24)
    posterior = model.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean * model.vae.config.scaling_factor)
    torch.testing.assert_close(std, posterior.std * model.vae.config.scaling_factor)


def test_large_pictures_are_taken_in_tiles_where_asked_and_small_ones_whole(tiny: Path) -> None:
    _, whole = families.load(str(tiny), torch.float32, CPU)
    _, tiled = families.load(str(tiny), torch.float32, CPU, vae_tile=64)
    assert whole.vae_fingerprint != tiled.vae_fingerprint
    seen: list[tuple[int, ...]] = []
    tiled.vae.encoder.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    pixels = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, wanted = (encode_images(model, pixels)[0] for model in (tiled, whole))
    assert {shape[0] for shape in seen} == {1} and max(max(shape[2:]) for shape in seen) == 64  # one picture at a time, too
    assert found.shape == wanted.shape == (2, 4, 48, 32)
    assert 0 < (found - wanted).abs().mean() < 0.2 * wanted.std()
    torch.testing.assert_close(*(encode_images(model, pixels[:, :, :64])[0] for model in (tiled, whole)))


def test_xformers_is_refused_where_it_cannot_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model.attention = 'xformers' runs on CUDA alone, and this is cpu: set it to 'sdpa'"):
        families.load(str(tiny), torch.float32, CPU, attention="xformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs xformers: pip install 'sdlora\[xformers\]'"):
        families.require_xformers(torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available() or importlib.util.find_spec("xformers") is None, reason="needs a GPU and xformers")
def test_xformers_computes_what_sdpa_does(tiny: Path) -> None:
    gpu, predictions = torch.device("cuda"), []
    for attention in ("sdpa", "xformers"):
        family, model = families.load(str(tiny), torch.float32, gpu, attention=attention)
        noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(gpu)
        with torch.no_grad():
            prompts = family.encode_prompts(model, ["a cat", ""])
            predictions.append(family.predict(model, noisy, torch.tensor([10, 900], device=gpu), prompts, torch.zeros(2, 6, device=gpu)))
    torch.testing.assert_close(*predictions, rtol=1e-3, atol=1e-4)


def test_fingerprints_follow_weights_scale_precision_and_tokenizer_but_not_the_folder(tiny: Path, tmp_path: Path) -> None:
    def prints(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
        _, model = families.load(str(folder), dtype, CPU)
        return model.vae_fingerprint, model.text_fingerprint

    vae, text = prints(tiny)
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert prints(moved) == (vae, text)
    half = prints(tiny, torch.bfloat16)
    assert half[0] == vae and half[1] != text  # the VAE is always in fp32
    config = json.loads((moved / "vae" / "config.json").read_text())
    (moved / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    tokens = json.loads((moved / "tokenizer" / "tokenizer_config.json").read_text())
    (moved / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(tokens | {"model_max_length": 8}))
    scaled = prints(moved)
    assert scaled[0] != vae and scaled[1] != text
    for part in ("vae", "text_encoder"):
        (path,) = (tiny / part).glob("*.safetensors")
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] += 1e-3
        save_file(tensors, shutil.copytree(tiny, tmp_path / part) / part / path.name, {"format": "pt"})
    assert (prints(tmp_path / "vae")[0] != vae, prints(tmp_path / "vae")[1] == text) == (True, True)
    assert (prints(tmp_path / "text_encoder")[0] == vae, prints(tmp_path / "text_encoder")[1] != text) == (True, True)


def test_prediction_type_comes_from_the_scheduler(tmp_path: Path) -> None:
    _, model = families.load(str(build_model(tmp_path / "v", "v_prediction")), torch.float32, CPU)
    assert model.noise_schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no unet", "has no unet"),
        ("no index", "no model_index.json"),
        ("other class", "is for FluxPipeline"),
        ("broken index", "damaged"),
        ("no weights", "cannot load"),
        ("inpainting", "inpainting"),
    ],
)
def test_wrong_folders_get_one_sentence(tiny: Path, tmp_path: Path, damage: str, message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    index = folder / "model_index.json"
    if damage == "no unet":
        shutil.rmtree(folder / "unet")
    elif damage == "no index":
        index.unlink()
    elif damage == "other class":
        index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    elif damage == "broken index":
        index.write_text("{")
    elif damage == "no weights":
        next((folder / "unet").glob("*.safetensors")).unlink()
    else:
        config = UNet2DConditionModel.load_config(folder / "unet") | {"in_channels": 9}
        UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(WeightsError) as error:
        families.load(str(folder), torch.float32, CPU)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_pictures_are_rgb(tiny: Path) -> None:
    family, model = families.load(str(tiny), torch.float32, CPU)
    (drawn,) = generate(family, model, [PicturePrompt("a", steps=1)])
    assert isinstance(drawn, Image.Image) and drawn.mode == "RGB"


def test_weights_put_into_another_order_leave_their_file_as_it_is(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may lie in memory that is mapped to it."""
    file = tiny / "unet" / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    monkeypatch.setattr(convolutions, "LEAST_WEIGHTS", 1)
    _, model = families.load(str(tiny), torch.float32, CPU)
    assert any(isinstance(module, convolutions.WideConv2d) for module in model.parts["unet"].modules())
    del model
    assert file.read_bytes() == before
