import json
import os
import threading

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import cache, checkpoint, export, memory, plan, plots, prepare, record, run, train
from lorakit.live import Live


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
        settings,
        tmp_path / "cut",
        live=Live(stop),
        listeners=[lambda s: stop.set() if s.number == 2 else None],
        **QUIET,
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


@pytest.mark.no_cover
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
    live = Live()
    run.start(settings, tmp_path / "out", live=live, listeners=[lambda _: live.stop.set()], **QUIET)
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
        assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == [".lock"]
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
    facts = record.describe(tmp_path / "out")
    assert (facts["kind"], facts["steps"], facts["finished"]) == ("run", 6, "thing.safetensors")
    assert [c["intact"] for c in facts["checkpoints"]] == [True, True]
    with pytest.raises(FileNotFoundError):
        record.describe(tmp_path)


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


# ── Memory that is not there ────────────────────────────────────────────────────────────────────────────────────────


def starved(monkeypatch, at: int, times: int = 1, message: str = "CUDA out of memory. Tried to allocate 2 GiB"):
    """Let the forward pass after `at` good ones run out of memory, as often as said."""
    whole, done, left = train.batch_loss, [0], [times]

    def batch_loss(*arguments):
        if done[0] >= at and left[0]:
            left[0] -= 1
            raise torch.cuda.OutOfMemoryError(message)
        done[0] += 1
        return whole(*arguments)

    monkeypatch.setattr(train, "batch_loss", batch_loss)


@pytest.mark.no_cover
def test_out_of_memory_goes_on_with_less_from_the_last_step(settings, tmp_path, monkeypatch):
    """Down the ladder a rung at a time: checkpointing, 8-bit moments, NF4, smaller batches; all steps done once."""
    uncut = run.start(settings, tmp_path / "uncut", say=lambda _: None, progress=False)
    starved(monkeypatch, at=4, times=4)
    said = []
    result = run.start(settings, tmp_path / "run", say=said.append, progress=False)
    begins = "memory    none left (CUDA out of memory). Going on from step 4 with "
    assert [line.removeprefix(begins) for line in said if "none left" in line] == [
        "gradient_checkpointing True.",
        "optimizer adamw8bit.",
        "quantize nf4.",
        "micro_batch_size 1.",
    ]
    assert result.steps == 6 and len(result.losses) == 6 and result.lora.is_file()
    assert result.losses[:4] == uncut.losses[:4]
    assert result.losses[4:] == pytest.approx(uncut.losses[4:], rel=0.05)  # the same pictures; moments and base rounded
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    # What it came down to stays: with the settings first asked for, the folder is still the same run.
    monkeypatch.undo()
    said.clear()
    again = run.start(settings, tmp_path / "run", say=said.append, progress=False)
    assert again.steps == 6 and again.config.micro_batch_size == 1
    assert any("goes on with" in line and "adamw8bit" in line for line in said)


def test_memory_that_is_short_again_and_again_ends_at_the_last_rung(settings, tmp_path, monkeypatch):
    rungs = plan.ladder(settings)
    assert [rung.resolution for rung in rungs[-2:]] == [32, 32] and len(rungs) == 5  # 32 px is the least
    starved(monkeypatch, at=1, times=99)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run.start(settings, tmp_path / "run", say=lambda _: None, progress=False)
    monkeypatch.undo()
    said = []
    assert run.start(settings, tmp_path / "run", say=said.append, progress=False).config == rungs[-1]
    assert any("resume    at step 1" in line for line in said)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory")])
def test_memory_may_be_short_while_the_base_is_loaded(settings, tmp_path, monkeypatch, error):
    whole, calls = bases.load_unet, []

    def load_unet(*arguments):
        calls.append(arguments[3])
        if len(calls) == 1:
            raise error
        return whole(*arguments)

    monkeypatch.setattr(bases, "load_unet", load_unet)
    said = []
    result = run.start(settings, tmp_path / "run", say=said.append, progress=False)
    assert result.steps == 6 and result.config.gradient_checkpointing
    assert any("Going on from the beginning with gradient_checkpointing True" in line for line in said)


def test_a_run_begun_before_a_setting_was_known_goes_on(settings, tmp_path):
    stop = threading.Event()
    run.start(settings, tmp_path / "run", live=Live(stop), listeners=[lambda s: stop.set() if s.number == 2 else None],
              **QUIET)  # fmt: skip
    path = tmp_path / "run" / "checkpoints" / checkpoint.name(2)
    with safe_open(path, "pt") as file:
        facts, tensors = json.loads(file.metadata()["lorakit"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name in ("text_encoder_rate", "micro_batch_size", "algorithm"):
        del facts["settings"][name]
    save_file(tensors, path, {"lorakit": json.dumps(facts, sort_keys=True), "digest": cache.digest(tensors, facts)})
    said = []
    assert run.start(settings, tmp_path / "run", say=said.append, progress=False).steps == 6
    assert any("resume    at step 2" in line for line in said)


@pytest.mark.no_cover
def test_checkpointing_alone_changes_nothing_that_is_learned(settings, tmp_path, monkeypatch):
    uncut = run.start(settings, tmp_path / "uncut", say=lambda _: None, progress=False)
    starved(monkeypatch, at=2)
    result = run.start(settings, tmp_path / "run", say=lambda _: None, progress=False)
    assert result.config.gradient_checkpointing
    assert result.losses == pytest.approx(uncut.losses, rel=1e-6)


def test_out_of_memory_in_the_midst_of_an_update_goes_back_to_a_checkpoint(settings, tmp_path, monkeypatch):
    update, calls = train._update, []

    def starve(state, *rest):
        calls.append(state.step)
        if calls == [0, 1, 2, 3, 4]:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return update(state, *rest)

    monkeypatch.setattr(train, "_update", starve)
    said = []
    result = run.start(settings, tmp_path / "run", say=said.append, progress=False)
    assert calls == [0, 1, 2, 3, 4, 3, 4, 5]  # saved every 3 steps
    assert any("Going on from step 3 with gradient_checkpointing True" in line for line in said)
    assert result.steps == 6 and len(result.losses) == 6


def test_memory_may_be_told_to_be_as_it_is(settings, tmp_path, monkeypatch):
    starved(monkeypatch, at=1)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="2 GiB"):
        run.start(settings.with_(fit_memory=False), tmp_path / "run", say=lambda _: None, progress=False)


def test_nothing_left_to_give_up_is_an_error(settings, tmp_path, monkeypatch):
    starved(monkeypatch, at=1, times=99, message="DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run.start(settings, tmp_path / "run", say=lambda _: None, progress=False)


def test_what_is_predicted_not_to_fit_comes_down_before_it_starts(settings, tmp_path, monkeypatch):
    said = []
    whole = prepare.run(settings, tmp_path / "a", say=said.append, progress=False)
    assert whole.config == settings
    asked = next(line for line in said if "peak" in line)
    for free, expected in ((10**9, {}), (1, {})):  # all of it, and so little that nothing helps
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        assert prepare.run(settings, tmp_path / "b", say=said.append, progress=False).config == settings.with_(
            **expected
        )
    predict = run.plan.predict
    peaks = {}

    def remember(base, config, **rest):
        peaks[config.gradient_checkpointing, config.optimizer] = predict(base, config, **rest).peak
        return predict(base, config, **rest)

    monkeypatch.setattr(run.plan, "predict", remember)
    prepare.run(settings, tmp_path / "c", say=said.append, progress=False)
    enough = int(peaks[True, "adamw"] / (1 - memory.MARGIN)) + 1000
    assert peaks[True, "adamw"] < peaks[False, "adamw"]
    monkeypatch.setattr(memory, "available", lambda device: enough)
    said.clear()
    down = prepare.run(settings, tmp_path / "d", say=said.append, progress=False)
    assert down.config == settings.with_(gradient_checkpointing=True)
    assert any("which does not fit. Comes down to gradient_checkpointing True" in line for line in said), asked


# ── Where it begins, and what is held out by name ───────────────────────────────────────────────────────────────────


@pytest.mark.no_cover
@pytest.mark.parametrize("algorithm", ["dora", "loha", "lokr"])
def test_every_algorithm_trains_resumes_and_is_proven(settings, tmp_path, algorithm):
    settings = settings.with_(algorithm=algorithm, targets="attention+conv", steps=4, save_every=2)
    whole = run.start(settings, tmp_path / "whole", **QUIET)
    stop = threading.Event()
    part = run.start(
        settings, tmp_path / "cut", live=Live(stop), listeners=[lambda s: s.number == 2 and stop.set()], **QUIET
    )
    assert part.lora is None and part.steps == 2
    again = run.start(settings, tmp_path / "cut", **QUIET)
    ours, theirs = (export.load(result.lora) for result in (whole, again))
    assert ours.algorithm == algorithm and ours.modules.keys() == theirs.modules.keys()
    for module, parts in ours.parts.items():
        assert all(torch.equal(tensor, theirs.parts[module][part]) for part, tensor in parts.items())


@pytest.mark.no_cover
def test_a_run_may_begin_from_a_file(settings, tmp_path):
    """What the file does is what the run starts with, whatever its alpha; going on needs the file's contents."""
    first = run.start(settings, tmp_path / "first", **QUIET)
    more = settings.with_(start_from=str(first.lora), alpha=4, learning_rate=1e-12, steps=1, weight_decay=0)
    second = run.start(more, tmp_path / "second", **QUIET)
    base = bases.open(settings.base)
    for ours, theirs in zip(*(export.load(result.lora).modules.values() for result in (second, first)), strict=True):
        mine, before = (adapters.change(*module) for module in (ours, theirs))
        assert torch.allclose(mine, before, atol=1e-3 * float(before.abs().max()))
    assert str(tmp_path) not in json.dumps(checkpoint.newest(tmp_path / "second" / "checkpoints").settings)
    assert run.start(more, tmp_path / "second", **QUIET).steps == 1
    other = run.start(settings.with_(seed=1), tmp_path / "other", **QUIET)
    with pytest.raises(ValueError, match="second was begun with other settings: start_from"):
        run.start(more.with_(start_from=str(other.lora)), tmp_path / "second", **QUIET)
    with pytest.raises(
        ValueError, match=r"thing.safetensors has \d+ modules of ranks \[4\].*ask for \d+ of ranks \[8\]"
    ):
        run.start(more.with_(rank=8), tmp_path / "third", **QUIET)
    with pytest.raises(FileNotFoundError, match="there is no file nowhere.safetensors"):
        run.start(more.with_(start_from="nowhere.safetensors"), tmp_path / "fourth", **QUIET)
    assert base.family == "sd15"


def test_pictures_are_held_out_by_name(settings, tmp_path):
    ready = prepare.run(settings.with_(validation_pictures=("0.png", "3")), tmp_path, **QUIET)
    assert ready.names == ["1.png", "2.png", "4.png", "5.png"] and len(ready.held_out) == 2
    with pytest.raises(ValueError, match="pictures holds no picture '9'"):
        prepare.run(settings.with_(validation_pictures=("9",)), tmp_path, **QUIET)
    with pytest.raises(ValueError, match="none is left to train on"):
        prepare.run(settings.with_(validation_pictures=tuple("012345")), tmp_path, **QUIET)


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "family, changes",
    [
        ("sd15", {"text_encoder_rate": 5e-4, "clip_skip": 2, "ema_decay": 0.9, "caption_dropout": 0.3}),
        ("sd15", {"text_encoder_rate": 5e-4, "train_unet": False, "validation_share": 0.2, "validate_every": 3}),
        ("sdxl", {"text_encoder_rate": 5e-4, "text_encoder_2_rate": 1e-3, "algorithm": "dora"}),
        ("sdxl", {"text_encoder_rate": 5e-4, "text_encoder_2_rate": 0.0}),
        ("sdxl", {"text_encoder_2_rate": 1e-3, "prior_prediction": True, "class_word": "thing"}),
    ],
)
def test_text_encoders_are_trained_resumed_and_exported(settings, small_bases, tmp_path, family, changes):
    settings = settings.with_(base=str(small_bases[family]), **changes)
    said = []
    whole = run.start(settings, tmp_path / "whole", say=said.append, progress=False)
    stop = threading.Event()
    run.start(settings, tmp_path / "cut", live=Live(stop), listeners=[lambda s: stop.set() if s.number == 2 else None],
              **QUIET)  # fmt: skip
    again = run.start(settings, tmp_path / "cut", **QUIET)
    first, second = load_file(whole.lora), load_file(again.lora)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    a, b = (checkpoint.read(tmp_path / name / "checkpoints" / checkpoint.name(6)) for name in ("whole", "cut"))
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
    lora, base = export.load(whole.lora), bases.open(settings.base)
    trained = settings.text_rates(base.text_encoders)
    assert set(lora.adapts) == {*trained, *(["unet"] if settings.train_unet else [])}
    learned = {module for module, (parts, _) in lora.modules.items() if parts["up"].any()}
    for which in lora.adapts:  # of each model some layer; of the encoders all that the embeddings come from
        assert any(adapters.which(module) == which for module in learned)
    assert lora.metadata["ss_text_encoder_lr"] == str(list(trained.values()))
    assert lora.metadata["ss_unet_lr"] == ("0.001" if settings.train_unet else "None")
    assert any(line.startswith("text  ") and "trained too" in line for line in said)
    predicted = memory.predict(base, settings, size=(32, 32), dtype=torch.float32).file_size
    assert predicted == tensor_bytes(whole.lora)


def test_a_rate_for_a_text_encoder_that_is_not_there(settings, tmp_path):
    with pytest.raises(ValueError, match="this base has one text encoder"):
        run.start(settings.with_(text_encoder_2_rate=1e-4), tmp_path / "out", **QUIET)


def test_the_log_is_on_disk_before_a_checkpoint_is(settings, tmp_path, monkeypatch):
    whole, lines = checkpoint.save, []

    def save(*arguments, **more):
        lines.append(len(plots.read_log(tmp_path / "run" / "log.jsonl")))
        return whole(*arguments, **more)

    monkeypatch.setattr(checkpoint, "save", save)
    run.start(settings.with_(validation_share=0.2, validate_every=3), tmp_path / "run", **QUIET)
    assert lines[0] == 3
    assert "validation_loss" in plots.read_log(tmp_path / "run" / "log.jsonl")[2]


def test_a_resumed_run_comes_down_by_its_own_rungs(settings, tmp_path, monkeypatch):
    settings = settings.with_(steps=4)
    rungs, asked = plan.ladder(settings), []
    starved(monkeypatch, at=1, times=1)
    stop = threading.Event()
    run.start(settings, tmp_path / "run", live=Live(stop), listeners=[lambda s: stop.set() if s.number == 2 else None],
              **QUIET)  # fmt: skip
    monkeypatch.undo()
    whole = prepare.run
    monkeypatch.setattr(prepare, "run", lambda *a, rungs=(), **k: (asked.append(rungs), whole(*a, rungs=rungs, **k))[1])
    run.start(settings, tmp_path / "run", **QUIET)
    assert asked == [(), rungs[1:]]
