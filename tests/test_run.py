import json
import threading

import pytest
import torch
from PIL import Image

from lorakit import base as bases
from lorakit import checkpoint, export, memory, plots, run, train


def tensor_bytes(file):
    """What a safetensors file holds beside its header."""
    raw = file.read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[:8], "little")


QUIET = {"say": lambda _: None, "progress": False}


def test_a_run_goes_from_pictures_to_a_proven_file(settings, tmp_path):
    said, seen = [], []
    result = run.start(settings, tmp_path / "out", say=said.append, progress=False, listeners=[seen.append])
    folder = tmp_path / "out"
    assert (result.steps, result.total, len(result.losses), len(seen)) == (6, 6, 6, 6)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [checkpoint.name(3), checkpoint.name(6)]
    assert [line["step"] for line in plots.read_log(folder / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert Image.open(folder / "loss.png").width > 400
    assert Image.open(folder / "comparison.png").width > 400
    assert len(list((folder / "samples" / "step-000006").glob("*.png"))) == 1
    facts = export.describe(result.lora)
    assert facts["family"] == "sd15" and facts["trigger"] == "sks thing"
    predicted = memory.predict(bases.open(settings.base), settings, size=(32, 32), dtype=torch.float32).file_size
    assert predicted == tensor_bytes(result.lora)
    text = "\n".join(said)
    assert "6 pictures × 2 repeats = 12, / batch 2 = 6 steps an epoch; 6 steps = 1 epochs" in text
    assert "predicted" in text.lower() and "proof" in text
    assert json.loads((folder / "config.json").read_text())["rank"] == 4


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been(settings, tmp_path):
    whole = run.start(settings, tmp_path / "whole", **QUIET)
    stop = threading.Event()
    first = run.start(
        settings, tmp_path / "cut", stop=stop, listeners=[lambda s: stop.set() if s.number == 2 else None], **QUIET
    )
    assert (first.steps, first.lora, first.comparison) == (2, None, None)
    said = []
    second = run.start(settings, tmp_path / "cut", say=said.append, progress=False)
    assert any("at step 2" in line for line in said)
    assert (second.steps, len(second.losses)) == (6, 4)
    assert first.losses + second.losses == whole.losses
    assert [line["step"] for line in plots.read_log(tmp_path / "cut" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    a, b = (checkpoint.read(tmp_path / name / "checkpoints" / checkpoint.name(6)) for name in ("whole", "cut"))
    assert all((a.tensors[k] == b.tensors[k]).all() for k in a.tensors)


def test_a_second_run_in_one_process_starts_clean(settings, tmp_path):
    """Other trainers raised, or inherited the first run's targets."""
    plain = run.start(settings.with_(steps=2), tmp_path / "a", **QUIET)
    run.start(settings.with_(steps=2, targets="attention+conv", conv_rank=2, rank=8), tmp_path / "b", **QUIET)
    again = run.start(settings.with_(steps=2), tmp_path / "c", **QUIET)
    assert plain.losses == again.losses
    assert export.load(plain.lora).modules.keys() == export.load(again.lora).modules.keys()


def test_a_file_named_stop_ends_it(settings, tmp_path):
    folder = tmp_path / "out"
    result = run.start(settings, folder, listeners=[lambda step: (folder / "STOP").touch()], **QUIET)
    assert 1 <= result.steps <= 2
    assert run.start(settings, folder, **QUIET).steps == 6  # the file does not stop the next start


def test_other_settings_are_refused_with_both_values(settings, tmp_path, pictures):
    run.start(settings.with_(steps=2), tmp_path / "out", **QUIET)
    with pytest.raises(ValueError, match="rank was 4, is now 8.*steps was 2, is now 3"):
        run.start(settings.with_(rank=8, steps=3), tmp_path / "out", **QUIET)
    (pictures / "2_sks thing" / "0.txt").write_text("another caption")
    with pytest.raises(ValueError, match="dataset was"):
        run.start(settings.with_(steps=2), tmp_path / "out", **QUIET)


def test_what_does_not_decide_the_weights_may_change(settings, tmp_path):
    stop = threading.Event()
    stop.set()
    run.start(settings, tmp_path / "out", stop=stop, **QUIET)
    result = run.start(settings.with_(sample_prompts=("other",), save_every=2), tmp_path / "out", **QUIET)
    assert result.steps == 6


def test_a_folder_with_other_things_is_left_alone(settings, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files and no run"):
        run.start(settings, tmp_path / "precious", **QUIET)
    assert [p.name for p in (tmp_path / "precious").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="is a file"):
        run.start(settings, tmp_path / "precious" / "thesis.txt", **QUIET)


def test_a_wrong_dataset_or_base_is_told_before_anything_is_made(settings, tmp_path):
    for changes, kind in [
        ({"dataset": str(tmp_path / "none")}, FileNotFoundError),
        ({"base": "nope"}, FileNotFoundError),
    ]:
        with pytest.raises(kind):
            run.start(settings.with_(**changes), tmp_path / "out", **QUIET)
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="multiples of 8 pixels"):
        run.start(settings.with_(resolution=36, bucket_step=12), tmp_path / "out", **QUIET)


def test_a_failing_preview_never_ends_training(settings, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run.sample, "decode", broken)
    monkeypatch.setattr(run, "compare", lambda *a, **k: a[4])
    said = []
    result = run.start(settings, tmp_path / "out", say=said.append, progress=False)
    assert result.lora.exists()
    assert any("none at step 6: RuntimeError: out of memory" in line for line in said)


def test_an_error_in_the_loop_leaves_log_and_checkpoints(settings, tmp_path):
    def fail(step):
        if step.number == 4:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run.start(settings, tmp_path / "out", listeners=[fail], **QUIET)
    assert [line["step"] for line in plots.read_log(tmp_path / "out" / "log.jsonl")] == [1, 2, 3, 4]
    result = run.start(settings, tmp_path / "out", **QUIET)
    assert result.steps == 6
    assert [line["step"] for line in plots.read_log(tmp_path / "out" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_folder_tells_what_it_is(settings, tmp_path):
    run.start(settings, tmp_path / "out", **QUIET)
    facts = run.describe(tmp_path / "out")
    assert (facts["kind"], facts["steps"], facts["finished"]) == ("run", 6, "thing.safetensors")
    assert [c["intact"] for c in facts["checkpoints"]] == [True, True]
    with pytest.raises(FileNotFoundError):
        run.describe(tmp_path)


def test_no_path_of_the_machine_reaches_a_checkpoint_or_the_lora(settings, tmp_path):
    result = run.start(settings, tmp_path / "out", **QUIET)
    for file in [result.lora, *(tmp_path / "out" / "checkpoints").iterdir(), tmp_path / "out" / "log.jsonl"]:
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_a_run_that_diverges_goes_back_with_half_the_rate(settings, tmp_path, monkeypatch):
    """Steps 12 to 14 fail once; the run goes on from its checkpoint at step 9 and says so."""
    real, failed = train.batch_loss, []

    def fails_once(unet, base, alphas, item, config, adapter):
        value = real(unet, base, alphas, item, config, adapter)
        number = counter["step"] = counter["step"] + 1
        if 12 <= number <= 14 and not failed:
            failed.extend([number] * (number == 14))
            return value * float("nan")
        return value

    counter, said = {"step": 0}, []
    monkeypatch.setattr(train, "batch_loss", fails_once)
    result = run.start(settings.with_(steps=30), tmp_path / "run", say=said.append, progress=False)
    assert result.lora and result.steps == 30
    assert any(line.startswith("skipped   step 12") and ".png" in line for line in said)
    assert "back      3 steps in a row before step 21 were not finite. Going on from step 9 with 0.5 of" in "\n".join(
        said
    )
    log = {line["step"]: line for line in plots.read_log(tmp_path / "run" / "log.jsonl")}
    assert sorted(log) == list(range(1, 31))
    assert (log[9]["learning_rate"], log[10]["learning_rate"]) == (1e-3, 5e-4)
    assert not any("skipped" in line for line in log.values())  # of the way that was kept


def test_a_run_that_always_diverges_ends_with_advice(settings, tmp_path, monkeypatch):
    real = train.batch_loss
    monkeypatch.setattr(train, "batch_loss", lambda *args: real(*args) * float("inf"))
    with pytest.raises(FloatingPointError, match=r"halved 3 times, and it happened again. Start anew with a lower"):
        run.start(settings.with_(steps=30), tmp_path / "run", say=lambda _: None, progress=False)
