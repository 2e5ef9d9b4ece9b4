"""The base with LoRAs at given strengths, as the sampler takes them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lorakit import adapter as adapters
from lorakit import run, sample
from lorakit.adapter import FAMILIES, Lora
from lorakit.base import Base

Column = tuple[str | None, float]  # which candidate, None at strength 0; its strength


def columns(labels: Sequence[str], strengths: Sequence[float]) -> list[Column]:
    """What is to be made of each prompt: every candidate at every strength, and strength 0 once for all of them."""
    bare = [(None, 0.0)] if 0 in strengths else []
    return bare + [(label, value) for label in labels for value in dict.fromkeys(strengths) if value]


def make_variants(
    base: Base, wanted: Sequence[Column], paths: Mapping[str, Path], others: Sequence[tuple[Path, float]] = (),
    tell: Callable[[str], None] = print,
) -> dict[Column, sample.Variant]:  # fmt: skip
    """Columns as `sample.stream` makes them. One LoRA at a time is in memory: each is read again when it is its turn.

    Args:
        paths: of the candidates.
        others: LoRAs that are used together with each candidate, at strengths of their own; at strength 0 they alone.
        tell: told of candidates that cannot be used here; they are left out.

    Raises:
        ValueError, OSError: one of the others cannot be used.
    """
    found: dict[Column, sample.Variant] = {}
    for path, _ in others:
        _fitting(run.lora_of(path), base)
    known: Known = {}
    unfit: set[str] = set()
    for label, strength in wanted:
        if label in unfit:
            continue
        own = [] if label is None else [(paths[label], strength)]
        try:
            found[label, strength] = variant(base, [*own, *others], known)
        except (ValueError, OSError, FloatingPointError) as error:
            unfit.add(label)
            tell(str(error))
    return found


Known = dict[object, tuple[sample.Attach, tuple[str, ...]]]


def variant(base: Base, parts: Sequence[tuple[str | Path, float]], known: Known | None = None) -> sample.Variant:
    """The base with LoRAs of any kind in it, each at its strength; the bare base where all strengths are 0.

    Args:
        parts: what `record.lora_of` reads, and its strength.
        known: adapters that were made before, to which this one is added: one LoRA alone has the same at any strength.

    Raises:
        ValueError, OSError, FloatingPointError: one cannot be read, or is for another family.
    """
    parts, known = tuple((path, strength) for path, strength in parts if strength), {} if known is None else known
    if not parts:
        return sample.Variant()
    (first, factor), *more = parts
    key = parts if more else first
    if key not in known:
        adapts = {which for path, _ in parts for which in _fitting(run.lora_of(path), base).adapts}

        def attach(models: adapters.Models) -> adapters.Adapter:
            if not more:
                return adapters.attach(models, base, run.lora_of(first))
            return _together(models, base, [(run.lora_of(path), strength) for path, strength in parts])

        known[key] = attach, tuple(sorted(adapts))
    return sample.Variant(*known[key], 1.0 if more else factor)


def _together(models: adapters.Models, base: Base, parts: Sequence[tuple[Lora, float]]) -> adapters.Adapter:
    """Put several LoRAs into models (in place). All that are plain make one, which costs no more than one."""
    kinds = [{adapters.algorithm_of(own) for own in lora.parts.values()} for lora, _ in parts]
    plain = [part for part, kind in zip(parts, kinds, strict=True) if kind == {"lora"}]
    others = [part for part, kind in zip(parts, kinds, strict=True) if kind != {"lora"}]
    if plain:
        others.insert(0, (adapters.merge(*zip(*plain, strict=True)).lora, 1.0))
    found = []
    for lora, value in others:
        own = {which: model for which, model in models.items() if which in lora.adapts}
        if own:
            adapter = adapters.attach(own, base, lora)
            adapters.eject(own)
            adapters.use(adapter, value)
            found.append(adapter)
    return adapters.stack(models, found)


def _fitting(lora: Lora, base: Base) -> Lora:
    if lora.family not in (None, base.family):
        raise ValueError(
            f"{lora.name} is an {FAMILIES[lora.family]} LoRA, the base {base.name} is {FAMILIES[base.family]}: "
            "the two do not go together."
        )
    return lora
