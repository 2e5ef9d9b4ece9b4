"""Config → predicted peak memory, file size and work of a step, before a weight is read or a card is there.

The UNet is built from its config without weights, and one training step runs on fake tensors, which have shapes and
dtypes but no contents, while a ledger counts the storages that are alive: what diffusers, PEFT and autograd would keep
is what is counted, not what a formula says of them.
"""

import math
import time
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import train
from lorakit.config import Config
from lorakit.device import choose_device

MARGIN = 0.1  # share of the free memory left to the driver, the kernels' workspaces and fragmentation


@dataclass(frozen=True)
class Prediction:
    """What a step will take: bytes by part at the moment of the peak, and the size of the work."""

    weights: int  # the frozen UNet, and text encoders that are trained
    adapter: int
    gradients: int  # those there already when the peak comes
    optimizer: int
    activations: int  # everything else: what autograd keeps, and the temporaries of the moment
    file_size: int  # bytes of the finished file's tensors in fp16; names and metadata come on top
    flops: int  # floating-point operations of one optimizer update
    seconds: float  # how long predicting took
    size: tuple[int, int]  # (height, width) in pixels
    batch_size: int  # pictures that go through at once
    precision: str
    gradient_checkpointing: bool

    @property
    def peak(self) -> int:
        """The most that is allocated at once, in bytes."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """The prediction in a few lines for a person."""
        (height, width), large = self.size, self.flops >= 1e12
        parts = {
            "frozen weights": self.weights, "adapter": self.adapter, "gradients": self.gradients,
            "optimizer": self.optimizer, "activations": self.activations, "peak": self.peak,
        }  # fmt: skip
        return "\n".join(
            [
                f"Predicted for {width}×{height} px, batch {self.batch_size}, {self.precision}, "
                f"{'with' if self.gradient_checkpointing else 'without'} gradient checkpointing:",
                *(f"  {name:<15}{readable_bytes(part):>10}" for name, part in parts.items()),
                f"  LoRA file      {readable_bytes(self.file_size):>10}  in fp16; names and metadata come on top",
                f"  work a step    {self.flops / (1e12 if large else 1e9):>6.2f} {'TFLOP' if large else 'GFLOP'}",
            ]
        )


def readable_bytes(size: int) -> str:
    """Bytes as GiB, or as MiB below one GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def predict(
    base: bases.Base, config: Config, *, size: tuple[int, int], dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Prediction:  # fmt: skip
    """Run one training step on fake tensors and count what it holds.

    Args:
        size: (height, width) of the largest pictures, in pixels.
        dtype: of the frozen base and of autocast.
        device: the kind of device to predict for, "cuda", "mps" or "cpu"; it need not be here. None is the one that
            the config trains on. Autocast differs between them, and Apple's keeps whole attention matrices.

    Returns:
        The prediction for any step but the first, which has no optimizer state yet. Caching before the run takes
        less; sampling large pictures during it may take more.

    Raises:
        ValueError: size does not suit the base.
    """
    began = time.perf_counter()
    if size[0] % base.step or size[1] % base.step:
        raise ValueError(f"Size {size[1]}×{size[0]} must be multiples of {base.step} pixels for {base.name}.")
    kind = torch.device(device).type if device else choose_device(config.device).type
    half = dtype != torch.float32
    counted = torch.bfloat16 if half else torch.float32  # as large as fp16, and known to every release's CPU autocast
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    models, adapter = _build(base, config, counted, fake, norms_in_float32=half and kind != "cpu")
    # Torch has no fused attention with a way back for Apple's devices (pytorch/pytorch#182746).
    attention = sdpa_kernel(SDPBackend.MATH) if kind == "mps" else nullcontext()
    weights = adapter.parameters()
    trained = sum(weight.numel() for weight in weights)
    held = [module.weight for module in models["unet"].modules() if isinstance(module, _Held)]
    numbers = sum(map(_numbers, models.values()))
    frozen = counted.itemsize * (numbers - trained - sum(weight.numel() for weight in held))
    frozen += sum(bases.quantized_size(weight.shape, config.quantize) for weight in held)

    ledger = _Ledger(weight for model in models.values() for weight in model.parameters())
    hooks = [weight.register_post_accumulate_grad_hook(ledger.gradient_arrived) for weight in weights]
    with fake, ledger, attention:
        value = _forward(models, base, config, size, counted)
        answer = ledger.flops
        value.backward()
        flops = ledger.flops
        for hook in hooks:
            hook.remove()
        if config.asks_class:
            flops += ledger.flops  # as much again for the class
        if config.prior_prediction:
            flops += answer  # and what the bare base says of it
        passes = config.gradient_accumulation_steps * config.batch_size / config.at_once
        flops = round(flops * passes)
        if passes > 1 or config.asks_class:  # from the second on, all gradients are there
            _forward(models, base, config, size, counted).backward()
    return Prediction(
        weights=frozen, adapter=4 * trained, gradients=ledger.gradients_at_peak,
        optimizer=sum(optimizer_state(config.optimizer, weight.shape) for weight in weights),
        activations=ledger.peak - ledger.gradients_at_peak, file_size=_file_size(adapter),
        flops=flops, seconds=time.perf_counter() - began, size=tuple(size), batch_size=config.at_once,
        precision=str(dtype).removeprefix("torch."), gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip


def _file_size(adapter: adapters.Adapter) -> int:
    """Bytes of the file's tensors in fp16; alphas and DoRA's lengths are float32."""
    parts = adapter.state().items()
    return 4 * len(adapter.layers) + sum((4 if n.endswith("dora_scale") else 2) * w.numel() for n, w in parts)


WORDS = 16  # vectors of a textual inversion's file, as people make them for a character


@dataclass(frozen=True)
class Method:
    """What another way of teaching a base something would take, beside a LoRA: bytes."""

    name: str
    peak: int
    file_size: int  # of what is handed on afterwards, in fp16; textual inversion's in float32, as it is usual


def dreambooth(base: bases.Base, config: Config, *, size: tuple[int, int], dtype: torch.dtype) -> Method:
    """Full fine-tuning of the UNet: float32 weights under autocast, a whole checkpoint as the result.

    Args:
        config: its optimizer, batch and checkpointing are taken, as of a LoRA.
        size, dtype: as for `predict`; dtype is autocast's.

    Source: Ruiz et al. 2022, arXiv:2208.12242; weights and optimizer as diffusers' `train_dreambooth.py` has them.
    """
    counted = torch.bfloat16 if dtype != torch.float32 else dtype
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    models, _ = _build(base, config, torch.float32, fake, norms_in_float32=False, adapted=False)
    unet = models["unet"]
    weights = list(unet.requires_grad_(True).parameters())
    ledger = _ledger(unet, weights)
    with fake, ledger:
        _forward(models, base, config, size, counted).backward()
    own = sum(weight.nbytes for weight in weights)
    state = sum(optimizer_state(config.optimizer, weight.shape) for weight in weights)
    # The update needs all gradients, the step all activations: the two peaks are not at one moment.
    peak = own + state + max(ledger.peak, own)
    return Method("DreamBooth", peak, 2 * sum(map(_numbers, _parts(base))))


def textual_inversion(base: bases.Base, config: Config, *, size: tuple[int, int], dtype: torch.dtype) -> Method:
    """Training new words alone: UNet and text encoders frozen, every word's vector in float32 with its moments.

    Args:
        size, dtype: as for `predict`.

    Source: Gal et al. 2022, arXiv:2208.01618; the whole matrix of vectors gets gradients, as in diffusers'
    `textual_inversion.py`.
    """
    counted = torch.bfloat16 if dtype != torch.float32 else dtype
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    models, _ = _build(base, config, counted, fake, norms_in_float32=False, adapted=False)
    unet = models["unet"]
    ledger = _ledger(unet.requires_grad_(False), [])
    with fake, ledger:
        _forward(models, base, config, size, counted, words_learn=True).backward()
    _, _, *encoders = _parts(base)
    vectors = [encoder.get_input_embeddings().weight for encoder in encoders]
    trained = sum(8 * x.numel() + optimizer_state(config.optimizer, x.shape) for x in vectors)
    frozen = sum(
        counted.itemsize * (_numbers(encoder) - x.numel()) for encoder, x in zip(encoders, vectors, strict=True)
    )
    own = sum(weight.nbytes for weight in unet.parameters())
    width = sum(x.shape[1] for x in vectors)
    return Method("textual inversion", own + frozen + trained + ledger.peak, 4 * WORDS * width)


def _ledger(unet, trained: list) -> "_Ledger":
    ledger = _Ledger(unet.parameters())
    for weight in trained:
        weight.register_post_accumulate_grad_hook(ledger.gradient_arrived)
    return ledger


def _numbers(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _parts(base: bases.Base) -> list[nn.Module]:
    """UNet, VAE and text encoders on the meta device: shapes alone."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        parts = [UNet2DConditionModel.from_config(base.configs["unet"]), AutoencoderKL.from_config(base.configs["vae"])]
        return parts + [_text_encoder(base, which) for which in base.text_encoders]


def _text_encoder(base: bases.Base, which: str) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if which == "text_encoder_2" else CLIPTextModel
    return kind(CLIPTextConfig(**base.configs[which]))


def _build(
    base: bases.Base,
    config: Config,
    dtype: torch.dtype,
    fake: FakeTensorMode,
    norms_in_float32: bool,
    adapted: bool = True,
):
    """The models that train and their adapter as fake CPU tensors; the UNet alone where it is not `adapted`.

    Built on the meta device first: PEFT cannot move new layers of fake tensors, and it is faster.

    Args:
        norms_in_float32: what autocast does on CUDA and MPS but not on the CPU. What norms take and answer is kept
            for the way back, so this adds a fifth to SD 1.5's activations. The other functions of torch's list
            (ATen/autocast_mode.h, AT_FORALL_FP32) are not in a UNet.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(base.configs["unet"])
        nn.Module.to(unet, dtype)  # diffusers' own `to` warns about what only matters to real weights
        for name, layer in bases.quantizable_layers(unet, config.quantize) if config.quantize != "none" else ():
            parent, _, child = name.rpartition(".")
            held = _Held(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
            held.kind = config.quantize
            setattr(unet.get_submodule(parent), child, held)
        models = {"unet": unet}
        for which in config.text_rates(base.text_encoders) if adapted else ():
            models[which] = nn.Module.to(_text_encoder(base, which), dtype).eval()
        adapter = adapters.fresh(models, config) if adapted else None
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
    models, base: bases.Base, config: Config, size: tuple[int, int], dtype: torch.dtype, words_learn: bool = False
) -> Tensor:
    """The loss that `train` makes of a micro-batch, of tensors without contents; `words_learn`: text gets gradients."""
    batch, settings, text = config.at_once, base.configs["unet"], base.configs["text_encoder"]
    latents = torch.empty(batch, base.latent_channels, size[0] // base.vae_factor, size[1] // base.vae_factor)
    noise = torch.empty_like(latents)
    tokens, width = text.get("max_position_embeddings", 77), settings["cross_attention_dim"]
    embeddings = torch.empty(batch, tokens, width, dtype=dtype, requires_grad=words_learn)
    conditions, pooled = None, None
    if base.family == "sdxl":
        pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
        pooled, conditions = torch.empty(batch, pooled, dtype=dtype), {"time_ids": torch.empty(batch, 6, dtype=dtype)}
    words = torch.zeros(batch, len(base.text_encoders), tokens, dtype=torch.int64)
    timesteps, alpha_bar = torch.empty(batch, dtype=torch.int64), torch.empty(batch)
    noisy = train.add_noise(latents, noise, alpha_bar).to(dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        encoders = {which: model for which, model in models.items() if which != "unet"}
        if encoders:
            embeddings, pooled = bases.reencode(base, encoders, embeddings, pooled, words, config.clip_skip)
        if conditions:
            conditions["text_embeds"] = pooled
        predicted = models["unet"](
            noisy, timesteps, encoder_hidden_states=embeddings, added_cond_kwargs=conditions
        ).sample
    wanted = train.target(base.prediction_type, latents, noise, alpha_bar)
    return train.error(predicted, wanted, alpha_bar, config.loss, config.huber_delta)


def optimizer_state(name: str, shape: Sequence[int]) -> int:
    """Bytes an optimizer keeps for a float32 tensor of a shape. ValueError: unknown name."""
    weights = math.prod(shape)
    if name == "adamw":
        return 2 * 4 * weights + 4  # two moments; the step
    if name in ("adamw8bit", "paged_adamw8bit"):
        # A byte a moment and a float for each 256 of them; small tensors stay in float32.
        return 2 * 4 * weights if weights < 4096 else 2 * weights + 2 * 4 * -(-weights // 256)
    if name == "adafactor":  # a row's mean for each column and the reverse, in the last two dimensions; the RMS
        return 4 * (weights // shape[-1] + weights // shape[-2] + 1)
    if name == "prodigy":  # two moments, the first weights, the running sum
        return 4 * 4 * weights
    if name == "lion":
        return 4 * weights
    if name == "adamw_schedulefree":
        return 2 * 4 * weights
    raise ValueError(f"There is no optimizer {name!r}. Use one of {', '.join(train.OPTIMIZERS)}.")


# ── Counting ────────────────────────────────────────────────────────────────────────────────────────────────────────

_aten = torch.ops.aten
_FLOPS = flop_registry | {  # torch counts the attention kernels of cards alone
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class _Dequantized(torch.autograd.Function):
    """A linear layer whose weight is made anew from its few bits for the way back; NF4's for the way there as well."""

    @staticmethod
    def forward(ctx, x, weight, bias, kind):
        ctx.save_for_backward(weight)
        if kind == "nf4":
            return F.linear(x, torch.empty_like(weight), bias)
        # int8 multiplies int8 pictures of the input: bitsandbytes makes those by way of float16, and int32 of them.
        picture = torch.empty_like(x.to(torch.float16), dtype=torch.int8)
        product = torch.empty(*picture.shape[:-1], weight.shape[0], dtype=torch.int32)
        result = F.linear(x, weight, bias)
        del product
        return result

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient @ torch.empty_like(weight), None, None, None


class _Held(nn.Linear):
    """What `quantize.hold` puts into a UNet, as far as memory goes."""

    kind: str

    def forward(self, x):
        return _Dequantized.apply(x.to(self.weight.dtype), self.weight, self.bias, self.kind).to(x.dtype)


class _Ledger(TorchDispatchMode):
    """Counts the bytes of storages from their first tensor to their death, and floating-point operations.

    Views and in-place results share a storage and cost nothing. Those of `known` tensors are left out.
    """

    def __init__(self, known):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.gradients = self.gradients_at_peak = 0
        self.storages = {}  # address -> weak reference: torch keeps a storage's Python object as long as the storage
        self.known = [tensor.untyped_storage() for tensor in known]
        self.left_out = {storage._cdata for storage in self.known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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

    def _enter(self, storage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.storages or address in self.left_out:
            return

        def leave(_):
            del self.storages[address]
            self.live -= size

        self.storages[address] = weakref.ref(storage, leave)
        self.live += size

    def gradient_arrived(self, weight: Tensor) -> None:
        """A hook for weights: what was a temporary is now their gradient, and lives until the update."""
        self.gradients += weight.grad.nbytes


# ── Does it fit? ────────────────────────────────────────────────────────────────────────────────────────────────────


class Verdict(NamedTuple):
    """Whether a prediction fits; as a string, the sentence for a person."""

    fits: bool | None  # None: nobody knows how much is free
    text: str

    def __str__(self) -> str:
        return self.text


def free_memory_bytes(device: torch.device | str) -> int | None:
    """Bytes that a run may still take on a device that is here; None where it cannot be told."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        from psutil import virtual_memory
    except ImportError:
        return None
    return min([virtual_memory().available, *_container_limits()])


def _container_limits(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes a container may still take, from its control group (version 2, then 1); empty where nothing limits it."""
    for folder, limit, used in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            # Files that were read stay in memory until it is wanted: they count as used, and are not.
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            return [int((folder / limit).read_text()) - int((folder / used).read_text()) + cached]
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return []


def verdict(prediction: Prediction, free: int | None, margin: float = MARGIN) -> Verdict:
    """Whether a step fits, and what to change if not, the cheapest change first.

    Args:
        free: bytes, as `available` counts them or a card's own; None when unknown.
        margin: share of `free` left to the driver, the kernels' workspaces and fragmentation.
    """
    peak, left_out = readable_bytes(prediction.peak), f"{margin:.0%} kept for the driver and fragmentation"
    if free is None:
        return Verdict(None, f"How much memory is free cannot be told here; the run is predicted to need {peak}.")
    usable = int(free * (1 - margin))
    if prediction.peak <= usable:
        return Verdict(True, f"Fits: {peak} predicted, {readable_bytes(free)} free ({left_out}).")
    said = f"Does not fit: {peak} predicted, {readable_bytes(free)} free ({left_out}). "
    if prediction.weights > usable:
        way_out = "hold it in fewer bits (quantize 'nf4'), or use a larger card"
        return Verdict(False, f"{said}The frozen base alone is {readable_bytes(prediction.weights)}: {way_out}.")
    changes = []
    if not prediction.gradient_checkpointing:
        changes.append("gradient_checkpointing true (a third more work, most activations gone)")
    if prediction.batch_size > 1:
        changes.append("micro_batch_size 1 (one picture at a time; the learning is the same)")
    if prediction.optimizer > max(prediction.adapter, prediction.peak // 50):
        changes.append(f"optimizer 'adamw8bit' (saves about {readable_bytes(prediction.optimizer * 3 // 4)})")
    if prediction.activations > prediction.peak // 10:
        changes.append("a lower resolution (activations go with its area)")
    if prediction.adapter + prediction.gradients + prediction.optimizer > prediction.peak // 10:
        changes.append("a lower rank")
    return Verdict(False, said + "Change one at a time: " + "; ".join(changes or ["use a larger card"]) + ".")
