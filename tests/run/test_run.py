import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from said import QUIET, line, names, naming

from lorakit.adapter import proof, read, targets, write
from lorakit.adapter.algorithms import algorithm_of
from lorakit.base import model
from lorakit.console import Console
from lorakit.plan import cards, memory, planning
from lorakit.plan import store as stores
from lorakit.run import checkpoint, finish, preparation, run, run_folder
from lorakit.run.control import Control
from lorakit.run.run import Run
from lorakit.sample import denoise
from lorakit.storage import files
from lorakit.train import loop


def tensor_bytes(file):
    """What a safetensors file holds beside its header."""
    raw = file.read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[:8], "little")


def stopped_at(step, settings, folder):
    """A run that is stopped after a step."""
    control = Control()
    stop = lambda done: control.stop.set() if done.number == step else None  # noqa: E731
    return run.start(settings, folder, control=control, listeners=[stop], **QUIET)


def cut_back(folder, step):
    """Leave a finished run as if its process had ended after the checkpoint of this step."""
    for path in checkpoint.checkpoint_paths(folder / "checkpoints"):
        if checkpoint.step_of(path) > step:
            path.unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert checkpoint.newest(folder / "checkpoints").step == step


def steps_logged(folder):
    return [entry["step"] for entry in run_folder.read_log(folder / "log.jsonl")]


def predicted(size, **parts):
    """A made-up prediction, nothing by default: a true one takes a second for each new combination of settings."""
    return memory.StepCost(**dict.fromkeys(memory.StepCost.__dataclass_fields__, 0) | {"size": size} | parts)


@pytest.fixture
def unpredicted(monkeypatch):
    """Memory is not predicted: all seems to fit."""
    monkeypatch.setattr(stores, "step_cost", lambda *_, size, **__: predicted(size))


def test_a_run_goes_from_pictures_to_a_proven_file(finished):
    result, said = finished
    folder, settings = result.folder, result.config
    assert (result.steps, result.total, len(result.losses)) == (6, 6, 6)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [checkpoint.name(3), checkpoint.name(6)]
    assert steps_logged(folder) == [1, 2, 3, 4, 5, 6]
    assert result.comparison == folder / "comparison.png"
    for picture in ("loss.png", "comparison.png"):
        with Image.open(folder / picture) as opened:
            assert opened.width > 400
    assert len(list((folder / "samples" / "step-000006").glob("*.png"))) == 1
    facts = proof.describe_file(result.lora)
    assert facts["family"] == "sd15" and facts["trigger"] == "sks thing"
    how = {"size": (32, 32), "dtype": torch.float32, "device": "cpu", "store": stores.prediction_store()}
    prediction = stores.step_cost(model.open(settings.base), settings, **how)  # kept since the run made it
    assert prediction.file_size == tensor_bytes(result.lora)
    assert line(said, "length", 6, 2, 12, 1)  # pictures, repeats, an epoch's pictures, epochs
    assert line(said, memory.readable_bytes(prediction.peak))
    assert line(said, "proof", len(read.load(result.lora).modules))
    assert json.loads((folder / "config.json").read_text())["rank"] == 4


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been(settings, finished, tmp_path, request):
    whole, cut = finished[0], tmp_path / "cut"
    first = stopped_at(2, settings, cut)
    assert (first.steps, first.lora, first.comparison) == (2, None, None)
    request.getfixturevalue("weights_only")
    said, seen = [], []
    second = run.start(settings, cut, say=said.append, progress=False, listeners=[seen.append])
    assert line(said, "resume", 2, checkpoint.name(2))
    assert (second.steps, [step.number for step in seen]) == (6, [3, 4, 5, 6])
    assert len(first.losses) == 2 and first.losses + second.losses == whole.losses
    assert steps_logged(cut) == [1, 2, 3, 4, 5, 6]
    a, b = (checkpoint.read(folder / "checkpoints" / checkpoint.name(6)) for folder in (whole.folder, cut))
    assert all((a.tensors[k] == b.tensors[k]).all() for k in a.tensors)


@pytest.mark.no_cover
@pytest.mark.usefixtures("weights_only", "unpredicted")
def test_a_second_run_in_one_process_starts_clean(settings, finished, tmp_path):
    """Other trainers raised, or inherited the first run's targets."""
    plain, _ = finished
    run.start(settings.with_(steps=1, targets="attention+conv", conv_rank=2, rank=8), tmp_path / "b", **QUIET)
    again = run.start(settings, tmp_path / "c", **QUIET)
    assert plain.losses == again.losses
    assert read.load(plain.lora).modules.keys() == read.load(again.lora).modules.keys()


@pytest.mark.usefixtures("weights_only")
def test_a_file_named_stop_ends_it(settings, tmp_path):
    folder, settings = tmp_path / "out", settings.with_(steps=3)
    result = run.start(settings, folder, listeners=[lambda step: (folder / "STOP").touch()], **QUIET)
    assert 1 <= result.steps <= 2
    assert run.start(settings, folder, **QUIET).steps == 3  # the file does not stop the next start


@pytest.mark.usefixtures("unpredicted")
def test_other_settings_are_refused_with_both_values(settings, trained, pictures):
    folder = trained.folder
    with pytest.raises(ValueError, match=naming("rank", 4, 8, "steps", 6, 7)):
        run.start(settings.with_(rank=8, steps=7), folder, **QUIET)
    (pictures / "2_sks thing" / "0.txt").write_text("another caption")
    before = checkpoint.newest(folder / "checkpoints").settings["dataset"]
    with pytest.raises(ValueError, match=naming("dataset", before)):
        run.start(settings, folder, **QUIET)


@pytest.mark.usefixtures("weights_only")
def test_a_runs_base_is_its_weights_wherever_they_are(settings, trained, tmp_path):
    """By its name, another base of the same folder name was taken, and the same base under another name was not."""
    cut_back(trained.folder, 3)
    renamed = Path(shutil.copytree(settings.base, tmp_path / "renamed"))
    assert run.start(settings.with_(base=str(renamed)), trained.folder, **QUIET).steps == 6
    (file,) = (renamed / "unet").glob("*.safetensors")
    tensors = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=naming("base", "renamed", "renamed with other weights")):
        run.start(settings.with_(base=str(renamed)), trained.folder, **QUIET)


def test_a_folder_with_one_slash_is_no_hub_id(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(settings.base, tmp_path / "owner" / "mybase")
    assert model.open("owner/mybase").name == "mybase"


@pytest.mark.usefixtures("weights_only")
def test_a_run_from_before_a_setting_was_added_is_resumed(settings, trained):
    cut_back(trained.folder, 3)
    saved = checkpoint.newest(trained.folder / "checkpoints")
    before = {name: value for name, value in saved.settings.items() if name not in ("noise_offset", "tag_dropout")}
    assert len(before) == len(saved.settings) - 2
    checkpoint._write(replace(saved, settings=before))
    result = run.start(settings, trained.folder, **QUIET)
    assert (result.steps, len(result.losses)) == (6, 3)


@pytest.mark.usefixtures("weights_only")
def test_what_does_not_decide_the_weights_may_change(settings, trained):
    cut_back(trained.folder, 3)
    result = run.start(settings.with_(sample_prompts=("other",), save_every=2), trained.folder, **QUIET)
    assert (result.steps, len(result.losses)) == (6, 3)


def test_a_folder_with_other_things_is_left_alone(settings, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=naming("precious")):
        run.start(settings, tmp_path / "precious", **QUIET)
    assert [p.name for p in (tmp_path / "precious").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match=naming("thesis.txt")):
        run.start(settings, tmp_path / "precious" / "thesis.txt", **QUIET)


def test_a_wrong_dataset_or_base_is_told_before_anything_is_made(settings, tmp_path):
    for changes, kind in [
        ({"dataset": str(tmp_path / "none")}, FileNotFoundError),
        ({"base": "nope"}, FileNotFoundError),
    ]:
        with pytest.raises(kind):
            run.start(settings.with_(**changes), tmp_path / "out", **QUIET)
        assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == [".lock"]
    with pytest.raises(ValueError, match=naming(36, 12, 8)):
        run.start(settings.with_(resolution=36, bucket_step=12), tmp_path / "out", **QUIET)


def test_a_failing_preview_never_ends_training(settings, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(denoise, "decode_latents", broken)
    monkeypatch.setattr(finish, "draw_comparison", lambda *a, **k: a[4])
    said = []
    result = run.start(settings, tmp_path / "out", say=said.append, progress=False)
    assert result.lora.exists()
    assert line(said, "samples", 6, "RuntimeError: out of memory")


@pytest.mark.usefixtures("weights_only")
def test_an_error_in_the_loop_leaves_log_and_checkpoints(settings, tmp_path):
    def fail(step):
        if step.number == 4:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run.start(settings, tmp_path / "out", listeners=[fail], **QUIET)
    assert steps_logged(tmp_path / "out") == [1, 2, 3, 4]
    result = run.start(settings, tmp_path / "out", **QUIET)
    assert (result.steps, len(result.losses)) == (6, 2)
    assert steps_logged(tmp_path / "out") == [1, 2, 3, 4, 5, 6]


def test_a_folder_tells_what_it_is(finished, tmp_path):
    facts = run_folder.RunFolder(finished[0].folder).describe()
    assert (facts["kind"], facts["steps"], facts["finished"]) == ("run", 6, "thing.safetensors")
    assert [c["intact"] for c in facts["checkpoints"]] == [True, True]
    with pytest.raises(FileNotFoundError):
        run_folder.RunFolder(tmp_path).describe()


def test_no_path_of_the_machine_reaches_a_checkpoint_or_the_lora(finished, tmp_path_factory):
    result, root = finished[0], str(tmp_path_factory.getbasetemp())
    assert all(path.startswith(root) for path in (result.config.base, result.config.dataset, str(result.folder)))
    for file in [result.lora, *(result.folder / "checkpoints").iterdir(), result.folder / "log.jsonl"]:
        assert root.encode() not in file.read_bytes(), file.name


@pytest.mark.usefixtures("weights_only")
def test_a_run_that_diverges_goes_back_with_half_the_rate(settings, tmp_path, monkeypatch):
    """Steps 12 to 14 fail once; the run goes on from its checkpoint at step 9 and says so."""
    real, failed = loop.batch_loss, []

    def fails_once(unet, base, alphas, item, config, adapter):
        value = real(unet, base, alphas, item, config, adapter)
        number = counter["step"] = counter["step"] + 1
        if 12 <= number <= 14 and not failed:
            failed.extend([number] * (number == 14))
            return value * float("nan")
        return value

    counter, said = {"step": 0}, []
    monkeypatch.setattr(loop, "batch_loss", fails_once)
    result = run.start(settings.with_(steps=22), tmp_path / "run", say=said.append, progress=False)
    assert result.lora and result.steps == 22
    assert line(said, "skipped", 12, ".png")
    assert line(said, "back", 3, 21, 9, 0.5)  # steps in a row, before this one, back to, of the learning rate
    log = {entry["step"]: entry for entry in run_folder.read_log(tmp_path / "run" / "log.jsonl")}
    assert sorted(log) == list(range(1, 23))
    assert (log[9]["learning_rate"], log[10]["learning_rate"]) == (1e-3, 5e-4)
    assert not any("skipped" in entry for entry in log.values())  # of the way that was kept


def test_a_run_that_always_diverges_ends_with_advice(settings, tmp_path, monkeypatch):
    real, said = loop.batch_loss, []
    monkeypatch.setattr(loop, "batch_loss", lambda *args: real(*args) * float("inf"))
    monkeypatch.setattr(loop, "LOOK", 4)
    with pytest.raises(FloatingPointError, match=naming(3, "learning_rate", 0.001, "mixed_precision")):
        run.start(settings, tmp_path / "run", say=said.append, progress=False)
    assert all(line(said, "back", 3, 5, factor) for factor in (0.5, 0.25, 0.125))


# ── Memory that is not there ────────────────────────────────────────────────────────────────────────────────────────


def starved(monkeypatch, at: int, times: int = 1, message: str = "CUDA out of memory. Tried to allocate 2 GiB"):
    """Let the forward pass after `at` good ones run out of memory, as often as said."""
    whole, done, left = loop.batch_loss, [0], [times]

    def batch_loss(*arguments):
        if done[0] >= at and left[0]:
            left[0] -= 1
            raise torch.cuda.OutOfMemoryError(message)
        done[0] += 1
        return whole(*arguments)

    monkeypatch.setattr(loop, "batch_loss", batch_loss)


@pytest.mark.no_cover
@pytest.mark.usefixtures("weights_only", "unpredicted")
def test_out_of_memory_goes_on_with_less_from_the_last_step(settings, finished, tmp_path, monkeypatch):
    """Down the ladder a rung at a time: checkpointing, 8-bit moments, NF4, smaller batches; all steps done once."""
    uncut, _ = finished
    said, changes = [], ["gradient_checkpointing True", "optimizer adamw8bit", "quantize nf4", "micro_batch_size 1"]
    with monkeypatch.context() as patch:
        starved(patch, at=4, times=4)
        result = run.start(settings, tmp_path / "run", say=said.append, progress=False)
    short = [text for text in said if names(text, "memory", "CUDA out of memory")]
    assert len(short) == 4
    for text, change in zip(short, changes, strict=True):
        assert names(text, 4, *change.split())
    assert result.steps == 6 and len(result.losses) == 6 and result.lora.is_file()
    assert result.losses[:4] == uncut.losses[:4]
    assert result.losses[4:] == pytest.approx(uncut.losses[4:], rel=0.05)  # the same pictures; moments and base rounded
    assert steps_logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    # What it came down to stays: with the settings first asked for, the folder is still the same run.
    said.clear()
    again = run.start(settings, tmp_path / "run", say=said.append, progress=False)
    assert again.steps == 6 and again.config.micro_batch_size == 1
    assert line(said, "memory", "adamw8bit", "nf4", "micro_batch_size")


@pytest.mark.usefixtures("weights_only", "unpredicted")
def test_memory_that_is_short_again_and_again_ends_at_the_last_rung(settings, tmp_path, monkeypatch):
    rungs = planning.ladder(settings)
    assert [rung.resolution for rung in rungs[-2:]] == [32, 32] and len(rungs) == 5  # 32 px is the least
    with monkeypatch.context() as patch:
        starved(patch, at=1, times=99, message="DefaultCPUAllocator: can't allocate memory")
        with pytest.raises(torch.cuda.OutOfMemoryError, match="can't allocate memory"):
            run.start(settings, tmp_path / "run", **QUIET)
    said = []
    assert run.start(settings, tmp_path / "run", say=said.append, progress=False).config == rungs[-1]
    assert line(said, "resume", 1)


@pytest.mark.usefixtures("weights_only", "unpredicted")
def test_memory_may_be_short_while_the_base_is_loaded(settings, tmp_path, monkeypatch):
    whole, errors = model.load_unet, [MemoryError(), RuntimeError("CUDA error: out of memory")]

    def load_unet(*arguments):
        if errors:
            raise errors.pop(0)
        return whole(*arguments)

    monkeypatch.setattr(model, "load_unet", load_unet)
    said = []
    result = run.start(settings.with_(steps=2), tmp_path / "run", say=said.append, progress=False)
    assert result.steps == len(result.losses) == 2  # from the beginning
    assert result.config == planning.ladder(settings.with_(steps=2))[2]
    assert line(said, "memory", "MemoryError", "gradient_checkpointing", True)
    assert line(said, "memory", "CUDA error", "optimizer", "adamw8bit")


@pytest.mark.no_cover
@pytest.mark.usefixtures("weights_only", "unpredicted")
def test_checkpointing_alone_changes_nothing_that_is_learned(settings, finished, tmp_path, monkeypatch):
    starved(monkeypatch, at=2)
    result = run.start(settings, tmp_path / "run", **QUIET)
    assert result.config.gradient_checkpointing
    assert result.losses == pytest.approx(finished[0].losses, rel=1e-6)


@pytest.mark.usefixtures("weights_only", "unpredicted")
def test_out_of_memory_in_the_midst_of_an_update_goes_back_to_a_checkpoint(settings, tmp_path, monkeypatch):
    update, calls = loop._update, []

    def starve(state, *rest):
        calls.append(state.step)
        if calls == [0, 1, 2, 3, 4]:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return update(state, *rest)

    monkeypatch.setattr(loop, "_update", starve)
    said = []
    result = run.start(settings, tmp_path / "run", say=said.append, progress=False)
    assert calls == [0, 1, 2, 3, 4, 3, 4, 5]  # saved every 3 steps
    assert line(said, "memory", 3, "gradient_checkpointing", True)
    assert result.steps == 6 and len(result.losses) == 6


def test_memory_may_be_told_to_be_as_it_is(settings, tmp_path, monkeypatch):
    starved(monkeypatch, at=1)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="2 GiB"):
        run.start(settings.with_(fit_memory=False), tmp_path / "run", **QUIET)


def test_what_is_predicted_not_to_fit_comes_down_before_it_starts(settings, tmp_path, monkeypatch):
    def predict(base, config, *, size, **_):
        return predicted(size, activations=2 * 2**20 if config.gradient_checkpointing else 3 * 2**20)

    def prepare_with(free):
        monkeypatch.setattr(cards, "free_memory_bytes", lambda device: free)
        return preparation.prepare(settings, tmp_path, Console(said.append, False)).config

    said = []
    monkeypatch.setattr(stores, "step_cost", predict)
    enough = int(2 * 2**20 / (1 - planning.MARGIN)) + 1000
    for free in (None, 10**9, 1):  # not known, all of it, and so little that nothing helps
        assert prepare_with(free) == settings
    assert not line(said, "gradient_checkpointing", True)
    assert prepare_with(enough) == settings.with_(gradient_checkpointing=True)
    assert line(said, "memory", "3.0 MiB", "gradient_checkpointing", True)


# ── Where it begins, and what is held out by name ───────────────────────────────────────────────────────────────────


@pytest.mark.no_cover
@pytest.mark.usefixtures("weights_only", "unpredicted")
@pytest.mark.parametrize("algorithm", ["dora", "loha", "lokr"])
def test_every_algorithm_trains_resumes_and_is_proven(settings, tmp_path, algorithm):
    settings = settings.with_(algorithm=algorithm, targets="attention+conv", steps=3, save_every=2)
    whole = run.start(settings, tmp_path / "run", **QUIET)
    ours = read.load(whole.lora)
    cut_back(whole.folder, 2)
    again = run.start(settings, whole.folder, **QUIET)
    assert again.losses == whole.losses[2:]
    theirs = read.load(again.lora)
    assert ours.algorithm == algorithm and ours.modules.keys() == theirs.modules.keys()
    for module, parts in ours.parts.items():
        assert all(torch.equal(tensor, theirs.parts[module][part]) for part, tensor in parts.items())


@pytest.mark.no_cover
@pytest.mark.usefixtures("weights_only", "unpredicted")
def test_a_run_may_begin_from_a_file(settings, finished, tmp_path):
    """What the file does is what the run starts with, whatever its alpha; going on needs the file's contents."""
    first, _ = finished
    more = settings.with_(start_from=str(first.lora), alpha=4, learning_rate=1e-12, steps=1, weight_decay=0)
    second = run.start(more, tmp_path / "second", **QUIET)
    for ours, theirs in zip(*(read.load(result.lora).modules.values() for result in (second, first)), strict=True):
        mine, before = (algorithm_of(module[0]).delta(*module) for module in (ours, theirs))
        assert torch.allclose(mine, before, atol=1e-3 * float(before.abs().max()))
    assert str(first.folder.parent) not in json.dumps(checkpoint.newest(tmp_path / "second" / "checkpoints").settings)
    assert run.start(more, tmp_path / "second", **QUIET).steps == 1
    other = write.save(run_folder.lora_of(first.folder, 3), tmp_path / "other.safetensors")
    digests = [files.sha256(file)[:16] for file in (first.lora, other)]
    with pytest.raises(ValueError, match=naming("second", "start_from", *digests)):
        run.start(more.with_(start_from=str(other)), tmp_path / "second", **QUIET)
    with pytest.raises(ValueError, match=naming("thing.safetensors", 4, 8, len(read.load(first.lora).modules))):
        run.start(more.with_(rank=8), tmp_path / "third", **QUIET)
    with pytest.raises(FileNotFoundError, match=naming("start_from", "nowhere.safetensors")):
        run.start(more.with_(start_from="nowhere.safetensors"), tmp_path / "fourth", **QUIET)


def test_pictures_are_held_out_by_name(settings, tmp_path):
    ready = preparation.prepare(settings.with_(validation_pictures=("0.png", "3")), tmp_path, Console.quiet())
    assert ready.names == ["1.png", "2.png", "4.png", "5.png"] and len(ready.held_out) == 2
    with pytest.raises(ValueError, match=naming("validation_pictures", 9)):
        preparation.prepare(settings.with_(validation_pictures=("9",)), tmp_path, Console.quiet())
    with pytest.raises(ValueError, match=naming("validation_pictures")):  # nothing is left to train on
        preparation.prepare(settings.with_(validation_pictures=tuple("012345")), tmp_path, Console.quiet())


@pytest.mark.no_cover
@pytest.mark.usefixtures("weights_only")
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
    settings = settings.with_(base=str(small_bases[family]), steps=3, save_every=2, **changes)
    live, said, folder = Control(), [], tmp_path / "run"
    whole = run.start(settings, folder, say=said.append, progress=False, control=live)
    first, last = load_file(whole.lora), folder / "checkpoints" / checkpoint.name(3)
    lora, base, a = read.load(whole.lora), model.open(settings.base), checkpoint.read(last)
    trained = settings.text_rates(base.text_encoders)
    assert set(lora.adapts) == {*trained, *(["unet"] if settings.train_unet else [])}
    learned = {module for module, (parts, _) in lora.modules.items() if parts["up"].any()}
    for which in lora.adapts:  # of each model some layer; of the encoders all that the embeddings come from
        assert any(targets.model_of(module) == which for module in learned)
    assert lora.metadata["ss_text_encoder_lr"] == str(list(trained.values()))
    assert lora.metadata["ss_unet_lr"] == ("0.001" if settings.train_unet else "None")
    assert trained and all(line(said, "text", which, f"{rate:g}") for which, rate in trained.items())
    assert live.prepared.prediction.file_size == tensor_bytes(whole.lora)
    cut_back(folder, 2)
    again = run.start(settings, folder, **QUIET)
    second, b = load_file(again.lora), checkpoint.read(last)
    assert len(again.losses) == 1
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_a_rate_for_a_text_encoder_that_is_not_there(settings, tmp_path):
    with pytest.raises(ValueError, match=naming("text_encoder_2_rate")):
        run.start(settings.with_(text_encoder_2_rate=1e-4), tmp_path / "out", **QUIET)


@pytest.mark.usefixtures("weights_only")
def test_the_log_is_on_disk_before_a_checkpoint_is(settings, tmp_path, monkeypatch):
    whole, counts, file = checkpoint.save, [], tmp_path / "run" / "log.jsonl"

    def save(*arguments, **more):
        counts.append(len(run_folder.read_log(file)))
        return whole(*arguments, **more)

    monkeypatch.setattr(checkpoint, "save", save)
    run.start(settings.with_(steps=3, validation_share=0.2, validate_every=3), tmp_path / "run", **QUIET)
    assert counts == [3]
    assert "validation_loss" in run_folder.read_log(file)[2]


@pytest.mark.usefixtures("weights_only", "unpredicted")
def test_a_resumed_run_comes_down_by_its_own_rungs(settings, tmp_path, monkeypatch):
    settings = settings.with_(steps=3)
    rungs, asked = planning.ladder(settings), []
    with monkeypatch.context() as patch:
        starved(patch, at=1, times=1)
        stopped_at(2, settings, tmp_path / "run")
    whole = preparation.prepare
    monkeypatch.setattr(
        preparation, "prepare", lambda *a, rungs=(), **k: (asked.append(rungs), whole(*a, rungs=rungs, **k))[1]
    )
    run.start(settings, tmp_path / "run", **QUIET)
    assert asked == [(), rungs[1:]]


# ── A run as an object ──────────────────────────────────────────────────────────────────────────────────────────────


def checkpoints(folder: Path) -> list[int]:
    return sorted(run_folder.RunFolder(folder).saved())


def test_leaving_a_loop_saves_and_another_loop_ends_as_if_it_had_not_been_left(settings, finished, tmp_path):
    training, numbers = Run(settings, tmp_path / "run", console=Console.quiet()), []
    for step in training:
        numbers.append(step.number)
        if step.number == 2:
            break
    assert checkpoints(tmp_path / "run") == [2] and training.result is None
    assert not [thread for thread in threading.enumerate() if thread.name == "lorakit-backup"]
    training.export(tmp_path / "two.safetensors")  # the folder is free
    numbers += [step.number for step in training]
    assert numbers == [1, 2, 3, 4, 5, 6] and training.result.steps == 6
    assert training.result.comparison == tmp_path / "run" / "comparison.png" and not training.result.missing
    whole, parts = load_file(finished[0].lora), load_file(training.result.lora)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.usefixtures("weights_only")
def test_a_loop_that_an_error_ended_is_saved_before_the_next_begins(settings, tmp_path):
    training = Run(settings, tmp_path / "run", console=Console.quiet())
    with pytest.raises(ZeroDivisionError) as raised:  # its traceback keeps the loop alive
        for step in training:
            1 / (step.number - 2)
    assert [step.number for step in training] == [3, 4, 5, 6] and raised.value


@pytest.mark.usefixtures("weights_only")
def test_a_stopped_loop_is_resumed_by_the_next(settings, tmp_path):
    training = Run(settings.with_(backup=str(tmp_path)), tmp_path / "run", console=Console.quiet())
    first = [(training.stop(), step.number)[1] for step in training]
    assert first == [1] and training.result.steps == 1 and "step 1" in str(training)
    assert [step.number for step in training] == [2, 3, 4, 5, 6] and "thing.safetensors" in str(training)
    assert not [thread for thread in threading.enumerate() if thread.name == "lorakit-backup"]
