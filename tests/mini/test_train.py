"""The script that trains the embedded model: each stage runs, goes on where it was cut off, and packs what loads."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import AutoencoderKL

from sdlora.mini import world
from sdlora.mini.train import LATENT_SCALE, as_tensor, main, new_tokenizer, new_vae, normalise_latents
from sdlora.models import families
from sdlora.models.family import PicturePrompt
from sdlora.models.sampling import generate


def test_stages_resume_and_pack(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for work, parts in ((straight, (3,)), (broken, (2, 3))):
        for name in ("vae", "base"):
            for steps in parts:
                main([name, "--work", str(work), "--schedule-steps", "3", "--steps", str(steps), "--batch", "2", "--pictures", "8"])
    for name in ("vae", "base"):
        one, other = (torch.load(work / f"{name}.pt", weights_only=True) for work in (straight, broken))
        assert one["step"] == other["step"] == 3
        assert all(torch.equal(one["module"][key], other["module"][key]) for key in one["module"])
        assert json.loads((straight / f"{name}.jsonl").read_text().splitlines()[-1])["loss"] > 0

    main(["pack", "--work", str(straight), "--out", str(tmp_path / "packed")])
    family, model = families.load(str(tmp_path / "packed"), torch.float32, torch.device("cpu"))
    assert generate(family, model, [PicturePrompt("a fox", steps=1)])[0].size == (64, 64)
    assert 10e6 < sum(p.stat().st_size for p in (tmp_path / "packed").rglob("*.safetensors")) < 20e6


def test_latents_get_unit_variance_and_pictures_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = new_vae()
    rng = Random(4)
    pixels = as_tensor([world.render(world.sample_scene(rng), rng) for _ in range(16)])
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        noise_before = vae.encode(pixels).latent_dist.std / vae.encode(pixels).latent_dist.mean.std((0, 2, 3), keepdim=True)
        normalise_latents(vae, seed=0, count=64)
        posterior = vae.encode(pixels).latent_dist
        torch.testing.assert_close(vae.decode(posterior.mean).sample, before, atol=2e-3, rtol=0)
        scaled = posterior.mean * LATENT_SCALE
        noise_after = posterior.std / posterior.mean.std((0, 2, 3), keepdim=True)
    assert scaled.std((0, 2, 3)).tolist() == pytest.approx([1.0] * 4, rel=0.4)  # other pictures than those it was measured on
    torch.testing.assert_close(noise_after, noise_before, rtol=1e-2, atol=0)
    assert isinstance(vae, AutoencoderKL)


def test_tokenizer_is_clips_kind_and_knows_the_world(tmp_path: Path) -> None:
    tokenizer = new_tokenizer(tmp_path)
    assert len(tokenizer) == 1536 and tokenizer.model_max_length == 77
    ids = tokenizer("a small red heart on a blue background").input_ids
    assert len(ids) == 10 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:-1]) == "a small red heart on a blue background"
    assert len(set(tokenizer("ohwx zebra, 3!").input_ids)) > 5  # what it has never seen falls into letters, not into one unknown
