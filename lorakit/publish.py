"""LoRA files on the Hugging Face Hub, each with a model card made of the file's own metadata."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from lorakit import config as configs
from lorakit import storage
from lorakit.config import Config

MARK = "lorakit"  # the tag of cards that may be written anew
ID = re.compile(r"[\w.-]+/[\w.-]+")
LICENCES = {"sd15": "creativeml-openrail-m", "sd2": "openrail++", "sdxl": "openrail++"}
# Settings that name files.
LOCAL = {"dataset", "decisions", "mask", "regularisation", "start_from", "validation_pictures", "backup"}
SETTINGS = {
    "learning rate": "ss_learning_rate", "rate of text encoders": "ss_text_encoder_lr", "optimizer": "ss_optimizer",
    "schedule": "ss_lr_scheduler", "warm-up steps": "ss_lr_warmup_steps", "steps": "ss_steps", "epochs": "ss_epoch",
    "batch size": "ss_total_batch_size", "resolution": "ss_resolution", "loss": "ss_loss_type",
    "min-SNR gamma": "ss_min_snr_gamma", "noise offset": "ss_noise_offset", "clip skip": "ss_clip_skip",
    "mixed precision": "ss_mixed_precision", "seed": "ss_seed",
}  # fmt: skip


# ── The card ────────────────────────────────────────────────────────────────────────────────────────────────────────


def card(
    lora: str | Path, repository: str, *, samples: Mapping[str, str] | None = None, comparison: str = "",
    licence: str | None = None, comment: str = "",
) -> str:  # fmt: skip
    """The model card (README.md) of a LoRA file, lorakit's or kohya's, from what the file says of itself.

    Args:
        repository: "owner/name" on the Hub, for the example of use.
        samples: path of a sample picture in the repository → its prompt.
        comparison: path of the sheet that shows several strengths there.
        licence: the Hub's name of one; None takes that of the LoRA's family of bases.
        comment: a paragraph of the user's.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as `lora.load`; or a checkpoint, which no other program
            reads; or a path or token of this machine in the file's metadata or the comment.
    """
    from huggingface_hub import ModelCardData

    from lorakit import adapter as adapters
    from lorakit.adapter import FAMILIES, open_lora_file

    facts = adapters.describe_file(lora)
    if facts["kind"] == "checkpoint":
        raise ValueError(f"{facts['file']} is a checkpoint, which lorakit alone reads. Export it as a LoRA first.")
    with open_lora_file(Path(lora)) as file:
        metadata, key = file.metadata() or {}, next(iter(file.keys()))
    adapters.check_private(metadata | {"of the card, comment,": comment})
    family, base, trigger = facts["family"], facts["base"], facts["trigger"]
    licence = licence or LICENCES.get(family)
    on_hub = base if ID.fullmatch(base or "") and base != "lorakit/demo" else None  # the Hub refuses other names
    data = ModelCardData(
        base_model=on_hub, license=licence, library_name="diffusers", pipeline_tag="text-to-image",
        tags=["text-to-image", "stable-diffusion-xl" if family == "sdxl" else "stable-diffusion", "lora", "diffusers",
              "template:sd-lora", MARK],
        instance_prompt=trigger,
        widget=[{"text": prompt, "output": {"url": path}} for path, prompt in (samples or {}).items()] or None,
    )  # fmt: skip
    name, what = Path(facts["file"]).stem, f"A {facts['kind']} for {FAMILIES.get(family, 'Stable Diffusion')}"
    use = [f"Write `{_line(trigger)}` into the prompt."] if trigger else []
    use.append("Begin with a strength of 0.7 to 1.0.")
    if key.startswith("lora_"):  # kohya's layout
        use.append(
            f"**A1111, Forge, ComfyUI:** put `{facts['file']}` into `models/Lora` (ComfyUI: `models/loras`). In A1111 "
            f"and Forge, `<lora:{name}:0.8>` in the prompt calls it up."
        )
    loads = on_hub or configs.HUB_BASES.get(family)
    if facts["kind"] in ("LoRA", "LoCon") and loads and not key.startswith("base_model."):  # PEFT's layout
        use.append(_example(facts, metadata.get("ss_clip_skip", ""), loads, repository))
    parts = [
        f"# {name}", f"{what}, trained on {_line(base)}." if base else f"{what}.", comment,
        "<Gallery />" if samples else "",
        "## Use", *use,
        f"![The bare base and rising strengths, side by side]({comparison})" if comparison else "",
        "## Training", _table(facts, metadata),
        f"## Licence\n\n{licence}" if licence else "",
    ]  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def _line(text: str) -> str:
    """A text that stays in its line, its quotes and its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def _example(facts: dict, clip_skip: str, base: str, repository: str) -> str:
    """A program that uses the file with diffusers."""
    prompt = json.dumps(facts["trigger"] or "", ensure_ascii=False)
    skipped = f", clip_skip={int(clip_skip) - 1}" if clip_skip.isdecimal() and int(clip_skip) > 1 else ""
    return f"""**diffusers:**

```python
import torch
from diffusers import AutoPipelineForText2Image

pipeline = AutoPipelineForText2Image.from_pretrained("{base}", torch_dtype=torch.float16).to("cuda")
pipeline.load_lora_weights("{repository}", weight_name="{facts["file"]}")
image = pipeline({prompt}, cross_attention_kwargs={{"scale": 0.8}}{skipped}).images[0]
```"""


def _table(facts: dict, metadata: dict[str, str]) -> str:
    """What it was trained with; of the pictures, how many there were and how often each counts an epoch."""
    folders = json.loads(metadata.get("ss_dataset_dirs", "{}")).values()
    rows = {"algorithm": facts["kind"]}
    rows |= {name: ", ".join(f"{value:g}" for value in facts[name]) for name in ("rank", "alpha")}
    rows |= {name: metadata.get(key, "") for name, key in SETTINGS.items()}
    rows["pictures"] = str(sum(folder["img_count"] for folder in folders) or "")
    rows["repeats"] = ", ".join(map(str, sorted({folder["n_repeats"] for folder in folders})))
    lines = [f"| {name} | {_line(value)} |" for name, value in rows.items() if value not in ("", "None")]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines])


# ── Upload ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def upload(
    source: str | Path, repository: str, *, licence: str | None = None, private: bool = True, pictures: bool = False,
    comment: str = "", overwrite: bool = False, say: Callable[[str], None] = print,
) -> str:  # fmt: skip
    """Put a LoRA with its model card on the Hugging Face Hub, in one commit, and check that it arrived whole.

    Args:
        source: a LoRA file, or a finished run's folder, whose newest sample pictures, comparison and settings go along.
        repository: "owner/name"; made where there is none.
        private: of a repository that is made; one that is there stays as it is.
        pictures: the dataset's pictures and captions too, with whatever a camera wrote into the files.
        overwrite: replace a card that lorakit did not write; it stays otherwise.
        licence, comment: as in `card`.

    Returns:
        The repository's address.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as `card`; an unfinished run, a name that cannot be a
            repository's, captions that tell of this machine, pictures that would be public without being meant to.
        OSError: no token (PermissionError), no way to the Hub (ConnectionError), or what it refuses.
        RuntimeError: the Hub holds another file than is here.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import RepositoryNotFoundError

    if not ID.fullmatch(repository):
        raise ValueError(f"{repository!r} names no repository on the Hub: give owner/name, like 'anna/my_lora'.")
    source = Path(source)
    if pictures and not source.is_dir():
        raise ValueError(f"{source.name} does not say where its pictures are. Give the folder of its run.")
    lora, samples, parcel = _of_run(source, pictures, say) if source.is_dir() else (source, {}, {})
    sheet = "comparison.png" if "comparison.png" in parcel else ""
    text = card(lora, repository, samples=samples, comparison=sheet, licence=licence, comment=comment)
    parcel = {lora.name: lora, "README.md": text.encode()} | parcel
    digest = storage.sha256(lora)
    if get_token() is None:
        raise PermissionError("There is no token for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    with _told(repository):
        try:
            there = api.model_info(repository)
        except RepositoryNotFoundError:
            api.create_repo(repository, private=private)
        else:
            if pictures and private and not there.private:
                raise ValueError(f"{repository} is public: make it private there, or show the pictures: private=False.")
            private = there.private
            foreign = MARK not in (there.tags or ()) and "README.md" in {f.rfilename for f in there.siblings or ()}
            if foreign and not overwrite:
                say(f"card      the README.md of {repository} is not lorakit's: it stays, unless told to overwrite")
                del parcel["README.md"]
        say(f"upload    {len(parcel)} files to {repository}, which is {'private' if private else 'public'}")
        operations = [CommitOperationAdd(path, content) for path, content in parcel.items()]
        commit = api.create_commit(repository, operations, commit_message=f"Upload {lora.stem} with lorakit")
        found = api.get_paths_info(repository, [lora.name], revision=commit.oid)
    stored = found[0].lfs.sha256 if found and found[0].lfs else "no such file"
    if stored != digest:
        raise RuntimeError(f"{lora.name} did not arrive whole: {repository} has {stored}, not {digest}. Upload again.")
    say(f"proof     {lora.name} is there as it is here, sha256 {digest[:16]}…")
    return f"{api.endpoint}/{repository}"


def _of_run(
    folder: Path, pictures: bool, say: Callable[[str], None]
) -> tuple[Path, dict[str, str], dict[str, Path | bytes]]:
    """The LoRA of a run, the prompts of its samples, and what goes along: path in the repository → file or content."""
    from PIL import Image

    from lorakit import adapter as adapters
    from lorakit import sample

    config = configs.load(folder / "config.json")
    lora = folder / f"{config.name}.safetensors"
    if not lora.is_file():
        raise ValueError(
            f"The run in {folder.name} is not finished, there is no {lora.name}: start it again to go on to its end, "
            "or export one of its checkpoints and upload that file."
        )
    settings = config.model_dump(mode="json", exclude=LOCAL) | {"base": adapters.describe_file(lora)["base"]}
    settings = {name: value for name, value in settings.items() if not adapters.names_machine(json.dumps(value))}
    parcel, samples = {"lorakit.json": json.dumps(settings, indent=2, ensure_ascii=False).encode()}, {}
    if (sheet := folder / "comparison.png").is_file():
        parcel[sheet.name] = sheet
    newest = max((path.parent for path in folder.glob("samples/step-*/*.png")), default=None)
    for path in sorted(newest.glob("*.png")) if newest else ():
        with Image.open(path) as picture:
            texts = {key: text for key, text in picture.info.items() if isinstance(text, str)}
        if any(map(adapters.names_machine, texts.values())):
            say(f"samples   {path.name} holds a path of this machine and stays here, and so does the comparison")
            parcel.pop(sheet.name, None)  # prompts are written on it
        else:
            parcel[f"samples/{path.name}"] = path
            samples[f"samples/{path.name}"] = sample.prompt_of(texts.get("parameters", ""))
    if samples and not config.sample_prompts:
        say("samples   their prompts are captions of the dataset, as sample_prompts is empty, and are shown")
    return lora, samples, parcel | (_dataset(config) if pictures else {})


def _dataset(config: Config) -> dict[str, Path | bytes]:
    from lorakit import adapter as adapters
    from lorakit import run

    parcel, telling, found = {}, [], run.scan_dataset(config).pictures
    places = [Path("dataset", picture.group, picture.known_as.name) for picture in found]
    taken = {place.with_suffix("") for place in places}
    for place, picture in zip(places, found, strict=True):
        path = place.with_suffix(picture.path.suffix or place.suffix)  # a replacement's own: it may be of another kind
        if path != place and (path in places or path.as_posix() in parcel):  # another picture's name
            numbered = (place.with_name(f"{place.stem} ({number})") for number in count(2))
            taken.add(free := next(name for name in numbered if name not in taken))
            path = free.with_name(free.name + path.suffix)
        parcel[path.as_posix()] = picture.path
        if picture.caption:
            parcel[path.with_suffix(".txt").as_posix()] = picture.caption.encode()
        if adapters.names_machine(picture.caption):
            telling.append(path.name)
    if telling:
        raise ValueError(f"The captions of {', '.join(telling)} hold a path or token of this machine. Take it out.")
    return parcel


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """Say in words what the Hub refuses, or that there is no way to it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import HfHubHTTPError

    # requests' errors are OSErrors; httpx's are not, but have a parent in common with the Hub's own.
    of_client = (HfHubHTTPError.__mro__[1], OSError)
    try:
        yield
    except (*of_client, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # of one among several files
        if not isinstance(cause, of_client) or getattr(cause, "filename", None):
            raise
        if not isinstance(cause, HfHubHTTPError):
            reason = re.sub("Bearer .*", "the token cannot be sent", str(cause))  # never what it is
            raise ConnectionError(f"The Hub, {constants.ENDPOINT}, cannot be reached: {reason}") from None
        status = cause.response.status_code
        kind, advice = {
            401: (PermissionError, "the token is not valid. Run `hf auth login`, or set HF_TOKEN"),
            403: (PermissionError, f"the token may not write to {repository}. Take one that may, from "
                  "https://huggingface.co/settings/tokens, or a repository of your own"),
            409: (FileExistsError, f"{repository} is taken by one that this token may not see. Choose another name"),
        }.get(status, (OSError, "try again later" if status >= 500 else cause.server_message))  # fmt: skip
        raise kind(f"The Hub answers {status}: {advice}.") from error
