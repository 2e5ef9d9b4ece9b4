import dataclasses
import json
import shutil

import hubserver
import pytest
import torch
from safetensors.torch import load_file, save_file
from said import naming

from lorakit import device, storage
from lorakit.base import model as bases
from lorakit.device import Compute

CPU = torch.device("cpu")


@torch.no_grad()
def encode_prompts(encoder, tokenizer, prompts, family, clip_skip=1):
    return bases.encode(encoder, bases.tokenize(tokenizer, prompts), family, clip_skip)


def test_families_are_recognised_by_their_structure(small_bases):
    for family, folder in small_bases.items():
        base = bases.open(folder)
        assert base.family == family
        assert (base.vae_factor, base.step, base.resolution, base.latent_channels) == (4, 8, 32, 4)
    assert bases.open(small_bases["sd2"]).prediction_type == "v_prediction"
    assert bases.open(small_bases["sdxl"]).text_encoders == ("text_encoder", "text_encoder_2")


def test_the_embedded_base_opens_by_name_and_names_no_path():
    base = bases.open("demo")
    assert (base.name, base.family, base.resolution, base.step) == ("lorakit/demo", "sd15", 64, 16)


def test_the_noise_schedule_is_the_bases_own(small_bases):
    alphas = bases.open(small_bases["sd15"]).alphas_cumprod()
    assert alphas.shape == (1000,)
    assert float(alphas[0]) == pytest.approx(1 - 0.00085)


@pytest.mark.parametrize(("name", "named"), [("model.ckpt", ("pickle", ".safetensors")), ("model.safetensors", (1,))])
def test_unusable_files_are_refused_with_advice(tmp_path, name, named):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=naming(name, *named)):
        bases.open(tmp_path / name)


def test_other_models_are_refused(tmp_path, small_bases):
    with pytest.raises(FileNotFoundError, match=naming("nowhere", "demo")):
        bases.open("nowhere")
    with pytest.raises(ValueError, match=naming(tmp_path, "unet", "vae", "scheduler")):
        bases.open(tmp_path)
    twin = shutil.copytree(small_bases["sd15"], tmp_path / "inpainting")
    config = json.loads((twin / "unet" / "config.json").read_text())
    (twin / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    with pytest.raises(ValueError, match=naming(twin, 9, 4)):
        bases.open(twin)
    (twin / "unet" / "config.json").write_text("{ cut")
    with pytest.raises(ValueError, match=naming("unet/config.json")):
        bases.open(twin)


@pytest.mark.parametrize(
    "schedule",
    [{"_class_name": "EDMEulerScheduler"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"},
     {"prediction_type": "sample"}, {"prediction_type": "flow_prediction"}],
)  # fmt: skip
def test_bases_of_other_noise_schedules_are_refused(tmp_path, small_bases, schedule):
    folder = shutil.copytree(small_bases["sdxl"], tmp_path / "other")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | schedule))
    with pytest.raises(ValueError, match=naming("other", *schedule.values())):
        bases.open(folder)


def test_an_unreachable_hub_id_says_so(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=naming("owner/model", "no route to host", "HF_TOKEN")):
        bases.open("owner/model")


def test_pickled_weights_are_never_loaded(tmp_path, small_bases):
    twin = shutil.copytree(small_bases["sd15"], tmp_path / "pickled")
    (twin / "unet" / "diffusion_pytorch_model.safetensors").rename(twin / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=naming("unet", "diffusion_pytorch_model.bin")):
        bases.load_unet(bases.open(twin), Compute(CPU, torch.float32))


def test_a_fingerprint_follows_the_weights(tmp_path, small_bases):
    base = bases.open(small_bases["sd15"])
    twin = bases.open(shutil.copytree(small_bases["sd15"], tmp_path / "twin"))
    assert bases.fingerprint(base, "vae") == bases.fingerprint(twin, "vae")
    file = next((twin.folder / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert bases.fingerprint(base, "vae") != bases.fingerprint(twin, "vae")


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_prompts_are_encoded_as_diffusers_encodes_them(small_bases, family):
    import diffusers

    base = bases.open(small_bases[family])
    prompts = ["a red apple", "noto style, rocket, blue background, small, left"]
    parts = [bases.load_text_encoder(base, Compute(CPU, torch.float32), name) for name in base.text_encoders]
    encoded = [encode_prompts(encoder, tokenizer, prompts, family) for encoder, tokenizer in parts]
    ours = torch.cat([embeddings for embeddings, _ in encoded], dim=-1)
    shared = {
        "unet": bases.load_unet(base, Compute(CPU, torch.float32)),
        "vae": bases.load_vae(base, Compute(CPU, torch.float32)),
    }
    shared["scheduler"] = diffusers.DDIMScheduler.from_config(base.configs["scheduler"])
    if family == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(
            text_encoder=parts[0][0],
            tokenizer=parts[0][1],
            text_encoder_2=parts[1][0],
            tokenizer_2=parts[1][1],
            **shared,
        )
        theirs, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        assert torch.allclose(encoded[1][1], pooled, atol=1e-6)
        assert ours.shape == (2, 77, 32)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            text_encoder=parts[0][0], tokenizer=parts[0][1], safety_checker=None, feature_extractor=None,
            requires_safety_checker=False, **shared,
        )  # fmt: skip
        theirs, _ = pipeline.encode_prompt(prompts, CPU, 1, False)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_clip_skip_is_an_encoder_without_its_last_layers(small_bases):
    base = bases.open(small_bases["sd15"])
    encoder, tokenizer = bases.load_text_encoder(base, Compute(CPU, torch.float32))
    skipped, _ = encode_prompts(encoder, tokenizer, ["a cat"], "sd15", clip_skip=2)
    inner = getattr(encoder, "text_model", encoder)
    inner.encoder.layers = inner.encoder.layers[:-1]
    shorter, _ = encode_prompts(encoder, tokenizer, ["a cat"], "sd15")
    assert torch.allclose(skipped, shorter, atol=1e-6)


def test_devices_and_dtypes(monkeypatch):
    assert device.choose_device("cpu") == CPU
    assert device.compute_dtype("auto", CPU) == torch.float32
    assert device.compute_dtype("bf16", CPU) == torch.bfloat16
    with pytest.raises(ValueError, match=naming("fp16", "bf16", "no")):
        device.compute_dtype("fp16", CPU)
    # A T4 (7.5) reports bf16, but only emulates it
    card = torch.device("cuda")
    for capability, dtype in [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert device.compute_dtype("auto", card) == dtype


def test_a_missing_device_is_refused():
    missing = next(d for d in ("mps", "cuda") if d != device.choose_device().type)
    with pytest.raises(ValueError, match=naming(missing, torch.__version__)):
        device.choose_device(missing)


def test_only_the_given_encoders_are_evaluated_again(small_bases):
    base = bases.open(small_bases["sdxl"])
    loaded = {name: bases.load_text_encoder(base, Compute(CPU, torch.float32), name) for name in base.text_encoders}
    outputs = [encode_prompts(*loaded[name], ["a cat", "a dog"], "sdxl") for name in base.text_encoders]
    embeddings, pooled = torch.cat([part for part, _ in outputs], -1), outputs[1][1]
    tokens = torch.stack([bases.tokenize(tokenizer, ["a cat", "a dog"]) for _, tokenizer in loaded.values()], 1)
    encoders = {name: encoder for name, (encoder, _) in loaded.items()}
    again = bases.reencode(base, encoders, embeddings.clone().zero_(), pooled.clone().zero_(), tokens)
    assert torch.equal(again[0], embeddings) and torch.equal(again[1], pooled)
    for name, place in (("text_encoder", slice(0, 16)), ("text_encoder_2", slice(16, 32))):
        mixed, mixed_pooled = bases.reencode(base, {name: encoders[name]}, -embeddings, -pooled, tokens)
        assert torch.equal(mixed[..., place], embeddings[..., place])
        assert torch.equal(mixed_pooled, pooled if name == "text_encoder_2" else -pooled)
        rest = [x for x in range(32) if x not in range(place.start, place.stop)]
        assert torch.equal(mixed[..., rest], -embeddings[..., rest])
    assert bases.reencode(base, {}, embeddings, pooled, tokens)[0].equal(embeddings)


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_weights_are_located_by_header_and_read_one_by_one(small_bases, family):
    base = bases.open(small_bases[family])
    for component in ("unet", "vae", *base.text_encoders):
        load = {"unet": bases.load_unet, "vae": bases.load_vae}.get(component)
        text = () if load else bases.load_text_encoder(base, Compute(CPU, torch.float32), component)
        model = load(base, Compute(CPU, torch.float32)) if load else text[0]
        weights = {name.removeprefix("text_model."): weight for name, weight in model.named_parameters()}
        places = bases.weight_places(base, component)
        assert weights.keys() <= places.keys()
        for name, weight in weights.items():
            assert places[name].shape == weight.shape and places[name].read().equal(weight)
        if component != "vae":
            empty = {name.removeprefix("text_model."): x for name, x in bases.empty(base, component).named_parameters()}
            assert {name: x.shape for name, x in empty.items()} == {name: x.shape for name, x in weights.items()}
            assert all(weight.is_meta for weight in empty.values())


def test_the_weight_files_of_a_component(tmp_path, small_bases):
    base = bases.open(shutil.copytree(small_bases["sd15"], tmp_path / "base"))
    folder = base.folder / "unet"
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another form")
    assert bases.weight_files(base, "unet") == [folder / "diffusion_pytorch_model.safetensors"]
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert bases.weight_files(base, "unet") == [folder / "diffusion_pytorch_model.fp16.safetensors"]
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    where = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}
    index.write_text(json.dumps({"weight_map": where}))
    (folder / "one.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=naming("unet", "two.safetensors")):
        bases.weight_files(base, "unet")
    (folder / "two.safetensors").write_bytes(b"")
    assert bases.weight_files(base, "unet") == [folder / "one.safetensors", folder / "two.safetensors"]


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_half_as_much_is_fetched_for_half_precision(tmp_path, small_bases, monkeypatch, family, half):
    """From a repository with both forms, sharded or not; the VAE is whole in any case."""
    source, hub_files = bases.open(small_bases[family]), {}
    for component in ("unet", "vae", *source.text_encoders):
        (file,) = bases.weight_files(source, component)
        tensors = load_file(file)
        save_file({key: x.half() for key, x in tensors.items()}, tmp_path / "half.safetensors", {"format": "pt"})
        forms = {"": file.read_bytes(), ".fp16": (tmp_path / "half.safetensors").read_bytes()}
        for form, content in forms.items():
            stem = file.name.removesuffix(".safetensors")
            if component == "text_encoder":
                shard = f"{stem}{form}-00001-of-00001.safetensors"
                index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)})
                hub_files[f"{component}/{shard}"] = content
                hub_files[f"{component}/{stem}.safetensors.index{form}.json"] = index.encode()
            else:
                hub_files[f"{component}/{stem}{form}.safetensors"] = content
    for file in source.folder.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            hub_files[file.relative_to(source.folder).as_posix()] = file.read_bytes()
    compute = Compute(CPU, torch.float16 if half else torch.float32)
    with hubserver.running("hf_" + "x" * 34) as hub:
        hub.used_by(monkeypatch, tmp_path / "hub")
        hub.create("owner/model")
        hub.files["owner/model"] |= hub_files
        base = bases.open("owner/model", half=half)
        models = {"unet": bases.load_unet(base, compute), "vae": bases.load_vae(base, compute)}
        models |= {which: bases.load_text_encoder(base, compute, which)[0] for which in base.text_encoders}
    fetched = {path.name for path in base.folder.rglob("*.safetensors") if path.parent.name != "vae"}
    assert fetched and all((".fp16" in name) == half for name in fetched), fetched
    assert [path.name for path in (base.folder / "vae").glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    for which, model in models.items():
        wanted = bases._load(source, which, dataclasses.replace(compute, dtype=model.dtype)).state_dict()
        assert all(torch.equal(x, wanted[name]) for name, x in model.state_dict().items()), which
    assert bases.identity(base) == bases.identity(source)  # so a run can be resumed with the other form
    other = bases.open(base.folder, half=not half)
    assert {file.name for file in bases.weight_files(other, "unet")} <= fetched  # what is there is used


def test_the_identity_is_of_the_weights(tmp_path, small_bases):
    base = bases.open(small_bases["sd15"])
    twin = bases.open(shutil.copytree(small_bases["sd15"], tmp_path / "another name"))
    assert bases.identity(base) == bases.identity(twin)
    (file,) = bases.weight_files(twin, "text_encoder")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, file, {"format": "pt"})
    assert bases.identity(base) != bases.identity(twin)


def test_the_component_folders_of_a_pipeline(tmp_path, small_bases, monkeypatch):
    fetched = []
    monkeypatch.setattr(storage, "fetch_from_hub", lambda name, patterns: fetched.append((name, patterns)))
    base = bases.open(shutil.copytree(small_bases["sd15"], tmp_path / "owner" / "model"))
    (base.folder / ".cache").mkdir()
    names = ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    assert [folder.name for folder in bases.component_folders(base)] == names
    index = {"_class_name": "X", "unet": ["diffusers", "X"], "vae": ["diffusers", "X"], "safety_checker": [None, None]}
    (base.folder / "model_index.json").write_text(json.dumps(index))
    assert [folder.name for folder in bases.component_folders(base)] == ["unet", "vae"]
    monkeypatch.chdir(tmp_path)
    bases.component_folders(bases.open("owner/model"))  # a local folder whose name looks like a hub id
    assert not fetched
    bases.component_folders(dataclasses.replace(base, name="owner/model"))
    ((name, patterns),) = fetched
    assert name == "owner/model" and {pattern.split("/")[0] for pattern in patterns} == {"unet", "vae"}
    assert {"unet/*.json", "vae/diffusion_pytorch_model.safetensors", "unet/model-*.safetensors"} < set(patterns)


def test_threads_can_be_released_between_computations():
    x = torch.randn(256, 256)
    before = x @ x
    device.rest_threads()
    assert torch.equal(x @ x, before)
