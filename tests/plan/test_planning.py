"""Predictions of runs, and settings that fit."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from said import line, names, naming
from test_memory import made_up as step_cost
from typer.testing import CliRunner

import lorakit as lk
from lorakit import __main__, named
from lorakit.base import model as bases
from lorakit.config import Config
from lorakit.plan import cards, memory, planning
from lorakit.plan.cards import Card
from lorakit.plan.prediction import Prediction
from lorakit.plots import TONES
from lorakit.presets import preset

GIB = 2**30


def made_up(base, config, *, size, dtype, device=None) -> memory.StepCost:
    """A made-up cost: activations go with area and batch, checkpointing leaves a fifth, NF4 half."""
    made_up.calls += 1
    activations = int(4 * GIB * config.at_once * size[0] * size[1] / 512**2)
    return memory.StepCost(
        weights=GIB // (1 if config.quantize == "none" else 2), adapter=GIB // 10, gradients=GIB // 10,
        optimizer=GIB // {"adamw": 5}.get(config.optimizer, 20),
        activations=activations // (5 if config.gradient_checkpointing else 1), file_size=10**7, flops=10**12,
        seconds=1.0, size=size, batch_size=config.batch_size, precision=str(dtype).removeprefix("torch."),
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    made_up.calls = 0
    monkeypatch.setattr(memory, "count_step", made_up)


def chosen(gib: float | None, **changes) -> Prediction:
    config = Config(**({"steps": 100, "batch_size": 4} | changes))
    return planning.choose_settings(bases.known("sd15"), config, Card("", gib, bf16=False))


def test_a_large_card_changes_nothing(quick):
    config = Config(steps=100, batch_size=4)
    picked = planning.choose_settings(bases.known("sd15"), config, Card("", 40))
    assert (picked.config, picked.fits, picked.changes) == (config, True, ())


FEWEST_BITS = {"gradient_checkpointing": True, "optimizer": "adamw8bit", "quantize": "nf4"}


@pytest.mark.parametrize(
    ("gib", "changes"),
    [
        (6.0, {"gradient_checkpointing": True}),
        (5.0, {"gradient_checkpointing": True, "optimizer": "adamw8bit"}),
        (4.4, FEWEST_BITS),
        (2.7, FEWEST_BITS | {"micro_batch_size": 2}),
        (1.8, FEWEST_BITS | {"micro_batch_size": 1}),
        (1.6, FEWEST_BITS | {"micro_batch_size": 1, "resolution": 448}),
    ],
)
def test_the_fastest_settings_that_fit_are_taken(quick, gib, changes):
    picked = chosen(gib)
    assert picked.fits and picked.config == Config(steps=100, batch_size=4, **changes)
    assert len(picked.changes) == len(changes)  # one sentence for each
    told = [value for value in changes.values() if value not in (True, "nf4")]
    assert names("\n".join(picked.changes), *told)
    assert picked.cost.peak <= 0.9 * gib * GIB
    assert (picked.config.batch_size, picked.config.gradient_accumulation_steps) == (4, 1)  # the same learning


def test_a_bucket_has_room_for_its_shortest_side(quick):
    assert chosen(1.6, min_bucket_side=512).config.resolution == 512
    assert chosen(1.0, min_bucket_side=384, max_bucket_side=640).config.resolution == 384


def test_where_nothing_helps_it_says_so(quick):
    picked = chosen(1.0)
    assert picked.fits is False and picked.config.resolution == 256
    assert names(picked.describe(), memory.readable_bytes(picked.cost.peak), *picked.changes)
    made_up.calls = 0
    # Even held in NF4 the base alone is too large: nothing below is tried.
    assert chosen(0.5).fits is False and made_up.calls == 4


def test_the_largest_resolution_and_batch_of_each_card(monkeypatch, tmp_path):
    """By a made-up cost: a GiB, and 8000 bytes a pixel of each picture."""
    asked: list = []
    peak = lambda side, batch: 2**30 + 8000 * side**2 * batch  # noqa: E731

    def cost(base, config, *, size, dtype, device, store):
        asked.append(size)
        return peak(size[0], config.batch_size)

    monkeypatch.setattr(planning.stores, "step_cost", cost)
    monkeypatch.setattr(planning, "verdict", lambda bytes_, free: SimpleNamespace(fits=bytes_ <= 0.9 * free))
    answers = planning.largest(bases.known("sd15"), Config(steps=1, resolution=512), store=tmp_path)
    assert answers.keys() == cards.CARDS.keys() and len(asked) < len(answers) * 8
    for name, answer in answers.items():
        room = 0.9 * cards.CARDS[name].free
        sides = [side for side in planning.SIDES if peak(side, 1) <= room]
        batches = [batch for batch in planning.BATCHES if peak(512, batch) <= room]
        assert answer == (max(sides, default=None), max(batches, default=None)), name
    assert answers["1660"] == (640, 2) and answers["4090"] == (1536, 8) and answers["Apple 8 GB"] == (640, 1)


def test_apples_computers_are_known_by_their_memory(tmp_path):
    assert cards.card("apple 16gb").device == "mps" and cards.card("Apple 8 GB").memory < 8


def test_unknown_memory_changes_nothing(quick):
    assert chosen(None).fits is None and chosen(None).changes == ()


def test_cards_and_bases_are_known_by_name(quick, tmp_path):
    rows = planning.plan_for_cards(bases.known("sd15"), Config(steps=1000), store=tmp_path)
    by_name = {row.card.name: row for row in rows}
    guides = ("1660", "2060", "3060", "3070", "3080", "3090", "4080", "4090")  # the cards that the training guide names
    assert by_name.keys() >= {"T4", "A100", *guides}
    assert by_name["T4"].minutes > by_name["4090"].minutes > 0
    assert by_name["T4"].cost.precision == "float16" and "bfloat16" in by_name["3060"].cost.precision
    with pytest.raises(ValueError, match=naming("T5", *cards.CARDS)):
        planning.plan_for_cards(bases.known("sd15"), Config(steps=1), ["T5"], store=tmp_path)
    with pytest.raises(ValueError, match=naming("flux", *named.NAMED)):
        bases.known("flux")


@pytest.mark.parametrize(
    ("name", "family", "prediction", "resolution", "unet", "modules"),
    [
        ("sd15", "sd15", "epsilon", 512, 859_520_964, 192), ("sd21", "sd2", "v_prediction", 768, 865_910_724, 192),
        ("sd21-base", "sd2", "epsilon", 512, 865_910_724, 192), ("sdxl", "sdxl", "epsilon", 1024, 2_567_463_684, 722),
    ],
)  # fmt: skip
def test_the_shipped_configs_are_the_families_own(name, family, prediction, resolution, unet, modules):
    """By the published numbers of weights, and kohya's numbers of modules."""
    from diffusers import UNet2DConditionModel

    from lorakit.adapter import targets

    base = bases.known(name)
    assert (base.family, base.prediction_type, base.resolution) == (family, prediction, resolution)
    assert base.vae_factor == 8 and base.name == named.NAMED[name].reference
    with torch.device("meta"):
        built = UNet2DConditionModel.from_config(base.configs["unet"])
    assert sum(weight.numel() for weight in built.parameters()) == unet
    assert len(targets.target_names(built)) == modules
    assert preset("style", family).base == named.NAMED[name].reference or name == "sd21-base"


def test_the_shipped_text_encoders_and_autoencoders_have_the_published_sizes():
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    count = lambda model: sum(weight.numel() for weight in model.parameters())  # noqa: E731
    sizes = {}
    with torch.device("meta"):
        for name in named.FAMILY:
            configs = bases.known(name).configs
            sizes[name] = [count(AutoencoderKL.from_config(configs["vae"]))]
            sizes[name].append(count(CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))))
            if "text_encoder_2" in configs:
                sizes[name].append(count(CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"]))))
    assert sizes == {
        "sd15": [83_653_863, 123_060_480], "sd21": [83_653_863, 340_387_840], "sd21-base": [83_653_863, 340_387_840],
        "sdxl": [83_653_863, 123_060_480, 694_659_840],
    }  # fmt: skip


def test_the_command_plans_for_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["plan", "--base", "demo", "--card", "T4", "--rank", "8"]
    (row,) = json.loads(CliRunner().invoke(__main__.app, [*command, "--json"]).stdout)
    assert row["card"] == "T4" and row["fits"] is True and row["changes"] == []
    assert 0 < row["peak_gib"] < 1 and row["file_mb"] > 0 and row["estimated_minutes"] > 0
    assert abs(sum(row["parts_gib"].values()) - row["peak_gib"]) < 0.003
    assert list((tmp_path / "lorakit" / "predictions").iterdir())
    said = CliRunner().invoke(__main__.app, command).stdout.splitlines()
    assert names(line(said, "T4", "14.7 GiB"), 2000)  # steps, as the command has them


def test_apples_devices_get_no_rung_that_needs_bitsandbytes(monkeypatch):
    asked = Config(steps=1, batch_size=2)
    assert any(rung.quantize == "nf4" for rung in planning.ladder(asked))
    monkeypatch.setattr(planning, "choose_device", lambda name: torch.device("mps"))
    assert {(rung.quantize, rung.optimizer) for rung in planning.ladder(asked)} == {("none", "adamw")}


# ── Does it fit? ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_margin_decides():
    p = step_cost()
    assert planning.verdict(p, int(p.peak / 0.9) + 10).fits is True
    assert planning.verdict(p, int(p.peak / 0.9) - 10).fits is False
    assert planning.verdict(p, p.peak, margin=0.0).fits is True
    assert planning.verdict(p, None).fits is None
    assert names(str(planning.verdict(p, None)), "4.30 GiB")


def test_what_does_not_fit_comes_with_what_to_change():
    fits, text = planning.verdict(step_cost(), 4 * GIB)
    assert fits is False and names(text, "4.30 GiB", "4.00 GiB", "10%") and not names(text, "nf4")
    ways = ("gradient_checkpointing", "micro_batch_size", "adamw8bit", "resolution")
    places = [text.index(word) for word in ways]
    assert places == sorted(places)
    done = step_cost(gradient_checkpointing=True, batch_size=1, optimizer=GIB // 20)
    _, text = planning.verdict(done, 4 * GIB)
    assert [word for word in ways if names(text, word)] == ["resolution"]
    fits, text = planning.verdict(step_cost(), 2 * GIB)  # the frozen base takes it all
    assert fits is False and names(text, "nf4") and not any(names(text, word) for word in ways)


# ── A run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_card(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(cards, "free_memory_bytes", lambda _: 40 * GIB)


def test_a_run_is_predicted_from_its_config(quick, no_card, monkeypatch):
    monkeypatch.setattr(bases, "open", lambda *_: pytest.fail("it would be downloaded"))
    prediction = lk.plan.predict(lk.preset("style", "sd15", dataset="demo", trigger="sks style"))
    assert (prediction.steps, prediction.pictures, prediction.epoch_size) == (2000, 30, 300)
    assert prediction.fits and prediction.minutes is None and not prediction.problem
    text, html = str(prediction), prediction._repr_html_()
    assert repr(prediction) == text
    for shown in (text, re.sub("<[^>]*>", " ", html)):
        assert names(shown, "stable-diffusion-v1-5", "5.40 GiB", "4.00 GiB", "40.0 GiB", "2000 = 6.67 epochs", 30)
        assert names(shown, "9.5 MiB" if shown == text else "10.0 MB", "cpu", "float32")
    assert "width:10.0%" in html and "width:13.5%" in html  # activations and peak, of the free memory
    assert TONES["bad"] in html  # it would take days on a CPU


def test_a_run_is_predicted_for_another_card(quick, no_card):
    config = lk.preset("style", dataset="demo", epochs=2)
    prediction = lk.plan.predict(config, card="T4")
    assert (prediction.steps, prediction.cost.precision) == (600, "float16")
    assert names(str(prediction), "T4", "14.7 GiB", 600, f"{prediction.minutes:.0f} min")
    small = lk.plan.predict(
        config.with_(mixed_precision="no"), card=Card("mine", 3.0, tflops=50), base=bases.known("sd15")
    )
    assert small.fits and small.changes and small.cost.precision == "float32" and small.requested.peak > 5 * GIB
    assert TONES["warning"] in small._repr_html_() and TONES["bad"] not in small._repr_html_()
    assert small.minutes is None and "min (" not in str(small)  # the rate is that of half precision
    emulated = lk.plan.predict(config.with_(mixed_precision="bf16"), card="T4")
    assert (emulated.cost.precision, emulated.minutes) == ("bfloat16", None)
    nothing = lk.plan.predict(config, card=Card("mine", 0.5, tflops=50))
    assert nothing.fits is False and TONES["bad"] in nothing._repr_html_()
    with pytest.raises(ValueError, match=naming("T5", *cards.CARDS)):
        lk.plan.predict(config, card="T5")


@pytest.mark.parametrize(("allowed", "bits"), [(True, True), (True, False), (False, True)])
def test_a_run_on_this_machine_is_predicted_with_changes_it_can_make(quick, no_card, monkeypatch, allowed, bits):
    monkeypatch.setattr(planning.bases, "can_quantize", lambda _: bits)
    monkeypatch.setattr(cards, "free_memory_bytes", lambda _: int(0.9 * GIB))
    config = lk.preset("style", dataset="demo", resolution=256, gradient_checkpointing=False, fit_memory=allowed)
    prediction = lk.plan.predict(config.with_(batch_size=1))
    own = ["optimizer adamw8bit", "the base held in NF4"] if bits else []
    expected = ["gradient checkpointing (a third more work)", *own, "resolution 128"] if allowed else []
    assert (list(prediction.changes), prediction.fits) == (expected, allowed and bits)
    assert prediction.config in planning.ladder(config.with_(batch_size=1))


def test_without_the_dataset_what_is_unknown_is_said(quick, no_card, tmp_path):
    config = lk.preset("style", dataset=str(tmp_path / "photos"))
    prediction = lk.plan.predict(config, card="T4")
    assert (prediction.steps, prediction.pictures) == (2000, None) and prediction.minutes
    for shown in (str(prediction), prediction._repr_html_()):
        assert names(shown, "photos", "unknown", 2000)
    epochs = lk.plan.predict(config.with_(epochs=3), card="T4")
    assert epochs.steps is None and epochs.minutes is None and names(str(epochs), "unknown")
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=naming("photos")):  # no usable picture
        lk.plan.predict(config)


def test_unknown_memory_is_said(quick, no_card, monkeypatch):
    monkeypatch.setattr(cards, "free_memory_bytes", lambda _: None)
    prediction = lk.plan.predict(lk.preset("style", dataset="demo"))
    assert prediction.fits is None and names(str(prediction), "unknown", "5.40 GiB")
    assert prediction.facts()["memory_gib"] is None and "width:100.0%" in prediction._repr_html_()
