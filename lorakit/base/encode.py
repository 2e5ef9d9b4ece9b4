"""Latents and text embeddings, encoded once and cached by content.

A latent is keyed by picture bytes, scaling and crop, mirroring, VAE weights and dtype; a text embedding by caption,
text-encoder weights, clip skip and dtype. An edited caption or a replaced picture is encoded again; nothing else is.
A model is loaded only when an entry is missing, one at a time, and freed before the next.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit import dataset as datasets
from lorakit.base import model
from lorakit.base.prompts import Fragment, can_weigh, encode_fragments, weighted_fragments, without_weights
from lorakit.console import Console
from lorakit.dataset import Fit, Mask, Picture
from lorakit.device import Compute, autocast, free_memory
from lorakit.storage import cache_key, read_cached, write_cached

TEXTS_AT_ONCE = 16
PICTURES_AHEAD = 8  # pictures decoded while the VAE encodes earlier ones

# (encoder, tokenizer, texts) → (embeddings, pooled embedding, tokens) of each text
EncodeBatch = Callable[[Any, Any, Sequence[str]], Iterable[Sequence[Tensor]]]


@dataclass(frozen=True)
class Text:
    """An encoded prompt."""

    embeddings: Tensor  # (tokens, width)
    pooled: Tensor  # (width,): from SDXL's second encoder; unused elsewhere
    tokens: Tensor  # (encoders, chunks · length), int64: to encode the text again with trained encoders
    fragments: tuple[Fragment, ...] = ()  # used in place of tokens if the prompt has weights


@dataclass(frozen=True)
class Encoded:
    """A picture as the training loop uses it, on the CPU."""

    latents: Tensor  # (C, h, w), float32, scaled to unit variance
    mirrored: Tensor | None  # latents of the horizontally flipped picture
    sizes: Tensor  # (6,): SDXL's size conditions
    caption: str
    variants: tuple[str, ...] = ()  # variants of the caption to draw from; () always uses the caption
    mask: Tensor | None = None  # (1, h, w), float32: 1 for trained cells, 0 for masked ones
    prior: bool = False  # a regularisation picture


def encode_texts(
    base: model.Base, texts: Iterable[str], folder: str | Path, compute: Compute, clip_skip: int = 1,
    console: Console | None = None, chunks: int = 1,
) -> dict[str, Text]:  # fmt: skip
    """Encode texts with the base's text encoders, taking brackets literally and truncating texts that are too long.

    Args:
        folder: the cache; cached texts are not encoded again.
        chunks: of 75 tokens that are read of each text.

    Returns:
        text → its embeddings. For SDXL, the embeddings of both encoders are concatenated.

    Raises:
        FloatingPointError: an encoder returned NaN or infinity; names the text.
    """

    def encode_batch(encoder: Any, tokenizer: Any, batch: Sequence[str]) -> Iterable[Sequence[Tensor]]:
        tokens = model.tokenize(tokenizer, batch, chunks)
        return zip(*model.encode(encoder, tokens.to(compute.device), base.family, clip_skip), tokens, strict=True)

    keys = {text: ("text 2", text, *([chunks] if chunks > 1 else [])) for text in texts}
    cache = _TextCache(base, Path(folder), compute, clip_skip, console or Console())
    return {text: _text(parts) for text, parts in cache.encode(keys, encode_batch, TEXTS_AT_ONCE).items()}


def encode_prompts(
    base: model.Base, prompts: Iterable[str], folder: str | Path, compute: Compute, clip_skip: int = 1,
    console: Console | None = None,
) -> dict[str, Text]:  # fmt: skip
    """Encode prompts of any length, with weights such as (word:1.2) in A1111's grammar.

    Arguments, result and errors are those of `encode_texts`.
    """
    console, prompts = console or Console(), list(dict.fromkeys(prompts))
    special = {prompt: fragments for prompt in prompts if (fragments := weighted_fragments(prompt))}
    if special and not can_weigh():
        first = next(iter(special))[:40]
        console.say(f'prompt    {first!r}: without compel, weights are ignored: pip install "lorakit[prompts]"')
        special = {}
    plain = {prompt: without_weights(prompt) for prompt in prompts if prompt not in special}

    def encode_batch(encoder: Any, tokenizer: Any, batch: Sequence[str]) -> Iterable[Sequence[Tensor]]:
        return [encode_fragments(base, encoder, tokenizer, special[text], clip_skip) for text in batch]

    keys = {prompt: ("prompt", fragments) for prompt, fragments in special.items()}
    weighted = _TextCache(base, Path(folder), compute, clip_skip, console).encode(keys, encode_batch, 1)
    needed = model.tokens_needed(base, plain.values())
    texts: dict[str, Text] = {}
    chunks = {text: max(1, -(-needed.get(text, 0) // model.token_limit(base))) for text in plain.values()}
    for count in sorted(set(chunks.values())):
        of_count = [text for text in chunks if chunks[text] == count]
        texts |= encode_texts(base, of_count, folder, compute, clip_skip, console, count)
    encoded = {prompt: texts[text] for prompt, text in plain.items()}
    return encoded | {prompt: _text(parts, special[prompt]) for prompt, parts in weighted.items()}


@dataclass(frozen=True)
class _TextCache:
    """The outputs of a base's text encoders, cached in a folder."""

    base: model.Base
    folder: Path
    compute: Compute
    clip_skip: int
    console: Console

    @torch.no_grad()
    def encode(self, keys: Mapping[str, tuple], encode_batch: EncodeBatch, size: int) -> dict[str, list[dict]]:
        """Text → each encoder's "embeddings", "pooled" and "tokens", cached or computed in batches of at most `size`.

        Args:
            keys: text → what identifies its entry, in addition to the encoder.
        """
        parts: dict[str, list[dict]] = {text: [] for text in keys}
        for encoder in self.base.text_encoders if keys else ():
            identity = model.fingerprint(self.base, encoder), self.clip_skip, self.base.family, str(self.compute.dtype)
            files = {text: self.folder / f"{cache_key(*key, *identity)}.safetensors" for text, key in keys.items()}
            entries = {text: entry for text, file in files.items() if (entry := read_cached(file, self.console.say))}
            missing = {text: file for text, file in files.items() if text not in entries}
            if missing:
                entries |= self._encode_missing(encoder, missing, encode_batch, size)
            for text in keys:
                parts[text].append(entries[text])
        return parts

    def _encode_missing(
        self, name: str, files: Mapping[str, Path], encode_batch: EncodeBatch, size: int
    ) -> dict[str, dict[str, Tensor]]:
        """Load one encoder, encode these texts and write each into its file."""
        encoder, tokenizer = model.load_text_encoder(self.base, self.compute, name)
        entries, texts = {}, list(files)
        with self.console.bar() as bar:
            for start in range(0, len(texts), size):
                batch = texts[start : start + size]
                for text, tensors in zip(batch, encode_batch(encoder, tokenizer, batch), strict=True):
                    embeddings, pooled, tokens = (tensor.cpu().contiguous() for tensor in tensors)
                    _check_finite(embeddings, f"the text {text!r}", name)
                    entry = {"embeddings": embeddings, "pooled": pooled, "tokens": tokens}
                    entries[text] = write_cached(files[text], entry)
                bar("captions", start + len(batch), len(texts))
        del encoder
        free_memory(self.compute.device)
        return entries


def _text(parts: Sequence[dict[str, Tensor]], fragments: tuple[Fragment, ...] = ()) -> Text:
    """The outputs of all encoders for one text, concatenated."""
    embeddings = torch.cat([part["embeddings"] for part in parts], dim=-1)
    return Text(embeddings, parts[-1]["pooled"], torch.stack([part["tokens"] for part in parts]), fragments)


def pad_text(text: Text, empty: Text, length: int) -> Text:
    """Extend a text's embeddings to at least `length` tokens with those of the empty prompt, as A1111 does."""
    chunks = max(0, -(-(length - len(text.embeddings)) // len(empty.embeddings)))
    return replace(text, embeddings=torch.cat([text.embeddings, *[empty.embeddings] * chunks])) if chunks else text


@torch.no_grad()
def reencode_texts(
    base: model.Base, encoders: Mapping[str, Any], texts: Sequence[Text], clip_skip: int = 1
) -> list[Text]:
    """Encode texts again with the encoders (name → encoder) that an adapter has changed; without any, return them."""
    if not encoders:
        return list(texts)
    first = next(iter(encoders.values()))
    special = [i for i, text in enumerate(texts) if text.fragments]
    encoded = {i: _reencode_fragments(base, encoders, texts[i], clip_skip) for i in special}
    by_length: dict[int, list[int]] = defaultdict(list)
    for i in range(len(texts)):
        if i not in encoded:
            by_length[texts[i].tokens.shape[-1]].append(i)
    for plain in by_length.values():
        embeddings, pooled, tokens = (
            torch.stack([getattr(texts[i], part) for i in plain]).to(first.device)
            for part in ("embeddings", "pooled", "tokens")
        )
        with autocast(first.device, first.dtype):
            embeddings, pooled = model.reencode(base, encoders, embeddings, pooled, tokens, clip_skip)
        for i, embedding, pool in zip(plain, embeddings.cpu(), pooled.cpu(), strict=True):
            encoded[i] = Text(embedding, pool, texts[i].tokens)
    return [encoded[i] for i in range(len(texts))]


def _reencode_fragments(base: model.Base, encoders: Mapping[str, Any], text: Text, clip_skip: int) -> Text:
    """`reencode_texts` for one prompt with weights."""
    parts = list(text.embeddings.split([base.configs[name]["hidden_size"] for name in base.text_encoders], dim=-1))
    pooled = text.pooled
    for place, name in enumerate(base.text_encoders):
        if name in encoders:
            tokenizer = model.load_tokenizer(base, name)
            embeddings, pool, _ = encode_fragments(base, encoders[name], tokenizer, text.fragments, clip_skip)
            parts[place] = embeddings.cpu().to(text.embeddings.dtype)
            pooled = pool.cpu() if name == base.text_encoders[-1] else pooled
    return replace(text, embeddings=torch.cat(parts, dim=-1), pooled=pooled)


@torch.no_grad()
def encode_pictures(
    base: model.Base, pictures: Sequence[Picture], fits: Sequence[Fit], folder: str | Path, compute: Compute, *,
    masks: Sequence[Mask | None] = (), flip: bool = False, console: Console | None = None,
) -> list[Encoded]:  # fmt: skip
    """Encode pictures with the base's VAE.

    Args:
        fits: scaling and crop of each picture.
        folder: the cache; cached pictures are not encoded again.
        masks: one for each picture, None for an unmasked one; () for no masks.
        flip: encode the mirrored pictures too (mirroring latents is not the same).

    Raises:
        FloatingPointError: the VAE returned NaN or infinity; names the picture.
    """
    console, folder = console or Console(), Path(folder)
    weights = model.fingerprint(base, "vae")
    files: dict[tuple[int, bool], Path] = {}
    for number, (picture, fit) in enumerate(zip(pictures, fits, strict=True)):
        for mirrored in (False, True)[: 1 + flip]:
            key = ("latents", picture.digest, fit.scaled, fit.crop, fit.size, mirrored, weights, str(compute.dtype))
            files[number, mirrored] = folder / f"{cache_key(*key)}.safetensors"
    latents = {item: entry["latents"] for item, file in files.items() if (entry := read_cached(file, console.say))}
    missing = {item: file for item, file in files.items() if item not in latents}
    if missing:
        latents |= _encode_missing(base, missing, pictures, fits, compute, console)
    encoded = []
    for number, (picture, fit, mask) in enumerate(zip(pictures, fits, masks or [None] * len(fits), strict=True)):
        (left, top), (width, height) = fit.crop, fit.size
        sizes = model.size_conditions((picture.height, picture.width), (top, left), (height, width))
        upright, mirror = latents[number, False], latents.get((number, True))
        cells = _mask(mask, picture, fit, upright.shape[-2:], folder, console) if mask else None
        encoded.append(Encoded(upright, mirror, sizes, picture.caption, mask=cells))
    return encoded


def _encode_missing(
    base: model.Base, files: Mapping[tuple[int, bool], Path], pictures: Sequence[Picture], fits: Sequence[Fit],
    compute: Compute, console: Console,
) -> dict[tuple[int, bool], Tensor]:  # fmt: skip
    """Encode pictures (number, mirrored) with the VAE into their files, while threads decode the next pictures."""
    vae = model.load_vae(base, compute)
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    latents, items = {}, list(files)
    with ThreadPoolExecutor(2) as readers, console.bar() as bar:

        def read(item: tuple[int, bool]) -> Future[Tensor]:
            return readers.submit(_pixels, pictures[item[0]], fits[item[0]], item[1])

        queue = [read(item) for item in items[:PICTURES_AHEAD]]
        for done, item in enumerate(items, 1):
            pixels = queue.pop(0).result().to(compute.device, vae.dtype)
            queue += [read(later) for later in items[done + PICTURES_AHEAD - 1 :][:1]]
            scaled = ((vae.encode(pixels).latent_dist.mean.float() - shift) * scale)[0].cpu()
            _check_finite(scaled, pictures[item[0]].path.name, "the VAE")
            latents[item] = write_cached(files[item], {"latents": scaled.contiguous()})["latents"]
            bar("pictures", done, len(items))
    del vae
    free_memory(compute.device)
    return latents


def _pixels(picture: Picture, fit: Fit, mirrored: bool) -> Tensor:
    """A picture's pixels, shape (1, 3, H, W), -1 to 1."""
    array = datasets.crop_picture(datasets.open_picture(picture), fit)
    pixels = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    return pixels.flip(-1) if mirrored else pixels


def _mask(mask: Mask, picture: Picture, fit: Fit, cells: Sequence[int], folder: Path, console: Console) -> Tensor:
    """A mask, scaled and cropped like its picture: (1, h, w), the mean over the pixels of each latent cell."""
    key = cache_key("mask", mask.digest, mask.alpha, fit.scaled, fit.crop, fit.size, cells)
    file = folder / f"{key}.safetensors"
    if (entry := read_cached(file, console.say)) is None:
        image = datasets.open_mask(mask).resize((picture.width, picture.height)).convert("RGB")
        pixels = torch.from_numpy(datasets.crop_picture(image, fit)[..., 0].copy())[None].float() / 255
        height, width = cells
        entry = write_cached(file, {"mask": torch.nn.functional.adaptive_avg_pool2d(pixels, (height, width))})
    return entry["mask"]


def _check_finite(x: Tensor, source: str, encoder: str) -> None:
    if not torch.isfinite(x).all():
        raise FloatingPointError(
            f"{encoder} turned {source} into NaN or infinity, which would spoil the LoRA silently. "
            "Use mixed_precision 'no' (or 'bf16' if the card supports it), or the family's fixed VAE."
        )
