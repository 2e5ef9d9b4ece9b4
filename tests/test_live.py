"""Steering a run while it goes on."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lorakit import cache, checkpoint, export, plots, run
from lorakit.live import Live

QUIET = {"say": lambda _: None, "progress": False}


def at(number, live, **wishes):
    """A listener that wishes for something when a step is done."""

    def listener(step):
        if step.number == number:
            for name, value in wishes.items():
                getattr(live, name).set() if value is True else setattr(live, name, value)

    return listener


def test_a_run_saves_and_samples_when_asked(settings, tmp_path):
    live, said = Live(), []
    run.start(settings, tmp_path / "run", say=said.append, progress=False, live=live,
              listeners=[at(1, live, save=True, sample=True)])  # fmt: skip
    folder = tmp_path / "run"
    assert len(list((folder / "samples" / "step-000002").glob("*.png"))) == 1
    assert "save      step 2 is saved, as asked" in said
    assert not live.save.is_set() and not live.sample.is_set()
    assert (live.step, live.total) == (6, 6) and live.prepared.prediction.peak > 0
    assert checkpoint.read(folder / "checkpoints" / checkpoint.name(2)).whole


def test_a_learning_rate_holds_from_the_next_step_on_and_over_a_cut(settings, tmp_path):
    def trained(name, cut=99):
        live = Live()
        listeners = [at(2, live, learning_rate=5e-4), at(cut, live, stop=True)]
        run.start(settings, tmp_path / name, live=live, listeners=listeners, **QUIET)
        return plots.read_log(tmp_path / name / "log.jsonl")

    log = trained("whole")
    assert [line["learning_rate"] for line in log] == [1e-3] * 3 + [5e-4] * 3
    assert [line.get("asked") for line in log] == [None, None, {"learning_rate": 5e-4}, None, None, None]
    trained("cut", cut=4)
    result = run.start(settings, tmp_path / "cut", **QUIET)
    whole, cut = load_file(tmp_path / "whole" / "thing.safetensors"), load_file(result.lora)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert [line["learning_rate"] for line in plots.read_log(tmp_path / "cut" / "log.jsonl")][4:] == [5e-4] * 2


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_that_is_none_changes_nothing(settings, tmp_path, rate):
    live, said = Live(), []
    run.start(settings.with_(steps=3), tmp_path / "run", say=said.append, progress=False, live=live,
              listeners=[at(1, live, learning_rate=rate)])  # fmt: skip
    assert {line["learning_rate"] for line in plots.read_log(tmp_path / "run" / "log.jsonl")} == {1e-3}
    assert sum("give a number above 0" in line for line in said) == 1


def test_prompts_are_exchanged_while_it_runs(settings, tmp_path):
    live = Live()
    asked = ["a dog on the moon", "sks thing"]
    result = run.start(settings, tmp_path / "run", live=live, listeners=[at(1, live, prompts=asked, sample=True)],
                       **QUIET)  # fmt: skip
    with Image.open(min((tmp_path / "run" / "samples" / "step-000002").glob("*.png"))) as first:
        assert first.info["parameters"].startswith("a dog on the moon")
    assert plots.read_log(tmp_path / "run" / "log.jsonl")[1]["asked"] == {"prompts": asked}
    untouched = run.start(settings, tmp_path / "untouched", **QUIET)
    one, other = load_file(result.lora), load_file(untouched.lora)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_prompts_that_cannot_be_encoded_end_nothing(settings, tmp_path, monkeypatch):
    live, said, encode = Live(), [], cache.encode_texts

    def broken(base, prompts, *args, **options):
        if "a dog" in prompts:
            raise OSError("the hub is out of reach")
        return encode(base, prompts, *args, **options)

    monkeypatch.setattr(cache, "encode_texts", broken)
    monkeypatch.setattr(run, "compare", lambda *args, **options: None)
    result = run.start(settings, tmp_path / "run", say=said.append, progress=False, live=live,
                       listeners=[at(1, live, prompts=["a dog"], sample=True)])  # fmt: skip
    assert "samples   none at step 2: OSError: the hub is out of reach" in said
    assert export.describe(result.lora)["hash"] == "verified"


def test_what_is_done_before_and_after_training_is_told(settings, tmp_path):
    told = []
    run.start(settings.with_(steps=2), tmp_path / "run", say=lambda _: None, progress=lambda *seen: told.append(seen))
    assert {what for what, _, _ in told} == {"captions", "pictures", "comparing"}
    assert all(done <= of for _, done, of in told)


def test_a_stop_before_the_first_step_ends_the_preparation_and_loses_nothing(settings, tmp_path):
    live = Live()
    live.stop.set()
    with pytest.raises(KeyboardInterrupt, match="what is done is kept"):
        run.start(settings, tmp_path / "run", live=live, **QUIET)
    assert run.start(settings, tmp_path / "run", **QUIET).steps == 6


def test_a_learning_rate_asked_for_before_the_first_step_holds_for_it(settings, tmp_path):
    run.start(settings, tmp_path / "run", live=Live(learning_rate=2e-4), **QUIET)
    log = plots.read_log(tmp_path / "run" / "log.jsonl")
    assert {line["learning_rate"] for line in log} == {2e-4} and log[0]["asked"] == {"learning_rate": 2e-4}
