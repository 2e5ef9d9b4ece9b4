"""Files of the Hugging Face Hub, and models of transformers' kind by short name, Hub id or folder. Never a pickle."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from lorakit.storage.files import first_line

DESCRIPTIONS = ["*.json", "*.txt", "*.jinja", "selected_tags.csv"]
HUB_FILE = re.compile(
    r"(?:https://huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)/(?:(?:blob|resolve)/([^/]+)/)?([^?\\]+\.safetensors)(?:\?.*)?"
)
Known = Mapping[str, tuple[str, str | None]]  # short name → Hub id and revision


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, "owner/name"."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name


def hub_file(reference: str) -> tuple[str, str, str | None] | None:
    """(repository, path, revision) of a safetensors file on the Hub; None if the reference has another form.

    Args:
        reference: "owner/name/file.safetensors", or the address of the file's page or download.
    """
    match = HUB_FILE.fullmatch(unquote(reference) if reference.startswith("https:") else reference)
    return (match[1], match[3], match[2]) if match else None


def fetch_hub_file(repository: str, path: str, revision: str | None = None) -> Path:
    """A file of a repository, in the Hub's cache; an interrupted download resumes.

    Raises:
        FileNotFoundError: no such file, or the Hub does not answer; says why.
    """
    from huggingface_hub import hf_hub_download

    with _explained(f"{repository}/{path}"):
        return Path(hf_hub_download(repository, path, revision=revision))


def fetch_from_hub(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a repository in the Hub's cache, with its files that match the patterns.

    Raises:
        FileNotFoundError: no such repository, or the Hub does not answer; says why.
    """
    from huggingface_hub import snapshot_download

    with _explained(repository):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def _explained(reference: str) -> Iterator[None]:
    """Turn the Hub's errors into one that says what to do."""
    try:
        yield
    except Exception as error:  # the Hub raises a dozen kinds: offline, gated, not found, rate limit …
        raise FileNotFoundError(
            f"{reference!r} is not on this machine and cannot be fetched from the Hub ({first_line(error)}). "
            "Check the spelling and the connection; for a gated model accept its terms and set HF_TOKEN; or download "
            "it elsewhere and give its folder or file."
        ) from error


def locate_model(name: str, known: Known) -> Path | tuple[str, str | None]:
    """A model's folder, or its Hub id and revision.

    Args:
        name: one of `known`, a folder, or a Hub id.

    Raises:
        FileNotFoundError: none of these.
    """
    if name in known:
        return known[name]
    if (folder := Path(name).expanduser()).is_dir():
        return folder.resolve()
    if is_hub_id(name):
        return name, None
    raise FileNotFoundError(f"There is no model {name!r}. Use {', '.join(known)}, a folder, or a Hub id.")


def fetch_model(name: str, known: Known) -> Path:
    """The folder of a model, fetched from the Hub if needed; arguments and errors as `locate_model`, `fetch_from_hub`.

    Of a tagger, `model.onnx` is fetched; of other models, only safetensors weights.
    """
    place = locate_model(name, known)
    if isinstance(place, Path):
        return place
    repository, revision = place
    try:
        folder = fetch_from_hub(repository, DESCRIPTIONS, revision)
        weights = "model.onnx" if (folder / "selected_tags.csv").is_file() else "*.safetensors"
        return fetch_from_hub(repository, [*DESCRIPTIONS, weights], revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The model {name!r}: {error}") from error
