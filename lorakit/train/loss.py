"""Noise, timesteps, the training target, the loss and its weights.

Randomness has no state: an example's draws depend only on (run seed, step, example), so a resumed run repeats them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.config import Config

TIMESTEPS = 1000  # of every Stable Diffusion base


def generator(seed: int, step: int, example: int) -> torch.Generator:
    """A CPU generator for one example of one step; the same on every machine and device."""
    state = np.random.SeedSequence([seed, step, example]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class Draws(NamedTuple):
    """The random numbers of a batch, on the CPU."""

    noise: Tensor  # (B, C, H, W), float32
    timesteps: Tensor  # (B,), int64
    perturbation: Tensor | None = None  # (B, C, H, W): added to the noise in the UNet's input, not in the target


@dataclass(frozen=True)
class Noise:
    """Settings for drawing noise and timesteps.

    Attributes:
        offset: strength of a constant added to each channel, for very dark or bright pictures
            (Guttenberg 2023, "Diffusion with Offset Noise").
        multires_iterations, multires_discount: levels of coarser noise added for the same purpose; the discount is the
            strength of each relative to the one before (Whitaker 2023, "Multi-Resolution Noise for Diffusion Model
            Training").
        perturbation: strength of noise added to the UNet's input only (Ning et al. 2023, arXiv:2301.11706).
        timesteps: the first one to train on, and one past the last.
        sampling: "uniform", or "logit_normal": mostly from the middle (Esser et al. 2024, arXiv:2403.03206).
        shift: of the logit-normal's mean; above 0 towards noise, below 0 towards detail.
    """

    offset: float = 0.0
    multires_iterations: int = 0
    multires_discount: float = 0.3
    perturbation: float = 0.0
    timesteps: tuple[int, int] = (0, TIMESTEPS)
    sampling: str = "uniform"
    shift: float = 0.0

    @classmethod
    def of(cls, config: Config) -> "Noise":
        return cls(
            config.noise_offset, config.multires_noise_iterations, config.multires_noise_discount,
            config.input_perturbation, (config.min_timestep, config.max_timestep), config.timestep_sampling,
            config.timestep_shift,
        )  # fmt: skip

    def draw(self, seed: int, step: int, examples: Sequence[int], shape: Sequence[int]) -> Draws:
        """Noise and timesteps for a batch.

        Args:
            examples: the place of each example in the whole batch of the step.
            shape: latent shape of one example, (C, H, W).
        """
        noise, timesteps, perturbation = [], [], []
        for example in examples:
            random = generator(seed, step, example)
            timesteps.append(self._timestep(random))
            x = torch.randn(*shape, generator=random)
            if self.offset:
                x += self.offset * torch.randn(shape[0], 1, 1, generator=random)
            if self.multires_iterations:
                x = self._multires(x, random)
            noise.append(x)
            if self.perturbation:
                perturbation.append(self.perturbation * torch.randn(*shape, generator=random))
        return Draws(torch.stack(noise), torch.cat(timesteps), torch.stack(perturbation) if perturbation else None)

    def _timestep(self, random: torch.Generator) -> Tensor:
        low, high = self.timesteps
        if self.sampling == "uniform":
            return torch.randint(low, high, (1,), generator=random)
        if self.sampling != "logit_normal":
            raise ValueError(f"timestep_sampling {self.sampling!r} is unknown. Use 'uniform' or 'logit_normal'.")
        share = torch.sigmoid(self.shift + torch.randn(1, generator=random))
        return (low + share * (high - low)).long().clamp(max=high - 1)

    def _multires(self, noise: Tensor, random: torch.Generator) -> Tensor:
        """Add coarser noise to noise (C, H, W) and scale the sum to unit variance."""
        (height, width), side = noise.shape[1:], 1.0
        for level in range(1, self.multires_iterations + 1):
            side *= 2 + 2 * float(torch.rand(1, generator=random))
            size = (max(1, int(height / side)), max(1, int(width / side)))
            coarse = torch.randn(1, len(noise), *size, generator=random)
            coarse = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
            noise = noise + self.multires_discount**level * coarse
            if size == (1, 1):
                break
        return noise / noise.std()


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x).view(-1, *[1] * (x.dim() - 1))


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The forward process: sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise, for x and noise of shape (B, C, H, W).

    `alpha_bar` (B,) is the cumulative product of alphas at each example's timestep.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 4.
    """
    return _like(alpha_bar.sqrt(), latents) * latents + _like((1 - alpha_bar).sqrt(), latents) * noise


def target(prediction_type: str, latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The UNet's target: the noise, or the velocity for a v-predicting base. Shapes as for `add_noise`.

    Raises:
        ValueError: a prediction type that no Stable Diffusion base has.

    Source: Salimans & Ho 2022, arXiv:2202.00512, appendix D.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return _like(alpha_bar.sqrt(), latents) * noise - _like((1 - alpha_bar).sqrt(), latents) * latents
    raise ValueError(f"The base predicts {prediction_type!r}; lorakit trains 'epsilon' and 'v_prediction' bases.")


def min_snr_weight(snr: Tensor, gamma: float = 5.0, prediction_type: str = "epsilon") -> Tensor:
    """Weights (B,) for the examples, so that easy timesteps do not dominate the loss.

    Args:
        snr: signal-to-noise ratio alpha_bar / (1 - alpha_bar) at each timestep, shape (B,). It may be 0 for
            v-prediction (zero terminal SNR), not for epsilon.
        gamma: SNR above which a timestep counts as easy.

    Source: Hang et al. 2023, arXiv:2303.09556, section 3.4.
    """
    return snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


def debiased_weight(snr: Tensor, prediction_type: str = "epsilon") -> Tensor:
    """Weights (B,) for the examples by the effect of an error on the picture: more for noisy timesteps.

    They are 1 / sqrt(snr) for epsilon, and the equivalent for v-prediction. `snr` as for `min_snr_weight`.

    Source: Yu et al. 2023, arXiv:2310.08442.
    """
    if prediction_type == "v_prediction":
        return snr.sqrt() / (snr + 1)
    return snr.clamp(max=1000).rsqrt()  # above 1000 the noise is negligible


def error(
    predicted: Tensor, expected: Tensor, weight: Tensor | None = None, kind: str = "mse", delta: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The mean error, each example weighted. A scalar, float32.

    Args:
        predicted, expected: shape (B, ...).
        weight: shape (B,).
        kind: "mse"; "huber" or "smooth_l1", which are linear in large errors, so that outliers have less influence.
            Both equal "mse" for small errors ("smooth_l1" divides by delta).
        delta: the error above which they are linear.
        mask: weight of each place, shape (B, 1, H, W), 0 to 1.

    Raises:
        ValueError: unknown kind.

    Source: Huber 1964, doi:10.1214/aoms/1177703732; Girshick 2015, arXiv:1504.08083.
    """
    predicted, expected = predicted.float(), expected.float()
    if kind == "mse":
        errors = F.mse_loss(predicted, expected, reduction="none")
    elif kind == "huber":
        errors = 2 * F.huber_loss(predicted, expected, reduction="none", delta=delta)
    elif kind == "smooth_l1":
        errors = 2 * F.smooth_l1_loss(predicted, expected, reduction="none", beta=delta)
    else:
        raise ValueError(f"loss {kind!r} is unknown. Use 'mse', 'huber' or 'smooth_l1'.")
    errors = (errors if mask is None else errors * mask).flatten(1).mean(1)
    return (errors if weight is None else errors * weight).mean()
