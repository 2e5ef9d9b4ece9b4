"""Count the memory and the work of one training step, without weights and without a card.

The UNet is built from its config, and one step runs on fake tensors, which have shapes and dtypes but no contents. A
ledger counts the storages that are alive, so the figures are those of diffusers, PEFT and autograd themselves.
"""

import math
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import storage, train
from lorakit.config import Config
from lorakit.device import choose_device


@dataclass(frozen=True)
class StepCost:
    """What one training step takes: bytes by part at the peak, and floating-point operations."""

    weights: int  # the frozen UNet, and text encoders that are trained
    adapter: int
    gradients: int  # those that exist at the peak
    optimizer: int
    activations: int  # everything else: what autograd keeps, and temporaries
    file_size: int  # bytes of the LoRA file's tensors in fp16, without names and metadata
    flops: int  # floating-point operations of one optimizer update
    seconds: float  # time spent counting
    size: tuple[int, int]  # (height, width) in pixels
    batch_size: int  # pictures in one forward pass
    precision: str
    gradient_checkpointing: bool

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at the peak, by part."""
        return {part: getattr(self, part) for part in ("weights", "adapter", "gradients", "optimizer", "activations")}

    @property
    def peak(self) -> int:
        """The most memory that is allocated at once, in bytes."""
        return sum(self.parts.values())

    def describe(self) -> str:
        """The cost as text, a line for each part."""
        (height, width), large = self.size, self.flops >= 1e12
        parts = {"frozen weights" if part == "weights" else part: size for part, size in self.parts.items()}
        return "\n".join(
            [
                f"Predicted for {width}×{height} px, batch {self.batch_size}, {self.precision}, "
                f"{'with' if self.gradient_checkpointing else 'without'} gradient checkpointing:",
                *(f"  {part:<15}{readable_bytes(size):>10}" for part, size in (parts | {"peak": self.peak}).items()),
                f"  LoRA file      {readable_bytes(self.file_size):>10}  in fp16, without names and metadata",
                f"  work a step    {self.flops / (1e12 if large else 1e9):>6.2f} {'TFLOP' if large else 'GFLOP'}",
            ]
        )


def readable_bytes(size: int) -> str:
    """Bytes as GiB, or as MiB below one GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def count_step(
    base: bases.Base, config: Config, *, size: tuple[int, int], dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> StepCost:  # fmt: skip
    """Run one training step on fake tensors and count its memory and operations.

    Args:
        size: (height, width) of the largest pictures, in pixels.
        dtype: of the frozen base and of autocast.
        device: "cuda", "mps" or "cpu", also where this machine has none; None is the device of the config. Autocast
            differs between them, and Apple's keeps whole attention matrices.

    Returns:
        The cost of any step after the first, which has no optimizer state yet. Caching before the run needs less
        memory; sampling large pictures during the run may need more.

    Raises:
        ValueError: size does not suit the base.
    """
    began = time.perf_counter()
    if size[0] % base.step or size[1] % base.step:
        raise ValueError(f"Size {size[1]}×{size[0]} must be multiples of {base.step} pixels for {base.name}.")
    kind = torch.device(device).type if device else choose_device(config.device).type
    half = dtype != torch.float32
    counted = torch.bfloat16 if half else torch.float32  # as large as fp16; the CPU autocast of every torch has bf16
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    models, adapter = _build(base, config, counted, fake, norms_in_float32=half and kind != "cpu")
    # Torch has no fused attention with a backward pass for Apple's devices (pytorch/pytorch#182746).
    attention = sdpa_kernel(SDPBackend.MATH) if kind == "mps" else nullcontext()
    trainable = adapter.parameters()
    adapter_numbers = sum(weight.numel() for weight in trainable)
    packed = [module.weight for module in models["unet"].modules() if isinstance(module, _Packed)]
    numbers = sum(weight.numel() for model in models.values() for weight in model.parameters())
    frozen = counted.itemsize * (numbers - adapter_numbers - sum(weight.numel() for weight in packed))
    frozen += sum(bases.quantized_size(weight.shape, config.quantize) for weight in packed)

    ledger = _Ledger(weight for model in models.values() for weight in model.parameters())
    hooks = [weight.register_post_accumulate_grad_hook(ledger.gradient_arrived) for weight in trainable]
    with fake, ledger, attention:
        loss = _forward(models, base, config, size, counted)
        forward_flops = ledger.flops
        loss.backward()
        flops = ledger.flops
        for hook in hooks:
            hook.remove()
        if config.asks_class:
            flops += ledger.flops  # a second batch with the class's captions
        if config.prior_prediction:
            flops += forward_flops  # the base's prediction without the adapter
        passes = config.gradient_accumulation_steps * config.batch_size / config.at_once
        flops = round(flops * passes)
        if passes > 1 or config.asks_class:  # from the second pass on, all gradients exist
            _forward(models, base, config, size, counted).backward()
    return StepCost(
        weights=frozen, adapter=4 * adapter_numbers, gradients=ledger.gradients_at_peak,
        optimizer=sum(optimizer_state(config.optimizer, weight.shape) for weight in trainable),
        activations=ledger.peak - ledger.gradients_at_peak, file_size=adapter.file_size(),
        flops=flops, seconds=time.perf_counter() - began, size=(size[0], size[1]), batch_size=config.at_once,
        precision=str(dtype).removeprefix("torch."), gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip


def _build(
    base: bases.Base, config: Config, dtype: torch.dtype, fake: FakeTensorMode, norms_in_float32: bool
) -> tuple[dict[str, Any], adapters.Adapter]:
    """The models that are trained, and their adapter, as fake CPU tensors.

    They are first built on the meta device: PEFT cannot move new layers of fake tensors, and it is faster.

    Args:
        norms_in_float32: what autocast does on CUDA and MPS but not on the CPU. The inputs and results of norms are
            kept for the backward pass, so this adds a fifth to SD 1.5's activations. The other functions of torch's
            list (ATen/autocast_mode.h, AT_FORALL_FP32) are not in a UNet.
    """
    models: dict[str, Any] = {"unet": bases.empty(base, "unet")}
    models |= {name: bases.empty(base, name).eval() for name in config.text_rates(base.text_encoders)}
    unet = models["unet"]
    for model in models.values():
        nn.Module.to(model, dtype)  # diffusers' own `to` warns about what only matters to real weights
    with storage.LOADING, torch.device("meta"):
        for name, layer in bases.quantizable_layers(unet, config.quantize) if config.quantize != "none" else ():
            parent, _, child = name.rpartition(".")
            packed = _Packed(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
            packed.kind = config.quantize
            setattr(unet.get_submodule(parent), child, packed)
        adapter = adapters.inject(models, adapters.run_specs(models, config), config.seed)
    for model in models.values():
        for module in model.modules() if norms_in_float32 else ():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.float().register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
        with fake:
            model.to_empty(device="cpu")
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    return models, adapter


def _forward(
    models: dict[str, Any], base: bases.Base, config: Config, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The loss of a micro-batch as `train` computes it, on tensors without contents."""
    batch, settings, text = config.at_once, base.configs["unet"], base.configs["text_encoder"]
    latents = torch.empty(batch, base.latent_channels, size[0] // base.vae_factor, size[1] // base.vae_factor)
    noise = torch.empty_like(latents)
    chunks, width = (config.max_token_length or 75) // 75, settings["cross_attention_dim"]
    tokens = chunks * text.get("max_position_embeddings", 77)
    embeddings = torch.empty(batch, tokens, width, dtype=dtype)
    conditions: dict[str, Any] | None = None
    pooled: Any = None
    if base.family == "sdxl":
        pooled_width = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
        pooled = torch.empty(batch, pooled_width, dtype=dtype)
        conditions = {"time_ids": torch.empty(batch, 6, dtype=dtype)}
    token_ids = torch.zeros(batch, len(base.text_encoders), tokens, dtype=torch.int64)
    timesteps, alpha_bar = torch.empty(batch, dtype=torch.int64), torch.empty(batch)
    noisy = train.add_noise(latents, noise, alpha_bar).to(dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        encoders = {name: model for name, model in models.items() if name != "unet"}
        if encoders:
            embeddings, pooled = bases.reencode(base, encoders, embeddings, pooled, token_ids, config.clip_skip)
        if conditions:
            conditions["text_embeds"] = pooled
        prediction = models["unet"](
            noisy, timesteps, encoder_hidden_states=embeddings, added_cond_kwargs=conditions
        ).sample
    target = train.target(base.prediction_type, latents, noise, alpha_bar)
    return train.error(prediction, target, alpha_bar, config.loss, config.huber_delta)


def optimizer_state(name: str, shape: Sequence[int]) -> int:
    """Bytes that an optimizer keeps for a float32 tensor of a shape. ValueError: unknown optimizer."""
    weights, floats = math.prod(shape), {"adamw": 2, "adamw_schedulefree": 2, "lion": 1, "prodigy": 4}
    if name in floats:  # moments, and of Prodigy the first weights and a running sum; AdamW's step
        return 4 * floats[name] * weights + 4 * (name == "adamw")
    if name in ("adamw8bit", "paged_adamw8bit"):
        # A byte for each moment and a float for every 256 of them; small tensors stay in float32.
        return 2 * 4 * weights if weights < 4096 else 2 * weights + 2 * 4 * -(-weights // 256)
    if name == "adafactor":  # means of rows and of columns over the last two dimensions, of vectors all; the RMS
        return 4 * ((weights if len(shape) < 2 else weights // shape[-1] + weights // shape[-2]) + 1)
    raise ValueError(f"There is no optimizer {name!r}. Use one of {', '.join(train.OPTIMIZERS)}.")


# ── Counting ────────────────────────────────────────────────────────────────────────────────────────────────────────

_aten = torch.ops.aten
_FLOPS = flop_registry | {  # torch counts the attention kernels of CUDA only
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class _Dequantized(torch.autograd.Function):
    """A linear layer that dequantizes its weight for the backward pass, and in NF4 for the forward pass too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(weight)
        if kind == "nf4":
            return F.linear(x, torch.empty_like(weight), bias)
        # bitsandbytes casts the input to float16, rounds it to int8, and multiplies into int32.
        rounded = torch.empty_like(x.to(torch.float16), dtype=torch.int8)
        product = torch.empty(*rounded.shape[:-1], weight.shape[0], dtype=torch.int32)
        result = F.linear(x, weight, bias)
        del product
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ torch.empty_like(weight), None, None, None


class _Packed(nn.Linear):
    """A layer that takes the memory of those that `base.quantization.quantize` puts into a UNet."""

    kind: str

    def forward(self, x: Tensor) -> Tensor:
        return _Dequantized.apply(x.to(self.weight.dtype), self.weight, self.bias, self.kind).to(x.dtype)


class _Ledger(TorchDispatchMode):
    """Count the bytes of storages from their first tensor until they are freed, and floating-point operations.

    Views and in-place results share a storage and cost nothing. Storages of `known` tensors are not counted.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.gradients = self.gradients_at_peak = 0
        # address → weak reference: torch keeps a storage's Python object as long as the storage
        self.storages: dict[int, weakref.ref] = {}
        self.known = [tensor.untyped_storage() for tensor in known]
        self.not_counted = {storage._cdata for storage in self.known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients
        count = _FLOPS.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.storages or address in self.not_counted:
            return

        def leave(_: weakref.ref) -> None:
            del self.storages[address]
            self.live -= size

        self.storages[address] = weakref.ref(storage, leave)
        self.live += size

    def gradient_arrived(self, weight: Tensor) -> None:
        """Hook for weights: their new gradient lives until the optimizer update."""
        assert weight.grad is not None
        self.gradients += weight.grad.nbytes
