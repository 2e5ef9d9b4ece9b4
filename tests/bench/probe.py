"""Whether a base's answer (epsilon, v, or a flow's velocity) is recognised from four pictures of any style.

    python tests/bench/probe.py WORK

The embedded base predicts v. Its twins predict epsilon and a rectified flow's velocity: copies of its UNet,
trained on its own answers, converted exactly (`tests/train/test_prediction.py`). Draws of four pictures
come from six styles: the demo's drawings as they are, grey, inverted, in other colours, as outlines, and photographs
from the wheels of scikit-image. Each draw is of one style or of several, in turn. WORK keeps the trained twins.
"""

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from PIL import Image, ImageFilter, ImageOps
from safetensors.torch import load_file, save_file

from lorakit import dataset, demo
from lorakit.base import model as bases
from lorakit.base.encode import encode_pictures, encode_texts
from lorakit.device import Compute
from lorakit.train import loss, prediction
from lorakit.train.examples import Examples

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "train")]
COMPUTE = Compute(torch.device("cpu"), torch.float32)
STYLES = {
    "drawn": lambda image: image,
    "grey": lambda image: image.convert("L").convert("RGB"),
    "inverted": ImageOps.invert,
    "other colours": lambda image: Image.merge("RGB", image.split()[::-1]),
    "outlines": lambda image: ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB"),
}
UNKNOWN = ("outlines", "photographs")  # which the embedded base cannot draw, so that no answer of its is good
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")


def draw(folder: Path) -> None:
    """Pictures of each style with captions, in a folder each."""
    from importlib.util import find_spec

    for style, change in STYLES.items():
        (folder / style).mkdir(parents=True, exist_ok=True)
        for picture in dataset.scan(demo.PICTURES).pictures:
            change(dataset.open_picture(picture)).save(folder / style / f"{picture.path.stem}.png")
            (folder / style / f"{picture.path.stem}.txt").write_text(picture.caption)
    (folder / "photographs").mkdir(exist_ok=True)
    data, chance = Path(find_spec("skimage").origin).parent / "data", random.Random(0)
    for number in range(30):
        name = PHOTOS[number % len(PHOTOS)]
        image = Image.open(data / name).convert("RGB")
        side = chance.randint(100, min(image.size))
        left, top = (chance.randint(0, length - side) for length in image.size)
        image.crop((left, top, left + side, top + side)).resize((64, 64)).save(folder / "photographs" / f"{number}.png")
        (folder / "photographs" / f"{number}.txt").write_text("a photograph")


def train(twin: torch.nn.Module, unet: torch.nn.Module, examples: Examples, steps: int, batch: int = 8) -> None:
    """Teach a UNet (in place) to answer as a twin does, on pictures with noise; both forward processes are seen."""
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-4)
    chance, random_numbers = random.Random(0), torch.Generator().manual_seed(0)
    alphas = bases.open("demo").alphas_cumprod()
    for step in range(steps):
        pictures = chance.choices(examples.pictures, k=batch)
        latents = torch.stack([picture.latents for picture in pictures])
        embeddings = torch.stack([examples.texts[picture.caption].embeddings for picture in pictures])
        noise = torch.randn(latents.shape, generator=random_numbers)
        timesteps = torch.randint(50, 1000, (batch,), generator=random_numbers)  # a flow divides by small ones
        if type(twin).__name__ == "Flow":
            noisy = torch.lerp(latents, noise, (timesteps / 1000).view(-1, 1, 1, 1))
        else:
            noisy = loss.add_noise(latents, noise, alphas[timesteps])
        with torch.no_grad():
            wanted = twin(noisy, timesteps, embeddings).sample
        error = (unet(noisy, timesteps, embeddings).sample - wanted).square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 2e-4 * (1 - step / steps)
        if step % 100 == 0:
            print(f"{type(twin).__name__} {step}: {error.item():.4f}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "probe")
    options = parser.parse_args()
    from base_quality import table, write
    from test_prediction import Epsilon, Flow

    if not (options.work / "pictures").exists():
        draw(options.work / "pictures")
    base, found = bases.open("demo"), dataset.scan(options.work / "pictures")
    fits = dataset.Buckets(64, 16).fit([(picture.width, picture.height) for picture in found.pictures])
    pictures = encode_pictures(base, found.pictures, fits, options.work / "cache", COMPUTE)
    texts = encode_texts(base, {picture.caption for picture in found.pictures}, options.work / "cache", COMPUTE)
    styles = [picture.group for picture in found.pictures]
    every = Examples(pictures, [1] * len(pictures), texts, demo.config())
    unets = {"v_prediction": bases.load_unet(base, COMPUTE)}
    for kind, twin in (("epsilon", Epsilon), ("flow", Flow)):
        unets[kind] = bases.load_unet(base, COMPUTE).requires_grad_(True)
        file = options.work / f"{kind}.safetensors"
        if not file.exists():
            train(twin(unets["v_prediction"], base.alphas_cumprod()), unets[kind], every, options.steps)
            save_file(unets[kind].state_dict(), file)
        unets[kind].load_state_dict(load_file(file))
    rows, facts = [], {}
    for kind, unet in unets.items():
        for zero in (False, True):
            opened, chance = bases.open("demo", zero_terminal_snr=zero), random.Random(0)
            answers: dict[str, list[prediction.Answer]] = {"known": [], "unknown": []}
            for number in range(options.draws):
                style = ([*STYLES, "photographs", None])[number % (len(STYLES) + 2)]  # None: of several
                some = [p for p, of in zip(pictures, styles, strict=True) if style in (None, of)]
                examples = Examples(chance.sample(some, 4), [1] * 4, texts, every.config)
                of = "unknown" if style in UNKNOWN else "known"
                answers[of].append(prediction.probe(unet, opened, examples))
            for of, told in answers.items():
                counts = Counter(str(answer.kind) for answer in told)
                own = [answer.errors[kind] for answer in told]
                wrong = len(told) - counts[kind] - counts["None"]
                rows.append([kind, "yes" if zero else "no", of, str(counts[kind]), str(counts["None"]), str(wrong),
                             f"{min(own):.2f}–{max(own):.2f}"])  # fmt: skip
                facts[f"{kind}, zero terminal SNR {zero}, {of}"] = [answer.errors for answer in told]
    heads = ("the UNet predicts", "zero terminal SNR", "styles", "recognised", "undecided", "wrong", "own error")
    note = f"{options.draws} draws of four pictures for each UNet and schedule; unknown are {' and '.join(UNKNOWN)}."
    write(options.out, "What a base answers with", [table(rows, *heads), note], facts)


if __name__ == "__main__":
    main()
