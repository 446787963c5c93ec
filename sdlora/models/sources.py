"""The components of a base model, from whatever a user has: a folder in diffusers' layout, a checkpoint in its original layout, or a name
on the Hugging Face hub. Only the last ever asks the network, and no weights are unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdlora.errors import WeightsError, first_line
from sdlora.lora.checkpoints import TEXT_ENCODER_PREFIXES, Place, places_of, says_v
from sdlora.lora.targets import readable_name
from sdlora.models.local import local_path
from sdlora.models.tokenizer import AS_WRITTEN, clip_tokenizer
from sdlora.tensors import opened, reading

CONFIGS = Path(__file__).parent / "configs"  # of the families, as the original models have them
PIPELINES = {"StableDiffusionPipeline": 1, "StableDiffusionXLPipeline": 2}  # text encoders
FOLDERS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TEXT_ENCODERS: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
PARTS = {family: tuple(parts) for family, parts in TEXT_ENCODER_PREFIXES.items()}  # text encoders, in their order
PADDING = {("sd2", "text_encoder"): "!", ("sdxl", "text_encoder_2"): "!"}  # OpenCLIP pads with token 0, CLIP with the end
VAE_PREFIX = "first_stage_model."
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Part:
    """A network that a run may do without, and that is not read before it is asked for."""

    files: tuple[Path, ...]  # all that it depends on
    dtype: torch.dtype  # of its weights once they are read
    load: Callable[[], Any]  # raises WeightsError
    shell: Callable[[], Any]  # the same network on the meta device, for which no weights are read


@dataclass(frozen=True)
class Components:
    family: str  # "sd1", "sd2", "sdxl"
    unet: Any
    parts: dict[str, Part]  # "vae", which is in fp32, and the text encoders in their order
    tokenizers: tuple[Any, ...]  # of these
    scheduler: Any
    notes: tuple[str, ...] = ()  # what was assumed


def load(base: str, dtype: torch.dtype, *, vae: str | None = None, prediction_type: str | None = None) -> Components:
    """`base`: "mini", a folder, a .safetensors or .ckpt file, or a hub's "owner/name". `vae`: a folder or file in the place of the base's
    own. `prediction_type`: what the base's own word is overruled by. Raises WeightsError."""
    found = _load(base, dtype, prediction_type)
    if prediction_type is not None:
        found = replace(found, scheduler=DDPMScheduler.from_config(found.scheduler.config, prediction_type=prediction_type))
    if found.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise WeightsError(f"model.base: {base} predicts {found.scheduler.config.prediction_type}, which sdlora does not train.")
    _require_finite(found.unet, f"model.base: {base}")
    parts = {name: _checked(part, f"model.base: {base}") for name, part in found.parts.items()}
    if vae is not None:
        parts["vae"] = _checked(vae_at(Path(vae), found.family), f"model.vae: {vae}")
    return replace(found, parts=parts)


def _checked(part: Part, origin: str) -> Part:
    """The part, whose numbers are looked at whenever they are read."""

    def load() -> Any:
        network = part.load()
        _require_finite(network, origin)
        return network

    return replace(part, load=load)


def _require_finite(network: Any, origin: str) -> None:
    for name, tensor in network.named_parameters():
        if not torch.stack(tensor.aminmax()).isfinite().all():  # both are NaN where one number is; thirty times as fast as asking each
            raise WeightsError(f"{origin} is damaged: {name} of its {type(network).__name__} has numbers that are not finite.")


def _load(base: str, dtype: torch.dtype, prediction_type: str | None) -> Components:
    path = local_path(base)
    if path.is_dir():
        return _from_folder(path, dtype)
    if path.is_file():
        return _from_file(path, dtype, prediction_type)
    if HUB_NAME.fullmatch(base):
        return _from_folder(download(base), dtype)
    raise WeightsError(f"model.base: there is no {path}; give a model folder, a .safetensors file, 'owner/name' on the hub, or 'mini'.")


def download(name: str) -> Path:
    """A model on the hub as a folder in diffusers' layout, in the hub's own cache; what is there already is not asked for again."""
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True, **NOT_NEEDED))
    except Exception as error:  # of the hub's client, the network below it, and diffusers, which share no class
        raise WeightsError(f"model.base: there is no folder {name}, and the hub does not give it either: {first_line(error)}") from error


NOT_NEEDED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}  # more than a gigabyte with SD 1.x


# ---------------------------------------------------------------- folders


def _from_folder(folder: Path, dtype: torch.dtype) -> Components:
    index = folder / "model_index.json"
    if not index.is_file():
        raise WeightsError(f"model.base: {folder} is not a model folder in diffusers' layout: it has no model_index.json.")
    try:
        name = _read_json(index)["_class_name"]
    except KeyError:
        raise WeightsError(f"model.base: {index} does not say which pipeline the model is for; it is damaged.") from None
    if name not in PIPELINES:
        raise WeightsError(f"model.base: {folder} is for {name}; sdlora trains {', '.join(PIPELINES)}.")
    encoders = list(TEXT_ENCODERS)[: PIPELINES[name]]
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in encoders]
    missing = [part for part in dict.fromkeys((*FOLDERS, *encoders, *tokenizers)) if not (folder / part).is_dir()]
    if missing:
        raise WeightsError(f"model.base: {folder} is not a Stable Diffusion folder in diffusers' layout: it has no {', '.join(missing)}.")
    config = _read_json(folder / "scheduler" / "scheduler_config.json")
    if "beta_start" not in config:
        raise WeightsError(
            f"model.base: {folder} has {config.get('_class_name')} for a scheduler, and not the betas that sdlora trains with."
        )
    local = {"local_files_only": True}
    try:
        unet = _network(UNet2DConditionModel, folder / "unet", dtype)
        _refuse_special(folder, unet.config.in_channels)
        return Components(
            family="sdxl" if len(encoders) == 2 else "sd2" if unet.config.cross_attention_dim == 1024 else "sd1",
            unet=unet,
            parts={"vae": _part(AutoencoderKL, folder / "vae", torch.float32)}
            | {part: _part(TEXT_ENCODERS[part], folder / part, dtype) for part in encoders},
            tokenizers=tuple(CLIPTokenizer.from_pretrained(folder / part, **AS_WRITTEN, **local) for part in tokenizers),
            scheduler=DDPMScheduler.from_pretrained(folder / "scheduler", **local),
        )
    except UNREADABLE as error:
        raise WeightsError(f"model.base: cannot load {folder}: {first_line(error)}") from error


UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)  # what diffusers and transformers raise for a damaged folder


def _part(kind: Any, folder: Path, dtype: torch.dtype, option: str = "model.base") -> Part:
    """From a folder of its own, which `option` named."""

    def load() -> Any:
        try:
            return _network(kind, folder, dtype)
        except UNREADABLE as error:
            raise WeightsError(f"{option}: cannot load {folder}: {first_line(error)}") from error

    files = tuple(sorted([*folder.glob("*.safetensors"), folder / "config.json"]))
    return Part(files, dtype, load, partial(_shell, kind, folder, dtype))


def _shell(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A network without its weights, of the config in a folder."""
    is_clip = kind in TEXT_ENCODERS.values()
    config = (CLIPTextConfig.from_pretrained if is_clip else kind.load_config)(folder, local_files_only=True)
    with torch.device("meta"):
        return (kind if is_clip else kind.from_config)(config).to(dtype)


def _network(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """From a part's folder, whole or else in 16 bits. Raises WeightsError for missing parameters, which the libraries leave random."""
    # `model.safetensors`, `model-00001-of-00002.safetensors`; of 16 bits `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`
    is_whole = any(path.name.count(".") == 1 for path in folder.glob("*.safetensors"))
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True} | ({} if is_whole else {"variant": "fp16"})
    network, info = kind.from_pretrained(folder, torch_dtype=dtype, **options)
    # text encoders of older folders keep more than is asked for: the numbers of their positions
    surplus = () if kind in TEXT_ENCODERS.values() else info["unexpected_keys"]
    for keys, what in ((info["missing_keys"], "lacks"), (surplus, "has, and the architecture has not,")):
        if keys:
            raise WeightsError(f"{folder} is damaged or of another architecture: it {what} {min(keys)}.")
    return network


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise WeightsError(f"model.base: {path} is missing or damaged.") from None
    return found if isinstance(found, dict) else {}


def _refuse_special(path: Path, channels: int) -> None:
    if channels != 4:
        raise WeightsError(f"model.base: {path} is an inpainting or other special UNet ({channels} input channels, not 4).")


# ---------------------------------------------------------------- single files


class Weights:
    """Tensors of a single file by its keys."""

    def __init__(self, path: Path):
        """Raises WeightsError for what cannot be read without running what a stranger wrote."""
        self.path = path
        self._tensors: dict[str, Tensor] | None = None
        if path.suffix == ".safetensors":
            with reading(path):
                self._file: Any = opened(path)
            self.keys: Collection[str] = set(self._file.keys())
            self.metadata: Mapping[str, str] = self._file.metadata() or {}
            return
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        except Exception:  # whatever a broken pickle raises
            raise WeightsError(
                f"{path} holds more than weights, or is damaged, and is not opened: convert it to .safetensors, by what you trust."
            ) from None
        inner = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
        self._tensors = {key: tensor for key, tensor in inner.items() if isinstance(tensor, Tensor)}
        self.keys, self.metadata = self._tensors.keys(), {}

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._tensors[key] if self._tensors is not None else self._file.get_tensor(key)
        return tensor

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.keys if key.startswith(prefix)}


def _from_file(path: Path, dtype: torch.dtype, prediction_type: str | None) -> Components:
    weights = Weights(path)
    family, places = places_of(path, weights.keys)
    config = UNet2DConditionModel.load_config(CONFIGS / family / "unet")
    conv_in = places.get("unet.conv_in.weight")
    _refuse_special(path, config["in_channels"] if conv_in is None else weights[conv_in.key].shape[1])
    for mark, kind in OTHER_NOISE.items():
        if mark in weights.keys:
            raise WeightsError(f"model.base: {path} is {kind}, whose noise is not that of SDXL: give another base model.")
    ztsnr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in weights.keys else {}  # Lin et al. 2023, 3.3
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(_of_part(weights, places, "unet", unet, dtype), assign=True)
    predicts = prediction_type or declared(weights, family)
    notes: tuple[str, ...] = ()
    if predicts is None:
        predicts, note = measured(unet)
        notes = (f"{path.name} does not say what it predicts: {note}; if that is wrong, set model.prediction_type.",)
    if family == "sd2" and predicts == "v_prediction":
        unet.register_to_config(sample_size=96)  # its usual size is 768 px
    return Components(
        family=family,
        unet=unet,
        parts={"vae": _vae_within(path, family, VAE_PREFIX)}
        | {part: _text_encoder_within(path, places, family, part, dtype) for part in PARTS[family]},
        tokenizers=tuple(clip_tokenizer(PADDING.get((family, part))) for part in PARTS[family]),
        scheduler=DDPMScheduler.from_config(DDPMScheduler.load_config(CONFIGS / family / "scheduler"), prediction_type=predicts, **ztsnr),
        notes=notes,
    )


# Marks of SDXL's relatives that are trained with noise of EDM's levels (Karras et al. 2022).
OTHER_NOISE = {"edm_vpred.sigma_max": "CosXL", "edm_mean": "Playground 2.5"}


def declared(weights: Weights, family: str) -> str | None:
    """What a file says that it predicts, or else what all of its family do; None for SD 2.x, which has both."""
    if says_v(weights.keys, weights.metadata):
        return "v_prediction"
    return None if family == "sd2" and weights.metadata.get("modelspec.prediction_type") != "epsilon" else "epsilon"


@torch.no_grad()
def measured(unet: Any) -> tuple[str, str]:
    """What a UNet predicts, and how that was found. At the last timestep the input is all but noise: who predicts the noise hands it back,
    and who predicts v = sqrt(a) noise - sqrt(1 - a) x_0, a being 0.005, answers with a picture."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(unet.dtype)
    answer = unet(noise, 999, noise.new_zeros(1, 77, unet.config.cross_attention_dim)).sample
    likeness = float(torch.cosine_similarity(answer.flatten().float(), noise.flatten().float(), dim=0))
    predicts = "epsilon" if likeness > 0.5 else "v_prediction"
    return predicts, f"its answer to pure noise is like the noise by {likeness:.2f} of 1, so {predicts} is assumed"


def _of_part(weights: Weights, places: Mapping[str, Place], part: str, module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module's whole state from a single file. Raises WeightsError where one lacks or has what the other does not."""
    wanted = {readable_name(part, name): (name, own.shape) for name, own in module.state_dict().items()}
    held = {name for name in places if name.startswith(f"{part}.")} - IGNORED
    odd = sorted(wanted.keys() ^ held)
    if odd:
        lacks = "lacks" if odd[0] in wanted else "has, and the architecture has not,"
        raise WeightsError(f"model.base: {weights.path} is damaged or of another architecture: it {lacks} {odd[0]}.")
    state = {}
    for name, (own, shape) in wanted.items():
        tensor = places[name].of(weights[places[name].key])
        if tensor.shape != shape:
            raise WeightsError(f"model.base: {weights.path} is of another architecture: {name} has another shape, {tuple(tensor.shape)}.")
        # contiguous, since thirds and transposed ones are views of what the file holds
        state[own] = tensor.to(dtype).contiguous()
    return state


# What files hold of text encoders and no model asks for: where positions are numbered, and OpenCLIP's temperature
IGNORED = {f"{part}.text_model.embeddings.position_ids" for part in TEXT_ENCODERS}


def _text_encoder_within(path: Path, places: Mapping[str, Place], family: str, part: str, dtype: torch.dtype) -> Part:
    shell = partial(_shell, TEXT_ENCODERS[part], CONFIGS / family / part, dtype)
    return Part((path,), dtype, partial(_text_encoder, path, places, part, dtype, shell), shell)


def _text_encoder(path: Path, places: Mapping[str, Place], part: str, dtype: torch.dtype, shell: Callable[[], Any]) -> Any:
    shapes = shell()
    kind, config = type(shapes), shapes.config
    # SD 2.x hears OpenCLIP's last layer but one, and its config counts 23 of the 24 that the file has
    last = re.compile(rf"{part}\.text_model\.encoder\.layers\.(\d+)\.")
    heard = {n: place for n, place in places.items() if not ((m := last.match(n)) and int(m[1]) >= config.num_hidden_layers)}
    if kind is CLIPTextModel:
        heard.pop(f"{part}.text_projection.weight", None)  # in OpenCLIP's files, and asked for by none but SDXL's second
    return kind.from_pretrained(None, config=config, state_dict=_of_part(Weights(path), heard, part, shapes, dtype), dtype=dtype)


# ---------------------------------------------------------------- VAEs


def vae_at(path: Path, family: str) -> Part:
    """A VAE alone: a folder of diffusers', or a file whose keys may begin as in a whole checkpoint. Raises WeightsError."""
    if path.is_dir():
        return _part(AutoencoderKL, path / "vae" if (path / "vae").is_dir() else path, torch.float32, "model.vae")
    if not path.is_file():
        raise WeightsError(f"model.vae: there is no {path}.")
    is_whole = any(key.startswith(VAE_PREFIX) for key in Weights(path).keys)
    return _vae_within(path, family, VAE_PREFIX if is_whole else "")


def _vae_within(path: Path, family: str, prefix: str) -> Part:
    shell = partial(_shell, AutoencoderKL, CONFIGS / family / "vae", torch.float32)
    return Part((path,), torch.float32, partial(_vae_of, path, prefix, shell), shell)


def _vae_of(path: Path, prefix: str, shell: Callable[[], Any]) -> Any:
    """In fp32."""
    vae = shell()
    state = {OLD_ATTENTION.sub(lambda found: OLD_NAMES[found[0]], key): tensor for key, tensor in Weights(path).below(prefix).items()}
    if not state:
        raise WeightsError(f"model.base: {path} has no VAE in it: give one with model.vae, a file or a folder.")
    wanted = vae.state_dict()
    found = state if wanted.keys() <= state.keys() else convert_ldm_vae_checkpoint(state, vae.config)
    odd = sorted(name for name, tensor in wanted.items() if name not in found or found[name].shape != tensor.shape)
    if odd:
        raise WeightsError(f"{path} has no VAE of this family in it: {odd[0]} is missing or has another shape.")
    vae.load_state_dict({name: found[name].float().contiguous() for name in wanted}, assign=True)
    return vae


# Of a VAE's attention, as diffusers wrote them until 2023: files of that time are still the most used.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
OLD_ATTENTION = re.compile("|".join(map(re.escape, OLD_NAMES)))
