"""Put LoRA files on the Hugging Face Hub, with a model card made from the file's metadata."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import config as configs
from lorakit import named, storage
from lorakit.config import Config
from lorakit.console import Console

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

TAG = "lorakit"  # of cards that may be overwritten
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
    """The model card (README.md) of a LoRA file, lorakit's or kohya's, from the file's metadata.

    Args:
        repository: "owner/name" on the Hub, for the example.
        samples: path of a sample picture in the repository → its prompt.
        comparison: path of the sheet of several strengths in the repository.
        licence: the Hub's name for it; None takes the usual one of the base's family.
        comment: a paragraph of the user's.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as `adapter.load`; or a checkpoint, which only lorakit reads;
            or a path or token of this machine in the metadata or the comment.
    """
    from huggingface_hub import ModelCardData

    from lorakit import adapter as adapters
    from lorakit.adapter import FAMILIES

    facts = adapters.describe_file(lora)
    if facts["kind"] == "checkpoint":
        raise ValueError(f"{facts['file']} is a checkpoint, which only lorakit reads. Export it as a LoRA first.")
    with storage.open_safetensors(Path(lora)) as file:
        metadata, key = file.metadata() or {}, next(iter(file.keys()))
    adapters.check_private(metadata | {"of the card, comment,": comment})
    family, base, trigger = facts["family"], facts["base"], facts["trigger"]
    licence = licence or LICENCES.get(family)
    on_hub = base if ID.fullmatch(base or "") and base != "lorakit/demo" else None  # the Hub refuses other names
    data = ModelCardData(
        base_model=on_hub, license=licence, library_name="diffusers", pipeline_tag="text-to-image",
        tags=["text-to-image", "stable-diffusion-xl" if family == "sdxl" else "stable-diffusion", "lora", "diffusers",
              "template:sd-lora", TAG],
        instance_prompt=trigger,
        widget=[{"text": prompt, "output": {"url": path}} for path, prompt in (samples or {}).items()] or None,
    )  # fmt: skip
    name, kind = Path(facts["file"]).stem, f"A {facts['kind']} for {FAMILIES.get(family, 'Stable Diffusion')}"
    use = [f"Use `{_line(trigger)}` in the prompt."] if trigger else []
    use.append("Start with a strength of 0.7 to 1.0.")
    if key.startswith("lora_"):  # kohya's layout
        use.append(
            f"**A1111, Forge, ComfyUI:** put `{facts['file']}` into `models/Lora` (ComfyUI: `models/loras`). In A1111 "
            f"and Forge, `<lora:{name}:0.8>` in the prompt loads it."
        )
    loads = on_hub or (named.OF_FAMILY[family].reference if family in named.OF_FAMILY else None)
    if facts["kind"] in ("LoRA", "LoCon") and loads and not key.startswith("base_model."):  # PEFT's layout
        use.append(_example(facts, metadata.get("ss_clip_skip", ""), loads, repository))
    parts = [
        f"# {name}", f"{kind}, trained on {_line(base)}." if base else f"{kind}.", comment,
        "<Gallery />" if samples else "",
        "## Use", *use,
        f"![The base without the LoRA, and with it at rising strengths]({comparison})" if comparison else "",
        "## Training", _table(facts, metadata),
        f"## Licence\n\n{licence}" if licence else "",
    ]  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def _line(text: str) -> str:
    """A text without line breaks and without marks that end a quotation or a table's cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def _example(facts: Mapping[str, Any], clip_skip: str, base: str, repository: str) -> str:
    """A program that loads the file with diffusers."""
    prompt = json.dumps(facts["trigger"] or "", ensure_ascii=False)
    skip = f", clip_skip={int(clip_skip) - 1}" if clip_skip.isdecimal() and int(clip_skip) > 1 else ""
    return f"""**diffusers:**

```python
import torch
from diffusers import AutoPipelineForText2Image

pipeline = AutoPipelineForText2Image.from_pretrained("{base}", torch_dtype=torch.float16).to("cuda")
pipeline.load_lora_weights("{repository}", weight_name="{facts["file"]}")
image = pipeline({prompt}, cross_attention_kwargs={{"scale": 0.8}}{skip}).images[0]
```"""


def _table(facts: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """The settings of the training; of the pictures, only their number and repeats."""
    folders = json.loads(metadata.get("ss_dataset_dirs", "{}")).values()
    rows = {"algorithm": facts["kind"]}
    rows |= {name: ", ".join(f"{value:g}" for value in facts[name]) for name in ("rank", "alpha")}
    rows |= {name: metadata.get(key, "") for name, key in SETTINGS.items()}
    rows["pictures"] = str(sum(folder["img_count"] for folder in folders) or "")
    rows["repeats"] = ", ".join(map(str, sorted({folder["n_repeats"] for folder in folders})))
    lines = [f"| {name} | {_line(value)} |" for name, value in rows.items() if value not in ("", "None")]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines])


# ── Upload ──────────────────────────────────────────────────────────────────────────────────────────────────────────


Files = dict[str, Path | bytes]  # path in the repository → file or content


def upload(
    source: str | Path, repository: str, *, licence: str | None = None, private: bool = True, pictures: bool = False,
    comment: str = "", overwrite: bool = False, console: Console | None = None,
) -> str:  # fmt: skip
    """Put a LoRA with its model card on the Hugging Face Hub, in one commit, and check that it arrived whole.

    Args:
        source: a LoRA file, or the folder of a finished run, whose newest sample pictures, comparison and settings are
            uploaded too.
        repository: "owner/name"; it is created if it does not exist.
        private: of a repository that is created; an existing one stays as it is.
        pictures: upload the dataset's pictures and captions too, with whatever a camera wrote into the files.
        overwrite: replace a card that lorakit did not write; otherwise it stays.
        licence, comment: as for `card`.

    Returns:
        The repository's address.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as `card`; an unfinished run, an invalid repository name,
            captions that name a path or token of this machine, or pictures that would become public unintentionally.
        OSError: no token (PermissionError), no connection (ConnectionError), or the Hub's refusal.
        RuntimeError: the Hub has another file than was sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    source, console = Path(source), console or Console()
    if not ID.fullmatch(repository):
        raise ValueError(f"{repository!r} is no repository on the Hub: give owner/name, like 'anna/my_lora'.")
    if pictures and not source.is_dir():
        raise ValueError(f"{source.name} does not name its pictures. Give the folder of its run.")
    lora, samples, files = _pack_run(source, pictures, console) if source.is_dir() else (source, {}, {})
    sheet = "comparison.png" if "comparison.png" in files else ""
    text = card(lora, repository, samples=samples, comparison=sheet, licence=licence, comment=comment)
    files = {lora.name: lora, "README.md": text.encode(), **files}
    digest = storage.sha256(lora)
    if get_token() is None:
        raise PermissionError("There is no token for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    with _explained(repository):
        found = _open_repository(api, repository, private)
        if found and pictures and private and not found.private:
            raise ValueError(f"{repository} is public: make it private there, or show the pictures: private=False.")
        names = {file.rfilename for file in (found and found.siblings) or ()}
        if found and "README.md" in names and TAG not in (found.tags or ()) and not overwrite:
            console.say(f"card      the README.md of {repository} is not lorakit's and stays; overwrite replaces it")
            del files["README.md"]
        state = "private" if (found.private if found else private) else "public"
        console.say(f"upload    {len(files)} files to {repository}, which is {state}")
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        commit = api.create_commit(repository, operations, commit_message=f"Upload {lora.stem} with lorakit")
        entries = api.get_paths_info(repository, [lora.name], revision=commit.oid)
    stored = getattr(entries[0], "lfs", None) if entries else None
    if not stored or stored.sha256 != digest:
        there = stored.sha256 if stored else "no such file"
        raise RuntimeError(f"{lora.name} did not arrive whole: {repository} has {there}, not {digest}. Upload again.")
    console.say(f"proof     {lora.name} on the Hub is the same as here, sha256 {digest[:16]}…")
    return f"{api.endpoint}/{repository}"


def _open_repository(api: "HfApi", repository: str, private: bool) -> "ModelInfo | None":
    """What the Hub says of a repository; None for one that is new, and made here."""
    from huggingface_hub.utils import RepositoryNotFoundError

    try:
        return api.model_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private)
        return None


def _pack_run(folder: Path, pictures: bool, console: Console) -> tuple[Path, dict[str, str], Files]:
    """The LoRA of a finished run, the prompts of its newest samples by their path in the repository, and all files."""
    from PIL import Image

    from lorakit import adapter as adapters
    from lorakit import sample

    config = configs.load(folder / "config.json")
    lora, samples = folder / f"{config.name}.safetensors", dict[str, str]()
    files: Files = {}
    if not lora.is_file():
        raise ValueError(
            f"The run in {folder.name} is not finished, there is no {lora.name}: start it again to finish it, "
            "or export one of its checkpoints and upload that file."
        )
    settings = config.model_dump(mode="json", exclude=LOCAL) | {"base": adapters.describe_file(lora)["base"]}
    settings = {name: value for name, value in settings.items() if not adapters.names_machine(json.dumps(value))}
    files["lorakit.json"] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    if (sheet := folder / "comparison.png").is_file():
        files[sheet.name] = sheet
    newest = max((path.parent for path in folder.glob("samples/step-*/*.png")), default=None)
    for path in sorted(newest.glob("*.png")) if newest else ():
        with Image.open(path) as picture:
            texts = {key: text for key, text in picture.info.items() if isinstance(text, str)}
        if any(map(adapters.names_machine, texts.values())):
            console.say(f"samples   {path.name} contains a path of this machine: it and the comparison stay here")
            files.pop(sheet.name, None)  # prompts are written on it
        else:
            files[f"samples/{path.name}"] = path
            samples[f"samples/{path.name}"] = sample.prompt_of(texts.get("parameters", ""))
    if samples and not config.sample_prompts:
        console.say("samples   sample_prompts is empty: their prompts are captions of the dataset, and are shown")
    return lora, samples, files | (_pack_dataset(config) if pictures else {})


def _pack_dataset(config: Config) -> Files:
    """The pictures and captions, each under the name the user knows it by: path in the repository → file or content."""
    from lorakit import adapter as adapters
    from lorakit import run

    files: Files = {}
    private, pictures = [], run.scan_dataset(config).pictures
    places = [Path(storage.printable(f"dataset/{picture.group}/{picture.known_as.name}")) for picture in pictures]
    taken = {place.with_suffix("") for place in places}
    for place, picture in zip(places, pictures, strict=True):
        path = place.with_suffix(picture.path.suffix or place.suffix)  # a replacement may be of another format
        if path != place and (path in places or path.as_posix() in files):  # another picture's name
            numbered = (place.with_name(f"{place.stem} ({number})") for number in count(2))
            taken.add(free := next(name for name in numbered if name not in taken))
            path = free.with_name(free.name + path.suffix)
        files[path.as_posix()] = picture.path
        if picture.caption:
            files[path.with_suffix(".txt").as_posix()] = picture.caption.encode()
        if adapters.names_machine(picture.caption):
            private.append(path.name)
    if private:
        raise ValueError(f"The captions of {', '.join(private)} contain a path or token of this machine. Remove it.")
    return files


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn errors of the Hub's client into built-in ones that say what to do."""
    from huggingface_hub import constants
    from huggingface_hub.utils import HfHubHTTPError

    # requests' errors are OSErrors; httpx's are not, but share a parent with the Hub's own.
    of_client: Any = (HfHubHTTPError.__mro__[1], OSError)
    try:
        yield
    except (*of_client, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # of one among several files
        if not isinstance(cause, of_client) or getattr(cause, "filename", None):
            raise
        if not isinstance(cause, HfHubHTTPError):
            reason = re.sub("Bearer .*", "the token cannot be sent", str(cause))  # do not show it
            raise ConnectionError(f"The Hub, {constants.ENDPOINT}, cannot be reached: {reason}") from None
        status = cause.response.status_code
        kind, advice = {
            401: (PermissionError, "the token is not valid. Run `hf auth login`, or set HF_TOKEN"),
            403: (PermissionError, f"the token may not write to {repository}. Take one that may, from "
                  "https://huggingface.co/settings/tokens, or a repository of your own"),
            409: (FileExistsError, f"{repository} is taken by one that this token may not see. Choose another name"),
        }.get(status, (OSError, "try again later" if status >= 500 else cause.server_message))  # fmt: skip
        raise kind(f"The Hub answers {status}: {advice}.") from error
