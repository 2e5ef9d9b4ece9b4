"""Comparing and exporting: the panel asked as a kernel asks it, and clicked in a browser."""

import base64
import io
import json
import os
import re
import shutil
import threading
from pathlib import Path

import browser
import colab
import ipywidgets as widgets
import numpy as np
import pictures as pictures_of
import pytest
import torch
from panels import tone, words
from PIL import Image
from safetensors.torch import load_file
from said import QUIET, line, names, naming

from lorakit import page
from lorakit.adapter import attachment, merging, proof, write
from lorakit.adapter.lora import FAMILIES
from lorakit.base import model
from lorakit.config import Config
from lorakit.console import Console
from lorakit.evaluate import candidates, variants
from lorakit.plots import TONES
from lorakit.run import checkpoint, finish, run_folder
from lorakit.run import run as run_module
from lorakit.run.run import Run
from lorakit.sample import Sampling
from lorakit.sample import sampler as sampler_module
from lorakit.storage import backup
from lorakit.widgets import compare
from lorakit.widgets.compare import Compare

BARE = (None, 0.0)


@pytest.fixture(scope="module")
def trained(small_bases, tmp_path_factory) -> Path:
    """A run of six steps with three checkpoints, the middle one with the lowest validation loss."""
    pictures = tmp_path_factory.mktemp("compare") / "pictures" / "2_thing"
    pictures.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("sks thing")
    config = Config(
        base=str(small_bases["sd15"]), dataset=str(pictures.parent), name="thing", trigger="sks thing", resolution=32,
        bucket_step=8, rank=4, alpha=2, batch_size=2, steps=6, learning_rate=3e-2, save_every=2, sample_every=100,
        sample_prompts=("sks thing", "a house", "more"), sample_steps=2, device="cpu", mixed_precision="no",
    )  # fmt: skip
    folder = pictures.parents[1] / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "draw_comparison", lambda *_, **__: None)
        run_module.start(config, folder, **QUIET)
    log, losses = (
        [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()],
        {2: 0.3, 4: 0.1, 6: 0.1},
    )
    log = [row | ({"validation_loss": losses[row["step"]]} if row["step"] in losses else {}) for row in log]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def panel(folder, tmp_path, monkeypatch) -> Compare:
    monkeypatch.chdir(tmp_path)
    return Compare(folder, strengths=(0, 0.5, 1), prompts=("sks thing", "a house"))


def at(trained: Path, step: int) -> Path:
    return trained / "checkpoints" / checkpoint.name(step)


# ── The room ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_runs_checkpoints_are_candidates_and_the_best_is_known(folder):
    found = candidates.find_candidates(folder)
    assert list(found.paths) == ["step 2", "step 4", "step 6"] and found.best == "step 4"
    assert found.first == ["step 4", "step 6"] and found.problems == () and found.config.name == "thing"
    assert candidates.starting_point(found) == (found.config.base, ["sks thing", "a house"])
    at(folder, 4).write_bytes(at(folder, 4).read_bytes()[:100])
    (folder / "config.json").write_text("{")
    found = candidates.find_candidates(folder)
    assert list(found.paths) == ["step 2", "step 6"] and found.config is None and len(found.problems) == 2
    assert names(found.problems[0], "config.json") and names(found.problems[1], "step-000004.safetensors")


def test_files_and_folders_of_files_are_candidates(folder, tmp_path):
    lora = run_folder.lora_of(folder, 6)
    for name in ("a/one", "b/one", "b/two"):
        write.save(lora, tmp_path / f"{name}.safetensors")
    write.save(lora, tmp_path / "peft", layout="peft")
    one, both = tmp_path / "a" / "one.safetensors", tmp_path / "b"
    assert list(candidates.find_candidates(one).paths) == ["one"]
    assert list(candidates.find_candidates([one, both, tmp_path / "peft"]).paths) == ["a/one", "b/one", "two", "peft"]
    assert list(candidates.find_candidates([folder, one]).paths) == ["run step 2", "run step 4", "run step 6", "one"]
    with pytest.raises(FileNotFoundError, match=naming("nowhere")):
        candidates.find_candidates(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=naming("empty", ".safetensors")):
        candidates.find_candidates(tmp_path / "empty")
    assert candidates.find_candidates(at(folder, 4)).config.name == "thing"  # its run's
    for name in ("a/rank=4", "b/rank=4", "sweep/rank=16", "sweep/rank=8"):
        shutil.copytree(folder, tmp_path / name)
    both = candidates.find_candidates([tmp_path / "a" / "rank=4", tmp_path / "b" / "rank=4"])
    assert [label for label in both.paths if "step 6" in label] == ["a/rank=4 step 6", "b/rank=4 step 6"]
    shutil.copytree(folder, tmp_path / "b" / "run")  # beside files, a run is not what was asked for
    assert list(candidates.find_candidates(tmp_path / "b").paths) == ["one", "two"]
    alone = [tmp_path / "sweep" / run / "checkpoints" / checkpoint.name(4) for run in ("rank=8", "rank=16")]
    assert list(candidates.find_candidates(alone).paths) == ["rank=8/step-000004", "rank=16/step-000004"]
    swept = candidates.find_candidates(tmp_path / "sweep")
    assert list(swept.paths)[::3] == ["rank=8 step 2", "rank=16 step 2"] and len(swept.paths) == 6
    shutil.rmtree(tmp_path / "a" / "rank=4" / "checkpoints")
    assert list(candidates.find_candidates(tmp_path / "a" / "rank=4").paths) == ["thing"]  # the finished file is left
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=naming("new")):
        candidates.find_candidates(tmp_path / "new")


def test_the_base_is_the_one_that_a_file_names(folder, tmp_path):
    lora = run_folder.lora_of(folder, 6)
    for name, base in (("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"), ("lorakit/demo", "demo")):
        metadata = lora.metadata | {"ss_sd_model_name": name}
        path = write.save(type(lora)(**vars(lora) | {"metadata": metadata}), tmp_path / "x.safetensors")
        assert candidates.starting_point(candidates.find_candidates(path)) == (base, ["sks thing"])
    path.write_bytes(b"PK")
    assert candidates.starting_point(candidates.find_candidates(path)) == ("", [])


def test_columns_hold_strength_zero_once():
    assert variants.columns(["a", "b"], [0.5, 0, 1, 0.5]) == [BARE, ("a", 0.5), ("a", 1), ("b", 0.5), ("b", 1)]


def test_others_keep_their_own_strength_at_every_strength_of_the_candidate(folder, small_bases):
    """And at strength 0 they alone are left."""
    base, paths = model.open(small_bases["sd15"]), {"step 2": at(folder, 2)}
    other = at(folder, 6)
    columns = variants.columns(["step 2"], [0, 0.5])
    found = variants.make_variants(base, columns, paths, [(other, 0.8)])
    plain = {"steps": 2, "device": "cpu", "precision": "no"}
    made = [placed.picture for placed in pictures_of.stream(base, ["sks thing"], list(found.values()), **plain)]
    whole = merging.merge([run_folder.lora_of(paths["step 2"]), run_folder.lora_of(other)], [0.5, 0.8]).lora
    expected = [
        pictures_of.rows(
            base, ["sks thing"], attach=lambda models, lora=lora: attachment.attach(models, base, lora), strengths=[by],
            **plain,
        )[0][0]
        for lora, by in ((run_folder.lora_of(other), 0.8), (whole, 1.0))
    ]  # fmt: skip
    assert [picture.tobytes() for picture in made] == [picture.tobytes() for picture in expected]
    assert made[0].tobytes() != made[1].tobytes()


def test_strengths_of_one_candidate_share_its_adapter(folder, small_bases):
    base = model.open(small_bases["sd15"])
    paths = {"a": at(folder, 2), "b": at(folder, 4)}
    found = variants.make_variants(base, variants.columns(["a", "b"], [0, 0.5, 1]), paths)
    attaches = [variant.attach for variant in found.values()]
    assert attaches[0] is None and attaches[1] is attaches[2] is not attaches[3] is attaches[4]


def test_what_cannot_be_used_is_told_and_left_out(folder, small_bases, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"PK" * 40)
    told: list[str] = []
    wanted = variants.columns(["good", "broken"], [0, 1])
    paths = {"good": at(folder, 2), "broken": broken}
    found = variants.make_variants(model.open(small_bases["sd15"]), wanted, paths, warn=told.append)
    assert list(found) == [BARE, ("good", 1)] and len(told) == 1 and names(told[0], "broken.safetensors")
    assert list(variants.make_variants(model.open(small_bases["sdxl"]), wanted, paths, warn=told.append)) == [BARE]
    assert line(told, at(folder, 2).name, "sdxl", FAMILIES["sd15"], FAMILIES["sdxl"])
    with pytest.raises(ValueError, match=naming("broken.safetensors")):
        variants.make_variants(model.open(small_bases["sd15"]), wanted, paths, [(broken, 1.0)])


def test_a_copy_is_compared_and_replaces_nothing(tmp_path, monkeypatch):
    source, drive = tmp_path / "a.bin", tmp_path / "drive"
    source.write_bytes(b"one")
    assert backup.copy_verified(source, drive) == [drive / "a.bin"] and (drive / "a.bin").read_bytes() == b"one"
    assert backup.copy_verified(source, drive) == [drive / "a.bin"]
    source.write_bytes(b"two")
    with pytest.raises(FileExistsError, match=naming("a.bin")):
        backup.copy_verified(source, drive)
    assert (drive / "a.bin").read_bytes() == b"one"
    nested = tmp_path / "peft" / "unet"
    nested.mkdir(parents=True)
    (nested / "x").write_bytes(b"x")
    assert backup.copy_verified(tmp_path / "peft", drive) == [drive / "peft" / "unet" / "x"]
    monkeypatch.setattr(shutil, "copyfile", lambda _, to: Path(to).write_bytes(b"lost"))
    with pytest.raises(OSError, match=naming("a.bin")):
        backup.copy_verified(source, tmp_path / "other")
    assert not (tmp_path / "other" / "a.bin").exists()


# ── The panel ───────────────────────────────────────────────────────────────────────────────────────────────────────


def counted(panel) -> list[int]:
    """How many pictures are made, and of how many."""
    return [int(number) for number in re.findall(r"\d+", words(panel.progress.value))[:2]]


def styles(panel) -> str:
    return "".join(child.value for child in panel.grid.styles.children[1:])


def test_a_run_is_opened_with_its_settings_and_the_best_is_preselected(panel):
    assert [label for label, box in panel.boxes.items() if box.value] == ["step 4", "step 6"]
    assert names(panel.boxes["step 4"].description, "step 4", compare.BEST)
    assert panel.boxes["step 6"].description == "step 6"
    assert panel.file.label.value == "step 4" and panel.file.name.value == "thing-step-000004"
    assert panel.steps.value == 2 and names(panel.make_button.description, 10)
    panel.boxes["step 6"].value = False
    assert names(panel.make_button.description, 6)


def test_several_runs_are_set_side_by_side_above_the_grid(panel, folder, tmp_path):
    assert panel.runs.value == ""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rank": 8}))
    panel.read([folder, other])
    told = panel.runs.value
    assert "<svg" in told and str(tmp_path) not in told
    assert re.search(r"rank</td><td [^>]*>4</td><td [^>]*>8<", told)
    assert len(re.findall(r">0\.1000[^<]*\b4<", told)) == 2  # the lowest validation loss and its step, of each run
    assert "run step 2" in panel.boxes and "other step 2" in panel.boxes
    panel.file.label.value = "other step 2"
    assert panel.file.name.value == "other-step-2"  # the two are not written over each other
    panel.read([folder])
    assert panel.runs.value == ""


def test_a_grid_is_made_and_looked_at(panel, small_bases):
    panel.run()
    assert counted(panel) == [10, 10] and tone(panel.progress.value) == "good" and not panel.make_button.disabled
    assert set(panel.grid.pictures) == {
        (r, c) for r in (0, 1) for c in variants.columns(["step 4", "step 6"], [0, 0.5, 1])
    }
    assert sum(map(len, panel.grid.cells.values())) == 12  # strength 0 is shown beside each checkpoint
    assert styles(panel).count("data:image/jpeg;base64,") == 10
    base = model.open(small_bases["sd15"])
    lora = run_folder.lora_of(panel.candidates.paths["step 4"])
    expected = pictures_of.rows(
        base, ["a house"], seeds=[42], strengths=[0.5], attach=lambda models: attachment.attach(models, base, lora),
        steps=2, device="cpu", precision="no",
    )  # fmt: skip
    assert panel.grid.pictures[1, ("step 4", 0.5)].tobytes() == expected[0][0].tobytes()
    panel.grid.cells[1, ("step 4", 0.5)][0].click()
    assert names(words(panel.grid.large.value), "a house", "step 4", 0.5, 42)
    shown = [base64.b64decode(code) for code in re.findall(r"data:image/png;base64,([^\"]+)", panel.grid.large.value)]
    pictures = [Image.open(io.BytesIO(code)) for code in shown]
    assert [p.tobytes() for p in pictures] == [expected[0][0].tobytes(), panel.grid.pictures[1, BARE].tobytes()]
    assert "a house <lora:thing-step-000004:0.5>\n" in pictures[0].text["parameters"]
    assert "<lora" not in pictures[1].text["parameters"]
    assert "lk-chosen" in panel.grid.cells[1, ("step 4", 0.5)][0]._dom_classes
    panel.grid.cells[0, BARE][1].click()
    assert "lk-chosen" not in panel.grid.cells[1, ("step 4", 0.5)][0]._dom_classes
    assert names(panel.grid.pick_button.description, "step 6")
    panel.grid.pick_button.click()
    assert panel.file.label.value == "step 6" and panel.file.name.value == "thing-step-000006"
    panel.make()  # with no kernel it works as well, and takes the place of what was there
    assert counted(panel) == [10, 10] and styles(panel).count("data:image/jpeg") == 10


def test_pictures_beside_a_training_are_refused_and_leave_it_alone(panel, trained, tmp_path):
    """Both at once used to end the training, because models lost their weights, and could fill the card."""
    config = Config.model_validate_json((trained / "config.json").read_text()).with_(steps=20, save_every=5)
    plain = run_module.start(config, tmp_path / "plain", **QUIET)
    answers = []

    def click(_):
        clicking = threading.Thread(target=panel.make)
        clicking.start()
        clicking.join()
        answers.append(words(panel.progress.value))

    result = Run(config, tmp_path / "disturbed", console=Console(click, False)).train(click)
    assert len(answers) > 20 and all(names(answer, "disturbed", "training") for answer in answers)
    assert not panel.grid.pictures
    for name, weight in load_file(result.lora).items():
        assert torch.equal(weight, load_file(plain.lora)[name])
    panel.run()
    assert len(panel.grid.pictures) == panel.grid.request.total


def test_files_are_compared_without_their_run(folder, small_bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (2, 6):
        write.save(run_folder.lora_of(folder, step), tmp_path / "loras" / f"v{step}.safetensors")
    panel = Compare(
        tmp_path / "loras", base=str(small_bases["sd15"]), strengths="1", seeds=(1, 2),
        sampling=Sampling(steps=2, clip_skip=2),
    )  # fmt: skip
    assert (panel.request().sampling.steps, panel.request().sampling.clip_skip) == (2, 2)
    assert panel.prompts.value == "sks thing" and names(panel.make_button.description, 4)
    panel.run()
    assert counted(panel) == [4, 4] and panel.file.label.value == "v6"
    panel.grid.look(1, "v2", 1)
    assert panel.grid.large.value.count("<img") == 1  # nothing of strength 0 to be seen beside it
    panel.strengths.value = "0"
    panel.run()
    assert counted(panel) == [2, 2]
    panel.export()
    assert panel.exported.name == "v6.safetensors" and tone(panel.proof.value) == "good"
    assert names(
        words(panel.proof.value),
        "v6.safetensors",
        len(run_folder.lora_of(tmp_path / "loras" / "v6.safetensors").modules),
    )


def test_stop_leaves_what_is_made_and_the_panel_usable(panel, monkeypatch):
    original = sampler_module.stream

    def watched(*rest, **settings):
        for number, placed in enumerate(original(*rest, **settings)):
            if number == 3:
                panel.stop_button.click()
            yield placed

    monkeypatch.setattr(sampler_module, "stream", watched)
    panel.run()
    assert counted(panel) == [4, 10] and tone(panel.progress.value) == "warning" and len(panel.grid.pictures) == 4
    assert panel.stop_button.disabled and not panel.make_button.disabled
    missing = next(place for place in panel.grid.cells if place not in panel.grid.pictures)
    panel.grid.cells[missing][0].click()
    assert panel.grid.large.value == ""
    monkeypatch.undo()
    panel.run()
    assert counted(panel) == [10, 10]


def test_an_interrupt_stops_the_grid(panel, monkeypatch):
    from lorakit.widgets import supervise

    def interrupted(work, refresh, stop):
        stop.set()
        work()
        refresh()

    monkeypatch.setattr(supervise, "supervise", interrupted)
    panel.run()
    assert counted(panel) == [0, 10] and tone(panel.progress.value) == "warning"


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("strengths", "0, half", ["strengths", "0, half"]), ("seeds", "1.5", ["seeds", "1.5"]), ("prompts", " \n", []),
        ("seeds", "", []), ("steps", 0, [0]), ("width", 30, ["30×30", 8]), ("base", "nowhere", ["nowhere"]),
    ],
)  # fmt: skip
def test_wrong_fields_are_told(panel, field, value, named):
    getattr(panel, field).value = value
    panel.run()
    assert (
        tone(panel.progress.value) == "bad" and names(words(panel.progress.value), *named) and panel.grid.pictures == {}
    )
    assert not panel.make_button.disabled and panel.stop_button.disabled


def test_damaged_and_missing_runs_are_told(panel, folder, tmp_path, small_bases):
    stepped = at(folder, 6)
    content = stepped.read_bytes()
    stepped.write_bytes(content[:-50] + bytes(50))  # whole to look at, but its digest does not hold
    panel.run()
    assert counted(panel) == [6, 10] and names(words(panel.progress.value), "step-000006.safetensors")
    assert TONES["bad"] in panel.progress.value
    panel.file.label.value = "step 6"
    panel.export()
    assert names(words(panel.proof.value), "step-000006.safetensors") and panel.exported is None
    panel.read([tmp_path / "nowhere"])
    assert names(words(panel.message.value), "nowhere") and tone(panel.message.value) == "bad"
    assert panel.boxes == {} and panel.file.label.options == ()
    panel.run()
    assert tone(panel.progress.value) == "bad" and panel.grid.pictures == {}
    panel.export()
    assert tone(panel.proof.value) == "bad" and not names(words(panel.proof.value), "step-000006.safetensors")
    assert panel.exported is None
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    empty = Compare(tmp_path / "new")
    assert names(words(empty.message.value), "new") and tone(empty.message.value) == "bad"
    panel.read([folder])
    panel.base.value = str(small_bases["sdxl"])
    panel.run()
    assert tone(panel.progress.value) == "bad" and panel.grid.pictures == {}
    assert names(words(panel.progress.value), "sdxl", FAMILIES["sd15"], FAMILIES["sdxl"])


def test_a_card_without_room_is_told(panel, monkeypatch):
    def full(*rest):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

    monkeypatch.setattr(model, "load_unet", full)
    panel.run()
    assert tone(panel.progress.value) == "bad" and words(panel.progress.value).strip()
    assert "CUDA out of memory" not in panel.progress.value and "OutOfMemory" not in panel.progress.value  # own words


def test_other_loras_are_used_together(panel, folder):
    panel.others.children = ()
    panel.add_other(str(at(folder, 2)), 0.5)
    panel.boxes["step 6"].value = False
    panel.run()
    assert counted(panel) == [6, 6]
    panel.grid.look(0, "step 4", 1)
    shown = re.findall(r"data:image/png;base64,([^\"]+)", panel.grid.large.value)
    told = [Image.open(io.BytesIO(base64.b64decode(code))).text["parameters"] for code in shown]
    assert "<lora:thing-step-000004:1> <lora:step-000002:0.5>\n" in told[0] and "<lora:step-000002:0.5>\n" in told[1]
    panel.others.children[0].children[2].click()
    assert panel.others.children == ()


def test_the_grid_of_what_was_open_goes_with_it(panel, folder, tmp_path):
    """It stayed clickable: what was picked there was looked for among what is open now."""
    write.save(run_folder.lora_of(folder, 2), tmp_path / "loras" / "v2.safetensors")
    panel.run()
    panel.grid.look(0, "step 4", 1)
    cell = panel.grid.cells[0, ("step 6", 1)][0]
    panel.read([tmp_path / "loras"])
    assert (panel.grid.blocks.children, panel.grid.cells, panel.grid.pictures, panel.grid.large.value) == (
        (),
        {},
        {},
        "",
    )
    assert panel.grid.pick_button.layout.display == "none" and panel.progress.value == "" and styles(panel) == ""
    cell.click()  # one that was on its way
    assert panel.grid.large.value == "" and panel.picked == tmp_path / "loras" / "v2.safetensors"
    panel.read([tmp_path / "nowhere"])
    panel.read([folder])
    panel.strengths.value = "1"
    panel.run()
    panel.read([tmp_path / "nowhere"])
    assert panel.grid.blocks.children == () and panel.grid.pick_button.layout.display == "none"


def test_nothing_else_is_opened_while_pictures_are_made(panel, folder, tmp_path, monkeypatch):
    original, told = sampler_module.stream, []
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    renamed = json.loads((other / "config.json").read_text()) | {"name": "other"}
    (other / "config.json").write_text(json.dumps(renamed))

    def watched(*rest, **settings):
        for number, placed in enumerate(original(*rest, **settings)):
            if number == 3:
                panel.read([other])
                told.append(panel.message.value)
            yield placed

    monkeypatch.setattr(sampler_module, "stream", watched)
    panel.run()
    assert counted(panel) == [10, 10] and len(panel.grid.pictures) == 10
    assert tone(told[0]) == "warning" and panel.candidates.config.name == "thing"
    panel.grid.look(0, "step 4", 1)
    shown = base64.b64decode(re.findall(r"data:image/png;base64,([^\"]+)", panel.grid.large.value)[0])
    assert "<lora:thing-step-000004:1>" in Image.open(io.BytesIO(shown)).text["parameters"]
    panel.grid.pick_button.click()
    assert panel.picked == at(folder, 4)
    panel.read([other])
    assert (
        panel.candidates.config.name == "other"
        and names(words(panel.message.value), 3)
        and tone(panel.message.value) == "good"
    )


def test_work_that_was_left_alone_stays_stopped_and_puts_nothing_into_the_next_grid(panel, monkeypatch):
    """A third Interrupt leaves it; stopped by an event that the next grid cleared, it went on beside that."""
    original, left = sampler_module.stream, []

    def slow(*rest, **settings):
        left.append(settings["console"].stop)
        if len(left) > 1:
            yield from original(*rest, **settings)
            return
        panel.stop()
        panel._end(None)
        panel.run()
        yield sampler_module.Placed(0, 0, Image.new("RGB", (32, 32)))

    monkeypatch.setattr(sampler_module, "stream", slow)
    panel.run()
    first, second = left
    assert first.is_set() and not second.is_set()
    made = panel.grid.pictures[0, BARE].tobytes()
    assert len(panel.grid.pictures) == 10 and made != bytes(len(made))


def test_a_runs_answers_are_about_its_own_base_alone(panel, folder, small_bases, tmp_path, monkeypatch):
    told = json.loads((folder / "config.json").read_text())
    told |= {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    (folder / "config.json").write_text(json.dumps(told))
    other, asked, original = shutil.copytree(small_bases["sd15"], tmp_path / "base"), [], sampler_module.stream
    monkeypatch.setattr(
        sampler_module, "stream", lambda base, *rest, **more: asked.append(base) or original(base, *rest, **more)
    )
    panel.read([folder])
    panel.prompts.value, panel.strengths.value = "a", "1"
    for base in (panel.base.value, f"{panel.base.value}/", other):
        panel.base.value = str(base)
        panel.run()
    assert [base.prediction_type for base in asked] == ["v_prediction", "v_prediction", "epsilon"]
    assert [bool(base.configs["scheduler"].get("rescale_betas_zero_snr")) for base in asked] == [True, True, False]


def test_a_stopped_comparison_leaves_no_sheet(folder, tmp_path):
    sheet, stop, counts = tmp_path / "out" / "sheet.png", threading.Event(), []
    run = Run(candidates.find_candidates(folder).config, folder)

    def compared(stop, last):
        def progress(what, done, of):
            counts.append(done)
            if done == last:
                stop.set()

        console = Console(print, progress, stop)
        return finish.draw_comparison(run, ["a", "b"], sheet, strengths=(0, 1), console=console)

    assert compared(stop, 2) is None and counts == [1, 2] and not sheet.parent.exists()
    assert compared(threading.Event(), 4) == sheet and sheet.exists()  # the last one was made: the sheet is whole


@pytest.mark.parametrize("layout", list(write.LAYOUTS))
def test_the_picked_checkpoint_is_exported_proven_copied_and_downloaded(panel, folder, tmp_path, layout):
    panel.file.download()
    assert tone(panel.file.message.value) == "bad" and not (tmp_path / "exports").exists()
    panel.file.format.value, panel.file.dtype.value, panel.file.name.value = layout, "fp32", "mine"
    panel.export()
    path = tmp_path / "exports" / ("mine" if layout == "peft" else "mine.safetensors")
    assert panel.exported == Path(os.path.relpath(path)) and path.exists()
    lora = run_folder.lora_of(folder, 4)
    assert tone(panel.proof.value) == "good" and names(
        words(panel.proof.value), f"exports/{path.name}", len(lora.modules)
    )
    assert proof.prove(path, lora, layout=layout).modules == len(lora.modules)
    panel.file.copy()
    assert tone(panel.file.message.value) == "bad"
    panel.file.folder.value = str(tmp_path / "drive")
    panel.file.copy()
    assert tone(panel.file.message.value) == "good" and (tmp_path / "drive" / path.name).exists()
    panel.file.download()
    panel.file.link = widgets.HTML()  # as of release 7
    panel.file.download()
    assert (tmp_path / "exports" / "mine.zip").exists() == (layout == "peft")
    panel.file.label.value = "step 6"
    assert panel.file.name.value == "mine"  # written by hand, it stays


def test_a_large_grid_is_light(folder, tmp_path, monkeypatch):
    """5 strengths, 4 checkpoints, 4 prompts: what is sent for a picture does not grow with the grid."""
    panel = Compare(folder, prompts=[f"prompt {n}" for n in range(4)], strengths=(0, 0.5, 0.7, 0.9, 1))
    for label in ("step 2", "step 4", "step 6"):
        panel.boxes[label].value = True
    assert panel._begin()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), np.uint8).astype(np.uint8))
    smooth = noise.resize((8, 8)).resize((1024, 1024))
    sent = []
    for row in range(4):
        for column in panel.grid.request.columns:
            panel.finished.put((row, column, smooth, page.jpeg(smooth, compare.SIDE)))
            panel._refresh()
            sent.append(len(panel.grid.styles.children[-1].value))
    panel._end(None)
    assert len(sent) == 52 and max(sent) < 30_000
    assert len({cell.layout for cells in panel.grid.cells.values() for cell in cells}) == 1
    assert threading.active_count() < 50


# ── Clicked ─────────────────────────────────────────────────────────────────────────────────────────────────────────


clicked = pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no chromium here: .ci/run installs it")


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as launched:
        yield launched


# The first grid waits for Stop once 4 of its 10 pictures are made.
PANEL = """
import sys

sys.modules["bitsandbytes"] = None  # diffusers would spend a second on importing it
from lorakit import sample
from lorakit.widgets.compare import Compare

stream = sample.stream

def held(*rest, console, **settings):
    sample.stream = stream
    for number, placed in enumerate(stream(*rest, console=console, **settings), 1):
        yield placed
        if number == 4:
            console.stop.wait(120)

sample.stream = held
panel = Compare("run", strengths=(0, 0.5, 1), sampling=sample.Sampling(steps=4))
panel
"""


def cells(trained: Path, folder: Path, kernel: str) -> None:
    shutil.copytree(trained, folder / "run")
    stopped = "panel.run()\nprint('STOPPED-AT', len(panel.grid.pictures))"
    browser.notebook(folder / "compare.ipynb", PANEL, stopped, kernel=kernel)


def seen(page, count: int) -> None:
    """Wait until so many cells of the grid show a picture."""
    page.wait_for_function(
        "count => count == [...document.querySelectorAll('.lk-cell')]"
        ".filter(cell => getComputedStyle(cell).backgroundImage.startsWith('url')).length",
        arg=count,
    )


def clicks(page, folder: Path, outputs: str) -> Path:
    """Stop the grid in its midst, make it whole, pick, export and ask for the file; the file."""
    seen(page, 6)  # they stream in: 2 at strength 0 beside each of two checkpoints, and 2 at 0.5
    page.click('button:has-text("Stop"):not([disabled])')  # while the cell is busy
    printed = page.wait_for_selector(f'{outputs}:has-text("STOPPED-AT")').inner_text()
    assert int(printed.split()[-1]) == 4
    sampler = page.locator("text=Base and sampler")
    sampler.click()
    page.fill('.widget-vbox:has(> .widget-html:has-text("steps")) > .widget-text input >> nth=0', "3")
    page.keyboard.press("Tab")
    page.click('button.mod-primary:has-text("10")')
    seen(page, 12)
    sampler.click()
    page.click("button.lk-cell >> nth=5")  # step 6 at strength 1
    page.wait_for_selector(".lk-wipe")
    page.click('button:has-text("step 6")')
    page.click('button:has-text("Export")')
    page.wait_for_selector('.widget-html-content:has-text("exports/thing-step-000006.safetensors")')
    made = folder / "exports" / "thing-step-000006.safetensors"
    assert proof.prove(made, run_folder.lora_of(folder / "run", 6)).error < 0.01
    page.click('button:has-text("Download")')
    return made


@pytest.mark.host
@pytest.mark.no_cover
@clicked
def test_a_grid_is_made_stopped_picked_and_exported_with_clicks(trained, chromium, tmp_path):
    cells(trained, tmp_path, "python3")
    with browser.jupyterlab(tmp_path) as address, browser.opened(chromium, address, "compare.ipynb") as page:
        browser.run_all(page)
        made = clicks(page, tmp_path, ".jp-OutputArea-output")
        with page.expect_download() as arrived:
            page.click('a:has-text("thing-step-000006")')
        assert Path(arrived.value.path()).read_bytes() == made.read_bytes()
        browser.picture(page, "compare", tmp_path)
        page.set_viewport_size({"width": 900, "height": 1600})  # a column of some 600 pixels
        browser.picture(page, "compare-narrow", tmp_path)


@pytest.mark.host
@pytest.mark.no_cover
@clicked
def test_the_same_clicks_on_colabs_versions(trained, chromium, tmp_path, monkeypatch):
    (tmp_path / "downloads").mkdir()
    monkeypatch.setenv("FAKE_COLAB_DOWNLOADS", str(tmp_path / "downloads"))
    cells(trained, tmp_path, "colab")
    machine = colab.machine(tmp_path / "machine", ready=True)
    with colab.notebook6(machine, tmp_path) as address, colab.opened(chromium, address, "compare.ipynb") as page:
        colab.run_all(page)
        made = clicks(page, tmp_path, ".output_area")
        arrived = tmp_path / "downloads" / made.name
        browser.until(page, lambda: arrived.exists() and arrived.stat().st_size == made.stat().st_size)
        assert arrived.read_bytes() == made.read_bytes()
        browser.picture(page, "colab-compare", tmp_path, "#site")
