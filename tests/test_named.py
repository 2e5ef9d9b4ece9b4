"""Named bases: each fact is usable, and presets, planning, samples and the panel know them by name."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from said import names
from test_main import called, refused

from lorakit import base as bases
from lorakit import config as configs
from lorakit import named, presets, storage
from lorakit.dataset.tag_order import KINDS
from lorakit.run import preparation
from lorakit.widgets.settings import GUIDE, USUAL, Settings, advice

SOURCED = [base for base in named.NAMED.values() if base.megabytes]


@cache
def weights(configs: str) -> tuple[int, int]:
    """The numbers of weights of UNet and text encoders, and of the autoencoder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    of = bases.known(configs).configs
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(of["unet"]), AutoencoderKL.from_config(of["vae"])
        models = [unet, CLIPTextModel(CLIPTextConfig(**of["text_encoder"]))]
        if "text_encoder_2" in of:
            models.append(CLIPTextModelWithProjection(CLIPTextConfig(**of["text_encoder_2"])))
    count = [sum(weight.numel() for weight in model.parameters()) for model in (*models, vae)]
    return sum(count[:-1]), count[-1]


def test_the_table_has_the_bases_that_people_train_on():
    assert len(named.NAMED) >= 11
    assert {"sd15", "sd21", "sdxl", "illustrious-0.1", "illustrious-2.0", "noobai-1.1", "noobai-vpred-1.0"} <= set(
        named.NAMED
    )
    assert {family: base.name for family, base in named.OF_FAMILY.items()} == {
        "sd15": "sd15", "sd2": "sd21", "sdxl": "sdxl",
    }  # fmt: skip


@pytest.mark.parametrize("base", named.NAMED.values(), ids=named.NAMED)
def test_every_fact_can_be_used(base):
    assert storage.is_hub_id(base.reference) or storage.hub_file(base.reference)
    assert not configs.is_place(base.reference) and named.find(base.reference) is base
    configs.Config(steps=1, **base.settings)
    assert base.prompt.format("a cat").count("a cat") == 1
    assert set(base.tag_order) <= set(KINDS) and len(set(base.tag_order)) == len(base.tag_order)
    assert base.sources and all(address.startswith("https://") for address in base.sources)
    opened = bases.known(base.name)
    assert opened.family == base.family
    assert opened.prediction_type == base.settings.get("prediction_type", opened.prediction_type)
    if base.usual:
        configs.Config(steps=1, **base.usual.settings)
        assert base.usual.page.startswith("https://")


@pytest.mark.parametrize("base", SOURCED, ids=lambda base: base.name)
def test_the_sizes_are_those_of_the_weights_in_half_precision(base):
    """The VAE of a folder is fetched in float32. The files of NoobAI are 2.4 % larger than their weights."""
    others, vae = weights(base.configs)
    expected = 2 * others + (2 if storage.hub_file(base.reference) else 4) * vae
    assert base.megabytes * 1e6 == pytest.approx(expected, rel=0.03)


def test_presets_keep_the_guides_figures_or_take_the_usual_ones():
    for kind in ("character", "style", "object", "clothing"):
        for base in named.NAMED.values():
            guide, of_family = presets.preset(kind, base.name), presets.preset(kind, base.family)
            unlike = {name for name, value in guide if value != getattr(of_family, name)}
            of_base = {"base": base.reference} | base.settings
            assert unlike == {name for name, value in of_base.items() if value != getattr(of_family, name)}
            if base.usual:
                usual = presets.preset(kind, base.name, usual=True, trigger="sks")
                assert usual.model_dump() == guide.model_dump() | base.usual.settings | {"trigger": "sks"}
    v = presets.preset("character", "noobai-vpred-1.0")
    assert (v.prediction_type, v.zero_terminal_snr, v.rank, v.learning_rate) == ("v_prediction", True, 128, 1e-4)
    usual = presets.preset("character", "noobai-vpred-1.0", usual=True)
    assert (usual.rank, usual.alpha, usual.learning_rate, usual.text_encoder_rate) == (8, 4, 3e-4, 6e-5)
    assert usual.zero_terminal_snr and usual.steps == 3000
    with pytest.raises(ValueError, match="Stable Diffusion 2.1"):
        presets.preset("style", "sd21", usual=True)
    with pytest.raises(ValueError, match="noobai-1.1"):
        presets.preset("style", "flux")


def test_a_base_is_opened_by_its_name(small_bases, tmp_path, monkeypatch):
    """A folder of that name is preferred."""
    fetched = []
    monkeypatch.setattr(storage, "fetch_hub_file", lambda *where: fetched.append(where) or Path("NoobAI.safetensors"))
    monkeypatch.setattr(
        "lorakit.base.model._open_file", lambda file: dataclasses.replace(bases.known("sdxl"), file=file)
    )
    assert bases.open("noobai-1.1").file == Path("NoobAI.safetensors")
    assert fetched == [("Laxhar/noobai-XL-1.1", "NoobAI-XL-v1.1.safetensors", None)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sdxl").symlink_to(small_bases["sd15"])
    assert bases.open("sdxl").family == "sd15"
    with pytest.raises(FileNotFoundError, match="noobai-1.1"):
        bases.open("noobai-3")


def test_samples_of_captions_have_the_quality_tags_of_the_base(pictures):
    from lorakit.dataset import scan

    dataset, config = scan(pictures), presets.preset("style", "animagine-4")
    first = preparation._prompts(config, dataset)[0]
    assert first == "sks thing, number 0, masterpiece, high score, great score, absurdres"
    assert preparation._prompts(config.with_(base="demo"), dataset)[0] == "sks thing, number 0"


def test_the_commands_know_them():
    out, _ = called("info", "noobai-vpred-1.0")
    assert names(out, "v_prediction", "zero_terminal_snr", "people, character", "masterpiece", "7,110 MB", "licence")
    assert names(out, "kohya-colab", "learning_rate 0.0003", "huggingface.co/Laxhar/noobai-XL-Vpred-1.0")
    out, _ = called("preset", "style", "pony-6", "--usual")
    assert '"base": "hollowstrawberry/67AB2F"' in out and '"rank": 8' in out
    assert names(refused("info", "nothing"), "nothing")


def test_a_plan_says_what_would_be_fetched(monkeypatch):
    from lorakit import plan

    monkeypatch.setattr(
        plan, "plan_for_cards", lambda *_: [plan.predict(configs.Config(base="demo", steps=1, resolution=64))]
    )
    out, _ = called("plan", "--base", "illustrious-2.0", "--card", "T4")
    assert names(out, "Illustrious XL 2.0", "6,940 MB", "CreativeML OpenRAIL-M")


def test_the_panel_offers_both_kinds_of_settings_with_their_sources():
    panel = Settings("character", "illustrious-0.1", dataset="d", trigger="sks")
    assert [value for _, value in panel.presets.options][:2] == [GUIDE, USUAL]
    assert names(panel.presets.options[0][0], "guide") and names(panel.presets.options[1][0], "kohya-colab")
    assert panel.config == presets.preset("character", "illustrious-0.1", dataset="d", trigger="sks")
    panel.presets.value = USUAL
    assert panel.config == presets.preset("character", "illustrious-0.1", usual=True, dataset="d", trigger="sks")
    assert names(panel.facts.value, "6,938 MB", "Fair AI Public License", "huggingface.co/OnomaAIResearch")
    assert names(panel.hints["rank"].value, "128–256", "kohya-colab: 8")
    assert names(panel.hints["sample_prompts"].value, "masterpiece, best quality, …")
    panel.base.value = "sd21"
    assert [value for _, value in panel.presets.options] == [GUIDE] and panel.config == presets.preset(
        "character", "sd2", dataset="d", trigger="sks"
    )
    assert "kohya" not in advice("rank", "style", "sd21") and names(panel.facts.value, "licence")
