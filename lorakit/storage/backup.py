"""Verified copies of a run at a second place: a folder (Drive, a network volume) or a repository on the hub.

Nothing there is ever overwritten: each copy has a name of its own with its step, is read back, and counts only if its
digest is that of the original. A background thread does it, and a place that fails never stops a run.
"""

import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol, TypeVar

from lorakit.storage import files

STATE = re.compile(r"(step|state)-(\d+)\.safetensors")  # one to go on from: regular, or saved in between
OURS = re.compile(r"(?:step|state|log)-(\d+)\.")
Source = Path | bytes
Accepted = TypeVar("Accepted")


def backup_names(step: int, whole: bool, regular: bool) -> str:
    """What a checkpoint is called at the second place: by what it holds, as nothing there changes its contents."""
    if not whole:
        return f"step-{step:06d}.weights.safetensors"
    return f"{'step' if regular else 'state'}-{step:06d}.safetensors"


class Place(Protocol):
    """Where copies are kept."""

    def names(self) -> list[str]:
        """What is there; nothing where the place itself is not there yet."""

    def put(self, source: Source, name: str) -> None:
        """Copy a file, or bytes, there under a new name, and make sure that they arrived.

        Raises:
            Exception: of any kind; nothing that could be taken for a good copy is there then.
        """

    def get(self, name: str, path: Path) -> None:
        """Copy from there into a file. What arrives must be verified by whoever knows what it is."""

    def remove(self, name: str) -> None:
        """Remove a copy."""


def _digest(source: Source) -> str:
    return sha256(source).hexdigest() if isinstance(source, bytes) else files.sha256(source)


@dataclass(frozen=True)
class Folder:
    """A folder, which may be on a drive that uploads later what is written to it."""

    path: Path

    def names(self) -> list[str]:
        return [file.name for file in self.path.iterdir()] if self.path.is_dir() else []

    def put(self, source: Source, name: str) -> None:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        with files.write_file(self.path / name, size) as partial:
            if isinstance(source, bytes):
                partial.write_bytes(source)
            else:
                shutil.copyfile(source, partial)
        if files.sha256(self.path / name) != _digest(source):
            self.remove(name)
            raise OSError(f"{name} did not arrive as it was sent")

    def get(self, name: str, path: Path) -> None:
        with files.write_file(path) as partial:
            shutil.copyfile(self.path / name, partial)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Hub:
    """A folder of a repository on the Hugging Face hub, which is made, private, where it is not there yet.

    The token is the hub's own affair: `hf auth login`, or HF_TOKEN in the environment.
    """

    repository: str  # "owner/name"
    folder: str  # in the repository

    @property
    def _api(self):
        from huggingface_hub import HfApi

        return HfApi()

    def names(self) -> list[str]:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            found = self._api.list_repo_files(self.repository)
        except RepositoryNotFoundError:
            return []
        return [Path(name).name for name in found if Path(name).parent.as_posix() == self.folder]

    def put(self, source: Source, name: str) -> None:
        path = f"{self.folder}/{name}"
        self._api.create_repo(self.repository, private=True, exist_ok=True)
        self._api.upload_file(
            path_or_fileobj=source, path_in_repo=path, repo_id=self.repository, commit_message=f"lorakit: {name}"
        )
        found = self._api.get_paths_info(self.repository, [path])
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if not found or found[0].size != size or (found[0].lfs and found[0].lfs.sha256 != _digest(source)):
            self.remove(name)
            raise OSError(f"{name} did not arrive on the hub as it was sent")

    def get(self, name: str, path: Path) -> None:
        from huggingface_hub import hf_hub_download

        with files.write_file(path) as partial:
            shutil.copyfile(hf_hub_download(self.repository, f"{self.folder}/{name}"), partial)

    def remove(self, name: str) -> None:
        self._api.delete_file(f"{self.folder}/{name}", self.repository, commit_message=f"lorakit: without {name}")


def backup_place(reference: str, run: str) -> Place:
    """The place for a run's copies.

    Args:
        reference: a folder, or "hub:owner/name".
        run: name of the run's folder, by which the copies of several runs are kept apart.

    Raises:
        ValueError: no repository's name, or a file where the folder should be.
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
        raise FileNotFoundError(
            f"backup: the folder that {folder.name} would be in is not there. Is the drive mounted?"
        )
    return Folder(folder / run)


class Copier:
    """Brings a run's files to a place in a thread of its own, the latest where it cannot keep up.

    Args:
        place: where to.
        states: how many checkpoints to go on from stay there; of older regular ones the weights do.
    """

    def __init__(self, place: Place, states: int):
        self.place, self.states = place, states
        self.newest: int | None = None  # the last step that is safely there
        self.failed: str | None = None  # why the last one tried is not
        self._waiting: tuple[int, dict] | None = None
        self._back: int | None = None
        self._told: list[str] = []
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="lorakit-backup", daemon=True)
        self._thread.start()

    def put(self, step: int, copies: Mapping[str, Source]) -> None:
        """Have files copied that are not there yet, in place of what is still waiting.

        Args:
            step: what they bring to safety.
            copies: name there → file or bytes.
        """
        sized = {name: (it, it.stat().st_size if isinstance(it, Path) else len(it)) for name, it in copies.items()}
        with self._changed:
            self._waiting = step, sized
            self._changed.notify()

    def back(self, step: int) -> None:
        """Have what is newer than a step removed: a run that diverged goes back there, and comes another way."""
        with self._changed:
            self._waiting, self._back = None, step if self._back is None else min(step, self._back)
            self._changed.notify()

    def told(self) -> list[str]:
        """What there is to say since the last time, for whoever may show something."""
        with self._changed:
            told, self._told = self._told, []
        return told

    def close(self, patience: float) -> str | None:
        """Let what is waiting be copied, for so many seconds; then say what is there.

        Returns:
            Why not everything is there; None where it is.
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
            self._told.append(f"backup    {text}")

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
                    self._go_back(back)
                self._copy(copies)
            except Exception as error:  # any: a full drive, a lost network, the hub's own two dozen
                self.failed = _first_line(error)
                self._say(f"step {step} is not at the second place: {self.failed}. Training goes on")
                continue
            if self.failed:
                self._say(f"works again, step {step} is at the second place")
            self.newest, self.failed = step, None

    def _copy(self, copies: Mapping[str, tuple[Source, int]]) -> None:
        there = set(self.place.names())
        for name, (source, size) in copies.items():
            if name in there:
                continue
            # One that was thinned or removed meanwhile is superseded: the next round knows it by its new name.
            if isinstance(source, bytes) or (source.is_file() and source.stat().st_size == size):
                try:
                    self.place.put(source, name)
                except OSError as error:
                    if error.errno not in files.DISK_FULL or not self._prune(there, 1):
                        raise
                    self.place.put(source, name)
                there.add(name)
        self._prune(there, self.states)

    def _prune(self, there: set[str], states: int) -> int:
        """Remove states beyond the newest so many, of regular ones where their weights are there (in place).

        Returns:
            How many files were removed.
        """
        found, before = [match for name in there if (match := STATE.fullmatch(name))], len(there)
        for match in sorted(found, key=lambda match: int(match[2]), reverse=True)[states:]:
            if match[1] == "state" or backup_names(int(match[2]), False, True) in there:
                for name in (match[0], log_name(int(match[2]))):
                    if name in there:
                        self.place.remove(name)
                        there.discard(name)
        return before - len(there)

    def _go_back(self, step: int) -> None:
        """Remove checkpoints and logs of later steps."""
        for name in self.place.names():
            if (match := OURS.match(name)) and int(match[1]) > step:
                self.place.remove(name)


def log_name(step: int) -> str:
    """What the log up to a step is called at the second place."""
    return f"log-{step:06d}.jsonl"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def newest_backup(
    place: Place, after: int, folder: Path, accept: Callable[[Path], Accepted], warn: Callable[[str], None]
) -> Accepted | None:
    """Fetch the newest checkpoint that can be gone on from and is newer than what is here, and the log up to it.

    Args:
        after: the step that is here.
        folder: for what is fetched.
        accept: reads and verifies a file; where it raises ValueError the next older one is tried.

    Returns:
        What `accept` made of it; None where there is none, or the place cannot be reached, which is told to `warn`.
    """
    try:
        there = place.names()
        found = {int(match[2]): match[0] for name in there if (match := STATE.fullmatch(name))}
        for step in sorted((step for step in found if step > after), reverse=True):
            file = folder / f"step-{step:06d}.safetensors"
            try:
                place.get(found[step], file)
                accepted = accept(file)
            except Exception as error:  # as when copying: an older one may be sound
                file.unlink(missing_ok=True)
                warn(f"{_first_line(error)} (at the second place)")
                continue
            try:
                if log_name(step) in there:
                    place.get(log_name(step), folder / "log.jsonl")
            except Exception as error:
                warn(f"the log of step {step} cannot be fetched: {_first_line(error)}")
            return accepted
    except Exception as error:  # as when copying
        warn(f"the second place cannot be read: {_first_line(error)}. What it holds is not looked at")
    return None


def copy_verified(path: Path, folder: Path) -> list[Path]:
    """Copy a file, or a folder of files, to another place, read it back there and compare. Nothing is replaced.

    Returns:
        The copies; those that were there already, with the same contents, among them.

    Raises:
        FileExistsError: another file has the name there.
        OSError: it cannot be written there, or did not arrive as it was sent.
    """
    place = Folder(folder)
    names = {path: path.name} if path.is_file() else {
        file: file.relative_to(path.parent).as_posix() for file in sorted(path.rglob("*")) if file.is_file()
    }  # fmt: skip
    for file, name in names.items():
        there = folder / name
        if not there.exists():
            place.put(file, name)
        elif files.sha256(there) != files.sha256(file):
            raise FileExistsError(f"{name} is there already with other contents. Export under another name.")
    return [folder / name for name in names.values()]
