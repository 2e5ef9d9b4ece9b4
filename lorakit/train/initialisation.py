"""Initial adapter weights that need more than random numbers: orthogonal matrices, or principal directions (EVA)."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.adapter import Adapter
from lorakit.base import Base
from lorakit.config import Config
from lorakit.train.distributed import ALONE, Team
from lorakit.train.examples import Batch, Examples
from lorakit.train.loop import batch_loss

BATCHES = 8  # the first batches of the run, whose layer inputs EVA analyses
OVERSAMPLING = 8  # directions in addition to the rank, which make the approximation accurate
SMALL = 0.1  # scale of PEFT's orthogonal matrices
NOISE = 1e-6  # share of a sketch below which values are float32 rounding errors


@torch.no_grad()
def initialise(adapter: Adapter, unet: Any, base: Base, examples: Examples, team: Team = ALONE) -> None:
    """Give a fresh adapter (in place) the initial weights of the config; the models' output stays the same.

    All processes of the team get the weights of the first one.
    """
    config = examples.config
    kinds = {layer.spec.initialisation for layer in adapter.layers.values()}
    if kinds <= {"usual"}:
        return
    if "orthogonal" in kinds:
        orthogonal(adapter, config.seed)
    if "eva" in kinds:
        batches = examples.epoch(0)[:BATCHES]
        eva(adapter, unet, base, [examples.batch(b[: config.at_once], step) for step, b in enumerate(batches)], config)
    weights: list[Tensor] = list(adapter.parameters())
    if not team.first:
        torch._foreach_zero_(weights)
    team.add_up(weights)


@torch.no_grad()
def orthogonal(adapter: Adapter, seed: int) -> None:
    """Initialise both matrices of a layer as non-zero with product zero: their inner sides are orthogonal.

    A layer of rank one is not changed.

    Source: PEFT's `init_lora_weights="orthogonal"`.
    """
    for place, layer in enumerate(adapter.layers.values()):
        down, up = layer.parts["down"], layer.parts["up"]
        half = down.shape[0] // 2
        if not half or layer.spec.initialisation != "orthogonal":
            continue
        random = torch.Generator().manual_seed(seed * 100_003 + place)
        inner = torch.linalg.qr(torch.randn(down.shape[0], down.shape[0], generator=random))[0]
        wide = torch.randn(half, down[0].numel(), generator=random)
        down.copy_((inner[:, :half] @ wide * SMALL).view(down.shape))
        tall = torch.randn(up.shape[0], half, generator=random)
        up.copy_((tall @ inner[:, half : 2 * half].T * SMALL).view(up.shape))


@torch.no_grad()
def eva(adapter: Adapter, unet: Any, base: Base, batches: Sequence[Batch], config: Config) -> None:
    """Set the down matrices to the principal directions of their layers' inputs on the batches; up stays zero.

    One pass suffices: Nyström's method approximates XᵀX from a sketch of it, so no input is kept and a layer's memory
    is proportional to its rank.

    Source: Paischer et al. 2024, arXiv:2410.07170 (EVA; ranks are not redistributed here); Tropp et al. 2017,
    arXiv:1706.05736, algorithm 3 (fixed-rank Nyström).
    """
    device = unet.device
    layers: list[Any] = [layer for layer in adapter.layers.values() if layer.spec.initialisation == "eva"]
    sketches: list[tuple[Tensor, Tensor]] = []
    for place, layer in enumerate(layers):
        down = layer.parts["down"]
        width = down[0].numel()
        random = torch.Generator().manual_seed(config.seed * 100_003 + place)
        start = torch.randn(width, min(width, down.shape[0] + OVERSAMPLING), generator=random)
        start = torch.linalg.qr(start)[0].to(device)
        sketches.append((start, torch.zeros_like(start)))
    alphas = base.alphas_cumprod().to(device)
    with ExitStack() as stack:
        for layer, sketch in zip(layers, sketches, strict=True):
            hook = layer.register_forward_pre_hook(_sketcher(layer.get_base_layer(), *sketch))
            stack.callback(hook.remove)
        stack.callback(unet.train, unet.training)
        unet.eval()
        for batch in batches:
            batch_loss(unet, base, alphas, batch, config, adapter)
    for layer, sketch in zip(layers, sketches, strict=True):
        down = layer.parts["down"]
        directions = strongest(*sketch, len(down))
        down.view(len(down), -1)[: len(directions)] = directions


def _sketcher(frozen: Any, start: Tensor, sketch: Tensor) -> Callable[[Any, tuple[Tensor, ...]], None]:
    """A hook that adds Xᵀ(X · start) to a sketch, where X are the inputs of a frozen layer, one position per row."""

    def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        if isinstance(frozen, nn.Conv2d):
            assert not isinstance(frozen.padding, str)  # as in all of diffusers' models
            x = F.unfold(x, frozen.kernel_size, frozen.dilation, frozen.padding, frozen.stride).transpose(1, 2)
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(rows.device.type, enabled=False):
            sketch.addmm_(rows.T, rows @ start)

    return hook


def strongest(start: Tensor, sketch: Tensor, count: int) -> Tensor:
    """The principal directions of a positive semi-definite matrix C: (count, in), orthonormal rows, float32.

    Args:
        start: (in, k), orthonormal columns, k at least min(count, in).
        sketch: C · start.

    Returns:
        Fewer than `count` rows if C is smaller or has a lower rank.
    """
    start, sketch = start.double().cpu(), sketch.double().cpu()
    scale = sketch.norm()
    if not scale:
        return start.new_zeros(0, len(start)).float()
    shifted = sketch + (shift := NOISE * scale) * start
    inner = start.T @ shifted
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    root = vectors / values.clamp(min=shift).sqrt()
    left, strengths, _ = torch.linalg.svd(shifted @ root, full_matrices=False)
    rank = min(count, int((strengths.square() > 10 * shift).sum()))
    return left[:, :rank].T.float()
