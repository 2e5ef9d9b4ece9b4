"""Train the judge that the other measurements ask: what is on this picture, and in which style is it drawn?

    python tests/bench/judge.py --icons ICONS --base BASE --out judge.safetensors

A small conv net, trained on the true pictures of every subject in the four pretraining styles and in the demo's new
one. It never sees a picture that a diffusion model made, so its training pictures are distorted the way a small
diffusion model and its autoencoder distort theirs, and half of them have been through the base's own autoencoder.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo import emoji
from demo.eyes import WRONG, backgrounds, distort, flatten, reconstruct
from demo.pretrain import CHANNELS_LAST, generator, load_state, one_cycle, save_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.evaluate.vision import trunk

NEW = "flat"  # the judge's word for emoji.NEW_STYLE
PACKAGES = {**emoji.STYLES, NEW: emoji.NEW_STYLE}
SHARPNESS = 16.0  # cosine -> logit: the temperature of the normalised softmax over subjects
PEAK = 2e-3  # learning rate
EXAM = 600  # pictures the judge is marked on


# ── The network ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Judge(nn.Module):
    """Names the subject and the style of pictures with two nets, 1.7 M weights in all.

    One net for both learned styles far more slowly: subjects want what styles share, styles what they do not.

    Args:
        subjects: names, in the order of the rows of `self.names`.
        styles: words, in the order of the style net's outputs.
    """

    def __init__(self, subjects: list[str], styles: list[str]):
        super().__init__()
        self.subject_names, self.style_names = list(subjects), list(styles)
        self.shape = trunk(32, 64, 128, 256)
        self.embed = nn.Sequential(nn.Dropout(0.1), nn.Linear(4 * 256, 128))
        self.names = nn.Parameter(torch.randn(len(subjects), 128))
        self.texture = trunk(32, 64, 128)  # gradients against flat fills show at fine scales
        self.style = nn.Sequential(nn.Linear(2 * 128, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, len(styles)))

    def forward(self, x: Tensor, again: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures in [-1, 1], shape (N, 3, 64, 64) -> what `subjects`, `styles` and `distance` are made of.

        Args:
            again: the same pictures as the style net shall see them, where that differs.

        Returns:
            Unit subject embeddings (N, 128), style features (N, 256), style logits (N, styles).
        """
        embedding = self.embed(F.adaptive_avg_pool2d(self.shape(x), 2).flatten(1)).float()
        texture = self.texture(x if again is None else again).float()
        texture = torch.cat([texture.mean((2, 3)), texture.amax((2, 3))], 1)
        return F.normalize(embedding, dim=1), texture, self.style(texture).float()

    def cosines(self, embedding: Tensor) -> Tensor:
        """Similarity of unit embeddings (N, 128) to every subject's, shape (N, subjects)."""
        return embedding @ F.normalize(self.names, dim=1).T

    @torch.no_grad()
    def read(self, pictures: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` on RGB pictures (N, 64, 64, 3), uint8, in batches."""
        if pictures.dtype != np.uint8 or pictures.shape[1:] != (emoji.SIZE, emoji.SIZE, 3):
            raise ValueError(f"The judge reads uint8 pictures (N, 64, 64, 3), not {pictures.dtype} {pictures.shape}.")
        self.eval()
        batches = torch.from_numpy(pictures).permute(0, 3, 1, 2).split(128)
        outputs = [self((b.float() / 127.5 - 1).contiguous(memory_format=CHANNELS_LAST)) for b in batches]
        return tuple(torch.cat(part) for part in zip(*outputs, strict=True))

    @torch.no_grad()
    def subjects(self, pictures: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The nearest subject's name for each picture (N, 64, 64, 3), uint8, and its cosine similarity, shape (N,)."""
        best = self.cosines(self.read(pictures)[0]).max(1)
        return [self.subject_names[i] for i in best.indices], best.values.numpy()

    def styles(self, pictures: np.ndarray) -> np.ndarray:
        """Probability of each style in the order of `style_names`, shape (N, styles)."""
        return self.read(pictures)[2].softmax(1).numpy()

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """How unlike two stacks of pictures look to the judge: 1 - cosine, subject and texture halved, shape (N,)."""
        (subject, texture, _), (other, grain, _) = self.read(a), self.read(b)
        return (1 - ((subject * other).sum(1) + F.cosine_similarity(texture, grain)) / 2).numpy()


def load(path: Path) -> Judge:
    """Read a judge that `main` wrote."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
        judge = Judge(json.loads(about["subjects"]), json.loads(about["styles"]))
        judge.load_state_dict({k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118
    return judge.eval().to(memory_format=CHANNELS_LAST)


# ── The pictures ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Pictures:
    """Every subject in every style that draws it."""

    subjects: list  # of emoji.Subject
    rgba: Tensor  # (N, 4, 64, 64), uint8, alpha not premultiplied: medium, centred
    subject: Tensor  # (N,), index into subjects
    style: Tensor  # (N,), index into PACKAGES


def draw_all(sets: dict) -> Pictures:
    subjects = emoji.subjects(sets)
    rows = [
        (emoji.render(sets[package], subject.icons[package], emoji.SIZES["medium"]), s, k)
        for s, subject in enumerate(subjects)
        for k, package in enumerate(PACKAGES.values())
        if package in subject.icons
    ]
    icons, subject, style = zip(*rows, strict=True)
    rgba = torch.from_numpy(np.stack(icons)).permute(0, 3, 1, 2)
    edge = (emoji.SIZE - emoji.SIZES["medium"]) // 2
    return Pictures(subjects, F.pad(rgba, [edge] * 4), torch.tensor(subject), torch.tensor(style))


def reconstructions(vae, pictures: Pictures, copies: int) -> Tensor:
    """Every picture `copies` times through the autoencoder with wrong latents, shape (copies, N, 3, 64, 64), uint8."""
    pool = torch.empty(copies, len(pictures.rgba), 3, emoji.SIZE, emoji.SIZE, dtype=torch.uint8)
    for copy in range(copies):
        for i, rgba in enumerate(pictures.rgba.split(64)):
            random = generator(21, copy, i)
            rgb = flatten(rgba, backgrounds(len(rgba), random))
            pool[copy, i * 64 : i * 64 + len(rgba)] = reconstruct(vae, rgb, WRONG, random)
    return pool


# ── Training and its own marks ──────────────────────────────────────────────────────────────────────────────────────


def draw_batch(pictures: Pictures, keep: Tensor, size: int, random: torch.Generator) -> Tensor:
    """Rows, shape (size,), in random order: half one by one, half as all the styles of a few subjects.

    Side by side, the styles of one subject differ in nothing but style.
    """
    alone = keep[torch.randint(len(keep), (size // 2,), generator=random)]
    place = torch.randperm(len(pictures.subjects), generator=random)
    together = keep[place[pictures.subject[keep]].sort(stable=True).indices[: size - len(alone)]]
    return torch.cat([alone, together])[torch.randperm(size, generator=random)]


def train(pictures: Pictures, pool: Tensor | None, keep: Tensor, steps: int, batch: int, state: Path) -> Judge:
    """Train a judge on the rows in `keep`, going on from `state` where that file exists."""
    torch.manual_seed(0)
    judge = Judge([s.name for s in pictures.subjects], list(PACKAGES)).to(memory_format=CHANNELS_LAST)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.05)
    start = load_state(state, {"judge": judge}, {}, optimizer)
    began, marks = time.monotonic(), []
    for step in range(start, steps):
        random = generator(22, step)
        rows = draw_batch(pictures, keep, batch, random)
        rgba = pictures.rgba[rows]
        if pool is not None:
            copies = torch.randint(len(pool), (batch,), generator=random)
            opaque = F.pad(pool[copies, rows], [0, 0, 0, 0, 0, 1], value=255)
            rgba = torch.where(torch.rand(batch, 1, 1, 1, generator=random) < 0.6, opaque, rgba)
        # A subject has to be known by a poor drawing, too; a style can only be told where its texture is left.
        x, again = (
            (distort(rgba, random, most) * 2 - 1).contiguous(memory_format=CHANNELS_LAST) for most in (3.0, 1.0)
        )
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, PEAK)
        judge.train()
        torch.manual_seed(step)  # dropout
        embedding, _, styles = judge(x, again)
        subjects = judge.cosines(embedding) * SHARPNESS
        loss = F.cross_entropy(subjects, pictures.subject[rows])
        loss = loss + F.cross_entropy(styles, pictures.style[rows], label_smoothing=0.03)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = [subjects.argmax(1) == pictures.subject[rows], styles.argmax(1) == pictures.style[rows]]
        marks.append([loss.item(), *(r.float().mean().item() for r in right)])
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_state(state, step + 1, {"judge": judge}, {}, optimizer)
            mean, speed = np.mean(marks[-100:], 0), (time.monotonic() - began) / len(marks)
            print(
                f"judge {step + 1}/{steps}  loss {mean[0]:.3f}  subject {mean[1]:.1%}  style {mean[2]:.1%}"
                f"  {speed:.2f} s/step",
                flush=True,
            )
    return judge.eval()


def marks(judge: Judge, pictures: Pictures, rows: Tensor, rgb: Tensor) -> dict:
    """Top-1 shares on pictures `rgb`, in [0, 255], of `rows`; and how often each style is called each style."""
    embedding, _, styles = judge.read(rgb.round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    subject = (judge.cosines(embedding).argmax(1) == pictures.subject[rows]).float().mean()
    true = pictures.style[rows]
    called, meant = (F.one_hot(k, len(PACKAGES)).float() for k in (styles.argmax(1), true))
    confusion = meant.T @ called / meant.sum(0)[:, None].clamp(min=1)
    share = (styles.argmax(1) == true).float().mean()
    return {"pictures": len(rows), "subject": float(subject), "style": float(share), "confusion": confusion.tolist()}


def examine(judge: Judge, pictures: Pictures, rows: Tensor, vae) -> dict:
    """Mark the judge on `rows`: as they are, distorted as never before, and through the autoencoder."""
    plain = flatten(pictures.rgba[rows])
    report = {"plain": marks(judge, pictures, rows, plain * 255)}
    for name, most in {"distorted": 1.0, "distorted as only a subject survives": 3.0}.items():
        seen = [distort(pictures.rgba[r], generator(23, i), most) for i, r in enumerate(rows.split(64))]
        report[name] = marks(judge, pictures, rows, torch.cat(seen) * 255)
    if vae is not None:
        for name, noise in {"autoencoder": 0.0, "autoencoder, wrong latents": WRONG}.items():
            seen = [reconstruct(vae, rgb, noise, generator(24, i)) for i, rgb in enumerate(plain.split(64))]
            report[name] = marks(judge, pictures, rows, torch.cat(seen))
    return report


def show(report: dict) -> None:
    for name, mark in report.items():
        print(f"\n{name}: {mark['pictures']} pictures, subject {mark['subject']:.1%}, style {mark['style']:.1%}")
        print(f"{'true / called':>14}" + "".join(f"{style:>9}" for style in PACKAGES))
        for style, row in zip(PACKAGES, mark["confusion"], strict=True):
            print(f"{style:>14}" + "".join(f"{share:9.1%}" for share in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, default=Path("~/.cache/lorakit/icons").expanduser(), help="icon sets")
    parser.add_argument("--base", type=Path, help="diffusers folder whose autoencoder half of the pictures pass")
    parser.add_argument("--out", type=Path, default=Path("judge.safetensors"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hold-out", type=float, default=0.0, help="share of (subject, style) pairs never trained on")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(emoji.packages(options.icons))
    order = torch.randperm(len(pictures.rgba), generator=generator(20))
    unseen, keep = order.tensor_split([round(options.hold_out * len(order))])
    vae = pool = None
    if options.base:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(options.base / "vae", torch_dtype=torch.float32)
        vae = vae.eval().to(memory_format=CHANNELS_LAST)
        cache = options.out.with_suffix(".reconstructions.npy")
        if not cache.exists():
            print("passing pictures through the autoencoder", flush=True)
            np.save(cache, reconstructions(vae, pictures, 2).numpy())
        pool = torch.from_numpy(np.load(cache))
    state = options.out.with_suffix(".state")
    judge = train(pictures, pool, keep, options.steps, options.batch, state)
    report = examine(judge, pictures, keep[:EXAM], vae)
    if len(unseen):
        report |= {f"never trained on, {k}": v for k, v in examine(judge, pictures, unseen[:EXAM], vae).items()}
    show(report)
    about = {"subjects": judge.subject_names, "styles": judge.style_names, "report": report}
    partial = options.out.with_suffix(".partial")
    tensors = {k: v.contiguous() for k, v in judge.state_dict().items()}
    save_file(tensors, partial, metadata={k: json.dumps(v) for k, v in about.items()})
    os.replace(partial, options.out)
    print("\nwritten to", options.out)


if __name__ == "__main__":
    main()
