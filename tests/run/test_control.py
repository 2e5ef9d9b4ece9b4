"""Steering a run while it goes on."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from said import QUIET, line, names

from lorakit.adapter import proof
from lorakit.base import encode as encode_module
from lorakit.run import checkpoint, finish, run, run_folder
from lorakit.run.control import Control


def at(number, live, **wishes):
    """A listener that wishes for something when a step is done."""

    def listener(step):
        if step.number == number:
            for name, value in wishes.items():
                getattr(live, name).set() if value is True else setattr(live, name, value)

    return listener


def rates(folder):
    return [entry["learning_rate"] for entry in run_folder.read_log(folder / "log.jsonl")]


@pytest.mark.usefixtures("weights_only")
def test_a_run_saves_and_samples_when_asked(settings, tmp_path):
    live, said = Control(), []
    run.start(settings.with_(steps=3), tmp_path / "run", say=said.append, progress=False, control=live,
              listeners=[at(1, live, save=True, sample=True)])  # fmt: skip
    folder = tmp_path / "run"
    assert len(list((folder / "samples" / "step-000002").glob("*.png"))) == 1
    assert line(said, "save", 2)
    assert not live.save.is_set() and not live.sample.is_set()
    assert (live.step, live.total) == (3, 3) and live.prepared.prediction.peak > 0
    assert checkpoint.read(folder / "checkpoints" / checkpoint.name(2)).whole


@pytest.mark.usefixtures("weights_only")
def test_a_learning_rate_holds_from_the_next_step_on_and_over_a_cut(settings, tmp_path):
    def trained(name, cut=99):
        live = Control()
        listeners = [at(2, live, learning_rate=5e-4), at(cut, live, stop=True)]
        run.start(settings, tmp_path / name, control=live, listeners=listeners, **QUIET)
        return run_folder.read_log(tmp_path / name / "log.jsonl")

    log = trained("whole")
    assert [entry["learning_rate"] for entry in log] == [1e-3] * 3 + [5e-4] * 3
    assert [entry.get("asked") for entry in log] == [None, None, {"learning_rate": 5e-4}, None, None, None]
    trained("cut", cut=4)
    result = run.start(settings, tmp_path / "cut", **QUIET)
    whole, cut = load_file(tmp_path / "whole" / "thing.safetensors"), load_file(result.lora)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert rates(tmp_path / "cut")[4:] == [5e-4] * 2


@pytest.mark.usefixtures("weights_only")
def test_a_learning_rate_that_is_none_changes_nothing(settings, tmp_path):
    live, said, wrong = Control(), [], {1: 0.0, 2: -1.0, 3: float("nan"), 4: float("inf")}
    run.start(settings, tmp_path / "run", say=said.append, progress=False, control=live,
              listeners=[at(step, live, learning_rate=rate) for step, rate in wrong.items()])  # fmt: skip
    assert rates(tmp_path / "run") == [1e-3] * 6 and live.learning_rate is None
    assert [sum(names(text, "rate", rate) for text in said) for rate in wrong.values()] == [1, 1, 1, 1]


@pytest.mark.usefixtures("weights_only")
def test_prompts_are_exchanged_while_it_runs(settings, finished, tmp_path):
    live = Control()
    asked = ["a dog on the moon", "sks thing"]
    result = run.start(settings, tmp_path / "run", control=live, listeners=[at(1, live, prompts=asked, sample=True)],
                       **QUIET)  # fmt: skip
    with Image.open(min((tmp_path / "run" / "samples" / "step-000002").glob("*.png"))) as first:
        assert first.info["parameters"].startswith("a dog on the moon")
    assert run_folder.read_log(tmp_path / "run" / "log.jsonl")[1]["asked"] == {"prompts": asked}
    one, untouched = load_file(result.lora), load_file(finished[0].lora)
    assert all(torch.equal(one[name], untouched[name]) for name in one)


def test_prompts_that_cannot_be_encoded_end_nothing(settings, tmp_path, monkeypatch):
    live, said, encode = Control(), [], encode_module.encode_texts

    def broken(base, prompts, *args, **options):
        if "a dog" in prompts:
            raise OSError("the hub is out of reach")
        return encode(base, prompts, *args, **options)

    monkeypatch.setattr(encode_module, "encode_texts", broken)
    monkeypatch.setattr(finish, "draw_comparison", lambda *args, **options: None)
    result = run.start(settings.with_(steps=3), tmp_path / "run", say=said.append, progress=False, control=live,
                       listeners=[at(1, live, prompts=["a dog"], sample=True)])  # fmt: skip
    assert line(said, "samples", 2, "OSError: the hub is out of reach")
    assert proof.describe_file(result.lora)["hash"] == "verified"


def test_what_is_done_before_and_after_training_is_told(settings, tmp_path):
    told = []
    run.start(settings.with_(steps=1), tmp_path / "run", say=QUIET["say"], progress=lambda *seen: told.append(seen))
    assert {what for what, _, _ in told} == {"captions", "pictures", "samples"}
    assert all(done <= of for _, done, of in told)


@pytest.mark.usefixtures("weights_only")
def test_a_stop_before_the_first_step_ends_the_preparation_and_loses_nothing(settings, tmp_path):
    live, settings = Control(), settings.with_(steps=1)
    live.stop.set()
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "run", control=live, **QUIET)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "cache").iterdir()}
    assert kept and not (tmp_path / "run" / "checkpoints").exists()
    assert run.start(settings, tmp_path / "run", **QUIET).steps == 1
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())  # not encoded again


@pytest.mark.usefixtures("weights_only")
def test_a_learning_rate_asked_for_before_the_first_step_holds_for_it(settings, tmp_path):
    run.start(settings.with_(steps=2), tmp_path / "run", control=Control(learning_rate=2e-4), **QUIET)
    log = run_folder.read_log(tmp_path / "run" / "log.jsonl")
    assert rates(tmp_path / "run") == [2e-4] * 2 and log[0]["asked"] == {"learning_rate": 2e-4}
