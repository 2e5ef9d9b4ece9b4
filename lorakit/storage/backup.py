"""Verified copies of a run at a second place: a folder (Drive, a network volume) or a repository on the Hub.

No copy is ever overwritten: each has its own name with its step, is read back, and counts only if its digest is that
of the original. A background thread makes the copies, and a place that fails never stops a run.
"""

import re
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from lorakit.storage import files

STATE = re.compile(r"(step|state)-(\d+)\.safetensors")  # can be resumed: regular, or saved in between
OURS = re.compile(r"(?:step|state|log)-(\d+)\.")
Source = Path | bytes
Accepted = TypeVar("Accepted")


def backup_name(step: int, whole: bool, regular: bool) -> str:
    """A checkpoint's name at the second place, which tells its contents: no copy there ever changes.

    Args:
        whole: it can be resumed; else it contains only adapter weights.
        regular: saved at a step of `save_every`.
    """
    if not whole:
        return f"step-{step:06d}.weights.safetensors"
    return f"{'step' if regular else 'state'}-{step:06d}.safetensors"


def log_name(step: int) -> str:
    """The name at the second place of the log up to a step."""
    return f"log-{step:06d}.jsonl"


# ── Places ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _size(source: Source) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _digest(source: Source) -> str:
    return sha256(source).hexdigest() if isinstance(source, bytes) else files.sha256(source)


@dataclass(frozen=True)
class Folder:
    """Copies in a folder, which may be on a drive that uploads its files later."""

    path: Path

    def names(self) -> list[str]:
        """The names of the copies; none if the place does not exist yet."""
        return [file.name for file in self.path.iterdir()] if self.path.is_dir() else []

    def put(self, source: Source, name: str) -> None:
        """Copy a file, or bytes, there under a new name, and verify the copy; on any error none is left there."""
        with files.write_file(self.path / name, _size(source)) as partial:
            if isinstance(source, bytes):
                partial.write_bytes(source)
            else:
                shutil.copyfile(source, partial)
        if files.sha256(self.path / name) != _digest(source):
            self.remove(name)
            raise OSError(f"the copy of {name} differs from the file")

    def get(self, name: str, path: Path) -> None:
        """Copy from there into a file. The caller must verify the contents."""
        with files.write_file(path) as partial:
            shutil.copyfile(self.path / name, partial)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Hub:
    """Copies in a folder of a repository on the Hugging Face Hub, with the methods of `Folder`.

    A repository that does not exist is made, private. huggingface_hub finds the token: `hf auth login`, or HF_TOKEN.
    """

    repository: str  # "owner/name"
    folder: str  # in the repository

    @property
    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi()

    def names(self) -> list[str]:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            names = self._api.list_repo_files(self.repository)
        except RepositoryNotFoundError:
            return []
        return [Path(name).name for name in names if Path(name).parent.as_posix() == self.folder]

    def put(self, source: Source, name: str) -> None:
        path = f"{self.folder}/{name}"
        self._api.create_repo(self.repository, private=True, exist_ok=True)
        self._api.upload_file(
            path_or_fileobj=source, path_in_repo=path, repo_id=self.repository, commit_message=f"lorakit: {name}"
        )
        copies = self._api.get_paths_info(self.repository, [path])
        if not copies or copies[0].size != _size(source) or (copies[0].lfs and copies[0].lfs.sha256 != _digest(source)):
            self.remove(name)
            raise OSError(f"the copy of {name} on the Hub differs from the file")

    def get(self, name: str, path: Path) -> None:
        from huggingface_hub import hf_hub_download

        with files.write_file(path) as partial:
            shutil.copyfile(hf_hub_download(self.repository, f"{self.folder}/{name}"), partial)

    def remove(self, name: str) -> None:
        self._api.delete_file(f"{self.folder}/{name}", self.repository, commit_message=f"lorakit: without {name}")


Place = Folder | Hub


def backup_place(reference: str, run: str) -> Place:
    """The place for a run's copies.

    Args:
        reference: a folder, or "hub:owner/name".
        run: name of the run's folder, which keeps the copies of several runs apart.

    Raises:
        ValueError: no repository's name, or a file instead of a folder.
        FileNotFoundError: the folder's parent does not exist.
    """
    if reference.startswith("hub:"):
        repository = reference.removeprefix("hub:")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise ValueError(f"backup {reference!r} names no repository: write it as 'hub:owner/name'.")
        return Hub(repository, run)
    folder = Path(reference).expanduser()
    if folder.is_file():
        raise ValueError(f"backup: {folder.name} is a file. Name a folder for the copies.")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"backup: the parent folder of {folder.name} does not exist. Is the drive mounted?")
    return Folder(folder / run)


def copy_verified(path: Path, folder: Path) -> list[Path]:
    """Copy a file, or a folder of files, to another folder, and verify the copies. No file is replaced.

    Returns:
        The copies, with those that already existed.

    Raises:
        FileExistsError: another file has the name there.
        OSError: a copy cannot be written, or differs from its file.
    """
    place = Folder(folder)
    names = {path: path.name} if path.is_file() else {
        file: file.relative_to(path.parent).as_posix() for file in sorted(path.rglob("*")) if file.is_file()
    }  # fmt: skip
    for file, name in names.items():
        if not (folder / name).exists():
            place.put(file, name)
        elif files.sha256(folder / name) != files.sha256(file):
            raise FileExistsError(f"{name} already exists there with other contents. Export under another name.")
    return [folder / name for name in names.values()]


# ── Out and back ────────────────────────────────────────────────────────────────────────────────────────────────────


class Copier:
    """Copies a run's files to a place from its own thread; if the place is slow, only the latest files.

    Args:
        place: for the copies.
        states: how many checkpoints that can be resumed are kept there; of older regular ones the weights are kept.
    """

    def __init__(self, place: Place, states: int):
        self.place, self.states = place, states
        self.newest: int | None = None  # the last step whose files are copied
        self.failed: str | None = None  # why the last copy failed
        self._waiting: tuple[int, Mapping[str, tuple[Source, int]]] | None = None  # step; name → source, bytes
        self._back: int | None = None
        self._messages: list[str] = []
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="lorakit-backup", daemon=True)
        self._thread.start()

    def put(self, step: int, copies: Mapping[str, Source]) -> None:
        """Have files copied that the place lacks, instead of files that still wait.

        Args:
            step: at which the files were written.
            copies: name at the place → file or bytes.
        """
        sized = {name: (source, _size(source)) for name, source in copies.items()}
        with self._changed:
            self._waiting = step, sized
            self._changed.notify()

    def back(self, step: int) -> None:
        """Have the copies of later steps removed: a run that diverged returned to this step."""
        with self._changed:
            self._waiting, self._back = None, step if self._back is None else min(step, self._back)
            self._changed.notify()

    def messages(self) -> list[str]:
        """The messages since the last call, for the thread that shows them."""
        with self._changed:
            messages, self._messages = self._messages, []
        return messages

    def close(self, patience: float) -> str | None:
        """Wait for the files that still wait, at most so many seconds.

        Returns:
            Why not all files are copied; None if they are.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(patience)
        if self._thread.is_alive():
            self._say(f"not done after {patience:g} s: the second place is behind")
            return f"not done after {patience:g} s"
        if self.newest is not None and not self.failed:
            self._say(f"all at the second place up to step {self.newest}, read back and verified")
        return self.failed

    def _say(self, text: str) -> None:
        with self._changed:
            self._messages.append(f"backup    {text}")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._back is not None or self._closing)
                back, self._back = self._back, None
                if not self._waiting and back is None:
                    return
                (step, copies), self._waiting = self._waiting or (back, {}), None
            try:
                if back is not None:
                    self._remove_after(back)
                self._copy(copies)
            except Exception as error:  # any: a full drive, a lost network, the Hub's own two dozen
                self.failed = files.first_line(error)
                self._say(f"step {step} is not at the second place: {self.failed}. Training continues")
                continue
            if self.failed:
                self._say(f"works again, step {step} is at the second place")
            self.newest, self.failed = step, None

    def _copy(self, copies: Mapping[str, tuple[Source, int]]) -> None:
        names = set(self.place.names())
        for name, (source, size) in copies.items():
            # A checkpoint that was thinned or removed meanwhile is superseded: the next call has its new name.
            intact = isinstance(source, bytes) or (source.is_file() and source.stat().st_size == size)
            if intact and name not in names:
                self._put(source, name, names)
                names.add(name)
        self._prune(names, self.states)

    def _put(self, source: Source, name: str, names: set[str]) -> None:
        """Copy a file; on a full disk, remove all but the newest state there and try again."""
        try:
            self.place.put(source, name)
        except OSError as error:
            if error.errno not in files.DISK_FULL or not self._prune(names, 1):
                raise
            self.place.put(source, name)

    def _prune(self, names: set[str], states: int) -> bool:
        """Remove old states from the place and from `names`; regular ones only if their weights are there.

        Returns:
            Whether files were removed.
        """
        matches = sorted(filter(None, map(STATE.fullmatch, names)), key=lambda match: int(match[2]), reverse=True)
        superseded = [match for match in matches[states:]
                      if match[1] == "state" or backup_name(int(match[2]), False, True) in names]  # fmt: skip
        removed = {name for match in superseded for name in (match[0], log_name(int(match[2]))) if name in names}
        for name in removed:
            self.place.remove(name)
        names -= removed
        return bool(removed)

    def _remove_after(self, step: int) -> None:
        """Remove checkpoints and logs of later steps."""
        for name in self.place.names():
            if (match := OURS.match(name)) and int(match[1]) > step:
                self.place.remove(name)


def newest_backup(
    place: Place, after: int, folder: Path, accept: Callable[[Path], Accepted], warn: Callable[[str], None]
) -> Accepted | None:
    """Fetch the newest checkpoint that can be resumed and is newer than a step, and the log up to it.

    Args:
        after: the newest step on this machine.
        folder: for the fetched files.
        accept: reads and verifies a file; if it raises, the next older one is tried.
        warn: called with a message if the place cannot be read, or a file in it is damaged.

    Returns:
        The result of `accept`; None if there is no such checkpoint, or the place cannot be read.
    """
    try:
        names = place.names()
    except Exception as error:  # any, as when copying
        warn(f"the second place cannot be read: {files.first_line(error)}. Its copies are not used")
        return None
    checkpoints = {int(match[2]): match[0] for match in filter(None, map(STATE.fullmatch, names))}
    for step in sorted((step for step in checkpoints if step > after), reverse=True):
        file = folder / f"step-{step:06d}.safetensors"
        try:
            place.get(checkpoints[step], file)
            accepted = accept(file)
        except Exception as error:  # any, as when copying: an older one may be intact
            with suppress(OSError):
                file.unlink(missing_ok=True)
            warn(f"{files.first_line(error)} (at the second place)")
            continue
        try:
            if log_name(step) in names:
                place.get(log_name(step), folder / "log.jsonl")
        except Exception as error:
            warn(f"the log of step {step} cannot be fetched: {files.first_line(error)}")
        return accepted
    return None
