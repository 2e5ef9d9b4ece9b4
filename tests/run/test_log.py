"""What a run leaves behind: checkpoints of which old ones are thinned, and what can be made of them."""

import pytest
import torch
from killing import readable, same_weights
from loops import begin
from said import QUIET, line, names, naming

from lorakit import config
from lorakit.adapter import proof, read, write
from lorakit.base import model
from lorakit.run import checkpoint, run, run_folder, saver
from lorakit.train import loop as loop_module

pytestmark = pytest.mark.usefixtures("weights_only")


def test_the_weights_of_all_are_kept_and_the_newest_few_whole(settings, tmp_path):
    run.start(settings.with_(save_every=1, keep_states=2), tmp_path / "run", **QUIET)
    assert readable(tmp_path / "run") == {1: False, 2: False, 3: False, 4: False, 5: True, 6: True}
    sizes = {
        checkpoint.step_of(p): p.stat().st_size for p in checkpoint.checkpoint_paths(tmp_path / "run" / "checkpoints")
    }
    assert sizes[1] < 0.55 * sizes[6]  # a third, beside the header of a small adapter
    told = run_folder.RunFolder(tmp_path / "run").describe()
    assert [entry["whole"] for entry in told["checkpoints"]] == [False] * 4 + [True] * 2 and not told["problems"]


def test_checkpoints_between_regular_ones_do_not_stay(settings, tmp_path):
    run.start(settings.with_(save_every=2, save_minutes=1e-9, keep_states=2), tmp_path / "run", **QUIET)
    assert readable(tmp_path / "run") == {2: False, 4: False, 5: True, 6: True}


def test_fewer_are_kept_if_asked_for_but_the_best_is(settings, tmp_path, monkeypatch):
    marks = {1: 0.5, 2: 0.4, 3: 0.5, 4: 0.6}
    monkeypatch.setattr(saver.Saver, "spared", lambda self: [min(marks, key=marks.get)])
    run.start(settings.with_(save_every=1, keep_states=1, keep_checkpoints=3), tmp_path / "run", **QUIET)
    assert set(readable(tmp_path / "run")) == {2, 4, 5, 6}


def test_a_thinned_checkpoint_is_exported_as_it_was(settings, ready, tmp_path):
    """The same LoRA as the adapter had then, averages and all, without the base."""
    settings = settings.with_(ema_decay=0.9, learning_rate=1e-2)
    _, state, loop = begin(settings, ready)
    next(loop)
    next(loop)
    about = {"family": "sd15", "metadata": {"modelspec.trigger_phrase": "sks thing"}}
    path = checkpoint.save(tmp_path / checkpoint.name(2), state, {}, about=about)
    with state.evaluated():
        wanted = write.save_adapter(state.adapter, ready.base, tmp_path / "now.safetensors")
    for _ in range(2):
        lora = checkpoint.lora(checkpoint.read(path))
        made = write.save(lora, tmp_path / "later.safetensors")
        assert same_weights(made, wanted) and proof.prove(made, lora).error < 1e-3
        assert read.load(made).metadata["modelspec.trigger_phrase"] == "sks thing"
        checkpoint.thin(checkpoint.read(path))
    assert not checkpoint.read(path).whole
    with pytest.raises(ValueError, match=naming("step-000002.safetensors")):
        checkpoint.read_whole(path)
    told = []
    assert checkpoint.newest(tmp_path, told.append) is None and line(told, "step-000002.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw_schedulefree", "prodigy"])
def test_what_is_exported_is_what_is_judged(settings, ready, tmp_path, optimizer):
    rate = {"prodigy": {"learning_rate": 1.0}}.get(optimizer, {"schedule": "constant_with_warmup"})
    _, state, loop = begin(settings.with_(optimizer=optimizer, **rate), ready)
    loop_module.drain(loop)
    path = checkpoint.save(tmp_path / checkpoint.name(6), state, {}, about={"family": "sd15"})
    before = [weight.clone() for weight in state.adapter.parameters()]
    with state.evaluated():
        wanted = write.save_adapter(state.adapter, ready.base, tmp_path / "now.safetensors", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, state.adapter.parameters(), strict=True))
    made = write.save(checkpoint.lora(checkpoint.read(path)), tmp_path / "later.safetensors", dtype=torch.float32)
    assert same_weights(made, wanted)


def test_a_runs_lora_by_step(settings, tmp_path):
    folder = tmp_path / "run"
    result = run.start(settings.with_(save_every=2, validation_share=0.2, validate_every=2), folder, **QUIET)
    newest = write.save(run_folder.lora_of(folder), tmp_path / "newest.safetensors")
    assert same_weights(newest, result.lora)
    theirs, ours = (read.load(path).metadata for path in (result.lora, newest))
    unlike = {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)}
    assert unlike <= {"ss_training_finished_at", "modelspec.date"}
    early = run_folder.lora_of(folder, 2)
    assert early.metadata["ss_steps"] == "2" and early.metadata["ss_epoch"] == "1"
    assert run_folder.lora_of(folder, "best").name == result.best.name
    assert run_folder.lora_of(folder / "checkpoints" / checkpoint.name(4)).metadata["ss_steps"] == "4"
    with pytest.raises(ValueError, match=naming("run", 3, 2, 4, 6)):
        run_folder.lora_of(folder, "3")
    (folder / "log.jsonl").unlink()
    with pytest.raises(ValueError, match=naming("run")) as error:  # no pictures were held out
        run_folder.lora_of(folder, "best")
    assert not names(str(error.value), 2, 4, 6)
    again = write.save(run_folder.lora_of(result.lora), tmp_path / "again.safetensors")
    assert same_weights(again, result.lora)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming(tmp_path.name, "config.json", "checkpoints")):
        run_folder.RunFolder(tmp_path).describe()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=naming(tmp_path.name)):
        run_folder.lora_of(tmp_path)
    assert run_folder.RunFolder(tmp_path).describe()["problems"]


# ── Forks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def one(trained, tmp_path):
    """A finished run's folder of 6 steps, named as no word of a message is."""
    return trained.folder.rename(tmp_path / "one")


def test_a_fork_goes_on_from_another_run_with_other_settings(settings, one, tmp_path):
    longer = settings.with_(steps=9, learning_rate=5e-4)
    with pytest.raises(ValueError, match=naming("learning_rate", 0.001, 0.0005, "steps", 6, 9, "--fork")):
        run.start(longer, one, **QUIET)
    said = []
    result = run.start(longer, tmp_path / "two", fork=one, say=said.append, progress=False)
    assert line(said, "fork", "one", 6)
    assert result.steps == 9 and len(result.losses) == 3
    log = run_folder.read_log(tmp_path / "two" / "log.jsonl")
    assert [(entry["step"], entry["learning_rate"]) for entry in log[5:7]] == [(6, 1e-3), (7, 5e-4)]
    # As one that was made of the same steps by hand: the optimizer came along.
    same = run.start(longer, tmp_path / "two", fork=one, **QUIET)
    assert same_weights(same.lora, result.lora) and same.losses == []
    assert sorted(readable(one)) == [3, 6]  # the other run is as it was


def test_a_fork_with_the_same_settings_is_the_same_run(settings, finished, tmp_path):
    whole, said = finished[0], []
    run.start(settings.with_(steps=3), tmp_path / "one", **QUIET)
    forked = run.start(settings, tmp_path / "two", fork=tmp_path / "one", say=said.append, progress=False)
    assert same_weights(forked.lora, whole.lora) and forked.losses == whole.losses[3:]
    assert not line(said, "log.jsonl")  # the copied log is not taken for a changed one


def test_a_fork_may_change_its_optimizer(settings, one, tmp_path):
    other = settings.with_(steps=7, optimizer="lion", ema_decay=0.9)
    assert run.start(other, tmp_path / "two", fork=one, **QUIET).steps == 7
    assert run.start(other, tmp_path / "two", **QUIET).steps == 7


def test_what_cannot_be_forked(settings, one, tmp_path):
    for changes, values in (({"steps": 9, "rank": 8}, ("rank", 4, 8)), ({"steps": 6}, ("one", "steps", 6))):
        with pytest.raises(ValueError, match=naming(*values)):
            run.start(settings.with_(**changes), tmp_path / "two", fork=one, **QUIET)
        assert not checkpoint.checkpoint_paths(tmp_path / "two" / "checkpoints")
    with pytest.raises(ValueError, match=naming("nothing")):
        run.start(settings, tmp_path / "three", fork=tmp_path / "nothing", **QUIET)


def test_bases_are_not_needed_to_tell(finished, monkeypatch):
    folder = finished[0].folder
    monkeypatch.setattr(model, "open", lambda *_: 1 / 0)
    assert run_folder.lora_of(folder).family == "sd15"
    assert run_folder.RunFolder(folder).describe()["name"] == config.load(folder / "config.json").name


def test_a_log_that_was_changed_is_noticed(settings, trained):
    said, log = [], trained.folder / "log.jsonl"
    run.start(settings, trained.folder, say=said.append, progress=False)
    assert not line(said, "log.jsonl")
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1', 1))
    run.start(settings, trained.folder, say=said.append, progress=False)
    assert line(said, "log.jsonl")
