"""What a training step compares: timesteps, noise, the target and its weight.

Randomness has no state: every example's draws come from (run seed, step, example), so a resumed run repeats them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TIMESTEPS = 1000  # all of Stable Diffusion is trained on 1000


def generator(seed: int, step: int, example: int) -> torch.Generator:
    """A CPU generator for one example of one step; the same on every machine and device."""
    state = np.random.SeedSequence([seed, step, example]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def draw(
    seed: int, step: int, examples: Sequence[int], shape: Sequence[int], noise_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Noise and timesteps for a batch.

    Args:
        examples: the place of each example in the whole batch of the step.
        shape: latent shape of one example, (C, H, W).
        noise_offset: strength of a constant added to each channel, for very dark or bright pictures
            (Guttenberg 2023, "Diffusion with Offset Noise").

    Returns:
        Noise (B, C, H, W), float32; timesteps (B,), int64. Both on the CPU.
    """
    noise, timesteps = [], []
    for example in examples:
        random = generator(seed, step, example)
        timesteps.append(torch.randint(TIMESTEPS, (1,), generator=random))
        noise.append(torch.randn(*shape, generator=random))
        if noise_offset:
            noise[-1] += noise_offset * torch.randn(shape[0], 1, 1, generator=random)
    return torch.stack(noise), torch.cat(timesteps)


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


def mean_squared(predicted: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error, each example weighted. A scalar, float32."""
    each = (predicted.float() - wanted.float()).square().flatten(1).mean(1)
    return (each if weight is None else each * weight).mean()
