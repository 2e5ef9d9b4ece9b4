"""The demo data and the demo's run: the real way on the embedded base."""

import pytest
import torch
from loops import CPU, examples, prepared

from lorakit import demo, presets
from lorakit.adapter import injection
from lorakit.adapter.specs import layer_specs
from lorakit.base import model
from lorakit.device import Compute
from lorakit.run import preparation
from lorakit.train import loop


def test_the_base_is_small_and_an_ordinary_folder():
    from diffusers import StableDiffusionPipeline

    size = sum(file.stat().st_size for file in demo.BASE.rglob("*.safetensors"))
    assert size <= 30e6
    pipeline = StableDiffusionPipeline.from_pretrained(demo.BASE, safety_checker=None, local_files_only=True)
    names = [type(part).__name__ for part in (pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet)]
    assert names == ["CLIPTokenizer", "CLIPTextModel", "AutoencoderKL", "UNet2DConditionModel"]


def test_thirty_pictures_with_captions_and_licences():
    pictures = preparation.scan_dataset(demo.config())
    assert len(pictures) == 30 and not pictures.problems
    assert all(p.caption.startswith(f"{demo.TRIGGER} style, ") for p in pictures.pictures)
    shown = {prompt.split(", ")[1] for prompt in demo.PROMPTS}
    trained = {p.caption.split(", ")[1] for p in pictures.pictures}
    assert not shown & trained  # the comparison asks for subjects it was not trained on
    licences = (demo.HERE / "LICENSES.md").read_text()
    for name in ("Noto", "Fluent", "Firefox OS", "MIT", "Apache"):
        assert name in licences


def test_the_demo_keeps_the_style_presets_rank_and_alpha():
    style = presets.preset("style")
    settings = demo.config()
    assert (settings.rank, settings.alpha, settings.kind) == (style.rank, style.alpha, style.kind) == (32, 16, "style")


@pytest.mark.no_cover
def test_the_loss_falls_on_the_demo(tmp_path):
    """In a short run, on the same noise and timesteps for the bare base and for what was learned."""
    settings = demo.config(steps=20, warmup_steps=2)
    ready = prepared(settings, tmp_path)
    unet = model.load_unet(ready.base, Compute(CPU, torch.float32))
    adapter = injection.inject(unet, layer_specs(unet, settings.rank, settings.alpha), settings.seed)
    state = loop.initial_state(adapter, settings, CPU, torch.float32)
    loop.drain(loop.steps(unet, ready.base, state, examples(ready, settings)))
    alphas, probe = ready.base.alphas_cumprod(), settings.with_(seed=1)
    items = [examples(ready, probe).batch(range(30), step, 0) for step in range(2)]

    def loss() -> float:
        with torch.no_grad():
            return float(sum(loop.batch_loss(unet, ready.base, alphas, item, probe) for item in items) / len(items))

    learned = loss()
    with injection.strength(adapter, 0.0):
        bare = loss()
    assert learned < 0.97 * bare
