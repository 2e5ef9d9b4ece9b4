"""Where it runs, what is kept there, secrets, and what the machine can do; Colab by a small fake of its package."""

import json
import os
from importlib import metadata
from pathlib import Path

import pytest
import torch
from said import names, naming

from lorakit import demo, hosts
from lorakit.console import Console
from lorakit.run import preparation, run

MARKS = ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "RUNPOD_POD_ID", "VAST_CONTAINERLABEL", "WORKSPACE", "HF_TOKEN")
TOKEN = "hf_" + "Planted" * 5


@pytest.fixture(autouse=True)
def _own_machine(monkeypatch):
    for name in (*MARKS, *(name for name in os.environ if name.startswith("VAST_TCP_PORT_"))):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def colab(_own_machine, colab_package, monkeypatch, tmp_path):
    """Colab, whose /content is a folder `content` beside the test's own."""
    monkeypatch.setenv("WORKSPACE", str(tmp_path / "content"))
    return tmp_path / "content"


def test_hosts_are_told_by_their_own_marks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert hosts.here() is hosts.OWN and hosts.storage(drive=True) == hosts.Storage(tmp_path)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert hosts.here() is hosts.OWN  # a variable alone, without Colab's package
    monkeypatch.setenv("VAST_TCP_PORT_22", "40022")
    assert hosts.here() is hosts.VAST and hosts.storage().runs == Path("/workspace/lorakit/runs")
    monkeypatch.delenv("VAST_TCP_PORT_22")
    monkeypatch.setenv("VAST_CONTAINERLABEL", "C.1234567")
    assert hosts.here() is hosts.VAST
    monkeypatch.setenv("WORKSPACE", "/data")
    assert hosts.storage(drive=True) == hosts.Storage(Path("/data/lorakit"))
    monkeypatch.delenv("VAST_CONTAINERLABEL")
    monkeypatch.setenv("VAST_API_KEY", "of somebody who rents from at home")
    assert hosts.here() is hosts.OWN
    monkeypatch.setenv("RUNPOD_POD_ID", "abc123")
    assert hosts.here() is hosts.RUNPOD and hosts.storage().root == Path("/data/lorakit")


def test_colab_keeps_second_copies_on_drive_where_that_is_wanted(colab, monkeypatch, capsys):
    assert hosts.here() is hosts.COLAB
    assert hosts.storage() == hosts.Storage(colab / "lorakit")  # never asked for, never mounted
    assert not colab.exists()
    monkeypatch.setenv("FAKE_COLAB_DRIVE", "refused")
    said = []
    console = Console(said.append)
    assert hosts.storage(drive=True, console=console) == hosts.Storage(colab / "lorakit")
    assert len(said) == 1 and names(said[0], "mount failed")  # Colab's reason
    monkeypatch.delenv("FAKE_COLAB_DRIVE")
    place = hosts.storage(drive=True, console=console)
    assert place.backup == str(colab / "drive" / "MyDrive" / "lorakit") and place.runs == colab / "lorakit" / "runs"
    assert hosts.storage(drive=True) == place and len(said) == 1
    assert demo.config(backup=place.backup).backup == place.backup


def test_kaggle_is_known_by_its_mark_and_has_secrets_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "fakes")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert hosts.here() is hosts.KAGGLE and hosts.storage(drive=True) == hosts.Storage(Path("/kaggle/working/lorakit"))
    monkeypatch.setenv("FAKE_KAGGLE_SECRETS", json.dumps({"CIVITAI_TOKEN": f" {TOKEN} "}))
    monkeypatch.setenv("CIVITAI_TOKEN", "")
    assert hosts.use_token("CIVITAI_TOKEN") and os.environ["CIVITAI_TOKEN"] == TOKEN
    assert hosts.secret("ABSENT") is None and not hosts.use_token()
    assert names(repr(hosts.check()), "Kaggle", "/kaggle/working")


def test_secrets_are_optional(colab, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_COLAB_SECRETS", json.dumps({"MINE": f" {TOKEN}\n", "FORBIDDEN": None, "EMPTY": ""}))
    assert hosts.secret("MINE") == TOKEN
    assert [hosts.secret(name) for name in ("ABSENT", "FORBIDDEN", "EMPTY")] == [None] * 3
    monkeypatch.setenv("MINE", "the environment comes first")
    assert hosts.secret("MINE") == "the environment comes first"
    monkeypatch.setenv("FAKE_COLAB_SECRETS", "timeout")
    assert hosts.secret("ABSENT") is None and not hosts.use_token()
    assert capfd.readouterr() == ("", "")


def test_without_colab_secrets_come_from_the_environment(monkeypatch):
    assert hosts.secret("HF_TOKEN") is None and not hosts.use_token() and "HF_TOKEN" not in os.environ
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hosts.secret("HF_TOKEN") == TOKEN and hosts.use_token()


def test_a_token_reaches_no_file_and_no_output(colab, settings, monkeypatch, capfd, tmp_path):
    """The calls of a notebook, from set-up to download, with a token that is there for all of them."""
    from huggingface_hub import get_token

    others = "hf_" + "Another" * 5
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    monkeypatch.setenv("FAKE_COLAB_DOWNLOADS", str(downloads))
    monkeypatch.setenv("FAKE_COLAB_SECRETS", json.dumps({"HF_TOKEN": TOKEN, "OTHER": others}))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "")  # put back after the test
    assert hosts.use_token() and hosts.secret("OTHER") == others
    assert get_token() == TOKEN
    machine = hosts.check()
    print(machine, machine._repr_html_())
    place = hosts.storage(drive=True)
    config = settings.with_(backup=place.backup, steps=2, save_every=1, sample_every=2)
    print(preparation.scan_dataset(config).describe(), config.to_json())
    result = run.start(config, place.runs / "thing")
    hosts.download(result.lora)
    out, err = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".jsonl", ".png"}
    assert [path.parent.name for path in files if path.name == "thing.safetensors"].count("downloads") == 1
    assert list((colab / "drive").rglob("*.safetensors"))
    for token in (TOKEN, others):
        assert token not in out and token not in err
        assert [path.name for path in files if token.encode() in path.read_bytes()] == []


def test_files_are_brought_to_colab_by_its_own_dialog(colab, monkeypatch, tmp_path):
    chosen, into = tmp_path / "chosen", tmp_path / "into"
    chosen.mkdir()
    for name in ("a.png", "a.txt", "set.zip"):
        (chosen / name).write_text(f"new {name}")
    monkeypatch.chdir(tmp_path)
    assert hosts.upload(into) is None  # nothing was chosen
    monkeypatch.setenv("FAKE_COLAB_UPLOAD", str(chosen / "set.zip"))
    assert hosts.upload(into) == into / "set.zip" == hosts.upload("into")  # a second time, it is replaced
    monkeypatch.setenv("FAKE_COLAB_UPLOAD", os.pathsep.join([str(chosen / "a.png"), str(chosen / "a.txt")]))
    (into / "a.png").write_text("old")
    assert hosts.upload(into) == into
    assert {path.name: path.read_text() for path in into.iterdir()} == {
        name: f"new {name}" for name in ("a.png", "a.txt", "set.zip")
    }
    assert Path.cwd() == tmp_path and {path.name for path in tmp_path.iterdir()} == {"chosen", "into"}


def test_elsewhere_jupyter_brings_files_and_a_link_takes_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said, shown = [], []
    assert hosts.upload("pictures", Console(said.append)) is None and names(said[0], "pictures")
    assert not Path("pictures").exists()
    monkeypatch.setattr("IPython.display.display", lambda what, raw: shown.append(what))
    file = tmp_path / "runs" / "my lora & more.safetensors"
    with pytest.raises(FileNotFoundError, match=naming("my lora & more.safetensors")):
        hosts.download(file)
    file.parent.mkdir()
    file.write_bytes(b"")
    hosts.download(file)
    html = shown[0]["text/html"]
    assert 'href="runs/my%20lora%20%26%20more.safetensors" download="my lora &amp; more.safetensors"' in html
    assert str(tmp_path) not in str(shown)


# ── The machine ─────────────────────────────────────────────────────────────────────────────────────────────────────


def card(monkeypatch, name: str, gib: float, capability: tuple[int, int], free: float | None = None) -> None:
    """A machine with an NVIDIA card, as far as torch tells of one."""
    total = int(gib * 2**30)

    class Properties:
        total_memory = total

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # a T4 says so, and is wrong
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int((free or gib) * 2**30), total))
    for counted in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, counted, lambda *_: 0)


def installed(monkeypatch, **versions: str | None) -> None:
    """Other versions of some packages; None: not there."""
    real = metadata.version

    def version(name: str) -> str:
        found = versions.get(name, ...)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return real(name) if found is ... else found

    monkeypatch.setattr(metadata, "version", version)


def fact(name: str) -> hosts.Fact:
    (found,) = [fact for fact in hosts.check().facts if fact.name == name]
    return found


def test_without_a_gpu_the_embedded_base_is_what_trains(colab, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    found = fact("GPU")
    assert (found.advice, found.tone) == (hosts.COLAB.gpu, "warning") and names(found.text, "CPU")
    assert hosts.check().ready
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    monkeypatch.setenv("RUNPOD_POD_ID", "x")
    assert fact("GPU").advice == hosts.RUNPOD.gpu != hosts.COLAB.gpu


def test_a_t4_trains_in_fp16_whatever_torch_says(monkeypatch):
    card(monkeypatch, "Tesla T4", 14.75, (7, 5))
    found = fact("GPU")
    assert names(found.text, "Tesla T4", "14.8 GiB", 7.5, "fp16")
    assert found.tone == "good" and not found.advice


def test_small_busy_and_newer_cards_are_told_apart(monkeypatch):
    card(monkeypatch, "NVIDIA GeForce RTX 3060", 12.0, (8, 6))
    assert names(fact("GPU").text, "bf16") and not names(fact("GPU").text, "fp16") and not fact("GPU").advice
    card(monkeypatch, "NVIDIA GeForce RTX 3060 Ti", 8.0, (8, 6))
    assert fact("GPU").tone == "good" and names(fact("GPU").advice, "SDXL", hosts.OWN.gpu)
    card(monkeypatch, "NVIDIA GeForce GTX 1650", 3.8, (7, 5))
    assert fact("GPU").tone == "warning" and names(fact("GPU").advice, "SD 1.5", f"{hosts.LITTLE_GPU} GiB")
    card(monkeypatch, "NVIDIA A100-SXM4-40GB", 39.4, (8, 0), free=3.0)
    found = fact("GPU")
    assert names(found.text, "39.4 GiB", "3.0") and found.tone == "warning" and hosts.OWN.restart in found.advice


def test_a_torchao_that_peft_refuses_is_named_with_its_cure(colab, monkeypatch):
    installed(monkeypatch, torchao="0.10.0", peft="0.20.0")
    machine = hosts.check()
    assert not machine.ready
    assert names(fact("torchao").text, "0.10.0", "peft 0.20.0")
    assert "pip uninstall -y torchao" in str(machine) and hosts.COLAB.restart in machine._repr_html_()
    for torchao, peft in (("0.10.0", "0.18.0"), ("0.16.0", "0.20.0"), (None, "0.20.0")):
        installed(monkeypatch, torchao=torchao, peft=peft)
        assert "torchao" not in [fact.name for fact in hosts.check().facts]


def test_what_is_missing_or_too_old_is_named(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda _: ["peft>=0.15", 'imagehash>=4.3; extra == "notebook"',
                                                        'rawpy>=0.19; extra == "formats"'])  # fmt: skip
    installed(monkeypatch, peft="0.14.0", imagehash=None, rawpy=None)
    found = fact("software")
    assert found.tone == "bad" and names(found.text, "peft>=0.15", "imagehash>=4.3")
    assert not names(found.text, "rawpy") and names(found.text, f"torch {torch.__version__}", "ipywidgets")


def test_bitsandbytes_is_optional_and_its_absence_has_a_price(monkeypatch):
    installed(monkeypatch, bitsandbytes=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fact("bitsandbytes").tone == ""
    card(monkeypatch, "Tesla T4", 14.75, (7, 5))
    assert names(fact("bitsandbytes").text, "NF4", "SDXL") and fact("bitsandbytes").tone == "warning"


def test_little_room_is_told(monkeypatch):
    from lorakit.plan import cards

    class Usage:
        free = 5 * 2**30

    monkeypatch.setenv("VAST_CONTAINERLABEL", "C.1")
    monkeypatch.setattr(hosts.shutil, "disk_usage", lambda _: Usage)
    monkeypatch.setattr(cards, "free_memory_bytes", lambda _: 3 * 2**30)
    assert names(fact("disk").text, "5.0 GiB") and fact("disk").tone == "warning"
    assert names(fact("disk").advice, "SD 1.5", 4, hosts.VAST.disk)
    assert names(fact("RAM").text, "3.0 GiB") and fact("RAM").tone == "warning"
    Usage.free = 15 * 2**30
    assert names(fact("disk").advice, "SDXL", 14, hosts.VAST.disk) and fact("disk").tone == "good"
    monkeypatch.setattr(cards, "free_memory_bytes", lambda _: None)
    assert "RAM" not in [found.name for found in hosts.check().facts]


def test_a_pod_without_a_volume_loses_all(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNPOD_POD_ID", "x")
    monkeypatch.setenv("WORKSPACE", str(tmp_path))
    assert names(fact("host").text, hosts.RUNPOD.name) and fact("host").tone == "warning" and fact("host").advice
    monkeypatch.setattr(os.path, "ismount", lambda _: True)
    assert names(fact("host").text, hosts.RUNPOD.name, hosts.RUNPOD.keeps) and not fact("host").tone


def test_the_machine_shows_itself_without_a_path_or_markup_of_others(monkeypatch):
    card(monkeypatch, "<b>Tesla</b>", 14.75, (7, 5))
    machine = hosts.check()
    assert repr(machine) == str(machine) and "<b>Tesla</b>" in str(machine)
    assert "&lt;b&gt;Tesla" in machine._repr_html_() and "script" not in machine._repr_html_()
    assert str(Path.home()) + "/" not in str(machine) and str(Path.cwd()) not in str(machine)
