import pytest
import torch
from said import naming

from lorakit.train import loss


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
    with pytest.raises(ValueError, match=naming("sample", "epsilon", "v_prediction")):
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


def test_draws_depend_only_on_seed_step_and_example():
    noise, timesteps, _ = loss.Noise().draw(7, 3, [0, 1, 2], (4, 8, 8))
    torch.rand(100)  # the global generator has no effect
    again, times, _ = loss.Noise().draw(7, 3, [2], (4, 8, 8))
    assert torch.equal(noise[2], again[0]) and timesteps[2] == times[0]
    for other in ((8, 3, [2]), (7, 4, [2]), (7, 3, [1])):
        assert not torch.equal(again, loss.Noise().draw(*other, (4, 8, 8))[0])


def test_noise_is_normal_and_timesteps_cover_the_schedule():
    noise, timesteps, _ = loss.Noise().draw(0, 0, range(800), (4, 4, 4))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert timesteps.min() < 20 and timesteps.max() > 980
    assert abs(timesteps.float().mean() - 500) < 40


def test_noise_offset_shifts_whole_channels():
    plain = loss.Noise().draw(0, 0, range(64), (4, 16, 16)).noise
    shifted = loss.Noise(offset=0.5).draw(0, 0, range(64), (4, 16, 16)).noise
    means = (shifted - plain).mean((2, 3))
    assert torch.allclose((shifted - plain).std((2, 3)), torch.zeros(64, 4), atol=1e-5)
    assert 0.4 < means.std() < 0.6


def test_weights_scale_each_example():
    a, b = torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [2, 2, 2]])
    assert loss.error(a, b) == pytest.approx(2.5)
    assert loss.error(a, b, torch.tensor([1.0, 0.5])) == pytest.approx(1.5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_debiased_weight_of_the_picture_is_the_same_for_both_targets(kind):
    """An error of the picture x has weight snr in epsilon's loss and snr + 1 in v's: both become sqrt(snr)."""
    snr = torch.tensor([0.01, 0.5, 1.0, 30.0])
    of_picture = snr + 1 if kind == "v_prediction" else snr
    assert torch.allclose(loss.debiased_weight(snr, kind) * of_picture, snr.sqrt())
    assert torch.isfinite(loss.debiased_weight(torch.tensor([1e9]), kind)).all()


def test_zero_terminal_snr_has_no_debiased_weight():
    assert loss.debiased_weight(torch.zeros(1), "v_prediction") == 0


def test_multires_noise_is_coarser_and_has_unit_variance():
    plain = loss.Noise().draw(0, 0, range(32), (4, 32, 32)).noise
    coarse = loss.Noise(multires_iterations=6, multires_discount=0.5).draw(0, 0, range(32), (4, 32, 32)).noise
    assert torch.allclose(coarse.flatten(1).std(1), torch.ones(32))
    pooled = [torch.nn.functional.avg_pool2d(x, 8).std() for x in (plain, coarse)]
    assert pooled[0] < 0.15 < 0.25 < pooled[1]  # 1/8 for white noise
    again = loss.Noise(multires_iterations=6, multires_discount=0.5).draw(0, 0, [3], (4, 32, 32)).noise
    assert torch.equal(again[0], coarse[3])


def test_multires_noise_of_a_few_cells():
    assert torch.isfinite(loss.Noise(multires_iterations=10).draw(0, 0, [0], (4, 1, 2)).noise).all()


def test_timesteps_follow_their_range_and_sampling():
    narrow = loss.Noise(timesteps=(200, 300)).draw(0, 0, range(2000), (1, 1, 1)).timesteps
    assert (narrow.min(), narrow.max()) == (200, 299)
    middle = loss.Noise(sampling="logit_normal").draw(0, 0, range(2000), (1, 1, 1)).timesteps.float()
    noisy = loss.Noise(sampling="logit_normal", shift=1.0).draw(0, 0, range(2000), (1, 1, 1)).timesteps.float()
    assert abs(middle.mean() - 500) < 15 and abs(middle.std() - 208) < 15  # of a logit-normal with sigma 1
    assert noisy.median() == pytest.approx(1000 * torch.sigmoid(torch.tensor(1.0)).item(), abs=15)
    with pytest.raises(ValueError, match=naming("sigmoid", "uniform", "logit_normal")):
        loss.Noise(sampling="sigmoid").draw(0, 0, [0], (1, 1, 1))


def test_a_perturbation_does_not_change_noise_and_timesteps():
    plain, other = (loss.Noise(perturbation=v).draw(0, 0, range(64), (4, 8, 8)) for v in (0.0, 0.1))
    assert torch.equal(plain.noise, other.noise) and torch.equal(plain.timesteps, other.timesteps)
    assert plain.perturbation is None and abs(other.perturbation.std() - 0.1) < 0.005


@pytest.mark.parametrize(("kind", "small"), [("huber", 1.0), ("smooth_l1", 10.0)])
def test_large_errors_count_linearly(kind, small):
    expected = torch.zeros(1, 100)
    near, far, farther = (loss.error(torch.full((1, 100), v), expected, kind=kind, delta=0.1) for v in (0.01, 5, 10))
    assert near == pytest.approx(small * 0.01**2, rel=1e-4)
    assert 1.9 < farther / far < 2.1  # 4 for mse
    with pytest.raises(ValueError, match=naming("l1", "mse", "huber", "smooth_l1")):
        loss.error(expected, expected, kind="l1")
