"""First captions, drafted by a model from the pictures; a person reads and edits them.

Drafts are kept by the picture's contents, the model and its settings: an interrupted call resumes, and a caption that
is still its draft is distinguished from one that a person wrote or edited, which is not overwritten by default. No
model runs code of its own, and no pickle is read.
"""

import csv
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lorakit import storage
from lorakit.console import Console
from lorakit.dataset import captions
from lorakit.dataset.folder import Dataset
from lorakit.dataset.picture import Picture, open_picture
from lorakit.device import Compute, quiet_libraries

MODELS = {  # name → hub id, revision
    "blip": ("Salesforce/blip-image-captioning-base", "refs/pr/38"),  # its main branch has only pickles
    "blip-large": ("Salesforce/blip-image-captioning-large", None),
    "blip2": ("Salesforce/blip2-opt-2.7b", None),
    "florence2": ("florence-community/Florence-2-large", None),  # Microsoft's form runs its own code
    "smolvlm": ("HuggingFaceTB/SmolVLM-Instruct", None),
    "qwen3-vl": ("Qwen/Qwen3-VL-2B-Instruct", None),
    "wd14": ("SmilingWolf/wd-vit-tagger-v3", None),
}
TASK = "<DETAILED_CAPTION>"  # Florence-2's; its longest one fills more than the 75 tokens of a prompt
INSTRUCTION = (
    "Describe this picture in one sentence of at most 40 words: the subject, its clothing, the background and the "
    "lighting. Begin with the subject, and write nothing but the description."
)
LONGEST = 75  # of the model's tokens; the bases' text encoders read as many of theirs
SIDE = 1024  # pixels; larger pictures are reduced: models that cut them into tiles would need far more memory
GENERAL, CHARACTER = 0, 4  # categories in selected_tags.csv; 9 is a rating

Ask = Callable[[Sequence[Image.Image]], list[str]]  # RGB pictures of any sizes → captions


@dataclass(frozen=True)
class Captioner:
    """A model that captions pictures, and its settings.

    Attributes:
        model: one of MODELS, a Hub id, or a folder: BLIP, BLIP-2, Florence-2, a vision-language model with a chat
            template, or a WD14 tagger (`model.onnx` and `selected_tags.csv`).
        prompt: the beginning of a caption (BLIP, BLIP-2), the task (Florence-2) or the instruction (others).
        thresholds: a tagger's lowest probabilities for general and character tags.
        batch_size: pictures at once; fewer if a card's memory is too small.
        compute: where it computes; None chooses.
    """

    model: str = "blip"
    prompt: str | None = None
    thresholds: tuple[float, float] = (0.35, 0.85)
    batch_size: int = 4
    compute: Compute | None = None

    @property
    def identity(self) -> str:
        """All that its captions depend on besides the pictures."""
        return json.dumps([str(storage.locate_model(self.model, MODELS)), self.prompt, self.thresholds])

    def load(self) -> Ask:
        """Load the model; returns the function that captions pictures.

        Raises:
            FileNotFoundError: no such model, or the Hub does not answer.
            ValueError: the model captions no pictures, or its weights are pickles.
            ImportError: a package is missing; says which.
        """
        folder = storage.fetch_model(self.model, MODELS)
        compute = self.compute or Compute.choose()
        if (folder / "selected_tags.csv").is_file():
            return _tagger(folder, compute.device, *self.thresholds)
        return _describer(folder, compute, self.prompt)


def draft_captions(
    dataset: Dataset, captioner: str | Captioner = "blip", *, into: Path | None = None, overwrite: bool = False,
    store: Path | None = None, history: Path | None = None, console: Console | None = None,
) -> dict[str, str]:  # fmt: skip
    """Draft a caption for each picture without one written by hand; by default no caption file is written.

    Args:
        captioner: the model with its settings, or only its name.
        into: folder for the caption files, in the dataset's subfolders; the dataset's root writes them next to the
            pictures. Each is written as soon as it is drafted; `undo_captions` takes all of them back.
        overwrite: also draft for pictures with captions written by hand.
        store: folder that keeps drafts; by default the user's.
        history: as for `write_captions`.
        console: shows the progress; by default at the terminal.

    Returns:
        Drafts by name, without pictures whose captions were written by hand, or for which the model wrote nothing.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `Captioner.load`.
        ValueError: a picture changed since the scan.
        KeyboardInterrupt: the console's `stop` was set; the drafts so far are kept.
    """
    captioner = captioner if isinstance(captioner, Captioner) else Captioner(captioner)
    drafts = _Drafts(Path(store or captions.store()) / "drafts.jsonl", captioner.identity)
    edit = f"draft {time.time_ns()}"

    def write(pictures: Mapping[str, Picture]) -> None:
        if into is not None:
            free = pictures if overwrite else drafts.not_by_hand(pictures, into)  # a person may have written meanwhile
            new = drafts.of(free)
            changes = captions.caption_changes(_existing(new, into), new)
            captions.write_captions(changes, dataset.root, into=into, history=history, edit=edit)

    pictures = dataset.by_name if overwrite else drafts.not_by_hand(dataset.by_name, into)
    done = drafts.of(pictures)
    missing = [name for name in pictures if name not in done]
    write({name: pictures[name] for name in done})
    if not missing:
        return done
    ask = captioner.load()
    with (console or Console()).bar() as bar:
        for first in range(0, len(missing), captioner.batch_size):
            batch = {name: pictures[name] for name in missing[first : first + captioner.batch_size]}
            texts = _ask(ask, [_reduced(picture) for picture in batch.values()])
            for picture, caption in zip(batch.values(), texts, strict=True):
                drafts.add(picture, caption)
            write(batch)
            bar("drafting", first + len(batch), len(missing))
    return drafts.of(pictures)


class _Drafts:
    """The file of drafts, by pictures' digests and captioners' identities.

    Args:
        captioner: the identity of the one that drafts.
    """

    def __init__(self, file: Path, captioner: str):
        self.file, self.captioner = file, captioner
        self.texts: dict[str, dict[str, str]] = defaultdict(dict)  # digest → captioner → draft
        for line in captions.lines_of(file):
            self.texts[line["picture"]][line["by"]] = line["caption"]

    def of(self, pictures: Mapping[str, Picture]) -> dict[str, str]:
        """The captioner's drafts by name."""
        texts = {name: self.texts[picture.digest] for name, picture in pictures.items()}
        return {name: drafts[self.captioner] for name, drafts in texts.items() if self.captioner in drafts}

    def add(self, picture: Picture, caption: str) -> None:
        """Keep a draft, unless the model wrote nothing."""
        if caption:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            line = {"picture": picture.digest, "by": self.captioner, "caption": caption}
            storage.append_lines(self.file, json.dumps(line) + "\n")
            self.texts[picture.digest][self.captioner] = caption

    def not_by_hand(self, pictures: Mapping[str, Picture], into: Path | None) -> dict[str, Picture]:
        """The pictures whose captions, in the dataset and in the files to write, are missing or drafts for them."""
        existing = _existing(pictures, into) if into is not None else {}
        own = {name: picture.caption for name, picture in pictures.items() if picture.has_own_caption}
        drafted = {name: {"", *self.texts[picture.digest].values()} for name, picture in pictures.items()}
        return {n: p for n, p in pictures.items() if {existing.get(n, ""), own.get(n, "")} <= drafted[n]}


def _existing(names: Iterable[str], folder: Path) -> dict[str, str]:
    """The captions in the existing caption files of a folder."""
    places = captions.caption_files(names, folder)
    return {name: captions.caption_text(path.read_bytes()) for name, path in places.items() if path.is_file()}


# ── Models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@storage.exclusive
def _open(folder: Path, compute: Compute) -> tuple[Any, Any]:
    """A model that describes pictures, of transformers' own classes, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    quiet_libraries()
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder.name} has no .safetensors weights; lorakit reads no pickles. Use another model.")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(folder, **local)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, torch_dtype=compute.dtype, use_safetensors=True, output_loading_info=True, **local
        )
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{folder.name} is no model that captions pictures with this transformers ({storage.first_line(error)}). "
            f"Update transformers, or use one of {', '.join(MODELS)}."
        ) from error
    model, loading = loaded
    missing = len(loading["missing_keys"])
    if missing > len(model.state_dict()) / 10:  # some releases compute a few of them
        raise ValueError(
            f"{folder.name} lacks {missing} weights of a {type(model).__name__}: it is damaged, or needs its own code. "
            "Use its form for transformers."
        )
    return model.eval().to(compute.device), processor


def _describer(folder: Path, compute: Compute, prompt: str | None) -> Ask:
    """A model that describes pictures, prompted as in its training."""
    model, processor = _open(folder, compute)
    chats = model.config.model_type not in ("blip", "blip-2", "florence2")
    if chats:
        if not getattr(processor, "chat_template", None):
            raise ValueError(f"{folder.name} has no chat template. Use one of {', '.join(MODELS)}.")
        processor.tokenizer.padding_side = "left"
        content = [{"type": "image"}, {"type": "text", "text": prompt or INSTRUCTION}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    elif model.config.model_type == "florence2":
        prompt = prompt or TASK

    @torch.no_grad()
    def ask(pictures: Sequence[Image.Image]) -> list[str]:
        images = [[picture] for picture in pictures] if chats else list(pictures)
        texts = {"text": [prompt] * len(pictures), "padding": True} if prompt else {}
        inputs = processor(images=images, return_tensors="pt", **texts).to(compute.device, compute.dtype)
        beams = 1 if chats else 3
        written = model.generate(**inputs, do_sample=False, num_beams=beams, max_new_tokens=LONGEST)
        if chats:
            written = written[:, inputs["input_ids"].shape[1] :]
        return [_clean(text) for text in processor.batch_decode(written, skip_special_tokens=True)]

    return ask


def _tagger(folder: Path, device: torch.device, general: float, character: float) -> Ask:
    """A WD14 tagger: an ONNX graph that returns a probability for each of its tags.

    Source: SmilingWolf's wd-tagger, whose graphs take 448 px squares as float32 B, G, R from 0 to 255.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("WD14 taggers need onnxruntime: pip install 'lorakit[tagger]', then start again.") from error
    with (folder / "selected_tags.csv").open(encoding="utf-8", newline="") as stream:
        rows = [(captions.spaced(row["name"]), int(row["category"])) for row in csv.DictReader(stream)]
    providers = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    available = [name for name in providers if name in onnxruntime.get_available_providers()]
    graph = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=available)
    inputs, outputs = graph.get_inputs()[0], graph.get_outputs()[0]
    if inputs.shape[3] != 3 or outputs.shape[1] != len(rows):
        raise ValueError(
            f"{folder.name} is no WD14 tagger: its graph maps {inputs.shape} to {outputs.shape}, for {len(rows)} tags. "
            "Fetch model.onnx and selected_tags.csv of one model."
        )
    single = inputs.shape[0] == 1  # else the graph takes any number at once

    def ask(pictures: Sequence[Image.Image]) -> list[str]:
        squares = np.stack([_square(picture, inputs.shape[1]) for picture in pictures])
        parts = np.split(squares, len(squares)) if single else [squares]
        probabilities = np.concatenate([graph.run(None, {inputs.name: part})[0] for part in parts])
        return [", ".join(_likely(rows, row, {CHARACTER: character, GENERAL: general})) for row in probabilities]

    return ask


def _likely(rows: Sequence[tuple[str, int]], probabilities: np.ndarray, least: Mapping[int, float]) -> list[str]:
    """The tags of each category above its threshold, category by category, the most likely first."""
    order = np.argsort(-probabilities, kind="stable")
    return [
        rows[i][0] for category, bound in least.items() for i in order
        if rows[i][1] == category and probabilities[i] >= bound
    ]  # fmt: skip


def _square(picture: Image.Image, side: int) -> np.ndarray:
    """A picture in the middle of a white square, (side, side, 3), float32, blue first."""
    whole = Image.new("RGB", (max(picture.size),) * 2, "white")
    whole.paste(picture, ((whole.width - picture.width) // 2, (whole.height - picture.height) // 2))
    pixels = np.asarray(whole.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return np.ascontiguousarray(pixels[:, :, ::-1])


def _ask(ask: Ask, pictures: list[Image.Image]) -> list[str]:
    """The captions of all pictures, computed in smaller batches if the card's memory is too small."""
    try:
        return ask(pictures)
    except torch.cuda.OutOfMemoryError:
        if len(pictures) == 1:
            raise
        half = len(pictures) // 2
    return _ask(ask, pictures[:half]) + _ask(ask, pictures[half:])


def _reduced(picture: Picture) -> Image.Image:
    image = open_picture(picture)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def _clean(caption: str) -> str:
    """One line; "" if the model only repeated a sign, as it does when half precision overflows."""
    return " ".join(caption.split()) if any(sign.isalnum() for sign in caption) else ""
