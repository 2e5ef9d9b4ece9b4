"""LoRA files of other programs: every style of keys is read as the kohya file of the same LoRA is; what lorakit does
not read is named. The keys are made here, by tables that know nothing of lorakit's reader."""

import copy
import json
from dataclasses import replace

import pytest
import readers
import torch
from safetensors.torch import load_file, save_file
from said import names, naming
from test_layouts import pipeline
from test_write import TextTwin, answer, distance, said, twin_of

from lorakit.adapter import attachment, injection, merging, proof, targets, write
from lorakit.adapter import read as read_module
from lorakit.adapter.specs import layer_specs

BLOCKS = {theirs: ours for theirs, ours in readers.SDXL.items()}
UNET, TE, TE2 = "mid_block.attentions.0.proj_in", "lora_te1_text_model_encoder_layers_0", "lora_te2_text_projection"
ONE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def stability_path(path: str) -> str:
    """diffusers' path of an SDXL module as Stability's, with dots: input_blocks.4.1.transformer_blocks.0.…"""
    theirs, ours = max(((a, b) for a, b in BLOCKS.items() if path.startswith(b)), key=lambda pair: len(pair[1]))
    leaf = path.removeprefix(ours).removeprefix(".")
    leaf = {value: key for key, value in readers.RESNET.items()}.get(leaf, leaf)
    numbers = theirs.replace("_blocks_", "_blocks.").replace("middle_block_", "middle_block.")
    head, _, rest = numbers.partition(".")
    return ".".join(filter(None, [head, rest.replace("_", "."), leaf.replace("layers_", "layers.")]))


STYLES = {  # name → (the key of a UNet's module and part; whether its alpha is a tensor)
    "LyCORIS, SimpleTuner": lambda path, part: f"lycoris_{path.replace('.', '_')}.lora_{part}.weight",
    "ComfyUI": lambda path, part: f"diffusion_model.{stability_path(path)}.lora_{part}.weight",
    "ComfyUI of OneTrainer": lambda path, part: f"diffusion_model.{stability_path(path)}.lora_{AB[part]}.weight",
    "Stability's bare": lambda path, part: f"{stability_path(path)}.lora_{AB[part]}.weight",
    "PEFT in one file": lambda path, part: f"base_model.model.{path}.lora_{AB[part]}.weight",
    "PEFT's live model": lambda path, part: f"unet.{path}.lora_{AB[part]}.default_0.weight",
    "an old script of PEFT's": lambda path, part: f"unet.base_model.model.{path}.lora_{AB[part]}.weight",
    "attention processors": lambda path, part: f"{processor(path)}.lora_{AB[part]}.weight",
}  # fmt: skip
AB = {"down": "A", "up": "B"}


def processor(path: str) -> str:
    """diffusers' keys before PEFT, which ComfyUI still looks for."""
    return path.replace(".to_", ".processor.to_").removesuffix(".0") if ".attn" in path else path


@pytest.mark.parametrize("style", STYLES)
def test_styles_of_keys(style, tmp_path):
    twin = twin_of("sdxl")
    tensors = {}
    for key, weight in twin.adapter.state().items():
        module, part = key.rsplit(".", 1)
        tensors[STYLES[style](module, part)] = weight.detach().clone()
        tensors[STYLES[style](module, part).split(".lora_")[0] + ".alpha"] = torch.tensor(twin.adapter.alphas[module])
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_module.load(tmp_path / "a.safetensors")
    assert read.family == "sdxl" and read.modules.keys() == twin.adapter.layers.keys()
    attachment.attach(unet := copy.deepcopy(twin.bare), twin.base, read)
    assert distance(answer(unet, "sdxl"), answer(twin.unet, "sdxl")) < 1e-6
    assert distance(answer(twin.bare, "sdxl"), answer(twin.unet, "sdxl")) > 0.01


def test_two_adapters_of_a_live_model_are_not_mixed(tmp_path):
    keys = [f"unet.{UNET}.lora_{x}.{name}.weight" for x in "AB" for name in ("style", "face-2")]
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=naming("a.safetensors", 2)):
        read_module.load(tmp_path / "a.safetensors")


def test_text_encoders_as_comfyui_names_them(tmp_path):
    twin = TextTwin("sdxl")
    file, tensors = write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=torch.float32), {}
    for key, tensor in load_file(file).items():
        name, _, part = key.partition(".")
        for prefix, clip in (("lora_te1_", "clip_l"), ("lora_te2_", "clip_g")):
            if name.startswith(prefix):
                path = name.removeprefix(f"{prefix}text_model_encoder_layers_")
                number, _, leaf = path.partition("_")
                leaf = leaf.replace("self_attn_", "self_attn.").replace("mlp_", "mlp.")
                name = f"text_encoders.{clip}.transformer.text_model.encoder.layers.{number}.{leaf}"
        tensors[f"{name}.{part}"] = tensor
    save_file(tensors, tmp_path / "b.safetensors")
    read = read_module.load(tmp_path / "b.safetensors")
    attachment.attach(models := copy.deepcopy(twin.bare), twin.base, read)
    assert distance(said(models, "sdxl"), said(twin.models, "sdxl")) < 1e-6


# ── SDXL's text projection, which OneTrainer trains ─────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def projected(tmp_path_factory):
    """A file as OneTrainer writes it, its text encoders bare, and the change of the projection by hand."""
    twin, generator = TextTwin("sdxl"), torch.Generator().manual_seed(3)
    width = twin.bare["text_encoder_2"].text_projection.weight.shape
    down, up = torch.randn(2, width[1], generator=generator), torch.randn(width[0], 2, generator=generator)
    path = tmp_path_factory.mktemp("onetrainer") / "a.safetensors"
    tensors = {f"{TE2}.lora_down.weight": down, f"{TE2}.lora_up.weight": up, f"{TE2}.alpha": torch.tensor(1.0)}
    tensors |= {f"{TE}_mlp_fc1.lora_down.weight": torch.ones(2, width[1]),
                f"{TE}_mlp_fc1.lora_up.weight": torch.ones(10, 2) / 10}  # fmt: skip
    save_file(tensors | {"bundle_emb.ohwx.clip_l": torch.ones(2, 3), "bundle_emb.ohwx.clip_g": torch.ones(2, 3)}, path)
    return twin, path, up @ down / 2


def by_hand(twin, change: torch.Tensor, strength: float) -> dict:
    """The text encoders with both changes of `projected` in their weights."""
    models = copy.deepcopy(twin.bare)
    with torch.no_grad():
        models["text_encoder_2"].text_projection.weight += strength * change
        inner = getattr(models["text_encoder"], "text_model", models["text_encoder"])
        inner.encoder.layers[0].mlp.fc1.weight += strength * 0.2
    return models


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_the_projection_is_a_module_like_others(projected, strength):
    twin, path, change = projected
    adapter = attachment.attach(models := copy.deepcopy(twin.bare), twin.base, path)
    wanted, bare = said(by_hand(twin, change, strength), "sdxl"), said(twin.bare, "sdxl")
    with injection.strength(adapter, strength):
        assert distance(said(models, "sdxl"), wanted) < 1e-5 < 0.01 < distance(bare, wanted)
    injection.eject(models)
    assert torch.equal(said(models, "sdxl"), bare)
    facts = proof.describe_file(path)
    assert facts["text_encoder"] == 2 and facts["modules"] == 2 and facts["embeddings"] == ["ohwx"]


def test_merged_resized_and_proven_like_others(projected, tmp_path):
    twin, path, change = projected
    lora = read_module.load(path)
    merged = merging.merge([lora], [0.25]).lora
    file = write.save(merged, tmp_path / "merged.safetensors", dtype=torch.float32)
    assert torch.allclose(readers.updates(load_without_embeddings(file, tmp_path))[TE2]["added"], change / 4, atol=1e-6)
    found = proof.prove(file, merged)
    assert found.modules == 2 and any(names(loss, "A1111", "sd-scripts") for loss in found.losses)
    other = {module: (parts, alpha * (2 if "projection" in module else 1)) for module, (parts, alpha) in
             merged.modules.items()}  # fmt: skip
    with pytest.raises(RuntimeError, match=naming("merged.safetensors", "text_encoder_2.text_projection")):
        proof.prove(file, replace(merged, modules=other))
    resized = merging.resize(lora, 1).lora
    assert resized.ranks["text_encoder_2.text_projection"] == 1 and resized.aside.keys() == lora.aside.keys()
    u, s, v = torch.linalg.svd(change)
    kept = readers.updates(load_without_embeddings(write.save(resized, tmp_path / "r.safetensors", dtype=torch.float32),
                                                   tmp_path))[TE2]["added"]  # fmt: skip
    assert torch.allclose(kept, s[0] * u[:, :1] @ v[:1], atol=1e-4)
    assert {row.block for row in merging.norms(lora)} == {"text_encoder", "text_encoder_2"}


def load_without_embeddings(path, folder):
    """The second reader knows no embeddings."""
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.startswith("bundle_emb")}
    save_file(tensors, folder / "without.safetensors")
    return folder / "without.safetensors"


def test_a_run_does_not_adapt_the_projection():
    twin = TextTwin("sdxl")
    assert not any("text_projection" in name for name in layer_specs(twin.bare, 2, 1.0))


def test_diffusers_reads_the_projection(projected, tmp_path):
    """In a file that adapts attention as well: from that it infers the layout."""
    twin, path, change = projected
    whole, entry = write.lora_from(twin.adapter, twin.base), read_module.load(path).modules[targets.PROJECTION]
    whole = replace(whole, modules={**whole.modules, targets.PROJECTION: entry})
    file = write.save(whole, tmp_path / "diffusers.safetensors", dtype=torch.float32, layout="diffusers")
    pipeline("sdxl", **(models := copy.deepcopy(twin.bare))).load_lora_weights(file)
    wanted = copy.deepcopy(twin.models)
    with torch.no_grad():
        wanted["text_encoder_2"].text_projection.weight += change
    assert distance(said(models, "sdxl"), said(wanted, "sdxl")) < 1e-5


def test_peft_reads_the_projection(projected, tmp_path):
    from peft import PeftModel

    twin, path, change = projected
    lora = read_module.load(path)
    lora.aside.clear()
    write.save(lora, tmp_path / "peft", dtype=torch.float32, layout="peft")
    model = PeftModel.from_pretrained(copy.deepcopy(twin.bare["text_encoder_2"]), tmp_path / "peft" / "text_encoder_2")
    merged = model.merge_and_unload()
    bare = twin.bare["text_encoder_2"].text_projection.weight
    assert torch.allclose(merged.text_projection.weight, bare + change, atol=1e-5)


# ── What is not read ────────────────────────────────────────────────────────────────────────────────────────────────

MATRICES = {f"{ONE}.lora_down.weight": (2, 4), f"{ONE}.lora_up.weight": (4, 2)}
HADA = {f"{ONE}.hada_w{n}_{x}": (4, 2) if x == "a" else (2, 4) for n in "12" for x in "ab"}
OTHERS = {  # what the message says → the parts of a file, as the program writes them
    "norms": MATRICES | {"lora_unet_mid_block_attentions_0_norm.w_norm": (4,), "lora_unet_conv_norm_out.b_norm": (4,)},
    "whole": {f"{ONE}.diff": (4, 4)},
    "weights": MATRICES | {"diffusion_model.middle_block.0.in_layers.2.diff_b": (4,)},
    "IA3": {f"{ONE}.weight": (4,), f"{ONE}.on_input": ()},
    "Tucker LoCon": MATRICES | {f"{ONE}.lora_mid.weight": (2, 2, 3, 3)},
    "Tucker LoHa": HADA | {f"{ONE}.hada_t1": (2, 2, 3, 3), f"{ONE}.hada_t2": (2, 2, 3, 3)},
    "Tucker LoKr": {f"{ONE}.lokr_w1": (2, 2), f"{ONE}.lokr_t2": (2, 2, 3, 3)},
    "rows": MATRICES | {f"{ONE}.dora_scale": (4, 1)},
    "rows (PEFT's DoRA)": {f"unet.{UNET}.lora_A.weight": (2, 4), f"unet.{UNET}.lora_magnitude_vector.weight": (4,)},
    "LoHa with the lengths of DoRA": HADA | {f"{ONE}.dora_scale": (1, 4)},
    "LoKr with the lengths of DoRA": {f"{ONE}.lokr_w{n}": (2, 2) for n in "12"} | {f"{ONE}.dora_scale": (1, 4)},
    "OFT": {f"{ONE}.oft_blocks": (2, 2, 2)},
    "GLoRA": {f"{ONE}.{x}.weight": (2, 2) for x in ("a1", "a2", "b1", "b2")},
    "T-LoRA": {f"{ONE}.q_layer.weight": (2, 2), f"{ONE}.p_layer.weight": (2, 2), f"{ONE}.lambda_layer": (1, 2)},
    "biases": MATRICES | {f"{ONE}.lora_up.bias": (4,)},
    "textual inversion": {"clip_l": (2, 4), "clip_g": (2, 4)},
    "checkpoint": {"model.diffusion_model.out.2.weight": (4, 4, 3, 3), "cond_stage_model.logit_scale": ()},
    "autoencoder": {"encoder.conv_in.weight": (4, 3, 3, 3), "decoder.conv_in.weight": (4, 4, 3, 3)},
    "ControlNet": {"control_model.input_blocks.0.0.weight": (4, 4, 3, 3)},
    "Control-LoRA": {"lora_controlnet": (), "input_blocks.0.0.weight": (4, 4, 3, 3)},
    "Flux": {f"lora_unet_double_blocks_0_img_attn_proj.lora_{x}.weight": (4, 4) for x in ("down", "up")},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_methods_are_named(kind, tmp_path):
    save_file({key: torch.ones(shape) for key, shape in OTHERS[kind].items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=naming("a.safetensors", *kind.split())) as raised:
        read_module.load(tmp_path / "a.safetensors")
    assert not names(str(raised.value), "damaged")


@pytest.mark.parametrize("kind", ["OFT", "IA3", "\x1b[31m", "BONE"])
def test_other_methods_of_peft_are_named(kind, tmp_path):
    save_file({"base_model.model.x.oft_R.weight": torch.ones(2, 2)}, tmp_path / read_module.PEFT)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(ValueError, match=naming("adapter_config.json", "PEFT")) as raised:
        read_module.load(tmp_path)
    assert str(raised.value).isprintable()


# ── What other programs leave out of lorakit's files ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind, dtype, layout, named",
    [
        ("lora", "fp16", "kohya", ()), ("lora", "bf16", "kohya", ()),
        ("lora", "fp16", "diffusers", ("ComfyUI", "kohya")),
        ("dora", "fp16", "kohya", ("sd-scripts", "diffusers")), ("loha", "bf16", "kohya", ("A1111", "fp16")),
        ("lokr", "bf16", "kohya", ("A1111", "fp16")), ("lokr", "fp16", "kohya", ()), ("loha", "fp32", "kohya", ()),
    ],
)  # fmt: skip
def test_losses_are_said_at_export(kind, dtype, layout, named, tmp_path):
    twin = twin_of("sd15", kind)
    path = tmp_path / "a.safetensors"
    write.save_adapter(twin.adapter, twin.base, path, dtype=write.DTYPES[dtype], layout=layout)
    found = proof.prove(path, twin.adapter, twin.base, layout=layout)
    assert bool(found.losses) == bool(named) and len(found.lines()) == 1 + len(found.losses) <= 2
    assert names(" ".join(found.losses), *named)
