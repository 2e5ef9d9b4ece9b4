import gc
import json
import re
import threading
import weakref
from functools import partial

import numpy as np
import pictures as pictures_of
import pytest
import torch
from PIL import Image
from said import names, naming

from lorakit import device as device_module
from lorakit.adapter import attachment, injection, merging, targets, write
from lorakit.adapter.algorithms import algorithm_of
from lorakit.adapter.lora import Lora
from lorakit.adapter.specs import layer_specs
from lorakit.base import encode
from lorakit.base import model as bases
from lorakit.device import Compute
from lorakit.evaluate import variants as variants_module
from lorakit.sample import denoise, png, sampler

CPU = torch.device("cpu")


def encoded(base, prompts, folder):
    return encode.encode_texts(base, prompts, folder, Compute(CPU, torch.float32))


@pytest.mark.parametrize(
    ("family", "name"),
    [("sd15", name) for name in denoise.SCHEDULERS]
    + [("sd2", "ddim"), ("sdxl", "ddim"), ("sd2", "lcm"), ("sdxl", "euler")],
)
def test_latents_are_those_of_diffusers_pipeline(small_bases, tmp_path, family, name):
    import diffusers

    base = bases.open(small_bases[family])
    unet = bases.load_unet(base, Compute(CPU, torch.float32))
    texts = encoded(base, ["a red apple", ""], tmp_path)
    ours = pictures_of.latents(
        unet, base, [texts["a red apple"]], texts[""], [5], size=(32, 32), steps=4, guidance=3.0, scheduler=name
    )
    shared = {
        "unet": unet,
        "vae": bases.load_vae(base, Compute(CPU, torch.float32)),
        "scheduler": denoise.make_scheduler(name, base),
    }
    parts = [bases.load_text_encoder(base, Compute(CPU, torch.float32), which) for which in base.text_encoders]
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


@pytest.mark.parametrize("name", list(denoise.SCHEDULERS))
def test_a_picture_does_not_depend_on_its_batch(small_bases, tmp_path, name):
    base = bases.open(small_bases["sd15"])
    unet = bases.load_unet(base, Compute(CPU, torch.float32))
    prompts = ["a", "b", "c"]
    texts = encoded(base, [*prompts, ""], tmp_path)
    chosen, settings = [texts[p] for p in prompts], {"size": (32, 24), "steps": 3, "scheduler": name}
    together = pictures_of.latents(unet, base, chosen, texts[""], [1, 2, 3], **settings)
    alone = pictures_of.latents(unet, base, chosen[2:], texts[""], [3], **settings)
    assert together.shape == (3, 4, 8, 6)
    assert torch.allclose(together[2:], alone, atol=1e-4)
    assert torch.isfinite(together).all()


def test_sizes_and_schedulers_that_do_not_suit_are_refused(small_bases, tmp_path):
    base = bases.open(small_bases["sd15"])
    unet = bases.load_unet(base, Compute(CPU, torch.float32))
    texts = encoded(base, [""], tmp_path)
    with pytest.raises(ValueError, match=naming("32×30", 8)):
        pictures_of.latents(unet, base, [texts[""]], texts[""], [0], size=(30, 32))
    with pytest.raises(ValueError, match=naming("plms", *denoise.SCHEDULERS)):
        denoise.make_scheduler("plms", base)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, 0), ({"guidance": float("nan")}, "nan"), ({"guidance": -1.0}, -1.0), ({"clip_skip": 40}, 40),
        ({"clip_skip": 0}, 0), ({"size": (0, 32)}, "32×0"), ({"size": (-32, 32)}, "32×-32"),
    ],
)  # fmt: skip
def test_settings_without_a_picture_are_refused_in_words(changes, named):
    with pytest.raises(ValueError, match=naming(named)):
        sampler.stream(bases.open("demo"), ["a"], sampling=denoise.Sampling(**changes))


def test_a_picture_that_is_not_finite_is_refused(small_bases):
    """It used to be written as a black picture."""
    base = bases.open(small_bases["sd15"])
    vae = bases.load_vae(base, Compute(CPU, torch.float32))
    latents = torch.zeros(1, base.latent_channels, 4, 4)
    denoise.decode_latents(vae, latents)
    with pytest.raises(FloatingPointError, match="strength"):
        denoise.decode_latents(vae, latents / 0)
    with torch.no_grad():
        vae.decoder.conv_out.bias += torch.nan
    with pytest.raises(FloatingPointError, match="VAE"):
        denoise.decode_latents(vae, latents)


def test_a_picture_without_room_is_decoded_in_tiles(small_bases, monkeypatch):
    base = bases.open(small_bases["sd15"])
    vae, sizes = bases.load_vae(base, Compute(CPU, torch.float32)), []
    decoder = vae.decoder.forward

    def short(x, *rest, **options):
        sizes.append(x.shape[-1])
        if x.shape[-1] > 24:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return decoder(x, *rest, **options)

    latents = torch.randn(1, base.latent_channels, 64, 64, generator=torch.Generator().manual_seed(0))
    (whole,) = denoise.decode_latents(vae, latents)
    monkeypatch.setattr(vae.decoder, "forward", short)
    (tiled,) = denoise.decode_latents(vae, latents)
    assert tiled.size == whole.size and sizes[0] == 64 and max(sizes[-4:]) <= 16
    assert np.abs(np.int16(whole) - np.int16(tiled)).mean() < 20  # of noise, so that its tiles do not meet exactly
    monkeypatch.setattr(vae.decoder, "forward", lambda *_, **__: short(torch.zeros(1, 4, 99, 99)))
    with pytest.raises(torch.OutOfMemoryError):  # not in the smallest tiles either
        denoise.decode_latents(vae, latents)


def test_half_precision_is_full_where_a_cpu_samples(small_bases):
    base, how = bases.open(small_bases["sd15"]), {"steps": 2, "device": "cpu", "size": (32, 32)}
    half, full = (pictures_of.rows(base, ["a"], precision=precision, **how)[0][0] for precision in ("fp16", "no"))
    assert half.tobytes() == full.tobytes()


def test_borrowing_leaves_randomness_and_training_mode_alone(small_bases, tmp_path):
    base = bases.open(small_bases["sd15"])
    unet = bases.load_unet(base, Compute(CPU, torch.float32)).train()
    texts = encoded(base, [""], tmp_path)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    with denoise.borrow(unet) as lent:
        assert not lent.training
        torch.rand(5)
        pictures_of.latents(lent, base, [texts[""]], texts[""], [0], size=(32, 32), steps=2, scheduler="euler_a")
    assert unet.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_threads_load_and_make_pictures_at_once():
    """While one thread made an empty model, models that others loaded at that moment had no weights either."""
    sampling, start, pictures = denoise.Sampling(steps=2), threading.Barrier(3), []

    def make():
        start.wait()
        for _ in range(3):
            pictures.extend(
                placed.picture.tobytes() for placed in sampler.stream(bases.open("demo"), ["a"], sampling=sampling)
            )

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pictures) == 9 and len(set(pictures)) == 1


def test_generate_gives_a_row_of_strengths(small_bases):
    base = bases.open(small_bases["sd15"])

    def attach(models):
        adapter = injection.inject(models, layer_specs(models, 4, 4))
        for weight in adapter.parameters():
            weight.data.normal_(0, 0.3)
        return adapter

    rows = pictures_of.rows(base, ["a", "b"], strengths=(0, 1), attach=attach, steps=2, device="cpu", precision="no")
    bare = pictures_of.rows(base, ["a", "b"], steps=2, device="cpu", precision="no")
    assert [len(row) for row in rows] == [2, 2]
    assert rows[0][0].size == (32, 32)
    for row, plain in zip(rows, bare, strict=True):
        assert row[0].tobytes() == plain[0].tobytes()
        assert row[1].tobytes() != plain[0].tobytes()
    with pytest.raises(ValueError, match=naming(1, 2)):
        pictures_of.rows(base, ["a", "b"], seeds=[1])


@pytest.mark.parametrize("family, adapts", [("sd15", ["text_encoder"]), ("sdxl", ["text_encoder_2", "unet"])])
def test_strengths_are_those_of_text_encoders_too(small_bases, family, adapts):
    base = bases.open(small_bases[family])
    attached = []

    def attach(models):
        attached.append(list(models))
        adapter = injection.inject(models, layer_specs(models, 4, 4))
        for weight in adapter.parameters():
            weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        return adapter

    plain = {"steps": 2, "device": "cpu", "precision": "no"}
    rows = pictures_of.rows(base, ["a red apple"], strengths=(0, 0.5, 1), attach=attach, adapts=adapts, **plain)
    bare = pictures_of.rows(base, ["a red apple"], **plain)
    assert [set(names) for names in attached] == ([{adapts[0]}, {"unet"}] if "unet" in adapts else [{adapts[0]}])
    assert rows[0][0].tobytes() == bare[0][0].tobytes()
    assert len({picture.tobytes() for picture in rows[0]}) == 3


# ── Many at once ────────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = {"steps": 2, "device": "cpu", "precision": "no"}


LORAS: dict[tuple, Lora] = {}  # made once, to read


def lora_for(base, seed: int, *, rank: int = 4, alpha: float = 2, models=("unet",), algorithm="lora") -> Lora:
    """A LoRA with random weights, large enough to be seen."""
    key = (base.folder, seed, rank, alpha, *models, algorithm)
    if key not in LORAS:
        LORAS[key] = random_lora(base, seed, rank, alpha, models, algorithm)
    return LORAS[key]


def random_lora(base, seed: int, rank: int, alpha: float, models, algorithm: str) -> Lora:
    loaded = {}
    for which in models:
        text = which != "unet"
        load = (lambda *rest: bases.load_text_encoder(*rest, which)[0]) if text else bases.load_unet  # noqa: B023
        loaded[which] = load(base, Compute(CPU, torch.float32))
    adapter = injection.inject(loaded, layer_specs(loaded, rank, alpha, algorithm=algorithm))
    for number, weight in enumerate(adapter.parameters()):
        weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(100 * seed + number))
    return write.lora_from(adapter, base)


def with_(base, lora: Lora, strength: float = 1.0) -> sampler.Variant:
    return sampler.Variant(lambda models: attachment.attach(models, base, lora), lora.adapts, strength)


def pixels(pictures) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


@pytest.mark.parametrize("family, models", [("sd15", ["unet", "text_encoder"]), ("sdxl", ["text_encoder_2", "unet"])])
def test_loras_in_one_stream_are_each_as_if_alone(small_bases, family, models, monkeypatch):
    """With the base loaded once: what one leaves behind would be seen in the next, or in the bare base after it."""
    base = bases.open(small_bases[family])
    one, two = lora_for(base, 1, models=models), lora_for(base, 2, rank=2, algorithm="loha")
    first = with_(base, one, 0.5)
    variants = [first, with_(base, two), sampler.Variant(), sampler.Variant(first.attach, one.adapts, 1.0)]
    prompts, loaded = ["a red apple", "a house", "b"], []
    alone = [[placed.picture for placed in pictures_of.stream(base, prompts, [v], **PLAIN)] for v in variants]
    for name in ("load_unet", "load_vae", "load_text_encoder"):
        load = getattr(bases, name)
        monkeypatch.setattr(
            bases, name, lambda *rest, load=load, name=name, **more: loaded.append(name) or load(*rest, **more)
        )
    found = list(pictures_of.stream(base, prompts, variants, batch=2, **PLAIN))
    assert (loaded.count("load_unet"), loaded.count("load_vae")) == (1, 1)
    assert sorted((row, column) for row, column, _ in found) == [(r, c) for r in range(3) for c in range(4)]
    for row, column, picture in found:
        difference = np.asarray(picture).astype(int) - np.asarray(alone[column][row])
        assert np.abs(difference).max() <= 1, (row, column)
    assert len({pixels(column)[0] for column in alone}) == 4


def test_a_stream_gives_what_generate_gives(small_bases):
    base = bases.open(small_bases["sd15"])
    lora = lora_for(base, 1)
    attach = with_(base, lora).attach
    rows = pictures_of.rows(base, ["a", "b"], strengths=(0, 0.7), attach=attach, seeds=[3, 9], **PLAIN)
    variants = [sampler.Variant(attach, strength=value) for value in (0, 0.7)]
    streamed = {
        (row, column): p for row, column, p in pictures_of.stream(base, ["a", "b"], variants, seeds=[3, 9], **PLAIN)
    }
    assert [pixels(row) for row in rows] == [pixels(streamed[r, c] for c in range(2)) for r in range(2)]


@pytest.mark.parametrize("models", [["unet"], ["text_encoder", "unet"]])
def test_two_loras_at_once_are_the_merged_file(small_bases, tmp_path, models):
    base = bases.open(small_bases["sd15"])
    loras, strengths = [lora_for(base, 1, models=models), lora_for(base, 2, rank=2, alpha=3)], [0.8, -0.5]
    files = [write.save(lora, tmp_path / f"{n}.safetensors", dtype=torch.float32) for n, lora in enumerate(loras)]
    merged = write.save(merging.merge(loras, strengths).lora, tmp_path / "both.safetensors", dtype=torch.float32)
    variants = [
        variants_module.variant(base, list(zip(files, strengths, strict=True))),
        variants_module.variant(base, [(merged, 1)]),
    ]
    both, one = (placed.picture for placed in pictures_of.stream(base, ["a red apple"], variants, **PLAIN))
    assert np.abs(np.asarray(both).astype(int) - np.asarray(one)).max() <= 1
    bare = pictures_of.rows(base, ["a red apple"], **PLAIN)[0][0]
    assert np.abs(np.asarray(both).astype(int) - np.asarray(bare)).max() > 5


@torch.no_grad()
def test_loras_of_all_kinds_at_once_are_the_sum_of_their_changes(small_bases, tmp_path):
    """And taking them out leaves the very base; a text encoder gets those alone that are for it."""
    base, strengths = bases.open(small_bases["sd15"]), [0.8, -0.5, 0.6, 0.3]
    kinds = ["lora", "loha", "dora", "lora"]
    models = [["unet"], ["unet"], ["unet"], ["text_encoder", "unet"]]
    loras = [
        lora_for(base, n, algorithm=kind, models=own) for n, (kind, own) in enumerate(zip(kinds, models, strict=True))
    ]
    files = [write.save(lora, tmp_path / f"{n}.safetensors", dtype=torch.float32) for n, lora in enumerate(loras)]
    variant = variants_module.variant(base, list(zip(files, strengths, strict=True)))
    assert variant.adapts == ("text_encoder", "unet") and variant.strength == 1
    for own in (["unet"], ["text_encoder"]):
        load = bases.load_unet if own == ["unet"] else lambda *rest: bases.load_text_encoder(*rest)[0]
        plain, adapted, untouched = (load(base, Compute(CPU, torch.float32)) for _ in range(3))
        for lora, strength in zip(loras, strengths, strict=True):
            for module, (parts, alpha) in lora.modules.items():
                if [targets.model_of(module)] == own:
                    weight = targets.find({own[0]: plain}, module).weight
                    frozen = targets.find({own[0]: untouched}, module).weight
                    weight += strength * algorithm_of(parts).delta(parts, alpha, frozen).view_as(weight)
        asked = (torch.ones(1, 77, dtype=torch.int64),)
        if own == ["unet"]:
            asked = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 500, torch.ones(1, 77, 16)
        variant.attach({own[0]: adapted})
        assert torch.allclose(plain(*asked)[0], adapted(*asked)[0], atol=1e-4)
        assert not torch.allclose(plain(*asked)[0], untouched(*asked)[0], atol=1e-2)
        injection.eject({own[0]: adapted})
        assert torch.equal(adapted(*asked)[0], untouched(*asked)[0])
        assert [name for name, _ in adapted.named_modules()] == [name for name, _ in untouched.named_modules()]


@pytest.mark.parametrize("how", ["close", "event", "step", "attach"])
def test_what_is_stopped_leaves_no_adapter_and_no_model_behind(small_bases, monkeypatch, how):
    base, stop, models = bases.open(small_bases["sd15"]), threading.Event(), []
    variant = with_(base, lora_for(base, 1))

    def attach(own):
        models.append(own["unet"])
        if how == "attach":
            raise RuntimeError("no room")
        return variant.attach(own)

    def forward(denoiser, *rest, original=denoise.Denoiser._denoise):
        if how == "step":  # the fourth of ten
            calls = iter(range(20))
            denoiser.unet.register_forward_pre_hook(lambda *_: stop.set() if next(calls) == 3 else None)
        return original(denoiser, *rest)

    monkeypatch.setattr(denoise.Denoiser, "_denoise", forward)
    settings = PLAIN | {"steps": 10, "batch": 1}
    pictures = pictures_of.stream(base, ["a", "b", "c"], [sampler.Variant(attach)], stop=stop, **settings)
    if how == "attach":
        with pytest.raises(RuntimeError, match="no room"):
            next(pictures)
    elif how == "step":
        assert list(pictures) == []
    else:
        assert next(pictures).row == 0
        adapted = sum(hasattr(module, "lora_A") for module in models[0].modules())
        assert adapted > 0
        if how == "close":
            pictures.close()
        else:
            stop.set()
            assert list(pictures) == []
    assert not [name for name, module in models[0].named_modules() if hasattr(module, "lora_A")]
    left = weakref.ref(models.pop())
    del pictures
    gc.collect()
    assert left() is None


@pytest.mark.parametrize(
    "how, family", [("end", "sdxl"), ("end", "sd15"), ("close", "sd15"), ("stop", "sd15"), ("error", "sd15")]
)
def test_memory_is_handed_back_with_nothing_left_in_it(small_bases, monkeypatch, family, how):
    """Models and adapters hang in cycles: what is referenced when they are collected stays on the card."""
    base, stop, loaded, left = bases.open(small_bases[family]), threading.Event(), [], []
    models = ["unet", *base.text_encoders]
    variants = [with_(base, lora_for(base, seed, models=models)) for seed in (1, 2)]

    def watched(load, *rest, **settings):
        made = load(*rest, **settings)
        loaded.append(weakref.ref(made[0] if isinstance(made, tuple) else made))
        return made

    def free(device, original=device_module.free_memory):
        original(device)
        left.append(sum(model() is not None for model in loaded))

    for name in ("load_unet", "load_vae", "load_text_encoder"):
        monkeypatch.setattr(bases, name, partial(watched, getattr(bases, name)))
    monkeypatch.setattr(sampler, "free_memory", free)
    pictures = pictures_of.stream(base, ["a", "b"], variants, stop=stop, **PLAIN)
    gc.disable()  # by chance it would be collected all the same
    try:
        assert next(pictures).column == 0
        assert len(loaded) == 2 * len(base.text_encoders) + 2 and not any(left)
        if how == "close":
            pictures.close()
        elif how == "error":
            monkeypatch.setattr(sampler, "decode_latents", lambda vae, latents: 1 / 0)
            with pytest.raises(ZeroDivisionError) as kept:  # as a notebook keeps it
                list(pictures)
        else:
            if how == "stop":
                stop.set()
            list(pictures)
        assert left[-1] == 0
    finally:
        gc.enable()
    assert how != "error" or kept.traceback


def test_one_adapter_at_a_time_is_in_memory(small_bases):
    base, made, alive = bases.open(small_bases["sd15"]), [], []
    variants = [with_(base, lora_for(base, seed)) for seed in (1, 2)]

    def attach(models, variant):
        alive.append(sum(layer() is not None for layer in made))
        adapter = variant.attach(models)
        made.extend(map(weakref.ref, adapter.layers.values()))
        return adapter

    gc.disable()
    try:
        list(pictures_of.stream(base, ["a"], [sampler.Variant(partial(attach, variant=v)) for v in variants], **PLAIN))
    finally:
        gc.enable()
    assert made and alive == [0, 0]


def test_what_is_stopped_attaches_no_more(small_bases, monkeypatch):
    base, stop, attached = bases.open(small_bases["sd15"]), threading.Event(), []
    variant = with_(base, lora_for(base, 1))
    attaches = [lambda models: (attached.append(1), variant.attach(models))[1] for _ in range(3)]

    def denoised(*rest, original=denoise.Denoiser._denoise):
        stop.set()
        return original(*rest)

    monkeypatch.setattr(denoise.Denoiser, "_denoise", denoised)
    assert (
        list(pictures_of.stream(base, ["a"], [sampler.Variant(attach) for attach in attaches], stop=stop, **PLAIN))
        == []
    )
    assert attached == [1]


def test_generate_gives_all_or_is_interrupted(small_bases):
    base, stop, done = bases.open(small_bases["sd15"]), threading.Event(), []

    def progress(what, number, total):
        done.append(number)
        if number == 2:
            stop.set()

    settings = PLAIN | {"batch": 1, "stop": stop, "progress": progress}
    with pytest.raises(KeyboardInterrupt):
        pictures_of.rows(base, ["a", "b", "c"], **settings)
    assert done == [1, 2]
    stop.clear()
    rows = pictures_of.rows(base, ["a", "b"], **settings)  # nothing is missing
    assert all(picture for row in rows for picture in row)


def test_settings_that_do_not_suit_are_told_before_anything_is_loaded(small_bases, monkeypatch):
    base = bases.open(small_bases["sd15"])
    monkeypatch.setattr(bases, "load_unet", None)
    monkeypatch.setattr(bases, "load_text_encoder", None)
    for wrong in ({"size": (30, 32)}, {"scheduler": "x"}, {"seeds": [1, 2]}):
        with pytest.raises(ValueError):
            pictures_of.stream(base, ["a"], **wrong)


def test_lcm_takes_many_steps_as_well(small_bases, tmp_path):
    base = bases.open(small_bases["sd15"])
    unet, texts = bases.load_unet(base, Compute(CPU, torch.float32)), encoded(base, [""], tmp_path)
    x = pictures_of.latents(
        unet, base, [texts[""]], texts[""], [0], size=(32, 32), steps=60, guidance=1.0, scheduler="lcm"
    )
    assert torch.isfinite(x).all()


def test_the_command_takes_several_loras_with_weights(small_bases, tmp_path):
    from typer.testing import CliRunner

    from lorakit.__main__ import app

    base = bases.open(small_bases["sd15"])
    loras = [lora_for(base, 1), lora_for(base, 2, rank=2)]
    paths = [write.save(lora, tmp_path / f"{n}.safetensors", dtype=torch.float32) for n, lora in enumerate(loras)]
    given = [word for path in paths for word in ("--lora", path)]
    asked = ["sample", "a red apple", "--base", small_bases["sd15"], "--steps", "2", *given, "--scheduler", "lcm"]

    def told(*more):
        done = CliRunner().invoke(app, [*map(str, asked), *map(str, more)])
        assert done.exit_code == 0, done.output
        return done.output.split()

    out = tmp_path / "out"
    printed = told("--weight", 1, "--weight", 0.5, "--strength", 0, "--strength", 0.8, "--out", out)
    assert printed == [str(out / name) for name in (
        "strength-0/00-seed-0.png", "strength-0.8/00-seed-0.png", "sheet.png")]  # fmt: skip
    whole = merging.merge(loras, [0.8, 0.4]).lora
    expected = pictures_of.rows(
        base, ["a red apple"], attach=with_(base, whole).attach, steps=2, scheduler="lcm", strengths=(0, 1)
    )
    for folder, picture in zip(("strength-0", "strength-0.8"), expected[0], strict=True):
        with Image.open(out / folder / "00-seed-0.png") as made:
            assert np.abs(np.asarray(made).astype(int) - np.asarray(picture)).max() <= 1
            assert ("<lora:0:0.8> <lora:1:0.4>" in made.text["parameters"]) == (folder == "strength-0.8")
    done = CliRunner().invoke(app, [*map(str, asked), "--weight", "1"])
    assert isinstance(done.exception, ValueError) and names(str(done.exception), 1, 2)


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def parsed(text: str) -> dict[str, str]:
    """As A1111's modules/infotext_utils.py reads it (parse_generation_parameters), in short."""
    *lines, last = text.strip().split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(found) >= 3, "A1111 would take it for a part of the prompt"
    prompt, negative, done = [], [], False
    for line in lines:
        if line.startswith("Negative prompt:"):
            done, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if done else prompt).append(line)
    told = {key: json.loads(value) if value.startswith('"') else value for key, value in found}
    return told | {"prompt": "\n".join(prompt), "negative": "\n".join(negative)}


def test_pngs_carry_what_a1111_reads(tmp_path):
    sampling = denoise.Sampling("blurry, low", 25, 7.5, "dpm++_2m_karras", clip_skip=2)
    loras = [("style: a", 0.75), ("none", 0.0), ("thing", 1.0)]
    written = png.infotext("ein Bild, кот", 7, (16, 8), sampling, "me/base, v1", loras)
    with Image.open(png.write_picture(Image.new("RGB", (8, 16)), tmp_path / "out" / "a.png", written)) as picture:
        text = picture.text["parameters"]
    assert parsed(text) == {
        "prompt": "ein Bild, кот <lora:style_ a:0.75> <lora:thing:1>", "negative": "blurry, low", "Steps": "25",
        "Sampler": "DPM++ 2M Karras", "CFG scale": "7.5", "Seed": "7", "Size": "8x16", "Model": "me/base, v1",
        "Clip skip": "2",
    }  # fmt: skip
    assert png.prompt_of(text) == "ein Bild, кот"
    assert png.prompt_of("a red apple\nSeed: 7, Size: 8x8") == "a red apple"  # as it was written before
    assert png.prompt_of("") == ""
    assert set(png.SAMPLERS) == set(denoise.SCHEDULERS)


def test_what_adapts_nothing_of_the_base_is_refused(small_bases):
    base = bases.open(small_bases["sd15"])
    for adapts in ((), ("text_encoder_2",)):
        with pytest.raises(ValueError, match=naming(base.name, *adapts)):
            pictures_of.rows(base, ["a"], attach=lambda models: None, adapts=adapts, steps=1, device="cpu")
