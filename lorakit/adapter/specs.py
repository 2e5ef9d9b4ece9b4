"""Specifications of adapted modules, made by hand or from a run's settings."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lorakit.adapter.algorithms import ALGORITHMS
from lorakit.adapter.targets import Models, adapted_names, by_name, check_places, is_wide, value_at
from lorakit.config import Config


@dataclass(frozen=True)
class LayerSpec:
    """The adapter layer of one module: algorithm, rank, alpha and initial weights.

    Raises:
        ValueError: the algorithm is unknown.
    """

    algorithm: str  # "lora", "dora", "loha" or "lokr"
    rank: int
    alpha: float  # the change is scaled by alpha / rank
    initialisation: str = "usual"  # what `train.initialise` does with the layer: "usual", "orthogonal" or "eva"
    factor: int | None = None  # of LoKr: a side of the small matrix; None makes the two as equal as possible
    decompose_both: bool = False  # of LoKr: the small matrix is of low rank as well
    shapes: Mapping[str, tuple[int, ...]] | None = None  # of LoKr: of its parts (a file's), in place of `factor`'s

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm {self.algorithm!r} is unknown. Use one of {', '.join(map(repr, ALGORITHMS))}.")


def layer_specs(
    models: nn.Module | Models, rank: int, alpha: float, targets: str = "attention", *, conv_rank: int | None = None,
    conv_alpha: float | None = None, algorithm: str = "lora", factor: int | None = None,
) -> dict[str, LayerSpec]:  # fmt: skip
    """A spec for each module that `targets` names and each of the text encoders'.

    Args:
        models: a UNet, or a UNet and text encoders by name.
        rank, alpha: of linear layers and 1×1 convolutions.
        conv_rank, conv_alpha: of larger convolutions; None is the same.
        algorithm, factor: as in `LayerSpec`.

    Raises:
        ValueError: unknown targets or algorithm.
        RuntimeError: as `target_names` and `text_names`.
    """
    models = by_name(models)
    plain = LayerSpec(algorithm, rank, float(alpha), factor=factor)
    wide = LayerSpec(algorithm, conv_rank or rank, float(conv_alpha or alpha), factor=factor)
    return {name: wide if is_wide(name) else plain for name in adapted_names(models, targets)}


def run_specs(models: nn.Module | Models, config: Config) -> dict[str, LayerSpec]:
    """A spec for each module that a run's settings adapt.

    Args:
        models: the UNet, and those text encoders that are trained.

    Raises:
        ValueError: `block_ranks` names a place that the models do not have, or leaves nothing to train.
        RuntimeError: as `target_names` and `text_names`.

    Source: Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA). Its scale goes into the alphas, and so into every file.
    """
    models = by_name(models)
    trained = models if config.train_unet else {which: model for which, model in models.items() if which != "unet"}
    modules = adapted_names(trained, config.targets)
    check_places(config.block_ranks, modules, "block_ranks")
    specs = {}
    for name in modules:
        place_rank, wide = value_at(config.block_ranks, name), is_wide(name)
        if place_rank == 0:
            continue
        usual = (wide and config.conv_rank) or config.rank
        alpha, rank = (wide and config.conv_alpha) or config.alpha, place_rank or usual
        # Where a place has a rank of its own, the scale stays what it is elsewhere.
        alpha = alpha * (rank**0.5 if config.rank_stabilized else rank / usual)
        specs[name] = LayerSpec(config.algorithm, rank, alpha, config.initialisation, config.lokr_factor)
    if not specs:
        raise ValueError("block_ranks leaves no module to train. Give some place a rank above 0.")
    return specs
