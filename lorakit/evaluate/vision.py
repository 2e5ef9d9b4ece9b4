"""Vision models for the report, which turn pictures and texts into vectors: CLIP, DINOv2, the embedded base's own."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit import base as bases
from lorakit import storage
from lorakit.device import Compute, choose_device, quiet_libraries

MODELS = {  # name → hub id, revision; each keeps its weights as safetensors
    "clip": ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", None),
    "clip-large": ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", None),
    "dinov2": ("facebook/dinov2-base", None),
}
EMBEDDED = Path(__file__).parents[1] / "demo" / "base" / "eyes"
TOKENS = 77  # longest text


@dataclass(frozen=True)
class VisionModel:
    """A model that turns pictures and, unless it is DINOv2, texts into vectors."""

    name: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)  # None where the model reads no texts
    size: int  # side of the square that the model takes, in pixels
    mean: tuple[float, float, float]  # of the three colours, as the model was trained with them
    std: tuple[float, float, float]
    batch: int = 16

    @property
    def reads_texts(self) -> bool:
        return self.tokenizer is not None

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors of pictures of any sizes, (N, D), float32; their cosine says how alike two pictures are."""
        mean, std = (np.array(values, np.float32) for values in (self.mean, self.std))
        outputs = []
        for start in range(0, len(pictures), self.batch):
            squares = np.stack([np.asarray(self._square(p), np.float32) for p in pictures[start : start + self.batch]])
            x = torch.from_numpy((squares / 255 - mean) / std).permute(0, 3, 1, 2).to(next(self.model.parameters()))
            if hasattr(self.model, "get_image_features"):
                outputs.append(vectors(self.model.get_image_features(pixel_values=x)))
            else:
                outputs.append(self.model(pixel_values=x).last_hidden_state[:, 0])  # the class token
        return _unit(outputs)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, (N, D), float32, in the space of the pictures'; only where the model reads texts."""
        limit, outputs = min(TOKENS, getattr(self.tokenizer, "model_max_length", TOKENS)), []
        for start in range(0, len(texts), self.batch):
            tokens = self.tokenizer(
                list(texts[start : start + self.batch]), padding=True, truncation=True, max_length=limit,
                return_tensors="pt",
            )  # fmt: skip
            device = next(self.model.parameters()).device
            inputs = {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}
            outputs.append(vectors(self.model.get_text_features(**inputs)))
        return _unit(outputs)

    def _square(self, picture: Image.Image) -> Image.Image:
        """The whole picture, centred on a square of its mean colour."""
        picture = picture.convert("RGB")
        side, colour = max(picture.size), tuple(np.asarray(picture).mean((0, 1)).astype(int).tolist())
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square if side == self.size else square.resize((self.size, self.size), Image.Resampling.BICUBIC)


def open(name: str = "clip", device: str = "auto") -> VisionModel:
    """Load a vision model.

    Args:
        name: one of MODELS, "demo" for the embedded base's own, or a folder or hub id of a transformers model.

    Raises:
        FileNotFoundError: no such model, or the hub is out of reach.
        ValueError: not a vision model, or its weights are pickles.
    """
    target = choose_device(device)
    if name == "demo":
        return _embedded(target)
    return _open(name, storage.fetch_model(name, MODELS), target)


@storage.exclusive
def _open(name: str, folder: Path, target: torch.device) -> VisionModel:
    from transformers import AutoModel, AutoTokenizer

    quiet_libraries()
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder.name} has no .safetensors weights; lorakit reads no pickles. Use another model.")
    local = {"local_files_only": True, "trust_remote_code": False}
    dtype = torch.float16 if target.type == "cuda" else torch.float32
    try:
        model = AutoModel.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, **local)
        settings = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        reads = hasattr(model, "get_text_features")
        tokenizer = AutoTokenizer.from_pretrained(folder, **local) if reads else None
        side = settings.get("crop_size") or settings["size"]
        side = side if isinstance(side, int) else side.get("height") or side["shortest_edge"]
        mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{folder.name} is not a vision model for this version of transformers ({storage.first_line(error)}). "
            f"Use one of {', '.join(MODELS)}."
        ) from error
    return VisionModel(name, model.eval().to(target, dtype), tokenizer, int(side), mean, std)


class Residual(nn.Module):
    """Two 3 × 3 convolutions with a shortcut, at half the resolution."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.straight = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(before, after, 1, bias=False))
        self.bent = nn.Sequential(
            nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.straight(x) + self.bent(x))


def trunk(*widths: int) -> nn.Sequential:
    """A stem to half the resolution, then one `Residual` for every further width."""
    stem = [nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    return nn.Sequential(*stem, *(Residual(*pair) for pair in zip(widths, widths[1:], strict=False)))


class EmbeddedVision(nn.Module):
    """The vision model of the embedded base: a net for subjects, one for styles, and the base's own text encoder.

    A single net for both learns far more slowly: subjects need what styles share, styles what they do not.

    Args:
        text_encoder: the base's; it is not trained and not saved with the weights.
    """

    SUBJECT, STYLE = 128, 64  # widths of the two parts of a vector
    text_encoder: Any

    def __init__(self, text_encoder: Any):
        super().__init__()
        self.shape, self.texture = trunk(32, 64, 128, 192), trunk(32, 64, 96)
        self.subject = nn.Sequential(nn.Dropout(0.1), nn.Linear(4 * 192, self.SUBJECT))
        self.style = nn.Linear(2 * 96, self.STYLE)
        wide = 2 * text_encoder.config.hidden_size
        self.words = nn.Sequential(nn.Linear(wide, 384), nn.GELU(), nn.Linear(384, self.SUBJECT + self.STYLE))
        object.__setattr__(self, "text_encoder", text_encoder)

    def see(self, x: Tensor, again: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, 64, 64) in [-1, 1] → unit vectors of subject (N, 128) and style (N, 64).

        Args:
            again: the same pictures for the net of styles, where they differ.
        """
        subject = self.subject(F.adaptive_avg_pool2d(self.shape(x), 2).flatten(1))
        texture = self.texture(x if again is None else again)
        style = self.style(torch.cat([texture.mean((2, 3)), texture.amax((2, 3))], 1))
        return F.normalize(subject.float(), dim=1), F.normalize(style.float(), dim=1)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return torch.cat(self.see(pixel_values), 1)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The base's text encoder's output: mean over the tokens and the last token's, (N, 256)."""
        states = self.text_encoder(input_ids).last_hidden_state.float()
        mask = attention_mask[..., None].float()
        last = states[torch.arange(len(states)), attention_mask.sum(1) - 1]
        return torch.cat([(states * mask).sum(1) / mask.sum(1), last], 1)

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`features` → unit vectors of subject (N, 128), and of style (N, 64), shorter where the text names none."""
        subject, style = self.words(features).float().split([self.SUBJECT, self.STYLE], 1)
        return F.normalize(subject, dim=1), style / style.norm(dim=1, keepdim=True).clamp(min=1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.cat(self.read(self.features(input_ids, attention_mask)), 1)


@storage.exclusive
def _embedded(device: torch.device) -> VisionModel:
    encoder, tokenizer = bases.load_text_encoder(bases.open("demo"), Compute(device, torch.float32))
    model = EmbeddedVision(encoder)
    model.load_state_dict(load_file(EMBEDDED / "model.safetensors"))
    half = (0.5, 0.5, 0.5)
    model = model.to(device, torch.float32).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return VisionModel("lorakit/demo", model, tokenizer, 64, half, half, batch=64)


def vectors(output: Any) -> Tensor:
    """The tensor of get_image_features and get_text_features; since transformers 5 it is part of an output."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(outputs: list[Tensor]) -> np.ndarray:
    vectors = torch.cat(outputs).float().cpu().numpy()
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
