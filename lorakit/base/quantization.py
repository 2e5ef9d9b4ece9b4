"""A frozen UNet with fewer bits per weight: the linear layers of its transformers in NF4 or int8, the rest unchanged.

These layers are most of SDXL's weights. The adapter stays float32.

Source: Dettmers et al. 2023, arXiv:2305.14314 (NF4, double quantization); 2022, arXiv:2208.07339 (int8); bitsandbytes.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

BLOCK, OUTER_BLOCK = 64, 256  # NF4: weights that share a scale; scales that share a second scale


def can_quantize(device: torch.device) -> bool:
    """Whether bitsandbytes is installed and supports a device: CUDA; the CPU from release 0.50 on; never Apple's."""
    try:
        release = tuple(int(part) for part in version("bitsandbytes").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return False
    return device.type == "cuda" or (device.type == "cpu" and release >= (0, 50))


def quantizable_layers(unet: nn.Module, kind: str) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that `quantize` replaces, by their path.

    NF4 needs whole blocks in each row of a weight: otherwise bitsandbytes' CPU kernels read the wrong scales. All
    layers of SD 1.x, 2.x and SDXL have them.
    """
    for name, module in list(unet.named_modules()):
        in_transformer = isinstance(module, nn.Linear) and ".attentions." in f".{name}"
        if in_transformer and (kind != "nf4" or module.in_features % BLOCK == 0):
            yield name, module


def quantize(unet: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """Replace those layers (in place) with "nf4" or "int8" ones, then move the rest to the device.

    They are quantized one by one on the device, which never holds the full weight of more than one.

    Raises:
        ValueError: unknown kind, or bitsandbytes does not support the device.
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
    packed: Any
    weight: Any
    for name, layer in quantizable_layers(unet, kind):
        settings = {"bias": layer.bias is not None, "device": "meta"}
        if kind == "nf4":
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=layer.weight.dtype, quant_type="nf4", **settings
            )
            weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", blocksize=BLOCK, compress_statistics=True
            )
        else:
            packed = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, **settings)
            weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        packed.compute_dtype = layer.weight.dtype
        # On processors with AVX512-BF16, bitsandbytes 0.50 repacks an NF4 weight permanently at the first product
        # without gradients: it fails if a side is no multiple of 32 or 64, rounds to bf16, and passes no gradient on.
        packed.support_avx512bf16_for_cpu = False
        # The column lengths in a DoRA file must be those of the original weight, which other programs use.
        packed.register_buffer("column_norm", column_norm(layer.weight.to(device)), persistent=False)
        packed.weight, packed.bias = weight.to(device), layer.bias
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, packed)
    return unet.to(device)


def is_quantized(layer: Any) -> bool:
    """Whether `quantize` made this layer."""
    weight = getattr(layer, "weight", None)
    return hasattr(weight, "quant_type") or hasattr(weight, "SCB")


@torch.no_grad()
def layer_weight(layer: Any) -> torch.Tensor:
    """The layer's weight, dequantized if the layer is quantized."""
    if not is_quantized(layer):
        return layer.weight
    if hasattr(layer.weight, "quant_type"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    int8 = layer.weight if layer.state.CB is None else layer.state
    return int8.CB * (int8.SCB / 127).unsqueeze(1)


def column_norm(weight: torch.Tensor) -> torch.Tensor:
    """The norm of each input column of a weight (out, in[, k, k]): (in,), float32."""
    return weight.float().square().sum(dim=[0, *range(2, weight.ndim)]).sqrt()


def layer_dtype(layer: Any) -> torch.dtype:
    """The dtype that a layer computes in."""
    return layer.compute_dtype if is_quantized(layer) else layer.weight.dtype


def weight_shape(layer: Any) -> tuple[int, ...]:
    """The shape of a layer's weight before quantization."""
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)


def quantized_size(weight: Sequence[int], kind: str) -> int:
    """Bytes of a quantized linear layer's weight of shape (out, in), with its scales, tables and column norms."""
    count, norms = weight[0] * weight[1], 4 * weight[1]
    if kind == "int8":
        return count + 4 * weight[0] + norms  # one scale per row
    scales = -(-count // BLOCK)
    tables = 4 * (16 + 256 + 1)  # the values of the codes, and the mean of the scales
    return norms + -(-count // 2) + scales + 4 * -(-scales // OUTER_BLOCK) + tables
