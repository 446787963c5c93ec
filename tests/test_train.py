"""The loop, end to end on a random tiny model: what it trains, that it repeats and resumes to the bit, what it refuses."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import build_model
from torch._dynamo.utils import counters
from variants import EVERY_KIND, EVERY_OPTIMIZER

from sdlora import config as configs
from sdlora import events, run
from sdlora import train as train_module
from sdlora.adapt import adapt
from sdlora.checkpoint import load_newest, unflatten
from sdlora.data.batches import BatchPlan
from sdlora.diffusion.timesteps import stratified
from sdlora.errors import ConfigError, DataError, TrainingError, WeightsError
from sdlora.items import find_items
from sdlora.latents import Posterior
from sdlora.lora import formats
from sdlora.lora.inits import INITS
from sdlora.models import device, digests, families, sources
from sdlora.objective import GENERIC_PROMPTS, Objective, pinned_prompts
from sdlora.optim import Average, Optimizer
from sdlora.train import restore, train


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(32, 32), (32, 32), (48, 24), (32, 32), (24, 48)]):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a cat, {'abcde'[number]}, big")
    return folder


@pytest.fixture
def make(tiny: Path, pictures: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> run.Run:
        flags = {
            "model.base": tiny,
            "data.folder": pictures,
            "resolution": 32,
            "bucket_step": 8,
            "steps": 6,
            "batch_size": 2,
            "precision": "fp32",
            "runs": tmp_path,
            "checkpoint_every": 2,
            "rank": 4,
            "alpha": 4,
            "rate": 1e-2,
            "alpha_rate": 0.0125,  # of an alpha of 4
            "threads": 1,
        }
        flags |= {name.replace("__", "."): value for name, value in changes.items()}
        return run.create(configs.load([], [(name, value if isinstance(value, str) else str(value)) for name, value in flags.items()]))

    return make


def losses(stream: Any) -> list[float]:
    return [event.loss for event in stream if isinstance(event, events.Stepped)]


def killed_and_resumed(of: run.Run, step: int) -> list[events.Event]:
    """All that a run tells which dies behind the checkpoint of `step`, and goes on from it."""
    stream = train(of)
    first = list(takewhile(lambda e: not (isinstance(e, events.Saved) and e.step == step), stream))
    stream.close()  # as dead as after a kill: nothing after that checkpoint
    second = list(train(of))
    assert next(e for e in second if not isinstance(e, events.Planned | events.Warned)) == events.Resumed(step)
    return first + second


def assert_same_bits(one: run.Run, other: run.Run) -> None:
    """Of the exported files."""
    ours, theirs = load_file(one.export), load_file(other.export)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_tells_its_plan_steps_and_result(make: Any) -> None:
    of = make(prompts="a cat --s 2", preview__every=4)
    told = list(events.record(train(of), of.events))
    plan = told[0]
    assert isinstance(plan, events.Planned)
    assert (plan.images, plan.steps, plan.layers) == (5, 6, {"unet": 4 * 12, "text_encoder": 12})
    assert plan.buckets == {"32x32": 3, "40x24": 1, "24x40": 1}
    assert plan.memory_bytes > 10_000_000
    (measured,) = [e for e in told if isinstance(e, events.Measured)]
    assert 10_000_000 < measured.memory_bytes < 2 * plan.memory_bytes
    assert [e.step for e in told if isinstance(e, events.Stepped)] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in told if isinstance(e, events.Saved)] == [2, 4, 6]
    assert told[-1] == events.Finished(6, str(of.export))
    assert events.read(of.events) == told
    for name in ("step-00000000.png", "step-00000004.png", "before-after.png"):
        with Image.open(of.previews / name) as picture:
            assert picture.width > 192
    with Image.open(of.previews / "00000006-00.png") as picture:
        assert picture.text["parameters"].startswith("a cat\nSteps: 2, Sampler: DPM++ 2M, CFG scale: 7, Seed: 0, Size: 32x32")


def test_loss_falls_when_the_same_picture_is_learned(make: Any) -> None:
    series = losses(train(make(steps=60, rate=2e-2, schedule="constant", min_snr_gamma=0)))
    assert sum(series[-15:]) < 0.97 * sum(series[:15])


@pytest.mark.parametrize("init", INITS)
def test_a_stopped_and_resumed_run_ends_in_the_same_bits(make: Any, init: str) -> None:
    options = {"lora.init": init, "shuffle_tags": "true", "caption_dropout": 0.2, "flip": "true", "accumulation": 2, "noise_offset": 0.05}
    straight = make(**options)
    whole = losses(train(straight))
    broken = make(**options)
    assert losses(killed_and_resumed(broken, 4)) == whole
    assert_same_bits(straight, broken)


def test_a_stop_file_ends_the_run_saved(make: Any) -> None:
    of = make()
    told = []
    for event in train(of):
        told.append(event)
        if isinstance(event, events.Stepped) and event.step == 3:
            of.ask_to_stop()
    assert told[-1] == events.Stopped(3)
    assert of.export_of(3).exists() and not of.export.exists()  # what a finished run has written stays
    newest = load_newest(of.checkpoints)
    assert newest is not None and newest.step == 3


def test_pictures_and_a_save_are_had_when_asked_for_and_change_nothing(make: Any) -> None:
    quiet = losses(train(make(checkpoint_every=0)))
    of = make(checkpoint_every=0, prompts="a cat --s 2", preview__every=0)
    told = []
    for event in train(of):
        told.append(event)
        if isinstance(event, events.Stepped) and event.step == 3:
            of.ask_for("sample")
            of.ask_for("save")
    shown = [(type(e), e.step) for e in told if isinstance(e, events.Saved | events.Exported | events.Previewed) and 0 < e.step < 6]
    assert shown == [(events.Saved, 3), (events.Exported, 3), (events.Previewed, 3)]
    assert of.export_of(3).is_file() and (of.previews / "00000003-00.png").is_file()
    assert losses(told) == quiet


def test_learned_alpha_moves_and_is_exported(make: Any) -> None:
    def alphas(of: run.Run) -> set[float]:
        list(train(of))
        return set(json.loads(formats.load(of.export)[1][formats.LEARNED_ALPHAS]).values())

    learned = alphas(make(weight_decay=0.5))
    assert len(learned) > 10 and all(2 < a < 6 for a in learned)
    assert alphas(make(learned_alpha="false")) == {4.0}


def test_layer_rates_freeze_layers_out_of_the_file(make: Any) -> None:
    of = make(layer_rates='{"*attn1*" = 0, "text_encoder.*" = 0}')
    list(train(of))
    keys = load_file(of.export).keys()
    assert any("attn2" in key for key in keys)
    assert not any("attn1" in key or key.startswith("lora_te") for key in keys)


def test_embedding_norm_loss_keeps_norms(make: Any) -> None:
    def last_drift(weight: float) -> float:
        options = {"steps": 40, "text_encoder_rate": 0.02, "rate": 1e-3, "loss.embedding_norm": weight, "schedule": "constant"}
        return [e.embedding_norm_drift for e in train(make(**options)) if isinstance(e, events.Stepped)][-1]

    free, kept = last_drift(0), last_drift(100)
    assert free > 0.01  # drift is told without the term too
    assert kept < free / 3


SIZES = torch.tensor([[32.0, 32, 0, 0, 32, 32]])  # SD 1.x does not look at them
PINS = '["a dog", "a big cat"]'


def change_of_prediction(of: run.Run, tiny: Path, prompt: str) -> float:
    """How far a run's exported file moves the noise prediction for a prompt: relative root mean square."""
    noisy, timesteps = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([50, 300, 600, 900])
    predicted = []
    for merged in (False, True):
        family, model = families.load(str(tiny), torch.float32, torch.device("cpu"))
        if merged:
            formats.merge(model.parts, formats.load(of.export)[0])
        with torch.no_grad():
            predicted.append(family.predict(model, noisy, timesteps, family.encode_prompts(model, [prompt] * 4), SIZES))
    return float((predicted[1] - predicted[0]).norm() / predicted[0].norm())


def test_the_prior_holds_the_noise_prediction_of_pinned_prompts(make: Any, tiny: Path) -> None:
    def change(prior: float) -> float:
        of = make(steps=40, prior=prior, prior_samples=2, pinned_prompts=PINS, schedule="constant", embedding_norm=0)
        list(train(of))
        return change_of_prediction(of, tiny, "a dog")

    assert change(20) < 0.7 * change(0)


def test_pinned_embeddings_stay_near_the_base(make: Any, tiny: Path) -> None:
    def moved(weight: float) -> float:
        of = make(steps=40, pinned_embedding=weight, pinned_prompts=PINS, text_encoder_rate=0.02, embedding_norm=0, schedule="constant")
        list(train(of))
        embeds = []
        for merged in (False, True):
            family, model = families.load(str(tiny), torch.float32, torch.device("cpu"))
            if merged:
                formats.merge(model.parts, formats.load(of.export)[0])
            with torch.no_grad():
                embeds.append(family.encode_prompts(model, ["a dog"]).prompt_embeds)
        return float((embeds[1] - embeds[0]).norm() / embeds[0].norm())

    assert moved(100) < moved(0) / 3


def test_pinning_resumes_in_the_same_bits(make: Any) -> None:
    options = {"prior": 1, "pinned_embedding": 1, "pinned_prompts": PINS, "accumulation": 2, "scaling": "rank_stabilised"}
    straight, broken = make(**options), make(**options)
    whole = losses(train(straight))
    assert losses(killed_and_resumed(broken, 4)) == whole
    assert_same_bits(straight, broken)


NOISES: list[dict[str, Any]] = [
    {"weighting": "debiased", "distance": "huber", "multires_discount": 0.3, "input_perturbation": 0.1, "schedule": "cosine_restarts"},
    {"weighting": "none", "distance": "huber", "huber_schedule": "constant", "timesteps": "logit_normal", "text_encoder_steps": 3},
]


@pytest.mark.parametrize("options", NOISES)
def test_noise_and_loss_options_resume_in_the_same_bits(make: Any, options: dict[str, Any]) -> None:
    straight, broken = make(**options), make(**options)
    whole = losses(train(straight))
    assert losses(killed_and_resumed(broken, 2)) == whole
    assert whole != losses(train(make()))


def test_the_average_is_what_is_exported_and_resumes(make: Any) -> None:
    plain, straight, broken = make(ema=0), make(ema=0.9), make(ema=0.9)
    series = losses(train(plain))
    assert losses(train(straight)) == series  # training itself does not see the average
    list(killed_and_resumed(broken, 4))
    assert_same_bits(straight, broken)
    last, averaged = load_file(plain.export), load_file(straight.export)
    key = next(key for key in last if key.endswith("lora_up.weight"))
    assert 0 < averaged[key].norm() < last[key].norm()


def test_ranks_by_layer_keep_the_scale_and_stop_at_the_weight(make: Any) -> None:
    of = make(layer_ranks='{"mid" = 2, "te.0" = 1000}', learned_alpha="false")
    list(train(of))
    changes, _ = formats.load(of.export)
    ranks = {name: change.factors.down.shape[0] for name, change in changes.items() if change.factors is not None}
    assert ranks["unet.mid_block.attentions.0.proj_in"] == 2
    assert ranks["text_encoder.text_model.encoder.layers.0.mlp.fc1"] == 16  # its weight is 32 x 16
    assert ranks["text_encoder.text_model.encoder.layers.1.mlp.fc1"] == 4
    with pytest.raises(ConfigError, match=r"lora\.layer_ranks"):
        next(train(make(layer_ranks='{"nothing" = 2}')))


def test_the_text_encoder_rests_after_its_steps(make: Any) -> None:
    kept, longer = make(steps=4, text_encoder_steps=2, schedule="constant"), make(steps=2, schedule="constant")
    list(train(kept))
    list(train(longer))
    one, other = load_file(kept.export), load_file(longer.export)
    assert all(torch.equal(one[key], other[key]) for key in one if key.startswith("lora_te_"))
    assert not all(torch.equal(one[key], other[key]) for key in one if key.startswith("lora_unet_"))
    with pytest.raises(ConfigError, match="nothing to train"):
        next(train(make(text_encoder_steps=2, **{"lora.unet": "[]"})))


def test_only_the_timesteps_asked_for_are_trained(make: Any) -> None:
    with pytest.raises(ConfigError, match="lies above"):
        make(first_timestep=500, last_timestep=400)
    clean, noisy = (losses(train(make(steps=3, min_snr_gamma=0, **at))) for at in ({"last_timestep": 50}, {"first_timestep": 950}))
    assert clean != noisy


def test_zero_terminal_snr_is_for_v_prediction(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="v-prediction"):
        next(train(make(zero_terminal_snr="true")))
    of = make(zero_terminal_snr="true", model__base=build_model(tmp_path / "v", "v_prediction"), first_timestep=990)
    assert np.isfinite(losses(train(of))).all()


def test_without_pinned_prompts_the_class_and_common_things_are_held(make: Any) -> None:
    of = make(prior=1, class_noun="a cat", steps=4)
    assert pinned_prompts(of.config)[0] == "a cat" and len(pinned_prompts(of.config)) == 1 + len(GENERIC_PROMPTS)
    assert pinned_prompts(make(prior=1).config) == GENERIC_PROMPTS
    assert pinned_prompts(make(prior=1, pinned_prompts=PINS, class_noun="a cat").config) == ("a dog", "a big cat")
    assert losses(train(of)) != losses(train(make(steps=4)))


def test_alphas_start_from_an_earlier_file(make: Any, tmp_path: Path) -> None:
    earlier = make(learned_alpha="true", alpha_rate=0.2, layer_rates='{"*attn1*" = 0}')
    list(train(earlier))
    learned = formats.read_alphas(earlier.export)
    assert len(set(learned.values())) > 10
    later = make(alpha_from=earlier.export, learned_alpha="false")
    told = list(train(later))
    (warned,) = [e.message for e in told if isinstance(e, events.Warned)]
    assert "8 of" in warned or "attn1" in warned
    started = formats.read_alphas(later.export)
    assert all(started[name] == pytest.approx(alpha, abs=1e-5) for name, alpha in learned.items())
    assert {alpha for name, alpha in started.items() if "attn1" in name} == {4.0}
    with pytest.raises(WeightsError, match="no file"):
        list(train(make(alpha_from=tmp_path / "missing.safetensors")))


def test_alphas_from_another_rank_and_scaling_keep_the_scale(make: Any) -> None:
    earlier = make(alpha_rate=0.05, init="pissa")  # written at twice its rank
    list(train(earlier))
    scales = formats.read_scales(earlier.export)
    later = make(alpha_from=earlier.export, **{"lora.rank": 2}, scaling="rank_stabilised", alpha_rate=0)
    list(train(later))
    assert formats.read_scales(later.export) == pytest.approx(scales, rel=1e-5)
    assert json.loads(formats.load(earlier.export)[1]["ss_network_dim"]) == 8
    own = make(alpha_from=earlier.export, layer_alphas='{"mid" = 3}', alpha_rate=0)
    list(train(own))
    assert {alpha for name, alpha in formats.read_alphas(own.export).items() if "mid_block" in name} == {3.0}


def test_alphas_of_a_foreign_file_are_those_of_its_layers(tmp_path: Path) -> None:
    from sdlora.lora.change import Change, Factors

    path = tmp_path / "foreign.safetensors"
    formats.save(path, {"unet.a.to_q": Change(Factors(torch.ones(2, 3), torch.ones(4, 2), 8.0))}, 8.0, {})
    assert formats.read_alphas(path) == {"unet.a.to_q": 8.0}


def test_alphas_stay_above_their_floor(make: Any) -> None:
    of = make(alpha_rate=1.0, alpha_floor=3.9, steps=12)
    list(train(of))
    assert min(formats.read_alphas(of.export).values()) == pytest.approx(3.9)


@pytest.mark.parametrize("init", INITS)
def test_export_gives_the_noise_prediction_of_training_in_diffusers(make: Any, tiny: Path, init: str) -> None:
    of = make(
        **{"lora.init": init, "lora.unet": '["attention", "feed_forward", "projection", "resnet", "resample", "time", "input_output"]'}
    )
    list(train(of))
    family, model = families.load(str(tiny), torch.float32, torch.device("cpu"))
    layers = adapt(model, of.config).layers
    newest = load_newest(of.checkpoints)
    assert newest is not None
    for name, layer in layers.items():
        layer.load_state({k.partition("/")[2]: v for k, v in newest.tensors["adapter"].items() if k.startswith(f"{name}/")})
    noisy, timesteps = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700])
    with torch.no_grad():
        trained = family.predict(model, noisy, timesteps, family.encode_prompts(model, ["a cat", "dog"]), SIZES.expand(2, -1))

    pipeline = StableDiffusionPipeline.from_pretrained(tiny)
    before = predict_with(pipeline, noisy, timesteps)
    pipeline.load_lora_weights(of.export)
    after = predict_with(pipeline, noisy, timesteps)
    torch.testing.assert_close(after, trained, atol=1e-4, rtol=0)
    assert (after - before).abs().max() > 1e-2


EXACT = {"format": "exact"}
NORMS = EXACT | {"norms": "true", "biases": "true"}


def prediction_of(
    tiny: Path, layers_of: run.Run | None = None, file: Path | None = None, prompts: Sequence[str] = ("a cat", "dog")
) -> torch.Tensor:
    """Noise prediction of the tiny model with a run's newest adapter, or with a file merged into its weights."""
    family, model = families.load(str(tiny), torch.float32, torch.device("cpu"))
    if layers_of is not None:
        newest = load_newest(layers_of.checkpoints)
        assert newest is not None
        saved = unflatten(newest.tensors["adapter"])
        # the checkpoint says which layers subtract their start: statistics of a calibrated init are not needed for that
        config = layers_of.config
        if config.lora.init == "gradient":
            config = config.model_copy(update={"lora": config.lora.model_copy(update={"init": "pissa"})})
        for name, layer in adapt(model, config).layers.items():
            layer.load_state(saved[name])
    if file is not None:
        formats.merge(model.parts, formats.load(file)[0])
    noisy, timesteps = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700])
    with torch.no_grad():
        return family.predict(model, noisy, timesteps, family.encode_prompts(model, prompts), SIZES.expand(2, -1))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_resumes_in_the_same_bits_and_its_file_is_what_was_trained(make: Any, tiny: Path, kind: str) -> None:
    straight, broken = make(**EVERY_KIND[kind], **EXACT), make(**EVERY_KIND[kind], **EXACT)
    whole = losses(train(straight))
    assert losses(killed_and_resumed(broken, 4)) == whole
    assert_same_bits(straight, broken)
    base, trained, read = prediction_of(tiny), prediction_of(tiny, straight), prediction_of(tiny, file=straight.export)
    torch.testing.assert_close(read, trained, atol=2e-5, rtol=0)
    assert (trained - base).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["dora", "mora", "full", "relora"])
def test_what_is_not_of_low_rank_is_folded_with_its_error_told(make: Any, tiny: Path, kind: str) -> None:
    def exported(**options: Any) -> tuple[run.Run, events.Exported]:
        of = make(**EVERY_KIND[kind], **options)
        (told,) = [e for e in train(of) if isinstance(e, events.Exported)]
        return of, told

    of, near = exported()
    assert all(change.is_plain for change in formats.load(of.export)[0].values())
    assert 0 <= near.lost < 0.0101  # 99.99 % of the energy
    exact, base = prediction_of(tiny, of), prediction_of(tiny)
    close = float((prediction_of(tiny, file=of.export) - exact).norm() / (exact - base).norm())
    rough, told = exported(largest_rank=1)
    assert all(change.factors.down.shape[0] == 1 for change in formats.load(rough.export)[0].values() if change.factors is not None)
    assert told.lost > max(near.lost, 0.02) and told.worst
    assert close < 0.05 < float((prediction_of(tiny, file=rough.export) - exact).norm() / (exact - base).norm())


def test_a_lora_can_be_exported_at_a_lower_rank(make: Any) -> None:
    of = make(largest_rank=2, init="pissa")
    (told,) = [e for e in train(of) if isinstance(e, events.Exported)]
    assert {c.factors.down.shape[0] for c in formats.load(of.export)[0].values() if c.factors is not None} == {2}
    assert 0 < told.lost < 1


@pytest.mark.parametrize("kind", [*EVERY_KIND, "norms"])
def test_every_kind_trains_in_bf16(make: Any, kind: str) -> None:
    told = losses(train(make(precision="bf16", gradient_checkpointing="true", **(EVERY_KIND | {"norms": NORMS})[kind], steps=3)))
    whole = losses(train(make(**(EVERY_KIND | {"norms": NORMS})[kind], steps=3)))
    assert told == pytest.approx(whole, rel=0.05) and told != whole


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch's own, up to where it would write code: that takes minutes."""
    monkeypatch.setattr(device, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", [*sorted(EVERY_KIND.keys() - {"dropouts"}), "bf16", "fp8"])
def test_compiled_blocks_train_alike(make: Any, kind: str) -> None:
    options = (EVERY_KIND | {"bf16": {"precision": "bf16"}, "fp8": {"base_precision": "fp8"}})[kind]
    options = options | {"prior": 1, "steps": 4, "gradient_checkpointing": "true"}
    told = losses(train(make(**options, compile="true", prompts="a cat --s 2", preview__every=2)))
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]
    assert told == pytest.approx(losses(train(make(**options))), rel=1e-2 if kind == "bf16" else 1e-4)


@pytest.mark.usefixtures("compiler")
def test_pictures_are_drawn_by_blocks_as_they_are(make: Any) -> None:
    """Or each size would be compiled for them, twice."""
    list(train(make(compile="true", steps=2)))
    before = counters["stats"]["unique_graphs"]
    list(train(make(compile="true", steps=2, prompts="a cat --s 2 --w 40 --h 40", holdout=1)))
    assert before > 0 and counters["stats"]["unique_graphs"] == 2 * before


@pytest.mark.usefixtures("compiler")
def test_a_missing_compiler_is_explained(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("No working C++ compiler found")

    monkeypatch.setattr(device, "COMPILER", fails)
    with pytest.raises(TrainingError, match=r"train\.compile: .*No working C\+\+ compiler found.*train\.compile = false"):
        list(train(make(compile="true")))


def test_matched_rates_outlive_a_merge(make: Any) -> None:
    options = {"matched": "true", "rate": 1e-4, "merge_every": 3, "steps": 8, "schedule": "constant"}
    straight, broken = make(**options), make(**options)
    told = list(train(straight))
    rates = [e.rate for e in told if isinstance(e, events.Stepped)]
    assert all(rate > 1.5e-4 for rate in rates)  # what they were set to, and not optimizer.rate, also behind the merges
    assert losses(killed_and_resumed(broken, 4)) == losses(told)
    assert_same_bits(straight, broken)


def test_a_short_batch_sees_all_timesteps(make: Any) -> None:
    """The picture that is alone in its bucket, with a batch size of 4, as often at high noise as at low."""
    of = make(batch_size=4, accumulation=1)
    items, _ = find_items(of.config)
    plan = BatchPlan([item.placed.bucket for item in items], [1] * len(items), 4, 0)
    seen: list[int] = []

    def spy(seeds: Any, first: int, total: int, distribution: Any) -> torch.Tensor:
        drawn = stratified(seeds, first, total, distribution)
        if total == 1:
            seen.extend(drawn.tolist())
        return drawn

    family, model = families.load(of.config.model.base, torch.float32, torch.device("cpu"))
    of_base = torch.no_grad()(partial(family.encode_prompts, model))
    objective_of = Objective(of.config, family, model, items, plan, blank_latents(items), of_base, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdlora.objective.stratified", spy)
        for step in range(120):
            objective_of.denoising(step, 0)
    assert len(seen) > 50 and max(seen) > 900 and min(seen) < 100


def blank_latents(items: Any) -> list[Posterior]:
    shapes = [(4, item.placed.bucket[1] // 2, item.placed.bucket[0] // 2) for item in items]
    return [Posterior(torch.zeros(shape), torch.ones(shape), None) for shape in shapes]


def test_a_contrasting_start_spares_what_is_pinned(make: Any, tiny: Path) -> None:
    """Of the change that captions get, pinned prompts get less where down was frozen by contrast than where it is random."""
    pinned, captions = ["a dog", "a house in snow"], ["a cat, a, big", "a cat, d, big"]

    def touched(init: str) -> float:
        of = make(init=init, pinned_prompts='["a dog", "a house in snow"]', steps=12)
        list(train(of))
        return float(change(of, pinned) / change(of, captions))

    def change(of: run.Run, prompts: list[str]) -> torch.Tensor:
        return (prediction_of(tiny, file=of.export, prompts=prompts) - prediction_of(tiny, prompts=prompts)).norm()

    assert touched("contrast") < 0.8 * touched("orthonormal")


def test_a_checkpoint_of_another_kind_or_rank_is_refused(make: Any) -> None:
    of = make(checkpoint_every=2)
    list(train(of))
    path = of.folder / "config.toml"
    text = path.read_text()
    for old, new in (("rank = 4", "rank = 2"), ('kind = "lora"', 'kind = "dora"'), ("ema = 0.0", "ema = 0.9")):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(TrainingError, match="start a new run"):
            list(train(run.Run(of.folder)))


def test_norms_and_biases_are_trained_written_and_warned_of(make: Any, tiny: Path) -> None:
    straight, broken = make(**NORMS), make(**NORMS)
    told = list(train(straight))
    assert losses(killed_and_resumed(broken, 4)) == losses(told)
    assert_same_bits(straight, broken)
    keys = load_file(straight.export).keys()
    assert {"lora_unet_down_blocks_0_resnets_0_norm1.w_norm", "lora_unet_conv_norm_out.b_norm"} <= keys
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b" in keys and "lora_te_text_model_final_layer_norm.w_norm" in keys
    torch.testing.assert_close(prediction_of(tiny, file=straight.export), prediction_of(tiny, straight), atol=2e-5, rtol=0)
    warned = " ".join(e.message for e in told if isinstance(e, events.Warned))
    assert "norms are right in ComfyUI" in warned and "biases are right in ComfyUI" in warned and "DoRA" not in warned
    with pytest.raises(ConfigError, match=r"output\.format = 'exact'"):
        make(norms="true")


@pytest.mark.parametrize("options", EVERY_OPTIMIZER.values(), ids=EVERY_OPTIMIZER)
def test_every_optimizer_trains_and_resumes_in_the_same_bits(make: Any, tiny: Path, options: dict[str, Any]) -> None:
    more = {"prompts": "a cat --s 2", "preview.every": 3, "steps": 8, "text_encoder_steps": 5}
    straight, broken = make(**options, **more), make(**options, **more)
    whole = losses(train(straight))
    assert losses(killed_and_resumed(broken, 4)) == whole
    assert_same_bits(straight, broken)
    moved = prediction_of(tiny, file=straight.export) - prediction_of(tiny)
    assert moved.norm() > 0 or options.get("algorithm") == "prodigy"  # whose estimate starts at 1e-6


def test_optimizers_refuse_what_does_not_go_with_them(make: Any) -> None:
    for options, message in (
        ({"algorithm": "schedule_free"}, "constant"),
        ({"algorithm": "lion", "matched": "true"}, "adamw"),
        ({"algorithm": "adamw_8bit"}, "adamw_8bit"),
        ({"arguments": "{ amsgrd = true }"}, "amsgrad"),
        ({"arguments": "{ lr = 1 }"}, "optimizer.rate"),
    ):
        with pytest.raises(ConfigError, match=message):
            next(train(make(**options)))


def test_regularisation_pictures_are_shown_as_often_and_weigh_what_is_asked(make: Any, pictures: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (40 * number, 90, 10)).save(others / f"{number}.png")
    items, _ = find_items(make(regularisation_folder=others, class_noun="a dog", loss__regularisation=0.5, trigger="ohwx").config)
    shown = [(item.repeats, item.weight, item.regularises) for item in items]
    assert shown == [(1, 1.0, False)] * 5 + [(3, 0.5, True), (2, 0.5, True)]  # as often as the five together
    assert {item.example.caption for item in items[5:]} == {"a dog"} and all("ohwx" in item.example.caption for item in items[:5])
    with pytest.raises(DataError, match="no caption"):
        find_items(make(regularisation_folder=others).config)
    free, weightless = (
        losses(train(make(regularisation_folder=others, class_noun="a dog", loss__regularisation=w, steps=2))) for w in (1.0, 0.0)
    )
    assert free != weightless


SETS = """
[data]
max_tokens = 150
caption_lines = "pick"
caption_prefix = "art, "
[[data.sets]]
folder = "PICTURES"
repeats = 2
shuffle_tags = true
tag_dropout = 0.3
[[data.sets]]
folder = "OTHERS"
weight = WEIGHT
missing_caption = "empty"
flip = true
[model]
clip_skip = 2
[loss]
embedding_norm_padding = false
embedding_norm_per = "prompt"
"""


def test_sets_clip_skip_and_long_captions_train_resume_and_are_told_of(make: Any, tiny: Path, pictures: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (40 * number, 90, 10)).save(others / f"{number}.png")
    (others / "0.txt").write_text("a {cat|dog}\na fox of more letters than a chunk has room for")

    def of_weight(weight: float) -> run.Run:
        path = tmp_path / f"{weight}.toml"
        path.write_text(SETS.replace("PICTURES", str(pictures)).replace("OTHERS", str(others)).replace("WEIGHT", str(weight)))
        flags = {"model.base": tiny, "resolution": 32, "bucket_step": 8, "steps": 6, "batch_size": 2, "precision": "fp32", "rank": 4}
        flags |= {"alpha": 4, "rate": 1e-2, "threads": 1, "checkpoint_every": 2, "runs": tmp_path}
        return run.create(configs.load([path], [(name, str(value)) for name, value in flags.items()]))

    straight, broken = of_weight(0.5), of_weight(0.5)
    whole = losses(train(straight))
    assert losses(killed_and_resumed(broken, 4)) == whole
    assert_same_bits(straight, broken)
    assert losses(train(of_weight(0.0))) != whole
    tensors, metadata = load_file(straight.export), formats.load(straight.export)[1]
    assert not any("lora_te_text_model_encoder_layers_1" in key for key in tensors)  # which nobody hears
    assert any(key.startswith("lora_te_text_model_encoder_layers_0") and key.endswith("up.weight") for key in tensors)
    assert (metadata["ss_clip_skip"], metadata["ss_max_token_length"]) == ("2", "150")
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        pictures.name: {"n_repeats": 2, "img_count": 5},
        "others": {"n_repeats": 1, "img_count": 4},
    }


def test_a_mask_hides_a_part_of_the_picture_from_the_loss(make: Any, pictures: Path, tmp_path: Path) -> None:
    masked = tmp_path / "masked"
    masked.mkdir()
    with Image.open(pictures / "0.png") as picture:
        picture.save(masked / "0.png")
    (masked / "0.txt").write_text("a cat")
    mask = Image.new("L", (32, 32), 255)
    mask.paste(0, (0, 0, 32, 16))
    mask.save(masked / "0-masklabel.png")

    def first_loss(**options: Any) -> float:
        return losses(train(make(data__folder=masked, batch_size=1, steps=1, **options)))[0]

    whole, half, none = first_loss(), first_loss(masks="file"), first_loss(masks="file", unmasked=1.0)
    assert none == whole
    assert 0.3 * whole < half < 0.7 * whole  # the loss of half the pixels, divided by all
    middle = first_loss(masks="file", unmasked=0.5)
    assert middle == pytest.approx((whole + half) / 2, rel=1e-4)


@torch.no_grad()
def predict_with(pipeline: StableDiffusionPipeline, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    embeds, _ = pipeline.encode_prompt(["a cat", "dog"], "cpu", 1, False)
    return pipeline.unet(noisy, timesteps, embeds).sample


def test_nothing_is_yielded_inside_a_torch_context(make: Any) -> None:
    of = make(prompts="a cat --s 2", preview__every=2)
    for _ in train(of):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_losses_are_those_of_the_golden_file(make: Any) -> None:
    """A refactoring moves no loss. A change that should: delete the file, run, look at the difference, commit."""
    golden = Path(__file__).parent / "golden_losses.json"
    series = losses(train(make()))
    if not golden.exists():
        golden.write_text(json.dumps(series))
        pytest.fail("golden_losses.json was missing and has been written: look at it and commit it")
    assert series == pytest.approx(json.loads(golden.read_text()), rel=1e-3)


def test_a_second_run_takes_all_from_the_cache_of_the_first(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"text_encoder": "[]", "flip": "true", "caption_dropout": 0.3, "loss.prior": 1}
    first = list(train(make(**options)))
    assert [(e.of, e.done) for e in first if isinstance(e, events.Cached) and e.done == e.total] == [("pictures", 10), ("captions", 18)]
    load = families.load

    def without_encoders(*arguments: Any, **options: Any) -> Any:
        family, model = load(*arguments, **options)
        model.vae.encode = None
        return dataclasses.replace(family, encode_prompts=None), model

    monkeypatch.setattr(families, "load", without_encoders)
    second = list(train(make(**options)))
    assert losses(second) == losses(first) and not any(isinstance(e, events.Cached) for e in second)


@pytest.mark.parametrize(
    ("options", "aside"),
    [({}, ["vae"]), ({"text_encoder": "[]"}, ["vae", "text_encoder"]), ({"text_encoder": "[]", "shuffle_tags": "true"}, ["vae"])],
)
@pytest.mark.parametrize(("prompts", "way"), [("[]", "let_go"), ('["a cat"]', "set_aside")])
def test_what_is_not_needed_for_steps_leaves_the_device_and_for_good_where_no_preview_needs_it(
    make: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], aside: list[str], prompts: str, way: str
) -> None:
    told: list[str] = []
    monkeypatch.setattr(train_module, way, lambda model, *names: told.extend(names))
    for event in train(make(**options, prompts=prompts)):
        if isinstance(event, events.Stepped):
            break
        assert not (isinstance(event, events.Cached) and event.of == "pictures" and told), "the VAE left before its work was done"
    assert told == aside


def test_what_a_run_lets_go_it_holds_no_more(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    load = train_module.load_model
    monkeypatch.setattr(train_module, "load_model", lambda *arguments: held.append(load(*arguments)) or held[-1])
    told = list(train(make(text_encoder="[]", prompts="[]")))
    ((_, model),) = held
    assert isinstance(told[-1], events.Finished)
    assert {p.device.type for part in (model.vae, model.parts["text_encoder"]) for p in part.parameters()} == {"meta"}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read of VAEs and text encoders, by their classes."""
    told: list[str] = []
    look = sources._require_finite

    def looked(network: Any, origin: str) -> None:
        told.append(type(network).__name__)
        look(network, origin)

    monkeypatch.setattr(sources, "_require_finite", looked)
    monkeypatch.setattr(digests, "SETTLED", 0)  # the model was built just now
    return told


VAE, TEXT_ENCODER, UNET = "AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel"


def test_what_a_second_run_does_not_need_it_does_not_read(make: Any, read: list[str]) -> None:
    def reads(**options: Any) -> tuple[set[str], run.Run]:
        read.clear()
        of = make(**options)
        assert isinstance(list(train(of))[-1], events.Finished)
        assert len(read) == len(set(read)), "read twice"
        return set(read), of

    first, one = reads(text_encoder="[]")
    assert first == {VAE, TEXT_ENCODER, UNET}
    second, other = reads(text_encoder="[]")
    assert second == {UNET}
    assert_same_bits(one, other)
    assert reads()[0] == {TEXT_ENCODER, UNET}  # it is trained
    assert reads(text_encoder="[]", shuffle_tags="true")[0] == {TEXT_ENCODER, UNET}  # it is asked new things
    assert reads(text_encoder="[]", flip="true")[0] == {VAE, UNET}
    assert reads(text_encoder="[]", init="gradient", steps=1)[0] == {TEXT_ENCODER, UNET}
    assert reads(text_encoder="[]", prompts="a cat --s 1")[0] == {VAE, TEXT_ENCODER, UNET}
    assert reads(text_encoder="[]", gradient_checkpointing="true", prompts="a cat --s 1")[0] == {VAE, TEXT_ENCODER, UNET}


def test_previews_are_the_same_whether_a_model_was_known_or_not(make: Any, read: list[str]) -> None:
    def pictures() -> list[bytes]:
        of = make(text_encoder="[]", prompts="a cat --s 2", steps=2)
        assert isinstance(list(train(of))[-1], events.Finished)
        return [path.read_bytes() for path in sorted(of.previews.glob("*.png"))]

    assert pictures() == pictures()


def test_a_model_whose_files_have_changed_is_read(make: Any, tiny: Path, tmp_path: Path, read: list[str]) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    flags = {"text_encoder": "[]", "model.base": base, "steps": 1}
    (path,) = (base / "vae").glob("*.safetensors")
    list(train(make(**flags)))
    read.clear()
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    told = list(train(make(**flags)))
    assert set(read) == {VAE, UNET} and any(isinstance(e, events.Cached) and e.of == "pictures" for e in told)


def test_what_was_written_just_now_is_not_taken_for_known(make: Any, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tick of its clock a file can change unseen."""
    monkeypatch.setattr(digests, "SETTLED", 1e9)
    for _ in range(2):
        read.clear()
        list(train(make(text_encoder="[]", steps=1)))
        assert set(read) == {VAE, TEXT_ENCODER, UNET}


def test_a_latent_that_is_damaged_while_its_run_goes_on_is_computed_anew(make: Any, read: list[str]) -> None:
    whole, of = losses(train(make(text_encoder="[]", prompts="[]"))), make(text_encoder="[]", prompts="[]")
    read.clear()
    told = []
    for event in train(of):
        if isinstance(event, events.Planned):
            assert set(read) == {UNET}
            for shard in of.cache.glob("*-*/*.safetensors"):
                content = bytearray(shard.read_bytes())
                content[-4:] = bytes(~byte & 255 for byte in content[-4:])  # of its last tensor
                shard.write_bytes(content)
        told.append(event)
    assert losses(told) == whole and {VAE, TEXT_ENCODER} & set(read)


def test_a_run_stopped_while_latents_are_computed_goes_on_with_the_rest(make: Any) -> None:
    of = make()
    told = []
    for event in train(of):
        told.append(event)
        if isinstance(event, events.Cached) and event.done == 2:
            of.ask_to_stop()
    assert told[-1] == events.Stopped(0) and not losses(told)
    of.stop_file.unlink()
    second = list(train(of))
    assert next(e for e in second if isinstance(e, events.Cached)) == events.Cached(3, 5)
    assert losses(second) == losses(train(make()))


def test_refusals_come_before_training(make: Any, tmp_path: Path) -> None:
    def first(of: run.Run) -> None:
        next(train(of))

    with pytest.raises(WeightsError, match="there is no nowhere"):
        first(make(model__base="nowhere"))
    with pytest.raises(ConfigError, match="bucket_step"):
        first(make(bucket_step=9))
    with pytest.raises(ConfigError, match="matches no adapted layer"):
        first(make(layer_rates='{"unett.*" = 1e-4}'))
    with pytest.raises(ConfigError, match="nothing to train"):
        first(make(**{"lora.unet": "[]", "lora.text_encoder": "[]"}))
    with pytest.raises(ConfigError, match="--zz is unknown"):
        first(make(prompts="a cat --zz 3"))
    with pytest.raises(ConfigError, match="multiple"):
        first(make(prompts="a cat --w 33"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        first(make(data__folder=tmp_path / "empty"))


def test_a_loss_that_is_not_finite_ends_the_run_and_exports_nothing(make: Any) -> None:
    of = make(rate=10, alpha_rate=10, steps=200, max_grad_norm=1e30, schedule="constant")
    with pytest.raises(TrainingError, match="not finite"):
        list(train(of))
    assert not of.export.exists()


def spoil(monkeypatch: pytest.MonkeyPatch, by_step: dict[int, float]) -> None:
    """Multiply the losses of these steps, counted from 1."""
    call = Objective.__call__

    def spoilt(self: Objective, step: int, part: int, text_rests: bool = False) -> Any:
        loss = call(self, step, part, text_rests)
        return dataclasses.replace(loss, total=loss.total * by_step.get(step + 1, 1.0))

    monkeypatch.setattr(Objective, "__call__", spoilt)


def test_a_bad_step_changes_nothing_is_told_and_resumes_in_the_same_bits(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {3: float("nan"), 4: float("inf"), 5: float("nan")})
    straight, broken, stopped = make(), make(), make(steps=4)
    told = list(train(straight))
    assert [e.step for e in told if isinstance(e, events.Stepped)] == [1, 2, 6]
    warned = [e.message for e in told if isinstance(e, events.Warned)]
    assert [message.partition(", whose")[0].rpartition(" ")[2] for message in warned] == ["3", "4", "5"] and ".png" in warned[0]
    assert losses(killed_and_resumed(broken, 4)) == losses(told)
    assert_same_bits(straight, broken)
    list(train(stopped))
    before, after = (unflatten(load_file(stopped.checkpoints / f"step-0000000{n}" / "adapter.safetensors")) for n in (2, 4))
    assert all(torch.equal(after[layer][name], before[layer][name]) for layer in before for name in before[layer])


def test_fp16_scales_losses_and_goes_on_to_the_same_bits(make: Any) -> None:
    exact, half, resumed = make(steps=4), make(steps=4, precision="fp16"), make(steps=4, precision="fp16")
    found = losses(train(half))
    assert found == pytest.approx(losses(train(exact)), rel=0.02)
    killed_and_resumed(resumed, 2)
    assert_same_bits(half, resumed)
    assert load_newest(half.checkpoints).state["loss_scale"] == [2.0**16, 4]  # type: ignore[union-attr]


def test_gradients_that_fp16_cannot_hold_lower_the_scale_and_cost_their_step_alone(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.loss_scale.START", 2.0**40)
    of = make(steps=30, precision="fp16", checkpoint_every=10, max_bad_steps=0)
    told = list(train(of))
    assert not any("not finite" in e.message for e in told if isinstance(e, events.Warned))
    taken, scale = len(losses(told)), load_newest(of.checkpoints).state["loss_scale"][0]  # type: ignore[union-attr]
    assert 0 < taken < 30 and scale == 2.0 ** (40 - (30 - taken))


def test_offloaded_weights_train_to_the_same_bits_and_narrow_ones_to_an_adapter_as_exact(make: Any) -> None:
    plain, offloaded, narrow = make(), make(offload=True), make(base_precision="fp8")
    wanted = losses(train(plain))
    assert losses(train(offloaded)) == wanted
    assert_same_bits(plain, offloaded)
    found = losses(train(narrow))
    assert found != wanted and found == pytest.approx(wanted, rel=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(narrow.export).values())


@pytest.mark.parametrize("resumed", [False, True])
def test_too_many_bad_steps_in_a_row_end_the_run_at_the_same_step(make: Any, monkeypatch: pytest.MonkeyPatch, resumed: bool) -> None:
    spoil(monkeypatch, dict.fromkeys((3, 4, 5), float("nan")))
    of = make(max_bad_steps=2)
    if resumed:
        stream = train(of)
        list(takewhile(lambda e: not (isinstance(e, events.Saved) and e.step == 4), stream))
        stream.close()
    with pytest.raises(TrainingError, match=r"in 3 steps in a row, the last of them step 5, whose pictures were .*\.png.*step-00000004"):
        list(train(of))
    assert not of.export.exists()


def test_weights_that_are_not_finite_are_found_in_their_step_and_never_saved(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Optimizer.step
    taken = []

    def overflow(self: Optimizer) -> None:
        step(self)
        taken.append(1)
        if len(taken) == 4:
            self.parameters[-1].data.fill_(float("inf"))

    monkeypatch.setattr(Optimizer, "step", overflow)
    of = make()
    with pytest.raises(TrainingError, match=r"weights are not finite after step 4.*step-00000002"):
        list(train(of))
    assert [p.name for p in of.checkpoints.iterdir()] == ["step-00000002"] and not of.export.exists()


def test_what_has_changed_and_what_is_damaged_is_said_at_resume(make: Any) -> None:
    of = make(steps=6)
    list(train(of))
    damaged = of.checkpoints / "step-00000006" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    path = of.folder / "config.toml"
    path.write_text(path.read_text().replace("steps = 6", "steps = 7", 1).replace("threads = 1", "threads = 2", 1))
    told = list(train(run.Run(of.folder)))
    torch.set_num_threads(1)
    fallen, changed = (e.message for e in told if isinstance(e, events.Warned))
    assert "step-00000006" in fallen and "goes on from step 4" in fallen
    assert changed.endswith(": threads 1 -> 2, train.steps 6 -> 7, train.threads 1 -> 2.")
    assert next(e for e in told if isinstance(e, events.Resumed)) == events.Resumed(4)


def test_a_finished_run_is_exported_again_and_its_last_checkpoint_left_alone(make: Any) -> None:
    of = make()
    list(train(of))
    before = [(p, p.stat().st_mtime_ns) for p in sorted(of.checkpoints.rglob("*"))]
    of.export.unlink()
    told = list(train(of))
    assert [type(e) for e in told[-3:]] == [events.Resumed, events.Exported, events.Finished] and of.export.exists()
    assert [(p, p.stat().st_mtime_ns) for p in sorted(of.checkpoints.rglob("*"))] == before


def test_a_preview_that_cannot_be_written_is_told_of_and_the_run_goes_on(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, without = make(prompts="a cat --s 2"), make(prompts="a cat --s 2")
    list(train(whole))

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdlora.preview.save_picture", full)
    told = list(train(without))
    assert [e.message for e in told if isinstance(e, events.Warned)] == [
        f"There is no preview of step {step}: [Errno 28] No space left on device." for step in (0, 6)
    ]
    assert isinstance(told[-1], events.Finished)
    assert_same_bits(whole, without)


def test_a_run_that_the_disk_cannot_hold_is_refused_with_figures(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    with pytest.raises(TrainingError, match=r"has 0 MiB free, and the run needs \d+ \(3 checkpoints of \d+ each"):
        next(train(make(rank=16)))


def test_a_run_killed_between_a_save_and_its_pruning_keeps_no_more_checkpoints_than_another(make: Any) -> None:
    of = make()
    list(train(of))
    kept = sorted(path.name for path in of.checkpoints.iterdir())
    shutil.copytree(of.checkpoints / kept[0], of.checkpoints / "step-00000001")
    assert isinstance(list(train(of))[-1], events.Finished)
    assert sorted(path.name for path in of.checkpoints.iterdir()) == kept


def test_restore_refuses_a_checkpoint_of_other_layers(make: Any) -> None:
    of = make()
    list(train(of))
    with pytest.raises(TrainingError, match="other layers"):
        restore(of, {}, Optimizer([]), Average([], 0.0))


# ---------------------------------------------------------------- SDXL


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny-xl", family="sdxl")


XL = {"text_encoder": '["attention", "feed_forward", "projection"]', "loss.prior": 0.5, "pinned_embedding": 0.1, "pinned_prompts": PINS}


def test_sdxl_trains_both_encoders_and_resumes_in_the_same_bits(make: Any, tiny_xl: Path) -> None:
    straight, broken = (make(model__base=tiny_xl, **XL, prompts="a cat --s 1", crop="random") for _ in range(2))
    told = list(train(straight))
    planned = next(e for e in told if isinstance(e, events.Planned))
    assert planned.layers == {"unet": 88, "text_encoder": 6, "text_encoder_2": 19}
    killed_and_resumed(broken, 4)
    newest = [load_newest(of.checkpoints) for of in (straight, broken)]
    assert newest[0] is not None and newest[1] is not None
    ours, theirs = (found.tensors["adapter"] for found in newest if found)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    moved = [name for name in ours if name.endswith("/up") and ours[name].abs().max() > 0]
    assert {name.partition(".")[0] for name in moved} == {"unet", "text_encoder", "text_encoder_2"}
    assert "text_encoder_2.text_projection/up" in moved


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_all_that_sdxl_says_of_a_prompt_can_be_held(make: Any, tiny_xl: Path, distance: str) -> None:
    """Norms and whole embeddings of both encoders, and of the pooled one."""

    def moved(**options: Any) -> list[float]:
        shared = {
            "embedding_norm": 0,
            "text_encoder_rate": 0.02,
            "schedule": "constant",
            "checkpoint_every": 0,
            "pinned_distance": distance,
        }
        of = make(model__base=tiny_xl, **(shared | {"steps": 30, "text_encoder": XL["text_encoder"], "pinned_prompts": PINS} | options))
        list(train(of))
        family, model = families.load(str(tiny_xl), torch.float32, torch.device("cpu"))
        newest = load_newest(of.checkpoints)
        assert newest is not None
        with torch.no_grad():
            before = family.encode_prompts(model, ["a dog"]).vectors
            for name, layer in adapt(model, of.config).layers.items():
                layer.load_state(unflatten(newest.tensors["adapter"])[name])
            after = family.encode_prompts(model, ["a dog"]).vectors
        return [float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True)]

    free = moved()
    held = moved(pinned_embedding=30)
    assert len(free) == 3 and all(now < before / 2 for now, before in zip(held, free, strict=True))


def test_the_file_of_an_sdxl_run_is_what_was_trained(make: Any, tiny_xl: Path) -> None:
    """Under the original names of the UNet's layers; merged as WebUIs merge it, and loaded by diffusers."""
    of = make(model__base=tiny_xl, steps=4, text_encoder=XL["text_encoder"], lora__unet='["everything"]', text_encoder_rate=0.02)
    list(train(of))
    keys = {key.partition(".")[0] for key in load_file(of.export)}
    assert "lora_te2_text_projection" in keys and "lora_unet_label_emb_0_0" in keys
    assert any(key.startswith("lora_unet_input_blocks_") for key in keys) and not any("down_blocks" in key for key in keys)
    merged = prediction_of(tiny_xl, file=of.export)
    torch.testing.assert_close(merged, prediction_of(tiny_xl, layers_of=of), atol=1e-5, rtol=0)
    assert (merged - prediction_of(tiny_xl)).abs().max() > 1e-2
