"""Put the LoRA of a file into models, to sample with it or to train it further."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit import base as bases
from lorakit import storage
from lorakit.adapter import injection, targets
from lorakit.adapter.algorithms import algorithm_of
from lorakit.adapter.injection import Adapter
from lorakit.adapter.lora import Lora, check_sizes, distinct
from lorakit.adapter.read import load
from lorakit.adapter.specs import LayerSpec
from lorakit.base import Base


@storage.exclusive
def attach(models: nn.Module | targets.Models, base: Base, lora: Lora | str | Path) -> Adapter:
    """Put a file's LoRA into models (in place), to sample with or to train on. `adapter.eject` is the inverse.

    Args:
        models: a UNet, or those of `lora.adapts` by name; modules of other models are left out.

    Raises:
        ValueError: as `file_specs`; nothing is changed then.
    """
    lora = lora if isinstance(lora, Lora) else load(lora)
    specs = file_specs(models, base, lora)
    adapter = injection.inject(models, specs)
    try:
        adapter.load(_state(lora, adapter))
    except (ValueError, RuntimeError, KeyError) as error:
        injection.eject(models)
        raise ValueError(f"{lora.name} divides its matrices as lorakit does not: {error}") from None
    return adapter


def file_specs(models: nn.Module | targets.Models, base: Base, lora: Lora) -> dict[str, LayerSpec]:
    """A spec for each module of models that a file's LoRA adapts.

    1×1 convolutions and linear layers have the same numbers, so either shape fits either.

    Raises:
        ValueError: a LoRA of another family, of several algorithms, for none of the models, or for layers that this
            base does not have.
    """
    models = targets.by_name(models)
    lora.check_family(base)
    sizes = {module: size for module, size in lora.sizes.items() if targets.model_of(module) in models}
    if not sizes:
        raise ValueError(
            f"{lora.name} adapts only {' and '.join(lora.adapts) or 'nothing'}, not {' or '.join(models)}: "
            "it cannot be used here."
        )
    algorithms = lora.algorithms
    if len(kinds := sorted({algorithms[module].name for module in sizes})) > 1:
        raise ValueError(f"{lora.name} mixes {', '.join(kinds)}; lorakit puts one algorithm at a time into a model.")
    layers = {module: targets.find(models, module) for module in sizes}
    shapes = {module: bases.weight_shape(x) for module, x in layers.items() if hasattr(x, "weight")}
    check_sizes(lora.name, sizes, base.name, shapes)
    specs = {}
    for module in filter(sizes.__contains__, targets.paths(models)):
        parts, alpha = lora.modules[module]
        part_shapes = {part: tuple(w.shape) for part, w in parts.items()}
        specs[module] = LayerSpec(kinds[0], algorithms[module].layer_rank(parts), alpha, shapes=part_shapes)
    return specs


def _state(lora: Lora, adapter: Adapter) -> dict[str, Tensor]:
    """A file's weights as an adapter's state: linear layers and 1×1 convolutions hold the same numbers."""
    live = adapter.state()
    state = {f"{m}.{part}": w for m in adapter.layers if m in lora.modules for part, w in lora.modules[m][0].items()}
    same = {name for name in live.keys() & state.keys() if live[name].squeeze().shape == state[name].squeeze().shape}
    return {name: weight.reshape(live[name].shape) if name in same else weight for name, weight in state.items()}


@torch.no_grad()
def copy_weights(adapter: Adapter, base: Base, lora: Lora | str | Path) -> None:
    """Let a fresh adapter do what a file's LoRA does, to train it further. Another alpha is worked into the weights.

    Raises:
        ValueError: a LoRA of another family, or with other modules or ranks than the adapter's; nothing is changed.
    """
    lora = lora if isinstance(lora, Lora) else load(lora)
    lora.check_family(base)
    if lora.modules and lora.algorithm != adapter.algorithm:
        raise ValueError(f"{lora.name} is {lora.algorithm}: set algorithm to it, which is {adapter.algorithm!r} now.")
    ranks = {module: layer.algorithm.rank(layer.parts) for module, layer in adapter.layers.items()}
    if ranks != (file_ranks := lora.ranks):
        different = [m for m in sorted(ranks | file_ranks) if ranks.get(m, 0) != file_ranks.get(m, 0)]
        raise ValueError(
            f"{lora.name} has {len(file_ranks)} modules of ranks {distinct(file_ranks.values())}, the run's settings "
            f"ask for {len(ranks)} of ranks {distinct(ranks.values())}; first difference: {different[0]}. "
            "Set rank, targets, conv_rank, block_ranks and text_encoder_rate as the file has them."
        )
    alphas = adapter.alphas
    scaled = {m: (algorithm_of(x).times(x, alpha / alphas[m]), alphas[m]) for m, (x, alpha) in lora.modules.items()}
    try:
        adapter.load(_state(replace(lora, modules=scaled), adapter))
    except ValueError as error:
        raise ValueError(f"{lora.name} does not fit the run's settings and base: {error}") from None
