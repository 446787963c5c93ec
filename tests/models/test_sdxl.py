"""SDXL: encoding, prediction and drawing agree with diffusers; sizes reach the UNet; the layers that nobody hears are left alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from PIL import ImageChops
from tiny import PROJECTED, WIDTH, WIDTH_2, build_model

from sdlora.adapt import adapt
from sdlora.config import Config
from sdlora.errors import ConfigError, WeightsError
from sdlora.lora.targets import selects
from sdlora.models import families
from sdlora.models.family import PicturePrompt
from sdlora.models.sampling import generate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny", family="sdxl")


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Any:
    loaded = StableDiffusionXLPipeline.from_pretrained(tiny, add_watermarker=False)
    loaded.scheduler = DPMSolverMultistepScheduler.from_config(loaded.scheduler.config)
    return loaded


def test_prompts_agree_with_diffusers(tiny: Path, pipeline: Any) -> None:
    family, model = families.load(str(tiny), torch.float32, CPU)
    assert family.name == "sdxl" and model.text_encoders == ("text_encoder", "text_encoder_2")
    ours = family.encode_prompts(model, ["a cat", "dog, big", ""])
    assert [tuple(t.shape) for t in ours.vectors] == [(3, 16, WIDTH), (3, 16, WIDTH_2), (3, 1, PROJECTED)]
    theirs, _, theirs_pooled, _ = pipeline.encode_prompt(["a cat", "dog, big", ""], None, CPU, 1, False)
    torch.testing.assert_close(ours.prompt_embeds, theirs)
    torch.testing.assert_close(ours.pooled, theirs_pooled)


def test_a_prompt_of_several_chunks_is_pooled_over_its_first(tiny: Path) -> None:
    family, two = families.load(str(tiny), torch.float32, CPU, chunks=2)
    _, one = families.load(str(tiny), torch.float32, CPU)
    words = "a b c d e f g h i j k l m n"  # a token each: a chunk of the tiny model's 16
    long, first, rest = (family.encode_prompts(m, [p]) for m, p in ((two, words + " o p q"), (one, words), (one, "o p q")))
    torch.testing.assert_close(long.prompt_embeds, torch.cat([first.prompt_embeds, rest.prompt_embeds], dim=1))
    torch.testing.assert_close(long.pooled, first.pooled)


@pytest.mark.parametrize("negative", ["", "dog"])
def test_pictures_agree_with_diffusers(tiny: Path, pipeline: Any, negative: str) -> None:
    """Also beside a picture with another negative prompt."""
    family, model = families.load(str(tiny), torch.float32, CPU)
    prompts = [PicturePrompt("a cat", text, seed=3, steps=4, guidance=5.0, width=48) for text in (negative, "other")]
    drawn, _ = generate(family, model, prompts, 2)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "width": 48, "height": 32, "generator": torch.Generator().manual_seed(3)}
    picture = pipeline("a cat", negative_prompt=negative or None, **options).images[0]
    assert drawn.size == (48, 32)
    assert max(high for _, high in ImageChops.difference(drawn, picture).getextrema()) <= 1


def test_the_unet_is_told_the_sizes(tiny: Path, pipeline: Any) -> None:
    family, model = families.load(str(tiny), torch.float32, CPU)
    embeds = family.encode_prompts(model, ["a cat", "dog"])
    noisy, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([10, 700])
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32], [90, 50, 7, 0, 32, 32]])
    with torch.no_grad():
        ours = family.predict(model, noisy, timesteps, embeds, sizes)
        added = {"text_embeds": embeds.pooled, "time_ids": sizes}
        theirs = pipeline.unet(noisy, timesteps, embeds.prompt_embeds, added_cond_kwargs=added).sample
        same_sizes = family.predict(model, noisy, timesteps, embeds, sizes[:1].expand(2, -1))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(same_sizes[0], ours[0])
    assert (same_sizes[1] - ours[1]).abs().max() > 1e-3


def test_only_layers_that_are_heard_are_adapted_each_encoder_at_its_own_rate(tiny: Path) -> None:
    def rates(**options: Any) -> dict[str, float]:
        groups = ["attention", "feed_forward", "projection"]
        lora = {"text_encoder": groups, "unet": ["everything"]}
        config = {"model": {"base": str(tiny)}, "lora": lora, "optimizer": {"rate": 1.0, **options}}
        _, model = families.load(str(tiny), torch.float32, CPU)
        return adapt(model, Config.model_validate(config)).rates

    found = rates(text_encoder_rate=0.5, layer_rates={"te2.2": 0.125})
    first, second = ({n: r for n, r in found.items() if n.startswith(f"{part}.")} for part in ("text_encoder", "text_encoder_2"))
    assert len(first) == 6 and all(selects("te.0", name) and rate == 0.5 for name, rate in first.items())
    assert len(second) == 3 * 6 + 1 and second["text_encoder_2.text_projection"] == 0.5
    assert [name for name, rate in second.items() if rate == 0.125] == [name for name in second if selects("te2.2", name)] != []
    assert {"unet.add_embedding.linear_1", "unet.add_embedding.linear_2"} < found.keys()
    assert not any(name.startswith("text_encoder_2") for name in rates(text_encoder_2_rate=0.0))
    assert rates(text_encoder_2_rate=0.25)["text_encoder_2.text_projection"] == 0.25
    with pytest.raises(ConfigError, match=r"te\.1"):  # SDXL's first encoder is heard at its last layer but one
        rates(layer_rates={"te.1": 0.1})


def test_clip_skip_is_refused(tiny: Path) -> None:
    with pytest.raises(WeightsError, match="clip_skip = 2: SDXL always"):
        families.load(str(tiny), torch.float32, CPU, clip_skip=2)
