"""First captions, drafted by a model that looks at the pictures; a person reads and edits them.

A draft is remembered by the picture's contents, the model and what it was asked: drafting goes on where it was cut,
and a caption that is still its draft is told from one that a person wrote or edited, which is never overwritten
unasked. No model brings code of its own, and no pickle is read.
"""

import csv
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from lorakit import storage
from lorakit.dataset import captions
from lorakit.dataset.folder import STAND_INS, Dataset
from lorakit.dataset.picture import Picture, open_picture
from lorakit.device import choose_device, compute_dtype, quiet_libraries

MODELS = {  # name → hub id, revision
    "blip": ("Salesforce/blip-image-captioning-base", "refs/pr/38"),  # its main branch holds pickles alone
    "blip-large": ("Salesforce/blip-image-captioning-large", None),
    "blip2": ("Salesforce/blip2-opt-2.7b", None),
    "florence2": ("florence-community/Florence-2-large", None),  # Microsoft's own needs code of its own
    "smolvlm": ("HuggingFaceTB/SmolVLM-Instruct", None),
    "qwen3-vl": ("Qwen/Qwen3-VL-2B-Instruct", None),
    "wd14": ("SmilingWolf/wd-vit-tagger-v3", None),
}
TASK = "<DETAILED_CAPTION>"  # Florence-2's; its longest one fills more than the 75 tokens of a prompt
INSTRUCTION = (
    "Describe this picture in one sentence of at most 40 words: the subject, its clothing, the background and the "
    "lighting. Begin with the subject, and write nothing but the description."
)
LONGEST = 75  # tokens of the model's; the bases' text encoders read no more of theirs
SIDE = 1024  # pixels; larger pictures are scaled down: models that cut them into tiles would need far more memory
GENERAL, CHARACTER = 0, 4  # categories in selected_tags.csv; 9 is a rating

Captioner = Callable[[Sequence[Image.Image]], list[str]]


def draft_captions(
    pictures: Dataset, model: str = "blip", *, into: Path | None = None, overwrite: bool = False,
    prompt: str | None = None, thresholds: tuple[float, float] = (0.35, 0.85), batch_size: int = 4,
    device: str = "auto", store: Path | None = None, history: Path | None = None, progress: bool = True,
) -> dict[str, str]:  # fmt: skip
    """Draft a caption for each picture that has none written by hand; by default nothing is written among them.

    Args:
        model: one of MODELS, a hub id, or a folder: BLIP, BLIP-2, Florence-2, a vision-language model with a chat
            template, or a WD14 tagger (`model.onnx` and `selected_tags.csv`).
        into: folder that gets each caption as it is made, in subfolders as the pictures'; their own root for beside
            them. `captions.undo` takes that back.
        overwrite: draft for pictures with captions written by hand as well.
        prompt: how a caption begins (BLIP, BLIP-2), the task (Florence-2) or the instruction (others).
        thresholds: a tagger's least probabilities for general and character tags.
        batch_size: pictures at once; fewer where a card's memory is too small.
        store: folder that remembers drafts; by default the user's.
        history: as for `captions.write`.

    Returns:
        Drafts by name, without those of pictures whose captions are a person's, or of which the model said nothing.

    Raises:
        FileNotFoundError: no such model, or the hub is out of reach.
        ValueError: not a model that captions, weights that are pickles, or a picture that changed since the scan.
        ImportError: a package is missing; says which.
    """
    record = Path(store or captions.store()) / "drafts.jsonl"
    told = json.dumps([str(storage.locate_model(model, MODELS)), prompt, thresholds])
    drafts: dict[str, dict[str, str]] = defaultdict(dict)  # a picture's digest → what the model was told → draft
    for line in captions.lines_of(record):
        drafts[line["picture"]][line["by"]] = line["caption"]
    named = dict(zip(captions.captions_of(pictures), pictures.pictures, strict=True))
    if not overwrite:
        named = _not_by_hand(named, into, drafts)
    missing = [name for name, picture in named.items() if told not in drafts[picture.digest]]
    edit = f"draft {time.time_ns()}"

    def made(names: Iterable[str]) -> dict[str, str]:
        return {name: drafts[named[name].digest][told] for name in names if told in drafts[named[name].digest]}

    def put(names: Iterable[str]) -> None:
        if into is not None:
            some = {name: named[name] for name in names}
            new = made(some if overwrite else _not_by_hand(some, into, drafts))  # a person may have written meanwhile
            changed = captions.changes(_held(new, into), new)
            captions.write_captions(changed, pictures.root, into=into, history=history, edit=edit)

    put(set(named) - set(missing))
    if missing:
        ask = load(model, prompt=prompt, thresholds=thresholds, device=device)
        record.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(missing), desc="drafting", unit="picture", disable=not (progress and missing)) as bar:
        for first in range(0, len(missing), batch_size):
            names = missing[first : first + batch_size]
            for name, caption in zip(names, _ask(ask, [_small(named[name]) for name in names]), strict=True):
                if caption:
                    line = {"picture": named[name].digest, "by": told, "caption": caption}
                    storage.append_lines(record, json.dumps(line) + "\n")
                    drafts[line["picture"]][told] = caption
            put(names)
            bar.update(len(names))
    return made(named)


def load(
    model: str, *, prompt: str | None = None, thresholds: tuple[float, float] = (0.35, 0.85), device: str = "auto"
) -> Captioner:
    """A function that captions pictures, RGB, of any sizes; its arguments and errors are `draft`'s."""
    folder = storage.fetch_model(model, MODELS)
    on = choose_device(device)
    if (folder / "selected_tags.csv").is_file():
        return _tagger(folder, on, *thresholds)
    return _describer(folder, on, prompt)


def _open(folder: Path, device: torch.device, dtype: torch.dtype):
    """A model that writes about pictures, of transformers' own classes, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    quiet_libraries()
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder.name} holds no .safetensors weights; lorakit reads no pickles. Use another model.")
    own = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(folder, **own)
        model, told = AutoModelForImageTextToText.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True, **own
        )
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{folder.name} is no model that captions pictures with this transformers ({storage.first_line(error)}). "
            f"Update "
            f"transformers, or use one of {', '.join(MODELS)}."
        ) from error
    if len(told["missing_keys"]) > len(model.state_dict()) / 10:  # a few are computed, by some releases
        raise ValueError(
            f"{folder.name} lacks {len(told['missing_keys'])} weights of a {type(model).__name__}: it is damaged, or "
            "made for code of its own. Use its form for transformers."
        )
    return model.eval().to(device), processor


def _describer(folder: Path, device: torch.device, prompt: str | None) -> Captioner:
    """A model that writes about pictures, asked with what it was trained on."""
    dtype = compute_dtype("auto", device)
    model, processor = _open(folder, device, dtype)
    chats = model.config.model_type not in ("blip", "blip-2", "florence2")
    if chats:
        if not getattr(processor, "chat_template", None):
            raise ValueError(f"{folder.name} has no chat template to ask it by. Use one of {', '.join(MODELS)}.")
        processor.tokenizer.padding_side = "left"
        asked = [{"type": "image"}, {"type": "text", "text": prompt or INSTRUCTION}]
        prompt = processor.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    elif model.config.model_type == "florence2":
        prompt = prompt or TASK

    @torch.no_grad()
    def ask(pictures: Sequence[Image.Image]) -> list[str]:
        images = [[picture] for picture in pictures] if chats else list(pictures)
        texts = {"text": [prompt] * len(pictures), "padding": True} if prompt else {}
        inputs = processor(images=images, return_tensors="pt", **texts).to(device, dtype)
        beams = 1 if chats else 3
        written = model.generate(**inputs, do_sample=False, num_beams=beams, max_new_tokens=LONGEST)
        if chats:
            written = written[:, inputs["input_ids"].shape[1] :]
        return [_clean(text) for text in processor.batch_decode(written, skip_special_tokens=True)]

    return ask


def _tagger(folder: Path, device: torch.device, general: float, character: float) -> Captioner:
    """A WD14 tagger: an ONNX graph that gives each of its tags a probability.

    Source: SmilingWolf's wd-tagger, whose graphs take 448 px squares as float32 B, G, R from 0 to 255.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("WD14 taggers need onnxruntime: pip install 'lorakit[tagger]', then start again.") from error
    with (folder / "selected_tags.csv").open(encoding="utf-8", newline="") as stream:
        rows = [(captions.spaced(row["name"]), int(row["category"])) for row in csv.DictReader(stream)]
    wanted = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    here = [name for name in wanted if name in onnxruntime.get_available_providers()]
    graph = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=here)
    taken, given = graph.get_inputs()[0], graph.get_outputs()[0]
    if taken.shape[3] != 3 or given.shape[1] != len(rows):
        raise ValueError(
            f"{folder.name} is no WD14 tagger: it takes {taken.shape} and gives {given.shape}, for {len(rows)} tags. "
            "Fetch model.onnx and selected_tags.csv of one model."
        )
    alone = taken.shape[0] == 1  # else the graph takes any number at once

    def ask(pictures: Sequence[Image.Image]) -> list[str]:
        squares = np.stack([_square(picture, taken.shape[1]) for picture in pictures])
        parts = np.split(squares, len(squares)) if alone else [squares]
        found = np.concatenate([graph.run(None, {taken.name: part})[0] for part in parts])
        return [", ".join(_likely(rows, row, {CHARACTER: character, GENERAL: general})) for row in found]

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
    whole.paste(picture, tuple((max(picture.size) - length) // 2 for length in picture.size))
    pixels = np.asarray(whole.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return np.ascontiguousarray(pixels[:, :, ::-1])


def _ask(ask: Captioner, pictures: list[Image.Image]) -> list[str]:
    """Ask of all at once, or of fewer where that needs more memory than the card has."""
    try:
        return ask(pictures)
    except torch.cuda.OutOfMemoryError:
        if len(pictures) == 1:
            raise
        half = len(pictures) // 2
    return _ask(ask, pictures[:half]) + _ask(ask, pictures[half:])


def _small(picture: Picture) -> Image.Image:
    image = open_picture(picture)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def _clean(caption: str) -> str:
    """One line; "" where the model only repeated a sign, as one does whose half precision overflows."""
    return " ".join(caption.split()) if any(sign.isalnum() for sign in caption) else ""


def _not_by_hand(
    named: Mapping[str, Picture], into: Path | None, drafts: Mapping[str, Mapping[str, str]]
) -> dict[str, Picture]:
    """The pictures whose captions, their own and that in the file to write, are a model's drafts for them or none."""
    held = _held(named, into) if into is not None else {}
    own = {name: picture.caption for name, picture in named.items() if picture.caption_source not in STAND_INS}
    drafted = {name: {"", *drafts[picture.digest].values()} for name, picture in named.items()}
    return {n: p for n, p in named.items() if {held.get(n, ""), own.get(n, "")} <= drafted[n]}


def _held(names: Iterable[str], folder: Path) -> dict[str, str]:
    """What the caption files in a folder say; nothing of those that are not there."""
    places = captions.caption_files(names, folder)
    return {name: captions.caption_text(path.read_bytes()) for name, path in places.items() if path.is_file()}
