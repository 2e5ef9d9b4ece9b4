"""Ranks and rates by block, as sd-scripts' network_args count the blocks of SD 1.x and 2.x."""

from collections.abc import Iterator
from typing import Any

from lorakit.kohya.given import Given

COUNTS = {"block_dims": 25, "down_lr_weight": 12, "mid_lr_weight": 1, "up_lr_weight": 12}


def _places(convolutions: bool) -> dict[str, int]:
    """SD 1.x and 2.x: place in the UNet → index among sd-scripts' 25 blocks: 12 down, 1 in the middle, 12 up."""
    downs, ups = [(i, j) for i in range(4) for j in range(2)], [(i, j) for i in range(4) for j in range(3)]
    places = {f"down_blocks.{i}.attentions.{j}": 1 + 3 * i + j for i, j in downs if i < 3} | {"mid_block": 12}
    places |= {f"up_blocks.{i}.attentions.{j}": 13 + 3 * i + j for i, j in ups if i > 0}
    if convolutions:
        places |= {f"down_blocks.{i}.resnets.{j}": 1 + 3 * i + j for i, j in downs}
        places |= {f"down_blocks.{i}.downsamplers": 3 + 3 * i for i in range(3)}
        places |= {f"up_blocks.{i}.resnets.{j}": 13 + 3 * i + j for i, j in ups}
        places |= {f"up_blocks.{i}.upsamplers": 15 + 3 * i for i in range(3)}
    return places


def by_block(kohya: Given, convolutions: bool) -> dict[str, Any]:
    """Ranks and rates by block, from sd-scripts' network_args."""
    given = {key: str(value).split(",") if not isinstance(value, list) else value
             for key in COUNTS if (value := kohya.take(key)) is not None}  # fmt: skip
    try:
        numbers = {key: [float(value) for value in values] for key, values in given.items()}
    except ValueError:  # "sine", "cosine" …
        numbers = None
    if numbers is None or kohya.sdxl or any(len(values) != COUNTS[key] for key, values in numbers.items()):
        for key in given:
            kohya.note(key, "only the 25 blocks of SD 1.x and 2.x are read; use block_ranks, block_rates")
        return {}
    ours: dict[str, Any] = {}
    places = _places(convolutions)
    if dims := numbers.get("block_dims"):
        ours["block_ranks"] = {place: int(dims[index]) for place, index in places.items()}
        if conv_rank := kohya.number("conv_dim"):
            ours["block_ranks"] |= dict.fromkeys(_convolutions(places), int(conv_rank))
        if kohya.take("block_alphas"):
            kohya.note("block_alphas", "left out, alpha / rank is the same in all blocks")
    _, *sides = COUNTS
    weights = sum((numbers.get(key, [1.0] * COUNTS[key]) for key in sides), [])
    rates = {place: weights[index] for place, index in places.items()}
    if set(rates.values()) != {1.0}:
        ours["block_rates"] = {place: rate for place, rate in rates.items() if rate != 1.0}
    return ours


def _convolutions(places: dict[str, int]) -> Iterator[str]:
    """The 3×3 convolutions of places, whose rank is conv_dim in every block."""
    for place in places:
        if "attentions" not in place and place != "mid_block":
            yield from (f"{place}.conv1", f"{place}.conv2") if "resnets" in place else (place,)
    yield from (f"mid_block.resnets.{j}.conv{k}" for j in (0, 1) for k in (1, 2))
