"""The panel of a run, without a page: what it reads, what it asks for, what it shows."""

import json
import threading
import time

import pytest
from panels import tone, words
from said import names, naming

from lorakit import config as configs
from lorakit import demo, plan, presets
from lorakit.plan import store as stores
from lorakit.plots import TONES
from lorakit.widgets.parts import span
from lorakit.widgets.settings import FIRST, GUIDE, USUAL, Settings, advice, preset
from lorakit.widgets.training import Curves, Training, phase


def line(step, loss, **more):
    return json.dumps({"step": step, "loss": loss, "learning_rate": 1e-4, "epoch": 1, "seconds": step / 2} | more)


# ── The log ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_log_is_read_on_from_where_it_was_read_to(tmp_path):
    file, curves = tmp_path / "log.jsonl", Curves()
    assert not curves.read(file, 0)
    file.write_text(line(1, 0.5) + "\n" + line(2, 0.4)[:20])  # the second one is being written
    assert curves.read(file, 2) and curves.steps == [1]
    assert not curves.read(file, 2)
    file.write_text("\n".join([line(1, 0.5), line(2, 0.4), line(3, 0.3, validation_loss=0.6, overfit_gap=0.1)]) + "\n")
    assert curves.read(file, 3)
    assert (curves.steps, curves.losses) == ([1, 2, 3], [0.5, 0.4, 0.3])
    assert (curves.validation, curves.last("overfit_gap"), curves.pace) == ([(3, 0.6)], 0.1, 0.5)
    assert curves.chart("a run", 10).svg().startswith("<svg")


def test_a_run_that_goes_back_is_read_anew(tmp_path):
    file, curves = tmp_path / "log.jsonl", Curves()
    file.write_text("".join(line(step, 0.5) + "\n" for step in range(1, 6)))
    curves.read(file, 5)
    file.write_text("".join(line(step, 0.4) + "\n" for step in range(1, 4)))
    assert curves.read(file, 3) and curves.steps == [1, 2, 3] and set(curves.losses) == {0.4}


def test_a_damaged_line_hides_no_other(tmp_path):
    file, curves = tmp_path / "log.jsonl", Curves()
    file.write_text(f"{line(1, 0.5)}\n\x00\x00 no line\n{line(2, 0.4)}\n")
    assert curves.read(file, 2) and curves.steps == [1, 2]


@pytest.mark.parametrize(("seconds", "said"), [(5, "5 s"), (89, "89 s"), (600, "10 min"), (7260, "2 h 1 min")])
def test_times_are_said_as_people_do(seconds, said):
    assert span(seconds) == said


# ── The run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_panel_trains_and_shows_what_there_is(settings, tmp_path, capsys):
    panel = Training(settings.with_(validation_share=0.2, validate_every=2), tmp_path / "run")
    result = panel.train()
    assert result.lora.is_file() and names(words(panel.head.value), "thing.safetensors", 6)
    assert tone(panel.head.value) == "good"
    assert panel.bar.value == 1 and panel.bar.bar_style == "success" and panel.stop.disabled
    (_, early), last = panel.curves.validation[0], panel.curves.validation[-1]
    assert "<svg" in panel.plot.value and names(
        words(panel.figures.value), f"{last[1]:.4f}", f"{panel.curves.last('overfit_gap'):.2f}"
    )
    assert last[0] == 6 and last[1] != early and names(words(panel.advice.value), 3)  # validations: too few
    assert names(words(panel.samples.value), 6) and "data:image/jpeg" in panel.samples.value
    assert names(words(panel.lines.value), "proof")


def test_the_rate_that_prodigy_found_is_shown(settings, tmp_path):
    panel = Training(
        settings.with_(optimizer="prodigy", learning_rate=1.0, schedule="constant", steps=24), tmp_path / "run"
    )
    panel.train()
    found = [json.loads(text)["own_rate"] for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert found[0] == 1e-6 and found == sorted(found) and found[-1] > 1e-6  # it starts at a millionth, and grows
    assert names(words(panel.figures.value), f"{found[-1]:.1e}", "Prodigy")


def test_what_is_clicked_reaches_the_run(settings, tmp_path):
    panel = Training(settings.with_(steps=400, sample_every=400, save_every=400), tmp_path / "run")

    def click():
        while panel.control.step < 2:
            time.sleep(0.01)
        panel.rate.value = 2e-4
        panel._use_rate()
        panel.prompts.value = "one\n\n  two  "
        panel._use_prompts()
        panel.stop.click()

    person = threading.Thread(target=click)
    person.start()
    result = panel.train()
    person.join()
    assert result.lora is None and names(words(panel.head.value), result.steps, 400)
    assert panel.bar.bar_style == tone(panel.head.value) == "warning"
    assert panel.control.learning_rate == 2e-4 and panel.control.prompts == ["one", "two"]
    asked = [json.loads(text).get("asked") for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert asked[-1] == {"learning_rate": 2e-4, "prompts": ["one", "two"]}
    again = Training(settings.with_(steps=400, sample_every=400, save_every=400), tmp_path / "run")
    again.control.stop.set()  # of an earlier start: it does not hold for this one

    def stop():
        while again.control.step <= result.steps:
            time.sleep(0.01)
        again.stop.click()

    threading.Thread(target=stop, daemon=True).start()
    assert again.train().steps > result.steps


def test_what_is_no_learning_rate_is_not_asked_for(settings, tmp_path):
    panel = Training(settings, tmp_path / "run")
    panel.rate.value = 0
    panel._use_rate()
    assert panel.control.learning_rate is None and tone(panel.answer.value) == "bad"
    panel.rate.value = 2e-4
    panel._use_rate()
    assert names(words(panel.answer.value), "0.0002") and tone(panel.answer.value) == "good"


def test_an_error_is_told_and_raised(settings, tmp_path):
    panel = Training(settings.with_(dataset=str(tmp_path / "nowhere")), tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        panel.train()
    assert "nowhere" in panel.head.value and panel.bar.bar_style == "danger"


# ── Settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_preset_fills_every_field():
    for kind in ("character", "style", "object", "clothing"):
        for base, family in (("sd15", "sd15"), ("sd21", "sd2"), ("sdxl", "sdxl")):
            assert preset(kind, base).with_(base=base) == presets.preset(kind, family).with_(base=base)
        assert preset(kind, "demo") == demo.config(kind=kind)
    for kind, base, family in (("character", "sd15", "sd15"), ("style", "sd21", "sd2"), ("object", "sdxl", "sdxl")):
        assert Settings(kind, base, dataset="d").config == presets.preset(kind, family).with_(dataset="d")
    assert Settings("clothing", "demo").config == demo.config(kind="clothing")


def test_every_setting_has_a_field_and_every_field_can_be_filled():
    panel = Settings("style", "demo")
    assert set(panel.fields) == set(configs.Config.model_fields) - {"base", "kind"}
    wanted = demo.config(
        kind="style", block_ranks={"mid_block": 8}, sample_prompts=("a", "b"), flip=True, ema_decay=0.99,
        schedule="linear", regularisation="class", learning_rate=3.3e-5, bucket_rule="least_crop",
    )  # fmt: skip
    panel._fill(wanted)
    assert panel.config == wanted


def test_what_is_wrong_is_told_while_it_is_typed():
    panel = Settings("style", "demo")
    panel.fields["rank"].value = "many"
    assert names(words(panel.message.value), "rank", "many")
    with pytest.raises(ValueError, match=naming("rank", "many")):
        panel.config  # noqa: B018
    panel.fields["rank"].value = "8"
    assert panel.message.value == "" and panel.config.rank == 8
    panel.kind.value = "object"
    assert panel.config == demo.config(kind="object")


def test_settings_are_taken_up_again_by_the_same_call_alone(tmp_path):
    store = tmp_path / "settings.json"
    panel = Settings("style", "demo", store=store, trigger="flatto")
    panel.fields["rank"].value = "8"
    assert panel.config.rank == 8
    assert Settings("style", "demo", store=store, trigger="flatto").config.rank == 8
    assert Settings("style", "demo", store=store, trigger="other").config.rank == 32
    assert Settings("style", "demo", store=store, trigger="flatto").config.rank == 8  # the other's took nothing away
    store.write_text("{")
    assert Settings("style", "demo", store=store, trigger="flatto").config.rank == 32


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))


def test_settings_are_kept_as_a_preset_and_picked_again(at_home):
    panel = Settings("style", "sd15", trigger="flatto", dataset="d")
    assert [value for _, value in panel.presets.options] == [GUIDE, USUAL]
    panel.fields["rank"].value, panel.preset_name.value = "8", "crisp"
    panel.keep()
    assert names(words(panel.preset_message.value), "crisp") and tone(panel.preset_message.value) == "good"
    assert panel.presets.value == "crisp" and panel.config.rank == 8
    panel.kind.value = "object"  # the usual again
    assert panel.presets.value == "" and panel.config == presets.preset("object").with_(trigger="flatto", dataset="d")

    other = Settings("character", "sdxl", dataset="pictures")
    other.fields["trigger"].value = "sks"
    other.presets.value = "crisp"
    config = other.config
    assert (other.kind.value, other.base.value, other.presets.value) == ("style", "sd15", "crisp")
    assert (config.rank, config.resolution, config.trigger, config.dataset) == (8, 512, "sks", "pictures")
    other.presets.value = ""
    assert other.config == presets.preset("style").with_(dataset="pictures")


def test_a_preset_of_another_base_and_one_of_none(at_home):
    presets.save_preset("hub", configs.Config(steps=5, base="owner/name"))
    presets.save_preset("local", configs.Config(steps=6, base="/models/x"))
    panel = Settings("style", "demo")
    panel.presets.value = "hub"
    assert panel.config.base == "owner/name" and panel.config.steps == 5
    panel.base.value = "demo"
    panel.presets.value = "local"
    assert panel.config.base == "demo" and panel.config.steps == 6


def test_what_cannot_be_kept_or_picked_is_told(at_home):
    panel = Settings("style", "demo")
    panel.preset_name.value = "style"
    panel.keep()
    assert (
        names(words(panel.preset_message.value), "style")
        and tone(panel.preset_message.value) == "bad"
        and presets.own_presets() == []
    )
    panel.preset_name.value, panel.fields["rank"].value = "mine", "many"
    panel.keep()
    assert names(words(panel.preset_message.value), "rank", "many") and presets.own_presets() == []
    panel.fields["rank"].value = "4"
    panel.keep()
    (presets.home() / "presets" / "mine.json").write_text("{")
    panel.presets.value = ""
    panel.presets.value = "mine"
    assert names(words(panel.preset_message.value), "mine") and tone(panel.preset_message.value) == "bad"
    assert panel.config == demo.config(kind="style")


def test_the_guide_has_something_to_say_of_what_matters():
    assert names(advice("steps", "style", "sd15"), "2000–4000", "style")
    assert names(advice("rank", "character", "sdxl"), "128–256") and advice("seed", "style", "sd15") == ""
    assert all(name in configs.Config.model_fields for name in FIRST)


def test_a_plan_is_told_before_anything_is_loaded(monkeypatch):
    costs, count = [], stores.step_cost
    monkeypatch.setattr(stores, "step_cost", lambda *a, **k: costs.append(count(*a, **k)) or costs[-1])
    told = plan.predict(demo.config())._repr_html_()
    assert len(costs) == 1 and tone(told) == "good" and TONES["bad"] not in told
    assert names(words(told), "5.6 MB", 400, "cpu")
    monkeypatch.setattr("lorakit.base.open", lambda *_: pytest.fail("it would be asked from the hub"))
    monkeypatch.setattr(stores, "step_cost", lambda *_, **__: costs[0])  # plan/test_planning.py has that of SD 1.5
    told = plan.predict(presets.preset("style").with_(dataset="demo"))._repr_html_()
    assert TONES["bad"] in told and names(words(told), "stable-diffusion-v1-5")  # it would take days on a CPU


def test_the_phases_are_the_guides():
    assert names(phase(0), "basic features", 500, 1000) and names(phase(500), "details", 2000, 1000)
    assert "first look" not in phase(1000) and names(phase(4000), "polish", 5000)
