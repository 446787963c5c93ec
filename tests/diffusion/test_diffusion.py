"""The formulas of diffusion training, by hand and against diffusers' own scheduler."""

import pytest
import torch
from diffusers import DDPMScheduler

from sdlora.diffusion.losses import denoising_loss, min_snr_weight
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.diffusion.timesteps import stratified


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
