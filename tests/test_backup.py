"""Copies at a second place: verified, never overwritten, and no trouble of theirs ends training."""

import errno
import shutil
import threading

import hubserver
import huggingface_hub
import pytest
from killing import same_weights

from lorakit import backup, checkpoint, plots, run
from lorakit.live import Live

QUIET = {"say": lambda _: None, "progress": False}
TOKEN = "hf_" + "s" * 34


@pytest.fixture
def away(settings, tmp_path):
    """The run's settings with a second place, which is a folder."""
    return settings.with_(save_every=2, keep_states=2, backup=str(tmp_path / "drive"))


def stopped_at(step, settings, folder, **more):
    stop = threading.Event()
    stops = [lambda s: stop.set() if s.number == step else None]
    return run.start(settings, folder, live=Live(stop), listeners=stops, **({**QUIET} | more))


def test_what_is_there_after_a_run(away, tmp_path):
    said = []
    result = run.start(away, tmp_path / "run", say=said.append, progress=False)
    there = {path.name: path for path in (tmp_path / "drive" / "run").iterdir()}
    states = {f"step-{step:06d}.safetensors" for step in (4, 6)}
    assert states <= there.keys() and "step-000002.weights.safetensors" in there
    assert not checkpoint.read(there["step-000002.weights.safetensors"]).whole
    assert checkpoint.read_whole(there["step-000006.safetensors"]).step == 6
    assert same_weights(there["thing-step-000006.safetensors"], result.lora)
    assert [line["step"] for line in plots.read_log(there["log-000006.jsonl"])] == [1, 2, 3, 4, 5, 6]
    assert any("all at the second place up to step 6, read back and verified" in line for line in said)
    assert not any("drive" in file.read_text(errors="replace") for file in there.values())  # no path of this machine


def test_a_machine_that_is_gone_is_gone_on_from_there(away, settings, tmp_path):
    whole = run.start(settings, tmp_path / "whole", **QUIET)
    stopped_at(5, away, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    said = []
    result = run.start(away, tmp_path / "run", say=said.append, progress=False)
    assert any("step 5 comes from the second place" in line for line in said)
    assert any("resume    at step 5" in line for line in said)
    assert result.steps == 6 and len(result.losses) == 1
    assert same_weights(result.lora, whole.lora)
    assert [line["step"] for line in plots.read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_copy_is_passed_over_for_an_older_one(away, tmp_path):
    stopped_at(5, away, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    newest = tmp_path / "drive" / "run" / "state-000005.safetensors"  # between two regular ones
    newest.write_bytes(newest.read_bytes()[:-100])
    said = []
    assert run.start(away, tmp_path / "run", say=said.append, progress=False).steps == 6
    assert any("step-000005.safetensors cannot be read" in line and "at the second place" in line for line in said)
    assert any("resume    at step 4" in line for line in said)


def test_what_is_here_and_newer_is_not_fetched(away, tmp_path):
    stopped_at(3, away, tmp_path / "run")
    said = []
    run.start(away, tmp_path / "run", say=said.append, progress=False)
    assert not any("comes from the second place" in line for line in said)


def test_another_run_of_the_same_name_is_not_mixed_up_with_this_one(away, tmp_path):
    stopped_at(3, away, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ValueError, match="run was begun with other settings: rank was 4, is now 8"):
        run.start(away.with_(rank=8), tmp_path / "run", **QUIET)
    assert not checkpoint.paths(tmp_path / "run" / "checkpoints")


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
    assert any("is not at the second place: [Errno 28] the drive is full. Training goes on" in line for line in said)
    assert any("works again, step 6 is at the second place" in line for line in said)
    assert (tmp_path / "drive" / "run" / "step-000006.safetensors").exists()


def test_a_copy_that_arrives_otherwise_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"what was sent")
    place = backup.place(str(tmp_path / "drive"), "run")
    monkeypatch.setattr(backup.shutil, "copyfile", lambda source, target: target.write_bytes(b"what arrived."))
    with pytest.raises(OSError, match="a did not arrive as it was sent"):
        place.put(tmp_path / "a", "a")
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
        copier.put(step, {backup.names(step, True, False): b"state %d" % step})
        assert reached.wait(10)
    copier.close(0.01)
    assert "not done after 0.01 s" in copier.told()[0]
    go.set()
    copier.close(10)
    assert sorted(copier.place.names()) == ["state-000001.safetensors", "state-000003.safetensors"]
    assert copier.newest == 3


@pytest.mark.parametrize("reference", ["hub:name", "hub:a/b/c", "hub:"])
def test_a_repository_needs_its_owner(reference):
    with pytest.raises(ValueError, match="write it as 'hub:owner/name'"):
        backup.place(reference, "run")


def test_a_file_is_no_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file. Name a folder"):
        backup.place(str(tmp_path / "file"), "run")


def test_the_hub_is_a_place_too(settings, tmp_path, monkeypatch):
    """The hub's own client, and a stand-in of the hub on this computer."""
    whole = run.start(settings, tmp_path / "whole", **QUIET)
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
        assert any("step 5 comes from the second place" in line for line in said)
        assert same_weights(result.lora, whole.lora)
        names = {name for name in hub.files["somebody/runs"] if name.startswith("run/st")}
        assert names == {  # step 4 is not here any more, to make its weights of: it stays whole
            f"run/{name}.safetensors" for name in ("step-000002.weights", "step-000004", "state-000005", "step-000006")
        }
        assert not any(TOKEN.encode() in stored for stored in hub.files["somebody/runs"].values())
        shutil.rmtree(tmp_path / "run")
        hub.down = True
        said.clear()
        stopped_at(1, settings, tmp_path / "run", say=said.append)
    assert any("the second place cannot be read" in line for line in said)
    assert any("step 1 is not at the second place" in line for line in said)
    assert not any(TOKEN in line for line in said)
