"""The loss of one batch: what the model is asked, and what is added to keep the base model whole. Random draws are functions of
(seed, step, sample), so a batch can be computed again at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from sdlora.config import Config, LossOptions
from sdlora.data.batches import BatchPlan, sample_seed
from sdlora.data.captions import choose_caption, fixed_caption
from sdlora.diffusion.losses import WEIGHTINGS, denoising_loss, huber_width
from sdlora.diffusion.noise import perturb, sample_noise
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.diffusion.timesteps import Distribution, stratified
from sdlora.errors import ConfigError
from sdlora.items import Item
from sdlora.latents import Posterior
from sdlora.lora.embedding_norm import Remembered, cosine_drift, embedding_norms, norm_drift, norm_loss, pinned_loss
from sdlora.lora.layers import Adapter, disabled, set_drop_seeds, stop_dropping
from sdlora.models import text
from sdlora.models.family import Family, Model, PromptEmbeds
from sdlora.processes import ALONE, Processes

PINNED_A_BATCH = 2  # bounds what the term costs: two short runs of the text encoder
WATCHED_PROMPTS = 8  # pinned prompts whose drift is told
# What a LoRA should leave alone where the user does not say it: people, animals, things, places, manners of drawing.
GENERIC_PROMPTS = (
    "a photo of a woman",
    "a portrait of a man",
    "a dog",
    "a cat",
    "a bird in a tree",
    "a car on a road",
    "a house",
    "a city street at night",
    "a landscape with mountains",
    "a bowl of fruit on a table",
    "a watercolor painting",
    "a black and white drawing",
)


@dataclass(frozen=True)
class Loss:
    """Of one batch."""

    total: Tensor  # what is differentiated
    denoising: float  # the diffusion loss alone
    drift: float  # mean over tokens of |norm / base norm - 1|
    worst_drift: float  # the largest of them


class Objective:
    """Remembers the norms of what the base encoder says of a prompt; all else is a function of (step, part)."""

    def __init__(
        self,
        config: Config,
        family: Family,
        model: Model,
        items: Sequence[Item],
        plan: BatchPlan,
        latents: Sequence[Posterior],
        of_base: Callable[[Sequence[str]], PromptEmbeds],
        layers: Mapping[str, Adapter],
        processes: Processes = ALONE,
    ):
        """`of_base`: what the base encoders say of prompts, without gradients. Each of `processes` takes its share of a batch, and the mean
        of their losses is the loss of the batch."""
        self.processes = processes
        self.config, self.family, self.model = config, family, model
        self.items, self.plan, self.latents = items, plan, latents
        self.layers = dict(layers)
        self.schedule = noise_schedule_of(model, config)
        self.distribution = timesteps_of(config)
        self.trains_text = trains_text(layers)
        self.pinned = pinned_prompts(config)
        self.of_base = of_base
        self.base_norms = Remembered(lambda prompts: self._norms(of_base(prompts)), most=100_000)

    def __call__(self, step: int, part: int, text_rests: bool = False) -> Loss:
        """Loss of batch number `part` of a step, counted from 0; with `text_rests` the text encoder gets no gradient."""
        loss, batch = self.config.loss, step * self.config.train.accumulation + part
        self._set_dropout(batch)
        indices = self.plan.batch(batch)
        own = len(self._share(batch)) * self.processes.count / len(indices)  # how much this process's part of the batch weighs
        embeds, drift, worst, terms = None, 0.0, 0.0, []
        if self.trains_text and own:
            captions = self.captions(step, part)
            with torch.set_grad_enabled(not text_rests):
                embeds = self.family.encode_prompts(self.model, captions)
            norms, wanted = self._norms(embeds), self.base_norms(captions)
            drift, worst = norm_drift(*(torch.cat(of, dim=1) for of in ([n.detach() for n in norms], wanted)))
            if loss.embedding_norm and not text_rests:
                terms.append(own * loss.embedding_norm * self._norm_term(norms, wanted, captions))
        denoising = own * self.denoising(step, part, embeds) if own else torch.zeros((), device=self.model.device, requires_grad=True)
        if self.trains_text and not text_rests and loss.pinned_embedding:
            prompts = self._pinned(batch, "pinned", PINNED_A_BATCH)
            terms += [loss.pinned_embedding * pinned_loss(*pair, loss.pinned_distance) for pair in self._now_and_before(prompts)]
        if loss.prior:
            prompts = self._pinned(batch, "prior", loss.prior_samples)
            with torch.set_grad_enabled(not text_rests):
                embeds = self.family.encode_prompts(self.model, prompts) if self.trains_text else self.of_base(prompts)
            terms.append(loss.prior * self._prior(embeds, self.of_base(prompts), batch))
        total = denoising
        for term in terms:
            total = total + term
        return Loss(total, float(denoising.detach()), own * drift, worst)

    def denoising(self, step: int, part: int, embeds: PromptEmbeds | None = None, through_text: bool = False) -> Tensor:
        """The diffusion loss alone. `embeds` of the batch's captions; None: computed here where gradients are to go `through_text`, else
        those of the base encoders."""
        config = self.config
        if through_text:
            embeds = self.family.encode_prompts(self.model, self.captions(step, part))
        batch = step * config.train.accumulation + part
        first, share = self._first(step, part), self._share(batch)
        indices = self._own(batch)
        noise_seeds, timestep_seeds = (self._seeds(step, part, purpose) for purpose in ("noise", "timestep"))
        samples = self._first(step, config.train.accumulation)  # that the step really has: the last batch of a bucket may be short
        timesteps = stratified(timestep_seeds, first + share.start, samples, self.distribution).to(self.model.device)
        posteriors = [self.latents[index] for index in indices]  # read from disk: once
        clean, noise, seen_noise = latents_and_noise(posteriors, noise_seeds, config.loss)
        clean, noise, seen_noise = (tensor.to(self.model.device) for tensor in (clean, noise, seen_noise))
        embeds = self.of_base(self.captions(step, part)) if embeds is None else embeds
        noisy = self.schedule.add_noise(clean, seen_noise, timesteps)
        predicted = self.family.predict(self.model, noisy, timesteps, embeds, self._time_ids(indices))
        weight, width = weight_and_width(self.schedule, timesteps, config.loss)
        weight = weight * torch.tensor([self.items[index].weight for index in indices], device=weight.device)
        return denoising_loss(predicted, self.schedule.target(clean, noise, timesteps), weight, width, self._masks(posteriors))

    @torch.no_grad()
    def pinned_drift(self) -> float | None:
        """Mean over text encoders and tokens of 1 - cosine between the embeddings of some pinned prompts and the base encoder's; None where
        no text encoder is trained."""
        if not self.trains_text:
            return None
        stop_dropping(self.layers.values())
        drifts = [cosine_drift(now, before) for now, before in self._now_and_before(self.pinned[:WATCHED_PROMPTS])]
        return sum(drifts) / len(drifts)

    def _now_and_before(self, prompts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """What is said of prompts and what the base encoders say: (B, n, D) of each encoder, then of a pooled embedding."""
        return zip(self.family.encode_prompts(self.model, prompts).vectors, self.of_base(prompts).vectors, strict=True)

    def _norms(self, embeds: PromptEmbeds) -> tuple[Tensor, ...]:
        """(B, T) of each text encoder, and (B, 1) of a pooled embedding."""
        return tuple(embedding_norms(vectors, self.config.loss.embedding_norm_order) for vectors in embeds.vectors)

    def _norm_term(self, norms: Sequence[Tensor], wanted: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """Sum over text encoders and the pooled embedding, so that each is held as firmly as if it were the only one."""
        loss = self.config.loss
        words = None if loss.embedding_norm_padding else text.token_masks(self.model, captions).to(self.model.device)
        terms = [
            norm_loss(
                now,
                before,
                loss.embedding_norm_distance,
                relative=loss.embedding_norm_relative,
                counted=words if now.shape[1] > 1 else None,
                per_prompt=loss.embedding_norm_per == "prompt",
            )
            for now, before in zip(norms, wanted, strict=True)
        ]
        return torch.stack(terms).sum()

    def _time_ids(self, indices: Sequence[int]) -> Tensor:
        """(B, 6), see Item.time_ids."""
        return torch.tensor([self.items[index].time_ids for index in indices], dtype=torch.float32, device=self.model.device)

    def ask_what_is_pinned(self, batch: int) -> None:
        """Let the model, as it is, predict for pinned prompts what the prior would ask with as many samples as the batch has."""
        prompts = self._pinned(batch, "prior", len(self.plan.batch(batch)))
        noisy, timesteps, time_ids = self._prior_asked(batch, len(prompts))
        self.family.predict(self.model, noisy, timesteps, self.family.encode_prompts(self.model, prompts), time_ids)

    def _prior(self, embeds: PromptEmbeds, base_embeds: PromptEmbeds, batch: int) -> Tensor:
        """The base-model prior: what the model without adapters predicts for a prompt is the target of the model with them.

        As prior preservation (DreamBooth, Ruiz et al. 2023), with the base model's prediction in the place of pictures that it drew, so
        that nothing has to be drawn, or kept on disk.
        """
        noisy, timesteps, time_ids = self._prior_asked(batch, len(embeds.states[0]))
        with torch.no_grad(), disabled(self.layers.values()):
            wanted = self.family.predict(self.model, noisy, timesteps, base_embeds, time_ids)
        weight, width = weight_and_width(self.schedule, timesteps, self.config.loss)
        return denoising_loss(self.family.predict(self.model, noisy, timesteps, embeds, time_ids), wanted, weight, width)

    def _prior_asked(self, batch: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents of the batch's pictures (count, C, h, w), in turn, their timesteps and time ids."""
        shown, device = self.plan.batch(batch), self.model.device
        indices = [shown[k % len(shown)] for k in range(count)]
        noise_seeds, timestep_seeds = (
            [sample_seed(self.config.train.seed, batch, k, purpose) for k in range(count)] for purpose in ("prior noise", "prior timestep")
        )
        timesteps = stratified(timestep_seeds, 0, count, self.distribution).to(device)
        clean, _, seen_noise = latents_and_noise([self.latents[index] for index in indices], noise_seeds, self.config.loss)
        return self.schedule.add_noise(clean.to(device), seen_noise.to(device), timesteps), timesteps, self._time_ids(indices)

    def shown(self, step: int) -> list[int]:
        """Items of a step, over all its batches."""
        parts = self.config.train.accumulation
        return [index for part in range(parts) for index in self.plan.batch(step * parts + part)]

    def _first(self, step: int, part: int) -> int:
        """How many samples of the step come before this part's."""
        begin = step * self.config.train.accumulation
        return sum(len(self.plan.batch(begin + earlier)) for earlier in range(part))

    def _seeds(self, step: int, part: int, purpose: str) -> list[int]:
        first, share = self._first(step, part), self._share(step * self.config.train.accumulation + part)
        return [sample_seed(self.config.train.seed, step, first + k, purpose) for k in share]

    def _share(self, batch: int) -> range:
        """Places in a batch of the samples that are this process's."""
        return self.processes.share(len(self.plan.batch(batch)))

    def _own(self, batch: int) -> list[int]:
        """Indices of these samples."""
        indices = self.plan.batch(batch)
        return [indices[place] for place in self._share(batch)]

    def captions(self, step: int, part: int) -> list[str]:
        """What a batch is told."""
        shown = [self.items[index] for index in self._own(step * self.config.train.accumulation + part)]
        return [
            choose_caption(item.example.caption, Random(seed), item.rules)
            for item, seed in zip(shown, self._seeds(step, part, "caption"), strict=True)
        ]

    def _pinned(self, batch: int, purpose: str, count: int) -> list[str]:
        """Which pinned prompts a batch holds: drawn anew each time."""
        return Random(sample_seed(self.config.train.seed, batch, 0, purpose)).choices(self.pinned, k=count)

    def _masks(self, posteriors: Sequence[Posterior]) -> Tensor | None:
        """Weight of each latent pixel, (B, 1, h, w); None where no picture of the batch has a mask."""
        if all(posterior.mask is None for posterior in posteriors):
            return None
        like, rest = posteriors[0].mean[:1], self.config.loss.unmasked
        shown = torch.stack([torch.ones_like(like) if posterior.mask is None else posterior.mask for posterior in posteriors])
        return (rest + (1 - rest) * shown).to(self.model.device)

    def _set_dropout(self, batch: int) -> None:
        seed = self.config.train.seed
        if self.config.lora.dropouts:
            set_drop_seeds(self.layers.values(), [sample_seed(seed, batch, self.processes.rank, f"dropout {name}") for name in self.layers])


def trains_text(layers: Iterable[str]) -> bool:
    return any(name.startswith("text_encoder") for name in layers)


def prompts_of(config: Config, items: Sequence[Item], text_is_trained: bool) -> list[str]:
    """Every prompt whose base embedding the run will ask for, but for captions that vary from one showing to the next."""
    captions = [caption for item in items if (caption := fixed_caption(item.example.caption, item.rules)) is not None]
    empty = [""] if any(item.rules.dropout for item in items) else []
    return [*captions, *empty, *(pinned_prompts(config) if config.loss.prior or text_is_trained else ())]


def pinned_prompts(config: Config) -> tuple[str, ...]:
    """The user's own, or the class nouns and what every model draws."""
    nouns = dict.fromkeys(of.class_noun for of in config.data.every_set() if of.class_noun)
    return config.loss.pinned_prompts or (*nouns, *GENERIC_PROMPTS)


def noise_schedule_of(model: Model, config: Config) -> NoiseSchedule:
    if not config.loss.zero_terminal_snr:
        return model.noise_schedule
    if model.noise_schedule.prediction_type != "v_prediction":
        raise ConfigError("loss.zero_terminal_snr is for v-prediction models, and this one predicts epsilon: leave it false.")
    return model.noise_schedule.with_zero_terminal_snr()


def timesteps_of(config: Config) -> Distribution:
    loss = config.loss
    logit_normal = (loss.logit_mean, loss.logit_deviation) if loss.timesteps == "logit_normal" else None
    return Distribution(loss.first_timestep, loss.last_timestep, logit_normal)


def weight_and_width(schedule: NoiseSchedule, timesteps: Tensor, options: LossOptions) -> tuple[Tensor, Tensor | None]:
    """How much each sample counts, and where its Huber loss turns straight; None for the squared error. (B,)."""
    snr = schedule.snr(timesteps)
    weight = WEIGHTINGS[options.weighting](snr, options.min_snr_gamma, schedule.prediction_type)
    if options.distance == "squared":
        return weight, None
    return weight, huber_width(snr, options.huber_width, options.huber_schedule)


def latents_and_noise(posteriors: Sequence[Posterior], seeds: Sequence[int], options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Latents drawn from their posteriors, the noise to predict, and the noise that is added to them: all (B, C, h, w), each sample
    from its own seed."""
    latents, noises, seen = [], [], []
    for posterior, seed in zip(posteriors, seeds, strict=True):
        mean, generator = posterior.mean, torch.Generator().manual_seed(seed)
        latents.append(mean + posterior.std * torch.randn(mean.shape, generator=generator))
        noise = sample_noise(mean.shape, generator, offset=options.noise_offset, multires_discount=options.multires_discount)
        noises.append(noise)
        seen.append(perturb(noise, options.input_perturbation, generator) if options.input_perturbation else noise)
    return torch.stack(latents), torch.stack(noises), torch.stack(seen)
