"""The torch layers of each algorithm: PEFT's, with forward passes of their own, and the tuners that put them in.

PEFT creates the weights and draws the random numbers. Importing this file imports PEFT.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import peft
import torch
import torch.nn.functional as F
from peft.tuners import loha, lokr, lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from lorakit import base as bases
from lorakit.adapter.algorithms import ALGORITHMS, LEAST, Algorithm, Parts, row
from lorakit.adapter.specs import LayerSpec

NAME = "default"
Config = peft.LoraConfig | peft.LoHaConfig | peft.LoKrConfig


class AdapterLayer(nn.Module, BaseTunerLayer):
    """What every layer of an adapter has in addition to PEFT's attributes."""

    base_layer: Any  # linear or convolution, and quantized or not
    alpha: dict[str, float]  # by the adapter's name; LoRA's layers have `lora_alpha`
    scaling: dict[str, float]
    set_scale: Callable[[str, float], None]
    algorithm: ClassVar[Algorithm]
    spec: LayerSpec
    strength = 1.0

    @property
    def parts(self) -> dict[str, nn.Parameter]:
        """The trainable weights, by the names that files give them."""
        names = (name for name in self.adapter_layer_names if NAME in getattr(self, name, ()))
        return {name: getattr(self, name)[NAME] for name in names}

    @torch.no_grad()
    def delta(self, parts: Parts | None = None, alpha: float | None = None) -> Tensor:
        """What the layer adds to its weight at strength 1, in the weight's shape, float32.

        Args:
            parts, alpha: of a file, in place of the layer's own.
        """
        alpha = self.spec.alpha if alpha is None else alpha
        weight = bases.layer_weight(self.base_layer) if self.algorithm.needs_base else None
        change = self.algorithm.delta(self.parts if parts is None else parts, alpha, weight)
        return change.view(bases.weight_shape(self.base_layer))

    def use(self, strength: float) -> None:
        """Add strength · delta to the weight from now on."""
        self.strength = strength
        self.set_scale(NAME, strength)

    def prepare(self, spec: LayerSpec) -> None:
        """Make the weights that PEFT created float32 and trainable: GradScaler cannot unscale half-precision gradients.

        A LoKr without a part of low rank has no scale, as in LyCORIS and all that read its files: alpha is the rank.
        """
        for weight in self.parts.values():
            weight.data = weight.data.float()
            weight.requires_grad_(True)
        if self.algorithm.rank(self.parts) is None:
            spec = replace(spec, alpha=float(spec.rank))
            self.alpha[NAME], self.scaling[NAME] = spec.alpha, 1.0
        self.spec = spec


# ── LoRA ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _LowRank(torch.autograd.Function):
    """x·Wᵀ + b + scale · (x·Aᵀ)·Bᵀ and its gradient, each sum in place: nothing of the output's size is copied.

    Autograd by itself scales, adds and keeps the two terms apart, in both directions.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        low = x @ down.T
        ctx.save_for_backward(x, low, weight, down, up)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(low, up.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, down, up = ctx.saved_tensors
        of_low = (gradient @ up).mul_(ctx.scale)
        of_x = (gradient @ weight).addmm_(of_low, down) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_low.T @ x, (gradient.T @ low).mul_(ctx.scale), None


class LoRALayer(AdapterLayer):
    """Brings the input to the base's precision once; PEFT's layers do it for base and adapter each."""

    algorithm = ALGORITHMS["lora"]
    lora_A: Any
    lora_B: Any

    @property
    def parts(self) -> dict[str, nn.Parameter]:
        return {"down": self.lora_A[NAME].weight, "up": self.lora_B[NAME].weight}

    def forward(self, x: Tensor) -> Tensor:
        frozen, scale = self.base_layer, self.scaling[NAME]
        if scale == 0:
            return frozen(x)
        x = x.to(bases.layer_dtype(frozen))
        down, up = (matrix.weight.to(x.dtype) for matrix in (self.lora_A[NAME], self.lora_B[NAME]))
        if isinstance(frozen, nn.Conv2d):
            low = frozen._conv_forward(x, down, None)  # before frozen(x): it decides the order of sums in gradients
            return frozen(x) + F.conv2d(low * scale, up)
        if type(frozen) is not nn.Linear:  # a quantized one
            return frozen(x) + F.linear(F.linear(x, down) * scale, up)
        rows = x.reshape(-1, x.shape[-1])
        return _LowRank.apply(rows, frozen.weight, frozen.bias, down, up, scale).view(*x.shape[:-1], -1)


# ── DoRA ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class DoRALayer(LoRALayer):
    """Scaling a column of the weight is scaling that input, so the merged weight is never computed.

    Source: Liu et al. 2024, arXiv:2402.09353; section 4.3 for the norm that counts as a constant in the gradient.
    """

    algorithm = ALGORITHMS["dora"]
    column_squares: Tensor
    file_lengths: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        frozen = self.base_layer
        weight = bases.layer_weight(frozen).float()
        self.register_buffer("column_squares", weight.square().sum(dim=[0, *range(2, weight.ndim)]), persistent=False)
        lengths = self.column_squares.sqrt()
        if bases.is_quantized(frozen):  # files, and so training, count lengths of the base before it was quantized
            lengths = frozen.column_norm.to(lengths.device).clamp(min=LEAST)
            self.register_buffer("file_lengths", lengths, persistent=False)
        self.dora_scale = nn.Parameter(lengths.view(row(weight)).clone())

    @property
    def parts(self) -> dict[str, nn.Parameter]:
        return super().parts | {"dora_scale": self.dora_scale}

    def forward(self, x: Tensor) -> Tensor:
        if self.strength == 0:
            return self.base_layer(x)
        share = self._lengths(self.dora_scale.flatten()) / self._merged_norm() - 1  # small: rounding loses little of it
        share = share.view_as(self.dora_scale)
        full = super().forward(torch.addcmul(x, x, share.to(x.dtype)))
        return full if self.strength == 1 else torch.lerp(self.base_layer(x), full, self.strength)

    def delta(self, parts: Parts | None = None, alpha: float | None = None) -> Tensor:
        parts = self.parts if parts is None else parts
        lengths = self._lengths(parts["dora_scale"].float().flatten())
        return super().delta({**parts, "dora_scale": lengths}, alpha)

    def use(self, strength: float) -> None:
        self.strength = strength

    def _lengths(self, lengths: Tensor) -> Tensor:
        """Lengths of columns as files have them → of the base that is here, which may be quantized: (in,)."""
        return lengths / self.file_lengths * self.column_squares.sqrt() if hasattr(self, "file_lengths") else lengths

    @torch.no_grad()
    def _merged_norm(self) -> Tensor:
        """‖W + s·B·A‖ of each column, (in,), float32: the square multiplied out, so that B·A is never computed."""
        weight = bases.layer_weight(self.base_layer)
        down, up, scale = self.lora_A[NAME].weight, self.lora_B[NAME].weight.flatten(1), self.scaling[NAME]
        flat, kind = down.flatten(1), weight.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            across = (up.T.to(weight.dtype) @ weight.flatten(1)).float() * flat
            of_change = ((up.T @ up) @ flat) * flat
        summed = (2 * scale * across + scale**2 * of_change).sum(0)
        return (self.column_squares + summed.view(down.shape[1], -1).sum(1)).clamp(min=LEAST**2).sqrt()


# ── LoHa and LoKr ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _WholeLayer(AdapterLayer):
    """Computes the whole change. PEFT's own layers draw a random number at each call, for a dropout that is not set."""

    get_delta_weight: Callable[[str], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        frozen, added = self.base_layer, self.get_delta_weight(NAME).to(x.dtype)
        apply = frozen._conv_forward if isinstance(frozen, nn.Conv2d) else F.linear
        return frozen(x) + apply(x, added, None)


class LoHaLayer(_WholeLayer):
    algorithm = ALGORITHMS["loha"]


class LoKrLayer(_WholeLayer):
    algorithm = ALGORITHMS["lokr"]

    def prepare(self, spec: LayerSpec) -> None:
        """Also replace the weights that PEFT created with zeros of `spec.shapes`, if the spec has any."""
        device = next(iter(self.parts.values())).device
        for name in self.parts if spec.shapes else ():
            del getattr(self, name)[NAME]
        for name, shape in (spec.shapes or {}).items():
            getattr(self, name)[NAME] = nn.Parameter(torch.zeros(shape, device=device))
        super().prepare(spec)


# ── Into models ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Tuner(BaseTuner):
    """A tuner of PEFT's whose modules have a configuration each."""

    layers_mapping: dict[type[nn.Module], type[nn.Module]]

    def __init__(self, model: nn.Module, configs: Mapping[str, Config]) -> None:
        self.configs = configs
        super().__init__(model, replace(next(iter(configs.values())), target_modules=list(configs)), NAME)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        config = self.configs[kwargs["current_key"]]
        super()._create_and_replace(config, *args[1:], **kwargs)  # type: ignore[safe-super]  # PEFT's tuners have it


def _tuner(layer: type[AdapterLayer], module: ModuleType, tuner: type[BaseTuner]) -> type[_Tuner]:
    """PEFT's tuner of an algorithm, with a layer derived from PEFT's for each kind of module."""
    classes = {
        kind: type(f"{layer.algorithm.title}{theirs.__name__}", (layer, theirs), {})
        for kind, theirs in ((nn.Conv2d, module.Conv2d), (nn.Linear, module.Linear))
    }
    return type(f"{layer.algorithm.title}Tuner", (_Tuner, tuner), {"layers_mapping": classes})


TUNERS = {
    "lora": _tuner(LoRALayer, lora, lora.LoraModel), "dora": _tuner(DoRALayer, lora, lora.LoraModel),
    "loha": _tuner(LoHaLayer, loha, loha.LoHaModel), "lokr": _tuner(LoKrLayer, lokr, lokr.LoKrModel),
}  # fmt: skip


def wrap(model: nn.Module, specs: Mapping[str, LayerSpec]) -> None:
    """Let PEFT put adapter layers around modules of a model (in place).

    Args:
        specs: by the modules' paths in the model; all of one algorithm.
    """
    tuner = TUNERS[next(iter(specs.values())).algorithm]
    tuner(model, {path: _config(spec, tuner.layers_mapping) for path, spec in specs.items()})
    for path, spec in specs.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, AdapterLayer), path
        layer.prepare(spec)


def _config(spec: LayerSpec, classes: dict[type[nn.Module], type[nn.Module]]) -> Config:
    name, alpha = ALGORITHMS[spec.algorithm].peft
    config = getattr(peft, name)(r=spec.rank, **{alpha: spec.alpha})
    if isinstance(config, peft.LoraConfig):
        config._register_custom_module(classes)  # LoRA's tuner takes them from here, the others from `layers_mapping`
    if isinstance(config, peft.LoKrConfig):
        config.decompose_factor, config.decompose_both = spec.factor or -1, spec.decompose_both
    return config


class Stack(nn.Module, BaseTunerLayer):
    """Layers of several adapters around one frozen layer. What each adds at its strength is summed."""

    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        super().__init__()
        self.base_layer = layers[0].base_layer
        self.layers = tuple(layers)  # no submodules: `eject` would look for them

    def forward(self, x: Tensor) -> Tensor:
        bare = self.base_layer(x)
        first, *others = self.layers
        return first(x) + sum(layer(x) - bare for layer in others)
