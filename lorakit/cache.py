"""Latents and text embeddings, encoded once and kept by content.

A latent is keyed by (picture bytes, scaling and crop, mirrored, VAE weights, dtype), a text embedding by (caption,
text-encoder weights, clip skip, dtype): an edited caption or a replaced picture is encoded again, nothing else is.
A model is loaded only when something is missing, one at a time, and freed before the next.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit import base as bases
from lorakit import buckets, dataset, files
from lorakit.buckets import Fit

Progress = Callable[[str, int, int], None]  # what is being encoded, done, of how many


@dataclass(frozen=True)
class Text:
    """One prompt, encoded."""

    embeddings: Tensor  # (tokens, width)
    pooled: Tensor  # (width,): SDXL's second encoder; unused elsewhere
    tokens: Tensor  # (encoders, length), int64: to encode it anew once an encoder has learned


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


def _key(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def digest(tensors: Mapping[str, Tensor], facts: dict | None = None) -> str:
    """A digest of tensors, on the CPU, and what is said of them, hex."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _read(file: Path, say: Callable[[str], None]) -> dict[str, Tensor] | None:
    """A cached entry; None when it is missing or damaged, which only means that it is encoded again."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            if digest(tensors) == (handle.metadata() or {}).get("digest"):
                return tensors
    except (OSError, SafetensorError):
        pass
    say(f"cache     {file.name} is damaged: encoded again")
    return None


def _write(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    with files.replacing(file) as partial:
        save_file(tensors, partial, {"digest": digest(tensors)})
    return tensors


def free(device: torch.device) -> None:
    """Hand freed memory back, after the last reference to a model is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def encode_texts(
    base: bases.Base, prompts: Iterable[str], folder: Path, *, device: torch.device, dtype: torch.dtype,
    clip_skip: int = 1, progress: Progress | None = None, batch: int = 16, say: Callable[[str], None] = print,
) -> dict[str, Text]:  # fmt: skip
    """Encode prompts with the base's text encoders, reusing what `folder` holds.

    Args:
        say: told of what is there and damaged.

    Returns:
        prompt -> its embeddings. SDXL's are those of both encoders side by side, and the second's pooled one.

    Raises:
        FloatingPointError: an encoder answers NaN or infinity; names the prompt.
    """
    prompts = list(dict.fromkeys(prompts))
    parts: dict[str, list[dict[str, Tensor]]] = {prompt: [] for prompt in prompts}
    for which in base.text_encoders:
        weights = bases.fingerprint(base, which)
        names = {
            p: folder / f"{_key('text 2', p, weights, clip_skip, base.family, str(dtype))}.safetensors" for p in prompts
        }
        found = {p: _read(names[p], say) for p in prompts}
        missing = [p for p in prompts if found[p] is None]
        if missing:
            encoder, tokenizer = bases.load_text_encoder(base, dtype, device, which)
            for start in range(0, len(missing), batch):
                some = missing[start : start + batch]
                tokens = bases.tokenize(tokenizer, some)
                with torch.no_grad():
                    embeddings, pooled = bases.encode(encoder, tokens.to(device), base.family, clip_skip)
                for prompt, e, p, t in zip(some, embeddings.cpu(), pooled.cpu(), tokens, strict=True):
                    _finite(e, f"the text {prompt!r}", which)
                    entry = {"embeddings": e.contiguous(), "pooled": p.contiguous(), "tokens": t.contiguous()}
                    found[prompt] = _write(names[prompt], entry)
                if progress:
                    progress("captions", start + len(some), len(missing))
            del encoder
            free(device)
        for prompt in prompts:
            parts[prompt].append(found[prompt])
    return {
        prompt: Text(
            torch.cat([part["embeddings"] for part in own], dim=-1), own[-1]["pooled"],
            torch.stack([part["tokens"] for part in own]),
        )
        for prompt, own in parts.items()
    }  # fmt: skip


@torch.no_grad()
def encode_anew(
    base: bases.Base, encoders: Mapping[str, torch.nn.Module], texts: Sequence[Text], clip_skip: int = 1
) -> list[Text]:
    """Texts as text encoders say them now that an adapter is in them; with none, the texts as they are.

    Args:
        encoders: name → encoder, as `base.encode_anew` takes them.
    """
    if not encoders:
        return list(texts)
    some = next(iter(encoders.values()))
    embeddings, pooled, tokens = (
        torch.stack([getattr(text, part) for text in texts]).to(some.device)
        for part in ("embeddings", "pooled", "tokens")
    )
    with bases.autocast(some.device, some.dtype):
        embeddings, pooled = bases.encode_anew(base, encoders, embeddings, pooled, tokens, clip_skip)
    return [Text(e, p, text.tokens) for e, p, text in zip(embeddings.cpu(), pooled.cpu(), texts, strict=True)]


@torch.no_grad()
def encode_pictures(
    base: bases.Base, pictures: Sequence[dataset.Picture], fits: Sequence[Fit], folder: Path, *,
    device: torch.device, dtype: torch.dtype, flip: bool = False, masks: Sequence[dataset.Mask | None] = (),
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
    weights = bases.fingerprint(base, "vae")
    wanted = []
    for number, (picture, fit) in enumerate(zip(pictures, fits, strict=True)):
        for mirrored in (False, True)[: 1 + flip]:
            key = _key("latents", picture.digest, fit.scaled, fit.crop, fit.size, mirrored, weights, str(dtype))
            wanted.append((number, mirrored, folder / f"{key}.safetensors"))
    found = {(number, mirrored): _read(file, say) for number, mirrored, file in wanted}
    missing = [entry for entry in wanted if found[entry[:2]] is None]
    if missing:
        vae = bases.load_vae(base, dtype, device)
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0

        def pixels(entry) -> Tensor:
            number, mirrored, _ = entry
            array = buckets.apply(dataset.open_picture(pictures[number]), fits[number])
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
                found[number, mirrored] = _write(file, {"latents": latents.contiguous()})
                if progress:
                    progress("pictures", done, len(missing))
        del vae
        free(device)
    encoded = []
    for number, (picture, fit, mask) in enumerate(zip(pictures, fits, masks or [None] * len(fits), strict=True)):
        (left, top), (width, height) = fit.crop, fit.size
        sizes = bases.size_conditions((picture.height, picture.width), (top, left), (height, width))
        mirrored = found[number, True]["latents"] if flip else None
        latents = found[number, False]["latents"]
        seen = _mask(mask, picture, fit, latents.shape[-2:], folder, say) if mask else None
        encoded.append(Encoded(latents, mirrored, sizes, picture.caption, mask=seen))
    return encoded


def _mask(
    mask: dataset.Mask, picture: dataset.Picture, fit: Fit, cells: tuple[int, int], folder: Path,
    say: Callable[[str], None],
) -> Tensor:  # fmt: skip
    """A mask, scaled and cropped as its picture: (1, h, w), the mean over the pixels of each latent cell."""
    file = folder / f"{_key('mask', mask.digest, mask.alpha, fit.scaled, fit.crop, fit.size, cells)}.safetensors"
    if (found := _read(file, say)) is None:
        image = dataset.open_mask(mask).resize((picture.width, picture.height)).convert("RGB")
        pixels = torch.from_numpy(buckets.apply(image, fit)[..., 0].copy())[None].float() / 255
        found = _write(file, {"mask": torch.nn.functional.adaptive_avg_pool2d(pixels, cells)})
    return found["mask"]


def _finite(x: Tensor, what: str, who: str) -> None:
    if not torch.isfinite(x).all():
        raise FloatingPointError(
            f"{who} turned {what} into NaN or infinity, which would spoil the LoRA without a word. "
            "Use mixed_precision 'no' (or 'bf16' where the card has it), or the family's fixed VAE."
        )
