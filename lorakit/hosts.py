"""Colab, RunPod, Vast.ai, one's own machine: where runs are kept, secrets, uploads, and what the machine can do.

Nothing here is needed to train: a notebook asks it for folders and hands them on.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

from lorakit import dataset as datasets
from lorakit.plots import TONES

LITTLE_GPU, SDXL_GPU = 4, 11.5  # GiB: what SD 1.5 takes at the least; what cards sold as 12 GB show, asked for SDXL
LITTLE_RAM = 4  # GiB: SD 1.5's UNet in float32 on its way to the card
LITTLE_DISK, SDXL_DISK = 6, 20  # GiB: SD 1.5's download takes 4, SDXL's 14, a run's checkpoints come on top


@dataclass(frozen=True)
class Host:
    """A place where notebooks run, in its own words."""

    name: str
    folder: Path | None  # where people keep files; None: the working directory
    keeps: str  # what is left after a stop
    gpu: str  # how to get a GPU, or a larger one
    disk: str  # how to get more disk
    restart: str  # how to start the kernel anew


COLAB = Host(
    "Google Colab", Path("/content"),
    "nothing here outlives the session: keep a second copy on Drive, or download the LoRA",
    "Runtime → Change runtime type → T4 GPU, then Runtime → Run all",
    "Runtime → Disconnect and delete runtime gives an empty disk",
    "Runtime → Restart session",
)  # fmt: skip
RUNPOD = Host(
    "RunPod", Path("/workspace"),
    "/workspace is kept when the pod stops, not when it is terminated; packages go with a stop: run the set-up again",
    "deploy a pod with an NVIDIA card of 12 GB or more, from a PyTorch template",
    "edit the pod and give its volume 30 GB or more",
    "Kernel → Restart Kernel",
)  # fmt: skip
VAST = Host(
    "Vast.ai", Path("/workspace"),
    "all is kept while the instance is stopped (its disk is charged for), nothing once it is destroyed",
    "rent an instance with an NVIDIA card of 12 GB or more, with the PyTorch template",
    "rent an instance with 30 GB of disk or more: it cannot be enlarged later",
    "Kernel → Restart Kernel",
)  # fmt: skip
OWN = Host(
    "this machine", None,
    "what is written here stays",
    "use a machine with an NVIDIA card of 6 GB or more whose driver works (nvidia-smi lists it), or an Apple one; "
    "or rent one: Colab, RunPod, Vast.ai",
    "make room, or start Jupyter on another disk",
    "Kernel → Restart Kernel",
)  # fmt: skip


def here() -> Host:
    """The host this runs on, told by its own marks."""
    if "COLAB_RELEASE_TAG" in os.environ and _colab():
        return COLAB
    if "RUNPOD_POD_ID" in os.environ:
        return RUNPOD
    # Every port that is opened has a variable; the label is missing from some images.
    if any(name == "VAST_CONTAINERLABEL" or name.startswith("VAST_TCP_PORT_") for name in os.environ):
        return VAST
    return OWN


def _colab() -> bool:
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:  # not even "google"
        return False


# ── Where files go ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Storage:
    """Folders to work in."""

    root: Path  # on a fast disk of this machine
    backup: str | None = None  # for the setting `backup`: a folder that outlives the machine

    @property
    def runs(self) -> Path:
        """The folder of runs, one folder each."""
        return self.root / "runs"

    @property
    def lasting(self) -> Path:
        """Where small files go that the next session shall find: settings, what was decided about pictures."""
        return Path(self.backup or self.root)


def storage(drive: bool = False, say: Callable[[str], None] = print) -> Storage:
    """Where runs and pictures go on this host, and where their second copies do. No folder is made.

    A rented host's folder can be another one: the variable WORKSPACE names it.

    Args:
        drive: on Colab, mount Google Drive and keep second copies there; Colab asks for permission. What hinders it is
            told, and ends nothing.
        say: gets what has to be told.
    """
    host = here()
    if host.folder is None:
        return Storage(Path.cwd())
    folder = Path(os.environ.get("WORKSPACE") or host.folder)
    return Storage(folder / "lorakit", _drive(folder / "drive", say) if drive and host is COLAB else None)


def _drive(mountpoint: Path, say: Callable[[str], None]) -> str | None:
    """Mount Google Drive; the folder there for second copies, or None."""
    own = mountpoint / "MyDrive"
    reason = "it was not there after mounting"
    try:
        from google.colab import drive

        drive.mount(str(mountpoint))
    except Exception as error:  # refused, no answer, a domain's policy: ValueError, MessageError, pexpect's TIMEOUT …
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if own.is_dir():
        return str(own / "lorakit")
    say(f"Google Drive is not mounted ({reason}). It goes on without second copies: run this cell again to try again.")
    return None


# ── Secrets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def secret(name: str) -> str | None:
    """A secret of the user's: an environment variable, else one of Colab's secrets, else None.

    Never printed or written by lorakit, and never an error: not to have one, or not to be let at it, is an answer.
    """
    if value := os.environ.get(name, "").strip():
        return value
    try:
        from google.colab import userdata

        return (userdata.get(name) or "").strip() or None
    except Exception:  # no Colab; SecretNotFoundError, NotebookAccessError, TimeoutException, as the release has them
        return None


def use_token(name: str = "HF_TOKEN") -> bool:
    """Give the user's token to huggingface_hub, for this process and what it starts; it is written to no file.

    Returns:
        Whether there is one. Without, all that is public on the Hub works.
    """
    token = secret(name)
    if token:
        os.environ["HF_TOKEN"] = token
    return token is not None


# ── To the machine and from it ──────────────────────────────────────────────────────────────────────────────────────


def upload(into: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """Ask for files through Colab's own dialog and put them into a folder; a file of the same name is replaced.

    Returns:
        The file if it is one archive, else the folder: either can be scanned. None where nothing was chosen, and on
        hosts other than Colab, whose file browser does it.
    """
    into = Path(into).absolute()
    if not _colab():
        say(f"Bring files here with Jupyter's own file browser, at the left, into the folder {into.name}.")
        return None
    from google.colab import files

    into.mkdir(parents=True, exist_ok=True)
    # It writes into the working directory, and gives other names to files that are there already.
    with tempfile.TemporaryDirectory(prefix=".upload-", dir=into) as empty:
        before = Path.cwd()
        os.chdir(empty)
        try:
            files.upload()
        finally:
            os.chdir(before)
        arrived = [path.name for path in Path(empty).iterdir()]
        for name in arrived:
            os.replace(Path(empty, name), into / name)
    if len(arrived) == 1 and arrived[0].lower().endswith(datasets.ARCHIVES):
        return into / arrived[0]
    return into if arrived else None


def download(path: str | Path) -> None:
    """Bring a file to the person's own machine: Colab's download, elsewhere a link to click.

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

    # Jupyter serves what lies below its own folder, by relative address; JupyterLab opens what is not to be downloaded.
    link = quote(Path(os.path.relpath(path)).as_posix())
    html = f'<a href="{link}" download="{escape(path.name)}">Download {escape(path.name)}</a>'
    display({"text/html": html, "text/plain": f"{path.name} is ready"}, raw=True)


# ── What the machine can do ─────────────────────────────────────────────────────────────────────────────────────────

MARKS = {"good": "✓", "warning": "!", "bad": "✗", "": " "}


@dataclass(frozen=True)
class Fact:
    """One thing that was looked at."""

    name: str
    text: str
    tone: str = ""  # "good", "warning", "bad", or "" for what is neither
    advice: str = ""


@dataclass(frozen=True, repr=False)
class Machine:
    """What this machine can do. It shows itself, at a terminal and at the end of a cell."""

    facts: tuple[Fact, ...]

    @property
    def ready(self) -> bool:
        """Whether nothing stands in the way of training."""
        return all(fact.tone != "bad" for fact in self.facts)

    def __repr__(self) -> str:
        width = max(len(fact.name) for fact in self.facts)
        lines = []
        for fact in self.facts:
            lines.append(f"{MARKS[fact.tone]} {fact.name:<{width}}  {fact.text}")
            if fact.advice:
                lines.append(f"  {'':<{width}}  → {fact.advice}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [
            f'<span style="color:{TONES[fact.tone]}">{MARKS[fact.tone]}</span><b>{escape(fact.name)}</b>'
            f'<span style="overflow-wrap:anywhere">{escape(fact.text)}'
            + (f'<br><span style="color:{TONES[fact.tone]}">→ {escape(fact.advice)}</span>' if fact.advice else "")
            + "</span>"
            for fact in self.facts
        ]
        return (
            '<div style="display:grid;grid-template-columns:auto auto 1fr;gap:4px 12px;line-height:1.4;'
            f'max-width:900px;align-items:baseline">{"".join(rows)}</div>'
        )


def check() -> Machine:
    """Look at what training needs of this machine, and say in the host's own words how to mend what is amiss."""
    host = here()
    return Machine((_kept(host), _gpu(host), *_memory(host), _disk(host), *_software(host)))


def _kept(host: Host) -> Fact:
    if host is RUNPOD and not os.path.ismount(storage().root.parent):
        advice = "edit the pod and give it a volume, or keep second copies elsewhere (backup)"
        return Fact("host", f"{host.name}, without a volume: a stop takes everything here", "warning", advice)
    return Fact("host", f"{host.name}; {host.keeps}")


def _gpu(host: Host) -> Fact:
    import torch

    from lorakit import device, plan

    card = plan.this_machine()
    if card is None:
        if device.choose_device().type == "mps":
            return Fact("GPU", "Apple's, by way of MPS", "good")
        said = "none: the embedded base trains on the CPU, in minutes; a real one needs a GPU"
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            build = f"torch {torch.__version__} is a build without CUDA"
            return Fact("GPU", f"{said}. {build}", "warning", "install the torch that pytorch.org names for the card")
        return Fact("GPU", said, "warning", host.gpu)
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    # torch calls bf16 supported where it is emulated, as on a T4.
    precision = "trains in bf16" if card.bf16 else "trains in fp16, as it has no bf16 of its own"
    others = f"; {torch.cuda.device_count()} of them" if torch.cuda.device_count() > 1 else ""
    text = f"{card.name}, {total:.1f} GiB, {card.memory:.1f} free; compute capability {capability}: {precision}{others}"
    if card.memory < total / 2:
        return Fact("GPU", text, "warning", f"more than half is in use: {host.restart}, also of other notebooks")
    if total < LITTLE_GPU:
        return Fact("GPU", text, "warning", f"SD 1.5 takes {LITTLE_GPU} GiB and more. For larger: {host.gpu}")
    if total < SDXL_GPU:
        return Fact("GPU", text, "good", f"enough for SD 1.5 and 2.x. For SDXL: {host.gpu}")
    return Fact("GPU", text, "good")


def _memory(host: Host) -> Iterator[Fact]:
    from lorakit import plan

    free = plan.free_memory_bytes("cpu")
    if free is None:
        return
    text = f"{free / 2**30:.1f} GiB free"
    if free < LITTLE_RAM * 2**30:
        yield Fact(
            "RAM", text, "warning", f"a base passes through it in parts: {host.restart}, also of other notebooks"
        )
    else:
        yield Fact("RAM", text, "good")


def _disk(host: Host) -> Fact:
    from huggingface_hub import constants

    free = {}  # by disk, the smallest first
    for name, folder in (("for runs", storage().root), ("for bases", Path(constants.HF_HUB_CACHE))):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free.setdefault(os.stat(there).st_dev, (shutil.disk_usage(there).free / 2**30, name))
    least = min(free.values())[0]
    (first, _), *rest = free.values()
    text = f"{first:.1f} GiB free" + "".join(f" for runs, {other:.1f} {name}" for other, name in rest)
    if least < LITTLE_DISK:
        return Fact("disk", text, "warning", f"SD 1.5 takes 4 to fetch, and runs come on top: {host.disk}")
    if least < SDXL_DISK:
        return Fact("disk", text, "good", f"enough for SD 1.5; SDXL takes 14 to fetch. For more: {host.disk}")
    return Fact("disk", text, "good")


def _software(host: Host) -> Iterator[Fact]:
    import torch
    from packaging.requirements import Requirement
    from packaging.version import Version

    names = ("torch", "diffusers", "transformers", "peft", "ipywidgets", "torchao", "bitsandbytes")
    found = {name: _version(name) for name in names}
    python = "{}.{}.{}".format(*sys.version_info)
    text = ", ".join([f"Python {python}", *(f"{name} {found[name]}" for name in names[:5] if found[name])])
    again = "run the set-up cell again, or: bash colab_setup.sh"
    try:
        asked = [Requirement(line) for line in metadata.requires("lorakit") or ()]
    except metadata.PackageNotFoundError:  # it is on the path, and not installed
        asked = []
    lacking = [
        f"{r.name}{r.specifier}"
        for r in asked
        if (r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("", "notebook")))
        and not r.specifier.contains(_version(r.name) or "0", prereleases=True)
    ]
    if lacking:
        yield Fact("software", f"{text}; lacking: {', '.join(lacking)}", "bad", again)
    else:
        yield Fact("software", text, "good")
    # As peft has it in is_torchao_available, and colab_setup.sh in its own check.
    peft, torchao = (Version(found[name] or "0") for name in ("peft", "torchao"))
    if found["torchao"] and torchao < Version("0.16") and peft >= Version("0.19"):
        text = f"{torchao}, with which peft {peft} refuses to train"
        yield Fact("torchao", text, "bad", f"{again}; by hand: pip uninstall -y torchao. Then {host.restart}")
    if found["bitsandbytes"]:
        yield Fact("bitsandbytes", f"{found['bitsandbytes']}: 8-bit optimizers, bases in NF4 and int8", "good")
    elif torch.cuda.is_available():
        text = "not here: no 8-bit optimizers and no base in NF4 or int8, so that SDXL takes some GiB more"
        yield Fact("bitsandbytes", text, "warning", again)
    else:
        yield Fact("bitsandbytes", "not here: it is of use with an NVIDIA card")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
