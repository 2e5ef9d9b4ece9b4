"""What a run leaves behind: checkpoints of which old ones are thinned, and what can be made of them."""

import pytest
import torch
from killing import readable, same_weights
from loops import begin

from lorakit import base as bases
from lorakit import checkpoint, config, export, plots, record, run, train

QUIET = {"say": lambda _: None, "progress": False}


def test_the_weights_of_all_are_kept_and_the_newest_few_whole(settings, tmp_path):
    run.start(settings.with_(steps=12, save_every=2, keep_states=2), tmp_path / "run", **QUIET)
    found = readable(tmp_path / "run")
    assert found == {2: False, 4: False, 6: False, 8: False, 10: True, 12: True}
    sizes = {checkpoint.step_of(p): p.stat().st_size for p in checkpoint.paths(tmp_path / "run" / "checkpoints")}
    assert sizes[2] < 0.55 * sizes[12]  # a third, beside the header of a small adapter
    told = record.describe(tmp_path / "run")
    assert [entry["whole"] for entry in told["checkpoints"]] == [False] * 4 + [True] * 2 and not told["problems"]


def test_checkpoints_between_regular_ones_do_not_stay(settings, tmp_path):
    settings = settings.with_(steps=9, save_every=3, save_minutes=1e-9, keep_states=2)
    run.start(settings, tmp_path / "run", **QUIET)
    assert readable(tmp_path / "run") == {3: False, 6: False, 8: True, 9: True}


def test_fewer_are_kept_if_asked_for_but_the_best_is(settings, tmp_path, monkeypatch):
    marks = {1: 0.5, 2: 0.4, 3: 0.5, 4: 0.6}
    monkeypatch.setattr(record.Keeper, "spared", lambda self: [min(marks, key=marks.get)])
    run.start(settings.with_(steps=8, save_every=1, keep_states=1, keep_checkpoints=3), tmp_path / "run", **QUIET)
    assert set(readable(tmp_path / "run")) == {2, 6, 7, 8}


def test_a_thinned_checkpoint_is_exported_as_it_was(settings, ready, tmp_path):
    """The same LoRA as the adapter had then, averages and all, without the base."""
    settings = settings.with_(ema_decay=0.9, learning_rate=1e-2)
    _, state, loop = begin(settings, ready)
    next(loop)
    next(loop)
    about = {"family": "sd15", "metadata": {"modelspec.trigger_phrase": "sks thing"}}
    path = checkpoint.save(tmp_path / checkpoint.name(2), state, {}, about=about)
    with state.evaluated():
        wanted = export.save(state.adapter, ready.base, tmp_path / "now.safetensors")
    for _ in range(2):
        lora = checkpoint.lora(checkpoint.read(path))
        made = export.write(lora, tmp_path / "later.safetensors")
        assert same_weights(made, wanted) and export.prove(made, lora).error < 1e-3
        assert export.load(made).metadata["modelspec.trigger_phrase"] == "sks thing"
        checkpoint.thin(checkpoint.read(path))
    with pytest.raises(
        ValueError, match="step-000002.safetensors holds the weights alone: it can be exported, not gone"
    ):
        checkpoint.read_whole(path)
    told = []
    assert checkpoint.newest(tmp_path, told.append) is None and "holds the weights alone" in told[0]


@pytest.mark.parametrize("optimizer", ["adamw_schedulefree", "prodigy"])
def test_what_is_exported_is_what_is_judged(settings, ready, tmp_path, optimizer):
    rate = {"prodigy": {"learning_rate": 1.0}}.get(optimizer, {"schedule": "constant_with_warmup"})
    _, state, loop = begin(settings.with_(optimizer=optimizer, **rate), ready)
    train.run(loop)
    path = checkpoint.save(tmp_path / checkpoint.name(6), state, {}, about={"family": "sd15"})
    before = [weight.clone() for weight in state.adapter.parameters()]
    with state.evaluated():
        wanted = export.save(state.adapter, ready.base, tmp_path / "now.safetensors", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, state.adapter.parameters(), strict=True))
    made = export.write(checkpoint.lora(checkpoint.read(path)), tmp_path / "later.safetensors", dtype=torch.float32)
    assert same_weights(made, wanted)


def test_a_runs_lora_by_step(settings, tmp_path):
    folder = tmp_path / "run"
    finished = run.start(settings.with_(save_every=2, validation_share=0.2, validate_every=2), folder, **QUIET)
    newest = export.write(record.lora_of(folder), tmp_path / "newest.safetensors")
    assert same_weights(newest, finished.lora)
    theirs, ours = (export.load(path).metadata for path in (finished.lora, newest))
    unlike = {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)}
    assert unlike <= {"ss_training_finished_at", "modelspec.date"}
    early = record.lora_of(folder, 2)
    assert early.metadata["ss_steps"] == "2" and early.metadata["ss_epoch"] == "1"
    assert record.lora_of(folder, "best").name == finished.best.name
    assert record.lora_of(folder / "checkpoints" / checkpoint.name(4)).metadata["ss_steps"] == "4"
    with pytest.raises(ValueError, match="run has no checkpoint of step 3. It has 2, 4, 6"):
        record.lora_of(folder, "3")
    (folder / "log.jsonl").unlink()
    with pytest.raises(ValueError, match="held no pictures out"):
        record.lora_of(folder, "best")
    again = export.write(record.lora_of(finished.lora), tmp_path / "again.safetensors")
    assert same_weights(again, finished.lora)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        record.describe(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        record.lora_of(tmp_path)
    assert record.describe(tmp_path)["problems"]


# ── Forks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fork_goes_on_from_another_run_with_other_settings(settings, tmp_path):
    run.start(settings, tmp_path / "one", **QUIET)
    longer = settings.with_(steps=9, learning_rate=5e-4)
    with pytest.raises(ValueError, match="learning_rate was 0.001, is now 0.0005; steps was 6, is now 9.*--fork"):
        run.start(longer, tmp_path / "one", **QUIET)
    said = []
    result = run.start(longer, tmp_path / "two", fork=tmp_path / "one", say=said.append, progress=False)
    assert any("fork      begins where one was at step 6" in line for line in said)
    assert result.steps == 9 and len(result.losses) == 3
    log = plots.read_log(tmp_path / "two" / "log.jsonl")
    assert [(line["step"], line["learning_rate"]) for line in log[5:7]] == [(6, 1e-3), (7, 5e-4)]
    # As one that was made of the same steps by hand: the optimizer came along.
    same = run.start(longer, tmp_path / "two", fork=tmp_path / "one", **QUIET)
    assert same_weights(same.lora, result.lora) and same.losses == []
    assert sorted(readable(tmp_path / "one")) == [3, 6]  # the other run is as it was


def test_a_fork_with_the_same_settings_is_the_same_run(settings, tmp_path):
    whole = run.start(settings, tmp_path / "whole", **QUIET)
    run.start(settings.with_(steps=3), tmp_path / "one", **QUIET)
    forked = run.start(settings, tmp_path / "two", fork=tmp_path / "one", **QUIET)
    assert same_weights(forked.lora, whole.lora)


def test_a_fork_may_change_its_optimizer(settings, tmp_path):
    run.start(settings, tmp_path / "one", **QUIET)
    other = settings.with_(steps=8, optimizer="lion", ema_decay=0.9)
    assert run.start(other, tmp_path / "two", fork=tmp_path / "one", **QUIET).steps == 8
    assert run.start(other, tmp_path / "two", **QUIET).steps == 8


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 8}, "cannot be forked with other weights than it holds: rank was 4, is now 8"),
        ({"steps": 6}, "one is at step 6: set steps above that, it is 6 now"),
    ],
)
def test_what_cannot_be_forked(settings, tmp_path, changes, message):
    run.start(settings, tmp_path / "one", **QUIET)
    with pytest.raises(ValueError, match=message):
        run.start(settings.with_(**({"steps": 9} | changes)), tmp_path / "two", fork=tmp_path / "one", **QUIET)
    assert not checkpoint.paths(tmp_path / "two" / "checkpoints")
    with pytest.raises(ValueError, match="nothing has no checkpoint to fork from"):
        run.start(settings, tmp_path / "three", fork=tmp_path / "nothing", **QUIET)


def test_bases_are_not_needed_to_tell(settings, tmp_path, monkeypatch):
    run.start(settings, tmp_path / "run", **QUIET)
    monkeypatch.setattr(bases, "open", lambda *_: 1 / 0)
    assert record.lora_of(tmp_path / "run").family == "sd15"
    assert record.describe(tmp_path / "run")["name"] == config.load(tmp_path / "run" / "config.json").name


def test_a_log_that_was_changed_is_noticed(settings, tmp_path):
    run.start(settings.with_(steps=3), tmp_path / "run", **QUIET)
    said = []
    run.start(settings, tmp_path / "two", fork=tmp_path / "run", say=said.append, progress=False)
    assert not any("changed or damaged" in line for line in said)
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1', 1))
    run.start(settings.with_(steps=3), tmp_path / "run", say=said.append, progress=False)
    assert any("log.jsonl was changed or damaged after it was saved" in line for line in said)
