"""Train the small image–text model that stands beside the embedded base, as CLIP stands beside the real ones.

    python -m lorakit.demo.eyes --work WORK --base lorakit/demo/base --out lorakit/demo/base/eyes

It learns which caption belongs to which picture, from the subjects, styles and looks that the base was taught, half of
them passed through the base's own autoencoder with latents that are a little wrong, as those of a diffusion model are.
The style that the demo's LoRA learns it never sees. It takes about half an hour on two cores, and cut anywhere it goes
on where it was. What it makes is not shipped yet.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.demo import emoji
from lorakit.demo.pretrain import (
    CHANNELS_LAST,
    PLAIN,
    draw,
    generator,
    load_state,
    one_cycle,
    save_state,
    variation,
    words,
)
from lorakit.eyes import vectors

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
WIDTH = 128  # of the embeddings
TOKENS = 32
PEAK = 1.5e-3  # learning rate
WRONG = 0.25  # how far latents are pushed off, at most, as a share of their spread
STYLES = {**emoji.STYLES, "twemoji": "twemoji", "classic": "noto-v1"}  # more than the base knows


def new_model(tokenizer):
    """The two encoders with random weights, 1.7 M in all: ConvNeXt for pictures, CLIP's transformer for texts."""
    from transformers import (
        CLIPTextConfig,
        ConvNextConfig,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
    )

    vision = ConvNextConfig(
        hidden_sizes=[32, 64, 128, 192], depths=[2, 2, 3, 1], patch_size=4, image_size=emoji.SIZE, hidden_size=192,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = VisionTextDualEncoderConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=WIDTH
    )
    return VisionTextDualEncoderModel(config)


def pictures(sets: dict, subjects: list, each: int) -> tuple[np.ndarray, list[tuple[str, str, dict]]]:
    """Every subject in every style that draws it, plain and in variations.

    Returns:
        RGB (N, 64, 64, 3), uint8; and subject, style and look of each.
    """
    seen, rows = [], []
    by_code = {package: {code: name for code, name in sets[package]["chars"].items()} for package in STYLES.values()}
    flat = {name: code for code, name in sets[emoji.NEW_STYLE]["chars"].items()}
    for number, subject in enumerate(subjects):
        code = flat.get(subject.icons[emoji.NEW_STYLE], "")
        for place, (style, package) in enumerate(STYLES.items()):
            icon = subject.icons.get(package) or by_code[package].get(code)
            if icon is None:
                continue
            random = np.random.default_rng([31, number, place])
            rendered = {k: emoji.render(sets[package], icon, size) for k, size in emoji.SIZES.items()}
            for look in [PLAIN, *(variation(random, style) for _ in range(each))]:
                seen.append(draw(rendered, look))
                rows.append((subject.name, style, look))
    return np.stack(seen), rows


@torch.inference_mode()
def passed_through(base: Path, seen: np.ndarray) -> np.ndarray:
    """The pictures as the base's autoencoder gives them back from latents that are a little wrong."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32).eval().to(memory_format=CHANNELS_LAST)
    again = np.empty_like(seen)
    for start in range(0, len(seen), 64):
        random = generator(32, start)
        x = torch.from_numpy(seen[start : start + 64]).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = vae.encode(x.contiguous(memory_format=CHANNELS_LAST)).latent_dist.mean
        # Errors of a diffusion model come in patches as much as in single cells.
        cells = torch.randn(latents.shape, generator=random)
        patches = F.interpolate(torch.randn(len(x), 4, 4, 4, generator=random), size=latents.shape[2:], mode="bicubic")
        share = torch.rand(len(x), 1, 1, 1, generator=random) * WRONG / vae.config.scaling_factor
        y = vae.decode(latents + share * (0.5 * cells + patches)).sample.clamp(-1, 1)
        again[start : start + 64] = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return again


def caption(row: tuple[str, str, dict], random: np.random.Generator) -> str:
    """One of the texts that fit a picture: with its style or without, with some of its look."""
    subject, style, look = row
    modifiers = [word for word in words(look) if word and (word != "white background" or random.random() < 0.3)]
    if random.random() < 0.4:
        modifiers = []
    return emoji.caption(subject, style if random.random() < 0.6 else None, *modifiers)


def moved(x: Tensor, random: torch.Generator) -> Tensor:
    """Pictures (N, 3, 64, 64) in [-1, 1], a little shifted, scaled and recoloured, each by its own."""
    n = len(x)
    even = lambda *shape: torch.rand(n, *shape, generator=random) * 2 - 1  # noqa: E731
    scale = 1 + 0.08 * even()
    rows = [scale, torch.zeros(n), 0.08 * even(), torch.zeros(n), scale, 0.08 * even()]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    x = x * (1 + 0.1 * even(1, 1, 1)) + 0.06 * even(3, 1, 1) + 0.04 * torch.randn(x.shape, generator=random)
    return x.clamp(-1, 1)


def loss_of(image: Tensor, text: Tensor, captions: list[str], scale: Tensor) -> Tensor:
    """CLIP's loss, where texts that are the same all fit. Source: Radford et al. 2021, arXiv:2103.00020."""
    logits = scale.exp().clamp(max=100) * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    numbers = {words: number for number, words in enumerate(dict.fromkeys(captions))}
    same = torch.tensor([numbers[words] for words in captions])
    fits = (same[:, None] == same[None]).float()
    fits = fits / fits.sum(1, keepdim=True)
    return (F.cross_entropy(logits, fits) + F.cross_entropy(logits.T, fits)) / 2


def train(model, tokenizer, seen: np.ndarray, again: np.ndarray, rows: list, steps: int, batch: int, state: Path):
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) is big], "weight_decay": decay}
              for big, decay in ((True, 0.1), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98))
    began, losses = time.monotonic(), []
    for step in range(load_state(state, {"eyes": model}, {}, optimizer), steps):
        random = np.random.default_rng([33, step])
        chosen = random.integers(len(rows), size=batch)
        half = random.random(batch) < 0.5
        x = np.where(half[:, None, None, None], again[chosen], seen[chosen])
        x = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = moved(x, generator(34, step)).contiguous(memory_format=CHANNELS_LAST)
        captions = [caption(rows[i], random) for i in chosen]
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, PEAK)
        model.train()
        image = vectors(model.get_image_features(x))
        text = vectors(model.get_text_features(**{k: tokens[k] for k in ("input_ids", "attention_mask")}))
        loss = loss_of(image, text, captions, model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_state(state, step + 1, {"eyes": model}, {}, optimizer)
            speed = (time.monotonic() - began) / len(losses)
            print(f"eyes {step + 1}/{steps}  loss {np.mean(losses[-100:]):.3f}  {speed:.2f} s/step", flush=True)
    return model.eval()


@torch.inference_mode()
def examine(model, tokenizer, sets: dict, subjects: list) -> dict[str, float]:
    """How often the right name is nearest, of all subjects and of all styles; with the style that it never saw."""
    by_name = torch.nn.functional.normalize
    named = tokenizer([subject.name for subject in subjects], padding=True, return_tensors="pt")
    names = by_name(vectors(model.get_text_features(named["input_ids"], named["attention_mask"])), dim=1)
    told = tokenizer([f"{style} style" for style in emoji.STYLES], padding=True, return_tensors="pt")
    styles = by_name(vectors(model.get_text_features(told["input_ids"], told["attention_mask"])), dim=1)
    marks = {}
    for style, package in {**emoji.STYLES, "the new style": emoji.NEW_STYLE}.items():
        own = [(i, s) for i, s in enumerate(subjects) if package in s.icons]
        drawn = np.stack([emoji.plain(sets[package], s.icons[package]) for _, s in own])
        x = (torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=CHANNELS_LAST)
        images = by_name(torch.cat([vectors(model.get_image_features(part)) for part in x.split(128)]), dim=1)
        right = (images @ names.T).argmax(1) == torch.tensor([i for i, _ in own])
        marks[f"subject, {style}"] = round(float(right.float().mean()), 4)
        if style in emoji.STYLES:
            right = (images @ styles.T).argmax(1) == list(emoji.STYLES).index(style)
            marks[f"style, {style}"] = round(float(right.float().mean()), 4)
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, default=Path("~/.cache/lorakit/icons").expanduser(), help="icon sets")
    parser.add_argument("--base", type=Path, required=True, help="diffusers folder with autoencoder and tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="folder for what can be gone on from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--each", type=int, default=4, help="variations of each picture")
    options = parser.parse_args()
    from transformers import CLIPTokenizer

    options.work.mkdir(parents=True, exist_ok=True)
    sets = emoji.packages(options.icons)
    subjects = emoji.subjects(sets)
    cache = options.work / "eyes-pictures.npy"
    seen, rows = pictures(sets, subjects, options.each)
    print(f"{len(rows)} pictures of {len(subjects)} subjects", flush=True)
    if not cache.exists():
        np.save(cache, passed_through(options.base, seen))
    tokenizer = CLIPTokenizer.from_pretrained(options.base / "tokenizer")
    torch.manual_seed(0)
    model = new_model(tokenizer).to(memory_format=CHANNELS_LAST)
    train(
        model, tokenizer, seen, np.load(cache), rows, options.steps, options.batch,
        options.work / "eyes.state",
    )  # fmt: skip
    marks = examine(model, tokenizer, sets, subjects)
    print(json.dumps(marks, indent=2))
    partial = options.out.with_name(options.out.name + ".partial")
    model.half().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    about = {"size": {"height": emoji.SIZE, "width": emoji.SIZE}, "image_mean": MEAN, "image_std": STD, "marks": marks}
    (partial / "preprocessor_config.json").write_text(json.dumps(about, indent=2) + "\n")
    os.replace(partial, options.out)
    print("written to", options.out)


if __name__ == "__main__":
    main()
