"""Make pictures of prompts with several LoRAs at several strengths."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lorakit import adapter as adapters
from lorakit import run, sample
from lorakit.adapter import FAMILIES, Lora
from lorakit.base import Base
from lorakit.console import Console
from lorakit.device import Compute
from lorakit.sample import Loaded, Sampling

Column = tuple[str | None, float]  # the candidate's label, None at strength 0; the strength
BARE: Column = (None, 0.0)


def columns(labels: Sequence[str], strengths: Sequence[float]) -> list[Column]:
    """Every candidate at every strength; strength 0 only once, as it is the same for all."""
    bare = [BARE] if 0 in strengths else []
    return bare + [(label, value) for label in labels for value in dict.fromkeys(strengths) if value]


def make_variants(
    base: Base, grid_columns: Sequence[Column], paths: Mapping[str, Path], others: Sequence[tuple[Path, float]] = (),
    warn: Callable[[str], None] = print,
) -> dict[Column, sample.Variant]:  # fmt: skip
    """Columns as `sample.stream` takes them. Each LoRA is read again when it is used: one at a time is in memory.

    Args:
        others: LoRAs used together with each candidate, and at strength 0 without it, at strengths of their own.
        warn: called with a message for each candidate that cannot be used with this base; it is left out.

    Raises:
        ValueError, OSError: one of the others cannot be used.
    """
    variants: dict[Column, sample.Variant] = {}
    for path, _ in others:
        _check_family(run.lora_of(path), base)
    known: Known = {}
    unusable: set[str | None] = set()
    for label, strength in grid_columns:
        if label in unusable:
            continue
        candidate = [] if label is None else [(paths[label], strength)]
        try:
            variants[label, strength] = variant(base, [*candidate, *others], known)
        except (ValueError, OSError, FloatingPointError) as error:
            unusable.add(label)
            warn(str(error))
    return variants


def make_grid(
    base: Base, rows: Sequence[tuple[str, int]], variants: Mapping[Column, sample.Variant], sampling: Sampling, *,
    compute: Compute, cells: Collection[tuple[int, Column]] | None = None, loaded: Loaded | None = None,
    console: Console | None = None,
) -> dict[tuple[int, Column], Image.Image]:  # fmt: skip
    """Pictures of prompts with variants, by (row, column); those made so far where the console's `stop` was set.

    Args:
        rows: prompts and their seeds.
        cells: the pictures to make; None makes all.
    """
    prompts, seeds = zip(*rows, strict=True)
    order = list(variants)
    places = None if cells is None else {(row, order.index(column)) for row, column in cells}
    stream = sample.stream(
        base, prompts, list(variants.values()), replace(sampling, seeds=seeds), compute=compute, cells=places,
        loaded=loaded, console=console,
    )  # fmt: skip
    with closing(stream):
        return {(row, order[column]): picture for row, column, picture in stream}


Known = dict[object, tuple[sample.Attach, tuple[str, ...]]]


def variant(base: Base, parts: Sequence[tuple[str | Path, float]], known: Known | None = None) -> sample.Variant:
    """The base with LoRAs of any kind in it, each at its strength; the bare base where all strengths are 0.

    Args:
        parts: what `run.lora_of` reads, and its strength.
        known: adapters of earlier calls, to which this one is added: a single LoRA is loaded once for all strengths.

    Raises:
        ValueError, OSError, FloatingPointError: one cannot be read, or is for another family.
    """
    parts, known = tuple((path, strength) for path, strength in parts if strength), {} if known is None else known
    if not parts:
        return sample.Variant()
    (first, factor), *more = parts
    key = parts if more else first
    if key not in known:
        adapts = {name for path, _ in parts for name in _check_family(run.lora_of(path), base).adapts}

        def attach(models: adapters.Models) -> adapters.Adapter:
            if not more:
                return adapters.attach(models, base, run.lora_of(first))
            return _attach_all(models, base, [(run.lora_of(path), strength) for path, strength in parts])

        known[key] = attach, tuple(sorted(adapts))
    return sample.Variant(*known[key], 1.0 if more else factor)


def _attach_all(models: adapters.Models, base: Base, parts: Sequence[tuple[Lora, float]]) -> adapters.Adapter:
    """Put several LoRAs into models (in place); all plain ones are merged, so that they cost no more than one."""
    plain, others = ([part for part in parts if part[0].plain == plain] for plain in (True, False))
    if plain:
        others.insert(0, (adapters.merge([lora for lora, _ in plain], [strength for _, strength in plain]).lora, 1.0))
    attached = []
    for lora, strength in others:
        adapted = {name: model for name, model in models.items() if name in lora.adapts}
        if adapted:
            adapter = adapters.attach(adapted, base, lora)
            adapters.eject(adapted)
            adapters.use(adapter, strength)
            attached.append(adapter)
    return adapters.stack(models, attached)


def _check_family(lora: Lora, base: Base) -> Lora:
    if lora.family not in (None, base.family):
        raise ValueError(
            f"{lora.name} is an {FAMILIES[lora.family]} LoRA, the base {base.name} is {FAMILIES[base.family]}: "
            "they cannot be used together."
        )
    return lora
