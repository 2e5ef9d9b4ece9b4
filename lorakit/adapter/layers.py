"""The layers an adapter is made of: their forward passes, their parts, and what they add to a weight."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import base as bases

NAME = "default"
LEAST = 1e-6  # length that a column is taken to have at least: an input that nothing listens to has none


# ── What a layer learns, and what it means ──────────────────────────────────────────────────────────────────────────


def layer_parts(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What a layer learns, by the names its file uses."""
    if hasattr(layer, "lora_A"):
        found = {"down": layer.lora_A[NAME].weight, "up": layer.lora_B[NAME].weight}
        return found | ({"dora_scale": layer.dora_scale} if hasattr(layer, "dora_scale") else {})
    return {name: getattr(layer, name)[NAME] for name in layer.adapter_layer_names if NAME in getattr(layer, name, ())}


def algorithm_of(names: Iterable[str]) -> str:
    """What parts of these names make: "lora", "dora", "loha" or "lokr"."""
    names = set(names)
    if names == {"down", "up"}:
        return "lora"
    if names == {"down", "up", "dora_scale"}:
        return "dora"
    if names == {f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"}:
        return "loha"
    pairs = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
    if any(names == one | two for one in pairs[0] for two in pairs[1]):
        return "lokr"
    raise ValueError(f"{', '.join(sorted(names))} make no adapter")


def rank_of(parts: Mapping[str, Tensor]) -> int | None:
    """The rank of a layer's parts; None of a LoKr that has nothing of low rank, and no scale either then."""
    for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in parts:
            return parts[name].shape[0]
    return None


def size(parts: Mapping[str, Tensor]) -> tuple[int, int]:
    """(out, in · k · k) of the weight that a layer's parts change.

    Raises:
        ValueError: they are of no known algorithm, or do not go together.
    """
    kind = algorithm_of(parts)

    def product(a: Tensor, b: Tensor) -> tuple[int, int]:
        if a.shape[1] != b.shape[0] or any(n != 1 for n in a.shape[2:]):
            raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not match")
        return a.shape[0], b[0].numel()

    if kind in ("lora", "dora"):
        if parts["down"].ndim != parts["up"].ndim:
            raise ValueError(f"shapes {tuple(parts['up'].shape)} and {tuple(parts['down'].shape)} do not match")
        return product(parts["up"], parts["down"])
    prefix = {"loha": "hada", "lokr": "lokr"}[kind]
    one, two = (
        (parts[whole].shape[0], parts[whole][0].numel())
        if (whole := f"{prefix}_w{n}") in parts
        else product(parts[f"{whole}_a"], parts[f"{whole}_b"])
        for n in (1, 2)
    )
    if kind == "lokr":
        return one[0] * two[0], one[1] * two[1]
    if one != two:
        raise ValueError(f"shapes {one} and {two} do not match")
    return one


def change(parts: Mapping[str, Tensor], alpha: float, weight: Tensor | None = None) -> Tensor:
    """What a layer's parts add to a weight at strength 1: (out, in · k · k), float32.

    Args:
        weight: the frozen one, (out, in[, k, k]); asked of DoRA alone, whose change depends on it.

    Source: as `inject`; LoHa's and LoKr's layout as LyCORIS writes it.
    """
    parts = {name: part.float() for name, part in parts.items()}
    kind, rank = algorithm_of(parts), rank_of(parts)
    if kind in ("lora", "dora"):
        product = parts["up"].flatten(1) @ parts["down"].flatten(1)
    elif kind == "loha":
        product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    else:
        one, two = (
            parts[whole].flatten(1)
            if (whole := f"lokr_w{n}") in parts
            else parts[f"{whole}_a"] @ parts[f"{whole}_b"].flatten(1)
            for n in (1, 2)
        )
        product = torch.kron(one, two)
    product = product * (alpha / rank if rank else 1.0)
    if kind != "dora":
        return product
    before = weight.float()
    merged = before + product.view_as(before)
    lengths = bases.column_norm(merged).clamp(min=LEAST)
    return (merged * (parts["dora_scale"].flatten() / lengths).view(_row(before)) - before).flatten(1)


def _row(weight: Tensor) -> tuple[int, ...]:
    """The shape that holds a number for each input of a weight: (1, in[, 1, 1])."""
    return (1, weight.shape[1], *[1] * (weight.ndim - 2))


def meaning(layer: nn.Module, parts: Mapping[str, Tensor], alpha: float) -> Tensor:
    """What parts, a layer's own or a file's, add to the weight of that layer at strength 1, in the weight's shape."""
    frozen, weight = layer.get_base_layer(), None
    if "dora_scale" in parts:
        weight = bases.layer_weight(frozen)
        parts = dict(parts) | {"dora_scale": _lengths(layer, parts["dora_scale"].float().flatten())}
    return change(parts, alpha, weight).view(bases.weight_shape(frozen))


def file_dtype(part: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A part as a file of a dtype holds it: DoRA's lengths stay float32, as rounding them would drown what is learned.

    A length of 1 rounds by 2⁻¹¹ in float16; what a LoRA changes of it is hardly more.
    """
    return weight.to(torch.float32 if part == "dora_scale" else dtype)


# ── LoRA ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _LowRank(torch.autograd.Function):
    """x·Wᵀ + b + scale · (x·Aᵀ)·Bᵀ and its way back, each sum made in place: nothing of the output's size is copied.

    Autograd alone scales, adds and keeps the two halves apart, in both directions.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale):
        low = x @ down.T
        ctx.save_for_backward(x, low, weight, down, up)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(low, up.T, alpha=scale)

    @staticmethod
    def backward(ctx, gradient):
        x, low, weight, down, up = ctx.saved_tensors
        of_low = (gradient @ up).mul_(ctx.scale)
        of_x = (gradient @ weight).addmm_(of_low, down) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_low.T @ x, (gradient.T @ low).mul_(ctx.scale), None


def _lora_forward(layer, x: Tensor) -> Tensor:
    """In place of PEFT's own: the input is brought to the base's precision once, not for base and adapter each."""
    frozen, scale = layer.base_layer, layer.scaling[NAME]
    if scale == 0:
        return frozen(x)
    x = x.to(bases.layer_dtype(frozen))
    down, up = (matrix.weight.to(x.dtype) for matrix in (layer.lora_A[NAME], layer.lora_B[NAME]))
    if isinstance(frozen, nn.Conv2d):
        low = F.conv2d(x, down, None, frozen.stride, frozen.padding, frozen.dilation, frozen.groups)
        return frozen(x) + F.conv2d(low * scale, up)
    if type(frozen) is not nn.Linear:  # one that is packed
        return frozen(x) + F.linear(F.linear(x, down) * scale, up)
    rows = x.reshape(-1, x.shape[-1])
    return _LowRank.apply(rows, frozen.weight, frozen.bias, down, up, scale).view(*x.shape[:-1], -1)


# ── DoRA ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _make_dora(layer: nn.Module) -> None:
    """Let a LoRA layer (in place) learn the length of each column of its weight beside the direction.

    A column is an input's: the paper's reading, and the one on which A1111, Forge, ComfyUI and LyCORIS agree; PEFT
    takes rows, which they read differently from each other. Scaling a column is scaling that input, so no merged
    weight is ever made.

    Source: Liu et al. 2024, arXiv:2402.09353; its 4.3 for the norm that counts as a constant in the gradient.
    """
    frozen = layer.get_base_layer()
    weight = bases.layer_weight(frozen).float()
    layer.register_buffer("column_squares", weight.square().sum(dim=[0, *range(2, weight.ndim)]), persistent=False)
    lengths = layer.column_squares.sqrt()
    if bases.is_quantized(frozen):  # what is learned, and goes into files, is said of the base as it was before
        lengths = frozen.column_norm.to(lengths.device).clamp(min=LEAST)
        layer.register_buffer("own_lengths", lengths, persistent=False)
    layer.dora_scale = nn.Parameter(lengths.view(_row(weight)).clone())
    layer.strength = 1.0
    layer.forward = MethodType(_dora_forward, layer)


def _dora_forward(layer, x: Tensor) -> Tensor:
    if layer.strength == 0:
        return layer.base_layer(x)
    share = _lengths(layer, layer.dora_scale.flatten()) / _merged_norm(layer) - 1  # small: rounding loses little of it
    share = share.view_as(layer.dora_scale)
    full = _lora_forward(layer, torch.addcmul(x, x, share.to(x.dtype)))
    return full if layer.strength == 1 else torch.lerp(layer.base_layer(x), full, layer.strength)


def _lengths(layer: nn.Module, said: Tensor) -> Tensor:
    """Lengths that are said of the base as files mean it, for the one that is held: (in,)."""
    return said / layer.own_lengths * layer.column_squares.sqrt() if hasattr(layer, "own_lengths") else said


@torch.no_grad()
def _merged_norm(layer) -> Tensor:
    """‖W + s·B·A‖ of each column, (in,), float32: the square multiplied out, so that B·A is never made."""
    weight = bases.layer_weight(layer.base_layer)
    down, up, scale = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight.flatten(1), layer.scaling[NAME]
    flat = down.flatten(1)
    kind = weight.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        across = (up.T.to(weight.dtype) @ weight.flatten(1)).float() * flat
        own = ((up.T @ up) @ flat) * flat
    summed = (2 * scale * across + scale**2 * own).sum(0)
    return (layer.column_squares + summed.view(down.shape[1], -1).sum(1)).clamp(min=LEAST**2).sqrt()


# ── LoHa and LoKr ───────────────────────────────────────────────────────────────────────────────────────────────────


def _whole_forward(layer, x: Tensor) -> Tensor:
    """In place of PEFT's own, which asks the random numbers at each call whether to be left out."""
    frozen, added = layer.base_layer, layer.get_delta_weight(NAME).to(x.dtype)
    if isinstance(frozen, nn.Conv2d):
        return frozen(x) + F.conv2d(x, added, None, frozen.stride, frozen.padding, frozen.dilation, frozen.groups)
    return frozen(x) + F.linear(x, added)


def _divide(layer: nn.Module, like: Mapping[str, Tensor]) -> None:
    """Let a LoKr layer (in place) have matrices of these shapes, zero: programs divide a weight in different ways."""
    device = next(iter(layer_parts(layer).values())).device
    for name in layer_parts(layer):
        del getattr(layer, name)[NAME]
    for name, tensor in like.items():
        getattr(layer, name)[NAME] = nn.Parameter(torch.zeros(tensor.shape, device=device))
