"""Base models from folders, single files, pickles and the hub: the same weights whatever they come in, or one sentence."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from originals import VAE_CONFIG, Original, build_original, save_configs, text_config, unet_config
from safetensors.torch import load_file, save_file
from tiny import build_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.errors import WeightsError
from sdlora.models import families, sources
from sdlora.models.sources import load
from sdlora.models.tokenizer import clip_tokenizer, tokenizer_of

FAMILIES = ("sd1", "sd2", "sdxl")
IDS = torch.tensor([[18, 3, 7, 11, 19, 0, 0, 0, 0], [18, 5, 19, 0, 0, 0, 0, 0, 0]])


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped configs are of full-size models; those of the small ones stand in their place."""
    for family in FAMILIES:
        save_configs(tmp_path / "configs", family)
    monkeypatch.setattr(sources, "CONFIGS", tmp_path / "configs")
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_predicts_the_same_bits_as_its_weights_in_diffusers(small: Path, family: str, dtype: torch.dtype) -> None:
    original = build_original(small / "a.safetensors", family, dtype)
    assert_same(load(str(original.path), torch.float32), original, family)


def whole(found: sources.Components) -> dict[str, Any]:
    """All of its networks."""
    return {"unet": found.unet, **{name: part.load() for name, part in found.parts.items()}}


def assert_same(found: sources.Components, original: Original, family: str) -> None:
    assert found.family == family
    unet = UNet2DConditionModel(**unet_config(family))
    unet.load_state_dict(of_part(original, "unet"))
    vae = AutoencoderKL(**VAE_CONFIG)
    vae.load_state_dict(original.vae)
    encoders: list[Any] = [CLIPTextModel(text_config(family, "text_encoder"))]
    if family == "sdxl":
        encoders.append(CLIPTextModelWithProjection(text_config(family, "text_encoder_2")))
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    embeds = torch.randn(2, 5, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(2, 6), "time_ids": torch.randn(2, 6)}
    pixels = torch.randn(1, 3, 16, 16)
    loaded = whole(found)
    with torch.no_grad():
        ours, theirs = (m(noisy, timesteps, embeds, added_cond_kwargs=added).sample for m in (found.unet.eval(), unet.eval()))
        assert torch.equal(ours, theirs)
        assert torch.equal(loaded["vae"].encode(pixels).latent_dist.mean, vae.encode(pixels).latent_dist.mean)
        assert torch.equal(loaded["vae"].decode(noisy).sample, vae.decode(noisy).sample)
        assert list(loaded)[2:] == ["text_encoder", "text_encoder_2"][: len(encoders)]
        for number, encoder in enumerate(encoders):
            name = "text_encoder_2" if number else "text_encoder"
            state = of_part(original, name)
            encoder.load_state_dict(state if number else {key.removeprefix("text_model."): value for key, value in state.items()})
            ours, theirs = (model.eval()(IDS, output_hidden_states=True) for model in (loaded[name], encoder))
            assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
            assert torch.equal(ours[0], theirs[0])  # the last state, or what is pooled of it


@pytest.mark.parametrize("in_folder", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shell_is_the_whole_but_for_its_numbers(small: Path, family: str, in_folder: bool) -> None:
    folder = build_model(small / "tiny", family=family) if in_folder else build_original(small / "a.safetensors", family).path
    for part in load(str(folder), torch.bfloat16).parts.values():
        shell, there = part.shell(), part.load()
        configs = [network.config if isinstance(network, AutoencoderKL) else network.config.to_dict() for network in (shell, there)]
        assert without(configs[0], "_name_or_path", "dtype") == without(configs[1], "_name_or_path", "dtype")
        assert shell.dtype == there.dtype == part.dtype and all(path.is_file() for path in part.files)
        for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
            alike = [{name: (t.shape, t.dtype) for name, t in tensors(network)} for network in (shell, there)]
            assert alike[0] == alike[1] and all(t.is_meta for _, t in tensors(shell))
        assert [name for name, _ in shell.named_modules()] == [name for name, _ in there.named_modules()]


def without(table: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in names}


def of_part(original: Original, part: str) -> dict[str, torch.Tensor]:
    prefix = f"{part}."
    return {key.removeprefix(prefix): tensor.float() for key, tensor in original.parameters.items() if key.startswith(prefix)}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_ckpt_of_tensors_alone_is_read(small: Path, zipped: bool) -> None:
    original = build_original(small / "a.safetensors", "sd1")
    torch.save({"state_dict": original.tensors, "global_step": 7}, small / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(load(str(small / "a.ckpt"), torch.float32), original, "sd1")


def test_a_ckpt_that_runs_something_is_not_opened(small: Path) -> None:
    canary = small / "canary"

    class Gadget:
        def __reduce__(self) -> Any:
            return (Path.touch, (canary,))

    torch.save({"state_dict": {"a": torch.zeros(1)}, "callback": Gadget()}, small / "a.ckpt")
    (small / "b.ckpt").write_bytes(pickle.dumps(Gadget()))
    shutil.copy(small / "b.ckpt", small / "c.safetensors")
    for name in ("a.ckpt", "b.ckpt", "c.safetensors"):
        with pytest.raises(WeightsError) as error:
            load(str(small / name), torch.float32)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert not canary.exists()


def test_what_a_file_predicts_is_marked_asked_for_or_assumed_aloud(small: Path) -> None:
    def schedule(family: str, *, marks: tuple[str, ...] = (), asked: str | None = None) -> tuple[str, int]:
        original = build_original(small / "a.safetensors", family)
        save_file(original.tensors | {mark: torch.zeros(0) for mark in marks}, original.path)
        found = load(str(original.path), torch.float32, prediction_type=asked)
        return found.scheduler.config.prediction_type, len(found.notes)

    assert schedule("sd1") == schedule("sdxl") == ("epsilon", 0)
    assert schedule("sdxl", marks=("v_pred",)) == ("v_prediction", 0)
    assert schedule("sd2") == ("v_prediction", 1)
    assert schedule("sd2", asked="epsilon") == ("epsilon", 0)
    assert schedule("sdxl", marks=("v_pred",), asked="epsilon") == ("epsilon", 0)
    original = build_original(small / "z.safetensors", "sdxl")
    save_file(original.tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, original.path)
    _, model = families.load(str(original.path), torch.float32, torch.device("cpu"))
    assert float(model.noise_schedule.snr(torch.tensor(999))) == pytest.approx(0, abs=1e-6)


def test_who_predicts_noise_hands_it_back() -> None:
    """The miniature does; made to predict v it does not: v = (noise - sqrt(1 - a) x) / sqrt(a)."""
    found = load("mini", torch.float32)
    assert sources.measured(found.unet)[0] == "epsilon"
    last = found.scheduler.alphas_cumprod[-1]

    class Velocity:
        dtype, config = torch.float32, found.unet.config

        def __call__(self, x: torch.Tensor, timestep: int, states: torch.Tensor) -> Any:
            out = found.unet(x, timestep, states)
            out.sample = (out.sample - (1 - last).sqrt() * x) / last.sqrt()
            return out

    assert sources.measured(Velocity())[0] == "v_prediction"


@pytest.mark.parametrize("mark", ["edm_vpred.sigma_max", "edm_mean"])
def test_other_noise_is_refused(small: Path, mark: str) -> None:
    original = build_original(small / "a.safetensors", "sdxl")
    save_file(original.tensors | {mark: torch.zeros(1)}, original.path)
    with pytest.raises(WeightsError, match="whose noise is not that of SDXL"):
        load(str(original.path), torch.float32)


def test_a_second_name_of_the_projection_is_of_one_that_is_not_transposed(small: Path) -> None:
    original = build_original(small / "a.safetensors", "sdxl")
    name = "conditioner.embedders.1.model.text_projection"
    save_file(
        {k: t for k, t in original.tensors.items() if k != name} | {f"{name}.weight": original.tensors[name].T.contiguous()}, original.path
    )
    assert_same(load(str(original.path), torch.float32), original, "sdxl")


def test_a_folder_is_overruled_by_what_is_asked(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "tiny", "v_prediction")
    assert load(str(folder), torch.float32).scheduler.config.prediction_type == "v_prediction"
    assert load(str(folder), torch.float32, prediction_type="epsilon").scheduler.config.prediction_type == "epsilon"
    DDIMScheduler(prediction_type="sample").save_pretrained(folder / "scheduler")
    with pytest.raises(WeightsError, match="predicts sample, which"):
        load(str(folder), torch.float32)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(WeightsError, match="has FlowMatchEulerDiscreteScheduler for a scheduler"):
        load(str(folder), torch.float32)


def test_folders_of_half_precision_files_alone(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "tiny", family="sdxl")
    whole = load(str(folder), torch.float16).unet.state_dict()
    for path in list(folder.rglob("*.safetensors")):
        save_file({key: tensor.half() for key, tensor in load_file(path).items()}, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
        path.unlink()
    found = load(str(folder), torch.float16).unet.state_dict()
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    load(str(folder), torch.float16).unet.save_pretrained(folder / "unet", max_shard_size="50KB")  # whole after all, and in pieces
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    found = load(str(folder), torch.float16).unet.state_dict()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"conv_in.bias": None}, "lacks conv_in.bias"),
        ("unet", {"conv_more.bias": torch.zeros(1)}, "has, and the architecture has not, conv_more.bias"),
        ("unet", {"conv_in.bias": torch.zeros(9)}, "cannot load"),
        (
            "unet",
            {"conv_in.bias": torch.full((16,), torch.inf)},
            "conv_in.bias of its UNet2DConditionModel has numbers that are not finite",
        ),
        ("vae", {"decoder.conv_in.bias": None}, "lacks decoder.conv_in.bias"),
        ("text_encoder", {"final_layer_norm.bias": None}, "final_layer_norm.bias"),
        ("text_encoder", {"text_model.embeddings.position_ids": torch.zeros(1, 16)}, ""),
    ],
)
def test_no_folder_gets_random_weights(tmp_path: Path, part: str, change: dict[str, Any], message: str) -> None:
    folder = build_model(tmp_path / "tiny")
    (path,) = (folder / part).glob("*.safetensors")
    tensors: dict[str, Any] = load_file(path)
    for key, tensor in change.items():
        tensors[key if part != "text_encoder" or key in tensors else f"text_model.{key.removeprefix('text_model.')}"] = tensor
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})
    if not message:
        whole(load(str(folder), torch.float32))
        return
    with pytest.raises(WeightsError) as error:
        whole(load(str(folder), torch.float32))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_another_vae_from_a_folder_or_a_file_with_or_without_its_prefix(small: Path) -> None:
    own, other = (build_original(small / f"{n}.safetensors", "sd1", seed=n) for n in (0, 1))
    vae = AutoencoderKL(**VAE_CONFIG)
    vae.load_state_dict(other.vae)
    vae.save_pretrained(small / "folder")
    bare = {key.removeprefix("first_stage_model."): t for key, t in other.tensors.items() if key.startswith("first_stage_model.")}
    save_file(bare, small / "vae.safetensors")
    old = dict(other.vae)
    for new, name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        old = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in old.items()}
    assert old.keys() != other.vae.keys()
    save_file(old, small / "old.safetensors")
    files = (other.path, small / "vae.safetensors", small / "old.safetensors", small / "folder" / "diffusion_pytorch_model.safetensors")
    for source in (small / "folder", *files):
        found = load(str(own.path), torch.float32, vae=str(source)).parts["vae"].load().state_dict()
        assert all(torch.equal(found[key], other.vae[key]) for key in found)
    pruned = {key: tensor for key, tensor in own.tensors.items() if not key.startswith("first_stage_model.")}
    save_file(pruned, small / "pruned.safetensors")
    with pytest.raises(WeightsError, match=r"has no VAE in it: give one with model\.vae"):
        whole(load(str(small / "pruned.safetensors"), torch.float32))
    load(str(small / "pruned.safetensors"), torch.float32, vae=str(other.path))
    with pytest.raises(WeightsError, match=r"model\.vae: there is no"):
        load(str(own.path), torch.float32, vae=str(small / "none"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("a tensor less", r"lacks unet\.mid_block"),
        ("a tensor more", r"has, and the architecture has not, unet\.extra"),
        ("another shape", r"unet\.conv_out\.weight has another shape"),
        ("inpainting", "inpainting"),
        ("no text encoder", "lacks a text encoder"),
        ("refiner", "refiner"),
        ("lora", "is a LoRA"),
        ("flux", "is not a checkpoint"),
        ("cut", "not a readable"),
    ],
)
def test_files_that_are_something_else_get_one_sentence(small: Path, damage: str, message: str) -> None:
    original = build_original(small / "a.safetensors", "sdxl" if damage == "refiner" else "sd1")
    unet, tensors = "model.diffusion_model.", dict(original.tensors)
    match damage:
        case "a tensor less":
            del tensors[f"{unet}middle_block.1.proj_in.weight"]
        case "a tensor more":
            tensors[f"{unet}extra.weight"] = torch.zeros(1)
        case "another shape":
            tensors[f"{unet}out.2.weight"] = torch.zeros(4, 8, 1, 1)
        case "inpainting":
            tensors[f"{unet}input_blocks.0.0.weight"] = torch.zeros(8, 9, 3, 3)
        case "no text encoder":
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("cond_stage_model")}
        case "refiner":
            renamed = {key.replace("embedders.1.", "embedders.0."): tensor for key, tensor in tensors.items() if "embedders.1" in key}
            tensors = {key: tensor for key, tensor in tensors.items() if "embedders" not in key} | renamed
        case "lora":
            tensors = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(1)}
        case "flux":
            tensors = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}
    save_file(tensors, original.path)
    if damage == "cut":
        original.path.write_bytes(original.path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=message) as error:
        whole(load(str(original.path), torch.float32))
    assert "\n" not in str(error.value) and "a.safetensors" in str(error.value)


def test_what_is_neither_here_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match=r"there is no .*none; give a model folder"):
        load(str(tmp_path / "none"), torch.float32)
    with pytest.raises(WeightsError, match="there is no folder someone/model, and the hub does not give it either") as error:
        load("someone/model", torch.float32)  # tests are offline
    assert "\n" not in str(error.value)
    folder = build_model(tmp_path / "tiny")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(sources.DiffusionPipeline, "download", lambda name, **options: asked.update(options, name=name) or str(folder))
    assert load("someone/model", torch.float32).family == "sd1"
    assert asked["name"] == "someone/model" and asked["use_safetensors"]
    assert "safety_checker" in asked and "unet" not in asked  # what is given need not be fetched


# ---------------------------------------------------------------- the configs that are shipped


def test_architectures_are_those_of_the_real_models() -> None:
    """Counted on the meta device, against the parameters that the published models have."""
    counts = {}
    for family in FAMILIES:
        folder = sources.CONFIGS / family
        with torch.device("meta"):
            built: dict[str, Any] = {
                "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
                "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
            }
            for part in sources.PARTS[family]:
                built[part] = sources.TEXT_ENCODERS[part](CLIPTextConfig.from_pretrained(folder / part))
        counts[family] = {part: sum(p.numel() for p in module.parameters()) for part, module in built.items()}
    assert counts == {
        "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
        "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
        "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    }
    for family in FAMILIES:
        config = json.loads((sources.CONFIGS / family / "vae" / "config.json").read_text())
        assert config["scaling_factor"] == (0.13025 if family == "sdxl" else 0.18215)


def test_tokenizers_give_the_ids_of_clip() -> None:
    clip, open_clip = clip_tokenizer(), clip_tokenizer("!")
    assert len(clip.get_vocab()) == 49_408 and clip.model_max_length == 77
    for tokenizer, padding in ((clip, 49_407), (open_clip, 0)):
        ids = tokenizer(["a photo of a cat", ""], padding="max_length").input_ids
        assert ids[0] == [49_406, 320, 1125, 539, 320, 2368, 49_407] + 70 * [padding]
        assert ids[1] == [49_406, 49_407] + 75 * [padding]
    assert clip.tokenize("A Photo, of  a CAT!") == ["a</w>", "photo</w>", ",</w>", "of</w>", "a</w>", "cat</w>", "!</w>"]
    assert clip.decode(clip("naïve café 2026 🐟").input_ids, skip_special_tokens=True).strip() == "naïve café 2 0 2 6 🐟"


def test_padding_does_not_split_words(tmp_path: Path) -> None:
    """OpenCLIP pads with "!", token 0, and the "!" that ends a word is token 256: each byte has one of either kind."""
    open_clip = clip_tokenizer("!")
    open_clip.save_pretrained(tmp_path / "tokenizer")
    for tokenizer in (open_clip, clip_tokenizer(), tokenizer_of(str(tmp_path))):
        assert tokenizer("a cat!").input_ids == [49_406, 320, 2368, 256, 49_407]
