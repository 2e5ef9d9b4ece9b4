"""A frozen UNet held in fewer bits: the linear layers of its transformers in NF4 or int8, all else as it was.

They are most of SDXL's weights. What is trained beside them stays float32.

Source: Dettmers et al. 2023, arXiv:2305.14314 (NF4, double quantization); 2022, arXiv:2208.07339 (int8); bitsandbytes.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

BLOCK, OUTER_BLOCK = 64, 256  # weights that share a scale in NF4; scales that share a scale of their own


def can_quantize(device: torch.device) -> bool:
    """Whether bitsandbytes is here and works on a device: on CPUs its newer releases alone, on Apple's none."""
    try:
        release = tuple(int(part) for part in version("bitsandbytes").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return False
    return device.type == "cuda" or (device.type == "cpu" and release >= (0, 50))


def quantizable_layers(unet: nn.Module, kind: str) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that `hold` packs, by their path.

    NF4 needs whole blocks in each row of a weight: bitsandbytes' CPU kernels read the wrong scales elsewhere. All
    layers of SD 1.x, 2.x and SDXL have them.
    """
    for name, module in list(unet.named_modules()):
        within = isinstance(module, nn.Linear) and ".attentions." in f".{name}"
        if within and (kind != "nf4" or module.in_features % BLOCK == 0):
            yield name, module


def quantize(unet: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """Exchange those layers (in place) one by one, each quantized on the device, then move the rest there.

    Args:
        kind: "nf4" or "int8".
        device: what computes; it never holds more than one layer twice.

    Raises:
        ValueError: unknown kind, or bitsandbytes cannot do it there.
        ImportError: bitsandbytes is missing.
    """
    if kind not in ("nf4", "int8"):
        raise ValueError(f"quantize {kind!r} is unknown. Use 'none', 'nf4' or 'int8'.")
    if device.type == "mps":
        raise ValueError("quantize: bitsandbytes does not work on Apple's devices. Use 'none'.")
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ImportError(
            f"quantize {kind!r} needs bitsandbytes, which is not installed: `pip install bitsandbytes`, or use 'none'."
        ) from error
    for name, layer in quantizable_layers(unet, kind):
        form = {"bias": layer.bias is not None, "device": "meta"}
        if kind == "nf4":
            held = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=layer.weight.dtype, quant_type="nf4", **form
            )
            weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", blocksize=BLOCK, compress_statistics=True
            )
        else:
            held = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, **form)
            weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        held.compute_dtype = layer.weight.dtype
        # On processors with AVX512-BF16, bitsandbytes 0.50 repacks an NF4 weight for good at the first product without
        # gradients: it fails where a side is no multiple of 32 or 64, rounds to bf16, and passes no gradient on.
        held.support_avx512bf16_for_cpu = False
        # Lengths that DoRA's file gives are of the weight as other programs have it, not of the packed one.
        held.register_buffer("column_norm", column_norm(layer.weight.to(device)), persistent=False)
        held.weight, held.bias = weight.to(device), layer.bias
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, held)
    return unet.to(device)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer is one that `hold` has put in."""
    return hasattr(getattr(layer, "weight", None), "quant_type") or hasattr(getattr(layer, "weight", None), "SCB")


@torch.no_grad()
def layer_weight(layer: nn.Module) -> torch.Tensor:
    """The layer's weight, made anew where it is held in fewer bits."""
    if not is_quantized(layer):
        return layer.weight
    if hasattr(layer.weight, "quant_type"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    codes, scales = (
        (layer.state.CB, layer.state.SCB) if layer.state.CB is not None else (layer.weight.CB, layer.weight.SCB)
    )
    return codes * (scales / 127).unsqueeze(1)


def column_norm(weight: torch.Tensor) -> torch.Tensor:
    """The length of what each input of a weight (out, in[, k, k]) contributes to all outputs: (in,), float32."""
    return weight.float().square().sum(dim=[0, *range(2, weight.ndim)]).sqrt()


def layer_dtype(layer: nn.Module) -> torch.dtype:
    """What a layer multiplies in: its weight's dtype, or where that is packed what it was before."""
    return layer.compute_dtype if is_quantized(layer) else layer.weight.dtype


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight as it was before it was packed."""
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)


def quantized_size(weight: Sequence[int], kind: str) -> int:
    """Bytes of a linear layer's weight of shape (out, in)."""
    count, lengths = weight[0] * weight[1], 4 * weight[1]
    if kind == "int8":
        return count + 4 * weight[0] + lengths  # a scale a row
    scales = -(-count // BLOCK)
    tables = 4 * (16 + 256 + 1)  # what the codes stand for, and the scales' mean
    return lengths + -(-count // 2) + scales + 4 * -(-scales // OUTER_BLOCK) + tables
