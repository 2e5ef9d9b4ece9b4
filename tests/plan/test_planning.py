import json

import pytest
import torch
from said import line, names, naming
from typer.testing import CliRunner

from lorakit import __main__
from lorakit.base import model as bases
from lorakit.config import Config
from lorakit.plan import memory, planning
from lorakit.presets import preset

GIB = 2**30


def made_up(base, config, *, size, dtype, device=None) -> memory.Prediction:
    """A prediction in seconds' place: activations go with area and batch, checkpointing leaves a fifth, NF4 half."""
    made_up.calls += 1
    activations = int(4 * GIB * config.at_once * size[0] * size[1] / 512**2)
    return memory.Prediction(
        weights=GIB // (1 if config.quantize == "none" else 2), adapter=GIB // 10, gradients=GIB // 10,
        optimizer=GIB // {"adamw": 5}.get(config.optimizer, 20),
        activations=activations // (5 if config.gradient_checkpointing else 1), file_size=10**7, flops=10**12,
        seconds=1.0, size=size, batch_size=config.batch_size, precision=str(dtype),
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    made_up.calls = 0
    monkeypatch.setattr(memory, "predict", made_up)


def chosen(gib: float | None, **changes) -> planning.Plan:
    config = Config(**({"steps": 100, "batch_size": 4} | changes))
    free = None if gib is None else int(gib * GIB)
    return planning.choose_settings(bases.known("sd15"), config, free, dtype=torch.float16)


def test_a_large_card_changes_nothing(quick):
    config = Config(steps=100, batch_size=4)
    picked = planning.choose_settings(bases.known("sd15"), config, 40 * GIB, dtype=torch.float16)
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
    assert len(picked.changes) == len(changes)  # each is told
    told = [value for value in changes.values() if value not in (True, "nf4")]
    assert names("\n".join(picked.changes), *told)
    assert picked.prediction.peak <= 0.9 * gib * GIB
    assert (picked.config.batch_size, picked.config.gradient_accumulation_steps) == (4, 1)  # the same learning


def test_a_bucket_has_room_for_its_shortest_side(quick):
    assert chosen(1.6, min_bucket_side=512).config.resolution == 512
    assert chosen(1.0, min_bucket_side=384, max_bucket_side=640).config.resolution == 384


def test_where_nothing_helps_it_says_so(quick):
    picked = chosen(1.0)
    assert picked.fits is False and picked.config.resolution == 256
    assert names(picked.describe(), memory.readable_bytes(picked.prediction.peak), *picked.changes)
    made_up.calls = 0
    # Even held in NF4 the base alone is too large: nothing below is tried.
    assert chosen(0.5).fits is False and made_up.calls == 4


def test_unknown_memory_changes_nothing(quick):
    assert chosen(None).fits is None and chosen(None).changes == ()


def test_an_answer_is_kept_and_found_again(quick, tmp_path):
    base, config = bases.known("sd15"), Config(steps=100)
    ask = lambda config: planning.predict_cached(  # noqa: E731
        base, config, size=(512, 512), dtype=torch.float16, device="cuda", store=tmp_path
    )
    first = ask(config)
    assert ask(config.with_(steps=7, seed=3)) == first and made_up.calls == 1  # neither takes memory
    ask(config.with_(rank=8))
    assert made_up.calls == 2
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert ask(config) == first and made_up.calls == 3


def test_predictions_work_where_nothing_can_be_kept(quick, tmp_path):
    (tmp_path / "file").write_text("")
    base = bases.known("sd15")
    answer = planning.predict_cached(
        base, Config(steps=1), size=(512, 512), dtype=torch.float16, device="cuda", store=tmp_path / "file"
    )
    assert answer.peak > GIB


def test_cards_and_bases_are_known_by_name(quick, tmp_path):
    rows = planning.plan_for_cards(bases.known("sd15"), Config(steps=1000), store=tmp_path)
    assert [row.card.name for row in rows][:5] == ["T4", "3060", "3090", "4090", "A100"]
    assert rows[0].minutes > rows[3].minutes > 0
    assert rows[0].plan.prediction.precision == "torch.float16" and "bfloat16" in rows[1].plan.prediction.precision
    with pytest.raises(ValueError, match=naming("T5", *planning.CARDS)):
        planning.plan_for_cards(bases.known("sd15"), Config(steps=1), ["T5"], store=tmp_path)
    with pytest.raises(ValueError, match=naming("flux", *bases.KNOWN)):
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
    assert base.vae_factor == 8 and base.name == bases.KNOWN[name]
    with torch.device("meta"):
        built = UNet2DConditionModel.from_config(base.configs["unet"])
    assert sum(weight.numel() for weight in built.parameters()) == unet
    assert len(targets.target_names(built)) == modules
    assert preset("style", family).base == bases.KNOWN[name] or name == "sd21-base"


def test_the_shipped_text_encoders_and_autoencoders_have_the_published_sizes():
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    count = lambda model: sum(weight.numel() for weight in model.parameters())  # noqa: E731
    sizes = {}
    with torch.device("meta"):
        for name in bases.KNOWN:
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


def test_what_is_adapted_decides_which_prediction_is_kept(quick, tmp_path):
    base, asked = bases.known("sd15"), Config(steps=1)
    kinds = [
        {}, {"algorithm": "loha"}, {"algorithm": "lokr"}, {"algorithm": "lokr", "lokr_factor": 4}, {"clip_skip": 2},
        {"text_encoder_rate": 1e-4}, {"text_encoder_rate": 1e-4, "train_unet": False}, {"batch_size": 4},
        {"batch_size": 4, "micro_batch_size": 2},
    ]  # fmt: skip
    for _ in range(2):
        for changes in kinds:
            config = asked.with_(**changes)
            planning.predict_cached(base, config, size=(512, 512), dtype=torch.float16, device="cuda", store=tmp_path)
        assert made_up.calls == len(kinds)


def test_apples_devices_get_no_rung_that_needs_bitsandbytes(monkeypatch):
    asked = Config(steps=1, batch_size=2)
    assert any(rung.quantize == "nf4" for rung in planning.ladder(asked))
    monkeypatch.setattr(planning, "choose_device", lambda name: torch.device("mps"))
    assert {(rung.quantize, rung.optimizer) for rung in planning.ladder(asked)} == {("none", "adamw")}
