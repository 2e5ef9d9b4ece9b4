"""Checkpoints on Civitai: found by the address of their page, downloaded once, resumed, and verified."""

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib import error as errors
from urllib import request as requests
from urllib.parse import parse_qs, urlsplit

from lorakit.storage import files, tensors

SITE = "https://civitai.com"
ADDRESS = re.compile(
    r"https://(?:www\.)?civitai\.com/(?:models/(\d+)(?:/[^?#]*)?|api/download/models/(\d+))(?:[?#].*)?"
)
SCHEME = "https"  # of every address that is opened
TOKEN = "CIVITAI_TOKEN"  # the environment variable
PATIENCE = 10.0  # seconds without an answer; Stop is heard after them at the latest
TRIES = 5  # failed ones in a row, none of which received anything
CHUNK = 2**20  # bytes between two looks at Stop
LARGEST_ANSWER = 2**24  # bytes of a description
FAILURES = (TimeoutError, ConnectionError, HTTPException, errors.URLError)  # after which another try may succeed
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Offer:
    """A file that the site describes."""

    title: str
    file: str
    size: int  # bytes
    sha256: str
    address: str
    licence: str


def is_civitai(reference: str) -> bool:
    """Whether a reference is the address of a model, a version or a download on Civitai."""
    return bool(ADDRESS.fullmatch(reference))


def fetch_civitai(reference: str, say: Callable[[str], None], progress: Progress) -> Path:
    """A checkpoint of Civitai in the user's cache, where all runs find it; an interrupted download resumes.

    A token in the variable CIVITAI_TOKEN is sent to Civitai only.

    Args:
        say: called with title, size and licence before the download.
        progress: called with megabytes; what it raises, such as KeyboardInterrupt, ends the download until the next.

    Raises:
        ValueError: no checkpoint in safetensors form; a file that differs from the digest that the site gives.
        FileNotFoundError: no such model, or the site does not answer.
        PermissionError: the site wants a token, or another one.
        OSError: no room on the disk.
    """
    match = ADDRESS.fullmatch(reference)
    assert match, reference
    query = {key: values[0] for key, values in parse_qs(urlsplit(reference).query).items()}
    version = match[2] or query.get("modelVersionId")
    if version and not version.isdecimal():
        raise ValueError("modelVersionId in an address of Civitai is a number. Check the address.")
    root = files.user_cache() / "civitai"
    if version and (kept := _kept(root / version)):
        return kept
    version, offer = _find(match[1], version, query)
    folder = root / version
    if kept := _kept(folder):
        return kept
    say(f"base      {offer.title}: {offer.file}, {offer.size / 1e6:,.0f} MB; {offer.licence}")
    folder.mkdir(parents=True, exist_ok=True)
    with files.claim_folder(folder, wait=True):
        return _kept(folder) or _download(offer, folder, progress)


def _kept(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.safetensors"))), None)


# ── Finding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _find(model_id: str | None, version_id: str | None, query: Mapping[str, str]) -> tuple[str, _Offer]:
    """The number of a version, and its file; of a model without a version the newest."""
    try:
        version = _describe(f"model-versions/{version_id}") if version_id else None
        model = _describe(f"models/{version['modelId'] if version else model_id}")
        version = version or model["modelVersions"][0]
        if model["type"] != "Checkpoint":
            raise ValueError(f"{model['name']} on Civitai is a {model['type']}: only a Checkpoint can be trained on.")
        return str(int(version["id"])), _offer(model, version, query)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"Civitai's description of the model cannot be read: {files.first_line(error)}.") from error


def _offer(model: dict[str, Any], version: dict[str, Any], query: Mapping[str, str]) -> _Offer:
    """The file of a version that the query of an address asks for (`fp=fp16&size=pruned`), else the primary one."""
    title = f"{model['name']}, {version['name']}"
    whole = [file for file in version["files"] if file.get("type") in ("Model", "Pruned Model")]
    safe = [file for file in whole if file["name"].lower().endswith(".safetensors")]
    if not safe:
        kinds = ", ".join(sorted({Path(file["name"]).suffix or "?" for file in whole})) or "nothing"
        raise ValueError(f"{title} on Civitai has no .safetensors file, only {kinds}: lorakit never loads a pickle.")

    def fitness(file: dict[str, Any]) -> tuple[int, bool]:
        facts = file.get("metadata") or {}
        return sum(facts.get(key) == query[key] for key in ("fp", "size") if key in query), bool(file.get("primary"))

    file = max(safe, key=fitness)
    digest = str((file.get("hashes") or {}).get("SHA256", "")).lower()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"Civitai gives no digest of {file['name']}: download it yourself, and give the file.")
    if urlsplit(file["downloadUrl"]).netloc != urlsplit(SITE).netloc:
        raise ValueError(f"Civitai's description of {title} names a download on another site. Give the file yourself.")
    name = re.sub(r"[^\w .+-]", "_", file["name"])[-100:].lstrip(".")
    return _Offer(title, name, round(float(file["sizeKB"]) * 1024), digest, file["downloadUrl"], _licence(model))


def _licence(model: dict[str, Any]) -> str:
    """The permissions that the author gives."""
    commercial = model.get("allowCommercialUse") or "None"
    uses = ", ".join(map(str, commercial)) if isinstance(commercial, list) else str(commercial)
    credit = "no credit needed" if model.get("allowNoCredit") else "credit the author"
    derivatives = "derivatives allowed" if model.get("allowDerivatives") else "no derivatives"
    return f"licence: commercial use {uses}, {credit}, {derivatives}"


def _describe(path: str) -> dict[str, Any]:
    """A description by the site's API."""
    try:
        with _opened(f"{SITE}/api/v1/{path}") as response:
            content = response.read(LARGEST_ANSWER)
    except FAILURES as error:
        raise FileNotFoundError(f"Civitai does not answer ({files.first_line(error)}). Try again later.") from error
    try:
        answer = json.loads(content)
    except ValueError as error:
        kind = tensors.disguise(content[:64]) or "no JSON"
        raise FileNotFoundError(f"Civitai's description of a model is {kind}. Try again later.") from error
    return answer


# ── Downloading ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _download(offer: _Offer, folder: Path, progress: Progress) -> Path:
    """Download into a partial file, verify it and give it its name."""
    partial, gigabytes = folder / f".{offer.sha256[:16]}.partial", offer.size / 1e9
    partial.touch()
    if shutil.disk_usage(folder).free < offer.size - partial.stat().st_size:
        raise OSError(errno.ENOSPC, f"there is no room for {offer.file}, {gigabytes:.1f} GB. Make some, and try again")
    failures = 0
    while (there := partial.stat().st_size) < offer.size:
        try:
            _receive(offer, partial, progress)
        except FAILURES as error:
            failures = 0 if partial.stat().st_size > there else failures + 1
            if failures == TRIES:
                raise FileNotFoundError(
                    f"Civitai does not answer ({files.first_line(error)}); {there / 1e6:,.0f} MB are kept. Try again."
                ) from error
            time.sleep(min(0.1 * 2**failures, 5))
    if there > offer.size or files.sha256(partial) != offer.sha256:
        partial.unlink()
        raise ValueError(f"{offer.file} is not the file with the size and digest that Civitai gives. Try again.")
    with tensors.open_safetensors(partial):
        pass
    os.replace(partial, folder / offer.file)
    return folder / offer.file


def _receive(offer: _Offer, partial: Path, progress: Progress) -> None:
    """Append what the site sends to the partial file, at most one block more than its size."""
    start, total = partial.stat().st_size, offer.size // 10**6
    with _opened(offer.address, start) as response, partial.open("ab") as stream:
        kind = response.headers.get_content_type()
        if kind in ("text/html", "application/json"):
            raise PermissionError(_wants_token(f"it answers with {kind} instead of {offer.file}"))
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            stream.truncate(0)  # it sends the whole file
        while stream.tell() <= offer.size and (block := response.read1(CHUNK)):
            stream.write(block)
            progress("MB of the base", min(stream.tell() // 10**6, total), total + 1)
        if stream.tell() < offer.size:
            raise ConnectionError("the download was cut off")


@contextlib.contextmanager
def _opened(address: str, start: int = 0) -> Any:
    """An answer of the site, from a byte on, with the user's token.

    Raises:
        FileNotFoundError, PermissionError: the site refuses; says why.
        FAILURES: another try may succeed.
    """
    part = {"Range": f"bytes={start}-"} if start else {}
    request = requests.Request(address, headers={"User-Agent": "lorakit"} | part)
    if token := os.environ.get(TOKEN, "").strip():
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # other hosts do not get it
    try:
        _check_scheme(address)
        response = requests.build_opener(_Redirects).open(request, timeout=PATIENCE)
    except errors.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise PermissionError(_wants_token(f"answer {error.code}")) from None
        if error.code == 404:
            raise FileNotFoundError("Civitai has no such model or version. Check the address.") from None
        raise ConnectionError(f"answer {error.code}") from None
    with response:
        yield response


class _Redirects(requests.HTTPRedirectHandler):
    """Follows redirects to secure addresses; headers that were not meant for other hosts stay behind."""

    def redirect_request(self, *details: Any) -> requests.Request | None:
        _, answer, *_, address = details
        try:
            _check_scheme(address)
        except ValueError:
            answer.close()
            raise
        return super().redirect_request(*details)


def _check_scheme(address: str) -> None:
    if urlsplit(address).scheme != SCHEME:
        raise ValueError(f"Civitai leads to an address without {SCHEME}: it is not opened. Download the file yourself.")


def _wants_token(reason: str) -> str:
    state = "another token" if os.environ.get(TOKEN) else "a token"
    return (
        f"Civitai wants {state} for this file ({reason}). Make one at civitai.com/user/account, set {TOKEN} to it (on "
        "Colab as a secret), and try again; or download the file yourself."
    )
