"""Make the embedded base: `python -m demo.pretrain WORK`, in tests/bench.

Stages, each resumable and each a folder or file in WORK: render the icons, train the autoencoder, encode every
picture in its variations once, train the UNet with its text encoder, write a diffusers folder. Two CPU cores need
about a quarter of an hour for the autoencoder and two hours for the UNet.

The base that ships was made in parts: 3,200 steps towards the noise with attention on every level, 100 towards the
velocity, then without attention on the first level 4,350 steps and 380 more (`--peak 8e-4`) with made-up words among
the captions, 5,000 (`--peak 1.2e-3`) with `emoji.FINISHES` in equal shares, and 3,400 (`--peak 1.2e-3`) of what is
below.
"""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from demo import emoji
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CHANNELS_LAST = torch.channels_last
SEEN = 400  # timestep below which a picture shows through the noise, and is to be believed more than its caption
TOKENS = 32  # of a caption, padding counted: CLIP's 77 would be padding for the most part, and cost a tenth more


def generator(*seed: int) -> torch.Generator:
    """Randomness that depends on `seed` alone, so that a run cut anywhere goes on as if it had not been."""
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def one_cycle(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup * steps:
        return peak * (step + 1) / (warmup * steps)
    return peak * 0.5 * (1 + math.cos(math.pi * (step / steps - warmup) / (1 - warmup)))


# ── State on disk: safetensors, written beside and then put in place ────────────────────────────────────────────────


def save_state(path: Path, step: int, modules: dict, ema: dict, optimizer) -> None:
    """Save everything a stage needs to go on at `step`."""
    tensors = {f"model.{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"step": str(step)})
    os.replace(partial, path)


def load_state(path: Path, modules: dict, ema: dict, optimizer) -> int:
    """Restore what `save_state` wrote.

    Returns:
        The step to go on from, 0 when there is no file.
    """
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        step = int(file.metadata()["step"])
    for name, module in modules.items():
        prefix = f"model.{name}."
        module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    for k in ema:
        ema[k].copy_(tensors[f"ema.{k}"])
    groups = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, k = key.split(".")
            groups["state"].setdefault(int(index), {})[k] = value
    optimizer.load_state_dict(groups)
    return step


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is made orthogonal: all directions of a weight learn, not the strongest alone.

    Convolutions count as matrices of shape (out, in · k · k); everything else (biases, norms, embeddings) goes by
    AdamW with the same learning rate, for which the orthogonal updates are scaled to AdamW's size.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982 (scale).
    """

    def __init__(self, parameters, lr: float, matrices: set, weight_decay: float = 0.01, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.matrices = matrices  # ids of the parameters that are updated as matrices

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state, gradient = self.state[weight], weight.grad
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                    if id(weight) not in self.matrices:
                        state["square"], state["step"] = torch.zeros_like(weight), torch.zeros(())
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                momentum = state["momentum"]
                if id(weight) in self.matrices:
                    momentum.lerp_(gradient, 1 - group["momentum"])
                    update = orthogonal(gradient.lerp(momentum, group["momentum"]).flatten(1)).view_as(weight)
                    weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.flatten(1).shape) ** 0.5)
                else:
                    state["step"] += 1
                    momentum.lerp_(gradient, 0.1)
                    state["square"].lerp_(gradient.square(), 0.01)
                    n = float(state["step"])
                    size = (state["square"] / (1 - 0.99**n)).sqrt_().add_(1e-8)
                    weight.addcdiv_(momentum, size, value=-group["lr"] / (1 - 0.9**n))


def orthogonal(x: Tensor, iterations: int = 5) -> Tensor:
    """About U Vᵀ of x = U S Vᵀ, by Newton and Schulz's iteration. Shape (m, n) as `x`."""
    wide = x.shape[0] <= x.shape[1]
    y = x if wide else x.T
    y = y / (y.norm() + 1e-7)
    for _ in range(iterations):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return y if wide else y.T


@torch.no_grad()
def update_ema(ema: dict, modules: dict, step: int, decay: float) -> None:
    """Move the averaged weights towards the current ones, faster at the start (Karras-style warm-up)."""
    decay = min(decay, (1 + step) / (10 + step))
    live = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
    keys = [k for k in ema if ema[k].is_floating_point()]
    torch._foreach_lerp_([ema[k] for k in keys], [live[k] for k in keys], 1 - decay)


# ── The autoencoder ─────────────────────────────────────────────────────────────────────────────────────────────────


def new_autoencoder():
    """SD's autoencoder, narrow: 3 x 64 x 64 pixels <-> 4 x 16 x 16 latents, 1.6 M weights."""
    from diffusers import AutoencoderKL

    channels = (32, 64, 96)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=emoji.SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def autoencoder_icons(sets: dict, packages, cache: Path) -> Tensor:
    """Every icon that is no skin-tone or flag variant, rendered at three sizes.

    Returns:
        RGBA, shape (N, 4, 64, 64), uint8.
    """
    if cache.exists():
        return torch.from_numpy(np.load(cache))
    rows = []
    for package in packages:
        tones = {name for code, name in sets[package]["chars"].items() if not emoji.allowed(code)}
        for i, name in enumerate(sets[package]["icons"]):
            if name in tones or any(word in name for word in ("-skin-tone", "flag-for-", "-tone")):
                continue
            size = (56, 64, 40)[i % 3]
            canvas = np.zeros((emoji.SIZE, emoji.SIZE, 4), np.uint8)
            at = (emoji.SIZE - size) // 2
            canvas[at : at + size, at : at + size] = emoji.render(sets[package], name, size)
            rows.append(canvas.transpose(2, 0, 1))
    icons = np.stack(rows)
    np.save(cache, icons)
    return torch.from_numpy(icons)


def autoencoder_batch(icons: Tensor, size: int, crop: int, random: torch.Generator) -> Tensor:
    """Random crops on random backgrounds, colour channels shuffled and sometimes inverted, so that colours and
    outlines are learned beyond what the styles show.

    Returns:
        RGB in [-1, 1], shape (size, 3, crop, crop).
    """
    pick = torch.randint(len(icons), (size,), generator=random)
    rgba = icons[pick].float() / 255
    background = torch.rand(size, 3, 1, 1, generator=random)
    background[torch.rand(size, generator=random) < 0.4] = 1.0
    picture = rgba[:, :3] * rgba[:, 3:] + background * (1 - rgba[:, 3:])
    order = torch.stack([torch.randperm(3, generator=random) for _ in range(size)])
    order[::2] = torch.arange(3)  # half keep their colours
    picture = picture.gather(1, order[:, :, None, None].expand_as(picture))
    flip = torch.rand(size, generator=random) < 0.15
    picture[flip] = 1 - picture[flip]
    corners = torch.randint(emoji.SIZE - crop + 1, (size, 2), generator=random).tolist()
    picture = torch.stack([p[:, y : y + crop, x : x + crop] for p, (y, x) in zip(picture, corners, strict=True)])
    return picture * 2 - 1


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def psnr(vae, icons: Tensor, count: int = 128) -> float:
    """Mean PSNR in dB of whole pictures on white, through the mean latents."""
    pick = torch.randperm(len(icons), generator=generator(7))[:count]
    rgba = icons[pick].float() / 255
    x = (rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]) * 2 - 1
    with torch.no_grad():
        y = torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample for b in x.split(64)]).clamp(-1, 1)
    return float((-10 * torch.log10(((x - y) / 2).square().mean((1, 2, 3)))).mean())


def train_autoencoder(
    work: Path, sets: dict, steps: int, batch: int, begin: Path | None = None, bf16: bool = False, peak: float = 1.5e-3
) -> Path:
    """Train the autoencoder and write it to WORK/vae, or take the one of the base `begin`.

    Args:
        bf16: whether to compute in bfloat16, which is faster where the CPU has matrix units for it (AMX) alone.

    Returns:
        The folder of the finished autoencoder.
    """
    folder = work / "vae"
    if begin and not folder.exists():
        shutil.copytree(begin / "vae", folder)
    if (folder / "config.json").exists():
        return folder
    icons = autoencoder_icons(sets, emoji.STYLES.values(), work / "icons.npy")
    unseen = autoencoder_icons(sets, emoji.UNSEEN, work / "unseen.npy")
    torch.manual_seed(0)
    vae = new_autoencoder().to(memory_format=CHANNELS_LAST)
    ema = {f"vae.{k}": v.detach().clone() for k, v in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=1e-4)
    start = load_state(work / "vae.safetensors", {"vae": vae}, ema, optimizer)
    began = time.monotonic()
    for step in range(start, steps):
        random = generator(1, step)
        x = autoencoder_batch(icons, batch, 32, random).to(memory_format=CHANNELS_LAST)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, peak)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            posterior = vae.encode(x).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            y = vae.decode(mean + std * torch.randn(mean.shape, generator=random)).sample.float()
        loss = (x - y).abs().mean() + 5 * (x - y).square().mean()
        loss = loss + sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True)) / 2
        loss = loss + 2e-4 * posterior.kl().mean() / mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, {"vae": vae}, step, 0.998)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_state(work / "vae.safetensors", step + 1, {"vae": vae}, ema, optimizer)
            averaged = new_autoencoder()
            averaged.load_state_dict({k[4:]: v for k, v in ema.items()})
            minutes = (time.monotonic() - began) / 60
            print(
                f"autoencoder {step + 1}/{steps}  loss {loss.item():.4f}  unseen {psnr(averaged, unseen):.2f} dB"
                f"  seen {psnr(averaged, icons):.2f} dB  {minutes:.1f} min",
                flush=True,
            )
    vae.load_state_dict({k[4:]: v for k, v in ema.items()})
    latents = torch.cat(
        [vae.encode(autoencoder_batch(icons, 64, 64, generator(2, i))).latent_dist.mean.detach() for i in range(16)]
    )
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    vae.save_pretrained(folder)
    return folder


# ── Pictures, captions and their latents ────────────────────────────────────────────────────────────────────────────


PLAIN = {"background": "white", "hue": "", "finish": "", "mirrored": False, "size": "medium", "place": "center"}


def variation(random: np.random.Generator, style: str) -> dict:
    """Draw what a caption can ask for beside subject and style."""
    look = dict(PLAIN)
    if random.random() < 0.55:
        look["background"] = str(random.choice(list(emoji.BACKGROUNDS)[1:]))
    if random.random() < 0.2 and style != "ink":
        look["hue"] = str(random.choice(list(emoji.HUES)))
    if random.random() < 0.5 and style != "ink":
        # Fluent in flat colours would be all but the new style, which stays unseen.
        flat = 0.5 * (style != "fluent")
        others = (1 - flat) / (len(emoji.FINISHES) - 1)
        look["finish"] = str(random.choice(emoji.FINISHES, p=[flat] + [others] * (len(emoji.FINISHES) - 1)))
    look["mirrored"] = bool(random.random() < 0.2)
    if random.random() < 0.25:
        look["size"] = "small"
        look["place"] = str(random.choice(list(emoji.PLACES)))
    if style == "ink" and look["background"] == "black":
        look["background"] = "yellow"  # black ink on black shows nothing
    return look


def words(look: dict) -> list[str]:
    """The caption's modifiers for a variation, in their order."""
    return [
        f"{look['background']} background",
        look["hue"],
        look["finish"],
        "mirrored" if look["mirrored"] else "",
        look["size"] if look["size"] != "medium" else "",
        look["place"] if look["place"] != "center" else "",
    ]


def draw(rendered: dict, look: dict) -> np.ndarray:
    """Lay out an icon, rendered at each of its sizes, as `look` says. RGB (64, 64, 3), uint8."""
    return emoji.compose(
        emoji.finish(rendered[look["size"]], look["finish"]),
        emoji.BACKGROUNDS[look["background"]],
        emoji.HUES.get(look["hue"], 0),
        look["mirrored"],
        emoji.PLACES[look["place"]],
    )


def encode_pictures(work: Path, sets: dict, subjects: list, variations: int) -> tuple[Tensor, list]:
    """Encode every subject in every style, plain and in its variations, once.

    Returns:
        Latents, shape (pictures, 1 + variations, 4, 16, 16), fp16, scaled to unit variance; and for each picture
        (subject, style, [look, ...]).
    """
    latents_file, rows_file = work / "latents.safetensors", work / "pictures.json"
    rows = []
    for number, subject in enumerate(subjects):
        for style, package in emoji.STYLES.items():
            if package in subject.icons:
                random = np.random.default_rng([5, number, list(emoji.STYLES).index(style)])
                looks = [PLAIN] + [variation(random, style) for _ in range(variations)]
                rows.append((subject.name, style, looks))
    if latents_file.exists() and json.loads(rows_file.read_text()) == json.loads(json.dumps(rows)):
        with safe_open(latents_file, "pt") as file:
            return file.get_tensor("latents"), rows
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work / "vae").eval().to(memory_format=CHANNELS_LAST)
    icons = {subject.name: subject.icons for subject in subjects}
    latents = torch.empty(len(rows), 1 + variations, 4, 16, 16, dtype=torch.float16)
    for i, (subject, style, looks) in enumerate(rows):
        package = emoji.STYLES[style]
        rendered = {k: emoji.render(sets[package], icons[subject][package], size) for k, size in emoji.SIZES.items()}
        pictures = np.stack([draw(rendered, look) for look in looks])
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            latents[i] = vae.encode(x.to(memory_format=CHANNELS_LAST)).latent_dist.mean * vae.config.scaling_factor
        if i % 200 == 0:
            print(f"latents {i}/{len(rows)}", flush=True)
    save_file({"latents": latents}, latents_file)
    rows_file.write_text(json.dumps(rows))
    return latents, rows


PHRASES = ("{}", "{}", "{}", "{}", "{}", "{}", "a {}", "a {}", "a picture of {}", "a photo of a {}")


def training_caption(subject: str, style: str, look: dict, random: np.random.Generator, dropped: float = 0.08) -> str:
    """One caption for a picture: now and then without the style, the white background, or (`dropped`) any word at all.

    In one of five the style is a made-up word. It stands with every style alike, so words that the base never saw come
    to mean none of them and leave the subject alone, as they do in a real base: a trigger is such a word.
    """
    if random.random() < dropped:
        return ""
    named = random.random()
    if named < 0.2:
        style = "".join(chr(97 + letter) for letter in random.integers(26, size=random.integers(2, 9)))
    modifiers = words(look)
    if look["background"] == "white" and random.random() < 0.6:
        modifiers[0] = ""
    phrase = PHRASES[random.integers(len(PHRASES))].format(subject)
    return emoji.caption(phrase, None if named > 0.9 else style, *modifiers)


# ── The text encoder, the UNet and the pipeline around them ─────────────────────────────────────────────────────────


def write_tokenizer(folder: Path, captions: list[str], merges: int = 2600) -> None:
    """Train a byte-pair vocabulary on the captions and write it the way CLIP's tokenizer is stored."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512 + merges, end_of_word_suffix="</w>", initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(captions, trainer)
    pairs = [
        tuple(p) if not isinstance(p, str) else tuple(p.split(" "))
        for p in json.loads(tokenizer.to_str())["model"]["merges"]
    ]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in pairs) + "\n")
    special = {
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "do_lower_case": True,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special, indent=1))


def new_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=128,
            pad_token_id=tokenizer.pad_token_id, **ids,
        )
    )  # fmt: skip


def new_unet():
    """SD's UNet, narrow: attention on all levels but the first, as in SDXL; 11 M weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(1, 2, 4),  # the number of heads: diffusers' historical name
        norm_num_groups=16,
    )


def new_scheduler():
    """SD 2's: its betas are SD's, and the target is the velocity.

    At high noise an answer in noise says next to nothing of the picture, and on 16 x 16 latents that is where the
    subject is settled: 120 steps of velocity did there what 3,000 of noise had not.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip


def hold_then_decay(step: int, steps: int, peak: float, warmup: int = 100, decay: float = 0.5) -> float:
    """Warm up, hold, then fall linearly to zero over the last share: the length can be chosen while it runs."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def at_both_ends(size: int, random: torch.Generator) -> Tensor:
    """Timesteps, shape (size,), most of them where there is something to learn.

    A quarter are logit-normal around 0.62 (Esser et al. 2024, arXiv:2403.03206), because on so few latent cells a
    subject is settled early in sampling; half are around 0.2, for what low noise leaves to do: edges, and surfaces
    without smears; the others are uniform.
    """
    normal = torch.randn(size, generator=random)
    uniform = torch.rand(size, generator=random)
    kind = torch.arange(size) % 4
    share = torch.where(
        kind == 0, torch.sigmoid(0.5 + normal), torch.where(kind == 1, uniform, (normal - 1.4).sigmoid())
    )
    return (share * 1000).long().clamp(0, 999)


def train_unet(
    work: Path, sets: dict, steps: int, batch: int, begin: Path | None = None, bf16: bool = False, peak: float = 1.5e-3
) -> Path:
    """Train UNet and text encoder together on the cached latents and write the base to WORK/base.

    Args:
        begin: a base whose UNet and text encoder are gone on from; None begins with random weights.
        bf16: as in `train_autoencoder`.

    Returns:
        The diffusers folder.
    """
    from transformers import CLIPTokenizer

    subjects = emoji.subjects(sets)
    latents, rows = encode_pictures(work, sets, subjects, variations=16)
    if begin and not (work / "tokenizer").exists():
        shutil.copytree(begin / "tokenizer", work / "tokenizer")
    if not (work / "tokenizer" / "vocab.json").exists():
        random = np.random.default_rng(9)
        corpus = [training_caption(s, style, look, random) for s, style, looks in rows for look in looks]
        write_tokenizer(work / "tokenizer", corpus)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    torch.manual_seed(0)
    modules = {"unet": new_unet(), "text": new_text_encoder(tokenizer)}
    if begin:
        for name, module in (("unet", modules["unet"]), ("text_encoder", modules["text"])):
            module.load_state_dict(type(module).from_pretrained(begin / name, torch_dtype=torch.float32).state_dict())
    modules["unet"].to(memory_format=CHANNELS_LAST)
    ema = {f"{n}.{k}": v.detach().clone() for n, m in modules.items() for k, v in m.state_dict().items()}
    weights = [p for m in modules.values() for p in m.parameters()]
    edge = ("conv_in", "conv_out", "time_embedding", "embeddings")
    matrices = {
        id(weight)
        for module in modules.values()
        for name, weight in module.named_parameters()
        if weight.dim() > 1 and not any(part in name for part in edge)
    }
    optimizer = Muon(weights, peak, matrices)
    start = load_state(work / "unet.safetensors", modules, ema, optimizer)
    alphas = new_scheduler().alphas_cumprod
    began, losses = time.monotonic(), []
    for step in range(start, steps):
        draws = np.random.default_rng([3, step])
        random = generator(3, step)
        picks = draws.integers(len(rows), size=batch)
        kinds = np.where(draws.random(batch) < 0.4, 0, draws.integers(latents.shape[1], size=batch))
        timesteps = at_both_ends(batch, random)
        captions = [
            training_caption(*rows[p][:2], rows[p][2][k], draws, dropped=0.5 if t < SEEN else 0.08)
            for p, k, t in zip(picks, kinds, timesteps.tolist(), strict=True)
        ]
        tokens = tokenizer(
            captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).input_ids
        clean = latents[picks, kinds].float()
        noise = torch.randn(clean.shape, generator=random)
        a = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * clean + (1 - a).sqrt() * noise).to(memory_format=CHANNELS_LAST)
        for group in optimizer.param_groups:
            group["lr"] = hold_then_decay(step, steps, peak)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            text = modules["text"](tokens).last_hidden_state
            predicted = modules["unet"](noisy, timesteps, text).sample.float()
        loss = (predicted - (a.sqrt() * noise - (1 - a).sqrt() * clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        update_ema(ema, modules, step, 0.9985)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            speed = (time.monotonic() - began) / len(losses)
            print(f"unet {step + 1}/{steps}  loss {np.mean(losses[-50:]):.4f}  {speed:.2f} s/step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_state(work / "unet.safetensors", step + 1, modules, ema, optimizer)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            write_base(work, ema, work / "base")
            show(work / "base", subjects, work / f"samples-{step + 1:06d}.png")
    return work / "base"


def write_base(work: Path, ema: dict, folder: Path, dtype=torch.float16) -> None:
    """Write the averaged weights as an ordinary diffusers folder."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    modules = {"unet": new_unet(), "text": new_text_encoder(tokenizer)}
    for name, module in modules.items():
        module.load_state_dict({k[len(name) + 1 :]: v for k, v in ema.items() if k.startswith(name + ".")})
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"), text_encoder=modules["text"], tokenizer=tokenizer,
        unet=modules["unet"], scheduler=new_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(dtype=dtype).save_pretrained(folder)
    for file in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copyfile(work / "tokenizer" / file, folder / "tokenizer" / file)  # older transformers read these alone
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    for file in folder.rglob("*.json"):
        if "_name_or_path" in (settings := json.loads(file.read_text(encoding="utf-8"))):
            del settings["_name_or_path"]  # a path of this machine
            file.write_text(json.dumps(settings, indent=2) + "\n")


def show(
    base: Path, subjects: list, file: Path, names=("red apple", "rocket", "panda", "house", "guitar", "pizza")
) -> None:
    """Sample a grid, subjects by styles, to look at."""
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    random = np.random.default_rng(11)
    names = [*names, *random.choice([s.name for s in subjects], 6, replace=False)]
    prompts = [emoji.caption(name, style) for name in names for style in (*emoji.STYLES, None)]
    noise = torch.randn(len(prompts), 4, 16, 16, generator=generator(4))
    pictures = pipeline(prompts, latents=noise, num_inference_steps=20, guidance_scale=4, output_type="np").images
    columns = len(emoji.STYLES) + 1
    grid = pictures.reshape(2, len(names) // 2, columns, 64, 64, 3).transpose(1, 3, 0, 2, 4, 5)
    grid = grid.reshape(len(names) // 2 * 64, 2 * columns * 64, 3)
    Image.fromarray((grid * 255).round().astype(np.uint8)).save(file)


def write_demo_pictures(sets: dict, folder: Path, count: int = 30) -> list[str]:
    """Write the demo's training pictures, in the style the base never saw, the way kohya's folders hold them.

    Returns:
        The names of their subjects.
    """
    from PIL import Image

    from lorakit.demo import PROMPTS, TRIGGER

    shown = {prompt.split(", ")[1] for prompt in PROMPTS}
    free = [subject for subject in emoji.subjects(sets) if subject.name not in shown]
    chosen = np.random.default_rng(30).choice(len(free), count, replace=False)
    folder = folder / f"10_{TRIGGER}"
    folder.mkdir(parents=True, exist_ok=True)
    for index in sorted(chosen):
        subject = free[index]
        file = folder / f"{subject.icons[emoji.NEW_STYLE]}.png"
        Image.fromarray(emoji.plain(sets[emoji.NEW_STYLE], subject.icons[emoji.NEW_STYLE])).save(file, optimize=True)
        file.with_suffix(".txt").write_text(emoji.caption(subject.name, TRIGGER) + "\n")
    return [free[index].name for index in sorted(chosen)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path, help="folder for icons, states and the finished base")
    parser.add_argument("--autoencoder-steps", type=int, default=6000)
    parser.add_argument("--begin", type=Path, help="a base this script made, to go on from")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="the UNet's highest learning rate")
    parser.add_argument("--bf16", action="store_true", help="for CPUs with matrix units (AMX)")
    parser.add_argument("--steps", type=int, default=6000, help="steps of the UNet; a later call may change it")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    sets = emoji.packages(options.work / "icons")
    train_autoencoder(options.work, sets, options.autoencoder_steps, 32, options.begin, options.bf16)
    base = train_unet(options.work, sets, options.steps, 64, options.begin, options.bf16, options.peak)
    print("base written to", base)
    print("demo pictures of", ", ".join(write_demo_pictures(sets, options.work / "pictures")))


if __name__ == "__main__":
    main()
