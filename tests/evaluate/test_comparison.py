"""One change at a time: runs beside each other, and sweeps that share what they can and change nothing by it."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pictures as pictures_of
import pytest
import torch
from PIL import Image
from said import QUIET, line, names, naming

from lorakit import plots
from lorakit.adapter import attachment
from lorakit.adapter.lora import FAMILIES
from lorakit.base import model as bases
from lorakit.config import Config
from lorakit.console import Console
from lorakit.device import Compute
from lorakit.evaluate import checklist, comparison
from lorakit.evaluate import variants as variants_module
from lorakit.evaluate.comparison import PictureOptions, compare_runs
from lorakit.evaluate.sweeps import sweep, variations
from lorakit.plan import cards, memory, planning
from lorakit.plan import store as stores
from lorakit.run import checkpoint, preparation, run, run_folder
from lorakit.run import models as models_module
from lorakit.run.models import Shared
from lorakit.train import loop

CPU = torch.device("cpu")
PREDICT = stores.step_cost


@pytest.fixture(scope="module", autouse=True)
def _memory_is_not_predicted():
    """It takes a second for each shape of an adapter."""
    nothing = dict.fromkeys(memory.StepCost.__dataclass_fields__, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "step_cost", lambda *_, size, **__: memory.StepCost(**nothing | {"size": size}))
        yield


@pytest.fixture(scope="module")
def plain(small_bases, tmp_path_factory) -> Config:
    """Settings of a run of seconds, with pictures that stay for the module."""
    folder = tmp_path_factory.mktemp("trials") / "photos" / "2_thing"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks thing, number {number}")
    return Config(
        base=str(small_bases["sd15"]), dataset=str(folder.parent), name="thing", trigger="sks thing", resolution=32,
        bucket_step=8, rank=4, alpha=2, batch_size=2, steps=4, learning_rate=1e-2, save_every=2, sample_every=100,
        sample_prompts=("sks thing", "a house"), sample_steps=2, device="cpu", mixed_precision="no",
    )  # fmt: skip


class Counted:
    """How often a function of a module is called."""

    def __init__(self, monkeypatch, module, name):
        self.calls, whole = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (self.calls.append(a), whole(*a, **k))[1])


@pytest.fixture(scope="module")
def swept(plain, tmp_path_factory):
    """A sweep over the rank: its folder, its result, how often the UNet was loaded, and what was said."""
    folder, said = tmp_path_factory.mktemp("swept") / "ranks", []
    with pytest.MonkeyPatch.context() as patch:
        loads = Counted(patch, bases, "load_unet")
        made = sweep(plain, "rank", [4, 8], folder, console=Console(said.append, False))
    return folder, made, len(loads.calls), said


def weights(folder: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return checkpoint.read(folder / "checkpoints" / checkpoint.name(step)).tensors


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ── A sweep ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_of_a_sweep_ends_in_the_weights_that_it_has_alone(swept, plain, tmp_path, weights_only):
    folder = swept[0]
    run.start(plain.with_(rank=8), tmp_path / "alone", **QUIET)
    assert same(weights(tmp_path / "alone"), weights(folder / "rank=8"))
    assert not same(weights(folder / "rank=4"), weights(folder / "rank=8"))


def test_a_sweep_loads_the_unet_once_and_encodes_once(swept):
    folder, made, loads, said = swept
    assert loads == 1  # for two runs, their sheets and the comparison
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "cache", "comparison.html", "comparison.json", "curves.png", "rank=4", "rank=8",
    ]  # fmt: skip
    assert not (folder / "rank=4" / "cache").exists()
    assert (folder / "rank=8" / "thing-rank-8.safetensors").is_file()  # two files to load side by side
    assert (folder / "rank=8" / "comparison.png").is_file()
    whole, first, second = (text for text in said if text.startswith("sweep"))
    assert names(whole, 2, "rank=4", "rank=8") and names(first, "rank=4", 1, 2) and names(second, "rank=8", 2)
    assert "rank=8" not in first and "rank=4" not in second
    assert made.differing == {"rank": (4, 8)} and [result.steps for result in made.runs] == [4, 4]


def test_what_is_finished_is_not_trained_again(swept, plain, tmp_path, monkeypatch):
    folder = shutil.copytree(swept[0], tmp_path / "ranks")
    monkeypatch.setattr(run, "start", lambda *_, **__: pytest.fail("it is trained again"))
    made = sweep(plain, "rank", [4, 8], folder, pictures=False, console=Console.quiet())
    assert made.differing == {"rank": (4, 8)}
    with pytest.raises(ValueError, match=naming("rank=4", "rank=8", "learning_rate", 0.01, 0.001)):
        sweep(plain.with_(learning_rate=1e-3), "rank", [4, 8], folder, console=Console.quiet())


@pytest.mark.usefixtures("weights_only")
def test_a_sweep_that_is_cut_goes_on_and_ends_as_if_it_had_not_been(swept, plain, tmp_path, monkeypatch):
    stop, whole, done, said = threading.Event(), loop.batch_loss, [], []

    def batch_loss(*arguments):
        done.append(1)
        if len(done) == 6:  # of the second run the second step
            stop.set()
        return whole(*arguments)

    monkeypatch.setattr(loop, "batch_loss", batch_loss)
    cut = sweep(plain, "rank", [4, 8], tmp_path / "ranks", console=Console(said.append, False, stop))
    assert [(result.steps, result.total) for result in cut.runs] == [(4, 4), (2, 4)] and cut.pictures.rows == ()
    assert said[-1].startswith("stopped") and names(said[-1], 1, 2, "rank=8") and "rank=4" not in said[-1]
    assert not (tmp_path / "ranks" / "rank=8" / "thing-rank-8.safetensors").exists()
    assert not (tmp_path / "ranks" / "comparison.html").exists()
    done.clear()
    made = sweep(plain, "rank", [4, 8], tmp_path / "ranks", pictures=False, console=Console.quiet())
    assert len(done) == 2 and [result.steps for result in made.runs] == [4, 4]
    for name in ("rank=4", "rank=8"):
        assert same(weights(tmp_path / "ranks" / name), weights(swept[0] / name))


def test_stopped_before_it_began(plain, tmp_path):
    stop = threading.Event()
    stop.set()
    made = sweep(plain, "rank", [4, 8], tmp_path / "ranks", console=Console(lambda _: None, False, stop))
    assert made.runs == () and "<svg" in made.html() and made.describe()


@pytest.mark.no_cover
@pytest.mark.usefixtures("weights_only")
def test_text_encoders_come_and_go_within_a_sweep(swept, plain, tmp_path, monkeypatch):
    loads = Counted(monkeypatch, bases, "load_unet")
    sweep(plain, "text_encoder_rate", [5e-3, 0.0], tmp_path / "te", pictures=False, console=Console.quiet())
    assert len(loads.calls) == 1
    run.start(plain.with_(text_encoder_rate=5e-3), tmp_path / "alone", **QUIET)
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "te" / "text_encoder_rate=0.005"))
    assert same(weights(swept[0] / "rank=4"), weights(tmp_path / "te" / "text_encoder_rate=0.0"))  # the same settings


@pytest.mark.no_cover
@pytest.mark.usefixtures("weights_only")
def test_another_base_is_loaded_anew_and_its_pictures_are_left_out(plain, small_bases, tmp_path, monkeypatch):
    loads = Counted(monkeypatch, bases, "load_unet")
    values = [str(small_bases["sd15"]), str(small_bases["sdxl"])]
    made = sweep(plain.with_(steps=2), "base", values, tmp_path / "bases", console=Console.quiet())
    assert len(loads.calls) == 3  # for each of the runs, and the first again for the pictures
    assert made.differing["base"] == ("sd15", "sdxl") and made.pictures.columns == ("base", made.runs[0].name)
    assert line(made.notes, FAMILIES["sd15"], FAMILIES["sdxl"])
    assert [text for text in made.notes if names(text, "base") and FAMILIES["sdxl"] not in text]  # losses, too
    assert str(small_bases["sd15"].parent) not in made.html() + json.dumps(made.facts())
    assert all(name.startswith("base=sd") for name in (result.name for result in made.runs))


@pytest.mark.usefixtures("weights_only")
def test_one_that_diverges_ends_none_of_the_others(plain, tmp_path, monkeypatch):
    whole, said = run.start, []

    def start(config, *rest, **more):
        if config.learning_rate == 1.0:
            raise FloatingPointError("not finite at step 1")
        return whole(config, *rest, **more)

    monkeypatch.setattr(run, "start", start)
    made = sweep(
        plain.with_(steps=1), "learning_rate", [1.0, 1e-3], tmp_path / "rates", pictures=False,
        console=Console(said.append, False),
    )  # fmt: skip
    assert line(said, "learning_rate=1.0", "not finite at step 1")
    assert [result.name for result in made.runs] == ["learning_rate=0.001"]


def test_all_problems_are_told_before_anything_is_trained(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "start", lambda *_, **__: pytest.fail("it was trained"))
    monkeypatch.setattr(stores, "step_cost", PREDICT)  # which finds places that are not there
    for setting, values, named in (
        ("rnk", [4, 8], ["rnk", "rank"]),
        ("save_every", [1, 2], ["save_every"]),
        ("rank", [4], ["rank", 1]),
        ("rank", [4, 4.0], ["rank=4.0"]),
        ("rank", [0, "many", 4], ["rank=0", "rank=many"]),
        ("warmup_steps", [0, 5], ["warmup_steps=5", "constant_with_warmup"]),
        ("dataset", ["/nowhere/a", "/nowhere/b"], ["dataset=a-", "/nowhere/a", "dataset=b-", "/nowhere/b"]),
        ("resolution", [32, 36], ["resolution=36", "bucket_step"]),
        ("block_ranks", [{}, {"nowhere": 4}], ["nowhere", "mid_block"]),
    ):
        with pytest.raises(ValueError, match=naming(*named)):
            sweep(plain, setting, values, tmp_path / "sweep", console=Console.quiet())
    assert not list(tmp_path.glob("sweep/*=*"))


def test_a_folder_with_other_things_is_left_alone(swept, plain, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=naming(tmp_path.name, "thesis.txt")):
        sweep(plain, "rank", [4, 8], tmp_path, console=Console.quiet())
    with pytest.raises(ValueError, match=naming("rank=4")):
        sweep(plain, "rank", [4, 8], swept[0] / "rank=4", console=Console.quiet())
    with pytest.raises(ValueError, match=naming("thesis.txt")):
        sweep(plain, "rank", [4, 8], tmp_path / "thesis.txt", console=Console.quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert not (swept[0] / "rank=4" / "rank=4").exists()


def test_runs_are_called_by_their_value_whatever_it_is(plain):
    def called(setting, *values):
        return list(variations(plain, setting, values))

    assert called("learning_rate", 1e-4, 5e-5) == ["learning_rate=0.0001", "learning_rate=5e-05"]
    assert called("min_snr_gamma", 5.0, None) == ["min_snr_gamma=5.0", "min_snr_gamma=null"]
    assert called("flip", True, False) == ["flip=true", "flip=false"]
    assert called("optimizer", "adamw", "lion") == ["optimizer=adamw", "optimizer=lion"]
    assert len(set(called("block_ranks", {}, {"mid_block": 8}, {"mid_block": 4}))) == 3
    first, second = called("base", "/home/somebody/models/x", "C:\\models\\x")  # the same name, and no path
    assert first != second and all(name.startswith("base=x-") for name in (first, second))
    runs = variations(plain, "epochs", [1, 2])
    assert [(one.steps, one.epochs, one.name) for one in runs.values()] == [
        (None, 1, "thing-epochs-1"), (None, 2, "thing-epochs-2"),
    ]  # fmt: skip
    asking = plain.with_(prior_prediction=True, class_word="thing")
    assert len(variations(asking, "trigger", ["a", "b"])) == 2  # it decides then


# ── What runs share ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("weights_only")
@pytest.mark.parametrize(
    "changes", [{"algorithm": "dora", "gradient_checkpointing": True}, {"text_encoder_rate": 1e-3}]
)
def test_models_come_out_of_a_run_as_they_went_in(plain, tmp_path, changes):
    shared, config = models_module.Shared(cache=tmp_path / "cache"), plain.with_(steps=2, **changes)
    base = bases.open(plain.base)

    def broken(step):
        raise RuntimeError("a broken listener")

    with pytest.raises(RuntimeError, match="a broken listener"):
        run.start(config, tmp_path / "run", listeners=[broken], shared=shared, **QUIET)
    first = dict(shared.models)
    run.start(config, tmp_path / "run", shared=shared, **QUIET)
    assert shared.models["unet"] is first["unet"]
    loaded = {"unet": bases.load_unet(base, Compute(CPU, torch.float32))}
    if "text_encoder" in shared.models:
        loaded["text_encoder"] = bases.load_text_encoder(base, Compute(CPU, torch.float32))[0]
    for which, model in loaded.items():
        assert same(shared.models[which].state_dict(), model.state_dict())
        assert not any(weight.requires_grad for weight in shared.models[which].parameters())
        assert not any(part.training for part in shared.models[which].modules())
    assert not shared.models["unet"].is_gradient_checkpointing
    assert shared.held == sum(t.nbytes for m in loaded.values() for t in (*m.parameters(), *m.buffers()))
    shared.suit(plain)
    assert shared.held
    shared.suit(plain.with_(mixed_precision="bf16"))
    assert shared.models == {}


def test_a_run_alone_loads_the_unet_once(plain, tmp_path, monkeypatch):
    loads = Counted(monkeypatch, bases, "load_unet")
    made = run.start(plain.with_(steps=1), tmp_path / "run", **QUIET)
    assert made.comparison.is_file() and len(loads.calls) == 1


def test_models_that_are_there_make_the_same_pictures(swept, plain, monkeypatch):
    base, path = bases.open(plain.base), swept[0] / "rank=8" / "thing-rank-8.safetensors"
    columns = variants_module.columns(["it"], [0, 1])
    settings = {"steps": 2, "device": "cpu", "precision": "no"}

    def pictures(**more):
        variants = list(variants_module.make_variants(base, columns, {"it": path}).values())
        return [
            placed.picture.tobytes() for placed in pictures_of.stream(base, ["sks thing"], variants, **settings, **more)
        ]

    expected, unet = pictures(), bases.load_unet(base, Compute(CPU, torch.float32))
    before = {name: module for name, module in unet.named_modules()}
    monkeypatch.setattr(bases, "load_unet", lambda *_: pytest.fail("it is there"))
    assert pictures(loaded={"unet": unet}) == expected and expected[0] != expected[1]
    assert dict(unet.named_modules()) == before


def test_memory_of_models_that_are_kept_counts_as_free(plain, tmp_path, monkeypatch):
    """Else the second run of a sweep would come down to other settings than it has alone."""
    monkeypatch.setattr(stores, "step_cost", PREDICT)
    peak = preparation.prepare(plain, tmp_path / "a", Console.quiet()).prediction.peak
    enough = int(peak / (1 - planning.MARGIN)) + 1000
    monkeypatch.setattr(cards, "free_memory_bytes", lambda device: enough - 500_000)
    assert preparation.prepare(plain, tmp_path / "b", Console.quiet()).config != plain
    held = Shared(models={"unet": torch.nn.Linear(1000, 125, bias=False)})  # 500,000 bytes
    assert preparation.prepare(plain, tmp_path / "b", Console.quiet(), shared=held).config == plain


# ── Comparing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_prompts_and_seeds_are_made_with_every_run(swept, plain):
    folder, made, *_ = swept
    assert made.pictures.columns == ("base", "rank=4", "rank=8") and made.pictures.prompts == (
        ("sks thing", 42),
        ("a house", 42),
    )
    lora = run_folder.lora_of(folder / "rank=8" / "thing-rank-8.safetensors")
    base = bases.open(plain.base)
    expected = pictures_of.rows(
        base, ["a house"], seeds=[42], strengths=[0, 1], attach=lambda models: attachment.attach(models, base, lora),
        steps=2, guidance=7.0, size=(32, 32), device="cpu", precision="no",
    )[0]  # fmt: skip
    for picture, wanted in zip((made.pictures.rows[1][0], made.pictures.rows[1][2]), expected, strict=True):
        assert np.abs(np.asarray(picture, int) - np.asarray(wanted, int)).max() <= 2  # in a batch others round
    assert made.pictures.rows[1][1].tobytes() != made.pictures.rows[1][2].tobytes()
    assert names(made.pictures.settings, "sd15", "32×32", 1, 2, 7)


def test_the_page_holds_all_and_no_path(swept, plain, tmp_path):
    folder, made, *_ = swept
    page, facts = (folder / name for name in ("comparison.html", "comparison.json"))
    text = page.read_text()
    assert text == made.html() and text.count("data:image/jpeg;base64,") == 6 and "<svg" in text
    assert "http://" not in text.replace("http://www.w3.org/", "") and "https://" not in text
    assert "<script" not in text and 'src="data:' in text and text.count("src=") == 6
    for told in (text, facts.read_text(), made.describe()):
        assert str(folder) not in told and str(folder.parent) not in told and plain.base not in told
    assert json.loads(facts.read_text())["differing"] == {"rank": {"rank=4": 4, "rank=8": 8}}
    with Image.open(folder / "curves.png") as curves:
        assert curves.width > 400
    assert "max-width" in made._repr_html_() and str(made) == made.describe()
    assert all(names(made.describe(), text) for text in made.notes) and line(made.notes, "rank", "alpha")


@pytest.fixture
def two(swept, tmp_path) -> list[Path]:
    """Copies of both runs, to be changed."""
    return [Path(shutil.copytree(swept[0] / name, tmp_path / "runs" / name)) for name in ("rank=4", "rank=8")]


def change(folder: Path, **settings) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_only_what_decides_the_result_differs(two):
    change(
        two[1], save_every=1, backup="/mnt/drive", sample_prompts=["x"], name="other", schedule="cosine", trigger="b"
    )
    made = compare_runs(two, pictures=False)
    assert made.differing == {
        "trigger": ("sks thing", "b"), "rank": (4, 8), "schedule": ("constant", "cosine"),
    }  # fmt: skip
    assert "schedule" in made.describe() and "save_every" not in made.describe()


def test_folders_are_compared_by_what_is_in_them(two, plain, tmp_path):
    change(two[0], dataset=str(tmp_path / "elsewhere" / "photos"))  # moved: the same pictures
    assert "dataset" not in compare_runs(two, pictures=False).differing
    tensors = checkpoint.read(path := two[0] / "checkpoints" / checkpoint.name(4))
    tensors.settings["dataset"] = "abcdef0123"
    checkpoint._write(tensors)
    made = compare_runs(two, pictures=False)
    assert names(made.differing["dataset"][0], "photos", "abcdef") and str(tmp_path) not in made.html()
    assert names(made.differing["dataset"][1], "photos") and "abcdef" not in made.differing["dataset"][1]
    path.unlink()
    (two[0] / "checkpoints" / checkpoint.name(2)).unlink()
    change(two[0], dataset=str(tmp_path / "elsewhere" / "drawings"), regularisation="C:\\class\\cats")
    made = compare_runs(two, pictures=False)  # no checkpoint tells what was in them
    assert made.differing["dataset"] == ("drawings", "photos") and made.differing["regularisation"] == ("cats", None)


def test_figures_come_from_log_file_and_report(two):
    lines = [
        {"step": step, "loss": 1.0, "seconds": second, "learning_rate": 1e-4, "epoch": 1} | more
        for step, second, more in (
            (1, 1.0, {}), (2, 1.5, {"validation_loss": 0.2, "overfit_gap": 0.0}), (3, 9.0, {}), (4, 9.5, {}),
            (5, 0.2, {}), (6, 0.7, {"validation_loss": 0.3, "overfit_gap": 0.1}),
        )
    ]  # fmt: skip
    (two[0] / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gain = checklist.Check("feature accuracy", "likeness", 0.7, "cosine", "doubtful")
    facts = {"lines": [vars(gain)], "recommended": "step 2", "faults": ["overfitted"]}
    (two[0] / "report.json").write_text(json.dumps(facts))
    (two[1] / "report.json").write_text("{")
    first, second = compare_runs(two, pictures=False).runs
    assert (first.steps, first.total, first.loss, first.lowest, first.lowest_at) == (6, 4, 1.0, 0.2, 2)
    assert (first.validation_loss, first.overfit_gap, first.seconds_a_step) == (0.3, 0.1, 0.5)
    assert (first.recommended, first.gain, first.faults) == ("step 2", 0.7, ("overfitted",))
    assert (second.recommended, second.gain, second.faults, second.lowest) == (None, None, None, None)
    assert first.file_mb == pytest.approx((two[0] / "thing-rank-4.safetensors").stat().st_size / 1e6)
    assert first.curve.validation == [(2, 0.2), (6, 0.3)]


def test_what_is_damaged_or_missing_is_told_and_the_rest_compared(two, plain, tmp_path):
    new, broken = tmp_path / "runs" / "new", Path(shutil.copytree(two[0], tmp_path / "runs" / "broken"))
    new.mkdir()
    (new / "config.json").write_text(plain.to_json())
    (broken / "config.json").write_text("{")
    log = (broken / "log.jsonl").read_text().splitlines()
    (broken / "log.jsonl").write_text("\n".join([log[0], "garbage", *log[2:]]) + "\n")
    (two[1] / "thing-rank-8.safetensors").write_bytes(b"PK" * 50)
    made = compare_runs([*two, new, broken], PictureOptions("sks thing"), console=Console.quiet())
    told = "\n".join(made.notes)
    assert sum(names(text, "new") for text in made.notes) == 2  # no checkpoint, no log
    assert line(made.notes, "broken", "config.json") and line(made.notes, "broken", "log.jsonl", 2)
    assert line(made.notes, "rank=8", "thing-rank-8.safetensors")
    assert made.pictures.columns == ("base", "rank=4", "rank=8", "broken")  # by checkpoints instead
    assert str(tmp_path) not in told + made.html() and [one.steps for one in made.runs] == [4, 4, 0, 4]
    gone = compare_runs(two, PictureOptions(base=str(tmp_path / "gone")), console=Console.quiet())
    assert gone.pictures.rows == () and line(gone.notes, "gone")


def test_runs_are_found_and_told_apart(swept, two, tmp_path):
    assert [one.name for one in compare_runs([swept[0]], pictures=False).runs] == ["rank=4", "rank=8"]
    made = compare_runs([swept[0] / "rank=4", *two, two[0]], pictures=False)
    assert [one.name for one in made.runs] == ["ranks/rank=4", "runs/rank=4", "rank=8"]
    for name in ("rank=16", "rank=2"):
        shutil.copytree(two[0], tmp_path / "runs" / name)
    made = compare_runs([tmp_path / "runs"], pictures=False)
    assert [one.name for one in made.runs] == ["rank=2", "rank=4", "rank=8", "rank=16"]
    with pytest.raises(FileNotFoundError, match=naming("nowhere")):
        compare_runs([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=naming("empty")):
        compare_runs([tmp_path / "empty"])
    with pytest.raises(ValueError):
        compare_runs([])


def test_pictures_may_be_stopped(two):
    stop = threading.Event()
    stop.set()
    made = compare_runs(two, console=Console(lambda _: None, stop=stop))
    assert line(made.notes, 0, 6) and {picture for row in made.pictures.rows for picture in row} == {None}
    assert "<img" not in made.html() and "a house" in made.html()


def test_losses_measured_in_other_ways_are_told(two):
    change(two[1], min_snr_gamma=None)
    assert line(compare_runs(two, pictures=False).notes, "min_snr_gamma")
    change(two[1], clip_skip=2)
    stop = threading.Event()
    stop.set()
    made = compare_runs(two, console=Console(lambda _: None, stop=stop))
    assert line(made.notes, "clip_skip")


def test_a_comparison_is_written_whole_or_not_at_all(swept, tmp_path, monkeypatch):
    made = swept[1]
    monkeypatch.setattr(comparison.Comparison, "html", lambda _: 1 / 0)
    (tmp_path / "comparison.html").write_text("before")
    with pytest.raises(ZeroDivisionError):
        comparison.save_comparison(made, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.html"]
    assert (tmp_path / "comparison.html").read_text() == "before"


# ── Curves ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_curves_of_several_runs_in_one_figure(tmp_path):
    curves = [
        plots.Curve("_$a$ & b", [1, 2, 3], [1.0, float("nan"), 0.5], [(2, 0.4), (3, float("nan"))]),
        plots.Curve("long", list(range(1, 5000)), [0.5] * 4999), plots.Curve("empty", [], []),
        *(plots.Curve(f"run {number}", [1], [0.3]) for number in range(9)),
    ]  # fmt: skip
    chart = plots.losses(curves)
    chart.save(tmp_path / "curves.png")
    figure = chart.figure()
    assert len(figure.axes) == 2
    with Image.open(tmp_path / "curves.png") as drawn:
        assert drawn.width == 960
    assert [len(axes.lines) for axes in figure.axes] == [12, 12]
    svg = chart.svg()
    assert "_$a$ &amp; b" in svg and len(svg) < 50_000
    assert [line.get_linestyle() for line in figure.axes[1].lines] == ["-"] * 8 + ["--"] * 4
    import xml.etree.ElementTree as tree

    tree.fromstring(svg)
    for some in ([], curves[2:3], curves[1:2]):
        assert len(plots.losses(some).figure().axes) == 1 and plots.losses(some).svg()
