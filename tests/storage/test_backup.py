"""Copies at a second place: verified, never overwritten, and no trouble of theirs ends training."""

import errno
import shutil
import threading

import hubserver
import huggingface_hub
import pytest
from conftest import run_settings
from killing import same_weights
from said import QUIET, line, names, naming

from lorakit.run import checkpoint, run, run_folder
from lorakit.run.control import Control
from lorakit.storage import backup

TOKEN = "hf_" + "s" * 34


@pytest.fixture
def away(settings, tmp_path):
    """The run's settings with a second place, which is a folder."""
    return settings.with_(save_every=2, keep_states=2, backup=str(tmp_path / "drive"))


def stopped_at(step, settings, folder, **more):
    live = Control()
    stops = [lambda s: live.stop.set() if s.number == step else None]
    return run.start(settings, folder, control=live, listeners=stops, **(QUIET | more))


@pytest.fixture(scope="module")
def stopped(small_bases, drawn, tmp_path_factory):
    """A folder with a run that was stopped at step 5, and the drive with its copies. To read, not to change."""
    root = tmp_path_factory.mktemp("stopped")
    settings = run_settings(small_bases["sd15"], drawn)
    stopped_at(5, settings.with_(save_every=2, keep_states=2, backup=str(root / "drive")), root / "run")
    return root


@pytest.fixture
def copies(stopped, tmp_path):
    """The copies of that run, at the place of `away`: the folder."""
    return shutil.copytree(stopped / "drive", tmp_path / "drive") / "run"


def test_what_is_there_after_a_run(away, tmp_path):
    said = []
    result = run.start(away, tmp_path / "run", say=said.append, progress=False)
    there = {path.name: path for path in (tmp_path / "drive" / "run").iterdir()}
    states = {f"step-{step:06d}.safetensors" for step in (4, 6)}
    assert states <= there.keys() and "step-000002.weights.safetensors" in there
    assert not checkpoint.read(there["step-000002.weights.safetensors"]).whole
    assert checkpoint.read_whole(there["step-000006.safetensors"]).step == 6
    assert same_weights(there["thing-step-000006.safetensors"], result.lora)
    assert there["comparison-step-000006.png"].read_bytes() == result.comparison.read_bytes()
    assert [entry["step"] for entry in run_folder.read_log(there["log-000006.jsonl"])] == [1, 2, 3, 4, 5, 6]
    assert line(said, "backup", 6)
    assert not any("drive" in file.read_text(errors="replace") for file in there.values())  # no path of this machine


@pytest.mark.usefixtures("weights_only", "copies")
def test_a_machine_that_is_gone_is_gone_on_from_there(away, finished, tmp_path):
    said = []
    result = run.start(away, tmp_path / "run", say=said.append, progress=False)
    assert line(said, "resume", 5, checkpoint.name(5))
    assert result.steps == 6 and len(result.losses) == 1
    assert same_weights(result.lora, finished[0].lora)
    assert [entry["step"] for entry in run_folder.read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("weights_only")
def test_a_damaged_copy_is_passed_over_for_an_older_one(away, copies, tmp_path):
    newest = copies / "state-000005.safetensors"  # between two regular ones
    newest.write_bytes(newest.read_bytes()[:-100])
    said = []
    assert run.start(away, tmp_path / "run", say=said.append, progress=False).steps == 6
    assert line(said, "resume", "step-000005.safetensors")
    assert line(said, "resume", 4, checkpoint.name(4))


@pytest.mark.usefixtures("weights_only", "copies")
def test_what_is_here_and_newer_is_not_fetched(away, stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped / "run", tmp_path / "run")
    fetched = []
    monkeypatch.setattr(backup.Folder, "get", lambda self, name, path: fetched.append(name))
    assert run.start(away, tmp_path / "run", **QUIET).steps == 6
    assert fetched == []


@pytest.mark.usefixtures("copies")
def test_another_run_of_the_same_name_is_not_mixed_up_with_this_one(away, tmp_path):
    with pytest.raises(ValueError, match=naming("run", "seed", 42, 43)):
        run.start(away.with_(seed=43), tmp_path / "run", **QUIET)
    assert not checkpoint.checkpoint_paths(tmp_path / "run" / "checkpoints")


@pytest.mark.usefixtures("weights_only")
def test_a_place_that_fails_is_told_and_training_goes_on(away, tmp_path, monkeypatch):
    put, failed, healed = backup.Folder.put, threading.Event(), threading.Event()

    def full(self, source, name):
        if not healed.is_set():
            failed.set()
            raise OSError(errno.ENOSPC, "the drive is full")
        put(self, source, name)

    def heal(step):
        if step.number == 5:
            assert failed.wait(10)
            healed.set()

    monkeypatch.setattr(backup.Folder, "put", full)
    said = []
    result = run.start(away, tmp_path / "run", say=said.append, progress=False, listeners=[heal])
    assert result.lora
    assert line(said, "backup", "the drive is full")
    assert any(names(text, "backup", 6) and not names(text, "the drive is full") for text in said)
    assert (tmp_path / "drive" / "run" / "step-000006.safetensors").exists()


def test_a_copy_that_arrives_otherwise_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "sent").write_bytes(b"what was sent")
    place = backup.backup_place(str(tmp_path / "drive"), "run")
    monkeypatch.setattr(backup.shutil, "copyfile", lambda source, target: target.write_bytes(b"what arrived."))
    with pytest.raises(OSError, match=naming("log-000001.jsonl")):
        place.put(tmp_path / "sent", "log-000001.jsonl")
    assert place.names() == []


def test_a_slow_place_gets_the_latest(tmp_path):
    class Slow(backup.Folder):
        def put(self, source, name):
            reached.set()
            go.wait()
            super().put(source, name)

    reached, go = threading.Event(), threading.Event()
    copier = backup.Copier(Slow(tmp_path / "drive"), 2)
    for step in (1, 2, 3):
        copier.put(step, {backup.backup_name(step, True, False): b"state %d" % step})
        assert reached.wait(10)
    copier.close(0.01)
    assert line(copier.messages(), "backup", "0.01 s")
    go.set()
    copier.close(10)
    assert sorted(copier.place.names()) == ["state-000001.safetensors", "state-000003.safetensors"]
    assert copier.newest == 3


@pytest.mark.parametrize("reference", ["hub:name", "hub:a/b/c", "hub:"])
def test_a_repository_needs_its_owner(reference):
    with pytest.raises(ValueError, match=naming(repr(reference), "hub:owner/name")):
        backup.backup_place(reference, "run")


def test_a_file_is_no_place(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=naming("notes.txt")):
        backup.backup_place(str(tmp_path / "notes.txt"), "run")


@pytest.mark.usefixtures("weights_only")
def test_the_hub_is_a_place_too(settings, finished, tmp_path, monkeypatch):
    """The hub's own client, and a stand-in of the hub on this computer."""
    settings = settings.with_(save_every=2, keep_states=2, backup="hub:somebody/runs")
    with hubserver.running(TOKEN) as hub:
        hub.used_by(monkeypatch, tmp_path / "hub-cache")
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)  # between its tries
        said = []
        stopped_at(5, settings, tmp_path / "run", say=said.append)
        assert hub.private["somebody/runs"]
        assert "run/state-000005.safetensors" in hub.files["somebody/runs"], said
        shutil.rmtree(tmp_path / "run")
        result = run.start(settings, tmp_path / "run", say=said.append, progress=False)
        assert line(said, "resume", 5) and len(result.losses) == 1
        assert same_weights(result.lora, finished[0].lora)
        names = {name for name in hub.files["somebody/runs"] if name.startswith("run/st")}
        assert names == {  # step 4 is not here any more, to make its weights of: it stays whole
            f"run/{name}.safetensors" for name in ("step-000002.weights", "step-000004", "state-000005", "step-000006")
        }
        assert not any(TOKEN.encode() in stored for stored in hub.files["somebody/runs"].values())
        shutil.rmtree(tmp_path / "run")
        hub.down = True
        said.clear()
        stopped_at(1, settings, tmp_path / "run", say=said.append)
    assert line(said, "resume", 503)  # what the place holds cannot be read
    assert line(said, "backup", 1, 503)
    assert not any(TOKEN in text for text in said)
