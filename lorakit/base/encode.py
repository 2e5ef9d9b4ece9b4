"""Latents and text embeddings, encoded once and kept by content.

A latent is keyed by (picture bytes, scaling and crop, mirrored, VAE weights, dtype), a text embedding by (caption,
text-encoder weights, clip skip, dtype): an edited caption or a replaced picture is encoded again, nothing else is.
A model is loaded only when something is missing, one at a time, and freed before the next.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorakit import dataset as datasets
from lorakit.base import model
from lorakit.base import prompts as prompts_module
from lorakit.dataset import Fit
from lorakit.device import autocast, free_memory
from lorakit.storage import cache_key, read_cached, write_cached

Progress = Callable[[str, int, int], None]  # what is being encoded, done, of how many


@dataclass(frozen=True)
class Text:
    """One prompt, encoded."""

    embeddings: Tensor  # (tokens, width)
    pooled: Tensor  # (width,): SDXL's second encoder; unused elsewhere
    tokens: Tensor  # (encoders, length), int64: to encode it anew once an encoder has learned
    fragments: tuple[
        prompts_module.Fragment, ...
    ] = ()  # of a prompt with weights or over the length, in place of tokens


@dataclass(frozen=True)
class Encoded:
    """A picture as the loop wants it, on the CPU."""

    latents: Tensor  # (C, h, w), float32, scaled to unit variance
    mirrored: Tensor | None  # the same, left and right exchanged
    sizes: Tensor  # (6,): SDXL's size conditions
    caption: str
    variants: tuple[str, ...] = ()  # of the caption, to draw from; () is the caption alone
    mask: Tensor | None = None  # (1, h, w), float32: 1 where it is trained on, 0 where not
    prior: bool = False  # a regularisation picture


def encode_texts(
    base: model.Base, texts: Iterable[str], folder: Path, *, device: torch.device, dtype: torch.dtype,
    clip_skip: int = 1, progress: Progress | None = None, batch: int = 16, say: Callable[[str], None] = print,
) -> dict[str, Text]:  # fmt: skip
    """Encode texts to the letter with the base's text encoders, reusing what `folder` holds. What is too long is cut.

    Args:
        say: told of what is there and damaged.

    Returns:
        text -> its embeddings. SDXL's are those of both encoders side by side, and the second's pooled one.

    Raises:
        FloatingPointError: an encoder answers NaN or infinity; names the text.
    """

    def answers(encoder, tokenizer, some: Sequence[str]) -> Iterable[Sequence[Tensor]]:
        tokens = model.tokenize(tokenizer, some)
        return zip(*model.encode(encoder, tokens.to(device), base.family, clip_skip), tokens, strict=True)

    keys = {text: ("text 2", text) for text in texts}
    parts = _encode(base, keys, answers, folder, device, dtype, clip_skip, progress, batch, say)
    return {text: _text(own) for text, own in parts.items()}


def encode_prompts(
    base: model.Base, prompts: Iterable[str], folder: Path, *, device: torch.device, dtype: torch.dtype,
    clip_skip: int = 1, progress: Progress | None = None, say: Callable[[str], None] = print,
) -> dict[str, Text]:  # fmt: skip
    """Encode prompts as `prompting` reads them, with weights and of any length; else as `encode_texts`."""
    prompts = list(dict.fromkeys(prompts))
    special = {prompt: fragments for prompt in prompts if (fragments := prompts_module.special(prompt, base))}
    plain = {prompt: prompts_module.words(prompt) for prompt in prompts if prompt not in special}

    def answers(encoder, tokenizer, some: Sequence[str]) -> Iterable[Sequence[Tensor]]:
        return [prompts_module.encode(base, encoder, tokenizer, special[prompt], clip_skip, say) for prompt in some]

    keys = {prompt: ("prompt", prompts_module.can_weigh(), fragments) for prompt, fragments in special.items()}
    parts = _encode(base, keys, answers, folder, device, dtype, clip_skip, progress, 1, say)
    texts = encode_texts(
        base, plain.values(), folder, device=device, dtype=dtype, clip_skip=clip_skip, progress=progress, say=say
    )
    long = {prompt: _text(own, special[prompt]) for prompt, own in parts.items()}
    return {prompt: texts[text] for prompt, text in plain.items()} | long


@torch.no_grad()
def _encode(
    base: model.Base, keys: Mapping[str, tuple], answers: Callable[..., Iterable[Sequence[Tensor]]], folder: Path,
    device: torch.device, dtype: torch.dtype, clip_skip: int, progress: Progress | None, batch: int,
    say: Callable[[str], None],
) -> dict[str, list[dict[str, Tensor]]]:  # fmt: skip
    """What each encoder says of texts, from `folder`, or by `answers` where it is missing there.

    Args:
        keys: text → what its entry is known by, besides the encoder.
        answers: called with an encoder, its tokenizer and up to `batch` texts; embeddings, pooled and tokens of each.
    """
    parts: dict[str, list[dict[str, Tensor]]] = {text: [] for text in keys}
    for which in base.text_encoders if keys else ():
        own = (model.fingerprint(base, which), clip_skip, base.family, str(dtype))
        names = {text: folder / f"{cache_key(*key, *own)}.safetensors" for text, key in keys.items()}
        found = {text: read_cached(name, say) for text, name in names.items()}
        missing = [text for text in keys if found[text] is None]
        if missing:
            encoder, tokenizer = model.load_text_encoder(base, dtype, device, which)
            for start in range(0, len(missing), batch):
                some = missing[start : start + batch]
                for text, answer in zip(some, answers(encoder, tokenizer, some), strict=True):
                    embeddings, pooled, tokens = (part.cpu().contiguous() for part in answer)
                    _finite(embeddings, f"the text {text!r}", which)
                    entry = {"embeddings": embeddings, "pooled": pooled, "tokens": tokens}
                    found[text] = write_cached(names[text], entry)
                if progress:
                    progress("captions", start + len(some), len(missing))
            del encoder
            free_memory(device)
        for text in keys:
            parts[text].append(found[text])
    return parts


def _text(parts: Sequence[dict[str, Tensor]], fragments: tuple[prompts_module.Fragment, ...] = ()) -> Text:
    """What all encoders say of a text, side by side."""
    embeddings = torch.cat([part["embeddings"] for part in parts], dim=-1)
    return Text(embeddings, parts[-1]["pooled"], torch.stack([part["tokens"] for part in parts]), fragments)


def pad_text(text: Text, empty: Text, length: int) -> Text:
    """A text of so many tokens at least: filled up with the empty prompt, as A1111 does."""
    stretches = max(0, -(-(length - len(text.embeddings)) // len(empty.embeddings)))
    return (
        replace(text, embeddings=torch.cat([text.embeddings, *[empty.embeddings] * stretches])) if stretches else text
    )


@torch.no_grad()
def reencode_texts(
    base: model.Base, encoders: Mapping[str, torch.nn.Module], texts: Sequence[Text], clip_skip: int = 1
) -> list[Text]:
    """Texts as text encoders say them now that an adapter is in them; with none, the texts as they are.

    Args:
        encoders: name → encoder, as `base.encode_anew` takes them.
    """
    if not encoders:
        return list(texts)
    some = next(iter(encoders.values()))
    found = {
        place: _special_anew(base, encoders, text, clip_skip) for place, text in enumerate(texts) if text.fragments
    }
    plain = [place for place in range(len(texts)) if place not in found]
    if plain:
        embeddings, pooled, tokens = (
            torch.stack([getattr(texts[place], part) for place in plain]).to(some.device)
            for part in ("embeddings", "pooled", "tokens")
        )
        with autocast(some.device, some.dtype):
            embeddings, pooled = model.reencode(base, encoders, embeddings, pooled, tokens, clip_skip)
        for place, *said in zip(plain, embeddings.cpu(), pooled.cpu(), strict=True):
            found[place] = Text(*said, texts[place].tokens)
    return [found[place] for place in range(len(texts))]


def _special_anew(base: model.Base, encoders: Mapping[str, torch.nn.Module], text: Text, clip_skip: int) -> Text:
    widths = [base.configs[which]["hidden_size"] for which in base.text_encoders]
    parts = list(text.embeddings.split(widths, dim=-1))
    pooled = text.pooled
    for place, which in enumerate(base.text_encoders):
        if which in encoders:
            tokenizer = model.load_tokenizer(base, which)
            own = prompts_module.encode(base, encoders[which], tokenizer, text.fragments, clip_skip, lambda _: None)
            parts[place] = own[0].cpu().to(text.embeddings.dtype)
            pooled = own[1].cpu() if which == base.text_encoders[-1] else pooled
    return Text(torch.cat(parts, dim=-1), pooled, text.tokens, text.fragments)


@torch.no_grad()
def encode_pictures(
    base: model.Base, pictures: Sequence[datasets.Picture], fits: Sequence[Fit], folder: Path, *,
    device: torch.device, dtype: torch.dtype, flip: bool = False, masks: Sequence[datasets.Mask | None] = (),
    progress: Progress | None = None, say: Callable[[str], None] = print,
) -> list[Encoded]:  # fmt: skip
    """Encode pictures with the base's VAE, reusing what `folder` holds.

    Args:
        fits: how each picture is scaled and cropped.
        flip: encode the mirrored pictures too (mirroring latents is not the same).
        masks: of each picture, None for one that counts as a whole; () for none at all.
        say: told of what is there and damaged.

    Raises:
        FloatingPointError: the VAE answers NaN or infinity; names the picture.
    """
    weights = model.fingerprint(base, "vae")
    wanted = []
    for number, (picture, fit) in enumerate(zip(pictures, fits, strict=True)):
        for mirrored in (False, True)[: 1 + flip]:
            key = cache_key("latents", picture.digest, fit.scaled, fit.crop, fit.size, mirrored, weights, str(dtype))
            wanted.append((number, mirrored, folder / f"{key}.safetensors"))
    found = {(number, mirrored): read_cached(file, say) for number, mirrored, file in wanted}
    missing = [entry for entry in wanted if found[entry[:2]] is None]
    if missing:
        vae = model.load_vae(base, dtype, device)
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0

        def pixels(entry) -> Tensor:
            number, mirrored, _ = entry
            array = datasets.crop(datasets.open_picture(pictures[number]), fits[number])
            x = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            return x.flip(-1) if mirrored else x

        with ThreadPoolExecutor(2) as readers:  # the next pictures are decoded while this one is encoded
            ahead = [readers.submit(pixels, entry) for entry in missing[:8]]
            for done, (number, mirrored, file) in enumerate(missing, 1):
                x = ahead.pop(0).result().to(device, vae.dtype)
                if done + 7 < len(missing):
                    ahead.append(readers.submit(pixels, missing[done + 7]))
                latents = ((vae.encode(x).latent_dist.mean.float() - shift) * scale)[0].cpu()
                _finite(latents, pictures[number].path.name, "the VAE")
                found[number, mirrored] = write_cached(file, {"latents": latents.contiguous()})
                if progress:
                    progress("pictures", done, len(missing))
        del vae
        free_memory(device)
    encoded = []
    for number, (picture, fit, mask) in enumerate(zip(pictures, fits, masks or [None] * len(fits), strict=True)):
        (left, top), (width, height) = fit.crop, fit.size
        sizes = model.size_conditions((picture.height, picture.width), (top, left), (height, width))
        mirrored = found[number, True]["latents"] if flip else None
        latents = found[number, False]["latents"]
        seen = _mask(mask, picture, fit, latents.shape[-2:], folder, say) if mask else None
        encoded.append(Encoded(latents, mirrored, sizes, picture.caption, mask=seen))
    return encoded


def _mask(
    mask: datasets.Mask, picture: datasets.Picture, fit: Fit, cells: tuple[int, int], folder: Path,
    say: Callable[[str], None],
) -> Tensor:  # fmt: skip
    """A mask, scaled and cropped as its picture: (1, h, w), the mean over the pixels of each latent cell."""
    file = folder / f"{cache_key('mask', mask.digest, mask.alpha, fit.scaled, fit.crop, fit.size, cells)}.safetensors"
    if (found := read_cached(file, say)) is None:
        image = datasets.open_mask(mask).resize((picture.width, picture.height)).convert("RGB")
        pixels = torch.from_numpy(datasets.crop(image, fit)[..., 0].copy())[None].float() / 255
        found = write_cached(file, {"mask": torch.nn.functional.adaptive_avg_pool2d(pixels, cells)})
    return found["mask"]


def _finite(x: Tensor, what: str, who: str) -> None:
    if not torch.isfinite(x).all():
        raise FloatingPointError(
            f"{who} turned {what} into NaN or infinity, which would spoil the LoRA without a word. "
            "Use mixed_precision 'no' (or 'bf16' where the card has it), or the family's fixed VAE."
        )
