"""Adapter layers on a frozen UNet and text encoders: inject, set their strength, read and load their weights, eject.

PEFT makes the layers, what they do is here; the names and their number are checked against what the models' configs say
there must be, because a renamed class would otherwise train half of a LoRA in silence. A layer is named by its path in
the UNet; in a text encoder by `text_encoder.` (SDXL's second: `text_encoder_2.`) and the path in its `text_model`.

What a layer learns are its parts, under the names that files give them: "down" and "up" of a LoRA, "dora_scale" beside
them in DoRA, "hada_w1_a" … of LoHa, "lokr_w1" … of LoKr. `change` is the one place that says what they mean.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn

from lorakit import base as bases
from lorakit.adapter.layers import (
    NAME,
    _divide,
    _lora_forward,
    _make_dora,
    _whole_forward,
    file_dtype,
    layer_parts,
    meaning,
    rank_of,
)
from lorakit.adapter.targets import Models, adapted_names, check_places, find, model_of, together, value_at, within
from lorakit.config import WHOLE, Config


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
        return {f"{name}.{part}": w for name, layer in self.layers.items() for part, w in layer_parts(layer).items()}

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


def delta(adapter: Adapter, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the adapter adds to a module's weight at strength 1, in the weight's shape, float32.

    Args:
        dtype: what the parts are rounded to first, as a file does.
    """
    layer = adapter.layers[name]
    rounded = {part: file_dtype(part, weight.detach(), dtype).float() for part, weight in layer_parts(layer).items()}
    return meaning(layer, rounded, adapter.alphas[name])


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
    names = list(modules) if modules is not None else adapted_names(models, targets)
    kernels = {name: find(models, name) for name in names}
    if algorithm in WHOLE and any(bases.is_quantized(kernel) for kernel in kernels.values()):
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
            paths = {n: within(models, n) for n in names if model_of(n) == name}
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
        for weight in layer_parts(layer).values():
            weight.data = weight.data.float()
            weight.requires_grad_(True)
        if rank_of(layer_parts(layer)) is None:  # LyCORIS, and all who read its files, give it no scale
            alphas[name], layer.scaling[NAME] = float(ranks[name]), 1.0
    holding = {name: model for name, model in models.items() if any(model_of(n) == name for n in names)}
    return Adapter(holding, layers, ranks, alphas, targets, algorithm)


def _patterns(values: dict[str, float], usual: float) -> dict[str, float]:
    """What differs from the usual, as PEFT takes it: one pattern a value, as it tries each on every module."""
    paths: dict[float, list[str]] = {}
    for path, value in values.items():
        paths.setdefault(value, []).append(re.escape(path))
    return {f"^({'|'.join(own)})$": value for value, own in paths.items() if value != usual}


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
    modules = adapted_names(
        models if config.train_unet else {n: m for n, m in models.items() if n != "unet"}, config.targets
    )
    check_places(config.block_ranks, modules, "block_ranks")
    ranks = {name: value_at(config.block_ranks, name) for name in modules}
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
        start, path = within(models, name)
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
