"""The formulas of diffusion training, by hand and against diffusers' own scheduler."""

import pytest
import torch
from diffusers import DDPMScheduler

from sdlora.diffusion.losses import WEIGHTINGS, debiased_weight, denoising_loss, huber_width, min_snr_weight, sample_errors
from sdlora.diffusion.noise import multires_noise, perturb, sample_noise
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.diffusion.timesteps import Distribution, stratified


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_target_agree_with_diffusers(prediction_type: str) -> None:
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type)
    ours = NoiseSchedule(theirs.alphas_cumprod, prediction_type)  # type: ignore
    latents, noise, timesteps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(ours.add_noise(latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps))
    want = noise if prediction_type == "epsilon" else theirs.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(ours.target(latents, noise, timesteps), want)


def test_snr_and_min_snr_by_hand() -> None:
    schedule = NoiseSchedule(torch.tensor([0.95, 0.5]), "epsilon")
    snr = schedule.snr(torch.tensor([0, 1]))
    assert snr.tolist() == pytest.approx([19.0, 1.0], rel=1e-4)
    assert min_snr_weight(snr, 5, "epsilon").tolist() == pytest.approx([5 / 19, 1.0], rel=1e-4)
    assert min_snr_weight(snr, 5, "v_prediction").tolist() == pytest.approx([5 / 20, 1 / 2], rel=1e-4)
    assert min_snr_weight(snr, 0, "epsilon").tolist() == [1.0, 1.0]


def test_loss_by_hand() -> None:
    predicted, target = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[2.0, 0.0]]]])
    assert float(denoising_loss(predicted, target, torch.tensor([1.0, 0.5]))) == pytest.approx((5 + 0.5 * 2) / 2)


def test_timesteps_are_stratified_and_uniform_as_a_whole() -> None:
    draws = torch.cat([stratified(range(step * 4, step * 4 + 4), 0, 4) for step in range(500)]).view(-1, 4)
    for k in range(4):
        assert draws[:, k].min() >= 250 * k and draws[:, k].max() < 250 * (k + 1)
    assert draws.float().mean() == pytest.approx(499.5, abs=6)
    # the second batch of an accumulated step draws from its own strata
    assert torch.equal(stratified([8, 9], 2, 4), stratified([6, 7, 8, 9], 0, 4)[2:])


def test_debiased_by_hand() -> None:
    snr = torch.tensor([4.0, 4000.0])
    assert debiased_weight(snr, 0, "epsilon").tolist() == pytest.approx([0.5, 1000**-0.5])
    assert debiased_weight(snr, 0, "v_prediction").tolist() == pytest.approx([0.2, 1 / 1001])
    assert WEIGHTINGS["none"](snr, 5, "epsilon").tolist() == [1.0, 1.0]


def test_huber_by_hand_between_its_limits() -> None:
    assert huber_width(torch.tensor([1.0, 0.0]), 0.1, "snr").tolist() == pytest.approx([0.9 / 4 + 0.1, 0.1])
    assert huber_width(torch.tensor([1.0]), 0.1, "constant").tolist() == pytest.approx([0.1])
    error, zero, width = torch.full((1, 1, 1, 1), 3.0), torch.zeros(1, 1, 1, 1), torch.tensor([4.0])
    assert float(sample_errors(error, zero, width)) == pytest.approx(2 * 4 * (5 - 4))
    small = torch.full((1, 1, 1, 1), 1e-2)
    assert float(sample_errors(small, zero, width)) == pytest.approx(1e-4, rel=1e-2)  # squared
    large = torch.full((1, 1, 1, 1), 1e4)
    assert float(sample_errors(large, zero, width)) == pytest.approx(2 * 4 * 1e4, rel=1e-2)  # straight


def test_zero_terminal_snr_keeps_the_first_and_zeroes_the_last() -> None:
    plain = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    ours = NoiseSchedule(plain.alphas_cumprod, "v_prediction").with_zero_terminal_snr()
    torch.testing.assert_close(ours.alphas_cumprod[:-1], theirs.alphas_cumprod[:-1], atol=1e-5, rtol=1e-3)
    assert ours.alphas_cumprod[-1] == 0 and ours.alphas_cumprod[0] == plain.alphas_cumprod[0]
    last = ours.snr(torch.tensor([999]))
    for weighting in WEIGHTINGS.values():
        assert weighting(last, 5.0, "v_prediction").isfinite().all()
    assert huber_width(last, 0.1, "snr").tolist() == pytest.approx([0.1])


def test_logit_normal_by_hand_and_in_range() -> None:
    middle = torch.tensor([0.5], dtype=torch.float64)
    assert Distribution(0, 999, (0.0, 1.0)).at(middle).tolist() == [500]
    assert Distribution(0, 999, (1.0, 1.0)).at(middle).tolist() == [731]  # sigmoid(1) = 0.7311
    assert Distribution(200, 299).at(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist() == [200, 250, 299]
    draws = stratified(range(4000), 0, 4000, Distribution(100, 899, (0.0, 1.0)))
    assert draws.min() >= 100 and draws.max() <= 899
    # within sigmoid(-1) .. sigmoid(1) lie 68.3 % of the draws
    inside = (draws >= 100 + 0.2689 * 800) & (draws < 100 + 0.7311 * 800)
    assert inside.float().mean() == pytest.approx(0.6827, abs=0.01)


def test_multires_noise_has_unit_variance_and_more_of_the_coarse() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(4, 32, 32, generator=generator)
    mixed = multires_noise(plain, 0.6, generator)
    assert float(mixed.std()) == pytest.approx(1, abs=1e-5)
    coarse = lambda noise: float(noise.reshape(4, 4, 8, 4, 8).mean(dim=(2, 4)).std())  # noqa: E731 - a figure, used twice
    assert coarse(mixed) > 1.5 * coarse(plain)


def test_offset_shifts_channels_and_perturbation_adds_variance() -> None:
    shape = torch.Size((200, 8, 8))
    noise = sample_noise(shape, torch.Generator().manual_seed(1), offset=0.5)
    assert float(noise.mean(dim=(1, 2)).std()) == pytest.approx((0.5**2 + 1 / 64) ** 0.5, rel=0.15)
    assert torch.equal(
        sample_noise(shape, torch.Generator().manual_seed(1)), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    )
    extra = perturb(noise, 0.1, torch.Generator().manual_seed(2)) - noise
    assert float(extra.std()) == pytest.approx(0.1, rel=0.02)


def test_masked_errors_by_hand() -> None:
    predicted, target = torch.full((2, 1, 1, 4), 2.0), torch.zeros(2, 1, 1, 4)
    mask = torch.tensor([[[[1.0, 1.0, 0.0, 0.5]]], [[[1.0, 1.0, 1.0, 1.0]]]])
    assert sample_errors(predicted, target, mask=mask).tolist() == [4 * 2.5 / 4, 4.0]
    width = torch.tensor([1.0, 1.0])
    pseudo = 2 * (5**0.5 - 1)
    assert sample_errors(predicted, target, width, mask).tolist() == pytest.approx([pseudo * 2.5 / 4, pseudo])
    weight = torch.tensor([1.0, 0.5])
    assert float(denoising_loss(predicted, target, weight, mask=mask)) == pytest.approx((2.5 + 2.0) / 2)
