"""Put a LoRA file into models, to sample with it or to train it further."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit import base as bases
from lorakit.adapter import injection, layers
from lorakit.adapter import targets as targets_module
from lorakit.adapter.injection import Adapter
from lorakit.adapter.lora import FAMILIES, Lora, usual
from lorakit.adapter.read import load
from lorakit.base import Base


def attach(models: nn.Module | targets_module.Models, base: Base, lora: Lora | str | Path) -> Adapter:
    """Put a file's LoRA into models (in place), to sample with or to train on. `adapter.eject` is the inverse.

    1×1 convolutions and linear layers hold the same numbers, so either shape fits either.

    Args:
        models: a UNet, or those of `lora.adapts` by name; what the file has for others is left out.

    Raises:
        ValueError: a LoRA of another family, or for layers that this base does not have; nothing is changed then.
    """
    lora = lora if isinstance(lora, Lora) else load(lora)
    models = targets_module.together(models)
    if lora.family not in (None, base.family):
        raise ValueError(
            f"{lora.name} is an {FAMILIES[lora.family]} LoRA, the base {base.name} is {FAMILIES[base.family]}: "
            "the two do not go together. Use a base of the LoRA's family."
        )
    own = {module: entry for module, entry in lora.modules.items() if targets_module.model_of(module) in models}
    kinds = sorted({layers.algorithm_of(parts) for parts, _ in own.values()})
    if not own:
        raise ValueError(
            f"{lora.name} adapts {' and '.join(lora.adapts) or 'nothing'} alone and not {' or '.join(models)}: "
            "it cannot be used here."
        )
    if len(kinds) > 1:
        raise ValueError(f"{lora.name} mixes {', '.join(kinds)}; lorakit puts one algorithm at a time into a model.")
    wrong = []
    for module, (parts, _) in own.items():
        layer, theirs = targets_module.find(models, module), layers.size(parts)
        shape = bases.weight_shape(layer) if hasattr(layer, "weight") else None
        if shape is None or theirs != (shape[0], math.prod(shape[1:])):
            ours = "missing here" if shape is None else f"{shape[0]}×{math.prod(shape[1:])} here"
            wrong.append(f"{module} is {theirs[0]}×{theirs[1]} in the file, {ours}")
    if wrong:
        raise ValueError(
            f"{lora.name} does not fit {base.name} in {len(wrong)} of {len(own)} modules: "
            + "; ".join(wrong[:3]) + ". It was made for another base."
        )  # fmt: skip
    modules = [name for name in targets_module.paths(models) if name in own]
    ranks = {name: layer_rank(own[name][0]) for name in modules}
    alphas = {name: own[name][1] for name in modules}
    targets = "attention+conv" if any(targets_module.RESNET.search(name) for name in modules) else "attention"
    adapter = injection.inject(
        models, usual(ranks.values()), usual(alphas.values()), targets, modules=modules, ranks=ranks, alphas=alphas,
        algorithm=kinds[0], like={name: parts for name, (parts, _) in own.items()},
    )  # fmt: skip
    try:
        adapter.load(_fitted(own, adapter))
    except (ValueError, RuntimeError, KeyError) as error:
        injection.eject(models)
        raise ValueError(f"{lora.name} divides its matrices as lorakit does not: {error}") from None
    return adapter


def layer_rank(parts: dict[str, Tensor]) -> int:
    """The rank to make a layer of, so that it has these parts."""
    return layers.rank_of(parts) or max(parts["lokr_w2"].shape[:2])


def _fitted(modules: dict[str, tuple[dict[str, Tensor], float]], adapter: Adapter) -> dict[str, Tensor]:
    """A file's weights as an adapter's state: linear layers and 1×1 convolutions hold the same numbers."""
    own = adapter.state()
    given = {f"{m}.{part}": tensor for m, (parts, _) in modules.items() for part, tensor in parts.items()}
    same = {name for name in own.keys() & given.keys() if _tight(own[name].shape) == _tight(given[name].shape)}
    return {name: tensor.reshape(own[name].shape) if name in same else tensor for name, tensor in given.items()}


def _tight(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


@torch.no_grad()
def copy_weights(adapter: Adapter, base: Base, lora: Lora | str | Path) -> None:
    """Let a fresh adapter do what a file's LoRA does, to train it further. Another alpha is worked into the weights.

    Raises:
        ValueError: a LoRA of another family, or with other modules or ranks than the adapter's; nothing is changed.
    """
    lora = lora if isinstance(lora, Lora) else load(lora)
    if lora.family not in (None, base.family):
        raise ValueError(f"{lora.name} is an {FAMILIES[lora.family]} LoRA, the base is {FAMILIES[base.family]}.")
    if lora.modules and lora.algorithm != adapter.algorithm:
        raise ValueError(f"{lora.name} is {lora.algorithm}: set algorithm to it, which is {adapter.algorithm!r} now.")
    own = {module: layers.layer_parts(layer) for module, layer in adapter.layers.items()}
    ours, theirs = ({m: layers.rank_of(parts) for m, parts in every.items()} for every in (own, lora.parts))
    if ours != theirs:
        odd = [m for m in sorted(ours.keys() | theirs.keys()) if ours.get(m, 0) != theirs.get(m, 0)]
        raise ValueError(
            f"{lora.name} has {len(theirs)} modules of ranks {_distinct(theirs)}, the run's settings ask for "
            f"{len(ours)} of ranks {_distinct(ours)}; first difference: {odd[0]}. "
            "Set rank, targets, conv_rank, block_ranks and text_encoder_rate as the file has them."
        )
    state = {name: tensor.float() for name, tensor in _fitted(lora.modules, adapter).items()}
    for module, (parts, alpha) in lora.modules.items():
        scaled = next(part for part in ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a") if part in parts)
        if layers.rank_of(parts) is not None:
            state[f"{module}.{scaled}"] = state[f"{module}.{scaled}"] * (alpha / adapter.alphas[module])
    try:
        adapter.load(state)
    except ValueError as error:
        raise ValueError(f"{lora.name} does not fit the run's settings and base: {error}") from None


def _distinct(ranks: dict[str, int | None]) -> list[int]:
    return sorted({rank for rank in ranks.values() if rank})
