"""How an adapter begins, where chance is not good enough: orthogonal, or along what the pictures excite most (EVA)."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import adapter as adapters
from lorakit import dataset as datasets
from lorakit.adapter import Adapter
from lorakit.base import Base, Encoded, Text
from lorakit.config import Config
from lorakit.train import loop
from lorakit.train.distributed import ALONE, Team

BATCHES = 8  # of the run's first ones, that are looked at
MORE = 8  # directions beside the wanted ones, which make those exact
SMALL = 0.1  # of PEFT's orthogonal matrices
NOISE = 1e-6  # share of a sketch below which it is rounding, of float32


@torch.no_grad()
def initialise(
    adapter: Adapter, unet, base: Base, pictures: Sequence[Encoded], repeats: Sequence[int], texts: dict[str, Text],
    config: Config, team: Team = ALONE,
) -> None:  # fmt: skip
    """Give a fresh adapter (in place) the beginning that the settings ask for. The models' output stays what it was.

    Args:
        repeats, texts: as for `train.steps`.
        team: processes that shall begin alike, as the first does.
    """
    if config.initialisation == "usual":
        return
    if config.initialisation == "orthogonal":
        orthogonal(adapter, config.seed)
    else:
        order = datasets.epoch_batches(
            [(p.latents.shape[-1], p.latents.shape[-2]) for p in pictures], repeats, config.batch_size,
            seed=config.seed, epoch=0,
        )  # fmt: skip
        eva(adapter, unet, base, [
            loop.batch(pictures, texts, some[: config.at_once], step, 0, config)
            for step, some in enumerate(order[:BATCHES])
        ], config)  # fmt: skip
    if not team.first:
        torch._foreach_zero_(adapter.parameters())
    team.add_up(adapter.parameters())


@torch.no_grad()
def orthogonal(adapter: Adapter, seed: int) -> None:
    """Matrices that are both not zero, and whose product is, as their inner sides are orthogonal.

    Source: PEFT's `init_lora_weights="orthogonal"`. A rank of one leaves a layer as it is.
    """
    for place, layer in enumerate(adapter.layers.values()):
        own = adapters.layer_parts(layer)
        down, up = own["down"], own["up"]
        half = down.shape[0] // 2
        if not half:
            continue
        random = torch.Generator().manual_seed(seed * 100_003 + place)
        normal = lambda *shape, random=random: torch.randn(*shape, generator=random)  # noqa: E731
        inner = torch.linalg.qr(normal(down.shape[0], down.shape[0]))[0]
        down.copy_((inner[:, :half] @ normal(half, down[0].numel()) * SMALL).view(down.shape))
        up.copy_((normal(up.shape[0], half) @ inner[:, half : 2 * half].T * SMALL).view(up.shape))


@torch.no_grad()
def eva(adapter: Adapter, unet, base: Base, items: Sequence[loop.Batch], config: Config) -> None:
    """Down matrices of the directions in which the inputs of their layers are strongest; up matrices stay zero.

    The directions come from one pass, by Nyström's approximation of XᵀX from a sketch of it: no input is kept, and a
    layer takes memory for its rank and a few rows more.

    Args:
        items: batches that the base is asked about, as in training.

    Source: Paischer et al. 2024, arXiv:2410.07170 (EVA; ranks are not redistributed here); Tropp et al. 2017,
    arXiv:1706.05736, algorithm 3 (fixed-rank Nyström).
    """
    sketches: dict[str, tuple[Tensor, Tensor]] = {}
    device = unet.device
    for place, (name, layer) in enumerate(adapter.layers.items()):
        down = adapters.layer_parts(layer)["down"]
        wide = down[0].numel()
        random = torch.Generator().manual_seed(config.seed * 100_003 + place)
        start = torch.randn(wide, min(wide, down.shape[0] + MORE), generator=random)
        start = torch.linalg.qr(start)[0].to(device)
        sketches[name] = start, torch.zeros_like(start)
    alphas = base.alphas_cumprod().to(device)
    with ExitStack() as stack:
        for name, layer in adapter.layers.items():
            hook = layer.register_forward_pre_hook(_looking(layer, *sketches[name]))
            stack.callback(hook.remove)
        training = unet.training
        stack.callback(unet.train, training)
        unet.eval()
        for item in items:
            loop.batch_loss(unet, base, alphas, item, config, adapter)
    for name, layer in adapter.layers.items():
        down = adapters.layer_parts(layer)["down"]
        found = strongest(*sketches[name], down.shape[0])
        down.view(down.shape[0], -1)[: len(found)] = found


def _looking(layer: nn.Module, start: Tensor, sketch: Tensor):
    """A hook that adds Xᵀ(X · start) to a sketch, X being a layer's inputs, a row a place."""
    frozen = layer.get_base_layer()

    def hook(_, inputs) -> None:
        x = inputs[0].float()
        if isinstance(frozen, nn.Conv2d):
            x = F.unfold(x, frozen.kernel_size, frozen.dilation, frozen.padding, frozen.stride).transpose(1, 2)
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(rows.device.type, enabled=False):
            sketch.addmm_(rows.T, rows @ start)

    return hook


def strongest(start: Tensor, sketch: Tensor, count: int) -> Tensor:
    """The directions in which a positive matrix C is strongest, from C · start: (count, in), orthonormal rows.

    Args:
        start: (in, k), orthonormal columns, k at least `count` where the matrix is as wide.
        sketch: C · start.

    Returns:
        Fewer than `count` where the matrix is narrower, or has fewer directions at all.
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
    kept = min(count, int((strengths.square() > 10 * shift).sum()))
    return left[:, :kept].T.float()
