"""Files of the Hugging Face Hub, and models of transformers' kind by short name, Hub id or folder. Never a pickle."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorakit.storage.files import first_line

DESCRIPTIONS = ["*.json", "*.txt", "*.jinja", "selected_tags.csv"]
Known = Mapping[str, tuple[str, str | None]]  # short name → Hub id and revision


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, "owner/name"."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name


def fetch_from_hub(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a repository in the Hub's cache, with its files that match the patterns.

    Raises:
        FileNotFoundError: no such repository, or the Hub does not answer; says why.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the Hub raises a dozen kinds: offline, gated, not found, rate limit …
        raise FileNotFoundError(
            f"{repository!r} is not a folder on this machine and cannot be fetched from the Hub ({first_line(error)}). "
            "Check the spelling and the connection; for a gated model accept its terms and set HF_TOKEN; or download "
            "it elsewhere and give its folder."
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
