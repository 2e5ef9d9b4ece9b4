"""Colab, Kaggle, RunPod, Vast.ai, your own machine: folders for runs, secrets, uploads, what the machine can do.

Training needs nothing of this; notebooks take their folders from here.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

from lorakit import dataset as datasets
from lorakit import page
from lorakit.console import Console
from lorakit.plots import TONES

LITTLE_GPU, SDXL_GPU = 4, 11.5  # GiB: SD 1.5 needs at least 4; cards sold with 12 GB, enough for SDXL, show 11.5
LITTLE_RAM = 4  # GiB: loading SD 1.5's UNet in float32
LITTLE_DISK, SDXL_DISK = 6, 20  # GiB: downloads of SD 1.5 (4) or SDXL (14), and a run's checkpoints


@dataclass(frozen=True)
class Host:
    """A place where notebooks run, and its advice for users."""

    name: str
    folder: Path | None  # for files; None: the working directory
    keeps: str  # what remains after a stop
    gpu: str  # how to get a GPU, or a larger one
    disk: str  # how to get more disk
    restart: str = "Kernel → Restart Kernel"


COLAB = Host(
    "Google Colab", Path("/content"),
    "all files are deleted when the session ends: keep copies on Drive, or download the LoRA",
    "Runtime → Change runtime type → T4 GPU, then Runtime → Run all",
    "Runtime → Disconnect and delete runtime gives an empty disk",
    "Runtime → Restart session",
)  # fmt: skip
KAGGLE = Host(
    "Kaggle",
    Path("/kaggle/working"),
    "/kaggle/working (20 GB) is kept with a saved version of the notebook, or with persistence of files; all else is "
    "deleted when the session ends",
    "in the notebook's options, choose the accelerator GPU T4 x2 (30 hours a week)",
    "delete files in /kaggle/working; bases are on a larger disk, which is not kept",
    "Run → Restart & clear cell outputs",
)
RUNPOD = Host(
    "RunPod", Path("/workspace"),
    "/workspace is kept when the pod stops, but not when it is terminated; a stop deletes packages: run the set-up "
    "again",
    "deploy a pod with an NVIDIA card of 12 GB or more, from a PyTorch template",
    "edit the pod and give its volume 30 GB or more",
)  # fmt: skip
VAST = Host(
    "Vast.ai", Path("/workspace"),
    "all files are kept while the instance is stopped (its disk is charged for), and deleted when it is destroyed",
    "rent an instance with an NVIDIA card of 12 GB or more, with the PyTorch template",
    "rent an instance with 30 GB of disk or more: it cannot be enlarged later",
)  # fmt: skip
OWN = Host(
    "this machine", None,
    "files are kept",
    "use a machine with an NVIDIA card of 6 GB or more and a working driver (nvidia-smi lists the card), or an Apple "
    "one; or rent one: Colab, RunPod, Vast.ai",
    "make room, or start Jupyter on another disk",
)  # fmt: skip


def here() -> Host:
    """The current host, recognised by its environment variables."""
    if "COLAB_RELEASE_TAG" in os.environ and _colab():
        return COLAB
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return KAGGLE
    if "RUNPOD_POD_ID" in os.environ:
        return RUNPOD
    # Every open port has a variable; some images lack the label.
    if any(name == "VAST_CONTAINERLABEL" or name.startswith("VAST_TCP_PORT_") for name in os.environ):
        return VAST
    return OWN


def _colab() -> bool:
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:  # the package "google" is missing too
        return False


# ── Where files go ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Storage:
    """Folders to work in."""

    root: Path  # on a fast local disk
    backup: str | None = None  # for the setting `backup`: a folder that is kept when the machine is gone

    @property
    def runs(self) -> Path:
        """The folder of runs, one folder each."""
        return self.root / "runs"

    @property
    def lasting(self) -> Path:
        """The folder of small files for the next session: settings, decisions about pictures."""
        return Path(self.backup or self.root)


def storage(drive: bool = False, console: Console | None = None) -> Storage:
    """The folders for runs and pictures on this host, and for backups; none is created.

    On a rented host, the variable WORKSPACE replaces the host's usual folder.

    Args:
        drive: on Colab, mount Google Drive for backups; Colab asks for permission. If that fails, the console says
            why, and there is no backup.
        console: None prints.
    """
    host = here()
    if host.folder is None:
        return Storage(Path.cwd())
    folder = Path(os.environ.get("WORKSPACE") or host.folder)
    mount = drive and host is COLAB
    return Storage(folder / "lorakit", _drive(folder / "drive", console or Console()) if mount else None)


def _drive(mountpoint: Path, console: Console) -> str | None:
    """Mount Google Drive and return its folder for backups; None if it cannot be mounted."""
    folder = mountpoint / "MyDrive"
    reason = "it was missing after mounting"
    try:
        from google.colab import drive

        drive.mount(str(mountpoint))
    except Exception as error:  # refused, no answer, a domain's policy: ValueError, MessageError, pexpect's TIMEOUT …
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if folder.is_dir():
        return str(folder / "lorakit")
    console.say(f"Google Drive is not mounted ({reason}). There are no backups; run this cell again to try again.")
    return None


# ── Secrets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def secret(name: str) -> str | None:
    """A secret of the user: an environment variable, else one of Colab's or Kaggle's secrets, else None.

    lorakit never prints or writes secrets. A missing or forbidden secret is not an error.
    """
    if value := os.environ.get(name, "").strip():
        return value
    try:
        if here() is KAGGLE:
            from kaggle_secrets import UserSecretsClient

            return (UserSecretsClient().get_secret(name) or "").strip() or None
        from google.colab import userdata

        return (userdata.get(name) or "").strip() or None
    except Exception:  # no Colab; by its release: SecretNotFoundError, NotebookAccessError, TimeoutException
        return None


def use_token(name: str = "HF_TOKEN") -> bool:
    """Put a secret into the environment of this process and its children; it is written to no file.

    huggingface_hub reads HF_TOKEN, downloads from Civitai read CIVITAI_TOKEN.

    Returns:
        Whether there is a token. Without one, public repositories on the Hub work.
    """
    token = secret(name)
    if token:
        os.environ[name] = token
    return token is not None


# ── Upload and download ─────────────────────────────────────────────────────────────────────────────────────────────


def upload(into: str | Path, console: Console | None = None) -> Path | None:
    """Ask for files through Colab's dialog and move them into a folder; files of the same name are replaced.

    Returns:
        The file if it is one archive, else the folder: both can be scanned. None if no file was chosen, and on hosts
        other than Colab, where Jupyter's file browser uploads.
    """
    into = Path(into).absolute()
    if not _colab():
        (console or Console()).say(f"Upload files with Jupyter's file browser, at the left, to the folder {into.name}.")
        return None
    from google.colab import files

    into.mkdir(parents=True, exist_ok=True)
    # Colab writes into the working directory, and renames files that exist there already.
    with tempfile.TemporaryDirectory(prefix=".upload-", dir=into) as empty:
        before = Path.cwd()
        os.chdir(empty)
        try:
            files.upload()
        finally:
            os.chdir(before)
        names = [path.name for path in Path(empty).iterdir()]
        for name in names:
            os.replace(Path(empty, name), into / name)
    if len(names) == 1 and names[0].lower().endswith(datasets.ARCHIVES):
        return into / names[0]
    return into if names else None


def download(path: str | Path) -> None:
    """Download a file to the user's computer: directly on Colab, elsewhere by a link.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.name} to download. Is the run finished?")
    if _colab():
        from google.colab import files

        files.download(str(path))
        return
    from IPython.display import display

    # Jupyter serves its own folder by relative addresses; without `download`, JupyterLab would open the file.
    link = quote(Path(os.path.relpath(path)).as_posix())
    html = f'<a href="{link}" download="{escape(path.name)}">Download {escape(path.name)}</a>'
    display({"text/html": html, "text/plain": f"{path.name} is ready"}, raw=True)


# ── What the machine can do ─────────────────────────────────────────────────────────────────────────────────────────

MARKS = {"good": "✓", "warning": "!", "bad": "✗", "": " "}


@dataclass(frozen=True)
class Fact:
    """One property of the machine."""

    name: str
    text: str
    tone: str = ""  # "good", "warning", "bad", or ""
    advice: str = ""


@dataclass(frozen=True, repr=False)
class Machine:
    """What this machine can do. It shows itself in a notebook and at a terminal."""

    facts: tuple[Fact, ...]

    @property
    def ready(self) -> bool:
        """Whether training can start."""
        return all(fact.tone != "bad" for fact in self.facts)

    def __repr__(self) -> str:
        width = max(len(fact.name) for fact in self.facts)
        return "\n".join(
            f"{MARKS[fact.tone]} {fact.name:<{width}}  {fact.text}"
            + (f"\n  {'':<{width}}  → {fact.advice}" if fact.advice else "")
            for fact in self.facts
        )

    def _repr_html_(self) -> str:
        rows = []
        for fact in self.facts:
            tone, text = f'<span style="color:{TONES[fact.tone]}">', escape(fact.text)
            text += f"<br>{tone}→ {escape(fact.advice)}</span>" if fact.advice else ""
            rows.append([f"{tone}{MARKS[fact.tone]}</span>", f"<b>{escape(fact.name)}</b>", text])
        return page.table(rows)


def check() -> Machine:
    """What this machine can do, with advice for what is missing in the host's own terms."""
    host = here()
    return Machine((_kept(host), _gpu(host), *_memory(host), _disk(host), *_software(host)))


def _kept(host: Host) -> Fact:
    if host is RUNPOD and not os.path.ismount(storage().root.parent):
        advice = "edit the pod and give it a volume, or keep copies elsewhere (backup)"
        return Fact("host", f"{host.name}, without a volume: a stop deletes all files", "warning", advice)
    return Fact("host", f"{host.name}; {host.keeps}")


def _gpu(host: Host) -> Fact:
    import torch

    from lorakit import device, plan

    card = plan.this_machine()
    if card is None and device.choose_device().type == "mps":
        return Fact("GPU", "Apple's, with MPS", "good")
    if card is None:
        text, advice = "none: the embedded base trains on the CPU in minutes; other bases need a GPU", host.gpu
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            text += f". torch {torch.__version__} is a build without CUDA"
            advice = "install the torch that pytorch.org recommends for the card"
        return Fact("GPU", text, "warning", advice)
    total, free = torch.cuda.get_device_properties(0).total_memory / 2**30, card.memory or 0.0
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    # torch calls bf16 supported where it is emulated, as on a T4.
    precision = "trains in bf16" if card.bf16 else "trains in fp16, as it has no bf16"
    text = f"{card.name}, {total:.1f} GiB, {free:.1f} free; compute capability {capability}: {precision}"
    if (cards := torch.cuda.device_count()) > 1:
        text += f"; {cards} cards: `accelerate launch --multi_gpu -m lorakit train CONFIG` in a cell trains with all"
    if free < total / 2:
        return Fact("GPU", text, "warning", f"more than half is in use: {host.restart}, also in other notebooks")
    if total < LITTLE_GPU:
        return Fact("GPU", text, "warning", f"SD 1.5 needs {LITTLE_GPU} GiB or more. For a larger one: {host.gpu}")
    advice = f"enough for SD 1.5 and 2.x. For SDXL: {host.gpu}" if total < SDXL_GPU else ""
    return Fact("GPU", text, "good", advice)


def _memory(host: Host) -> Iterator[Fact]:
    from lorakit import plan

    free = plan.free_memory_bytes("cpu")
    if free is not None:
        little = free < LITTLE_RAM * 2**30
        advice = f"a base is loaded through RAM: {host.restart}, also in other notebooks" if little else ""
        yield Fact("RAM", f"{free / 2**30:.1f} GiB free", "warning" if little else "good", advice)


def _disk(host: Host) -> Fact:
    from huggingface_hub import constants

    free: dict[int, tuple[float, str]] = {}  # device → GiB and use: one entry if runs and bases are on the same disk
    for use, folder in (("for runs", storage().root), ("for bases", Path(constants.HF_HUB_CACHE))):
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        free.setdefault(os.stat(existing).st_dev, (shutil.disk_usage(existing).free / 2**30, use))
    (first, _), *rest = free.values()
    text = f"{first:.1f} GiB free" + "".join(f" for runs, {other:.1f} {use}" for other, use in rest)
    least, _ = min(free.values())
    if least < LITTLE_DISK:
        advice = f"downloading SD 1.5 takes 4 GiB, and runs need more: {host.disk}"
        return Fact("disk", text, "warning", advice)
    advice = f"enough for SD 1.5; downloading SDXL takes 14 GiB. For more: {host.disk}" if least < SDXL_DISK else ""
    return Fact("disk", text, "good", advice)


def _software(host: Host) -> Iterator[Fact]:
    import torch
    from packaging.version import Version

    names = ("torch", "diffusers", "transformers", "peft", "ipywidgets", "torchao", "bitsandbytes")
    versions = {name: _version(name) for name in names}
    python = "{}.{}.{}".format(*sys.version_info)
    text = ", ".join([f"Python {python}", *(f"{name} {versions[name]}" for name in names[:5] if versions[name])])
    setup = "run the set-up cell again, or: bash colab_setup.sh"
    if missing := _missing():
        yield Fact("software", f"{text}; missing or too old: {', '.join(missing)}", "bad", setup)
    else:
        yield Fact("software", text, "good")
    # As in peft's is_torchao_available, and in colab_setup.sh.
    peft, torchao = (Version(versions[name] or "0") for name in ("peft", "torchao"))
    if versions["torchao"] and torchao < Version("0.16") and peft >= Version("0.19"):
        text = f"{torchao}: peft {peft} does not train with it"
        yield Fact("torchao", text, "bad", f"{setup}; by hand: pip uninstall -y torchao. Then {host.restart}")
    if versions["bitsandbytes"]:
        yield Fact("bitsandbytes", f"{versions['bitsandbytes']}: 8-bit optimizers, bases in NF4 and int8", "good")
    elif torch.cuda.is_available():
        text = "not installed: no 8-bit optimizers and no base in NF4 or int8, so SDXL needs some GiB more"
        yield Fact("bitsandbytes", text, "warning", setup)
    else:
        yield Fact("bitsandbytes", "not installed: only useful with an NVIDIA card")


def _missing() -> list[str]:
    """lorakit's requirements that are not installed, or too old."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("lorakit") or ()]
    except metadata.PackageNotFoundError:  # imported from a folder, without being installed
        return []
    return [
        f"{r.name}{r.specifier}"
        for r in requirements
        if (r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("", "notebook")))
        and not r.specifier.contains(_version(r.name) or "0", prereleases=True)
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
