"""A LoRA file says what the adapter in memory does, under the names that other programs look for."""

import copy
import json
import math
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import readers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from said import names, naming

from lorakit import config
from lorakit.adapter import attachment, injection, write
from lorakit.adapter import metadata as metadata_module
from lorakit.adapter import names as adapter_names
from lorakit.adapter import proof as proof_module
from lorakit.adapter import read as read_module
from lorakit.adapter import targets as targets_module
from lorakit.adapter.specs import LayerSpec, layer_specs
from lorakit.base.model import Base
from lorakit.dataset.folder import Dataset
from lorakit.dataset.picture import Picture
from lorakit.run import metadata as run_metadata
from lorakit.storage import files

TEXT = 12  # width of the twins' text embeddings


def narrow_unet(family: str, whole: bool = True):
    """The family's UNet, a few channels wide, each level of another width.

    Args:
        whole: with the family's real blocks and depth; else SDXL's transformers have one or two blocks, and the others
            have two levels of one layer.
    """
    from diffusers import UNet2DConditionModel

    common = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": TEXT, "attention_head_dim": 2}
    torch.manual_seed(0)
    if family == "sdxl":
        return UNet2DConditionModel(
            block_out_channels=(4, 8, 12), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            use_linear_projection=True, transformer_layers_per_block=(1, 2, 10) if whole else (1, 1, 2),
            addition_embed_type="text_time", addition_time_embed_dim=2, projection_class_embeddings_input_dim=20,
            **common,
        )  # fmt: skip
    common |= {"use_linear_projection": family == "sd2"}
    if whole:
        return UNet2DConditionModel(block_out_channels=(4, 8, 12, 16), **common)
    return UNet2DConditionModel(
        block_out_channels=(8, 12), layers_per_block=1, **common,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def a_base(family: str, unet, prediction_type: str = "epsilon") -> Base:
    configs = {"unet": dict(unet.config), "scheduler": {"prediction_type": prediction_type}}
    configs["vae"] = {"block_out_channels": [8] * 4, "latent_channels": 4}
    return Base(Path("/nowhere/private"), f"somebody/{family}-twin", family, configs)


def specs_of(
    models, rank: int, alpha: float, targets: str = "attention", ranks: dict | None = None, alphas: dict | None = None,
    decompose_both: bool = False, **settings,
) -> dict[str, LayerSpec]:  # fmt: skip
    """`layer_specs` with ranks and alphas by module."""
    return {
        name: replace(
            spec, rank=(ranks or {}).get(name, spec.rank), alpha=(alphas or {}).get(name, spec.alpha),
            decompose_both=decompose_both,
        )
        for name, spec in layer_specs(models, rank, alpha, targets, **settings).items()
    }  # fmt: skip


class Twin:
    """A UNet with an adapter of random weights, and the same UNet bare."""

    def __init__(self, family: str, targets: str = "attention", rank: int = 4, whole: bool = False, **changes):
        self.family, self.bare = family, narrow_unet(family, whole).eval()
        self.unet = copy.deepcopy(self.bare)
        self.base = a_base(family, self.bare)
        self.adapter = injection.inject(
            self.unet, specs_of(self.unet, rank, 3.0, targets, conv_rank=2, conv_alpha=0.3, **changes)
        )
        generator = torch.Generator().manual_seed(1)
        for name, weight in self.adapter.state().items():
            noise = torch.randn(weight.shape, generator=generator)
            size = 0.5 if "hada" in name else 0.2  # four of those are multiplied
            weight.data = weight.data * (1 + 0.3 * noise) if name.endswith("dora_scale") else noise * size


KINDS = {
    "dora": {"algorithm": "dora"},
    "loha": {"algorithm": "loha"},
    "lokr": {"algorithm": "lokr", "rank": 1},
    "lokr of a factor": {"algorithm": "lokr", "rank": 1, "factor": 2},
    "lokr of four": {"algorithm": "lokr", "rank": 1, "decompose_both": True},
    "lokr of two": {"algorithm": "lokr", "rank": 64},
}


@cache
def twin_of(family: str, kind: str = "lora", targets: str = "attention", whole: bool = False) -> Twin:
    """A twin for all tests of a process: to read, not to change."""
    return Twin(family, targets, whole=whole, **KINDS.get(kind, {}))


WITHOUT_COVERAGE = pytest.param("sdxl", marks=pytest.mark.no_cover)  # tracing its 722 modules takes as long again


@pytest.fixture(params=["sd15", "sd2", WITHOUT_COVERAGE])
def twin(request):
    """With the family's real blocks and depth; SDXL's with convolutions, too."""
    return whole_twin(request.param)


def whole_twin(family: str) -> Twin:
    return twin_of(family, targets="attention+conv" if family == "sdxl" else "attention", whole=True)


@pytest.fixture
def sd15():
    return twin_of("sd15")


@torch.no_grad()
def answer(unet, family: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    noisy, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, TEXT, generator=generator)
    extra = {"text_embeds": torch.randn(2, 8, generator=generator), "time_ids": torch.ones(2, 6)}
    return unet(
        noisy, torch.tensor([10, 700]), text, added_cond_kwargs=extra if family == "sdxl" else None
    ).sample  # fmt: skip


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ── Names and weights ───────────────────────────────────────────────────────────────────────────────────────────────


def test_known_names():
    """Seen in published files."""
    q, ff = "transformer_blocks.0.attn1.to_q", "transformer_blocks.9.ff.net.2"
    for module, family, name in [
        (f"down_blocks.0.attentions.0.{q}", "sd15", "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"),
        (f"mid_block.attentions.0.{q}", "sd2", "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"),
        (f"down_blocks.1.attentions.0.{q}", "sdxl", "input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        ("mid_block.attentions.0.proj_in", "sdxl", "middle_block_1_proj_in"),
        (f"up_blocks.0.attentions.2.{ff}", "sdxl", "output_blocks_2_1_transformer_blocks_9_ff_net_2"),
        ("up_blocks.1.attentions.2.proj_out", "sdxl", "output_blocks_5_1_proj_out"),
        ("down_blocks.0.downsamplers.0.conv", "sdxl", "input_blocks_3_0_op"),
        ("up_blocks.1.upsamplers.0.conv", "sdxl", "output_blocks_5_2_conv"),
        ("mid_block.resnets.1.time_emb_proj", "sdxl", "middle_block_2_emb_layers_1"),
    ]:  # fmt: skip
        assert adapter_names.kohya_name(module, family) == f"lora_unet_{name}"
    with pytest.raises(ValueError, match=naming("down_blocks.0.attentions.0.to_q")):
        adapter_names.kohya_name("down_blocks.0.attentions.0.to_q", "sd15")


def test_the_file_has_the_canonical_names_and_shapes(twin, tmp_path):
    tensors = load_file(write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors"))
    modules, wide = readers.attention_names(twin.family), set()
    assert len(modules) == {"sd15": 192, "sd2": 192, "sdxl": 722}[twin.family]
    if twin.family == "sdxl":
        modules |= readers.sdxl_convolution_names()
        wide = {name for name in readers.sdxl_convolution_names() if not name.endswith("emb_layers_1")}
        assert len(modules) == 788
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert tensors.keys() == {f"{name}.{part}" for name in modules for part in parts}
    assert all(tensors[f"{name}.alpha"].shape == () for name in modules)
    kernels = {key.split(".")[0]: tensor.shape[2:] for key, tensor in tensors.items() if key.endswith("down.weight")}
    narrow = {name for name, kernel in kernels.items() if max(kernel, default=1) == 1}
    assert all(tensors[f"{name}.alpha"] == 3 for name in narrow)
    if twin.family == "sd15":  # its projections are 1×1 convolutions
        wide = {name for name in modules if name.endswith(("_proj_in", "_proj_out"))}
        assert len(wide) == 32 and narrow == modules
    assert {key for key, tensor in tensors.items() if tensor.ndim == 4} == {f"{n}.{p}" for n in wide for p in parts[:2]}
    assert all(tensor.dtype == torch.float16 for key, tensor in tensors.items() if not key.endswith("alpha"))


@pytest.mark.parametrize(
    "dtype, precision, most", [(torch.float32, 1e-5, 1e-6), (torch.float16, 1e-3, 1e-3), (torch.bfloat16, 1e-2, 1e-2)]
)
@pytest.mark.parametrize("family", ["sd15", "sd2", WITHOUT_COVERAGE])
def test_an_independent_reader_gets_the_same_pictures(family, tmp_path, dtype, precision, most):
    """And `prove` finds no fault."""
    twin = whole_twin(family) if dtype == torch.float32 else twin_of(family)
    path = write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=dtype)
    merged = copy.deepcopy(twin.bare)
    assert readers.merge(path, merged, twin.family) == len(twin.adapter.layers)
    wanted = answer(twin.unet, twin.family)
    assert distance(answer(merged, twin.family), wanted) < precision
    assert distance(answer(twin.bare, twin.family), wanted) > 0.1  # or the test says nothing
    proof = proof_module.prove(path, twin.adapter, twin.base)
    assert proof.modules == len(twin.adapter.layers) and proof.error < most and proof.worst in twin.adapter.layers
    assert names(proof.describe(), proof.modules, f"{proof.error:.2%}")


def test_convolutions_too(tmp_path):
    twin = twin_of("sdxl", targets="attention+conv")
    path = write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=torch.float32)
    tensors, metadata, _ = readers.read(path)
    down = tensors["lora_unet_input_blocks_3_0_op.lora_down.weight"]
    assert down.shape == (2, 4, 3, 3) and tensors["lora_unet_input_blocks_3_0_op.lora_up.weight"].shape == (4, 2, 1, 1)
    assert tensors["lora_unet_input_blocks_3_0_op.alpha"].item() == torch.tensor(0.3).item()  # no dtype rounds it
    assert metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "3"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "0.3"}
    assert proof_module.describe_file(path)["kind"] == "LoCon" and proof_module.describe_file(path)["rank"] == [2, 4]
    assert read_back(twin, path).targets == "attention+conv"


def read_back(twin: Twin, path: Path) -> injection.Adapter:
    """A file's LoRA, put into a bare UNet and taken out again."""
    unet = copy.deepcopy(twin.bare)
    again = attachment.attach(unet, twin.base, path)
    assert list(again.layers) == list(twin.adapter.layers)
    assert again.ranks == twin.adapter.ranks and again.alphas == pytest.approx(twin.adapter.alphas)
    assert same(again.state(), twin.adapter.state())
    assert distance(answer(unet, twin.family), answer(twin.unet, twin.family)) < 1e-5
    injection.eject(unet)
    bare = twin.bare.state_dict()
    assert all(torch.equal(weight, bare.pop(key)) for key, weight in unet.state_dict().items()) and not bare
    return again


@pytest.mark.no_cover
@pytest.mark.parametrize("kind", KINDS)
def test_every_algorithm_says_the_same_in_every_program(kind, tmp_path):
    twin = twin_of("sd15", kind, "attention+conv")
    path = write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=torch.float32)
    for strength in (1.0, 0.4):
        merged = copy.deepcopy(twin.bare)
        assert readers.merge(path, merged, "sd15", strength) == len(twin.adapter.layers)
        with injection.strength(twin.adapter, strength):
            wanted = answer(twin.unet, "sd15")
        assert distance(answer(merged, "sd15"), wanted) < 1e-4
    assert distance(answer(twin.bare, "sd15"), answer(twin.unet, "sd15")) > 0.05  # or the test says nothing
    assert proof_module.prove(path, twin.adapter, twin.base).error < 1e-5
    again = attachment.attach(unet := copy.deepcopy(twin.bare), twin.base, path)
    assert distance(answer(unet, "sd15"), answer(twin.unet, "sd15")) < 1e-5
    assert same(again.state(), twin.adapter.state())
    half = write.save_adapter(twin.adapter, twin.base, tmp_path / "half.safetensors")
    assert proof_module.prove(half, twin.adapter, twin.base).error < 1e-2
    told, said = proof_module.describe_file(half), readers.read(half)[1]
    assert told["kind"] == {"d": "DoRA", "h": "LoHa", "k": "LoKr"}[kind[2] if kind != "dora" else "d"]
    assert said["ss_network_module"] == "lycoris.kohya"
    assert json.loads(said["ss_network_args"])["algo"] == ("lora" if kind == "dora" else kind[:4])


def test_lengths_are_not_rounded(tmp_path):
    """In half precision they would lose more than is learned."""
    twin = twin_of("sd15", "dora", "attention+conv")
    tensors = load_file(write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=torch.bfloat16))
    for module, layer in twin.adapter.layers.items():
        name = adapter_names.kohya_name(module, "sd15")
        assert torch.equal(tensors[f"{name}.dora_scale"], layer.dora_scale)
        assert tensors[f"{name}.lora_up.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("factor", [2, 3, 4, 6, 8])
def test_every_division_of_lokr_is_read_back(factor, tmp_path):
    twin = Twin("sd15", "attention+conv", rank=1, algorithm="lokr", factor=factor)
    path = write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=torch.float32)
    attachment.attach(unet := copy.deepcopy(twin.bare), twin.base, path)
    assert distance(answer(unet, "sd15"), answer(twin.unet, "sd15")) < 1e-6


@pytest.mark.parametrize("rank", [0, 1])
def test_lokr_as_others_divide_it(rank, tmp_path):
    """Small matrices of any shape, no two alike, in either order, whole or not."""
    twin, tensors, generator = twin_of("sd15"), {}, torch.Generator().manual_seed(0)
    for number, (module, layer) in enumerate(twin.adapter.layers.items()):
        out, inner = layer.get_base_layer().weight.shape[:2]
        m, n = (1, 2, 4)[number % 3], (4, 1, 2)[number % 3]
        name = adapter_names.kohya_name(module, "sd15")
        tensors[f"{name}.lokr_w1"] = 0.3 * torch.randn(m, n, generator=generator)
        two = torch.randn(out // m, inner // n, generator=generator)
        if rank:
            tensors[f"{name}.lokr_w2_a"], tensors[f"{name}.lokr_w2_b"] = two[:, :1].clone(), two[:1].clone()
        else:
            tensors[f"{name}.lokr_w2"] = two
        tensors[f"{name}.alpha"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "a.safetensors")
    merged = copy.deepcopy(twin.bare)
    assert readers.merge(tmp_path / "a.safetensors", merged, "sd15") == len(twin.adapter.layers)
    adapter = attachment.attach(unet := copy.deepcopy(twin.bare), twin.base, tmp_path / "a.safetensors")
    assert distance(answer(unet, "sd15"), answer(merged, "sd15")) < 1e-4
    assert all(weight.requires_grad for weight in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_a_file_of_another_alpha(kind, tmp_path):
    twin = twin_of("sd15", kind, "attention+conv")
    path = write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=torch.float32)
    given = {"rank": 4, "alpha": 5.0, "targets": "attention+conv", "conv_rank": 2, "conv_alpha": 0.5} | KINDS[kind]
    unet = copy.deepcopy(twin.bare)
    adapter = injection.inject(unet, specs_of(unet, **given))
    attachment.copy_weights(adapter, twin.base, path)
    assert distance(answer(unet, "sd15"), answer(twin.unet, "sd15")) < 1e-5
    with pytest.raises(ValueError, match=naming("a.safetensors", adapter.algorithm, "lora")):
        attachment.copy_weights(twin_of("sd15").adapter, twin.base, path)


def test_lengths_of_rows_are_refused(tmp_path):
    twin = twin_of("sd15", "dora", "attention+conv")
    path = write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors")
    tensors, metadata, _ = readers.read(path)
    tensors = {key: t.flatten()[:, None].contiguous() if "dora" in key else t for key, t in tensors.items()}
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=naming("a.safetensors", "DoRA")):
        read_module.load(path)


@pytest.mark.parametrize("family", ["sd15", "sd2"])
def test_read_back_into_a_bare_unet(family, tmp_path):
    """SDXL's is read back above, with convolutions."""
    twin = twin_of(family)
    read_back(twin, write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=torch.float32))


def test_diffusers_reads_it_with_its_true_alpha(sd15, tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    path = write.save_adapter(sd15.adapter, sd15.base, tmp_path / "a.safetensors", dtype=torch.float32)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=TEXT, num_hidden_layers=1, num_attention_heads=2))
    pipeline = StableDiffusionPipeline(
        AutoencoderKL(block_out_channels=(4,), norm_num_groups=4), text, None, copy.deepcopy(sd15.bare),
        DDIMScheduler(clip_sample=False, steps_offset=1), None, None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.load_lora_weights(path)
    assert distance(answer(pipeline.unet, "sd15"), answer(sd15.unet, "sd15")) < 1e-5
    pipeline.unload_lora_weights()
    assert distance(answer(pipeline.unet, "sd15"), answer(sd15.bare, "sd15")) < 1e-6


def test_diffusers_gives_every_module_its_own_name(twin, tmp_path):
    """In its whole depth. What diffusers then makes of the modules is in test_layouts."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    path = write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=torch.float32)
    pipeline = StableDiffusionXLPipeline if twin.family == "sdxl" else StableDiffusionPipeline
    state, alphas = pipeline.lora_state_dict(path, unet_config=twin.bare.config)[:2]
    wanted = {}
    for key, weight in twin.adapter.state().items():
        module, _, part = key.rpartition(".")
        wanted[f"unet.{module}.{ {'down': 'lora_A', 'up': 'lora_B'}[part] }.weight"] = weight
    assert same(convert_unet_state_dict_to_peft(state), wanted)
    assert sorted(alphas.values()) == pytest.approx(sorted(twin.adapter.alphas.values()))


# ── Text encoders ─────────────────────────────────────────────────────────────────────────────────────────────────────

LAYERS = {"sd15": {"text_encoder": 12}, "sd2": {"text_encoder": 23}, "sdxl": {"text_encoder": 12, "text_encoder_2": 32}}
FEW_LAYERS = {"sd15": {"text_encoder": 4}, "sdxl": {"text_encoder": 4, "text_encoder_2": 12}}  # 1 begins as 11 does
TEXT_MODULES = {"sd15": 72, "sd2": 138, "sdxl": 264}


class TextTwin:
    """Text encoders a few numbers wide, with and without an adapter; a narrow UNet beside them.

    Args:
        whole: as deep as the family's.
    """

    def __init__(self, family: str, whole: bool = False, **changes):
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        self.family, self.bare = family, {"unet": narrow_unet(family, whole=False).eval()}
        self.base = a_base(family, self.bare["unet"])
        torch.manual_seed(0)
        depths = (LAYERS if whole else FEW_LAYERS)[family]
        for place, (which, layers) in enumerate(depths.items()):
            kind = CLIPTextModelWithProjection if place else CLIPTextModel
            width = TEXT // len(depths)
            config = CLIPTextConfig(
                vocab_size=20, hidden_size=width, intermediate_size=10, num_hidden_layers=layers, num_attention_heads=2,
                projection_dim=width, eos_token_id=19, bos_token_id=18,
            )  # fmt: skip
            self.bare[which] = kind(config).eval()
            self.base.configs[which] = config.to_dict()
        self.models = copy.deepcopy(self.bare)
        self.adapter = injection.inject(self.models, specs_of(self.models, 4, 3.0, **changes))
        generator = torch.Generator().manual_seed(1)
        for weight in self.adapter.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3


@torch.no_grad()
def said(models: dict, family: str) -> torch.Tensor:
    """What the text encoders answer, side by side and flat."""
    tokens = torch.tensor([[18, 3, 7, 5, 19], [18, 2, 19, 19, 19]])
    outputs = [model(tokens, output_hidden_states=True) for which, model in models.items() if which != "unet"]
    parts = [x for output in outputs for x in (output.hidden_states[-2], output[0])]
    return torch.cat([part.flatten() for part in parts])


@pytest.fixture(scope="module")
def text_twin():
    return TextTwin("sdxl")


@pytest.mark.parametrize("family", ["sd15", "sd2", WITHOUT_COVERAGE])
def test_a_file_with_text_encoders(family, tmp_path):
    twin = TextTwin(family, whole=True)
    path = write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=torch.float32)
    modules = set(readers.updates(path))
    assert len(modules) == len(twin.adapter.layers) and len(readers.text_names(family)) == TEXT_MODULES[family]
    assert modules - readers.attention_names(family) == readers.text_names(family)
    merged = copy.deepcopy(twin.bare)
    assert readers.merge(path, merged["unet"], family, text=merged) == len(modules)
    assert distance(said(merged, family), said(twin.models, family)) < 1e-5
    assert distance(answer(merged["unet"], family), answer(twin.models["unet"], family)) < 1e-5
    assert distance(said(twin.bare, family), said(twin.models, family)) > 0.1  # or the test says nothing
    assert proof_module.prove(path, twin.adapter, twin.base).error < 1e-6
    read = read_module.load(path)
    assert read.family == family and set(read.adapts) == set(twin.models)
    weights = {f"{module}.{part}": weight for module, parts in read.parts.items() for part, weight in parts.items()}
    assert same(weights, twin.adapter.state()) and {alpha for _, alpha in read.modules.values()} == {3.0}
    told = proof_module.describe_file(path)
    assert (told["text_encoder"], told["modules"]) == (TEXT_MODULES[family], len(modules))


def test_a_part_of_the_models_takes_its_part_of_the_file(text_twin, tmp_path):
    twin, family = text_twin, text_twin.family
    path = write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=torch.float32)
    bare = copy.deepcopy(twin.bare)
    unet = attachment.attach(bare.pop("unet"), twin.base, path)
    texts = attachment.attach(bare, twin.base, path)
    assert list(unet.models) == ["unet"] and texts.models == bare
    assert torch.equal(said(bare, family), said(twin.models, family))
    assert torch.equal(answer(unet.models["unet"], family), answer(twin.models["unet"], family))
    assert same(unet.state() | texts.state(), twin.adapter.state())
    injection.eject(bare)
    assert torch.equal(said(bare, family), said(twin.bare, family))


def test_text_encoders_alone_tell_their_family(text_twin, tmp_path):
    own = write.lora_from(text_twin.adapter, text_twin.base)
    texts = {module: entry for module, entry in own.modules.items() if targets_module.model_of(module) != "unet"}
    path = write.save(replace(own, modules=texts), tmp_path / "a.safetensors")
    assert read_module.load(path).family == "sdxl" and read_module.load(path).adapts == (
        "text_encoder",
        "text_encoder_2",
    )
    with pytest.raises(ValueError, match=naming("a.safetensors", "text_encoder", "text_encoder_2", "unet")):
        attachment.attach(text_twin.bare["unet"], text_twin.base, path)
    assert not hasattr(text_twin.bare["unet"], "peft_config")


def test_text_encoders_in_diffusers_own_names(text_twin, tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from peft import get_peft_model_state_dict

    twin, states = text_twin, {}
    for which, model in twin.models.items():  # the second encoder's as newer transformers name them
        inner = model if which == "unet" else getattr(model, "text_model", model)
        state = get_peft_model_state_dict(inner, adapter_name="default")
        prefix = "text_model." if which == "text_encoder" else ""
        states[which] = {prefix + key: weight for key, weight in state.items()}
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, states["unet"], states["text_encoder"], states["text_encoder_2"], weight_name="a.safetensors"
    )
    read = read_module.load(tmp_path / "a.safetensors")
    assert read.modules.keys() == twin.adapter.layers.keys() and read.family == "sdxl" and not read.aside


def test_alphas_of_text_encoders_from_diffusers_metadata(tmp_path):
    layers = [f"text_model.encoder.layers.{n}.self_attn.q_proj" for n in range(2)]
    tensors = {f"text_encoder.{name}.{part}.weight": torch.ones(shape) for name in layers
               for part, shape in (("lora_A", (2, 768)), ("lora_B", (768, 2)))}  # fmt: skip
    settings = {"text_encoder.lora_alpha": 4, "text_encoder.alpha_pattern": {layers[1]: 16}}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    read = read_module.load(tmp_path / "a.safetensors")
    assert [alpha for _, alpha in read.modules.values()] == [4, 16] and read.family == "sd15"
    metadata |= {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}  # CLIP-L is in both families
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    assert read_module.load(tmp_path / "b.safetensors").family == "sdxl"


def test_a_layer_no_text_encoder_has_is_refused():
    with pytest.raises(ValueError, match=naming("text_encoder.text_projection")):
        adapter_names.kohya_name("text_encoder.text_projection", "sdxl")


# ── Proof ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1e-7, 1e-4, 1e2])
def test_rounding_alone_never_fails_the_proof(sd15, tmp_path, size):
    """Weights of a run that has just begun are among float16's smallest numbers, where rounding is coarse."""
    before = {key: weight.clone() for key, weight in sd15.adapter.state().items()}
    try:
        for key, weight in sd15.adapter.state().items():
            weight.data *= size if key.endswith(".up") else 1
        for dtype in (torch.float16, torch.bfloat16):
            proof_module.prove(
                write.save_adapter(sd15.adapter, sd15.base, tmp_path / "a.safetensors", dtype=dtype),
                sd15.adapter,
                sd15.base,
            )
    finally:
        sd15.adapter.load(before)


def test_a_fresh_adapter_is_proven_as_well(tmp_path):
    unet = narrow_unet("sd15", whole=False)
    adapter, base = injection.inject(unet, layer_specs(unet, 2, 2)), a_base("sd15", unet)
    assert proof_module.prove(write.save_adapter(adapter, base, tmp_path / "a.safetensors"), adapter, base).error == 0


@pytest.mark.parametrize("fault", ["alpha", "swapped", "one weight", "missing", "superfluous"])
def test_a_wrong_file_is_caught(sd15, tmp_path, fault):
    path = write.save_adapter(sd15.adapter, sd15.base, tmp_path / "a.safetensors")
    tensors, metadata, _ = readers.read(path)
    first, second = (f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{x}" for x in "qk")
    if fault == "alpha":
        tensors[f"{first}.alpha"] *= 1.1
    elif fault == "swapped":
        for part in ("lora_down.weight", "lora_up.weight"):
            a, b = f"{first}.{part}", f"{second}.{part}"
            tensors[a], tensors[b] = tensors[b], tensors[a]
    elif fault == "one weight":
        tensors[f"{first}.lora_up.weight"][0, 0] += 0.05
    elif fault == "missing":
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(first)}
    else:
        for part in ("lora_down.weight", "lora_up.weight", "alpha"):
            tensors[f"lora_unet_conv_in.{part}"] = tensors[f"lora_unet_mid_block_attentions_0_proj_in.{part}"].clone()
    save_file(tensors, path, metadata)
    known = len(sd15.adapter.layers)
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1" + ("" if fault == "swapped" else ".to_q")
    what = {"missing": (known - 1, known, module), "superfluous": (known + 1, known, "conv_in")}.get(fault, (module,))
    with pytest.raises(RuntimeError, match=naming("a.safetensors", *what)):
        proof_module.prove(path, sd15.adapter, sd15.base)


# ── What the file says of itself ────────────────────────────────────────────────────────────────────────────────────


def a_dataset(root: Path = Path("/home/anna/pictures")) -> Dataset:
    def picture(n: int, group: str, repeats: int, caption: str, size: tuple[int, int]) -> Picture:
        return Picture(root / group / f"{n}.png", caption, ".txt", repeats, *size, f"{n:064x}", group)

    pictures = [picture(n, "5_cat", 5, "sks cat, Red Hat, \\m/", (600, 600)) for n in range(3)]
    pictures += [picture(9, "old/5_cat", 5, "sks cat", (900, 600))]
    pictures += [picture(10, "", 1, "a cat in /home/anna/pictures, ünder, o/, he/him", (512, 512))]
    return Dataset(root, tuple(pictures), ())


def a_run(twin, **changes) -> dict[str, str]:
    settings = config.Config(
        name="my cat_v1", trigger="sks cat", rank=4, alpha=3, epochs=10, batch_size=2, min_snr_gamma=None
    )  # fmt: skip
    of_run = run_metadata.run_metadata(
        settings.with_(**changes), twin.base, a_dataset(), started=1700000000.5, adapter=twin.adapter
    )
    picture = metadata_module.thumbnail(Image.new("RGBA", (1024, 512), "red"))
    return of_run | run_metadata.step_metadata(120, 10, 1700000600.0) | picture


def test_metadata_of_a_run(sd15, tmp_path):
    metadata = a_run(sd15)
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items())
    expected = {
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_output_name": "my cat_v1",
        "ss_sd_model_name": "somebody/sd15-twin", "ss_clip_skip": "1", "ss_network_module": "networks.lora",
        "ss_network_dim": "4", "ss_network_alpha": "3", "ss_learning_rate": "0.0001", "ss_unet_lr": "0.0001",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01)", "ss_lr_scheduler": "constant",
        "ss_steps": "120", "ss_epoch": "10", "ss_num_epochs": "10", "ss_max_train_steps": "120", "ss_seed": "42",
        # 15 + 1 square in one bucket, 5 wide in the other: 8 + 3 batches of 2
        "ss_num_train_images": "21", "ss_num_batches_per_epoch": "11", "ss_batch_size_per_device": "2",
        "ss_resolution": "(512, 512)", "ss_mixed_precision": "no", "ss_min_snr_gamma": "None",
        "ss_noise_offset": "None", "ss_caption_dropout_rate": "0.0", "ss_training_started_at": "1700000000.5",
        "ss_training_finished_at": "1700000600.0", "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.implementation": "diffusers",
        "modelspec.title": "my cat_v1", "modelspec.trigger_phrase": "sks cat", "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon", "modelspec.date": "2023-11-14T22:23:20+00:00",
    }  # fmt: skip
    expected["ss_max_train_steps"] = "110"
    assert {key: metadata.get(key) for key in expected} == expected
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "5_cat": {"n_repeats": 5, "img_count": 3}, "5_cat (2)": {"n_repeats": 5, "img_count": 1},
        "1_my cat_v1": {"n_repeats": 1, "img_count": 1},
    }  # fmt: skip
    assert json.loads(metadata["ss_tag_frequency"]) == {
        "5_cat": {"sks cat": 3, "red hat": 3, "\\m/": 3}, "5_cat (2)": {"sks cat": 1},
        "1_my cat_v1": {"ünder": 1, "o/": 1, "he/him": 1},
    }  # fmt: skip
    info = json.loads(metadata["ss_bucket_info"])
    assert sorted((b["resolution"], b["count"]) for b in info["buckets"].values()) == [
        ([512, 512], 16),
        ([640, 384], 5),
    ]
    assert info["mean_img_ar_error"] == pytest.approx(abs(640 / 384 - 1.5) / 5)
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,/9j/")
    written = readers.read(write.save_adapter(sd15.adapter, sd15.base, tmp_path / "a.safetensors", metadata=metadata))[
        1
    ]
    assert metadata.items() <= written.items()
    assert not re.search(r"anna|nowhere|private", json.dumps(written))
    told = proof_module.describe_file(tmp_path / "a.safetensors")
    assert told == {
        "file": "a.safetensors", "kind": "LoRA", "family": "sd15", "modules": len(sd15.adapter.layers),
        "text_encoder": 0, "rank": [4], "alpha": [3.0], "dtype": ["float16"],
        "bytes": (tmp_path / "a.safetensors").stat().st_size, "base": "somebody/sd15-twin",
        "trigger": "sks cat", "steps": "120", "hash": "verified",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, told, wide",
    [
        ({}, ("False", "256", "1024"), [640, 384]),
        ({"min_bucket_side": 448, "max_bucket_side": 576}, ("False", "448", "576"), [576, 448]),
        ({"bucket_rule": "no_upscale", "max_bucket_side": 576}, ("True", "None", "None"), [576, 384]),
    ],
)
def test_metadata_of_buckets(sd15, changes, told, wide):
    metadata = a_run(sd15, **changes)
    assert tuple(metadata[f"ss_{key}"] for key in ("bucket_no_upscale", "min_bucket_reso", "max_bucket_reso")) == told
    sizes = [bucket["resolution"] for bucket in json.loads(metadata["ss_bucket_info"])["buckets"].values()]
    assert sorted(sizes) == sorted([[512, 512], wide])


def test_the_thumbnail_is_small():
    import base64
    import io

    url = metadata_module.thumbnail(Image.effect_noise((2000, 1000), 90))["modelspec.thumbnail"]
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (256, 128)


@pytest.mark.parametrize(
    "family, prediction_type, version, v2, architecture",
    [
        ("sd15", "v_prediction", "sd_v1_v", "False", "stable-diffusion-v1/lora"),
        ("sd2", "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora"),
        ("sd2", "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_family_is_said_without_a_run_too(sd15, tmp_path, family, prediction_type, version, v2, architecture):
    base = a_base(family, sd15.bare, prediction_type)
    metadata = readers.read(write.save_adapter(sd15.adapter, base, tmp_path / "a.safetensors"))[1]
    assert metadata["ss_base_model_version"] == version and metadata["ss_v2"] == v2
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.prediction_type"] == ("v" if prediction_type == "v_prediction" else "epsilon")
    assert read_module.load(tmp_path / "a.safetensors").family == family


@pytest.mark.parametrize("rank", [4, 512])  # below and above the 1 MiB where the older hash begins
def test_hashes(rank, tmp_path):
    unet = narrow_unet("sd15", whole=False)
    adapter = injection.inject(unet, layer_specs(unet, rank, 1))
    path = write.save_adapter(
        adapter, a_base("sd15", unet), tmp_path / "a.safetensors", metadata={"ss_x": 'ü\n"\\', "y": "z"}
    )
    metadata = readers.read(path)[1]
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == readers.hashes(path)
    assert (metadata["sshs_legacy_hash"] == "e3b0c442") == (rank == 4)  # sha256 of nothing
    assert path.stat().st_size > 2**20 or rank == 4
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert proof_module.describe_file(path)["hash"] not in ("verified", "none")


def test_the_same_adapter_gives_the_same_bytes(sd15, tmp_path):
    a, b = (
        write.save_adapter(sd15.adapter, sd15.base, tmp_path / n / "a.safetensors", metadata=a_run(sd15)) for n in "ab"
    )
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    "value",
    [
        "/data", "/content/drive/MyDrive/cats", "made from ~/cats", "C:\\Users\\Anna", json.dumps({"C:\\cats": 1}),
        "D:/cats/1", "see /mnt/cats/1.png", '{"/home/x/5_cat": {}}', "\\\\server\\cats", "file:///x", "hf_" + "a" * 34,
        f"runs/{Path.home().name}/x", str(Path.home()),
    ],
)  # fmt: skip
def test_nothing_private_goes_into_a_file(sd15, tmp_path, value):
    with pytest.raises(ValueError, match=naming("ss_training_comment")):
        write.save_adapter(sd15.adapter, sd15.base, tmp_path / "a.safetensors", metadata={"ss_training_comment": value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "value",
    ["https://example.org/a/b", "owner/name", "and/or, w/ hat, o/, 1/2", json.dumps({"\\m/": 1}), "(512, 512)", ":/"],
)
def test_ordinary_text_is_not_taken_for_private(sd15, tmp_path, value):
    path = write.save_adapter(
        sd15.adapter, sd15.base, tmp_path / "a.safetensors", metadata={"ss_training_comment": value}
    )
    assert readers.read(path)[1]["ss_training_comment"] == value


def test_metadata_must_be_strings(sd15, tmp_path):
    with pytest.raises(TypeError, match=naming("ss_steps", 5)):
        write.save_adapter(sd15.adapter, sd15.base, tmp_path / "a.safetensors", metadata={"ss_steps": 5})


# ── What is not written ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_disk_leaves_nothing(sd15, tmp_path, monkeypatch):
    whole = write.save_adapter(sd15.adapter, sd15.base, tmp_path / "a.safetensors").stat().st_size
    (tmp_path / "a.safetensors").unlink()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=naming("a.safetensors", f"{whole:,}")):
        write.save_adapter(sd15.adapter, sd15.base, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value, dtype", [(math.nan, torch.float32), (70000.0, torch.float16)])
def test_spoilt_weights_are_not_written(sd15, tmp_path, value, dtype):
    own = write.lora_from(sd15.adapter, sd15.base)
    parts = own.parts["mid_block.attentions.0.proj_in"]
    parts["up"] = parts["up"].clone()
    parts["up"].view(-1)[0] = value
    key = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
    with pytest.raises(FloatingPointError, match=naming("a.safetensors", 1, key, dtype, "float32")):
        write.save(own, tmp_path / "a.safetensors", dtype=dtype)
    assert os.listdir(tmp_path) == []


# ── Files that others made ──────────────────────────────────────────────────────────────────────────────────────────


def test_sdxl_in_diffusers_naming_without_alpha_and_with_text_encoders(tmp_path):
    twin, path = twin_of("sdxl", targets="attention+conv"), tmp_path / "a.safetensors"
    tensors = {}
    for key, weight in twin.adapter.state().items():
        module, part = key.rsplit(".", 1)
        scale = twin.adapter.alphas[module] / twin.adapter.ranks[module] if part == "up" else 1
        tensors[f"lora_unet_{module.replace('.', '_')}.lora_{part}.weight"] = (weight.detach() * scale).contiguous()
    text = "lora_te2_text_model_encoder_layers_31_mlp_fc1"
    tensors |= {f"{text}.lora_down.weight": torch.ones(2, 3), f"{text}.lora_up.weight": torch.ones(3, 2)}
    tensors |= {"bundle_emb.ohwx.string_to_param.*": torch.ones(2, 3)}
    save_file(tensors, path)
    read = read_module.load(path)
    assert (
        read.family == "sdxl"
        and len(read.modules) == len(twin.adapter.layers) + 1
        and read.adapts == ("text_encoder_2", "unet")
    )
    assert list(read.aside) == ["bundle_emb.ohwx.string_to_param.*"]
    assert all(alpha == parts["down"].shape[0] for parts, alpha in read.modules.values())
    attachment.attach(unet := copy.deepcopy(twin.bare), twin.base, read)
    assert distance(answer(unet, "sdxl"), answer(twin.unet, "sdxl")) < 1e-5
    assert proof_module.describe_file(path)["text_encoder"] == 1 and proof_module.describe_file(path)["hash"] == "none"


@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_saves(sd15, tmp_path, rslora):
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    settings = sd15.unet.peft_config["default"].to_dict() | {"use_rslora": rslora}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(sd15.unet, adapter_name="default"), unet_lora_adapter_metadata=settings
    )
    read = read_module.load(tmp_path / "pytorch_lora_weights.safetensors")
    assert read.modules.keys() == sd15.adapter.layers.keys()
    assert {alpha for _, alpha in read.modules.values()} == {3.0 * (2 if rslora else 1)}  # √rank is 2
    down, up = read.parts["mid_block.attentions.0.proj_in"].values()
    assert torch.equal(down, sd15.adapter.state()["mid_block.attentions.0.proj_in.down"])
    assert torch.equal(up, sd15.adapter.state()["mid_block.attentions.0.proj_in.up"])


@pytest.mark.parametrize(
    "down, up",
    [
        ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
        ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
        ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
        ("unet.{processor}_lora.down.weight", "unet.{processor}_lora.up.weight"),
    ],
)
def test_dotted_keys(tmp_path, down, up):
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    processor = "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out"
    tensors = {down: torch.ones(2, 16), up: torch.ones(16, 2)}
    save_file({k.format(module, processor=processor): t for k, t in tensors.items()}, tmp_path / "a.safetensors")
    read = read_module.load(tmp_path / "a.safetensors")
    assert list(read.modules) == [module] and read.modules[module][1] == 2 and read.family is None


def test_projections_of_either_shape_fit(tmp_path):
    """sd-scripts makes convolutions of SD 2's linear projections when it trains on a single checkpoint file."""
    twin = twin_of("sd2")
    path = write.save_adapter(twin.adapter, twin.base, tmp_path / "a.safetensors", dtype=torch.float32)
    tensors, metadata, _ = readers.read(path)
    for key, tensor in tensors.items():
        if "_proj_" in key and "attentions" in key and tensor.ndim == 2 and "ff" not in key:
            tensors[key] = tensor[..., None, None]
    save_file(tensors, path, metadata)
    attachment.attach(unet := copy.deepcopy(twin.bare), twin.base, path)
    assert distance(answer(unet, "sd2"), answer(twin.unet, "sd2")) < 1e-5
    assert proof_module.prove(path, twin.adapter, twin.base).error < 1e-6


# ── Files that do not fit, or are none ──────────────────────────────────────────────────────────────────────────────


def test_a_lora_of_another_family(sd15, text_twin, tmp_path):
    path = write.save_adapter(text_twin.adapter, text_twin.base, tmp_path / "xl.safetensors")
    with pytest.raises(ValueError, match=naming("xl.safetensors", "SDXL", "somebody/sd15-twin", "SD 1.5")):
        attachment.attach(sd15.bare, sd15.base, path)
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    for width, family in ((768, "sd15"), (1024, "sd2"), (2048, "sdxl")):
        tensors = {f"{module}.lora_down.weight": torch.ones(1, width), f"{module}.lora_up.weight": torch.ones(16, 1)}
        save_file(tensors, tmp_path / "a.safetensors")
        assert read_module.load(tmp_path / "a.safetensors").family == family


def test_a_lora_for_a_wider_base(sd15, tmp_path):
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"unet.{module}.lora_A.weight": torch.ones(1, 99), f"unet.{module}.lora_B.weight": torch.ones(16, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=naming("a.safetensors", 1, module, "16×99", "12×12")):
        attachment.attach(sd15.bare, sd15.base, tmp_path / "a.safetensors")
    assert not hasattr(sd15.bare, "peft_config")


ONE = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    "keys, named",
    [
        (
            {"lora_unet_double_blocks_0_img_attn_proj": ("lora_down.weight", "lora_up.weight")},
            (2, "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"),
        ),
        ({ONE: ("lora_down.weight", "alpha")}, ("mid_block.attentions.0.proj_in", "alpha", "down")),
        ({ONE: ("lora_down.weight", "lora_up.weight", "dora_scale")}, ("DoRA",)),
        ({ONE: ("hada_w1_a", "hada_w1_b")}, ("mid_block.attentions.0.proj_in", "hada_w1_a", "hada_w1_b")),
        ({ONE: ("oft_blocks",)}, ("OFT",)),
        ({"model.diffusion_model.input_blocks.0.0": ("weight", "bias")}, (2, "model.diffusion_model.input_blocks.0.0")),
        ({}, ()),
    ],
)
def test_files_that_are_no_lora(tmp_path, keys, named):
    tensors = {f"{name}.{part}": torch.ones(2, 2) for name, parts in keys.items() for part in parts}
    save_file(tensors, tmp_path / "a.safetensors")
    for read in (read_module.load, proof_module.describe_file):
        with pytest.raises(ValueError, match=naming("a.safetensors", *named)):
            read(tmp_path / "a.safetensors")


def test_text_encoder_alone(sd15, tmp_path):
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 3), f"{name}.lora_up.weight": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=naming("a.safetensors", "text_encoder", "unet")):
        attachment.attach(sd15.bare, sd15.base, tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [(2,), (), (0, 4), (4, 4, 1)])
def test_matrices_that_do_not_belong_together(tmp_path, shape):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(shape), f"{name}.lora_up.weight": torch.ones(4, 3)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(ValueError, match=naming("a.safetensors", f"{name}.lora_down.weight", list(shape))):
        proof_module.describe_file(tmp_path / "a.safetensors")


def test_damaged_files(sd15, tmp_path):
    whole = write.save_adapter(sd15.adapter, sd15.base, tmp_path / "whole.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    overlapping = whole[:8] + re.sub(rb'"data_offsets":\[\d+,', b'"data_offsets":[0,', whole[8 : 8 + header])
    overlapping = len(overlapping[8:]).to_bytes(8, "little") + overlapping[8:] + whole[8 + header :]
    damaged = {
        "cut": [
            b"", whole[:5], whole[:100], whole[: 8 + header], whole[:-1], whole + b"x", overlapping,
            (2**60).to_bytes(8, "little") + whole[8:], (99_999_999).to_bytes(8, "little") + whole[8:],
            whole[:8] + b"[" * header, (4).to_bytes(8, "little") + b"[[]]", (8).to_bytes(8, "little") + b'{"a": 1}',
        ],
        "page": [b"<!DOCTYPE html><html><body>Log in"],
        "zip": [b"PK\x03\x04 and so on, many bytes"],
        "pickle": [b"\x80\x02}q\x00X\x05\x00\x00\x00lorakit"],
        "Git LFS": [b"version https://git-lfs.github.com/spec/v1\noid sha256:0"],
        "zeros": [bytes(10_000)],
    }  # fmt: skip
    sentences = {}
    for kind, contents in damaged.items():
        for content in contents:
            (tmp_path / "a.safetensors").write_bytes(content)
            for read in (read_module.load, proof_module.describe_file):
                with pytest.raises(ValueError, match=naming("a.safetensors", f"{len(content):,}")) as raised:
                    read(tmp_path / "a.safetensors")
                # without the size, and without what the library says
                text = str(raised.value).replace(f"{len(content):,}", "")
                sentences.setdefault(kind, set()).add(text.replace(files.shown(str(raised.value.__cause__)), ""))
                assert kind not in ("zip", "pickle", "Git LFS") or names(text, kind)
    assert [len(some) for some in sentences.values()] == [1] * 6 and len(set.union(*sentences.values())) == 6
    with pytest.raises(FileNotFoundError, match=naming("none.safetensors")):
        read_module.load(tmp_path / "none.safetensors")


def test_nan_is_not_loaded(sd15, tmp_path):
    path = write.save_adapter(sd15.adapter, sd15.base, tmp_path / "a.safetensors")
    tensors, metadata, _ = readers.read(path)
    tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"][0] = math.nan
    save_file(tensors, path, metadata)
    with pytest.raises(FloatingPointError, match=naming("a.safetensors", "mid_block.attentions.0.proj_in", 1, "up")):
        read_module.load(path)
