"""Checkpoint files in Stability's layout, written by these tests, read by lorakit and by diffusers."""

import json
import shutil
from pathlib import Path

import hubserver
import pytest
import torch
from safetensors.torch import save_file
from said import naming
from stability import weights, write_file

from lorakit import storage
from lorakit.base import model as bases
from lorakit.base import single_file
from lorakit.device import Compute

CPU = torch.device("cpu")
WIDTHS = {"sd15": (768,), "sd2": (1024,), "sdxl": (768, 1280)}  # diffusers distinguishes text encoders by these


def write_folder(folder: Path, family: str) -> Path:
    """A diffusers folder with the family's levels and blocks, few channels and random weights."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.schedulers import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    published = bases.known({"sd2": "sd21"}.get(family, family)).configs
    widths = WIDTHS[family]
    levels = len(published["unet"]["block_out_channels"])
    narrow = {"block_out_channels": (16, 32, 48, 48)[:levels], "norm_num_groups": 8, "attention_head_dim": 2}
    if family == "sdxl":
        narrow |= {"projection_class_embeddings_input_dim": 6 * 4 + widths[1], "addition_time_embed_dim": 4}
    small = {"block_out_channels": (8, 8, 8, 16), "norm_num_groups": 4}
    text = [
        CLIPTextConfig(
            vocab_size=500, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            projection_dim=width, eos_token_id=499,
        )
        for width in widths
    ]  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(bases.FAMILIES / "tokenizer")
    parts = {
        "unet": UNet2DConditionModel.from_config(published["unet"] | narrow | {"sample_size": 8}),
        "vae": AutoencoderKL.from_config(published["vae"] | small),
        "scheduler": DDIMScheduler.from_config(published["scheduler"]),
        "text_encoder": CLIPTextModel(text[0]),
        "tokenizer": tokenizer,
    }
    if family == "sdxl":
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(text[1]), "tokenizer_2": tokenizer}
        pipeline = StableDiffusionXLPipeline(**parts)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """family → (diffusers folder, the same in one file); lorakit's configs of the families are patched to match."""
    root = tmp_path_factory.mktemp("original")
    (root / "families").mkdir()
    (root / "families" / "tokenizer").symlink_to(bases.FAMILIES / "tokenizer")
    both = {}
    for family in WIDTHS:
        folder = write_folder(root / family, family)
        components = ["unet", "vae", "scheduler", "text_encoder"] + ["text_encoder_2"] * (family == "sdxl")
        configs = {
            c: json.loads((folder / c / ("scheduler_config.json" if c == "scheduler" else "config.json")).read_text())
            for c in components
        }
        for name in {"sd2": ("sd21", "sd21-base")}.get(family, (family,)):
            schedule = {"prediction_type": "v_prediction" if name == "sd21" else "epsilon"}
            narrow = configs | {"scheduler": configs["scheduler"] | schedule}
            (root / "families" / f"{name}.json").write_text(json.dumps(narrow))
        both[family] = folder, write_file(folder, root / f"{family}.safetensors", family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bases, "FAMILIES", root / "families")
        yield both


@pytest.mark.parametrize("family", WIDTHS)
def test_diffusers_reads_what_these_tests_write(checkpoints, family):
    """Otherwise an error shared by reader and writer would go unnoticed."""
    import diffusers

    folder, file = checkpoints[family]
    kind = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    pipeline = getattr(diffusers, kind).from_single_file(
        str(file), config=str(folder), torch_dtype=torch.float16, local_files_only=True
    )
    for component in ("unet", "vae", *bases.open(folder).text_encoders):
        theirs = {name.removeprefix("text_model."): x for name, x in getattr(pipeline, component).state_dict().items()}
        for name, tensor in weights(folder, component).items():
            assert torch.equal(theirs[name], tensor), (component, name)


@pytest.mark.parametrize("family", WIDTHS)
def test_a_file_has_the_same_weights_as_its_folder(checkpoints, family, monkeypatch):
    monkeypatch.setattr(bases, "load_tokenizer", lambda *_: None)  # saves time
    folder, file = checkpoints[family]
    base, twin = bases.open(file), bases.open(folder)
    assert (base.family, base.name) == (family, f"{family}.safetensors")
    assert base.configs["unet"] == twin.configs["unet"]
    for component in ("unet", "vae", *base.text_encoders):
        load = {"unet": bases.load_unet, "vae": bases.load_vae}.get(component)

        def read(base, dtype, load=load, component=component):
            compute = Compute(CPU, dtype)
            return load(base, compute) if load else bases.load_text_encoder(base, compute, component)[0]

        expected = read(twin, torch.float32).state_dict()  # of the file's float16 exactly
        for dtype in (torch.float32, torch.bfloat16):
            model = read(base, dtype)
            state = model.state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[n], x.to(state[n].dtype)) for n, x in expected.items()), component
            assert not model.training and not any(weight.requires_grad for weight in model.parameters())
            assert {weight.dtype for weight in model.parameters()} == {dtype}


@pytest.mark.parametrize("family", WIDTHS)
def test_a_file_is_the_same_base_as_its_folder(checkpoints, family):
    folder, file = checkpoints[family]
    assert bases.identity(bases.open(folder)) == bases.identity(bases.open(file))


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_single_weights_are_read_from_a_file(checkpoints, family):
    folder, file = (bases.open(reference) for reference in checkpoints[family])
    for component in ("unet", *folder.text_encoders):
        theirs, ours = bases.weight_places(file, component), bases.weight_places(folder, component)
        assert ours.keys() - {"embeddings.position_ids"} <= theirs.keys()
        for name in ours.keys() & theirs.keys():
            assert theirs[name].shape == ours[name].shape, name
        ends = ("q_proj.weight", "v_proj.bias", "conv_in.weight", "projection.weight")
        compared = [name for name in ours if name.endswith(ends)]
        assert compared and all(torch.equal(theirs[name].read(), ours[name].read()) for name in compared)


def test_a_header_is_read_in_the_order_of_the_file(tmp_path):
    tensors = {"b": torch.ones(2, 3), "a": torch.ones(4, dtype=torch.float16), "none": torch.empty(0)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    metadata, table = storage.read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"} and table.keys() == tensors.keys()
    ends = [0, *(entry["data_offsets"][1] for entry in table.values())]
    assert [entry["data_offsets"][0] for entry in table.values()] == ends[:-1] and ends[-1] == 32
    assert table["a"]["dtype"] == "F16" and table["b"]["shape"] == [2, 3]


def test_prompts_are_padded_as_in_each_encoders_training(checkpoints):
    """OpenAI's CLIP repeats its end token, OpenCLIP uses zeros."""
    for family, encoder, padding in (
        ("sd15", "text_encoder", 49407), ("sd2", "text_encoder", 0), ("sdxl", "text_encoder", 49407),
        ("sdxl", "text_encoder_2", 0),
    ):  # fmt: skip
        _, tokenizer = bases.load_text_encoder(bases.open(checkpoints[family][1]), Compute(CPU, torch.float32), encoder)
        ids = tokenizer("a photo of a cat", padding="max_length", max_length=77).input_ids
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [padding] * 70


def test_the_noise_schedule_recorded_in_a_file(checkpoints, tmp_path):
    folder, file = checkpoints["sdxl"]
    assert bases.open(file).prediction_type == "epsilon"
    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    base = bases.open(write_file(folder, tmp_path / "v.safetensors", "sdxl", tensors=marks))
    assert base.prediction_type == "v_prediction"
    assert float(base.alphas_cumprod()[-1]) == 0
    folder, file = checkpoints["sd2"]
    assert bases.open(file).prediction_type == "v_prediction"  # the more common of two indistinguishable types
    assert bases.open(file, "epsilon").prediction_type == "epsilon"
    metadata = {"modelspec.architecture": "stable-diffusion-v2-512"}
    assert bases.open(write_file(folder, tmp_path / "e.safetensors", "sd2", **metadata)).prediction_type == "epsilon"
    assert float(bases.open(file, zero_terminal_snr=True).alphas_cumprod()[-1]) == 0
    with pytest.raises(ValueError, match=naming("prediction_type", "v", "auto", "epsilon", "v_prediction")):
        bases.open(file, "v")


def test_a_fingerprint_depends_on_one_component(checkpoints, tmp_path):
    folder, file = checkpoints["sd15"]
    key = single_file.VAE_PREFIX + "quant_conv.bias"
    other = bases.open(write_file(folder, tmp_path / "o.safetensors", "sd15", tensors={key: torch.ones(8)}))
    base = bases.open(file)
    assert bases.fingerprint(base, "vae") != bases.fingerprint(other, "vae")
    assert bases.fingerprint(base, "text_encoder") == bases.fingerprint(other, "text_encoder")


def test_half_a_checkpoint_is_refused(checkpoints, tmp_path):
    refusals = set()
    for left_out, named in (
        ("cond_stage_model.", ("text encoder",)), ("first_stage_model.", ("VAE",)),
        ("model.diffusion_model.out.", ("sd15", 682, 686)), ("model.diffusion_model.", ()),
    ):  # fmt: skip
        file = write_file(checkpoints["sd15"][0], tmp_path / "half.safetensors", "sd15", leave_out=left_out)
        with pytest.raises(ValueError, match=naming("half.safetensors", *named)) as raised:
            bases.open(file)
        refusals.add(str(raised.value))
    assert len(refusals) == 4


def test_other_kinds_of_files_are_named(checkpoints, tmp_path):
    kinds = set()
    for key, kind in (
        ("lora_unet_x.lora_down.weight", "LoRA"), ("double_blocks.0.img.weight", "Flux"),
        ("conditioner.embedders.0.model.ln_final.weight", "refiner"), ("something", ""),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers"),
    ):  # fmt: skip
        save_file({key: torch.zeros(1)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=naming("x.safetensors", kind)) as raised:
            bases.open(tmp_path / "x.safetensors")
        kinds.add(str(raised.value))
    assert len(kinds) == 5
    wide = {single_file.UNET_PREFIX + "input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}
    with pytest.raises(ValueError, match=naming("paint.safetensors", 9, 4)):
        bases.open(write_file(checkpoints["sd15"][0], tmp_path / "paint.safetensors", "sd15", tensors=wide))
    narrow = {single_file.UNET_PREFIX + "out.2.weight": torch.zeros(4, 8, 3, 3)}
    base = bases.open(write_file(checkpoints["sd15"][0], tmp_path / "odd.safetensors", "sd15", tensors=narrow))
    count = len(weights(checkpoints["sd15"][0], "unet"))
    named = naming("odd.safetensors", "unet", 1, count, "conv_out.weight", "(4, 8, 3, 3)")
    with pytest.raises(ValueError, match=named):
        bases.load_unet(base, Compute(CPU, torch.float32))
    whole = (tmp_path / "odd.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=naming("cut.safetensors", f"{len(whole) // 2:,}")):
        bases.open(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    "reference",
    ["owner/model/some folder/x.safetensors", "https://huggingface.co/owner/model/blob/main/some folder/x.safetensors",
     "https://huggingface.co/owner/model/resolve/main/some%20folder/x.safetensors?download=true"],
)  # fmt: skip
def test_a_file_on_the_hub(checkpoints, tmp_path, monkeypatch, reference):
    file = checkpoints["sd15"][1]
    with hubserver.running("hf_" + "x" * 34) as hub:
        hub.used_by(monkeypatch, tmp_path / "hub")
        hub.create("owner/model")
        hub.files["owner/model"]["some folder/x.safetensors"] = file.read_bytes()
        base = bases.open(reference)
        assert base.name == "x.safetensors" and bases.identity(base) == bases.identity(bases.open(file))
        with pytest.raises(FileNotFoundError, match=naming("owner/model/y.safetensors", "HF_TOKEN")):
            bases.open("owner/model/y.safetensors")
    assert bases.open(reference).file == base.file  # it is kept


@pytest.mark.parametrize("name", ["x.safetensors", "a/x.safetensors", "./a/b/x.safetensors", "~/a/b/x.safetensors",
                                  "C:\\a\\b\\x.safetensors", "a/b/x.ckpt", "/a/b/c/x.safetensors"])  # fmt: skip
def test_what_is_no_file_on_the_hub(name):
    assert storage.hub_file(name) is None


@pytest.mark.parametrize(
    "key, dtype, named",
    [
        ("scaled_fp8", torch.float8_e4m3fn, ("fp8",)),
        ("model.diffusion_model.out.2.scale_weight", torch.float32, ("fp8",)),
        ("model.diffusion_model.out.2.comfy_quant", torch.uint8, ("fp8",)),
        ("model.diffusion_model.out.2.weight.quant_state.bitsandbytes__nf4", torch.uint8, ("NF4",)),
        ("model.diffusion_model.out.2.SCB", torch.float32, ("int8",)),
        ("model.diffusion_model.middle_block.0.in_layers.2.weight", torch.int8, ("integers",)),
    ],
)  # fmt: skip
def test_quantized_checkpoints_are_named(checkpoints, tmp_path, key, dtype, named):
    file = tmp_path / "q.safetensors"
    write_file(checkpoints["sd15"][0], file, "sd15", tensors={key: torch.zeros(2, dtype=dtype)})
    with pytest.raises(ValueError, match=naming("q.safetensors", *named, "fp16")):
        bases.open(file)


def test_quantized_folders_are_named(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["sd15"][0], tmp_path / "q")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ValueError, match=naming("q", "unet", "fp16")):
        bases.open(folder)


DISGUISES = {
    "web page": b"\n<!DOCTYPE html><html>", "website's answer": b'{"error":"Unauthorized","message":"log in"}',
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "GGUF": b"GGUF\3\0\0\0\0\0\0\0",
    "pickle": b"\x80\x02}q\x00X\x05\x00\x00\x00lorakit", "zip": b"PK\x03\x04 and so on",
}  # fmt: skip


@pytest.mark.parametrize("kind", DISGUISES)
def test_what_only_has_the_name_of_a_checkpoint(checkpoints, tmp_path, kind):
    """As one file, as the weights of a folder, and as a config in it."""
    (file := tmp_path / "x.safetensors").write_bytes(DISGUISES[kind])
    with pytest.raises(ValueError, match=naming("x.safetensors", *kind.split())):
        bases.open(file)
    folder = shutil.copytree(checkpoints["sd15"][0], tmp_path / "folder")
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.write_bytes(DISGUISES[kind])
    with pytest.raises(ValueError, match=naming(weights.name, *kind.split())):
        bases.load_unet(bases.open(folder), Compute(CPU, torch.float32))
    (folder / "vae" / "config.json").write_bytes(DISGUISES[kind][:20])
    with pytest.raises(ValueError, match=naming("vae/config.json")):
        bases.open(folder)


def test_a_safetensors_file_that_was_cut_off_is_called_nothing_else(tmp_path):
    """Its header's length may begin with the byte that begins a pickle."""
    (file := tmp_path / "x.safetensors").write_bytes((0x3980).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"')
    with pytest.raises(ValueError, match=r"x\.safetensors .* it was cut off or damaged"):
        bases.open(file)


@pytest.mark.parametrize("name", ["model.ckpt", "MODEL.CKPT", "a.Pth", "b.BIN"])
def test_pickles_of_any_case_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=naming(name, "pickle", ".safetensors")):
        bases.open(tmp_path / name)


def test_a_folder_of_checkpoint_files_says_which_to_give(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=naming("model.safetensors")):
        bases.open(tmp_path)
