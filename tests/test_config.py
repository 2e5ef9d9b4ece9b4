import json
import sys
from itertools import product

import pytest
from said import names, naming

from lorakit import config, named, presets
from lorakit.config import Config
from lorakit.presets import preset


def test_every_preset_agrees_with_the_guide():
    # kind: (rank, alpha, steps) as the guide's tables give their ranges
    ranges = {
        "character": ((32, 64), (16, 32), (3000, 5000)),
        "style": ((16, 32), (8, 32), (2000, 4000)),
        "object": ((16, 32), (8, 16), (2500, 4000)),
        "clothing": ((16, 64), (8, 32), (3000, 5000)),
    }
    for kind, family in product(ranges, ("sd15", "sd2", "sdxl")):
        settings, (rank, alpha, steps) = preset(kind, family), ranges[kind]
        if family == "sdxl":
            rank, alpha = (128, 256), (64, 128)
        assert rank[0] <= settings.rank <= rank[1], (kind, family)
        assert alpha[0] <= settings.alpha <= alpha[1], (kind, family)
        assert settings.alpha in (settings.rank / 2, settings.rank)
        assert steps[0] <= settings.steps <= steps[1]
        assert (settings.learning_rate, settings.batch_size, settings.save_every) == (1e-4, 1, 500)
    assert preset("style", "sdxl").resolution == 1024
    assert preset("style").resolution == 512


def test_a_preset_takes_changes():
    changed = preset("style", "sd15", dataset="photos", trigger="sks style", epochs=3)
    assert changed == preset("style").with_(dataset="photos", trigger="sks style", epochs=3)
    assert (changed.steps, preset("style").dataset) == (None, "dataset")
    with pytest.raises(ValueError, match=naming("rnk")):
        preset("style", rnk=4)


def test_a_config_shows_what_differs_from_the_defaults_first():
    changed = preset("style", trigger="<sks>", block_ranks={"mid_block": 8})
    text, html = str(changed), changed._repr_html_()
    names_shown = [line.split()[0] for line in text.splitlines()[:-1]]
    assert names_shown == ["base", "name", "kind", "trigger", "block_ranks", "steps"]
    assert names(text, "my_style_v1", "<sks>", "{'mid_block': 8}", 2000, len(Config.model_fields) - 6)
    assert "&lt;sks&gt;" in html and "<sks>" not in html
    first, folded = html.split("<details>")
    for name in Config.model_fields:
        assert f"{name} " in (first if name in names_shown else folded)
    assert repr(Config(base="demo", steps=5)) == "Config(base='demo', steps=5)"
    assert eval(repr(changed)) == changed


def test_every_problem_of_a_config_is_told_at_once():
    with pytest.raises(ValueError, match=naming("resolution", 500, "debiased", "min_timestep", 500)):
        Config(steps=1, resolution=500, debiased=True, min_timestep=500, max_timestep=400)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=naming("landscape", "character", "style", "object", "clothing", *named.NAMED)):
        preset("landscape")


def test_a_config_survives_json(tmp_path):
    settings = preset("style").with_(sample_prompts=["a", "b"], epochs=3)
    (tmp_path / "c.json").write_text(settings.to_json())
    assert config.load(tmp_path / "c.json") == settings


def test_settings_are_frozen():
    with pytest.raises(ValueError):
        preset("style").rank = 4


def test_all_problems_are_told_together_with_the_nearest_name(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"steps": 5, "learning_rat": 1, "rank": 0}))
    with pytest.raises(ValueError) as caught:
        config.load(tmp_path / "c.json")
    assert names(str(caught.value), "learning_rat", "learning_rate", "rank", 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": None}, ("steps", "epochs")),
        ({"steps": 3, "epochs": 2}, ("steps", 3, "epochs", 2)),
        ({"resolution": 500}, ("resolution", 500, 448, 512)),
        ({"warmup_steps": 10}, ("warmup_steps", "constant", "constant_with_warmup")),
        ({"warmup_steps": 2.5, "schedule": "cosine"}, ("warmup_steps", 2.5)),
        ({"optimizer": "prodigy"}, ("optimizer", "prodigy", "learning_rate", 0.0001, 1.0)),
        ({"optimizer": "adamw_schedulefree", "schedule": "cosine"}, ("adamw_schedulefree", "schedule", "cosine")),
        ({"optimizer": "adamw_schedulefree", "ema_decay": 0.99}, ("adamw_schedulefree", "ema_decay")),
        ({"debiased": True}, ("debiased", "min_snr_gamma")),
        ({"min_bucket_side": 576}, ("min_bucket_side", 576, "max_bucket_side", "resolution", 512)),
        ({"max_bucket_side": 448}, ("min_bucket_side", "max_bucket_side", 448, "resolution", 512)),
        ({"bucket_rule": "nearest"}, ("bucket_rule", "nearest", "kohya", "no_upscale", "least_crop")),
        ({"min_timestep": 500, "max_timestep": 400}, ("min_timestep", 500, "max_timestep", 400)),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, named):
    with pytest.raises(ValueError, match=naming(*named)):
        preset("style").with_(**changes)


def test_length_is_counted_kohyas_way():
    # 30 pictures × 5 repeats × 10 epochs / batch 1 = 1500 steps
    assert preset("style").with_(epochs=10).total_steps(batches_per_epoch=150) == 1500
    assert (
        preset("style").with_(epochs=2, gradient_accumulation_steps=4).total_steps(10) == 6
    )  # 3 an epoch, the last short
    assert preset("style").with_(steps=77).total_steps(150) == 77


def test_a_missing_or_broken_file_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming("none.json")):
        config.load(tmp_path / "none.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match=naming("c.json")):
        config.load(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ValueError, match=naming("c.json", "list")):
        config.load(tmp_path / "c.json")


def test_a_dataset_beside_the_config_file_is_found(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "c.json").write_text(json.dumps({"steps": 5, "dataset": "pictures"}))
    monkeypatch.chdir("/")
    assert config.load(tmp_path / "c.json").dataset == str(tmp_path / "pictures")


def test_one_prompt_may_be_given_bare():
    assert Config(steps=1, sample_prompts="a cat").sample_prompts == ("a cat",)


def test_rates_of_text_encoders():
    both = ("text_encoder", "text_encoder_2")
    settings = Config(steps=1)
    assert settings.text_rates(both) == {} and not settings.several_rates
    assert settings.with_(text_encoder_rate=1e-5).text_rates(both) == {"text_encoder": 1e-5, "text_encoder_2": 1e-5}
    assert settings.with_(text_encoder_rate=1e-5, text_encoder_2_rate=0).text_rates(both) == {"text_encoder": 1e-5}
    assert settings.with_(text_encoder_2_rate=1e-5).text_rates(both) == {"text_encoder_2": 1e-5}
    with pytest.raises(ValueError, match=naming("train_unet")):
        settings.with_(train_unet=False)
    prodigy = {"optimizer": "prodigy", "learning_rate": 1.0}
    assert settings.with_(text_encoder_rate=1.0, **prodigy).optimizer == "prodigy"
    for changes in ({"text_encoder_rate": 0.5}, {"block_rates": {"mid_block": 0.5}}, {"learning_rate_ratio": 4}):
        with pytest.raises(ValueError, match=naming("prodigy", "learning_rate", "learning_rate_ratio", "block_rates")):
            settings.with_(**prodigy, **changes)


# ── Presets of the user's own ───────────────────────────────────────────────────────────────────────────────────────


def test_a_quick_run_is_half_as_long_and_else_what_the_preset_says():
    for kind in ("style", "character"):
        usual, quick = preset(kind, "sdxl"), presets.quick(preset(kind, "sdxl"))
        unlike = {name for name in Config.model_fields if getattr(usual, name) != getattr(quick, name)}
        assert unlike == {"steps", *presets.QUICK} and quick.steps == usual.steps // 2
    assert presets.quick(Config(epochs=9)).epochs == 4 and presets.quick(Config(epochs=1)).steps is None
    with pytest.raises(ValueError, match=naming("initialisation", "eva", "start_from")):
        presets.quick(Config(steps=9, start_from="one.safetensors"))


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "presets"


def test_what_worked_is_kept_and_begun_with_again(at_home):
    worked = preset("style", "sdxl").with_(
        rank=24, schedule="cosine", epochs=7, block_ranks={"mid_block": 8}, dataset="/home/me/pictures", trigger="sks",
        sample_prompts=("sks cat",), backup="/mnt/drive", mask="masks", device="cpu", validation_share=0.1,
    )  # fmt: skip
    assert presets.own_presets() == []
    file = presets.save_preset("crisp lines", worked)
    assert file == at_home / "crisp lines.json" and presets.own_presets() == ["crisp lines"]
    again = preset("crisp lines")
    assert again.name == "my_crisp lines_v1" and again.base == worked.base and again.epochs == 7
    unlike = {name for name in Config.model_fields if getattr(again, name) != getattr(worked, name)}
    assert unlike == {"dataset", "name", "trigger", "sample_prompts", "backup", "mask", "device"}
    assert "/" not in file.read_text().replace(worked.base, "") and "sks" not in file.read_text()
    presets.save_preset("v", Config(steps=5, base="owner/v", prediction_type="v_prediction", zero_terminal_snr=True))
    assert preset("v").prediction_type == "v_prediction" and preset("v", "sdxl").prediction_type == "auto"
    assert not preset("v", "sdxl").zero_terminal_snr
    (at_home / "v.json").unlink()
    assert preset("crisp lines", "sd15").base == named.OF_FAMILY["sd15"].reference
    presets.save_preset("crisp lines", worked.with_(rank=8))  # its owner may change it
    assert preset("crisp lines").rank == 8


@pytest.mark.parametrize("base", ["/models/x", "~/x", "./x", "a/b/c", "C:\\models\\x", "x/y.safetensors", "here"])
def test_a_base_that_is_a_place_is_not_kept(at_home, tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    file = presets.save_preset("mine", Config(steps=5, base=base, prediction_type="v_prediction"))
    assert not {"base", "prediction_type", "zero_terminal_snr"} & json.loads(file.read_text()).keys()
    assert (
        preset("mine").base == named.OF_FAMILY["sd15"].reference
        and preset("mine", "sdxl").base == named.OF_FAMILY["sdxl"].reference
    )
    for known in ("demo", "owner/name"):
        presets.save_preset("mine", Config(steps=5, base=known))
        assert preset("mine").base == known


def test_a_class_that_the_base_is_asked_for_is_not_kept(at_home):
    """Without trigger and class word the settings would not be valid."""
    asking = Config(steps=5, prior_prediction=True, trigger="sks", class_word="dog", prior_weight=0.5)
    presets.save_preset("mine", asking)
    assert preset("mine").prior_weight == 0.5 and not preset("mine").prior_prediction


@pytest.mark.parametrize("name", ["", " a", "a/b", "../a", "a.", "a\\b", ".a", "x" * 65, "a\nb"])
def test_what_is_no_name_is_refused(at_home, name):
    with pytest.raises(ValueError, match=naming(repr(name))):
        presets.save_preset(name, Config(steps=5))
    assert not at_home.exists()


def test_built_in_presets_stay_what_they_are(at_home):
    for name in ("style", "Style"):
        with pytest.raises(ValueError, match=naming(name)):
            presets.save_preset(name, Config(steps=5))
    assert not at_home.exists()
    at_home.mkdir(parents=True)
    (at_home / "style.json").write_text('{"steps": 1}')
    assert preset("style").steps == 2000 and presets.own_presets() == []


def test_a_preset_that_is_damaged_or_out_of_date_is_told_in_words(at_home):
    file = presets.save_preset("mine", Config(steps=5))
    file.write_text("{")
    with pytest.raises(ValueError, match=naming("mine", "line 1 column 2")):
        preset("mine")
    file.write_text("[]")
    with pytest.raises(ValueError, match=naming("mine", "list")):
        preset("mine")
    file.write_text('{"steps": 5, "learning_rat": 1, "rank": 0}')
    with pytest.raises(ValueError, match=naming("mine", "rank", 0, "learning_rat", "learning_rate")):
        preset("mine")
    with pytest.raises(ValueError, match=naming("other", "mine")):
        presets.kept("other")
    with pytest.raises(ValueError, match=naming("other", "mine", "style")):
        preset("other")
    with pytest.raises(ValueError, match=naming("mine", "sd3", "sdxl")):
        preset("mine", "sd3")


@pytest.mark.parametrize(
    ("system", "variables", "place"),
    [
        ("linux", {"XDG_CONFIG_HOME": "/x"}, "/x/lorakit"), ("linux", {}, "/me/.config/lorakit"),
        ("darwin", {}, "/me/Library/Application Support/lorakit"), ("win32", {"APPDATA": "/r"}, "/r/lorakit"),
        ("win32", {"LORAKIT_HOME": "/own"}, "/own"),
    ],
)  # fmt: skip
def test_presets_are_where_the_system_keeps_settings(monkeypatch, system, variables, place):
    for name in ("LORAKIT_HOME", "XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/me")
    monkeypatch.setattr(sys, "platform", system)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert presets.home().as_posix() == place
