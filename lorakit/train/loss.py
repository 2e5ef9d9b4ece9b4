"""What a training step compares: timesteps, noise, the target and its weight.

Randomness has no state: every example's draws come from (run seed, step, example), so a resumed run repeats them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TIMESTEPS = 1000  # all of Stable Diffusion is trained on 1000


def generator(seed: int, step: int, example: int) -> torch.Generator:
    """A CPU generator for one example of one step; the same on every machine and device."""
    state = np.random.SeedSequence([seed, step, example]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class Draws(NamedTuple):
    """What chance decides for a batch, on the CPU."""

    noise: Tensor  # (B, C, H, W), float32
    timesteps: Tensor  # (B,), int64
    perturbation: Tensor | None = None  # (B, C, H, W): added to the noise the UNet sees, not to the target


def draw(
    seed: int, step: int, examples: Sequence[int], shape: Sequence[int], *, noise_offset: float = 0.0,
    multires_iterations: int = 0, multires_discount: float = 0.3, input_perturbation: float = 0.0,
    timesteps: tuple[int, int] = (0, TIMESTEPS), timestep_sampling: str = "uniform", timestep_shift: float = 0.0,
) -> Draws:  # fmt: skip
    """Noise and timesteps for a batch.

    Args:
        examples: the place of each example in the whole batch of the step.
        shape: latent shape of one example, (C, H, W).
        noise_offset: strength of a constant added to each channel, for very dark or bright pictures
            (Guttenberg 2023, "Diffusion with Offset Noise").
        multires_iterations, multires_discount: coarser and coarser noise added on top, each by the discount weaker
            than the one before, for the same purpose (Whitaker 2023, "Multi-Resolution Noise for Diffusion Model
            Training"); 0 adds none.
        input_perturbation: strength of noise that the UNet sees and is not asked for (Ning et al. 2023,
            arXiv:2301.11706).
        timesteps: the first, and one past the last, that are trained.
        timestep_sampling: "uniform", or "logit_normal": most from the middle (Esser et al. 2024, arXiv:2403.03206).
        timestep_shift: of the logit-normal's mean; above 0 towards noise, below 0 towards detail.
    """
    low, high = timesteps
    noise, times, perturbation = [], [], []
    for example in examples:
        random = generator(seed, step, example)
        if timestep_sampling == "logit_normal":
            share = torch.sigmoid(timestep_shift + torch.randn(1, generator=random))
            times.append((low + share * (high - low)).long().clamp(max=high - 1))
        elif timestep_sampling == "uniform":
            times.append(torch.randint(low, high, (1,), generator=random))
        else:
            raise ValueError(f"timestep_sampling {timestep_sampling!r} is unknown. Use 'uniform' or 'logit_normal'.")
        x = torch.randn(*shape, generator=random)
        if noise_offset:
            x += noise_offset * torch.randn(shape[0], 1, 1, generator=random)
        if multires_iterations:
            x = _multires(x, multires_iterations, multires_discount, random)
        noise.append(x)
        if input_perturbation:
            perturbation.append(input_perturbation * torch.randn(*shape, generator=random))
    return Draws(torch.stack(noise), torch.cat(times), torch.stack(perturbation) if perturbation else None)


def _multires(noise: Tensor, iterations: int, discount: float, random: torch.Generator) -> Tensor:
    """Noise (C, H, W) with coarser noise on top, scaled back to unit variance."""
    (height, width), side = noise.shape[1:], 1.0
    for level in range(1, iterations + 1):
        side *= 2 + 2 * float(torch.rand(1, generator=random))
        size = (max(1, int(height / side)), max(1, int(width / side)))
        coarse = torch.randn(1, len(noise), *size, generator=random)
        noise = noise + discount**level * F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        if size == (1, 1):
            break
    return noise / noise.std()


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x).view(-1, *[1] * (x.dim() - 1))


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The forward process: sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise.

    Args:
        latents, noise: shape (B, C, H, W).
        alpha_bar: cumulative product of alphas at each example's timestep, shape (B,).

    Source: Ho et al. 2020, arXiv:2006.11239, equation 4.
    """
    return _like(alpha_bar.sqrt(), latents) * latents + _like((1 - alpha_bar).sqrt(), latents) * noise


def target(prediction_type: str, latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the UNet should answer: the noise, or the velocity of a v-predicting base.

    Raises:
        ValueError: a prediction type Stable Diffusion bases do not have.

    Source: Salimans & Ho 2022, arXiv:2202.00512, appendix D.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return _like(alpha_bar.sqrt(), latents) * noise - _like((1 - alpha_bar).sqrt(), latents) * latents
    raise ValueError(f"The base predicts {prediction_type!r}; lorakit trains 'epsilon' and 'v_prediction' bases.")


def min_snr_weight(snr: Tensor, gamma: float = 5.0, prediction_type: str = "epsilon") -> Tensor:
    """Weight each example so that easy timesteps do not dominate the loss.

    Args:
        snr: signal-to-noise ratio alpha_bar / (1 - alpha_bar) at each timestep, shape (B,). 0 is allowed for
            v-prediction (zero terminal SNR) alone.
        gamma: SNR above which a timestep counts as easy.

    Returns:
        Weights, shape (B,).

    Source: Hang et al. 2023, arXiv:2303.09556, section 3.4.
    """
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


def debiased_weight(snr: Tensor, prediction_type: str = "epsilon") -> Tensor:
    """Weight each example by what its error does to the picture: noisy timesteps more, clean ones less.

    Args:
        snr: as for `min_snr_weight`, shape (B,).

    Returns:
        Weights, shape (B,): 1 / sqrt(snr) for epsilon, and what comes to the same for v-prediction.

    Source: Yu et al. 2023, arXiv:2310.08442.
    """
    if prediction_type == "v_prediction":
        return snr.sqrt() / (snr + 1)
    return snr.clamp(max=1000).rsqrt()  # beyond 1000 there is next to no noise to tell


def error(
    predicted: Tensor, wanted: Tensor, weight: Tensor | None = None, kind: str = "mse", delta: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The mean error, each example weighted. A scalar, float32.

    Args:
        predicted, wanted: shape (B, ...).
        weight: shape (B,).
        kind: "mse"; "huber" or "smooth_l1", which count large errors by their size and not its square, so that a few
            odd pictures decide less. Both equal "mse" for small errors ("smooth_l1" but for a factor 1 / delta).
        delta: the error from which on they do.
        mask: what each place counts, shape (B, 1, H, W), 0 to 1.

    Raises:
        ValueError: unknown kind.

    Source: Huber 1964, doi:10.1214/aoms/1177703732; Girshick 2015, arXiv:1504.08083.
    """
    predicted, wanted = predicted.float(), wanted.float()
    if kind == "mse":
        each = F.mse_loss(predicted, wanted, reduction="none")
    elif kind == "huber":
        each = 2 * F.huber_loss(predicted, wanted, reduction="none", delta=delta)
    elif kind == "smooth_l1":
        each = 2 * F.smooth_l1_loss(predicted, wanted, reduction="none", beta=delta)
    else:
        raise ValueError(f"loss {kind!r} is unknown. Use 'mse', 'huber' or 'smooth_l1'.")
    each = (each if mask is None else each * mask).flatten(1).mean(1)
    return (each if weight is None else each * weight).mean()
