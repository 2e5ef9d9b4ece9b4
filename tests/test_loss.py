import pytest
import torch

from lorakit import loss


def batch():
    random = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=random) for _ in range(2))
    return latents, noise, torch.tensor([0, 10, 500, 999])


def ddpm(prediction_type="epsilon"):
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


def test_noising_equals_diffusers():
    latents, noise, timesteps = batch()
    scheduler = ddpm()
    ours = loss.add_noise(latents, noise, scheduler.alphas_cumprod[timesteps])
    assert torch.allclose(ours, scheduler.add_noise(latents, noise, timesteps), atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_equals_diffusers(kind):
    latents, noise, timesteps = batch()
    scheduler = ddpm(kind)
    theirs = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    ours = loss.target(kind, latents, noise, scheduler.alphas_cumprod[timesteps])
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_other_targets_are_refused():
    with pytest.raises(ValueError, match="predicts 'sample'"):
        loss.target("sample", *batch()[:2], torch.ones(4))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_equals_diffusers_training_script(kind):
    from diffusers.training_utils import compute_snr

    scheduler = ddpm(kind)
    timesteps = torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, timesteps)
    theirs = torch.stack([snr, 5 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    theirs = theirs / (snr + 1 if kind == "v_prediction" else snr)
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    assert torch.allclose(loss.min_snr_weight(alpha_bar / (1 - alpha_bar), 5.0, kind), theirs, rtol=1e-4)


def test_zero_terminal_snr_has_a_finite_weight():
    assert loss.min_snr_weight(torch.zeros(1), 5.0, "v_prediction") == 0


def test_draws_depend_on_seed_step_and_example_alone():
    noise, timesteps = loss.draw(7, 3, [0, 1, 2], (4, 8, 8))
    torch.rand(100)  # the global generator has no say
    again, times = loss.draw(7, 3, [2], (4, 8, 8))
    assert torch.equal(noise[2], again[0]) and timesteps[2] == times[0]
    for other in ((8, 3, [2]), (7, 4, [2]), (7, 3, [1])):
        assert not torch.equal(again, loss.draw(*other, (4, 8, 8))[0])


def test_noise_is_normal_and_timesteps_cover_the_schedule():
    noise, timesteps = loss.draw(0, 0, range(800), (4, 4, 4))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert timesteps.min() < 20 and timesteps.max() > 980
    assert abs(timesteps.float().mean() - 500) < 40


def test_noise_offset_shifts_whole_channels():
    plain, _ = loss.draw(0, 0, range(64), (4, 16, 16))
    shifted, _ = loss.draw(0, 0, range(64), (4, 16, 16), noise_offset=0.5)
    means = (shifted - plain).mean((2, 3))
    assert torch.allclose((shifted - plain).std((2, 3)), torch.zeros(64, 4), atol=1e-5)
    assert 0.4 < means.std() < 0.6


def test_weights_scale_each_example():
    a, b = torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [2, 2, 2]])
    assert loss.mean_squared(a, b) == pytest.approx(2.5)
    assert loss.mean_squared(a, b, torch.tensor([1.0, 0.5])) == pytest.approx(1.5)
