"""Train the embedded model from scratch: a VAE first, then text encoder and UNet together.

    python -m sdlora.mini.train vae  --work .work/mini
    python -m sdlora.mini.train base --work .work/mini
    python -m sdlora.mini.train pack --work .work/mini    # fp16, diffusers' folder layout, into sdlora/mini/weights

Each stage is seeded, writes `<stage>.pt` every few minutes and goes on from it when started again. On several cores start it with
`torchrun --nproc_per_node 2 -m sdlora.mini.train …`: gradients are averaged over the processes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdlora.mini import WEIGHTS_DIR, world

# Added to min(SNR, 5), the weight of the error in x_0. Where and what a thing is gets decided at SNR < 0.05, which min-SNR weights
# next to nothing: without this floor, colours and kinds come first and places hardly ever.
HIGH_NOISE_WEIGHT = 0.05
LATENT_SCALE = 0.18215  # SD 1.x's scaling_factor, so that latents handed to the UNet have unit variance


@dataclass(frozen=True)
class Options:
    stage: Annotated[Literal["vae", "base", "pack"], tyro.conf.Positional]
    work: Path = Path(".work/mini")
    """Folder for checkpoints, latents and figures."""
    out: Path = WEIGHTS_DIR
    """Folder that `pack` writes."""
    steps: int = 0
    """Stop after this many optimizer steps; 0 takes the stage's own number."""
    schedule_steps: int = 0
    """Steps over which the rate falls; 0: those of the stage."""
    batch: int = 16
    """Pictures a step and process."""
    rate: float = 0.0
    """Peak learning rate; 0 takes the stage's own."""
    pictures: int = 49152
    """Pictures drawn and encoded for the base stage."""
    save_minutes: float = 4.0
    seed: int = 0


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, args=arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    options.work.mkdir(parents=True, exist_ok=True)
    {"vae": train_vae, "base": train_base, "pack": pack}[options.stage](options)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# ---------------------------------------------------------------- the models


def new_vae() -> AutoencoderKL:
    """Factor 4. Few, wide GroupNorm groups: with 2 channels a group the level of a flat colour is normalised away."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        sample_size=world.RESOLUTION,
        latent_channels=4,
        scaling_factor=LATENT_SCALE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    with torch.no_grad():  # start with a narrow posterior: its noise would drown the picture at first
        vae.quant_conv.weight[4:].mul_(0.01)
        vae.quant_conv.bias[4:].fill_(-5.0)
    return vae


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=world.RESOLUTION // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(32, 64, 128, 128),
        attention_head_dim=2,
        cross_attention_dim=128,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def new_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP-style byte BPE of 1,536 tokens, trained on the world's captions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=1534, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), end_of_word_suffix="</w>")
    rng = Random(0)
    words = (Path(__file__).parent / "words.txt").read_text().split()
    bpe.train_from_iterator([*(world.sample_scene(rng).caption for _ in range(4000)), *words], trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    # OpenAI's order: bytes, bytes that end a word, merges, the two special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet)]
    merges = merges[: 1536 - 2 - len(tokens)]
    tokens += ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77, local_files_only=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


# ---------------------------------------------------------------- a stage: seeded steps, averaged weights, a checkpoint to go on from


class Stage:
    """What a stage carries from step to step: weights, their moving average, optimizer, step."""

    def __init__(self, name: str, options: Options, module: nn.Module, steps: int, rate: float, decay: float):
        self.path = options.work / f"{name}.pt"
        self.log_path = options.work / f"{name}.jsonl"
        self.module, self.options = module, options
        self.steps, self.rate, self.decay = options.steps or steps, options.rate or rate, decay
        self.schedule_steps = options.schedule_steps or self.steps
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {k: v.clone() for k, v in module.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average, self.step, self.seconds = saved["average"], saved["step"], saved["seconds"]

    def run(self, loss_of: Callable[[int, torch.Generator, Random], tuple[Tensor, dict[str, float]]]) -> Iterator[int]:
        """Take the remaining steps; yields the step number each time a checkpoint has been written."""
        saved_at, shown_at, figures = time.monotonic(), time.monotonic(), []
        while self.step < self.steps:
            began = time.monotonic()
            progress = self.step / self.schedule_steps
            warm = min(1.0, (self.step + 1) / 200)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            key = (self.options.seed * 1_000_003 + self.step) * 64 + rank()
            loss, numbers = loss_of(self.step, torch.Generator().manual_seed(key), Random(key))
            loss.backward()
            gradient = torch.cat([cast(Tensor, p.grad).flatten() for p in self.parameters])
            if dist.is_initialized():
                dist.all_reduce(gradient)
                gradient /= world_size()
            norm = gradient.norm()
            gradient *= (1.0 / norm.clamp(min=1.0)) if norm.isfinite() else 0.0
            for p, g in zip(self.parameters, gradient.split([p.numel() for p in self.parameters]), strict=True):
                cast(Tensor, p.grad).copy_(g.view_as(p))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            state = self.module.state_dict()
            floats = [k for k, v in state.items() if v.is_floating_point()]
            torch._foreach_lerp_([self.average[k] for k in floats], [state[k] for k in floats], 1 - decay)
            self.seconds += time.monotonic() - began
            figures.append({"loss": float(loss), **numbers})
            last = self.step == self.steps
            if rank() == 0 and (self.step % 50 == 0 or last):
                means = {k: round(float(np.mean([f[k] for f in figures])), 5) for k in figures[0]}
                line = {"step": self.step, "of": self.steps, **means, "minutes": round(self.seconds / 60, 2)}
                figures.clear()
                with self.log_path.open("a") as log:
                    log.write(json.dumps(line) + "\n")
                if last or time.monotonic() - shown_at > 20:
                    print(line, flush=True)
                    shown_at = time.monotonic()
            due = torch.tensor(float(last or time.monotonic() - saved_at > self.options.save_minutes * 60))
            if dist.is_initialized():
                dist.broadcast(due, 0)
            if due:
                saved_at = time.monotonic()
                if rank() == 0:
                    self.save()
                yield self.step

    def save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)


# ---------------------------------------------------------------- stage 1: the VAE


def as_tensor(pictures: list[Any]) -> Tensor:
    """RGB pictures as (B, 3, H, W) in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def any_picture(rng: Random) -> Any:
    """A scene of everything that a LoRA may later show: held-out objects and the other drawing style too."""
    scene = world.sample_scene(rng, (*world.SHAPES, *world.FILES), pairs=0.4)
    return world.render(scene, rng, rng.choice(("fluent", "fluent", "noto")))


def train_vae(options: Options) -> None:
    """Reconstruct crops of 32 px, then whole pictures for the last sixth."""
    torch.manual_seed(options.seed)
    vae = new_vae()
    stage = Stage("vae", options, vae, steps=5000, rate=2e-3, decay=0.999)

    def loss_of(step: int, generator: torch.Generator, rng: Random) -> tuple[Tensor, dict[str, float]]:
        whole = step >= stage.schedule_steps * 5 // 6
        size = world.RESOLUTION if whole else 32
        pictures = []
        for _ in range(max(1, options.batch // 4) if whole else options.batch):
            x, y = rng.randint(0, world.RESOLUTION - size), rng.randint(0, world.RESOLUTION - size)
            pictures.append(any_picture(rng).crop((x, y, x + size, y + size)))
        pixels = as_tensor(pictures)
        with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode(latents).sample
        error = decoded.float() - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + error.square().mean() + 0.5 * edges + 1e-4 * kl
        return loss, {"l1": float(error.detach().abs().mean()), "kl": float(kl.detach()), "std": float(mean.detach().std())}

    for _ in stage.run(loss_of):
        pass
    if rank() == 0:
        vae.load_state_dict(stage.average)
        normalise_latents(vae, options.seed)
        vae.save_pretrained(options.work / "vae")


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, seed: int, count: int = 512) -> None:
    """Fold centring and scale of each latent channel into quant_conv and post_quant_conv: unit variance after `scaling_factor`."""
    rng = Random(seed + 77)
    latents = vae.encode(as_tensor([any_picture(rng) for _ in range(count)])).latent_dist.mean
    mean, gain = latents.mean((0, 2, 3)), 1 / (latents.std((0, 2, 3)) * LATENT_SCALE)  # z' = (z - mean) * gain
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight /= gain[None, :, None, None]
    quant.weight[:4] *= gain[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * gain
    quant.bias[4:] += 2 * gain.log()


# ---------------------------------------------------------------- stage 2: text encoder and UNet


def training_scene(rng: Random) -> world.Scene:
    while True:
        scene = world.sample_scene(rng)
        if not world.held_out(scene):
            return scene


@torch.no_grad()
def latents_and_captions(options: Options, vae: AutoencoderKL) -> tuple[Tensor, list[str]]:
    """Draw and encode the training pictures once. Latents (N, 4, 16, 16) fp16, unit variance."""
    path = options.work / f"latents-{options.pictures}.pt"
    if not path.exists() and rank() == 0:
        rng, latents, captions = Random(options.seed + 1), [], []
        threads = torch.get_num_threads()
        torch.set_num_threads(world_size() * threads)  # the other processes wait meanwhile
        for start in range(0, options.pictures, 64):
            scenes = [training_scene(rng) for _ in range(min(64, options.pictures - start))]
            pixels = as_tensor([world.render(s, rng) for s in scenes])
            latents.append((vae.encode(pixels).latent_dist.mean * LATENT_SCALE).half())
            captions += [s.caption for s in scenes]
        torch.set_num_threads(threads)
        torch.save({"latents": torch.cat(latents), "captions": captions}, path)
    if dist.is_initialized():
        dist.barrier()
    saved = torch.load(path, weights_only=True)
    return saved["latents"], saved["captions"]


class Base(nn.Module):
    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, input_ids: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        return cast(Tensor, self.unet(latents, timesteps, self.text_encoder(input_ids).last_hidden_state).sample)


def train_base(options: Options) -> None:
    """Epsilon prediction, min-SNR weights (gamma 5) with a floor, stratified timesteps, one caption in ten dropped for guidance."""
    torch.manual_seed(options.seed)
    vae = AutoencoderKL.from_pretrained(options.work / "vae", local_files_only=True)
    tokenizer = new_tokenizer(options.work / "tokenizer")
    base = Base(new_text_encoder(tokenizer), new_unet())
    latents, captions = latents_and_captions(options, vae)
    ids = torch.tensor(tokenizer(["", *captions], padding="max_length", truncation=True)["input_ids"], dtype=torch.int16)
    alphas = new_scheduler().alphas_cumprod
    stage = Stage("base", options, base, steps=10000, rate=1.2e-3, decay=0.9995)

    def loss_of(step: int, generator: torch.Generator, rng: Random) -> tuple[Tensor, dict[str, float]]:
        n = options.batch
        rows = torch.randint(0, len(captions), (n,), generator=generator)
        keep = torch.rand(n, generator=generator) >= 0.1
        timesteps = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * 1000).long()
        clean = latents[rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        a = alphas[timesteps][:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = base(ids[(rows + 1) * keep].long(), a.sqrt() * clean + (1 - a).sqrt() * noise, timesteps)
        snr = alphas[timesteps] / (1 - alphas[timesteps])
        error = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        return (error * (snr.clamp(max=5) + HIGH_NOISE_WEIGHT) / snr).mean(), {"mse": float(error.detach().mean())}

    for _ in stage.run(loss_of):
        if rank() == 0:
            live = {k: v.clone() for k, v in base.state_dict().items()}
            base.load_state_dict(stage.average)
            save_pipeline(options.work / "base", vae, tokenizer, base)
            base.load_state_dict(live)


def save_pipeline(folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, base: Base, dtype: torch.dtype = torch.float32) -> None:
    """SD 1.x's folder layout."""
    from copy import deepcopy

    for name, module in (("vae", vae), ("text_encoder", base.text_encoder), ("unet", base.unet)):
        deepcopy(module).to(dtype).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    new_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def pack(options: Options) -> None:
    vae = AutoencoderKL.from_pretrained(options.work / "base" / "vae", local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(options.work / "base" / "tokenizer", local_files_only=True)
    base = Base(
        CLIPTextModel.from_pretrained(options.work / "base" / "text_encoder", local_files_only=True),
        UNet2DConditionModel.from_pretrained(options.work / "base" / "unet", local_files_only=True),
    )
    save_pipeline(options.out, vae, tokenizer, base, torch.float16)


if __name__ == "__main__":
    main()
