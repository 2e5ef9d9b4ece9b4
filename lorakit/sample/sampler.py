"""Make pictures from prompts, with adapters at several strengths."""

import math
import tempfile
import traceback
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import plots
from lorakit.adapter import Adapter, Lora
from lorakit.base import Base, Text
from lorakit.console import Console
from lorakit.device import Compute, free_memory
from lorakit.sample.denoise import Denoiser, Sampling, decode_latents

HIGH = 3  # strength above which pictures lose their meaning
Attach = Callable[[adapters.Models], Adapter]  # puts an adapter into models by name, and returns it


@dataclass(frozen=True)
class Variant:
    """The base as it is, or with an adapter at a strength.

    Attributes:
        attach: puts the adapter into models; None is the bare base. Variants with the same `attach` share one adapter.
        adapts: the models that the adapter is for: "unet", "text_encoder", "text_encoder_2".
    """

    attach: Attach | None = None
    adapts: Sequence[str] = ("unet",)
    strength: float = 1.0


class Placed(NamedTuple):
    """A finished picture and its place in the grid of prompts × variants."""

    row: int  # the prompt's
    column: int  # the variant's
    picture: Image.Image


@dataclass
class Loaded:
    """Parts of a base that are in memory or on disk already, to be used again.

    Attributes:
        models: name → model without an adapter. Sampling changes them only while it works.
        cache: folder of encoded texts; None keeps none.
    """

    models: dict[str, Any] = field(default_factory=dict, repr=False)
    cache: Path | None = None


def stream(
    base: Base, prompts: Sequence[str], variants: Sequence[Variant] = (Variant(),), sampling: Sampling | None = None, *,
    compute: Compute | None = None, loaded: Loaded | None = None, cells: Collection[tuple[int, int]] | None = None,
    console: Console | None = None,
) -> Generator[Placed, None, None]:  # fmt: skip
    """Make a picture of every prompt with every variant; yields each as soon as it is made.

    Prompts may be of any length and have weights, as for `base.encode_prompts`. The base is loaded once for all
    variants: first its text encoders, then UNet and VAE. Adapters are put in and taken out one after the other. Closing
    the generator, or setting the console's `stop`, ends it after the current denoising step. However it ends, even by
    an error, the memory is freed.

    Args:
        compute: None chooses the best of this machine.
        cells: (row, column) of the pictures to make; None makes all.

    Raises:
        ValueError: settings that do not suit the base; raised before anything is loaded.
    """
    for variant in variants:
        if not math.isfinite(variant.strength):
            raise ValueError(f"strength {variant.strength} makes no picture. Give a number; 0 to 1 are usual.")
        if variant.attach and not {"unet", *base.text_encoders} & set(variant.adapts):
            raise ValueError(
                f"The LoRA adapts {', '.join(variant.adapts) or 'nothing'}, and {base.name} has no such part to adapt."
            )
    sampling, console = sampling or Sampling(), console or Console()
    if (highest := max((abs(variant.strength) for variant in variants), default=0)) > HIGH:
        console.say(f"strength  {highest:g} is far above the usual 0 to 1: expect pictures without meaning")
    seeds, size = sampling.resolve(len(prompts), base)
    work = _Stream(
        base, list(prompts), variants, sampling, seeds, size, compute or Compute.choose(), loaded or Loaded(), cells,
        console,
    )  # fmt: skip
    return work.pictures()


@dataclass(frozen=True)
class _Stream:
    """One call of `stream`, with its arguments completed."""

    base: Base
    prompts: list[str]
    variants: Sequence[Variant]
    sampling: Sampling
    seeds: list[int]
    size: tuple[int, int]
    compute: Compute
    loaded: Loaded
    cells: Collection[tuple[int, int]] | None
    console: Console

    def pictures(self) -> Generator[Placed, None, None]:
        try:
            yield from self._make()  # only its frame holds models and adapters: it is gone when memory is freed
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # a notebook keeps the last error, and with it the UNet
            raise
        finally:
            free_memory(self.compute.device)

    def _make(self) -> Generator[Placed, None, None]:
        texts = self._texts()
        if self.console.stop.is_set():
            return
        unet = self.loaded.models.get("unet") or bases.load_unet(self.base, self.compute)
        vae = bases.load_vae(self.base, self.compute)
        denoiser = Denoiser(unet, self.base, self.sampling, self.size, self._at_once(), self.console.stop)
        for variant, columns in self._by_adapter():
            yield from self._with_adapter(variant, columns, texts, denoiser, vae)
            if self.console.stop.is_set():
                return
            if variant.attach:  # before the next adapter is loaded
                free_memory(self.compute.device)

    def _with_adapter(
        self, variant: Variant, columns: Sequence[int], texts: Sequence[Sequence[Text]], denoiser: Denoiser, vae: Any
    ) -> Generator[Placed, None, None]:
        """The pictures of all columns that share an adapter."""
        with _attached(variant, {"unet": denoiser.unet}) as adapter:
            for column in columns:
                yield from self._column(column, texts[column], adapter, denoiser, vae)

    def _column(
        self, column: int, texts: Sequence[Text], adapter: Adapter | None, denoiser: Denoiser, vae: Any
    ) -> Generator[Placed, None, None]:
        *prompts, negative, empty = texts
        rows = [row for row in range(len(prompts)) if self.cells is None or (row, column) in self.cells]
        batches = denoiser([prompts[row] for row in rows], [self.seeds[row] for row in rows], negative, empty)
        while rows and not self.console.stop.is_set():
            with _at(adapter, self.variants[column].strength):
                latents = next(batches, ())
            for row, x in zip(rows, latents, strict=False):
                yield Placed(row, column, decode_latents(vae, x[None])[0])
                if self.console.stop.is_set():
                    return
            rows = rows[len(latents) :]

    def _at_once(self) -> int:
        """Pictures denoised together: eight smaller than 256 pixels, four larger ones on a card, else one."""
        few = 4 if self.compute.device.type == "cuda" else 1
        return self.compute.batch or (8 if max(self.size) < 256 else few)

    def _by_adapter(self) -> list[tuple[Variant, list[int]]]:
        """The first variant of each adapter, and the columns of all that share it."""
        columns: dict[Attach | None, list[int]] = {}
        for column, variant in enumerate(self.variants):
            columns.setdefault(variant.attach, []).append(column)
        return [(self.variants[shared[0]], shared) for shared in columns.values()]

    def _texts(self) -> list[list[Text]]:
        """Prompts, negative prompt and empty prompt, encoded for each variant."""
        with tempfile.TemporaryDirectory() as scratch:
            prompts = [*self.prompts, self.sampling.negative, ""]
            folder = self.loaded.cache or Path(scratch)
            encoded = bases.encode_prompts(
                self.base, prompts, folder, self.compute, self.sampling.clip_skip, Console(self.console.say, False)
            )
        plain = [encoded[prompt] for prompt in prompts]
        texts = [plain] * len(self.variants)
        changed = [n for n in self.base.text_encoders if any(v.attach and n in v.adapts for v in self.variants)]
        if not changed:
            return texts
        encoders = {
            name: self.loaded.models.get(name) or bases.load_text_encoder(self.base, self.compute, name)[0]
            for name in changed
        }
        for variant, columns in self._by_adapter():
            texts = self._reencoded(texts, variant, columns, encoders)
        del encoders
        free_memory(self.compute.device)
        return texts

    def _reencoded(
        self, texts: list[list[Text]], variant: Variant, columns: Sequence[int], encoders: adapters.Models
    ) -> list[list[Text]]:  # fmt: skip
        """The texts, those of these columns as the text encoders with the variant's adapter encode them."""
        texts = list(texts)
        with _attached(variant, encoders) as adapter:
            if adapter is None:
                return texts
            for column in columns:
                with _at(adapter, self.variants[column].strength):
                    models, clip_skip = adapter.models, self.sampling.clip_skip
                    texts[column] = bases.reencode_texts(self.base, models, texts[column], clip_skip)
        return texts


@contextmanager
def _attached(variant: Variant, models: adapters.Models) -> Iterator[Adapter | None]:
    """Inside, the variant's adapter is in those of the models that it is for; afterwards they are as before."""
    adapted = {name: model for name, model in models.items() if variant.attach and name in variant.adapts}
    try:
        yield variant.attach(adapted) if variant.attach and adapted else None
    finally:
        adapters.eject(adapted)


def _at(adapter: Adapter | None, strength: float):
    return adapters.strength(adapter, strength) if adapter else nullcontext()


# ── Grids ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Source(Protocol):
    """What `grid` makes pictures with: a base and a LoRA, as a `run.Run` has them."""

    @property
    def base(self) -> Base: ...
    @property
    def lora(self) -> Lora: ...
    @property
    def sampling(self) -> Sampling: ...
    @property
    def compute(self) -> Compute: ...


@dataclass(frozen=True)
class Grid:
    """Pictures of prompts × strengths; shows itself in a notebook."""

    prompts: Sequence[str]
    strengths: Sequence[float]
    pictures: list[list[Image.Image]] = field(repr=False)  # one row for each prompt

    def figure(self, path: Path | None = None):
        """The pictures as a matplotlib figure; also written to `path`."""
        labels = plots.strength_labels(self.strengths)
        return plots.grid(self.pictures, row_labels=list(self.prompts), column_labels=labels, path=path)

    def _repr_png_(self) -> bytes:
        return self.figure()._repr_png_()


def grid(
    source: Source, prompts: Sequence[str], strengths: Sequence[float] = (0.0, 0.5, 0.7, 0.9, 1.0),
    sampling: Sampling | None = None, *, loaded: Loaded | None = None, console: Console | None = None,
) -> Grid:  # fmt: skip
    """Make pictures of prompts without a LoRA (strength 0) and with it at several strengths, from the same noise.

    Args:
        source: a run, or anything with its `base`, `lora`, `sampling` and `compute`.
        sampling: None takes the source's.

    Raises:
        KeyboardInterrupt: it was stopped before the last picture; `stream` gives those that were made.
    """
    base, lora, console = source.base, source.lora, console or Console()

    def attach(models: adapters.Models) -> Adapter:
        return adapters.attach(models, base, lora)

    variants = [Variant(attach, tuple(lora.adapts), strength) for strength in strengths]
    pictures = stream(
        base, prompts, variants, sampling or source.sampling, compute=source.compute, loaded=loaded, console=console
    )
    return Grid(prompts, strengths, collect(pictures, len(prompts), len(strengths), console))


def collect(
    pictures: Generator[Placed, None, None], rows: int, columns: int, console: Console
) -> list[list[Image.Image]]:  # fmt: skip
    """All pictures of a stream as rows.

    Raises:
        KeyboardInterrupt: it was stopped before the last picture.
    """
    cells: dict[tuple[int, int], Image.Image] = {}
    with closing(pictures), console.bar() as bar:
        for row, column, picture in pictures:
            cells[row, column] = picture
            bar("samples", len(cells), rows * columns)
    if len(cells) < rows * columns:
        raise KeyboardInterrupt
    return [[cells[row, column] for column in range(columns)] for row in range(rows)]
