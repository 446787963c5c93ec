"""Every option, declared once: files, flags, `sdlora options` and the error messages derive from these classes."""

import datetime
import difflib
import math
import re
import tomllib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from sdlora.errors import ConfigError

Named = typing.TypeVar("Named", str, Path)
Tables: typing.TypeAlias = dict[str, dict[str, Any]]  # section -> key -> value, as TOML has them
LONGEST_TEXT = 4000  # characters of one text or path
LONGEST_NAME = 255  # bytes of a file's or folder's name, as file systems have it


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, defer_build=True, allow_inf_nan=False, str_max_length=LONGEST_TEXT
    )


def _nameable(path: Named) -> Named:
    if any(len(part.encode()) > LONGEST_NAME for part in re.split(r"[/\\]", str(path))) or len(str(path)) > LONGEST_TEXT:
        raise PydanticCustomError("path", "no file or folder can have so long a name")
    return path


LARGEST = 2**31 - 1  # of a count: whatever is computed from it stays exact
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
FilePath = Annotated[Path, AfterValidator(_nameable)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=10)]
Dropped = Annotated[float, Field(ge=0, lt=1)]
LARGEST_FILE = 2**20  # bytes
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # and halves of characters; lines and tabs are text
DEEP_NAME = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}""")
TOKENS_A_CHUNK = 75  # of CLIP's 77, the others being start and end
TargetGroup = Literal[
    "attention",
    "feed_forward",
    "projection",
    "resnet",
    "resample",
    "time",
    "input_output",
    "attention+ff",
    "all-linear",
    "all-linear+conv",
    "everything",
]


class ModelOptions(Section):
    base: Annotated[str, AfterValidator(_nameable)] = Field(
        "mini",
        min_length=1,
        description="Base model of SD 1.x, SD 2.x or SDXL: a .safetensors checkpoint, a folder in diffusers' layout, 'owner/name' on the "
        "Hugging Face hub, or 'mini', the one built in.",
    )
    vae: Annotated[str, AfterValidator(_nameable)] | None = Field(
        None, min_length=1, description="Another VAE than the base's own: a .safetensors file, or a folder."
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What the base model predicts; unset: what it says itself, or what is usual of its kind, which you are told."
    )
    clip_skip: int = Field(
        1,
        ge=1,
        le=24,
        description="The text encoder's layer that embeddings come from, counted from the last, which is 1, as WebUIs do; many models of "
        "anime want 2. Draw with the same.",
    )
    base_precision: Literal["same", "bf16", "fp8", "int8", "nf4"] = Field(
        "same",
        description="How the weights of the UNet's blocks are kept in memory: as train.precision says ('same'), in 16 or 8 bits, or in 4 "
        "('nf4', with `pip install 'sdlora[bitsandbytes]'`). They are made whole for each use; they are rounded, the adapter is not.",
    )
    offload: bool = Field(
        False,
        description="Keep these weights in the machine's memory and bring each to the GPU for its use: the same losses, later. A narrow "
        "base_precision makes that quicker.",
    )
    vae_tile: Annotated[int, Field(ge=64, le=4096, multiple_of=64)] | None = Field(
        None,
        description="Side in px of the tiles in which the VAE takes larger pictures, a multiple of 64; unset: whole. Tiles take less "
        "memory, and their latents differ a little.",
    )
    attention: Literal["sdpa", "xformers"] = Field(
        "sdpa", description="Who computes the UNet's attention: PyTorch, or xformers (CUDA alone, `pip install 'sdlora[xformers]'`)."
    )


class PictureOptions(Section):
    """What can be said of one set of pictures: of all of them in [data], of some in [[data.sets]]."""

    folder: FilePath = Field(
        Path("pictures"),
        description="Folder of pictures, each with its caption in a .txt or .caption file of the same stem or in metadata.jsonl or .csv; "
        "or of kohya's subfolders, '<repeats>_<token> <class>'; or a dataset that Hugging Face's library saved (`save_to_disk`).",
    )
    repeats: PositiveInt = Field(1, description="How often each picture is shown in an epoch; kohya's subfolders multiply it by their own.")
    class_noun: str = Field(
        "", description="What your subject is, without the trigger word ('a photo of a cat'): the first pinned prompt where you list none."
    )
    trigger: str = Field("", description="Trigger word: replaces {trigger} in captions, or is put before those that lack it.")
    missing_caption: Literal["error", "empty", "trigger"] = Field(
        "error", description="What a picture without a caption gets: an error, the empty caption, or the trigger word."
    )
    caption_column: str = Field(
        "", description="Column of the captions in metadata.jsonl, metadata.csv or a saved dataset; empty: text, caption or prompt."
    )
    caption_lines: Literal["join", "pick"] = Field(
        "join", description="Several lines of a caption: joined to one, or one of them picked each time the picture is shown."
    )
    caption_prefix: str = Field("", description="Stands before every caption, just as written: 'a photo of {trigger}, '.")
    caption_suffix: str = Field("", description="Stands behind every caption, just as written.")
    shuffle_tags: bool = Field(False, description="Shuffle the comma-separated tags of a caption each time it is shown.")
    keep_tags: Count = Field(
        1,
        description="How many leading tags stay in place when tags are shuffled or left out; the trigger word is one, the prefix is none.",
    )
    caption_dropout: Share = Field(0.0, description="Share of steps at which a picture is shown with the empty caption.")
    tag_dropout: Share = Field(0.0, description="Share of a caption's tags that are left out each time it is shown.")
    flip: bool = Field(False, description="Also show each picture mirrored; harms what has a left and a right.")
    colour_variants: int = Field(
        0,
        ge=0,
        le=16,
        description="Also show each picture so many times with hues turned by up to 16 degrees and another gamma, always the same, "
        "as each has its latents; harms what is known by its colour.",
    )
    masks: Literal["off", "file", "alpha"] = Field(
        "off", description="Train a part of pictures only: what is white in NAME-masklabel.png beside NAME.png, or what alpha shows."
    )


class SetOptions(PictureOptions):
    """One [[data.sets]] table."""

    folder: FilePath = Field(description="As data.folder.")
    weight: float = Field(1.0, ge=0, description="How much its pictures count in the loss.")
    regularises: bool = Field(
        False,
        description="Shows the class without your subject: shown as often an epoch as all training pictures, told no trigger word, and "
        "class_noun where there is no caption.",
    )

    @model_validator(mode="after")
    def _a_trigger_is_named_where_it_is_used(self) -> Self:
        if self.regularises and (self.trigger or self.missing_caption == "trigger"):
            raise ValueError("data.sets: a set that regularises does without your subject, and so without trigger: leave it out")
        if self.missing_caption == "trigger" and not self.trigger:
            raise ValueError("data.missing_caption = 'trigger' needs a trigger word: set data.trigger")
        if "{trigger}" in self.caption_prefix + self.caption_suffix and not self.trigger:
            raise ValueError("data.caption_prefix or caption_suffix has {trigger} in it: set data.trigger")
        return self


# What [data] says of the subject, or of files beside its pictures, which a set without the subject does not take over.
OF_THE_SUBJECT = frozenset({"trigger", "missing_caption", "caption_column", "caption_prefix", "caption_suffix", "masks"})


class DataOptions(PictureOptions):
    regularisation_folder: FilePath | None = Field(
        None,
        description="Pictures of the class without your subject (as many an epoch as training pictures), with captions, or with "
        "data.class_noun as the caption. Short for a set with regularises = true.",
    )
    holdout: Count = Field(
        0,
        description="Pictures of your subject that are not trained: the loss on them, with noise that stays, is told every "
        "train.validate_every steps, and the LoRA where it was lowest is kept as NAME-best.safetensors.",
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="Whether an unreadable picture ends the run or is skipped and named."
    )
    max_pixels: PositiveInt = Field(
        200_000_000, description="A picture of more pixels than this counts as unreadable, which its header tells before memory is taken."
    )
    background: str = Field("white", description="What transparent pictures are laid over: '#rrggbb' or the name of a colour.")
    resolution: int = Field(512, ge=16, le=4096, description="Training size in px: buckets hold at most resolution x resolution pixels.")
    bucket_step: int = Field(64, ge=8, le=256, description="Sides of the aspect-ratio buckets are multiples of this many px.")
    min_side: PositiveInt | None = Field(None, description="Shortest side of a bucket in px; unset: half the resolution.")
    max_side: PositiveInt | None = Field(None, description="Longest side of a bucket in px; unset: twice the resolution.")
    resolutions: tuple[Annotated[int, Field(ge=16, le=4096)], ...] = Field(
        (),
        description="Several training sizes in place of data.resolution: a picture is shown at each that it fills without being enlarged, "
        "and in any case at the lowest.",
    )
    upscale: bool = Field(
        True, description="Enlarge a picture that is smaller than its bucket; false: it gets the largest bucket that fits inside it."
    )
    crop: Literal["centre", "random", "salient"] = Field(
        "centre",
        description="What of a picture its bucket shows where the shapes differ: the middle, each of four places in turn, or ('salient') "
        "where most edges are, which knows nothing of faces.",
    )
    cache: FilePath | None = Field(
        None,
        description="Folder of what is computed once of pictures and captions (latents, prompt embeddings), for all runs; unset: '_cache' "
        "in output.runs. See `sdlora cache`.",
    )
    max_tokens: Literal[75, 150, 225] = Field(
        75,
        description="Tokens of a caption that are used, in chunks of 75 as WebUIs encode long prompts; every caption is padded to as many.",
    )
    prompt_weights: bool = Field(
        False,
        description="Read (word), [word] and (word:1.2) in captions as WebUIs do. Off, as brackets are often part of a tag, fate_(series): "
        "with it on, write \\( and \\) there.",
    )
    sets: tuple[SetOptions, ...] = Field(
        (),
        max_length=256,
        description="Several folders in the place of data.folder, each a [[data.sets]] table in a file: folder; "
        + "; ".join(
            f"{key} = {str(field.default).lower()}, {str(field.description)[0].lower()}{str(field.description)[1:].rstrip('.')}"
            for key, field in SetOptions.model_fields.items()
            if key not in PictureOptions.model_fields
        )
        + f"; and {', '.join(key for key in PictureOptions.model_fields if key != 'folder')}, each as in [data] where left out.",
    )  # last, as TOML wants its tables behind the section's other keys

    @model_validator(mode="before")
    @classmethod
    def _sets_take_over_what_they_leave_out(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "sets" not in values:
            return values
        if values["sets"] and "folder" in values:
            raise ValueError(f"data.folder = {values['folder']!r} and data.sets both say where pictures are: leave one of them out")
        return values | {"sets": [_shared(values, one.get("regularises", False)) | one for one in values["sets"]]}

    @model_validator(mode="after")
    def _the_background_is_a_colour(self) -> Self:
        if self.background == type(self).model_fields["background"].default:
            return self
        from PIL import ImageColor  # late: a fifth of what a command takes to start

        try:
            known = all(0 <= value <= 255 for value in ImageColor.getrgb(self.background))
        except ValueError:
            known = False
        if not known:
            raise ValueError(f"data.background = {self.background!r} is no colour: write '#rrggbb' or a name as in CSS")
        return self

    @model_validator(mode="after")
    def _every_set_is_whole(self) -> Self:
        self.every_set()
        return self

    def every_set(self) -> tuple[SetOptions, ...]:
        """Those of data.sets, or the one in data.folder; then the one in data.regularisation_folder."""
        own = dict(self)
        sets = self.sets or (SetOptions(folder=self.folder, **_shared(own, False)),)
        if self.regularisation_folder is None:
            return sets
        return (*sets, SetOptions(folder=self.regularisation_folder, regularises=True, **_shared(own, True)))


def _shared(data: dict[str, Any], regularises: bool) -> dict[str, Any]:
    """What a set that says nothing else takes over from [data]."""
    kept = PictureOptions.model_fields.keys() - {"folder"} - (OF_THE_SUBJECT if regularises else frozenset())
    return {key: value for key, value in data.items() if key in kept}


class LoraOptions(Section):
    kind: Literal["lora", "dora", "mora", "full"] = Field(
        "lora",
        description="What is trained of a layer: 'lora', two thin matrices; 'dora', these and the size of each input channel; 'mora', one "
        "square matrix of as many numbers, of far higher rank; 'full', every weight, as a reference. See output.format.",
    )
    rank: int = Field(16, ge=1, le=2048, description="Rank of each layer's update, or less where the weight's smaller side is less.")
    layer_ranks: dict[str, Annotated[int, Field(ge=1, le=2048)]] = Field(
        default_factory=dict,
        description="Own ranks by glob, block or group, as in optimizer.layer_rates; alpha follows, so that the scale stays.",
    )
    alpha: float = Field(16.0, gt=0, le=4096, description="Starting alpha: the update is scaled by alpha / rank, or as `scaling` says.")
    layer_alphas: dict[str, Annotated[float, Field(gt=0, le=4096)]] = Field(
        default_factory=dict, description="Own starting alphas by glob, block or group."
    )
    scaling: Literal["standard", "rank_stabilised"] = Field(
        "standard", description="Scale of the update: 'standard' is alpha / rank, 'rank_stabilised' is alpha / sqrt(rank)."
    )
    learned_alpha: bool = Field(True, description="Train alpha, one number a layer; the exported file carries what was learned.")
    alpha_floor: float | None = Field(
        None, ge=0, le=4096, description="Learned alphas stay at or above this; unset: an alpha may cross zero and turn a layer round."
    )
    alpha_from: FilePath | None = Field(
        None, description="An earlier LoRA file: each layer's alpha starts from what that run learned, matched by name."
    )
    init: Literal[
        "kaiming",
        "gaussian",
        "orthonormal",
        "orthogonal",
        "down_zero",
        "pissa",
        "milora",
        "olora",
        "svd_energy",
        "gradient",
        "activation",
        "contrast",
    ] = Field(
        "kaiming",
        description="Start of the matrices. Random down and zero up: 'kaiming', 'gaussian'; random up and zero down: 'down_zero'; "
        "down frozen at singular values 1: 'orthonormal'; both random, their product zero: 'orthogonal'; from the base weight's largest "
        "or smallest singular vectors, 'pissa' and 'milora', or those that hold half its energy, 'svd_energy', or from its QR "
        "decomposition, 'olora'; from the loss gradient (LoRA-GA) or the layers' inputs (EVA) in a few batches: 'gradient', 'activation'; "
        "down frozen where your captions differ most from loss.pinned_prompts, so that these are touched little: 'contrast'.",
    )
    calibration_batches: int = Field(8, ge=1, le=1000, description="Batches that 'gradient', 'activation', 'contrast' look at.")
    unet: tuple[TargetGroup, ...] = Field(
        ("attention+ff",),
        description="UNet layers that are adapted; empty for none. Groups: attention, feed_forward, projection, resnet, resample, time, "
        "input_output (which kohya's scripts ignore). Sets of groups: attention+ff (with the projections), all-linear, all-linear+conv, "
        "everything.",
    )
    text_encoder: tuple[Literal["attention", "feed_forward", "projection"], ...] = Field(
        ("attention", "feed_forward"),
        description="Layers of the text encoders that are adapted; empty for none. projection: what pools a prompt in SDXL's second.",
    )
    biases: bool = Field(False, description="Also train the biases of adapted layers; needs output.format = 'exact'.")
    norms: bool = Field(False, description="Also train the norms of the parts that are adapted; needs output.format = 'exact'.")
    dropout: Dropped = Field(0.0, description="Share of a layer's inputs that its update does not see in a step.")
    rank_dropout: Dropped = Field(0.0, description="Share of a layer's ranks that are left out in a step, drawn for each picture.")
    module_dropout: Dropped = Field(0.0, description="Chance that a layer's update is left out in a step.")
    max_norm: float | None = Field(
        None, gt=0, description="Largest Frobenius norm of a layer's update; matrices are scaled down to it after each step; 1 is usual."
    )
    merge_every: Count = Field(
        0,
        description="ReLoRA: after this many steps fold the update into a full delta and start a new one, with a fresh optimizer and a "
        "new warm-up: many low ranks add up to a high one. 0 for never.",
    )

    @model_validator(mode="after")
    def _options_are_for_the_kind(self) -> Self:
        if self.kind in ("mora", "full"):
            fields = type(self).model_fields
            idle = ("init", "dropout", "rank_dropout", "module_dropout", "max_norm", "alpha_from", "alpha_floor", "layer_alphas")
            for key in idle:
                if getattr(self, key) != fields[key].get_default(call_default_factory=True):
                    raise ValueError(f"lora.{key} is for low-rank matrices, which lora.kind = '{self.kind}' lacks: leave it out")
        starts_from_weight = self.init in ("pissa", "milora", "olora", "svd_energy", "gradient")
        if self.merge_every and (self.kind != "lora" or starts_from_weight or self.init in ("activation", "contrast")):
            raise ValueError("lora.merge_every needs lora.kind = 'lora' and an init that neither takes from the weight nor is calibrated")
        if self.alpha_floor is not None and not self.learned_alpha:
            raise ValueError("lora.alpha_floor is for learned alphas: leave it out, or set lora.learned_alpha = true")
        if self.rank_dropout and self.init == "orthogonal":
            raise ValueError("lora.rank_dropout would take apart the halves of lora.init = 'orthogonal', whose product is zero together")
        if self.max_norm is not None and (self.merge_every or self.kind == "dora"):
            raise ValueError("lora.max_norm holds down and up alone, not what merge_every or lora.kind = 'dora' add to them: leave it out")
        if self.max_norm is not None and starts_from_weight:
            raise ValueError(f"lora.max_norm cannot hold an update that starts from the weight, as lora.init = '{self.init}' does")
        return self

    @property
    def dropouts(self) -> list[str]:
        """Names of those that are asked for."""
        return [name for name in ("dropout", "rank_dropout", "module_dropout") if getattr(self, name)]


class OptimizerOptions(Section):
    algorithm: Literal["adamw", "adamw_8bit", "prodigy", "came", "adafactor", "lion", "schedule_free"] = Field(
        "adamw",
        description="Optimizer of the matrices. 'prodigy' finds its rate itself: give rates of 1, which then mean shares of what it finds. "
        "'lion' wants a tenth of AdamW's rates. 'schedule_free' wants schedule = 'constant'. 'adamw_8bit' needs CUDA and bitsandbytes. "
        "Alphas are AdamW's whatever this says.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="More arguments of the optimizer's own class, by its own names: { d_coef = 0.5 }."
    )
    rate: Rate = Field(1e-4, description="Peak learning rate of the UNet's adapters.")
    text_encoder_rate: Rate | None = Field(None, description="Peak learning rate of the text encoder's adapters; unset: half the UNet's.")
    text_encoder_2_rate: Rate | None = Field(
        None, description="Peak learning rate of SDXL's second text encoder; unset: the first's; 0 leaves it out of the LoRA."
    )
    matched: bool = Field(
        False,
        description="Read rates as those of full fine-tuning: each layer's own rate is then set so that its weight moves as far as full "
        "fine-tuning at that rate would move it. 1e-5 is usual.",
    )
    alpha_rate: Rate = Field(1e-3, description="Peak learning rate of the learned alphas, as a share of the starting alpha a step.")
    up_ratio: float = Field(1.0, gt=0, le=64, description="Rate of up over rate of down, as in LoRA+; 1 treats both alike.")
    layer_rates: dict[str, Rate] = Field(
        default_factory=dict,
        description="Own rates by glob over layer names, by block ('down.0', 'mid', 'up.3', 'te.0-5', 'te2.0-5'), or by group "
        "('attention', 'unet.resnet'); the last match wins, 0 leaves a layer out of the LoRA.",
    )
    weight_decay: Share = Field(0.01, description="Weight decay of the matrices (never of alpha).")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = Field(
        None, description="The optimizer's betas; unset: 0.9 and 0.99 for AdamW, the optimizer's own otherwise."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    text_encoder_steps: Count = Field(0, description="Train the text encoder for this many steps only; 0: to the end.")
    schedule: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial"] = Field(
        "cosine", description="How rates fall from their peak towards the last step."
    )
    cycles: PositiveInt = Field(3, description="How often 'cosine_restarts' falls.")
    power: float = Field(2.0, gt=0, le=10, description="Exponent of 'polynomial'; 1 is linear.")
    warmup_steps: Count = Field(0, description="Steps over which rates rise from zero.")
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of a running average of the adapter, which is then what is previewed and exported; 0 for none."
    )

    @model_validator(mode="after")
    def _arguments_are_plain(self) -> Self:
        for key, value in self.arguments.items():
            for one in value if isinstance(value, list) else [value]:
                if not isinstance(one, bool | int | float | str) or (isinstance(one, float) and not math.isfinite(one)):
                    raise ValueError(f"optimizer.arguments.{key} must be a finite number, true, false, text, or a list of these")
        return self


class LossOptions(Section):
    weighting: Literal["min_snr", "debiased", "none"] = Field("min_snr", description="How much each timestep counts.")
    min_snr_gamma: float = Field(5.0, ge=0, description="Min-SNR weighting's gamma; 0 weights all timesteps alike.")
    distance: Literal["squared", "huber"] = Field(
        "squared", description="Error of the noise prediction: squared, or pseudo-Huber, which bad pictures in the set harm less."
    )
    huber_width: float = Field(0.1, gt=0, le=10, description="Error at which Huber turns from squared to straight (at the highest noise).")
    huber_schedule: Literal["snr", "constant"] = Field(
        "snr", description="Whether Huber's width grows towards 1 as the noise falls, or stays."
    )
    noise_offset: Share = Field(0.0, description="Strength of noise shared by all pixels of a channel, for darker darks.")
    multires_discount: Share = Field(0.0, description="Share of each coarser level in multi-resolution noise; 0 for none, 0.3 is usual.")
    input_perturbation: Share = Field(0.0, description="Extra noise in what the model sees but need not predict; 0.1 is usual.")
    timesteps: Literal["uniform", "logit_normal"] = Field(
        "uniform", description="How timesteps are drawn: evenly, or with more in the middle."
    )
    logit_mean: float = Field(0.0, ge=-5, le=5, description="Logit-normal's mean; above 0 for more noise.")
    logit_deviation: float = Field(1.0, gt=0, le=5, description="Logit-normal's deviation.")
    first_timestep: int = Field(0, ge=0, le=999, description="Lowest timestep that is trained; 0 is the cleanest.")
    last_timestep: int = Field(999, ge=0, le=999, description="Highest timestep that is trained; 999 is pure noise.")
    zero_terminal_snr: bool = Field(False, description="Rescale the noise schedule to end in pure noise; for v-prediction models only.")
    embedding_norm: float = Field(
        0.1, ge=0, description="Weight of the term that keeps text-embedding norms near the base model's; drift is logged even at 0."
    )
    embedding_norm_distance: Literal["squared", "absolute", "huber"] = Field(
        "squared", description="How the deviation of a token's norm counts; 'huber' is squared up to 10 % and grows evenly beyond."
    )
    embedding_norm_order: Literal[1, 2] = Field(2, description="Which norm: 1, the sum of absolute values, or 2, the length.")
    embedding_norm_relative: bool = Field(
        True, description="Deviation as a share of the base norm, so that one weight serves every model; false: in the norm's own unit."
    )
    embedding_norm_padding: bool = Field(
        True, description="Count the padding behind a caption's end, too: the UNet reads it like any token. false: its words alone."
    )
    embedding_norm_per: Literal["token", "prompt"] = Field(
        "token", description="Hold the norm of each token, or only their mean over a prompt, which leaves single tokens free."
    )
    pinned_prompts: tuple[str, ...] = Field(
        (),
        description="Prompts that the LoRA must leave as they are. Empty: data.class_noun and a dozen of common things; your own list, of "
        "what your LoRA must not touch, holds more.",
    )
    pinned_embedding: float = Field(
        0.0, ge=0, description="Weight of the term that holds the whole text embeddings of two pinned prompts a step near the base model's."
    )
    pinned_distance: Literal["squared", "cosine"] = Field(
        "squared", description="How far pinned embeddings are from the base's: squared and relative, or by angle alone."
    )
    prior: float = Field(
        0.0,
        ge=0,
        description="Weight of the base-model prior: for pinned prompts the model must predict what it predicts without the LoRA.",
    )
    prior_samples: PositiveInt = Field(1, description="Samples of the base-model prior a batch; each costs a picture's time and a half.")
    regularisation: float = Field(
        1.0, ge=0, description="Weight of the pictures in data.regularisation_folder and in sets that regularise, times the set's own."
    )
    unmasked: Share = Field(0.0, description="Weight of what a picture's mask leaves out, where data.masks is on.")

    @model_validator(mode="after")
    def _timesteps_are_a_range(self) -> Self:
        if self.first_timestep > self.last_timestep:
            raise ValueError(f"loss.first_timestep = {self.first_timestep} lies above loss.last_timestep = {self.last_timestep}")
        return self


class TrainOptions(Section):
    steps: PositiveInt = Field(1000, description="Optimizer steps.")
    batch_size: PositiveInt = Field(1, description="Pictures a step.")
    accumulation: PositiveInt = Field(1, description="Batches whose gradients are averaged into one step.")
    seed: int = Field(0, ge=0, lt=2**63, description="Fixes data order, noise, timesteps and initial weights.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="Arithmetic of the frozen model; adapters stay in fp32. 'fp16', which scales losses, is for GPUs without bf16."
    )
    device: str = Field("auto", description="Where to train: auto, cpu, cuda, cuda:1, mps.")
    threads: Count = Field(0, description="CPU threads; 0 leaves it to PyTorch. Part of what makes a run repeatable to the bit.")
    gradient_checkpointing: bool = Field(False, description="Compute activations twice to save memory.")
    compile: bool = Field(
        False,
        description="Have PyTorch compile the UNet's transformer blocks: quicker steps on a GPU, after minutes for the first of each size "
        "of pictures. Not with dropout of adapters, nor with model.offload.",
    )
    validate_every: PositiveInt = Field(50, description="Steps between two looks at the pictures of data.holdout.")
    checkpoint_every: Count = Field(250, description="Steps between checkpoints; 0 for the last one only.")
    keep_checkpoints: int = Field(2, ge=2, description="How many checkpoints stay on disk.")
    max_bad_steps: Count = Field(
        3, description="Steps in a row whose loss or gradient is not finite that are skipped before the run ends with an error."
    )


class PreviewOptions(Section):
    prompts: tuple[str, ...] = Field(
        (), description="Pictures to draw while training: 'text --n negative --w 512 --h 512 --d seed --s steps --l scale'."
    )
    every: Count = Field(250, description="Steps between previews; 0 for before and after only.")
    sampling_steps: int = Field(20, ge=1, le=1000, description="Denoising steps of a preview (DPM-Solver++ 2M).")
    guidance: float = Field(7.0, ge=0, le=100, description="Classifier-free guidance scale of a preview.")


class OutputOptions(Section):
    format: Literal["plain", "exact"] = Field(
        "plain",
        description="'plain': down, up and alpha alone, right in every program; what is not of low rank (other kinds, merge_every) is "
        "folded to a rank, the error told. 'exact': as it was trained, which not every program reads rightly; you are told which.",
    )
    largest_rank: Annotated[int, Field(ge=1, le=2048)] | None = Field(
        None, description="Largest rank of a layer in a plain file, the error told; unset: as trained, or what keeps 99.99 % of the energy."
    )
    save_precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="Of the numbers in the file: 'fp16' and 'bf16' halve it, and round what was learned to 3 or 2 digits."
    )
    metadata: Literal["full", "minimal", "none"] = Field(
        "full",
        description="What the file says of itself. 'minimal': what programs need to apply and show it, without captions, folders, options, "
        "dates or the base's name; 'none': its family alone. Only 'full' can be another run's lora.alpha_from.",
    )
    author: str = Field("", description="Who made the LoRA, as the file says it.")
    licence: str = Field("", description="Under which terms it may be used, as the file says it.")
    runs: FilePath = Field(Path("runs"), description="Where run folders are made.")
    name: str = Field("lora", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="Name of the run and of the exported file.")


class Config(Section):
    model: ModelOptions = Field(default_factory=ModelOptions)
    data: DataOptions = Field(default_factory=DataOptions)
    lora: LoraOptions = Field(default_factory=LoraOptions)
    optimizer: OptimizerOptions = Field(default_factory=OptimizerOptions)
    loss: LossOptions = Field(default_factory=LossOptions)
    train: TrainOptions = Field(default_factory=TrainOptions)
    preview: PreviewOptions = Field(default_factory=PreviewOptions)
    output: OutputOptions = Field(default_factory=OutputOptions)

    @model_validator(mode="after")
    def _an_average_outlives_no_merge(self) -> Self:
        if self.lora.merge_every and (self.optimizer.ema or self.optimizer.algorithm == "schedule_free"):
            raise ValueError("lora.merge_every starts its matrices anew, over which neither optimizer.ema nor schedule_free can average")
        return self

    @model_validator(mode="after")
    def _what_is_compiled_stays_the_same(self) -> Self:
        """Dropout draws by another seed in each step, and a weight that is fetched for its use is another each time."""
        others = [*(f"lora.{name}" for name in self.lora.dropouts), *(["model.offload"] if self.model.offload else [])]
        if self.train.compile and others:
            raise ValueError(f"train.compile and {others[0]} do not go together: leave one of them out")
        return self

    @model_validator(mode="after")
    def _what_is_trained_can_be_written(self) -> Self:
        if self.output.format == "plain" and (self.lora.biases or self.lora.norms):
            raise ValueError("lora.biases and lora.norms have no place in a plain file: set output.format = 'exact', or leave them out")
        if self.optimizer.up_ratio != 1 and self.lora.kind in ("mora", "full"):
            raise ValueError(f"optimizer.up_ratio is for down and up, which lora.kind = '{self.lora.kind}' lacks: leave it out")
        if self.optimizer.matched and self.lora.kind == "mora":
            raise ValueError("optimizer.matched is derived for down and up, which lora.kind = 'mora' lacks: leave it out")
        if self.output.format == "exact" and self.output.largest_rank is not None:
            raise ValueError("output.largest_rank is for plain files: set output.format = 'plain', or leave it out")
        return self


@dataclass(frozen=True)
class Option:
    """One line of the reference."""

    name: str  # section.key
    field: FieldInfo

    @property
    def default(self) -> Any:
        return self.field.get_default(call_default_factory=True)

    @property
    def type(self) -> str:
        return _type_name(self.field.annotation)


def options() -> Iterator[Option]:
    for section, of in Config.model_fields.items():
        for key, field in typing.cast(type[Section], of.annotation).model_fields.items():
            yield Option(f"{section}.{key}", field)


def default(name: str) -> Any:
    """Of the option `section.key`, as it is declared: to make its section for that would take longer than all else of `--help`."""
    return next(option.default for option in options() if option.name == name)


def load(files: Sequence[Path] = (), flags: Sequence[tuple[str, str]] = ()) -> Config:
    """Merge TOML files, later ones over earlier ones, then flags over them.

    A flag is (name, value): the name is `section.key`, or the key alone where only one section has it. Raises ConfigError.
    """
    return merge([_read(path) for path in files], flags)


def parse(text: str, name: str) -> Tables:
    """The options that a TOML text sets, by section; `name` is the text's own in messages. Raises ConfigError."""
    try:
        read = _parsed(text)
    except ValueError as error:
        raise ConfigError(f"Cannot read {name} as TOML: {_short(str(error))}.") from None
    for section, value in read.items():
        _check_values({section: value}, "")
    _check_names(read, name)
    return read


def merge(tables: Sequence[Tables], flags: Sequence[tuple[str, str]] = ()) -> Config:
    """As `load`, of what `parse` gave."""
    merged: Tables = {}
    for read in tables:
        for section, values in read.items():
            merged.setdefault(section, {}).update(values)
    for name, text in flags:
        if name.replace("-", "_").split(".")[:2] in (["data", "sets"], ["sets"]):
            raise ConfigError(f"--{name}: sets are written as [[data.sets]] tables in a TOML file; no flag can set them.")
        option = _find(name)
        section, key = option.name.split(".")
        value = _value(option, text)
        _check_values(value, option.name)
        merged.setdefault(section, {})[key] = value
    return _validate(merged)


def dump(config: Config) -> str:
    """The config as TOML that `load` reads back to an equal one, each option under its description."""
    import tomlkit  # late, as most commands write none

    document = tomlkit.document()
    for option in options():
        section, key = option.name.split(".")
        table = document.setdefault(section, tomlkit.table())
        value = getattr(getattr(config, section), key)
        replaced = option.name == "data.folder" and config.data.sets
        if value is not None and not replaced:
            table.add(tomlkit.comment(str(option.field.description)))
            table.add(key, _plain(value))
    return tomlkit.dumps(document)


def _plain(value: Any) -> Any:
    """An option's value in TOML's own types."""
    if isinstance(value, Section):
        return {key: _plain(of) for key, of in value if of is not None}
    if isinstance(value, tuple):
        return [_plain(of) for of in value]
    if isinstance(value, dict):
        from tomlkit import inline_table  # late, as above

        return inline_table() | value  # a table of its own would take the descriptions behind it along
    return str(value) if isinstance(value, Path) else value


def _validate(values: dict[str, Any]) -> Config:
    try:
        return Config.model_validate({section: {} for section in Config.model_fields} | values)  # else each default is built by itself
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # one of our own sentences
            raise ConfigError(f"{_short(str(first['ctx']['error']))}.") from None
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ConfigError(f"{name} is missing.") from None
        message = first["msg"][0].lower() + first["msg"][1:]
        raise ConfigError(f"{_short(name)} = {_short(repr(first['input']))}: {message}.") from None


def _short(text: str) -> str:
    """Its ends, where it is too long for a message."""
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def _read(path: Path) -> Tables:
    try:
        if not path.is_file():  # a pipe would never end
            raise FileNotFoundError
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"The config file {path} has more than {LARGEST_FILE:,} bytes: it is no config file.")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"No config file {path}.{_near(str(path), [str(p) for p in path.parent.glob('*.toml')])}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the config file {path}: {_short(str(error))}.") from None
    return parse(text, str(path))


def _parsed(text: str) -> dict[str, Any]:
    """Raises ValueError for what is no TOML, or nested as no config is."""
    if DEEP_NAME.search(text):  # tomllib's memory grows with the square of their depth
        raise ValueError("a name has more than 32 parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _check_values(value: Any, name: str, depth: int = 0) -> None:
    """Refuse what TOML can write and no option can mean: it would break what is made of options, from file names to a terminal."""
    if depth > 6:
        raise ConfigError(f"{_short(name)}: no option is nested so deep.")
    if isinstance(value, str) and (found := CONTROL.search(value)):
        raise ConfigError(f"{name}: its text has the control character {found[0]!r} in it, which no option can take.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{name}: the number has more than 64 bits.")
    if isinstance(value, dict):
        for key, of in value.items():
            if CONTROL.search(key) or "\n" in key or len(key) > 300:
                raise ConfigError(f"{name or 'The config file'}: {_short(repr(key))} is not the name of anything.")
            _check_values(of, f"{name}.{key}" if name else key, depth + 1)
    if isinstance(value, list):
        for of in value:
            _check_values(of, name, depth + 1)


def _check_names(read: dict[str, Any], name: str) -> None:
    known = {option.name for option in options()}
    for section, values in read.items():
        if section not in Config.model_fields:
            raise ConfigError(f"{name}: [{section}] is not a section of options.{_near(section, Config.model_fields)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: {section} must be a section, written [{section}].")
        for key in values:
            if f"{section}.{key}" not in known:
                raise ConfigError(f"{name}: {section}.{key} is not an option.{_near(f'{section}.{key}', known)}")
    _check_sets(read.get("data", {}).get("sets", []), name)


def _check_sets(sets: Any, name: str) -> None:
    if not isinstance(sets, list) or not all(isinstance(one, dict) for one in sets):
        raise ConfigError(f"{name}: data.sets must be tables, each written [[data.sets]].")
    for key in (key for one in sets for key in one):
        if key not in SetOptions.model_fields:
            raise ConfigError(f"{name}: {key} is not an option of [[data.sets]].{_near(key, SetOptions.model_fields)}")


def _find(name: str) -> Option:
    """The option of a flag, by its full name, or by its key where that is unambiguous."""
    name = name.replace("-", "_")
    found = [o for o in options() if name in (o.name, o.name.split(".")[1])]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"--{name} could be any of {', '.join('--' + o.name for o in found)}: write the full name.")
    names = [o.name for o in options()]
    raise ConfigError(f"--{name} is not an option.{_near(name, [*names, *(n.split('.')[1] for n in names)], '--')}")


def _value(option: Option, text: str) -> Any:
    """A flag's text as a TOML value, or as it stands where the option takes text."""
    if "text" in option.type.split(" or ") or option.type == "path" or text == "":
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = _parsed(f"value = {text}")["value"]
    except ValueError:
        value = text
    if isinstance(value, datetime.date | datetime.time):
        value = text
    if option.type.startswith("list") and not isinstance(value, list):
        value = [value]
    return value


def _near(name: str, names: typing.Iterable[str], prefix: str = "") -> str:
    names = list(names)
    close = difflib.get_close_matches(name, names, 1, 0.6)
    if not close and "." in name:  # a right key in the wrong section
        close = [n for n in names if n.endswith("." + name.split(".")[-1])][:1]
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"table of {_type_name(arguments[0])} = {_type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "tables"
    if arguments:  # X | None
        return " or ".join("unset" if a is type(None) else _type_name(a) for a in arguments)
    return {str: "text", int: "integer", float: "number", bool: "true | false", Path: "path", Any: "value"}[annotation]
