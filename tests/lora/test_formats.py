"""LoRA files: round trips, the readers' formula under each family's names, files of other programs, refusal of what is broken."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny as tiny_models
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdlora.errors import TrainingError, WeightsError
from sdlora.lora import formats
from sdlora.lora.change import Change, Factors
from sdlora.lora.formats import convert, load, merge, open_lora, save, to_tensors
from sdlora.lora.inits import INITS
from sdlora.lora.layers import Adapter, DoraLayer, FullLayer, LoraLayer, MoraLayer, NormAdapter
from sdlora.lora.names import WEBUI, sgm_path
from sdlora.lora.scaling import rank_stabilised
from sdlora.lora.targets import UNET_GROUPS, find_norms, find_targets

LAYER = "unet.mid_block.attentions.0.proj_in"
Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "unet.up_blocks.0.upsamplers.0.conv"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
TEXT_2 = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"


class Toy(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.mid_block = nn.Module()
        self.mid_block.attentions = nn.ModuleList([nn.Module()])
        self.mid_block.attentions[0].proj_in = base


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def factors_of(*shape: int, rank: int = 2, alpha: float = 1.25) -> Factors:
    """Of a weight of this shape."""
    return Factors(random(rank, *shape[1:]), random(shape[0], rank, *[1] * (len(shape) - 2)), alpha)


def delta(change: Change) -> Tensor:
    if change.factors is not None:
        return change.factors.delta()
    assert change.weight is not None
    return change.weight


def read(path: Path) -> dict[str, Change]:
    """By readable name."""
    with open_lora(path) as file:
        file.refuse_unread()
        return {name: file.change(name) for name in file.layers}


# ---------------------------------------------------------------- our own files


def test_names() -> None:
    assert WEBUI["sd1"](LAYER) == "lora_unet_mid_block_attentions_0_proj_in"
    name = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
    assert WEBUI["sd1"](name) == "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
    assert WEBUI["sdxl"](LAYER) == "lora_unet_middle_block_1_proj_in"


@pytest.mark.parametrize("family", WEBUI)
def test_round_trip_keys_and_hash(tmp_path: Path, family: str) -> None:
    changes = {
        LAYER: Change(factors_of(5, 4, 3, 3)),
        Q: Change(factors_of(5, 4), dora_scale=random(1, 4), bias=random(5)),
        CONV: Change(weight=random(5, 4, 3, 3), bias=random(5)),
        "unet.mid_block.resnets.0.norm1": Change(weight=random(6), bias=random(6)),
    }
    path = tmp_path / "x.safetensors"
    said = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[family]
    save(path, changes, 1.25, {"ss_base_model_version": said}, family=family)
    found, metadata = load(path)
    assert found.keys() == changes.keys()
    for name, change in changes.items():
        other = found[name]
        for ours, theirs in ((change.weight, other.weight), (change.bias, other.bias), (change.dora_scale, other.dora_scale)):
            assert (ours is None and theirs is None) or (ours is not None and theirs is not None and torch.equal(ours, theirs))
        assert (change.factors is None) == (other.factors is None)
        if change.factors is not None and other.factors is not None:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(change.factors[:2], other.factors[:2], strict=True))
            assert other.factors.alpha == 1.25
    with safe_open(path, "pt") as file:
        assert file.get_tensor(f"{WEBUI[family](LAYER)}.alpha").shape == ()
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert os.name != "posix" or path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_one_alpha_for_all_layers_and_the_same_product() -> None:
    """diffusers applies one alpha to all layers of a kind, so files hold one: the rest of the scale goes into up."""
    learned = {"unet.a": Factors(torch.ones(2, 3), torch.ones(4, 2), 3.0), "unet.b": Factors(torch.ones(2, 3), torch.ones(4, 2), -1.0)}
    tensors = to_tensors({name: Change(factors) for name, factors in learned.items()}, 2.0)
    for name, (down, up, alpha) in learned.items():
        key = WEBUI["sd1"](name)
        assert float(tensors[f"{key}.alpha"]) == 2.0
        written = 2.0 / 2 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        torch.testing.assert_close(written, alpha / 2 * up @ down)


def test_an_alpha_that_the_precision_rounds_is_made_up_for(tmp_path: Path) -> None:
    factors = factors_of(4, 3, alpha=0.3)
    save(tmp_path / "x.safetensors", {LAYER: Change(factors)}, 0.3, {}, precision="bf16")
    alpha = float(load_file(tmp_path / "x.safetensors")[f"{WEBUI['sd1'](LAYER)}.alpha"])
    assert abs(alpha / 0.3 - 1) > 1e-4
    up = load_file(tmp_path / "x.safetensors")[f"{WEBUI['sd1'](LAYER)}.lora_up.weight"]
    assert torch.equal(up, (factors.up * (0.3 / alpha)).bfloat16())
    save(tmp_path / "x.safetensors", {LAYER: Change(factors)}, 1e-9, {}, precision="fp16")  # nearer to 0 than fp16 goes
    torch.testing.assert_close(delta(read(tmp_path / "x.safetensors")[LAYER]), factors.delta(), rtol=2e-3, atol=1e-3)


def test_merge_applies_the_readers_formula() -> None:
    base = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(base.weight)
    changes = {LAYER: Change(Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 0.5))}
    merge({"unet": Toy(base)}, changes, strength=2.0)
    assert base.weight.tolist() == [[3.0, 6.0], [4.0, 8.0]]
    merge({"unet": Toy(base)}, changes, strength=-2.0)
    assert base.weight.abs().sum() == 0


KINDS: dict[str, Callable[[Any, str], Adapter]] = {
    "lora": lambda base, init: LoraLayer(base, start(base, init), 6.0, rank_stabilised(4), learned_alpha=True),
    "dora": lambda base, init: DoraLayer(base, start(base, init), 3.0, 0.25, learned_alpha=True, train_bias=True),
    "mora": lambda base, init: MoraLayer(base, 3),
    "full": lambda base, init: FullLayer(base, train_bias=True),
}


def start(base: Any, init: str) -> Any:
    weight = base.weight.detach().flatten(1)
    return INITS[init](weight, min(4, *weight.shape), 0.75, torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def unet(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    return request.param, UNet2DConditionModel(**tiny_models.unet_config(request.param)).requires_grad_(False)


KINDS_AND_INITS = [*(("lora", init) for init in INITS), ("dora", "kaiming"), ("dora", "pissa"), ("mora", ""), ("full", "")]


@pytest.mark.parametrize(("kind", "init"), KINDS_AND_INITS)
def test_readers_get_the_weights_of_training(unet: tuple[str, nn.Module], kind: str, init: str, tmp_path: Path) -> None:
    """What each layer does to its input, against W + alpha / R * up @ down of the file, and LyCORIS' rules where there is more."""
    family, model = unet
    layers = {
        name: KINDS[kind](model.get_submodule(path), init)
        for name, path in find_targets("unet", model, [group for group in UNET_GROUPS if group != "resample"]).items()
    }
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer.trained().values():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    path = tmp_path / "x.safetensors"
    save(path, {name: layer.change() for name, layer in layers.items()}, 6.0, {}, family=family)
    tensors = load_file(path)
    assert len(layers) > 40
    for name, layer in layers.items():
        of = {key.partition(".")[2]: tensors.pop(key) for key in list(tensors) if key.partition(".")[0] == expected_stem(name, family)}
        weight = layer.base.weight
        assert isinstance(weight, Tensor)
        if "lora_down.weight" in of:
            down, up = of["lora_down.weight"], of["lora_up.weight"]
            weight = weight + (of["alpha"] / down.shape[0] * up.flatten(1) @ down.flatten(1)).view_as(weight)
        if "dora_scale" in of:
            weight = weight * of["dora_scale"] / weight.transpose(0, 1).flatten(1).norm(dim=1).view(of["dora_scale"].shape)
        weight = weight + of.get("diff", 0)
        trained = trained_weight(layer)
        assert (weight - trained).norm() / trained.norm() < 1e-6
        assert (trained - layer.base.weight).norm() / trained.norm() > 1e-3
    assert tensors == {}


def expected_stem(name: str, family: str) -> str:
    path = name.removeprefix("unet.")
    return f"lora_unet_{sgm_path(path, 'sdxl') if family == 'sdxl' else path}".replace(".", "_")


@torch.no_grad()
def trained_weight(layer: Adapter) -> Tensor:
    """By what the layer makes of one input channel after the other, in double precision."""
    layer = layer.double()
    base: Any = layer.base
    inputs = base.weight.shape[1]
    eye = torch.eye(inputs, dtype=torch.float64)
    if isinstance(base, nn.Linear):
        weight = (layer(eye) - layer(torch.zeros_like(eye))).T
    else:
        side = base.kernel_size[0]
        dots = torch.zeros(inputs, inputs, side, side, dtype=torch.float64)
        dots[:, :, side // 2, side // 2] = eye
        weight = (layer(dots) - layer(torch.zeros_like(dots))).flip(2, 3).transpose(0, 1)
    layer.float()
    return weight.float()


def test_norms_are_exact_too(unet: tuple[str, nn.Module], tmp_path: Path) -> None:
    family, model = unet
    layers = {name: NormAdapter(model.get_submodule(path)) for name, path in find_norms("unet", model).items()}
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer.trained().values():
                parameter += torch.randn(parameter.shape)
    save(tmp_path / "x.safetensors", {name: layer.change() for name, layer in layers.items()}, 1.0, {}, family=family)
    tensors = load_file(tmp_path / "x.safetensors")
    for name, layer in layers.items():
        assert torch.equal(tensors[f"{expected_stem(name, family)}.w_norm"], layer.weight_delta)
        assert layer.bias_delta is not None and torch.equal(tensors[f"{expected_stem(name, family)}.b_norm"], layer.bias_delta)


# ---------------------------------------------------------------- diffusers' files


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """With two layers to a block, as in Stable Diffusion, from which diffusers counts the blocks of original checkpoints."""
    folder = tiny_models.build_model(tmp_path_factory.mktemp("model") / request.param, family=request.param)
    unet = UNet2DConditionModel(**tiny_models.unet_config(request.param) | {"layers_per_block": 2})
    kind = StableDiffusionXLPipeline if request.param == "sdxl" else StableDiffusionPipeline
    return request.param, kind.from_pretrained(folder, unet=unet)


@pytest.mark.parametrize("to", formats.FORMATS)
def test_diffusers_applies_every_layer_exactly(pipeline: tuple[str, Any], to: str, tmp_path: Path) -> None:
    family, pipe = pipeline
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder} | ({"text_encoder_2": pipe.text_encoder_2} if family == "sdxl" else {})
    targets = {part: find_targets(part, model, ["attention", "feed_forward", "projection"]) for part, model in parts.items()}
    targets["unet"] |= find_targets("unet", pipe.unet, ["resnet", "resample", "time"])
    changes = {}
    for part, of in targets.items():
        for number, (name, path) in enumerate(of.items()):
            rank = 2 if to == "webui" else 2 + number % 2
            changes[name] = Change(factors_of(*parts[part].get_submodule(path).weight.shape, rank=rank, alpha=0.5 + number % 3))
    path = tmp_path / "x.safetensors"
    save(path, changes, 1.5, {"ss_base_model_version": "sdxl_base_v1-0"}, family=family, to=to)
    pipe.load_lora_weights(path)
    try:
        for part, of in targets.items():
            for name, module_path in of.items():
                applied = parts[part].get_submodule(module_path).get_delta_weight("default_0")
                torch.testing.assert_close(applied, delta(changes[name]), rtol=1e-5, atol=1e-6)
    finally:
        pipe.unload_lora_weights()


def test_from_format_to_format_and_back_is_the_same_change(tmp_path: Path) -> None:
    shapes = {LAYER: ((5, 4, 1, 1), 2), TEXT_2: ((6, 4), 4), CONV: ((5, 4, 3, 3), 2)}  # and ranks
    changes = {name: Change(factors_of(*shape, rank=rank, alpha=2.0)) for name, (shape, rank) in shapes.items()}
    first, second, third = (tmp_path / f"{n}.safetensors" for n in range(3))
    save(first, changes, 2.0, {"ss_network_alpha": "2.0", "other": "kept"}, family="sdxl")
    convert(first, second, to="diffusers")
    assert load_file(second).keys() == {f"{name}.lora_{side}.weight" for name in changes for side in "AB"}
    convert(second, third, to="webui")
    for path in (second, third):
        for name, change in read(path).items():
            assert torch.equal(delta(change), delta(changes[name]))  # powers of two move no bit
    assert load_file(third).keys() == load_file(first).keys()
    assert load(third)[1]["other"] == "kept"
    assert float(load(third)[1]["ss_network_alpha"]) == 2.0
    convert(first, tmp_path / "same.safetensors")
    ours, same = load_file(first), load_file(tmp_path / "same.safetensors")
    assert ours.keys() == same.keys() and all(torch.equal(ours[key], same[key]) for key in ours)


def test_converting_keeps_the_source_s_precision_or_takes_another(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(first, {Q: Change(factors_of(4, 3))}, 1.25, {"ss_base_model_version": "sd_v1"}, precision="bf16")
    convert(first, second)
    assert {tensor.dtype for tensor in load_file(second).values()} == {torch.bfloat16}
    convert(first, second, precision="fp16")
    assert {tensor.dtype for tensor in load_file(second).values()} == {torch.float16}
    convert(first, first, precision="fp32")  # onto itself
    assert {tensor.dtype for tensor in load_file(first).values()} == {torch.float32}


def test_the_most_frequent_alpha_is_kept_and_the_others_folded(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    layers = {name: factors_of(4, 3, alpha=alpha) for name, alpha in ((Q, 1.0), (OUT, 1.0), (LAYER, 8.0), (TEXT, 0.0))}
    raw = {}
    for name, (down, up, alpha) in layers.items():
        raw |= {f"{WEBUI['sd1'](name)}.lora_down.weight": down, f"{WEBUI['sd1'](name)}.lora_up.weight": up}
        raw[f"{WEBUI['sd1'](name)}.alpha"] = torch.tensor(alpha)
    save_file(raw, source)
    convert(source, target, family="sd1")
    written = load_file(target)
    assert {float(tensor) for key, tensor in written.items() if key.endswith("alpha")} == {1.0}
    assert torch.equal(written[f"{WEBUI['sd1'](Q)}.lora_up.weight"], layers[Q].up)
    for name, change in read(target).items():
        torch.testing.assert_close(delta(change), layers[name].delta())


def test_converting_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(source, {LAYER: Change(weight=random(4, 3))}, 1.0, {})
    with pytest.raises(WeightsError, match="which family"):
        convert(source, target)
    with pytest.raises(WeightsError, match="plain LoRAs alone"):
        convert(source, target, to="diffusers", family="sd1")
    save_file({**load_file(source), "lora_unet_a.oft_blocks": torch.ones(1)}, source)
    with pytest.raises(WeightsError, match="oft_blocks"):
        convert(source, target, family="sd1")
    save(source, {LAYER: Change(weight=torch.full((4, 3), 1e6))}, 1.0, {})
    assert convert(source, None, family="sd1", precision="bf16").layers == 1
    with pytest.raises(WeightsError, match="fp16 cannot hold"):
        convert(source, None, family="sd1", precision="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# ---------------------------------------------------------------- other programs' files


WRITERS: dict[str, dict[str, str]] = {  # stem and suffixes of each program -> readable name
    "kohya": {"lora_unet_mid_block_attentions_0_proj_in.lora_{down,up}.weight": LAYER},
    "sdxl under diffusers' names": {"lora_unet_up_blocks_0_upsamplers_0_conv.lora_{down,up}.weight": CONV},
    "sd1 under sgm names": {"lora_unet_output_blocks_2_1_conv.lora_{down,up}.weight": CONV},
    "sdxl": {
        "lora_unet_output_blocks_2_2_conv.lora_{down,up}.weight": CONV,
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{down,up}.weight": TEXT_2,
    },
    "diffusers": {f"{OUT}.lora_{{A,B}}.weight": OUT, f"{TEXT}.lora_linear_layer.{{down,up}}.weight": TEXT},
    "diffusers, before peft": {f"{OUT}.lora.{{down,up}}.weight": OUT, f"{TEXT_2}.lora_linear_layer.{{down,up}}.weight": TEXT_2},
    "diffusers, first": {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.{down,up}.weight": OUT,
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.{down,up}.weight": TEXT,
    },
    "diffusers, attention processors alone": {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{down,up}.weight": Q
    },
    "peft": {
        f"base_model.model.{Q.removeprefix('unet.')}.lora_{{A,B}}.weight": Q,
        "base_model.model.text_model.encoder.layers.0.self_attn.out_proj.lora_{A,B}.weight": TEXT,
    },
    "peft with an adapter's name": {f"{Q}.lora_{{A,B}}.default_0.weight": Q, f"{OUT}.lora_{{A,B}}.default.weight": OUT},
    "transformers without text_model": {"text_encoder.encoder.layers.0.self_attn.out_proj.lora_{A,B}.weight": TEXT},
    "ComfyUI": {
        "diffusion_model.output_blocks.2.2.conv.lora_{down,up}.weight": CONV,
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_{down,up}.weight": TEXT_2,
    },
    "OneTrainer": {
        "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_{down,up}.weight": Q,
        "clip_l.text_model.encoder.layers.0.self_attn.out_proj.lora_{down,up}.weight": TEXT,
        "lora_unet.mid_block.attentions.0.proj_in.lora_{down,up}.weight": LAYER,
    },
    "LyCORIS' wrapper": {"lycoris_mid_block_attentions_0_proj_in.lora_{down,up}.weight": LAYER},
}


def sides(key: str) -> tuple[str, str]:
    head, _, rest = key.partition("{")
    (down, up), tail = rest.partition("}")[0].split(","), rest.partition("}")[2]
    return f"{head}{down}{tail}", f"{head}{up}{tail}"


@pytest.mark.parametrize("program", WRITERS)
def test_files_of_other_programs(program: str, tmp_path: Path) -> None:
    tensors, wanted = {}, {}
    for key, name in WRITERS[program].items():
        down, up, _ = factors_of(5, 4, 3, 3) if name == CONV else factors_of(5, 4)
        wanted[name] = (up.flatten(1) @ down.flatten(1)).view(5, *down.shape[1:])
        tensors |= dict(zip(sides(key), (down, up), strict=True))
    save_file(tensors, tmp_path / "x.safetensors")
    found = read(tmp_path / "x.safetensors")
    assert found.keys() == wanted.keys()
    for name, change in found.items():
        torch.testing.assert_close(delta(change), wanted[name])


def test_alphas_beside_diffusers_names_and_in_pefts_options(tmp_path: Path) -> None:
    down, up, _ = factors_of(5, 4)
    tensors = {f"{name}.lora_{side}.weight": matrix for name in (Q, OUT, TEXT) for side, matrix in (("A", down.clone()), ("B", up.clone()))}
    path, unit = tmp_path / "x.safetensors", factors_of(5, 4, alpha=1.0).delta()
    said: dict[str, Any] = {"unet.lora_alpha": 3, "unet.r": 2, "unet.alpha_pattern": {"attn1.to_out.0": 5}}

    def scales(**more: Any) -> dict[str, float]:
        save_file(tensors, path, metadata={formats.PEFT_CONFIG: json.dumps(said | more)})
        return {name: float((delta(change) / unit).mean()) for name, change in read(path).items()}

    assert scales() == pytest.approx({Q: 3, OUT: 5, TEXT: 2})  # without an alpha: the rank
    assert scales(**{"unet.use_rslora": True}) == pytest.approx({Q: 3 * math.sqrt(2), OUT: 5 * math.sqrt(2), TEXT: 2})
    assert scales(**{"text_encoder.lora_alpha": 7}) == pytest.approx({Q: 3, OUT: 5, TEXT: 7})
    tensors[f"{Q}.alpha"] = torch.tensor(0.5)
    assert scales()[Q] == pytest.approx(0.5)
    convert(path, tmp_path / "y.safetensors", family="sd1")  # the options must not scale again
    assert delta(read(tmp_path / "y.safetensors")[OUT]).allclose(5 * unit, rtol=1e-5)
    assert formats.PEFT_CONFIG not in load(tmp_path / "y.safetensors")[1]
    save_file(tensors, path, metadata={formats.PEFT_CONFIG: "{"})
    with pytest.raises(WeightsError, match="damaged"):
        load(path)


def test_encodings_that_lose_the_kernel_get_it_back(tmp_path: Path) -> None:
    halves = {"hada_w1_a": random(5, 2), "hada_w1_b": random(2, 36), "hada_w2_a": random(5, 2), "hada_w2_b": random(2, 36)}
    path = tmp_path / "x.safetensors"
    save_file({f"lora_unet_mid_block_resnets_0_conv1.{role}": tensor.clone() for role, tensor in halves.items()}, path)
    (change,) = read(path).values()
    assert change.weight is not None and change.weight.shape == (5, 4, 3, 3)
    base = nn.Conv2d(4, 5, 1)  # under a name of which none knows that it is a convolution
    before = base.weight.detach().clone()
    merge({"unet": Toy(base)}, {LAYER: Change(weight=torch.ones(5, 4))})
    torch.testing.assert_close(base.weight, before + 1)
    assert formats.kernel_of(LAYER, "sd1") == (1, 1) and formats.kernel_of(LAYER, "sdxl") == formats.kernel_of(Q, "sd1") == ()


@pytest.mark.parametrize(
    ("names", "width", "metadata", "family"),
    [
        ([f"{Q}".replace("attn1.to_q", "attn2.to_k")], 768, {}, "sd1"),
        ([f"{Q}".replace("attn1.to_q", "attn2.to_k")], 1024, {}, "sd2"),
        ([f"{Q}".replace("attn1.to_q", "attn2.to_v")], 2048, {}, "sdxl"),
        ([TEXT_2], 4, {}, "sdxl"),
        ([Q.replace("blocks.0.attn1", "blocks.1.attn1")], 4, {}, "sdxl"),
        (["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"], 1024, {}, "sd2"),
        ([Q], 4, {"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ([Q], 4, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ([Q], 4, {}, None),
    ],
)
def test_which_family_a_file_is_for(names: list[str], width: int, metadata: dict[str, str], family: str | None, tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", {name: Change(factors_of(5, width)) for name in names}, 1.0, metadata, to="diffusers")
    with open_lora(tmp_path / "x.safetensors") as file:
        assert file.family == family
    assert load(tmp_path / "x.safetensors")[0].keys() == set(names)


def test_what_was_learned_is_found_whatever_the_spelling(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    learned = {formats.LEARNED_ALPHAS: json.dumps({"lora_unet_mid_block_attentions_0_proj_in": 7.0, "lora_unet_gone": 1.0})}
    save(path, {LAYER: Change(factors_of(5, 4))}, 1.25, learned | {"ss_base_model_version": "sdxl_base_v1-0"}, family="sdxl")
    assert formats.read_alphas(path) == {LAYER: 7.0}
    assert formats.read_scales(path) == {LAYER: 0.625}


# ---------------------------------------------------------------- refusals


def test_missing_alpha_means_scale_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(
        {f"{WEBUI['sd1'](LAYER)}.lora_down.weight": torch.ones(4, 2), f"{WEBUI['sd1'](LAYER)}.lora_up.weight": torch.ones(3, 4)}, path
    )
    assert load(path)[0][LAYER].factors.alpha == 4  # type: ignore[union-attr]


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(TrainingError, match="not finite"):
        save(path, {LAYER: Change(Factors(torch.full((1, 2), float("nan")), torch.ones(2, 1), 1.0))}, 1.0, {})
    with pytest.raises(WeightsError, match="fp16 cannot hold"):
        save(path, {LAYER: Change(Factors(torch.full((1, 2), 1e6), torch.ones(2, 1), 1.0))}, 1.0, {}, precision="fp16")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WeightsError, match="no file"):
        load(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(WeightsError, match="not a readable"):
        load(path)
    save_file({"model.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"not a LoRA that is understood: model\.weight"):
        load(path)
    save_file({}, path)
    with pytest.raises(WeightsError, match="empty"):
        load(path)
    with pytest.raises(WeightsError, match="lacks"):
        merge({"unet": Toy(nn.Linear(2, 2))}, {"unet.nowhere": Change(Factors(torch.ones(1, 2), torch.ones(2, 1), 1.0))})
    with pytest.raises(WeightsError, match="shape"):
        merge({"unet": Toy(nn.Linear(2, 2))}, {LAYER: Change(Factors(torch.ones(1, 3), torch.ones(2, 1), 1.0))})


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["lora_unet_a.lora_down.weight"], "lora_unet_a.lora_down.weight"),
        (["lora_unet_a.dora_scale"], "lora_unet_a.dora_scale"),
        (["lora_unet_a.alpha"], "lora_unet_a.alpha"),
        (["lora_unet_a.diff", "lora_unet_a.scalar"], "lora_unet_a.scalar"),
        (["lora_unet_a.oft_blocks", "lora_unet_b.diff"], "lora_unet_a.oft_blocks"),
        (["bundle_emb.cat.clip_l", "lora_unet_b.diff"], "bundle_emb.cat.clip_l"),
        (["transformer.blocks.0.lora_A.weight", "lora_unet_b.diff"], "transformer.blocks.0.lora_A.weight"),
        (["lora_unet_mid_block_attentions_0_proj_in.diff", f"{LAYER}.diff"], f"{LAYER}.diff"),  # the same layer twice
    ],
)
def test_what_is_not_understood_is_named_and_never_dropped(keys: list[str], named: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(() if key.endswith("alpha") else (2, 2)) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=f"{re.escape(named)} lacks the tensors|understood: {re.escape(named)}"):
        load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "shapes", [{"lora_down.weight": (2, 3), "lora_up.weight": (4, 3)}, {"lokr_w1": (2, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": (3, 2)}]
)
def test_matrices_that_cannot_be_multiplied_are_refused(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    save_file({f"lora_unet_a.{role}": torch.ones(shape) for role, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="lora_unet_a have shapes that do not belong together"):
        load(tmp_path / "x.safetensors")


def test_shapes_that_do_not_fit_are_refused() -> None:
    parts, key = {"unet": Toy(nn.Linear(3, 2))}, LAYER
    matrices = Factors(torch.ones(1, 3), torch.ones(2, 1), 1.0)
    for change in (
        Change(matrices, dora_scale=torch.ones(3, 1)),
        Change(matrices, dora_scale=torch.ones(1, 3, 1, 1)),
        Change(Factors(torch.ones(2, 3), torch.ones(2, 1), 1.0)),
        Change(weight=torch.ones(3, 2)),
        Change(matrices, bias=torch.ones(3)),
    ):
        with pytest.raises(WeightsError, match="another shape"):
            merge(parts, {key: change})
    merge(parts, {key: Change(matrices, dora_scale=torch.ones(1, 3), bias=torch.ones(2))})
    merge(parts, {key: Change(matrices, dora_scale=torch.ones(2, 1))})
