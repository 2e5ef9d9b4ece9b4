"""What a base's UNet answers with, measured on the user's own pictures: epsilon, v, or a flow's velocity."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit import base as bases
from lorakit import sample
from lorakit.base import Base, Encoded
from lorakit.device import autocast
from lorakit.train import loss
from lorakit.train.examples import Examples

KINDS = ("epsilon", "v_prediction", "flow")
TIMESTEPS = (200, 500)  # near 0 the answers are alike, near 1000 pictures cannot be recognised
PICTURES = 4
SEED = 20_261  # of the noise
CLEAR = 1.4  # times the error of the best kind, which another's must have
KNOWN = 0.8  # the largest relative error of a best kind


@dataclass(frozen=True)
class Answer:
    """How well each kind of answer explains what a UNet answers."""

    errors: dict[str, float]  # of KINDS: relative error, 0 explains all

    @property
    def kind(self) -> str | None:
        """The kind of answer; None if none is good, or two are nearly as good.

        A flow's velocity and v resemble each other, and flows are rare: v may be little better, a flow must be clearly.
        """
        best = min(self.errors, key=self.errors.__getitem__)
        others = [error for kind, error in self.errors.items() if kind != best and (best == "flow" or kind != "flow")]
        clear = self.errors[best] <= KNOWN and min(others) >= CLEAR * self.errors[best]
        return best if clear else None

    def describe(self) -> str:
        return ", ".join(f"{kind} {error:.2f}" for kind, error in self.errors.items())


def probe(unet: Any, base: Base, examples: Examples) -> Answer:
    """Ask a UNet without an adapter about a few of the training pictures, with fixed noise.

    The UNet and all randomness are left unchanged.
    """
    own = [picture for picture in examples.pictures if not picture.prior]
    alphas_cumprod = base.alphas_cumprod()
    wrong, size = dict.fromkeys(KINDS, 1e-12), dict.fromkeys(KINDS, 1e-12)  # without pictures nothing is decided
    with sample.borrow(unet), autocast(unet.device, unet.dtype):
        for number in range(min(PICTURES, len(own))):
            picture = own[number * len(own) // min(PICTURES, len(own))]
            for kind, answer, target in _asked(unet, base, alphas_cumprod, examples, picture, number):
                wrong[kind] += (answer - target).square().sum().item()
                size[kind] += target.square().sum().item()
    return Answer({kind: (wrong[kind] / size[kind]) ** 0.5 for kind in KINDS})


def _asked(
    unet: Any, base: Base, alphas_cumprod: Tensor, examples: Examples, picture: Encoded, number: int
) -> list[tuple[str, Tensor, Tensor]]:
    """(kind, the UNet's answers, what they would be) about a picture at TIMESTEPS.

    Epsilon and v are asked in the forward process of `add_noise`, a flow in its own, (1 − σ) x + σ noise.

    Source: Liu et al. 2022, arXiv:2209.03003 (rectified flow).
    """
    config, timesteps = examples.config, torch.tensor(TIMESTEPS)
    text = examples.texts[(picture.variants or (picture.caption,))[0]]
    alpha_bar, sigma = alphas_cumprod[timesteps], (timesteps / 1000).view(-1, 1, 1, 1)
    draws = (loss.generator(SEED, number, timestep) for timestep in TIMESTEPS)
    noise = torch.stack([torch.randn(picture.latents.shape, generator=draw) for draw in draws])
    latents = picture.latents.expand_as(noise)
    noisy = torch.cat([loss.add_noise(latents, noise, alpha_bar), torch.lerp(latents, noise, sigma)])
    answers = []
    for some, at in zip(noisy.split(config.at_once), timesteps.repeat(2).split(config.at_once), strict=True):
        embeddings, pooled, sizes = (
            x.expand(len(at), *x.shape).to(unet.device, unet.dtype)
            for x in (text.embeddings, text.pooled, picture.sizes)
        )
        noised, conditions = some.to(unet.device, unet.dtype), sizes if base.family == "sdxl" else None
        answer = bases.ask(unet, noised, at.to(unet.device), (embeddings, pooled), conditions)
        answers.append(answer.float().cpu())
    of_diffusion, of_flow = torch.cat(answers).chunk(2)
    of_both = [(kind, of_diffusion, loss.target(kind, latents, noise, alpha_bar)) for kind in KINDS[:2]]
    return [*of_both, ("flow", of_flow, noise - latents)]
