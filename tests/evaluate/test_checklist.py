"""The checklist, filled in: what is asked, what is concluded, and what the page holds."""

import json
import re
import shutil
from dataclasses import replace
from html import escape

import numpy as np
import pytest
from PIL import Image
from said import QUIET, line, names, naming

from lorakit import base as bases
from lorakit.adapter import merge_into_base
from lorakit.adapter.lora import FAMILIES
from lorakit.console import Console
from lorakit.evaluate import checklist
from lorakit.evaluate import figures as figures_module
from lorakit.evaluate import pictures as pictures_module
from lorakit.evaluate import vision as vision_module
from lorakit.evaluate.checklist import CHECKS, CURES, LIMITS, Checkpoint, diagnose, fill_in, recommend
from lorakit.evaluate.pictures import ReportOptions
from lorakit.run import finish, lora_of, run, run_folder
from lorakit.sample import sampler

GOOD = {
    "gain": 0.8, "hits": 1.0, "chance": 0.001, "unevenness": 0.1, "adherence": 0.95, "variety": 0.95, "copied": 0.0,
    "gap": 0.02, "shift": 0.1, "clipped": 0.0, "residue": 1.1, "broken": 0.0, "rises": 1.0, "holds": 1.0, "leak": 0.2,
    "unrelated": 0.2, "called": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_vision(tmp_path_factory):
    """A folder of a small model that sees and reads, of transformers' own classes, with random weights."""
    import torch
    from conftest import TOKENIZER
    from transformers import (
        CLIPTextConfig,
        CLIPTokenizer,
        ConvNextConfig,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
    )

    folder, tokenizer = tmp_path_factory.mktemp("eyes"), CLIPTokenizer.from_pretrained(TOKENIZER)
    vision = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32, hidden_size=16)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = VisionTextDualEncoderConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
        VisionTextDualEncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"size": {"shortest_edge": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return folder


# ── Vision models ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pictures_and_texts_become_unit_vectors_whatever_the_batch(small_vision):
    model = vision_module.open(str(small_vision))
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (40, 30 + i, 3), np.uint8)) for i in range(18)]
    seen = model.embed_pictures(pictures)
    assert seen.shape == (18, 512) and np.allclose(np.linalg.norm(seen, axis=1), 1, atol=1e-5)
    assert np.allclose(seen[17], model.embed_pictures(pictures[17:])[0], atol=1e-5)
    read = model.embed_texts(["a dog", "a cat and a dog", "x " * 200])
    assert read.shape == (3, 512) and model.reads_texts
    assert np.allclose(read[0], model.embed_texts(["a dog"])[0], atol=1e-4)


def test_what_does_not_see_is_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming("blind", *vision_module.MODELS)):
        vision_module.open("blind")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=naming(tmp_path.name, ".safetensors")):
        vision_module.open(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=naming(tmp_path.name, "config.json", *vision_module.MODELS)):
        vision_module.open(str(tmp_path))


def test_the_embedded_base_has_eyes_that_know_its_subjects_in_a_style_they_never_saw():
    from lorakit import demo

    files = sorted(demo.PICTURES.rglob("*.png"))
    names = [file.stem.replace("-", " ") for file in files]
    model = vision_module.open("demo")
    seen, read = model.embed_pictures([Image.open(file) for file in files]), model.embed_texts(names)
    assert seen.shape == read.shape and np.allclose(np.linalg.norm(seen, axis=1), 1, atol=1e-5)
    right = ((seen @ read.T).argmax(1) == np.arange(len(files))).mean()
    assert right > 0.9, f"{right:.0%} of {len(files)}"
    styled = model.embed_texts([f"{style} style, {name}" for style in ("noto", "ink") for name in names])
    by_style = styled.reshape(2, len(names), -1).mean(1)
    assert by_style[0] @ by_style[1] / np.prod(np.linalg.norm(by_style, axis=1)) < 0.9  # styles are words, too


# ── What is concluded ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("figures", "fault"),
    [
        ({}, None),
        ({"gain": 0.2}, "undertrained"),
        ({"gain": 0.02}, "undertrained"),
        ({"hits": 0.3, "leak": 0.9}, "undertrained"),
        ({"gain": 0.05, "called": 0.0}, "wrong trigger"),
        ({"copied": 0.5}, "overfitted"),
        ({"adherence": 0.3}, "overfitted"),
        ({"adherence": 0.03, "gain": -0.2}, "learning rate"),
        ({"shift": 60.0, "adherence": 0.3}, "learning rate"),
        ({"broken": 0.5}, "learning rate"),
        ({"leak": 0.95}, "leaking"),
        ({"unrelated": 0.9}, "leaking"),
    ],
)
def test_each_fault_is_told_by_its_figures(figures, fault):
    found = diagnose(GOOD | figures)
    assert (found[0] if found else None) == fault
    assert fault is None or fault in CURES


def test_what_was_not_measured_accuses_nobody():
    assert diagnose({}) == ()
    assert {check.verdict for check in fill_in({}, ())} == {"not measured"}


def test_a_bad_line_names_the_cure_of_the_guide():
    checks = fill_in(GOOD | {"copied": 0.5, "shift": 99.0}, ("learning rate",))
    bad = [check for check in checks if check.verdict == "bad"]
    assert len(bad) == 2 and {check.cure for check in bad} == {CURES["overfitted"], CURES["learning rate"]}
    assert all(check.cure == "" for check in checks if check.verdict != "bad")
    wrong = fill_in(GOOD | {"gain": 0.05}, ("wrong trigger",))[0]
    assert wrong.verdict == "bad" and wrong.cure == CURES["wrong trigger"]
    assert set(LIMITS) == set(checklist.CHECKS)


def test_the_checkpoint_to_keep_is_like_and_obedient():
    mark = lambda step, gain, adherence, loss=None: Checkpoint(f"step {step}", step, loss, gain, adherence)  # noqa: E731
    marks = [mark(100, 0.4, 1.0), mark(200, 0.79, 1.0), mark(300, 0.9, 0.95), mark(400, 2.4, 0.8), mark(500, 3.0, 0.5)]
    label, why = recommend(marks)
    assert label == "step 300" and "0.90" in why  # to be more like them than they are to each other is no merit
    assert recommend([mark(100, 1.1, 1.0), mark(200, 1.2, 1.1)])[0] == "step 200"
    assert recommend([]) == (None, "") and recommend([mark(100, None, None)]) == (None, "")
    label, why = recommend([mark(100, 0.9, 0.1), mark(200, -0.1, 1.0)])
    assert label is None and why


# ── Whole ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trained(small_bases, tmp_path_factory):
    from lorakit.config import Config

    folder = tmp_path_factory.mktemp("report")
    pictures = folder / "pictures" / "2_sks thing"
    pictures.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a photo of sks thing, number {number}")
    config = Config(
        base=str(small_bases["sd15"]), dataset=str(pictures.parent), name="thing", trigger="sks", kind="object",
        resolution=32, bucket_step=8, rank=4, alpha=2, batch_size=2, steps=6, learning_rate=1e-3, save_every=2,
        sample_every=100, sample_prompts=("sks thing",), sample_steps=2, validation_share=0.2, validate_every=2,
        device="cpu", mixed_precision="no",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "attempt", lambda *_: None)
        return run.start(config, folder / "run", **QUIET).folder


@pytest.fixture(scope="module")
def pictured(trained) -> pictures_module.PictureSet:
    """The pictures that `report` makes of that run."""
    options = ReportOptions(contexts=["on grass", "in snow"])
    return pictures_module.make_pictures(trained, options, console=Console.quiet())


@pytest.fixture
def made_already(pictured, monkeypatch):
    """`report` makes no pictures anew: the test is about how they are judged."""
    monkeypatch.setattr(checklist, "make_pictures", lambda *_, **__: pictured)


def judged(source, console: Console | None = None, base=None, device="auto", known=None, **options) -> checklist.Report:
    """A report, made quietly."""
    return checklist.report(
        source, ReportOptions(**options), base=base, device=device, known=known, console=console or Console.quiet()
    )


def verdicts(made: checklist.Report) -> dict[str, str]:
    """The verdict on each figure."""
    return {name: check.verdict for name, check in zip(checklist.CHECKS, made.checks, strict=True)}


@pytest.fixture
def telling(monkeypatch):
    """What models with random weights say counts."""
    monkeypatch.setattr(figures_module, "NO_DISTANCE", -1)
    monkeypatch.setattr(figures_module, "NO_ADHERENCE", -1)


@pytest.mark.usefixtures("made_already")
def test_what_the_eyes_cannot_tell_is_left_open(trained, small_vision, monkeypatch):
    monkeypatch.setattr(figures_module, "NO_DISTANCE", 9)
    monkeypatch.setattr(figures_module, "NO_ADHERENCE", 9)
    made = judged(trained, vision=str(small_vision))
    assert len(made.missing) == 2 and all(escape(text) in made.html() for text in made.missing)
    assert {verdicts(made)[figure] for figure in ("gain", "hits", "adherence")} == {"not measured"}
    assert made.recommended == f"step {int(run_folder.RunFolder(trained).best()[0].stem[5:])}"  # by validation loss
    assert not {"undertrained", "leaking"} & set(made.faults)


def test_a_run_is_judged_and_the_page_holds_all(trained, small_vision, telling):
    said, known = [], {}
    how = {
        "vision": str(small_vision), "contexts": ["on grass", "in snow", "at night"], "known": known,
        "console": Console(said.append),
    }  # fmt: skip
    made = judged(trained, **how)
    assert made.pictures.count == 3 * 5 + (3 + 3 + 4) * 2 + 3 * 2  # the last checkpoint is the one at all strengths
    assert {check.verdict for check in made.checks} <= {"good", "doubtful", "bad"} and len(made.checks) == 16
    assert made.pictures.prompts.triggered[0] == "a photo of sks thing, on grass"
    assert [len(column) for column in made.pictures.strengths] == [3] * 5
    assert [checkpoint.step for checkpoint in made.checkpoints] == [2, 4, 6] and made.reason
    assert (made.recommended, made.reason) == recommend(made.checkpoints)
    assert all(checkpoint.validation_loss and checkpoint.gain is not None for checkpoint in made.checkpoints)
    page, facts = checklist.save_report(made, trained)
    text = page.read_text("utf-8")
    assert text.count("data:image/jpeg") >= 15 and not re.search(r'(src|href)="(?!data:|#)', text)
    assert str(trained.parent) not in text and all(
        f">{name}</text>" in text for name in ("validation loss", "likeness", "adherence")
    )
    assert all(escape(check.what) in text and check.number in text for check in made.checks)
    told = json.loads(facts.read_text("utf-8"))
    assert told["recommended"] == made.recommended and len(told["lines"]) == 16
    assert str(trained.parent) not in facts.read_text("utf-8")
    assert (
        line(made.describe().splitlines(), *filter(None, [made.recommended, made.reason]))
        and str(made) == made.describe()
    )
    assert judged(trained, **how).facts() == made.facts()  # the bare base's pictures are made once
    first, second = said
    assert (
        names(first, made.pictures.count, 3, 5) and names(second, made.pictures.count - 13, 3, 5) and len(known) == 13
    )


def test_another_base_is_judged_with_the_same_prompts_and_limits(trained, small_bases, small_vision, telling, tmp_path):
    """The other base is the first with another LoRA of the run merged into it."""
    lora = lora_of(next((trained / "checkpoints").glob("*2.safetensors")))
    other = tmp_path / "other mix"
    merge_into_base(bases.open(small_bases["sd15"]), [lora], [1.0], other, console=Console.quiet())
    how = {"vision": str(small_vision), "contexts": ["on grass", "in snow"]}
    alone, both = judged(trained, **how), judged(trained, also=str(other), **how)
    assert both.checks[: len(alone.checks)] == alone.checks and both.checkpoints == alone.checkpoints
    added = both.checks[len(alone.checks) :]
    assert [check.aspect for check in added] == ["other checkpoints"] * 4
    assert all(check.what.endswith("on other mix") and check.figure is not None for check in added)
    assert (
        not both.elsewhere.checkpoints and both.elsewhere.pictures.prompts.triggered == both.pictures.prompts.triggered
    )
    assert escape("on other mix") in both.html() and both.facts()["elsewhere"]["base"] == "other mix"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        judged(trained, also="nowhere", **how)
    with pytest.raises(ValueError, match="sdxl"):
        judged(trained, also=str(small_bases["sdxl"]), **how)


def test_what_only_works_on_its_base_is_a_fault(pictured):
    def made(**changes):
        return checklist.Report(pictured, fill_in(GOOD | changes, ()), (), (), None, "", ())

    same = checklist._with_other(made(), made())
    assert same.faults == () and same.verdict == "no fault"
    only = checklist._with_other(made(), made(gain=0.1))
    assert only.faults == ("works on its base only",) and only.checks[len(CHECKS)].cure == CURES[only.faults[0]]
    neither = checklist._with_other(made(gain=0.1), made(gain=0.1))  # it is a fault of the LoRA
    assert neither.faults == () and not neither.checks[len(CHECKS)].cure


@pytest.mark.usefixtures("made_already")
def test_without_eyes_the_rest_is_measured_and_what_lacks_is_told(trained):
    made = judged(trained, vision=None)
    told = verdicts(made)
    assert {told[figure] for figure in ("gain", "hits", "chance")} == {"not measured"}
    assert "not measured" not in {
        told[figure] for figure in (*checklist.ARTIFACTS, "leak", "unrelated", "rises", "holds")
    }
    assert len(made.missing) == 1 and escape(made.missing[0]) in made.html()
    best = run_folder.RunFolder(trained).best()  # by validation loss
    assert made.recommended == f"step {int(best[0].stem[5:])}" and made.reason == str(best[1])


def test_a_phrase_is_what_captions_share_and_not_a_whole_caption():
    sentences = [f"a photo of sks man sitting on bench {number}" for number in range(6)]
    assert pictures_module._phrase(sentences, "sks") == "sks"
    assert (
        pictures_module._phrase([f"a photo of sks man, on bench {n}" for n in range(6)], "sks") == "a photo of sks man"
    )
    assert pictures_module._phrase([], "sks") == "sks"


def test_a_checkpoint_that_is_damaged_is_left_out_and_one_of_another_family_is_refused(trained, small_bases, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    first = folder / "checkpoints" / "step-000002.safetensors"
    first.write_bytes(first.read_bytes()[:-7] + b"damaged")
    said = []
    made = judged(folder, Console(said.append), vision=None, contexts=["on grass"])
    assert [checkpoint.step for checkpoint in made.checkpoints] == [4, 6] and line(said, "step-000002.safetensors")
    with pytest.raises(ValueError, match=naming("sdxl", "step-000006.safetensors", FAMILIES["sd15"], FAMILIES["sdxl"])):
        judged(folder, base=str(small_bases["sdxl"]), vision=None, contexts=["on grass"])


@pytest.mark.usefixtures("made_already")
def test_a_hub_out_of_reach_is_told_and_ends_nothing(trained, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = []
    made = judged(trained, Console(said.append))
    assert line(said, vision_module.MODELS["clip"][0]) and len(made.missing) == 1
    assert verdicts(made)["gain"] == verdicts(made)["adherence"] == "not measured"


def test_a_file_is_judged_without_its_run(trained, small_bases, small_vision, tmp_path):
    made = judged(
        shutil.copy(trained / "thing.safetensors", tmp_path), base=str(small_bases["sd15"]), vision=str(small_vision),
        steps=2, device="cpu", contexts=["on grass", "in snow"],
    )  # fmt: skip
    assert made.pictures.trigger == "sks" and made.checkpoints == () and made.recommended is None
    assert verdicts(made)["gain"] == "not measured" and line(made.missing, pictures_module.FEWEST)


def test_a_lora_without_a_trigger_is_not_called_leaking(trained, small_vision):
    """What is asked with the trigger and without it would be the same."""
    prompts = pictures_module.Prompts.of(None, "", "style", ["a cat", "a dog"], False)
    assert prompts.triggered == ["a cat", "a dog"] and prompts.untriggered == prompts.unrelated == []
    assert len(prompts.rows(7)) == 4
    from lorakit import config as configs
    from lorakit.adapter import read as read_module
    from lorakit.adapter import write

    config = configs.load(trained / "config.json")
    file = trained.parent / "plain.safetensors"
    lora = read_module.load(trained / "thing.safetensors")
    write.save(replace(lora, metadata={k: v for k, v in lora.metadata.items() if "trigger" not in k}), file)
    made = judged(
        file, base=config.base, vision=str(small_vision), steps=2, device="cpu", contexts=["on grass", "in snow"]
    )
    assert made.pictures.trigger == "" and line(made.missing, "trigger")
    assert verdicts(made)["leak"] == verdicts(made)["unrelated"] == "not measured"
    assert "leaking" not in made.faults and made.pictures.untriggered == ([], []) and made.html().count("<img") == 2 * 5


def test_a_trigger_is_found_as_a_word_and_exchanged_for_the_class(tmp_path):
    from lorakit.dataset import folder as folders

    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("ink woman drinking at a party, sunny")
    pictures = folders.scan(tmp_path)
    prompts = pictures_module.Prompts.of(pictures, "ink woman", "character", ["on a beach"], False, "woman")
    assert prompts.triggered == ["ink woman drinking at a party, on a beach"]
    assert prompts.untriggered == ["woman drinking at a party, on a beach"]
    of = pictures_module.Prompts.of
    bare = lambda class_word: of(pictures, "ink", "object", ["a"], False, class_word).untriggered  # noqa: E731
    assert bare("woman") == ["woman drinking at a party, a"]  # where the class is said already
    assert bare("\\pen") == ["\\\\pen woman drinking at a party, a"]
    assert pictures_module._phrase(["一张sks人的照片"], "sks") == "一张sks人的照片"
    assert (
        pictures_module._phrase([picture.caption for picture in pictures.pictures], "art") == "art"
    )  # not that of "party"


def test_a_report_says_what_is_wrong_before_it_makes_pictures(trained, monkeypatch):
    monkeypatch.setattr(sampler, "stream", lambda *_, **__: pytest.fail("it made pictures"))
    with pytest.raises(FileNotFoundError, match=naming("clipp", *vision_module.MODELS)):
        judged(trained, vision="clipp")
    with pytest.raises(ValueError, match=naming("person", *pictures_module.CONTEXTS)):
        judged(trained, kind="person", vision=None)


def test_a_run_whose_pictures_are_gone_is_judged_by_what_is_left(trained, tmp_path):
    from lorakit import config as configs

    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    gone = configs.load(folder / "config.json").with_(dataset=str(tmp_path / "gone"), mixed_precision="fp16")
    (folder / "config.json").write_text(gone.to_json())  # in half precision, too, which a CPU does not train in
    said = []
    how = {"vision": None, "contexts": ["on grass"], "console": Console(said.append)}
    made = judged(folder, **how)
    assert line(said, str(tmp_path / "gone")) and len(made.missing) == 3 and len(made.checkpoints) == 3
    assert all(escape(text) in made.html() for text in made.missing) and str(tmp_path) not in made.html()
    newest = folder / "checkpoints" / "step-000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7] + b"damaged")
    assert [checkpoint.step for checkpoint in judged(folder, **how).checkpoints] == [2, 4]
    shutil.rmtree(folder / "checkpoints")  # the finished file is left
    assert judged(folder, **how).checkpoints == ()


def test_a_checkpoint_is_judged_with_the_settings_of_its_run(trained, small_vision, telling, monkeypatch):
    monkeypatch.chdir(trained / "checkpoints")
    made = judged("step-000004.safetensors", vision=str(small_vision), contexts=["on grass"])
    assert (made.name, made.pictures.kind, made.pictures.trigger) == ("thing-step-000004", "object", "sks")
    assert made.checkpoints == () and made.checks[0].verdict != "not measured"  # its run's pictures
    page, facts = checklist.save_report(made, trained, "thing-step-000004.report")
    assert page.name == "thing-step-000004.report.html" and facts.is_file()


@pytest.mark.usefixtures("made_already")
def test_bad_lines_without_a_fault_are_told_with_their_cure(trained, small_vision):
    made = judged(trained, vision=str(small_vision))
    bad = replace(made, faults=(), checks=fill_in(GOOD | {"gap": 1.5}, ()))
    good = replace(bad, checks=fill_in(GOOD, ()))
    assert names(bad.verdict, 1, 16) and not re.search(r"\d", good.verdict)
    assert CURES["overfitted"] in bad.html() and CURES["overfitted"] not in good.html()
    told = bad.html()
    assert told.count("<img") >= 2 * 5 + (2 + 4) * 2 + 2 * 3


def test_a_loss_that_is_no_number_reaches_no_report(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    log = folder / "log.jsonl"
    log.write_text(re.sub(r'("overfit_gap"|"validation_loss"): [\d.e-]+', r"\1: NaN", log.read_text()))
    made = judged(folder, vision=None, contexts=["on grass"])
    assert all(checkpoint.validation_loss is None for checkpoint in made.checkpoints)
    assert "NaN" not in json.dumps(made.facts())


def test_checkpoints_of_which_nothing_could_be_measured_have_no_chart(trained):
    made = judged(trained, vision=None, contexts=["on grass"])
    bare = [replace(one, validation_loss=None, gain=None, adherence=None) for one in made.checkpoints]
    assert len(bare) > 1
    assert made.html().count("<svg") == 1 and replace(made, checkpoints=tuple(bare)).html().count("<svg") == 0


def test_leaking_is_no_fault_where_likeness_was_not_measured():
    blind = {name: value for name, value in GOOD.items() if name not in ("gain", "hits", "chance")}
    assert diagnose(blind | {"leak": 0.95}) == ()
    (told,) = (check for check in fill_in({"leak": 0.9}, (), {"leak": ("change", "by pixels")}) if check.figure)
    assert told.verdict == "bad" and (told.what, told.method) == ("change", "by pixels")
