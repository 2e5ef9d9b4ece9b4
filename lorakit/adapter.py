"""Adapter layers on a frozen UNet and text encoders: inject, set their strength, read and load their weights, eject.

PEFT makes the layers, what they do is here; the names and their number are checked against what the models' configs say
there must be, because a renamed class would otherwise train half of a LoRA in silence. A layer is named by its path in
the UNet; in a text encoder by `text_encoder.` (SDXL's second: `text_encoder_2.`) and the path in its `text_model`.

What a layer learns are its parts, under the names that files give them: "down" and "up" of a LoRA, "dora_scale" beside
them in DoRA, "hada_w1_a" … of LoHa, "lokr_w1" … of LoKr. `change` is the one place that says what they mean.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import quantize
from lorakit.config import WHOLE, Config

NAME = "default"
LEAST = 1e-6  # length that a column is taken to have at least: an input that nothing listens to has none
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
Models = Mapping[str, nn.Module]  # "unet" and TEXT_ENCODERS -> what is adapted together
TRANSFORMER = re.compile(
    r"(^|\.)attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))$"
)
RESNET = re.compile(
    r"(^|\.)(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|downsamplers\.0\.conv|upsamplers\.0\.conv)$"
)


TEXT = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")


@dataclass
class Adapter:
    """Adapter layers that sit in a UNet, in text encoders, or in both."""

    models: dict[str, nn.Module]  # that hold them: "unet", "text_encoder", "text_encoder_2"
    layers: dict[str, nn.Module]  # name -> PEFT's layer around the frozen one
    ranks: dict[str, int]
    alphas: dict[str, float]
    targets: str
    algorithm: str = "lora"

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders that hold layers."""
        return {which: model for which, model in self.models.items() if which != "unet"}

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen models compute in."""
        return next(iter(self.models.values())).dtype

    def parameters(self) -> list[nn.Parameter]:
        """The trainable weights, in a fixed order."""
        return list(self.state().values())

    def state(self) -> dict[str, nn.Parameter]:
        """The live weights by name, `<module>.<part>`: `….down` (r, in[, k, k]), `….up` (out, r[, 1, 1]) and so on."""
        return {f"{name}.{part}": w for name, layer in self.layers.items() for part, w in parts(layer).items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Copy weights in.

        Raises:
            ValueError: names or shapes differ from this adapter's; nothing is changed then.
        """
        own = self.state()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [f"{k} {tuple(state[k].shape)}" for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
        if wrong:
            raise ValueError(
                f"{len(wrong)} weights do not fit this adapter ({self.algorithm}, rank {max(self.ranks.values())}, "
                f"{self.targets}): {', '.join(wrong[:4])}{' …' if len(wrong) > 4 else ''}. "
                "They are another run's or base's."
            )
        for name, weight in own.items():
            weight.copy_(state[name])


# ── What a layer learns, and what it means ──────────────────────────────────────────────────────────────────────────


def parts(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What a layer learns, by the names its file uses."""
    if hasattr(layer, "lora_A"):
        found = {"down": layer.lora_A[NAME].weight, "up": layer.lora_B[NAME].weight}
        return found | ({"dora_scale": layer.dora_scale} if hasattr(layer, "dora_scale") else {})
    return {name: getattr(layer, name)[NAME] for name in layer.adapter_layer_names if NAME in getattr(layer, name, ())}


def algorithm(names: Iterable[str]) -> str:
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
    kind = algorithm(parts)

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
    kind, rank = algorithm(parts), rank_of(parts)
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
    lengths = quantize.column_norm(merged).clamp(min=LEAST)
    return (merged * (parts["dora_scale"].flatten() / lengths).view(_row(before)) - before).flatten(1)


def _row(weight: Tensor) -> tuple[int, ...]:
    """The shape that holds a number for each input of a weight: (1, in[, 1, 1])."""
    return (1, weight.shape[1], *[1] * (weight.ndim - 2))


def delta(adapter: Adapter, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the adapter adds to a module's weight at strength 1, in the weight's shape, float32.

    Args:
        dtype: what the parts are rounded to first, as a file does.
    """
    layer = adapter.layers[name]
    rounded = {part: as_file(part, weight.detach(), dtype).float() for part, weight in parts(layer).items()}
    return meaning(layer, rounded, adapter.alphas[name])


def meaning(layer: nn.Module, parts: Mapping[str, Tensor], alpha: float) -> Tensor:
    """What parts, a layer's own or a file's, add to the weight of that layer at strength 1, in the weight's shape."""
    frozen, weight = layer.get_base_layer(), None
    if "dora_scale" in parts:
        weight = quantize.weight(frozen)
        parts = dict(parts) | {"dora_scale": _lengths(layer, parts["dora_scale"].float().flatten())}
    return change(parts, alpha, weight).view(quantize.shape(frozen))


def as_file(part: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
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
    x = x.to(quantize.dtype(frozen))
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
    weight = quantize.weight(frozen).float()
    layer.register_buffer("column_squares", weight.square().sum(dim=[0, *range(2, weight.ndim)]), persistent=False)
    lengths = layer.column_squares.sqrt()
    if quantize.held(frozen):  # what is learned, and goes into files, is said of the base as it was before
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
    weight = quantize.weight(layer.base_layer)
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
    device = next(iter(parts(layer).values())).device
    for name in parts(layer):
        del getattr(layer, name)[NAME]
    for name, tensor in like.items():
        getattr(layer, name)[NAME] = nn.Parameter(torch.zeros(tensor.shape, device=device))


# ── Into the models and out of them ───────────────────────────────────────────────────────────────────────────────────


def together(models: nn.Module | Models) -> dict[str, nn.Module]:
    """A UNet alone, or models by name."""
    return {"unet": models} if isinstance(models, nn.Module) else dict(models)


def which(name: str) -> str:
    """The model that a layer of this name belongs to."""
    first = name.partition(".")[0]
    return first if first in TEXT_ENCODERS else "unet"


def _within(models: Models, name: str) -> tuple[nn.Module, str]:
    """The module that a layer's path starts from, and that path."""
    model = models[which(name)]
    if which(name) == "unet":
        return model, name
    return getattr(model, "text_model", model), name.partition(".")[2]  # newer transformers have no inner text_model


def find(models: nn.Module | Models, name: str) -> nn.Module | None:
    """The module of a name; None where there is none."""
    models = together(models)
    if which(name) not in models:
        return None
    start, path = _within(models, name)
    try:
        return start.get_submodule(path)
    except AttributeError:
        return None


def paths(models: Models) -> Iterator[str]:
    """The name of every module of models, in their own order."""
    for own, model in models.items():
        start, prefix = (model, "") if own == "unet" else (getattr(model, "text_model", model), f"{own}.")
        yield from (prefix + path for path, _ in start.named_modules())


def text_names(encoder: nn.Module, own: str = "text_encoder") -> list[str]:
    """The modules of a text encoder that a LoRA adapts, as kohya's: every Linear of its attention and feed-forward.

    72 for SD 1.x, 138 for SD 2.x, 72 and 192 for SDXL's two.

    Args:
        own: the encoder's name, "text_encoder" or "text_encoder_2".

    Raises:
        RuntimeError: the encoder has other modules than its config says.
    """
    start, _ = _within({own: encoder}, f"{own}.")
    found = [name for name, module in start.named_modules() if isinstance(module, nn.Linear) and TEXT.fullmatch(name)]
    if len(found) != (expected := 6 * encoder.config.num_hidden_layers):
        raise RuntimeError(
            f"{len(found)} modules to adapt were found in this {own}, {expected} belong there. "
            "An adapter that is still injected must be ejected first; else this transformers release names them "
            "otherwise."
        )
    return [f"{own}.{name}" for name in found]


def target_names(unet: nn.Module, targets: str = "attention") -> list[str]:
    """The modules a LoRA adapts, in the UNet's own order.

    Args:
        targets: "attention": every Linear and 1×1 convolution inside the transformer blocks, which is kohya's
            default; "attention+conv": the ResNet blocks and samplers as well (LoCon).

    Raises:
        ValueError: unknown targets.
        RuntimeError: the UNet has other modules than its config says (a renamed class, a layer already adapted).
    """
    if targets not in ("attention", "attention+conv"):
        raise ValueError(f"targets {targets!r} is unknown. Use 'attention' or 'attention+conv'.")
    plain = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    found = [name for name in plain if TRANSFORMER.search(name)]
    expected = transformer_modules(unet.config)
    if len(found) != expected:
        raise RuntimeError(
            f"{len(found)} attention modules were found in this UNet, {expected} belong there. "
            "An adapter that is still injected must be ejected first; else this diffusers release names them otherwise."
        )
    if targets == "attention+conv":
        found += [name for name in plain if RESNET.search(name)]
    order = {name: i for i, (name, _) in enumerate(unet.named_modules())}
    return sorted(found, key=order.__getitem__)


def transformer_modules(config) -> int:
    """How many modules "attention" must find: 2 projections a transformer and 10 a block in it.

    192 for SD 1.x and 2.x, 722 for SDXL.
    """
    downs, ups = config["down_block_types"], config["up_block_types"]
    layers, depths = config["layers_per_block"], config["transformer_layers_per_block"]
    layers = [layers] * len(downs) if isinstance(layers, int) else list(layers)
    depths = [depths] * len(downs) if isinstance(depths, int) else list(depths)
    count = 0
    for kinds, extra, order in ((downs, 0, 1), (ups, 1, -1)):
        for kind, n, depth in zip(kinds, layers[::order], depths[::order], strict=True):
            count += (n + extra) * (2 + 10 * depth) if "CrossAttn" in kind else 0
    return count + (2 + 10 * depths[-1] if "CrossAttn" in (config.get("mid_block_type") or "") else 0)


def inject(
    models: nn.Module | Models,
    rank: int,
    alpha: float,
    targets: str = "attention",
    *,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    modules: Sequence[str] | None = None,
    ranks: dict[str, int] | None = None,
    alphas: dict[str, float] | None = None,
    algorithm: str = "lora",
    factor: int | None = None,
    decompose_both: bool = False,
    like: Mapping[str, Mapping[str, Tensor]] | None = None,
    seed: int = 0,
) -> Adapter:
    """Put fresh adapter layers into models (in place) and freeze everything else. `eject` is the inverse.

    One part of each is zero, so the models' output is unchanged until training; weights are float32 whatever the
    base's dtype (GradScaler cannot unscale half-precision gradients).

    Args:
        models: a UNet, or a UNet and text encoders by name.
        rank, alpha: of the linear layers and 1×1 convolutions; the update is scaled by alpha / rank.
        conv_rank, conv_alpha: of the 3×3 convolutions, the same when None.
        modules: adapt these instead of what `targets` names and all of the text encoders' (an adapter from a file).
        ranks, alphas: by module, over the ones above.
        algorithm: "lora"; "dora" (direction and length apart); "loha" (the product, place by place, of two LoRAs);
            "lokr" (a small matrix and a LoRA, or two matrices, multiplied block by block).
        factor: of LoKr, the size of the small matrix; None makes the two as equal as can be.
        decompose_both: of LoKr, the small matrix is of low rank as well.
        like: of LoKr, parts by module whose shapes are taken, in place of those that `factor` makes (a file's).
        seed: of the parts that are not zero.

    Raises:
        RuntimeError: an adapter is already there.
        ValueError: LoHa or LoKr on a quantized base.

    Source: Hu et al. 2021, arXiv:2106.09685 (LoRA); Yeh et al. 2023, arXiv:2309.14859 (LoCon, LoHa, LoKr); Hyeon-Woo
    et al. 2021, arXiv:2108.06098 (LoHa); Liu et al. 2024, arXiv:2402.09353 (DoRA).
    """
    from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    models = together(models)
    for name, model in models.items():
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise RuntimeError(f"This {name} already holds an adapter. Call adapter.eject on it first.")
    names = list(modules) if modules is not None else _names(models, targets)
    kernels = {name: find(models, name) for name in names}
    if algorithm in WHOLE and any(quantize.held(kernel) for kernel in kernels.values()):
        raise ValueError(f"algorithm {algorithm!r} needs a base that is not quantized. Use 'lora' or 'dora'.")
    wide = {n for n, m in kernels.items() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}
    ranks = {n: (conv_rank or rank) if n in wide else rank for n in names} | (ranks or {})
    alphas = {n: float((conv_alpha or alpha) if n in wide else alpha) for n in names} | (alphas or {})
    kinds = {"lora": LoraConfig, "dora": LoraConfig, "loha": LoHaConfig, "lokr": LoKrConfig}
    if algorithm not in kinds:
        raise ValueError(f"algorithm {algorithm!r} is unknown. Use 'lora', 'dora', 'loha' or 'lokr'.")
    own = {"lora_alpha": alpha, "init_lora_weights": True} if kinds[algorithm] is LoraConfig else {"alpha": alpha}
    if algorithm == "lokr":
        own |= {"decompose_factor": factor or -1, "decompose_both": decompose_both}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, model in models.items():
            model.requires_grad_(False)
            paths = {n: _within(models, n) for n in names if which(n) == name}
            if not paths:
                continue
            settings = kinds[algorithm](
                r=rank, target_modules=[path for _, path in paths.values()], **own,
                rank_pattern=_patterns({path: ranks[n] for n, (_, path) in paths.items()}, rank),
                alpha_pattern=_patterns({path: alphas[n] for n, (_, path) in paths.items()}, alpha),
            )  # fmt: skip
            inject_adapter_in_model(settings, next(iter(paths.values()))[0], NAME)
    layers = {name: find(models, name) for name in names}
    for name, layer in layers.items():
        layer.forward = MethodType(_whole_forward if algorithm in WHOLE else _lora_forward, layer)
        if algorithm == "dora":
            _make_dora(layer)
        if algorithm == "lokr" and like:
            _divide(layer, like[name])
        for weight in parts(layer).values():
            weight.data = weight.data.float()
            weight.requires_grad_(True)
        if rank_of(parts(layer)) is None:  # LyCORIS, and all who read its files, give it no scale
            alphas[name], layer.scaling[NAME] = float(ranks[name]), 1.0
    holding = {name: model for name, model in models.items() if any(which(n) == name for n in names)}
    return Adapter(holding, layers, ranks, alphas, targets, algorithm)


def _patterns(values: dict[str, float], usual: float) -> dict[str, float]:
    """What differs from the usual, as PEFT takes it: one pattern a value, as it tries each on every module."""
    paths: dict[float, list[str]] = {}
    for path, value in values.items():
        paths.setdefault(value, []).append(re.escape(path))
    return {f"^({'|'.join(own)})$": value for value, own in paths.items() if value != usual}


def _names(models: Models, targets: str) -> list[str]:
    names = target_names(models["unet"], targets) if "unet" in models else []
    return names + [name for own in TEXT_ENCODERS if own in models for name in text_names(models[own], own)]


def fresh(models: nn.Module | Models, config: Config) -> Adapter:
    """`inject` what a run's settings ask for.

    Args:
        models: the UNet, and those text encoders that are trained.

    Raises:
        ValueError: `block_ranks` names a place that the models do not have, or leaves nothing to train.
        RuntimeError: as `inject`.

    Source: Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA). Its scale goes into the alphas, and so into every file.
    """
    models = together(models)
    modules = _names(models if config.train_unet else {n: m for n, m in models.items() if n != "unet"}, config.targets)
    known(config.block_ranks, modules, "block_ranks")
    ranks = {name: of_place(config.block_ranks, name) for name in modules}
    modules = [name for name in modules if ranks[name] != 0]
    if not modules:
        raise ValueError("block_ranks leaves no module to train. Give some place a rank above 0.")
    alphas = {}
    for name in modules:
        wide = getattr(find(models, name), "kernel_size", (1, 1)) != (1, 1)
        rank = (wide and config.conv_rank) or config.rank
        alpha = (wide and config.conv_alpha) or config.alpha
        ranks[name] = ranks[name] or rank
        # Where a place has a rank of its own, the scale stays what it is elsewhere.
        alphas[name] = alpha * (ranks[name] ** 0.5 if config.rank_stabilized else ranks[name] / rank)
    ranks = {name: ranks[name] for name in modules}
    return inject(
        models, config.rank, config.alpha, config.targets, modules=modules, ranks=ranks, alphas=alphas,
        seed=config.seed, algorithm=config.algorithm, factor=config.lokr_factor,
    )  # fmt: skip


def of_place(values: dict, module: str):
    """What is given for a module: by the longest path in `values` that leads to it; None where none does."""
    paths = [path for path in values if module == path or module.startswith(path + ".")]
    return values[max(paths, key=len)] if paths else None


def known(values: dict, modules: Sequence[str], setting: str) -> None:
    """Raise ValueError where a setting by place names one that no adapted module is in."""
    for path in values:
        if not any(of_place({path: 1}, module) for module in modules):
            places = sorted({".".join(m.split(".")[: 1 if m.startswith(("mid", "text")) else 2]) for m in modules})
            raise ValueError(
                f"{setting}: nothing is adapted at {path!r}. The places are {', '.join(places)}, and below."
            )


def eject(models: nn.Module | Models) -> None:
    """Take every adapter out again (in place): the models are then the very ones they were before `inject`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for model in together(models).values():
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        for holder in {model, getattr(model, "text_model", model)}:
            if hasattr(holder, "peft_config"):
                del holder.peft_config


def stack(models: nn.Module | Models, found: Sequence[Adapter]) -> Adapter:
    """Put adapters that were ejected back into models (in place), several at once; `eject` is the inverse.

    What each adds to the base at its strength is summed; a DoRA's, too, is taken of the base alone.

    Returns:
        All of them as one. It has no strength of its own: set that of each, with `use`, before.
    """
    models, layers = together(models), {}
    for adapter in found:
        for name, layer in adapter.layers.items():
            layers.setdefault(name, []).append(layer)
    for name, (first, *others) in layers.items():
        start, path = _within(models, name)
        parent, _, child = path.rpartition(".")
        if others:
            first.forward = partial(_stacked_forward, first.forward, others, first.get_base_layer())
        setattr(start.get_submodule(parent), child, first)
    holding = {which: model for adapter in found for which, model in adapter.models.items()}
    return Adapter(holding, {}, {}, {}, "attention")


def _stacked_forward(own, others: Sequence[nn.Module], frozen: nn.Module, x: Tensor) -> Tensor:
    bare = frozen(x)
    return own(x) + sum(other(x) - bare for other in others)


def use(adapter: Adapter, value: float) -> None:
    """Use the adapter at a strength from now on: 1 is as trained, 0 is the bare base.

    In between a weight is in between too: W + value · ΔW, as the programs that read the files do it.
    """
    for name, layer in adapter.layers.items():
        if adapter.algorithm == "dora":
            layer.strength = value
        else:
            layer.scaling[NAME] = value * adapter.alphas[name] / adapter.ranks[name]


@contextmanager
def strength(adapter: Adapter, value: float) -> Iterator[None]:
    """`use` the adapter at a strength inside a `with` block."""
    dora = adapter.algorithm == "dora"
    before = {name: layer.strength if dora else layer.scaling[NAME] for name, layer in adapter.layers.items()}
    try:
        use(adapter, value)
        yield
    finally:
        for name, layer in adapter.layers.items():
            if dora:
                layer.strength = before[name]
            else:
                layer.scaling[NAME] = before[name]
