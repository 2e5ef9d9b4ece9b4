"""What is written in every layout does in the programs that read it what the adapter in memory does."""

import copy
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import readers
import torch
from safetensors.torch import save_file
from said import names, naming
from test_write import FEW_LAYERS, KINDS, TEXT, TextTwin, a_base, a_run, answer, distance, narrow_unet, said, twin_of

from lorakit import config
from lorakit.adapter import attachment, injection, write
from lorakit.adapter import proof as proof_module
from lorakit.adapter import read as read_module
from lorakit.adapter.specs import run_specs
from lorakit.storage import files

FAMILIES = ["sd15", "sd2", pytest.param("sdxl", marks=pytest.mark.no_cover)]


class MixedTwin:
    """A LoCon of five ranks and two scales, as a run with `block_ranks` makes it."""

    def __init__(self, family: str):
        self.family, self.bare = family, narrow_unet(family, whole=False).eval()
        self.unet, self.base = copy.deepcopy(self.bare), a_base(family, self.bare)
        attention = "down_blocks.2.attentions.0" if family == "sdxl" else "down_blocks.0.attentions.0"
        settings = config.Config(
            steps=1, rank=4, alpha=3, targets="attention+conv", conv_rank=2, conv_alpha=0.3,
            block_ranks={"mid_block": 6, attention: 3, "up_blocks.1.resnets": 5},
        )  # fmt: skip
        self.adapter = injection.inject(self.unet, run_specs(self.unet, settings), settings.seed)
        generator = torch.Generator().manual_seed(1)
        for weight in self.adapter.parameters():
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)


@pytest.fixture(scope="module", params=FAMILIES)
def mixed(request):
    twin = MixedTwin(request.param)
    assert {2, 3, 4, 5, 6} == set(twin.adapter.ranks.values()) and len(set(twin.adapter.alphas.values())) > 4
    return twin


@pytest.fixture
def sd15():
    return twin_of("sd15")


@pytest.fixture(scope="module", params=["sd15", pytest.param("sdxl", marks=pytest.mark.no_cover)])
def text_twin(request):
    layers = [f"encoder.layers.{n}.{leaf}" for n in (1, 3) for leaf in ("self_attn.q_proj", "mlp.fc1")]
    places = [f"{which}.{layer}" for which in FEW_LAYERS[request.param] for layer in layers]
    return TextTwin(
        request.param, ranks={place: 2 + n for n, place in enumerate(places)}, alphas=dict.fromkeys(places, 7.5)
    )


def place(folder: Path, layout: str) -> Path:
    return folder / layout if layout == "peft" else folder / f"{layout}.safetensors"


def pipeline(family: str, unet, **encoders):
    """diffusers' own, around a UNet; without tokenizers, and without text encoders where none are given."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    vae, scheduler = (
        AutoencoderKL(block_out_channels=(4,), norm_num_groups=4),
        DDIMScheduler(clip_sample=False, steps_offset=1),
    )
    first, second = encoders.get("text_encoder"), encoders.get("text_encoder_2")
    if family == "sdxl":
        return StableDiffusionXLPipeline(vae, first, second, None, None, unet, scheduler)
    return StableDiffusionPipeline(vae, first, None, unet, scheduler, None, None, requires_safety_checker=False)


def sampled(pipe, family: str) -> torch.Tensor:
    """Latents after three steps with guidance."""
    generator, size = torch.Generator().manual_seed(3), (1, 7, TEXT)
    given = {"prompt_embeds": torch.randn(size, generator=generator), "negative_prompt_embeds": torch.zeros(size)}
    if family == "sdxl":
        given |= {"pooled_prompt_embeds": torch.ones(1, 8), "negative_pooled_prompt_embeds": torch.zeros(1, 8)}
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    return pipe(
        **given, latents=latents, height=8, width=8, num_inference_steps=3, guidance_scale=4.0, output_type="latent"
    ).images


# ── diffusers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_diffusers_samples_the_same_from_either_layout(mixed, tmp_path):
    from peft.tuners.tuners_utils import BaseTunerLayer

    family, wanted = mixed.family, sampled(pipeline(mixed.family, mixed.unet), mixed.family)
    pipe = pipeline(family, copy.deepcopy(mixed.bare))
    for layout in ("kohya", "diffusers"):
        path = write.save_adapter(
            mixed.adapter, mixed.base, place(tmp_path, layout), dtype=torch.float32, layout=layout
        )
        pipe.load_lora_weights(path)
        layers = {name for name, module in pipe.unet.named_modules() if isinstance(module, BaseTunerLayer)}
        assert layers == mixed.adapter.layers.keys()  # none is dropped
        assert distance(answer(pipe.unet, family), answer(mixed.unet, family)) < 1e-5
        assert distance(sampled(pipe, family), wanted) < 1e-4
        assert proof_module.prove(path, mixed.adapter, mixed.base, layout=layout).error < 1e-6
        pipe.unload_lora_weights()
    assert distance(sampled(pipe, family), wanted) > 0.01  # or the test says nothing
    # Older releases pass over the settings in the metadata, and take alpha for the rank: the scale is in the weights.
    save_file(readers.read(path)[0], path, {"format": "pt"})
    pipe.load_lora_weights(path)
    assert distance(answer(pipe.unet, family), answer(mixed.unet, family)) < 1e-5


def test_diffusers_reads_text_encoders_of_mixed_ranks(text_twin, tmp_path):
    """Of a kohya file it reads one alpha for all of a text encoder, and for all attention of a UNet."""
    twin, family = text_twin, text_twin.family
    for layout in ("kohya", "diffusers"):
        path = write.save_adapter(twin.adapter, twin.base, place(tmp_path, layout), dtype=torch.float32, layout=layout)
        models = copy.deepcopy(twin.bare)
        pipeline(family, **models).load_lora_weights(path)
        assert distance(said(models, family), said(twin.models, family)) < 1e-5
        assert distance(answer(models["unet"], family), answer(twin.models["unet"], family)) < 1e-5
        assert proof_module.prove(path, twin.adapter, twin.base, layout=layout).error < 1e-6
    assert distance(said(twin.bare, family), said(twin.models, family)) > 0.1  # or the test says nothing


def test_the_settings_of_another_file_do_not_go_along(sd15, tmp_path):
    """diffusers refuses a file that has alphas and its own settings, too."""
    first = write.save_adapter(
        sd15.adapter, sd15.base, place(tmp_path, "diffusers"), dtype=torch.float32, layout="diffusers"
    )
    second = write.save(read_module.load(first), place(tmp_path, "kohya"), dtype=torch.float32)
    assert "lora_adapter_metadata" not in readers.read(second)[1]
    pipe = pipeline("sd15", copy.deepcopy(sd15.bare))
    pipe.load_lora_weights(second)
    assert distance(answer(pipe.unet, "sd15"), answer(sd15.unet, "sd15")) < 1e-5


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_projections_of_a_single_file_become_linear(layout, tmp_path):
    """sd-scripts makes convolutions of SD 2's when it trains on one; diffusers' UNet has no place for these."""
    twin = twin_of("sd2")
    tensors, metadata, _ = readers.read(
        write.save_adapter(twin.adapter, twin.base, place(tmp_path, "kohya"), dtype=torch.float32)
    )
    tensors = {
        key: tensor[..., None, None] if tensor.ndim == 2 and re.search("proj_(in|out)[.]", key) else tensor
        for key, tensor in tensors.items()
    }  # fmt: skip
    save_file(tensors, place(tmp_path, "kohya"), metadata)
    read = read_module.load(place(tmp_path, "kohya"))
    assert read.parts["mid_block.attentions.0.proj_in"]["down"].ndim == 4
    path = write.save(read, place(tmp_path, layout), dtype=torch.float32, layout=layout)
    if layout == "peft":
        unet = from_peft(copy.deepcopy(twin.bare), path / "unet")
    else:
        (pipe := pipeline("sd2", copy.deepcopy(twin.bare))).load_lora_weights(path)
        unet = pipe.unet
    assert distance(answer(unet, "sd2"), answer(twin.unet, "sd2")) < 1e-5
    assert proof_module.prove(path, read, layout=layout).error < 1e-6


# ── PEFT ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def from_peft(model, folder: Path):
    """The model with what PEFT itself reads from a folder."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).base_model.model


def test_peft_reads_mixed_ranks(mixed, tmp_path):
    path = write.save_adapter(mixed.adapter, mixed.base, place(tmp_path, "peft"), dtype=torch.float32, layout="peft")
    unet = from_peft(copy.deepcopy(mixed.bare), path / "unet")
    assert distance(answer(unet, mixed.family), answer(mixed.unet, mixed.family)) < 1e-5
    proof = proof_module.prove(path, mixed.adapter, mixed.base, layout="peft")
    assert proof.modules == len(mixed.adapter.layers) and proof.error < 1e-6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_peft_reads_every_algorithm_it_has(kind, tmp_path):
    """A LoKr that has nothing of low rank has no scale: PEFT's settings must not make one."""
    twin = twin_of("sd15", kind, "attention+conv")
    path = write.save_adapter(twin.adapter, twin.base, place(tmp_path, "peft"), dtype=torch.float32, layout="peft")
    unet = from_peft(copy.deepcopy(twin.bare), path / "unet")
    assert distance(answer(unet, "sd15"), answer(twin.unet, "sd15")) < 1e-5
    assert proof_module.prove(path, twin.adapter, twin.base, layout="peft").error < 1e-6
    again = write.save(read_module.load(path), place(tmp_path, "kohya"), dtype=torch.float32)
    assert proof_module.prove(again, twin.adapter, twin.base).error < 1e-6


def test_peft_reads_text_encoders(text_twin, tmp_path):
    twin, family = text_twin, text_twin.family
    path = write.save_adapter(twin.adapter, twin.base, place(tmp_path, "peft"), dtype=torch.float32, layout="peft")
    assert sorted(os.listdir(path)) == sorted(twin.models)
    models = {which: from_peft(model, path / which) for which, model in copy.deepcopy(twin.bare).items()}
    assert distance(said(models, family), said(twin.models, family)) < 1e-5
    read = read_module.load(path)
    assert read.family == family and read.adapts == tuple(sorted(twin.models))
    for which in twin.models:  # each for itself, too, as its folder or its file
        for part in (path / which, path / which / read_module.PEFT):
            assert read_module.load(part).adapts == (which,)


def test_lokr_as_peft_does_not_divide_it(sd15, tmp_path):
    """PEFT would make other parts than the file has, and leave these out with a warning alone."""
    twin = twin_of("sd15", "lokr", "attention+conv")
    own = write.lora_from(twin.adapter, twin.base)
    module, (parts, alpha) = next(entry for entry in own.modules.items() if "lokr_w2_a" in entry[1][0])
    whole = {"lokr_w1": parts["lokr_w1"], "lokr_w2": parts["lokr_w2_a"] @ parts["lokr_w2_b"]}
    apart = {"lokr_w1_a": parts["lokr_w1"], "lokr_w1_b": torch.eye(parts["lokr_w1"].shape[1])} | {
        part: tensor for part, tensor in parts.items() if part != "lokr_w1"
    }
    turned = {"lokr_w1": parts["lokr_w1"].repeat(2, 1), "lokr_w2_a": parts["lokr_w2_a"][::2]} | {
        part: tensor for part, tensor in parts.items() if part == "lokr_w2_b"
    }
    write.save(replace(own, modules=own.modules | {module: (whole, 1.0)}), tmp_path / "whole", layout="peft")
    for other in (apart, turned):
        with pytest.raises(ValueError, match=naming("adapter", "kohya")):
            write.save(replace(own, modules=own.modules | {module: (other, alpha)}), tmp_path / "x", layout="peft")
    assert sorted(os.listdir(tmp_path)) == ["whole"]


# ── By the published rule, without lorakit's reader ─────────────────────────────────────────────────────────────────


def rules(path: Path, layout: str) -> dict[str, torch.Tensor]:
    """Module → what is added to its weight, by PEFT's rule for names, ranks and alphas."""
    file, prefix = (path, "unet.") if layout == "diffusers" else (path / "unet" / read_module.PEFT, "base_model.model.")
    tensors, metadata, _ = readers.read(file)
    settings = json.loads(
        metadata["lora_adapter_metadata"]
        if layout == "diffusers"
        else file.with_name("adapter_config.json").read_text()
    )
    settings = {key.removeprefix("unet."): value for key, value in settings.items()}
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, part = key.removeprefix(prefix).removesuffix(".weight").rpartition(".")
        part = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}.get(part, part)
        modules.setdefault(module, {})[part] = tensor.float()
    assert sorted(modules) == sorted(settings["target_modules"])
    usual = settings.get("lora_alpha", settings.get("alpha"))
    found = {}
    for module, own in modules.items():
        found[module], rank = readers.rebuilt(own)
        told = settings["rank_pattern"].get(module, settings["r"])
        assert rank in (None, told)
        found[module] = found[module] * (settings["alpha_pattern"].get(module, usual) / told)
    return found


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_the_raw_numbers_say_the_same(mixed, layout, tmp_path):
    path = write.save_adapter(mixed.adapter, mixed.base, place(tmp_path, layout), dtype=torch.float32, layout=layout)
    found = rules(path, layout)
    assert found.keys() == mixed.adapter.layers.keys()
    for module, added in found.items():
        wanted = mixed.adapter.layers[module].delta()
        assert torch.allclose(added.flatten(), wanted.flatten(), rtol=1e-4, atol=1e-6)
    if layout == "diffusers":  # what takes alpha for the rank reads it as well
        settings = json.loads(readers.read(path)[1]["lora_adapter_metadata"])
        assert settings["unet.r"] == settings["unet.lora_alpha"]
        assert settings["unet.rank_pattern"] == settings["unet.alpha_pattern"]


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr of two"])
def test_the_raw_numbers_of_other_algorithms_say_the_same(kind, tmp_path):
    twin = twin_of("sd15", kind, "attention+conv")
    found = rules(
        write.save_adapter(twin.adapter, twin.base, place(tmp_path, "peft"), dtype=torch.float32, layout="peft"), "peft"
    )
    for module in twin.adapter.layers:
        wanted = twin.adapter.layers[module].delta()
        assert torch.allclose(found[module].flatten(), wanted.flatten(), rtol=1e-4, atol=1e-6)


# ── Every layout ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", write.LAYOUTS)
@pytest.mark.parametrize("name, most", [("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 1e-2)])
def test_read_back_and_proven_in_every_precision(sd15, layout, name, most, tmp_path):
    dtype = write.DTYPES[name]
    path = write.save_adapter(sd15.adapter, sd15.base, place(tmp_path, layout), dtype=dtype, layout=layout)
    proof = proof_module.prove(path, sd15.adapter, sd15.base, layout=layout)
    assert proof.modules == len(sd15.adapter.layers) and proof.error < most
    read = read_module.load(path)
    assert read.family == "sd15" and {t.dtype for parts in read.parts.values() for t in parts.values()} == {dtype}
    attachment.attach(unet := copy.deepcopy(sd15.bare), sd15.base, read)
    assert distance(answer(unet, "sd15"), answer(sd15.unet, "sd15")) < 10 * most
    again = write.save(read, tmp_path / "again.safetensors", dtype=torch.float32)
    assert proof_module.prove(again, read).error < 1e-6


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_a_wrong_file_is_caught(sd15, layout, tmp_path):
    path = write.save_adapter(sd15.adapter, sd15.base, place(tmp_path, layout), layout=layout)
    file = path / "unet" / read_module.PEFT if layout == "peft" else path
    tensors, metadata, _ = readers.read(file)
    tensors[min(tensors)][0, 0] += 0.05
    module = re.search(r"down_blocks.*(?=[.]lora_A)", min(tensors))[0]
    save_file(tensors, file, metadata)
    with pytest.raises(RuntimeError, match=naming(path.name, module)):
        proof_module.prove(path, sd15.adapter, sd15.base, layout=layout)


def test_nothing_private_goes_into_any_file_of_a_folder(sd15, tmp_path):
    write.save_adapter(sd15.adapter, sd15.base, tmp_path / "lora", metadata=a_run(sd15), layout="peft")
    written = sorted(file for file in (tmp_path / "lora").rglob("*") if file.is_file())
    assert [file.name for file in written] == ["adapter_config.json", read_module.PEFT]
    for file in written:
        assert not re.search(
            rf"anna|nowhere|private|{tmp_path.parent.name}|/tmp|/root|/home".encode(), file.read_bytes()
        )
    settings = json.loads(written[0].read_text())
    assert settings["base_model_name_or_path"] is None and settings["revision"] is None
    assert "ss_output_name" in readers.read(written[1])[1]
    with pytest.raises(ValueError, match=naming("ss_x")):
        write.save_adapter(sd15.adapter, sd15.base, tmp_path / "b", metadata={"ss_x": "/home/anna/cats"}, layout="peft")
    assert os.listdir(tmp_path) == ["lora"]


# ── What is not written ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "algorithm, layout, able",
    [
        ("dora", "diffusers", ["kohya"]),
        ("dora", "peft", ["kohya"]),
        ("loha", "diffusers", ["kohya", "peft"]),
        ("lokr", "diffusers", ["kohya", "peft"]),
    ],
)
def test_an_algorithm_that_a_layout_has_no_place_for(algorithm, layout, able, tmp_path):
    twin = twin_of("sd15", algorithm, "attention+conv")
    with pytest.raises(ValueError, match=naming(layout, algorithm, *able)) as raised:
        write.save_adapter(twin.adapter, twin.base, place(tmp_path, layout), layout=layout)
    assert os.listdir(tmp_path) == [] and write.refusal(layout, algorithm) == str(raised.value)
    assert {other for other in write.LAYOUTS if names(str(raised.value), other)} == {*able, layout}
    assert write.refusal("kohya", algorithm) is None


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_nothing_is_left_out_in_silence(sd15, layout, tmp_path):
    """Several algorithms in one file, or an embedding beside the layers."""
    own = write.lora_from(sd15.adapter, sd15.base)
    first = next(iter(own.modules))
    loha = {f"hada_w{n}_{side}": torch.ones(4, 4) for n in (1, 2) for side in "ab"}
    bundle = "bundle_emb.ohwx.string_to_param.*"
    for held, change in [
        (["loha", "lora"], {"modules": own.modules | {first: (loha, 1.0)}}),
        (["lora", bundle], {"aside": {bundle: torch.ones(2, 3)}}),
        ([], {"modules": {}}),
    ]:
        with pytest.raises(ValueError, match=naming(layout, "adapter", *held, "kohya")):
            write.save(replace(own, **change), place(tmp_path, layout), layout=layout)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name, layout, named",
    [
        ("a.pt", "kohya", ["a.pt", ".safetensors"]),
        ("all", "diffusers", ["all", ".safetensors"]),
        ("a.safetensors", "peft", ["a.safetensors"]),
        ("a.safetensors", "lycoris", list(write.LAYOUTS)),
    ],
)
def test_names_that_do_not_go_with_a_layout(sd15, name, layout, named, tmp_path):
    with pytest.raises(ValueError, match=naming(layout, *named)):
        write.save_adapter(sd15.adapter, sd15.base, tmp_path / name, layout=layout)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_there_is_not_written_over(sd15, tmp_path):
    path = write.save_adapter(sd15.adapter, sd15.base, tmp_path / "lora", layout="peft")
    before = (path / "unet" / read_module.PEFT).read_bytes()
    with pytest.raises(FileExistsError, match=naming("lora")):
        write.save_adapter(sd15.adapter, sd15.base, path, layout="peft", dtype=torch.float32)
    assert (path / "unet" / read_module.PEFT).read_bytes() == before and os.listdir(tmp_path) == ["lora"]


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_a_full_disk_leaves_nothing(sd15, layout, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    path = write.save_adapter(sd15.adapter, sd15.base, place(tmp_path, layout), layout=layout)
    needed = [] if path.is_dir() else [f"{path.stat().st_size:,}"]
    path.rename(tmp_path / "before")
    monkeypatch.setattr(files.os, "fsync", full)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: files.shutil._ntuple_diskusage(9_000_000, 0, 7_654_321))
    with pytest.raises(OSError, match=naming(path.name, "7,654,321", *needed)):
        write.save_adapter(sd15.adapter, sd15.base, path, layout=layout)
    assert os.listdir(tmp_path) == ["before"]


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_spoilt_weights_are_not_written(sd15, layout, tmp_path):
    own = write.lora_from(sd15.adapter, sd15.base)
    module, (parts, alpha) = next(iter(own.modules.items()))
    spoilt = {part: tensor.clone().fill_(1e5) for part, tensor in parts.items()}
    with pytest.raises(FloatingPointError, match=naming(place(tmp_path, layout).name, 2, "float16")):
        write.save(
            replace(own, modules=own.modules | {module: (spoilt, alpha)}), place(tmp_path, layout), layout=layout
        )
    assert os.listdir(tmp_path) == []
