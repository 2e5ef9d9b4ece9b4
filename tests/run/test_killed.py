"""A run that is killed, starved or damaged ends as if nothing had been: the short form of tests/bench/killed.py."""

import errno
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import killing
import pytest
from said import QUIET, line, names, naming

from lorakit.adapter import read
from lorakit.run import checkpoint, finish, run, run_folder
from lorakit.run.control import Control
from lorakit.storage import files


@pytest.fixture(params=["adamw", "adamw8bit"])
def whole(request, settings, tmp_path):
    """A run with all that has a state, and what it comes to when it is not disturbed."""
    settings = settings.with_(
        steps=6, save_every=2, save_minutes=1e-6, keep_states=2, ema_decay=0.9, caption_dropout=0.3,
        text_encoder_rate=5e-4, batch_size=4, schedule="cosine", validation_share=0.2, validate_every=2,
        optimizer=request.param, rank=killing.OF_8_BITS if request.param == "adamw8bit" else 4,
    )  # fmt: skip
    told = killing.finished(settings, tmp_path / "whole", tmp_path / "told.json")
    return settings, tmp_path / "whole" / "thing.safetensors", told["operations"]


@pytest.mark.no_cover
def test_killed_again_and_again_a_run_ends_the_same(whole, tmp_path):
    """At random moments of its writing, some of them within a save, and once at a random time."""
    settings, expected, operations = whole
    newest = checkpoint.read(checkpoint.checkpoint_paths(expected.parent / "checkpoints")[0])
    assert killing.has_8_bits(newest) == (settings.optimizer == "adamw8bit")
    chance, folder, kept = random.Random(7), tmp_path / "cut", {}
    for at in (chance.randrange(operations), operations // 2, operations - 40, None):
        process = killing.begin(settings, folder, tmp_path / "told.json", at)
        if at is None:
            time.sleep(chance.uniform(0.3, 1.5))
            process.kill()
        process.join()
        kept = killing.nothing_lost(kept, folder, settings.save_every)
    killing.finished(settings, folder, tmp_path / "told.json")
    assert killing.same_weights(folder / "thing.safetensors", expected)
    assert [line["step"] for line in run_folder.read_log(folder / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not list(folder.rglob(".*.partial"))


@pytest.mark.no_cover
def test_whatever_file_is_damaged_the_run_goes_on_from_what_is_sound(settings, tmp_path, monkeypatch):
    settings = settings.with_(save_every=2, validation_share=0.2, validate_every=2)
    first = run.start(settings, tmp_path / "run", **QUIET)
    monkeypatch.setattr(finish, "draw_comparison", lambda *_, **__: None)  # the sheet takes half of the time
    chance, kinds = random.Random(3), {}
    shutil.copytree(tmp_path / "run", tmp_path / "sound")
    for file in sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"):
        kinds.setdefault((file.parent.name, file.suffix), file.relative_to(tmp_path / "run"))
    assert {("checkpoints", ".safetensors"), ("cache", ".safetensors"), ("run", ".jsonl")} <= kinds.keys()
    for (place, _), file in kinds.items():
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "sound", tmp_path / "run")
        victim = tmp_path / "run" / file
        if place == "checkpoints":  # the newest
            victim = checkpoint.checkpoint_paths(victim.parent)[0]
        killing.damage(victim, chance)
        run_folder.RunFolder(tmp_path / "run").describe()
        said = []
        again = run.start(settings, tmp_path / "run", say=said.append, progress=False)
        assert killing.same_weights(again.lora, tmp_path / "sound" / "thing.safetensors"), file
        if place in ("checkpoints", "cache"):
            assert line(said, victim.name), (victim, said)
        if place == "checkpoints":
            assert line(said, "resume", 4)
    assert first.lora.is_file()


@pytest.mark.no_cover
def test_a_disk_that_fills_up_at_any_write_loses_nothing(settings, tmp_path, monkeypatch):
    """Either the run names what is missing and ends well, or it stops with advice and goes on when there is room."""
    settings, whole_append = settings.with_(steps=4, save_every=2), files.append_lines
    left, fsync = [10**9], os.fsync

    def write():
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def flush(handle):
        if not stat.S_ISDIR(os.fstat(handle).st_mode):  # a folder needs no room
            write()
        fsync(handle)

    def sheet(source, prompts, path, **_):  # as large a write, without the sampling
        with files.write_file(path) as partial:
            partial.write_bytes(b"PNG")
        return path

    monkeypatch.setattr(files.os, "fsync", flush)
    monkeypatch.setattr(files, "append_lines", lambda *arguments: (write(), whole_append(*arguments))[1])
    monkeypatch.setattr(finish, "draw_comparison", sheet)
    whole = run.start(settings, tmp_path / "whole", **QUIET)
    shutil.copytree(tmp_path / "whole" / "cache", tmp_path / "cache")  # its writes are alike: one of them is enough
    shutil.copytree(tmp_path / "cache", tmp_path / "counted" / "cache")
    run.start(settings, tmp_path / "counted", **QUIET)
    writes = 10**9 - left[0] - len(list((tmp_path / "cache").iterdir()))
    for room in range(writes):
        folder, said = tmp_path / f"full-{room}", []
        shutil.copytree(tmp_path / "cache", folder / "cache")
        left[0] = room
        try:
            result = run.start(settings, folder, say=said.append, progress=False)
        except OSError as error:
            assert error.errno in files.DISK_FULL
        else:
            assert result.lora and (left[0] >= 0 or result.missing), said
            assert [text for text in said if text.startswith("missing")] == said[len(said) - len(result.missing) :]
            assert killing.same_weights(result.lora, whole.lora)
        left[0] = 10**9
        if (folder / "config.json").exists():
            assert not run_folder.RunFolder(folder).describe()["problems"]
        if not (folder / "thing.safetensors").exists():
            assert killing.same_weights(run.start(settings, folder, **QUIET).lora, whole.lora)


@pytest.mark.usefixtures("weights_only")
def test_older_states_make_room_on_a_full_disk(settings, tmp_path, monkeypatch):
    """Old whole states stayed, because reducing them needs room too: all steps after that were lost."""
    settings, write_file = settings.with_(steps=10, save_every=2, keep_states=3), files.write_file
    whole = run.start(settings, tmp_path / "whole", **QUIET)
    states, room = tmp_path / "full" / "checkpoints", [0.0]

    @contextmanager
    def limited(path, size=None):
        with write_file(path, size) as partial:
            yield partial
            if sum(file.stat().st_size for file in (*states.glob("*"), *states.parent.glob("*.saf*"))) > room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")

    state = checkpoint.checkpoint_paths(tmp_path / "whole" / "checkpoints")[0].stat().st_size
    monkeypatch.setattr(files, "write_file", limited)
    room[0] = 3.2 * state
    result = run.start(settings, tmp_path / "full", **QUIET)
    assert not result.missing and killing.same_weights(result.lora, whole.lora)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoint_paths(states)] == [10, 8, 6, 4, 2]
    assert checkpoint.newest(states).step == 10


@pytest.mark.usefixtures("weights_only")
def test_a_log_that_finds_no_room_is_written_when_there_is_some(settings, tmp_path, monkeypatch):
    append, calls = files.append_lines, []

    def full(path, text):
        calls.append(text)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "no room for log.jsonl")
        append(path, text)

    monkeypatch.setattr(files, "append_lines", full)
    said = []
    run.start(settings, tmp_path / "run", say=said.append, progress=False)
    assert [line["step"] for line in run_folder.read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert line(said, "log", "log.jsonl") and not line(said, "missing")


@pytest.mark.usefixtures("weights_only")
def test_a_checkpoint_that_finds_no_room_never_ends_training(settings, tmp_path, monkeypatch):
    whole, tried = checkpoint.save, []

    def full(path, *rest, **more):
        tried.append(path.name)
        if path.name == checkpoint.name(3):
            raise OSError(errno.ENOSPC, "no room for it")
        return whole(path, *rest, **more)

    monkeypatch.setattr(checkpoint, "save", full)
    said = []
    result = run.start(settings, tmp_path / "run", say=said.append, progress=False)
    assert tried == [checkpoint.name(n) for n in (3, 3, 6)] and result.lora  # tried again with what could be freed
    assert line(said, "save", 3, "no room for it")
    assert result.missing == ("checkpoint of step 3: OSError: [Errno 28] no room for it",)
    assert said[-1] == f"missing   {result.missing[0]}"


def test_a_run_that_cannot_be_saved_at_all_is_not_begun(settings, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=naming("out", "1,000")) as raised:
        run.start(settings, tmp_path / "out", **QUIET)
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.usefixtures("weights_only")
def test_what_a_run_takes_of_the_disk_is_said_and_true(settings, tmp_path):
    settings, said = settings.with_(steps=8, save_every=1, keep_states=2, ema_decay=0.9), []
    run.start(settings, tmp_path / "run", say=said.append, progress=False)
    told = line(said, "disk")
    saved = {
        checkpoint.step_of(p): p.stat().st_size for p in checkpoint.checkpoint_paths(tmp_path / "run" / "checkpoints")
    }
    predicted = [float(number) * 2**20 for number in re.findall(r"([\d.]+) MiB", told)]
    assert len(saved) == 8 and len(predicted) >= 3
    headers = 200_000  # names and metadata of a small adapter
    assert predicted[1] == pytest.approx(saved[8], abs=headers) and predicted[2] == pytest.approx(saved[1], abs=headers)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(settings):
    script = (
        "import os, sys, filelock; from lorakit import config, run\n"
        "run.start; os.getuid() or os.setuid(65534)\n"  # nobody
        "run.start(config.Config.model_validate_json(sys.argv[1]), sys.argv[2])"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # which nobody may pass through, as $TMPDIR perhaps not
        for name, mode, named in (("run", 0o555, ".lock"), ("in/run", 0o555, "run")):
            place = Path(folder, name)
            (place if place.parent == Path(folder) else place.parent).mkdir(mode=mode)
            os.chmod(folder, 0o755)
            found = subprocess.run(
                [sys.executable, "-c", script, settings.to_json(), place], capture_output=True, text=True
            )
            assert found.returncode and names(found.stderr, named, "permission denied"), found.stderr
            assert os.listdir(place if place.exists() else place.parent) == []


@pytest.mark.usefixtures("weights_only")
def test_two_programs_in_one_folder_are_one_too_many(settings, tmp_path):
    told = []

    def second(step):
        if not told:
            with pytest.raises(BlockingIOError, match=naming("run", "STOP")) as raised:
                run.start(settings, tmp_path / "run", **QUIET)
            told.append(str(raised.value))
            code = "import pathlib, sys; from lorakit import storage\n"
            code += "with storage.claim_folder(pathlib.Path(sys.argv[1])): 0"
            other = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True)
            assert "BlockingIOError" in other.stderr
            thread = threading.Thread(target=lambda: told.append(refused()))
            thread.start()
            thread.join()

    def refused():
        with pytest.raises(BlockingIOError):
            run.start(settings, tmp_path / "run", **QUIET)
        return "in a thread too"

    assert run.start(settings, tmp_path / "run", listeners=[second], **QUIET).lora
    assert len(told) == 2
    assert run.start(settings, tmp_path / "run", **QUIET).lora  # nobody is in it any more


@pytest.mark.usefixtures("weights_only")
def test_a_clock_that_jumps_changes_nothing(settings, tmp_path, monkeypatch):
    settings = settings.with_(save_minutes=1e-6, save_every=100)
    whole = run.start(settings, tmp_path / "whole", **QUIET)
    clock = iter([2e9, 1e9, 1.5e9, *[5e8] * 10_000])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    stop = threading.Event()
    run.start(
        settings,
        tmp_path / "run",
        control=Control(stop),
        listeners=[lambda s: stop.set() if s.number == 3 else None],
        **QUIET,
    )
    again = run.start(settings, tmp_path / "run", **QUIET)
    assert killing.same_weights(again.lora, whole.lora)
    facts = read.load(again.lora).metadata
    assert float(facts["ss_training_started_at"]) == pytest.approx(2e9, abs=100)
    with monkeypatch.context() as context:
        context.setattr(time, "time", lambda: 3e9)
        one = run.start(settings, tmp_path / "one", **QUIET)
    facts = read.load(one.lora).metadata
    assert 0 < float(facts["ss_training_finished_at"]) - float(facts["ss_training_started_at"]) < 100


# ── Saved however it ends ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("weights_only")
def test_an_error_is_preceded_by_a_checkpoint(settings, tmp_path):
    def fail(step):
        if step.number == 4:
            raise RuntimeError("power cut")

    said = []
    with pytest.raises(RuntimeError, match="power cut"):
        run.start(settings, tmp_path / "run", listeners=[fail], say=said.append, progress=False)
    assert max(killing.readable(tmp_path / "run")) == 4
    assert line(said, "save", 4, "RuntimeError")
    said.clear()
    assert run.start(settings, tmp_path / "run", say=said.append, progress=False).steps == 6
    assert line(said, "resume", 4)


def test_an_error_that_cannot_be_saved_from_is_told_itself(settings, tmp_path, monkeypatch):
    def fail(step):
        monkeypatch.setattr(checkpoint, "save_file", lambda *_: 1 / 0)
        raise RuntimeError("power cut")

    said = []
    with pytest.raises(RuntimeError, match="power cut"):
        run.start(settings, tmp_path / "run", listeners=[fail], say=said.append, progress=False)
    assert line(said, "save", 1, "division by zero")


@pytest.mark.no_cover
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_host_that_ends_a_program_finds_it_saved(settings, tmp_path, name):
    settings = settings.with_(steps=100_000, save_every=100_000, save_minutes=0, sample_every=100_000)
    process = killing.begin(settings, tmp_path / "run", tmp_path / "told.json")
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(600):
        if log.exists() and log.stat().st_size:
            break
        time.sleep(0.1)
    os.kill(process.pid, getattr(signal, name))
    process.join(60)
    process.kill()  # one that did not hear it
    assert process.exitcode == 0
    (step, whole), *others = killing.readable(tmp_path / "run").items()
    assert step > 0 and whole and not others
    assert line(json.loads((tmp_path / "told.json").read_text())["said"], "stopped", step)
