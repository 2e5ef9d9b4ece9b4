"""A model of transformers' kind by a short name, a hub id or a folder; no pickle is ever fetched."""

from collections.abc import Mapping
from pathlib import Path

DESCRIPTIONS = ["*.json", "*.txt", "*.jinja", "selected_tags.csv"]


def fetch_model(name: str, known: Mapping[str, tuple[str, str | None]]) -> Path:
    """The folder of a model, from the hub where it is not here.

    Args:
        name: one of `known`, a folder, or a hub id.
        known: short name → hub id and revision.

    Raises:
        FileNotFoundError: no such model, or the hub is out of reach.
    """
    found = locate_model(name, known)
    return found if isinstance(found, Path) else _from_hub(name, *found)


def locate_model(name: str, known: Mapping[str, tuple[str, str | None]]) -> Path | tuple[str, str | None]:
    """A model's folder, or its hub id and revision.

    Raises:
        FileNotFoundError: no such model.
    """
    if name in known:
        return known[name]
    if (folder := Path(name).expanduser()).is_dir():
        return folder.resolve()
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name, None
    raise FileNotFoundError(f"There is no model {name!r}. Use {', '.join(known)}, a folder, or a hub id.")


def _from_hub(name: str, repository: str, revision: str | None) -> Path:
    """A model's folder in the hub's cache, with the files that are read alone."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=DESCRIPTIONS))
        weights = "model.onnx" if (folder / "selected_tags.csv").is_file() else "*.safetensors"
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*DESCRIPTIONS, weights]))
    except Exception as error:  # the hub raises a dozen kinds: offline, gated, not found, rate limit …
        raise FileNotFoundError(
            f"The model {name!r} ({repository}) is not here and could not be fetched from the hub "
            f"({first_line(error)}). "
            "Check the connection, or fetch it elsewhere and give its folder as the model."
        ) from error


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
