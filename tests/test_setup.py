"""Set-up: pyproject.toml, constraints.txt and colab_setup.sh agree, and the script leaves the host's packages alone.

The script runs for real, with real pip, on a throw-away host whose packages and whose package index are empty shells.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from said import names

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

# Google Colab's image of August 2026.
COLAB = {
    "torch": "2.11.0+cu128",
    "diffusers": "0.39.0",
    "transformers": "5.15.0",
    "accelerate": "1.14.0",
    "peft": "0.20.0",
    "safetensors": "0.8.0",
    "huggingface-hub": "1.27.0",
    "numpy": "2.1.3",
    "pillow": "11.3.0",
    "matplotlib": "3.10.0",
    "pydantic": "2.13.4",
    "typer": "0.27.1",
    "tqdm": "4.67.1",
    "filelock": "3.20.0",  # its torch brings one; which, is not known
    "ipywidgets": "7.7.1",
    "ipykernel": "6.17.1",
    "tensorboard": "2.20.0",
    "torchao": "0.10.0",
}
if sys.version_info < (3, 11):  # which Colab's Python is not: lorakit reads TOML with it there
    COLAB["tomli"] = "2.0.1"


def project() -> dict:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        tomllib = pytest.importorskip("tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


RUNNING = "{}.{}".format(*sys.version_info)


def requirements(*extras: str, python: str = RUNNING) -> dict[str, Requirement]:
    """What lorakit and its extras ask for on a release of Python, by canonical name."""
    table = project()
    lines = table["dependencies"] + [line for extra in extras for line in table["optional-dependencies"][extra]]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines) if applies(r, python)}


def applies(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def pins(python: str) -> dict[str, str]:
    """The tested versions for a release of Python such as "3.12", by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {}
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        if applies(requirement, python):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", requirement
            assert canonicalize_name(requirement.name) not in pinned, f"{requirement.name} is pinned twice for {python}"
            pinned[canonicalize_name(requirement.name)] = specifier.version
    return pinned


ADDED = ("compel",)
SET_UP = COLAB | {name: pins(RUNNING)[name] for name in ADDED}  # the same after set-up, but for torchao


@pytest.mark.parametrize("python", PYTHONS)
def test_the_tested_versions_satisfy_what_lorakit_asks_for(python):
    pinned = pins(python)
    wanted = requirements(*project()["optional-dependencies"], python=python)
    assert {
        name: pinned.get(name) for name, r in wanted.items() if not r.specifier.contains(pinned.get(name, "0"))
    } == {}
    assert Version(python + ".1") in Requirement("python" + project()["requires-python"]).specifier


def test_colab_has_almost_all_that_lorakit_asks_for():
    wanted = requirements("notebook", "tensorboard", python="3.12")  # Colab's
    lacking = {name for name, r in wanted.items() if not r.specifier.contains(COLAB.get(name, "0"))}
    assert lacking == {*ADDED}  # of prompts with weights


def test_no_cap_on_what_hosts_ship():
    caps = {name: str(r.specifier) for name, r in requirements().items() if "<" in str(r.specifier)}
    assert caps == {}


# ── A host, and an index for its pip ────────────────────────────────────────────────────────────────────────────────


def dist_info(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> Path:
    """An installed package that is nothing but its name and version."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text(
        "".join(f"{info.name}/{file},,\n" for file in ("METADATA", "WHEEL", "INSTALLER", "RECORD"))
    )
    return info


def wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """A package that pip can install, likewise empty."""
    info = dist_info(folder / "build", name, version, requires)
    with zipfile.ZipFile(folder / f"{info.name.removesuffix('.dist-info')}-py3-none-any.whl", "w") as archive:
        for file in info.iterdir():
            archive.write(file, f"{info.name}/{file.name}")
    shutil.rmtree(folder / "build")


class Host:
    """A machine with an active environment, in which colab_setup.sh runs."""

    def __init__(self, folder: Path, packages: dict[str, str]):
        pip = pytest.importorskip("pip")
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        (self.site,) = (folder / "venv/lib").glob("python*/site-packages")
        for name, version in packages.items():
            dist_info(self.site, name, version)
        # On the path but not among the installed packages: pip and lorakit itself.
        (folder / "path").mkdir()
        for package in (Path(pip.__file__).parent, ROOT / "lorakit"):
            (folder / "path" / package.name).symlink_to(package)
        self.command("nvidia-smi", "exit 1")
        self.index = folder / "index"
        self.index.mkdir()

    def command(self, name: str, script: str) -> None:
        """Put a command of that name before the machine's own."""
        file = self.folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def installed(self) -> dict[str, str]:
        return {canonicalize_name(d.name): d.version for d in metadata.distributions(path=[str(self.site)])}

    def set_up(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "VIRTUAL_ENV": str(self.folder / "venv"),
            "PYTHONPATH": str(self.folder / "path"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "https_proxy": "http://127.0.0.1:9",  # nothing listens there: no test reaches the internet
            **environ,
        }
        command = ["bash", str(ROOT / "colab_setup.sh"), *arguments]
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=600)


@pytest.fixture
def host(tmp_path):
    return lambda packages: Host(tmp_path, packages)


def index_of_newest(host: Host) -> None:
    """Offer every package that lorakit could ask for in its tested version and in one far newer."""
    pinned = pins(RUNNING)
    for name in requirements("notebook", "tensorboard", "bitsandbytes"):
        needs = () if name == "torch" else ("torch>=2", "numpy>=2")
        for version in (pinned[name], "99.0"):
            wheel(host.index, name, version, needs)


def test_what_colab_ships_stays_and_torchao_goes(host):
    colab = host(COLAB)
    index_of_newest(colab)

    first = colab.set_up()
    assert first.returncode == 0, first.stderr
    assert colab.installed() == {k: v for k, v in SET_UP.items() if k != "torchao"}
    assert names(first.stdout, "torch 2.11.0+cu128", 1, "torchao 0.10.0")  # 1 package was added

    shutil.rmtree(colab.index)  # there is nothing to install
    before = colab.site.stat().st_mtime_ns
    second = colab.set_up()
    assert second.returncode == 0, second.stderr
    assert colab.site.stat().st_mtime_ns == before and not names(second.stdout, "torchao")


def test_only_what_is_missing_is_installed_in_its_tested_version(host):
    absent = ("bitsandbytes", "diffusers", "peft", "torchao")
    pod = host({name: version for name, version in SET_UP.items() if name not in absent})
    index_of_newest(pod)
    pod.command("nvidia-smi", "echo GPU 0: Tesla T4")
    before = pod.installed()

    done = pod.set_up()
    assert done.returncode == 0, done.stderr
    pinned = pins(RUNNING)
    assert pod.installed() == before | {name: pinned[name] for name in ("bitsandbytes", "diffusers", "peft")}
    assert names(done.stdout, 3)  # packages were added


def test_the_tested_version_gives_way_to_the_host(host):
    """The tested diffusers may want a newer package than the host's: then another diffusers, not another host."""
    pod = host({name: version for name, version in SET_UP.items() if name not in ("diffusers", "torchao")})
    tested = pins(RUNNING)["diffusers"]
    wheel(pod.index, "huggingface-hub", "99.0")
    wheel(pod.index, "diffusers", tested, ("huggingface-hub>=99",))
    wheel(pod.index, "diffusers", "0.39.0", ("huggingface-hub>=1",))

    done = pod.set_up()
    assert done.returncode == 0, done.stderr
    assert pod.installed()["diffusers"] == "0.39.0"
    assert pod.installed()["huggingface-hub"] == COLAB["huggingface-hub"]


def test_a_package_too_old_is_replaced_but_never_torch(host):
    pod = host(SET_UP | {"transformers": "4.30.0", "torchao": "0.16.0"})
    index_of_newest(pod)
    done = pod.set_up()
    assert done.returncode == 0, done.stderr
    tested = pins(RUNNING)["transformers"]
    assert pod.installed() == SET_UP | {"transformers": tested, "torchao": "0.16.0"}


def test_a_torch_too_old_is_refused(host):
    old = COLAB | {"torch": "2.1.0"}
    pod = host(old)
    index_of_newest(pod)
    done = pod.set_up()
    assert done.returncode == 1
    assert names(done.stderr, "torch 2.1.0")
    assert pod.installed() == old


def test_without_an_nvidia_card_torch_comes_without_cuda(host):
    bare = host({name: version for name, version in SET_UP.items() if name not in ("torch", "torchao")})
    version = pins("3.12")["torch"]
    wheel(bare.index, "torch", version, ("nvidia-cublas",))
    wheel(bare.index, "nvidia-cublas", "13.0")

    done = bare.set_up()
    assert done.returncode == 1
    assert names(done.stderr, f"torch=={version}", "CPU")
    assert not {"torch", "nvidia-cublas"} & set(bare.installed())

    wheel(bare.index, "torch", f"{version}+cpu")
    done = bare.set_up()
    assert done.returncode == 0, done.stderr
    assert bare.installed()["torch"] == f"{version}+cpu"
    assert "nvidia-cublas" not in bare.installed()


def test_a_notebook_names_the_python_of_its_kernel(host):
    """The active environment is another one, and stays as it is."""
    pod = host({name: version for name, version in SET_UP.items() if name not in ("peft", "torchao")})
    index_of_newest(pod)
    done = pod.set_up(VIRTUAL_ENV="/nowhere", LORAKIT_PYTHON=str(pod.folder / "venv/bin/python"))
    assert done.returncode == 0, done.stderr
    assert pod.installed()["peft"] == pins(RUNNING)["peft"]

    # Python as Debian keeps it: it says of itself that it belongs to the system.
    base, told = pod.folder / "venv/bin/python", "sys.prefix == sys.base_prefix"
    pod.command("python-of-debian", f'case "$*" in *"{told}"*) exit 0 ;; *) exec {base} "$@" ;; esac')
    assert pod.set_up(LORAKIT_PYTHON="python-of-debian").returncode == 0  # there is nothing to install
    shutil.rmtree(next(pod.site.glob("peft-*")))
    done = pod.set_up(LORAKIT_PYTHON="python-of-debian")
    assert done.returncode == 1 and names(done.stderr, "python-of-debian", "PIP_BREAK_SYSTEM_PACKAGES=1")
    assert "peft" not in pod.installed()

    done = pod.set_up(LORAKIT_PYTHON=str(pod.folder / "absent"))
    assert done.returncode == 1 and names(done.stderr, pod.folder / "absent")


def test_an_unknown_task_is_refused(host):
    done = host(COLAB).set_up("train")
    assert done.returncode == 2
    assert names(done.stderr, "demo", "test")
