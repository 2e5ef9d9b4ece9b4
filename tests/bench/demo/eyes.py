"""Train the small image–text model that stands beside the embedded base, as CLIP stands beside the real ones.

    cd tests/bench
    python -m demo.eyes --work WORK --base ../../lorakit/demo/base --out ../../lorakit/demo/base/eyes

It learns which subject and which style a picture shows, each by the words that the base has for it, from what the base
was taught and one style more. Pictures are spoiled as a small diffusion model spoils its own, and most of them have
been through the base's own autoencoder. The styles that LoRAs are taught in the demo and in tests/bench/ it never sees.
Cut anywhere it goes on where it was.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo import emoji
from demo.pretrain import (
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
from safetensors.torch import save_file
from torch import Tensor

from lorakit.base import model as bases
from lorakit.device import Compute
from lorakit.evaluate.vision import EmbeddedVision

STYLES = {**emoji.STYLES, "classic": "noto-v1"}  # one more than the base knows
SHARPNESS = 16.0  # cosine → logit
PEAK = 2e-3  # learning rate
WRONG = 0.2  # how far latents are pushed off, at most, as a share of their spread
TEXTS = 12  # captions of each subject that are drawn from


# ── The pictures ────────────────────────────────────────────────────────────────────────────────────────────────────


def pictures(sets: dict, subjects: list, each: int) -> tuple[np.ndarray, list[tuple[int, str, dict]]]:
    """Every subject in every style that draws it, plain and in variations.

    Returns:
        RGB (N, 64, 64, 3), uint8; and subject, style and look of each.
    """
    seen, rows = [], []
    for number, subject in enumerate(subjects):
        for place, (style, package) in enumerate(STYLES.items()):
            if package not in subject.icons:
                continue
            random = np.random.default_rng([31, number, place])
            rendered = {k: emoji.render(sets[package], subject.icons[package], size) for k, size in emoji.SIZES.items()}
            for look in [PLAIN, *(variation(random, style) for _ in range(each))]:
                seen.append(draw(rendered, look))
                rows.append((number, style, look))
    return np.stack(seen), rows


@torch.inference_mode()
def through(vae, seen: np.ndarray) -> np.ndarray:
    """The pictures as the base's autoencoder gives them back from latents that are a little wrong."""
    again = np.empty_like(seen)
    for start in range(0, len(seen), 64):
        x = torch.from_numpy(seen[start : start + 64]).permute(0, 3, 1, 2).float() / 255
        again[start : start + 64] = reconstruct(vae, x, WRONG, generator(32, start)).permute(0, 2, 3, 1).numpy()
    return again


def flatten(rgba: Tensor, background: Tensor | float = 1.0) -> Tensor:
    """RGBA in [0, 255] on a background in [0, 1] -> RGB in [0, 1]."""
    rgba = rgba.float() / 255
    return rgba[:, :3] * rgba[:, 3:] + background * (1 - rgba[:, 3:])


def backgrounds(n: int, random: torch.Generator) -> Tensor:
    """Mostly white, else one of the captions' colours, shape (n, 3, 1, 1), in [0, 1]."""
    colours = torch.tensor(list(emoji.BACKGROUNDS.values())) / 255
    pick = torch.randint(len(colours), (n,), generator=random)
    pick[torch.rand(n, generator=random) < 0.6] = 0
    return colours[pick, :, None, None]


@torch.inference_mode()
def reconstruct(vae, pictures: Tensor, noise: float = 0.0, random: torch.Generator | None = None) -> Tensor:
    """RGB in [0, 1] through the autoencoder, with latents off by up to `noise` of their spread; uint8."""
    latents = vae.encode((pictures * 2 - 1).contiguous(memory_format=CHANNELS_LAST)).latent_dist.mean
    if noise:
        # Errors of a diffusion model come in patches as much as in single cells.
        cells = torch.randn(latents.shape, generator=random)
        coarse = torch.randn(len(latents), 4, 4, 4, generator=random)
        patches = F.interpolate(coarse, size=latents.shape[2:], mode="bicubic")
        strength = torch.rand(len(latents), 1, 1, 1, generator=random) * noise / vae.config.scaling_factor
        latents = latents + strength * (0.5 * cells + patches)
    return ((vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def distort(rgba: Tensor, random: torch.Generator, most: float = 1.0) -> Tensor:
    """What a small diffusion model gets wrong: place, shape, colour, sharpness, patches.

    Args:
        rgba: shape (N, 4, 64, 64), in [0, 255], alpha not premultiplied.
        most: at 1, what a style survives; at 3, what a subject does.

    Returns:
        RGB in [0, 1], shape (N, 3, 64, 64).
    """
    n, side = len(rgba), emoji.SIZE
    much = most * torch.rand(n, generator=random)  # each picture by another share of what is below
    even = lambda *shape: (torch.rand(n, *shape, generator=random) * 2 - 1) * per(much, *shape)  # noqa: E731
    rough = lambda *shape: torch.randn(n, *shape, generator=random) * per(even(), *shape)  # noqa: E731
    seldom = lambda share: torch.rand(n, generator=random) < share  # noqa: E731

    turn, scale, mirror = even() * 0.03, 1 + even() * 0.04, torch.where(seldom(0.03), -1, 1)
    rows = [scale * mirror * turn.cos(), -scale * turn.sin(), even() * 0.04]
    rows += [scale * mirror * turn.sin(), scale * turn.cos(), even() * 0.04]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(rgba.shape), align_corners=False)
    wobble = F.interpolate(rough(2, 5, 5) * 0.016, size=side, mode="bicubic")
    rgba = rgba.float() / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    rgba = F.grid_sample(rgba, grid + wobble.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    x = rgba[:, :3] + backgrounds(n, random) * (1 - rgba[:, 3:])

    degrees = torch.where(seldom(0.03), even() * 180, even() * 6)
    x = torch.einsum("nij,njhw->nihw", hue_matrices(degrees), x)
    x = (x - 0.5) * (1 + 0.08 * even(1, 1, 1)) + 0.5 + 0.03 * even(3, 1, 1)

    kernel = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = (kernel[:, None] * kernel).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(x, [2] * 4, mode="replicate"), kernel, groups=3)
    x = x + (blurred - x) * ((even(1, 1, 1) + per(much, 1, 1, 1) / 2) / 2).clamp(-1, 1)  # below 0 sharpens
    few = n // 8  # rows come in random order
    small = int(torch.randint(36, 60, (1,), generator=random))
    small = F.interpolate(x[:few], size=small, mode="bilinear", antialias=True)
    x = torch.cat([F.interpolate(small, size=side, mode="bilinear"), x[few:]])

    x = x + F.interpolate(rough(3, 8, 8) * 0.03, size=side, mode="bilinear") + rough(3, side, side) * 0.02
    at, half = torch.rand(2, n, 1, 1, 1, generator=random) * side, 3 + torch.rand(2, n, 1, 1, 1, generator=random) * 6
    line = torch.arange(side)
    hole = ((line[:, None] - at[0]).abs() < half[0]) & ((line - at[1]).abs() < half[1]) & per(seldom(0.2), 1, 1, 1)
    return torch.where(hole, torch.rand(n, 3, 1, 1, generator=random), x).clamp(0, 1)


def per(values: Tensor, *shape: int) -> Tensor:
    """One value a row, shape (n,), spread over rows of `shape` dimensions: (n, 1, 1, ...)."""
    return values.view(-1, *[1] * len(shape))


def hue_matrices(degrees: Tensor) -> Tensor:
    """RGB -> RGB of turned hue, one 3 x 3 matrix for each angle (`emoji.turn_hue`, in bulk)."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    turn = torch.deg2rad(degrees)
    rotate = torch.eye(3).repeat(len(degrees), 1, 1)
    rotate[:, 1, 1] = rotate[:, 2, 2] = turn.cos()
    rotate[:, 2, 1], rotate[:, 1, 2] = turn.sin(), -turn.sin()
    return torch.linalg.inv(to_yiq) @ rotate @ to_yiq


# ── Training ────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def texts(model: EmbeddedVision, tokenizer, subjects: list, looks: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Features of TEXTS captions of every subject, (TEXTS, S, 256), and which of `looks` each tells of, -1 for none."""
    captions, told = [], []
    for number in range(TEXTS):
        for place, subject in enumerate(subjects):
            random = np.random.default_rng([35, number, place])
            named = int(random.integers(len(looks))) if number and random.random() < 0.7 else -1
            style, finish = looks[named] if named >= 0 else (None, "")
            look = PLAIN | {"finish": finish} | ({"mirrored": True} if random.random() < 0.1 else {})
            more = [word for word in words(look) if word]
            more[0] = more[0] if number and random.random() < 0.3 else ""  # the white background
            captions.append(emoji.caption(subject.name, style, *more))
            told.append(named)
    found = [features(model, tokenizer, captions[start : start + 256]) for start in range(0, len(captions), 256)]
    return torch.cat(found).view(TEXTS, len(subjects), -1), torch.tensor(told).view(TEXTS, -1)


def features(model: EmbeddedVision, tokenizer, captions: list[str]) -> Tensor:
    tokens = tokenizer(
        captions, padding=True, truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    return model.features(tokens["input_ids"], tokens["attention_mask"])


def train(
    model: EmbeddedVision, tokenizer, subjects: list, seen: np.ndarray, again: np.ndarray, rows: list, steps: int,
    batch: int, state: Path,
) -> EmbeddedVision:  # fmt: skip
    """Train the two nets and the words' head, going on from `state` where that file exists."""
    looks = sorted({(style, look["finish"]) for _, style, look in rows})
    subject_of = torch.tensor([number for number, _, _ in rows])
    look_of = torch.tensor([looks.index((style, look["finish"])) for _, style, look in rows])
    said, told = texts(model, tokenizer, subjects, looks)
    tellers = [(told == k).nonzero() for k in range(len(looks))]  # captions that tell of a look
    if missing := [looks[k] for k, some in enumerate(tellers) if not len(some)]:
        raise ValueError(f"No caption tells of {missing}: draw more than {TEXTS} of each subject.")
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.05)
    began, marks = time.monotonic(), []
    for step in range(load_state(state, {"eyes": model}, {}, optimizer), steps):
        random, numbers = generator(34, step), np.random.default_rng([33, step])
        chosen = torch.from_numpy(numbers.integers(len(rows), size=batch))
        passed = torch.from_numpy(numbers.random(batch) < 0.6).view(-1, 1, 1, 1)
        both = (torch.from_numpy(array[chosen.numpy()]).permute(0, 3, 1, 2) for array in (again, seen))
        opaque = F.pad(torch.where(passed, *both), [0, 0, 0, 0, 0, 1], value=255)
        # A subject has to be known by a poor drawing, too; a style can only be told where its texture is left.
        x, textured = (
            (distort(opaque, random, most) * 2 - 1).contiguous(memory_format=CHANNELS_LAST) for most in (3.0, 1.0)
        )
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, PEAK)
        model.train()
        torch.manual_seed(step)  # dropout
        variants = torch.from_numpy(numbers.integers(TEXTS, size=len(subjects)))
        names, spoken = model.read(said[variants, torch.arange(len(subjects))])
        silent = told[variants, torch.arange(len(subjects))] < 0
        of_looks = [some[numbers.integers(len(some))] for some in tellers]
        styles = F.normalize(model.read(torch.stack([said[n, s] for n, s in of_looks]))[1], dim=1)
        subject, style = model.see(x, textured)
        by_subject, by_style = SHARPNESS * subject @ names.T, SHARPNESS * style @ styles.T
        loss = F.cross_entropy(by_subject, subject_of[chosen]) + F.cross_entropy(by_style, look_of[chosen])
        loss = loss + spoken[silent].square().sum(1).mean() + (1 - spoken[~silent].norm(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = [by_subject.argmax(1) == subject_of[chosen], by_style.argmax(1) == look_of[chosen]]
        marks.append([loss.item(), *(r.float().mean().item() for r in right)])
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_state(state, step + 1, {"eyes": model}, {}, optimizer)
            mean, speed = np.mean(marks[-100:], 0), (time.monotonic() - began) / len(marks)
            print(
                f"eyes {step + 1}/{steps}  loss {mean[0]:.3f}  subject {mean[1]:.1%}  look {mean[2]:.1%}"
                f"  {speed:.2f} s/step",
                flush=True,
            )
    return model.eval()


@torch.inference_mode()
def examine(model: EmbeddedVision, tokenizer, sets: dict, subjects: list, vae) -> dict[str, float]:
    """Of plain pictures through the autoencoder: how often the right name is nearest, of all subjects and styles."""
    names = model.read(features(model, tokenizer, [subject.name for subject in subjects]))[0]
    words = model.read(features(model, tokenizer, [f"{style} style, thing" for style in STYLES]))[1]
    marks = {}
    for style, package in {**STYLES, "the demo's": emoji.NEW_STYLE}.items():
        own = [(i, s) for i, s in enumerate(subjects) if package in s.icons]
        drawn = np.stack([emoji.plain(sets[package], s.icons[package]) for _, s in own])
        x = torch.from_numpy(through(vae, drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = [model.see(part.contiguous(memory_format=CHANNELS_LAST)) for part in x.split(128)]
        subject, drawing = (torch.cat(part) for part in zip(*found, strict=True))
        right = (subject @ names.T).argmax(1) == torch.tensor([i for i, _ in own])
        marks[f"subject, {style}"] = round(float(right.float().mean()), 4)
        if style in STYLES:
            right = (drawing @ words.T).argmax(1) == list(STYLES).index(style)
            marks[f"style, {style}"] = round(float(right.float().mean()), 4)
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, default=Path("~/.cache/lorakit/icons").expanduser(), help="icon sets")
    parser.add_argument("--base", required=True, help="the base whose autoencoder and text encoder are used")
    parser.add_argument("--work", type=Path, required=True, help="folder for what can be gone on from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--each", type=int, default=5, help="variations of each picture")
    options = parser.parse_args()

    options.work.mkdir(parents=True, exist_ok=True)
    sets = emoji.packages(options.icons)
    subjects = emoji.subjects(sets)
    cpu = torch.device("cpu")
    base = bases.open(options.base)
    encoder, tokenizer = bases.load_text_encoder(base, Compute(cpu, torch.float32))
    vae = bases.load_vae(base, Compute(cpu, torch.float32)).to(memory_format=CHANNELS_LAST)
    seen, rows = pictures(sets, subjects, options.each)
    print(f"{len(rows)} pictures of {len(subjects)} subjects", flush=True)
    cache = options.work / "eyes-pictures.npy"
    if not cache.exists():
        np.save(cache, through(vae, seen))
    torch.manual_seed(0)
    model = EmbeddedVision(encoder).to(memory_format=CHANNELS_LAST)
    state = options.work / "eyes.state"
    train(model, tokenizer, subjects, seen, np.load(cache), rows, options.steps, options.batch, state)
    marks = examine(model, tokenizer, sets, subjects, vae)
    print(json.dumps(marks, indent=2))
    options.out.mkdir(parents=True, exist_ok=True)
    tensors = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    partial = options.out / "model.partial"
    save_file(tensors, partial, metadata={"marks": json.dumps(marks)})
    os.replace(partial, options.out / "model.safetensors")
    print("written to", options.out)


if __name__ == "__main__":
    main()
