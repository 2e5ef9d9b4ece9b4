import numpy as np
import pytest
import torch
from PIL import Image

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import cache, sample

CPU = torch.device("cpu")


def encoded(base, prompts, folder):
    return cache.encode_texts(base, prompts, folder, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_latents_are_those_of_diffusers_pipeline(small_bases, tmp_path, family):
    import diffusers

    base = bases.open(small_bases[family])
    unet = bases.load_unet(base, torch.float32, CPU)
    texts = encoded(base, ["a red apple", ""], tmp_path)
    ours = sample.latents(
        unet, base, [texts["a red apple"]], texts[""], [5], size=(32, 32), steps=4, guidance=3.0, scheduler_name="ddim"
    )
    shared = {
        "unet": unet,
        "vae": bases.load_vae(base, torch.float32, CPU),
        "scheduler": sample.scheduler("ddim", base),
    }
    parts = [bases.load_text_encoder(base, torch.float32, CPU, which) for which in base.text_encoders]
    shared |= {"text_encoder": parts[0][0], "tokenizer": parts[0][1]}
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "height": 32, "width": 32}
    options |= {"prompt": "a red apple", "generator": torch.Generator().manual_seed(5)}
    if family == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(
            **shared, text_encoder_2=parts[1][0], tokenizer_2=parts[1][1], force_zeros_for_empty_prompt=False
        )
        options["negative_prompt"] = ""
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    assert torch.allclose(ours, pipeline(**options).images, atol=1e-3)


@pytest.mark.parametrize("name", list(sample.SCHEDULERS))
def test_a_picture_does_not_depend_on_its_batch(small_bases, tmp_path, name):
    base = bases.open(small_bases["sd15"])
    unet = bases.load_unet(base, torch.float32, CPU)
    prompts = ["a", "b", "c"]
    texts = encoded(base, [*prompts, ""], tmp_path)
    chosen, settings = [texts[p] for p in prompts], {"size": (32, 24), "steps": 3, "scheduler_name": name}
    together = sample.latents(unet, base, chosen, texts[""], [1, 2, 3], **settings)
    alone = sample.latents(unet, base, chosen[2:], texts[""], [3], **settings)
    assert together.shape == (3, 4, 8, 6)
    assert torch.allclose(together[2:], alone, atol=1e-4)
    assert torch.isfinite(together).all()


def test_sizes_and_schedulers_that_do_not_suit_are_refused(small_bases, tmp_path):
    base = bases.open(small_bases["sd15"])
    unet = bases.load_unet(base, torch.float32, CPU)
    texts = encoded(base, [""], tmp_path)
    with pytest.raises(ValueError, match="multiples of 8 pixels"):
        sample.latents(unet, base, [texts[""]], texts[""], [0], size=(30, 32))
    with pytest.raises(ValueError, match="no scheduler 'dpm'.*euler"):
        sample.scheduler("dpm", base)


def test_borrowing_leaves_randomness_and_training_mode_alone(small_bases, tmp_path):
    base = bases.open(small_bases["sd15"])
    unet = bases.load_unet(base, torch.float32, CPU).train()
    texts = encoded(base, [""], tmp_path)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    with sample.borrowed(unet) as lent:
        assert not lent.training
        torch.rand(5)
        sample.latents(lent, base, [texts[""]], texts[""], [0], size=(32, 32), steps=2, scheduler_name="euler_a")
    assert unet.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_generate_gives_a_row_of_strengths(small_bases):
    base = bases.open(small_bases["sd15"])

    def attach(models):
        adapter = adapters.inject(models, 4, 4)
        for weight in adapter.parameters():
            weight.data.normal_(0, 0.3)
        return adapter

    rows = sample.generate(base, ["a", "b"], strengths=(0, 1), attach=attach, steps=2, device="cpu", precision="no")
    bare = sample.generate(base, ["a", "b"], steps=2, device="cpu", precision="no")
    assert [len(row) for row in rows] == [2, 2]
    assert rows[0][0].size == (32, 32)
    for row, plain in zip(rows, bare, strict=True):
        assert row[0].tobytes() == plain[0].tobytes()
        assert row[1].tobytes() != plain[0].tobytes()
    with pytest.raises(ValueError, match="1 seeds were given for 2 prompts"):
        sample.generate(base, ["a", "b"], seeds=[1])


@pytest.mark.parametrize("family, adapts", [("sd15", ["text_encoder"]), ("sdxl", ["text_encoder_2", "unet"])])
def test_strengths_are_those_of_text_encoders_too(small_bases, family, adapts):
    base = bases.open(small_bases[family])
    attached = []

    def attach(models):
        attached.append(list(models))
        adapter = adapters.inject(models, 4, 4)
        for weight in adapter.parameters():
            weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        return adapter

    plain = {"steps": 2, "device": "cpu", "precision": "no"}
    rows = sample.generate(base, ["a red apple"], strengths=(0, 0.5, 1), attach=attach, adapts=adapts, **plain)
    bare = sample.generate(base, ["a red apple"], **plain)
    assert [set(names) for names in attached] == ([{adapts[0]}, {"unet"}] if "unet" in adapts else [{adapts[0]}])
    assert rows[0][0].tobytes() == bare[0][0].tobytes()
    assert len({picture.tobytes() for picture in rows[0]}) == 3


def test_pngs_carry_prompt_and_seed(tmp_path):
    path = sample.save([Image.new("RGB", (8, 8))], tmp_path / "out", ["a red apple"], [7])[0]
    assert Image.open(path).text["parameters"] == "a red apple\nSeed: 7, Size: 8x8"


def test_what_adapts_nothing_of_the_base_is_refused(small_bases):
    base = bases.open(small_bases["sd15"])
    for adapts in ((), ("text_encoder_2",)):
        with pytest.raises(ValueError, match="no such part to adapt"):
            sample.generate(base, ["a"], attach=lambda models: None, adapts=adapts, steps=1, device="cpu")
