from dataclasses import replace
from typing import get_args

import pytest
import torch
from said import naming

from lorakit.adapter import injection
from lorakit.adapter import targets as targets_module
from lorakit.adapter.algorithms import ALGORITHMS, algorithm_of
from lorakit.adapter.specs import LayerSpec, layer_specs, run_specs
from lorakit.base import model as bases
from lorakit.config import WHOLE, Config
from lorakit.device import Compute

CPU = torch.device("cpu")


def answer(unet, family="sd15", seed=0):
    random = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 77, unet.config.cross_attention_dim)
    text = torch.randn(text.shape, generator=random)
    conditions = {"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(2, 6)} if family == "sdxl" else None
    with torch.no_grad():
        return unet(x, torch.tensor([10, 700]), text, added_cond_kwargs=conditions).sample


@pytest.fixture(params=["sd15", "sd2", "sdxl"])
def family(request):
    return request.param


@pytest.fixture
def unet(small_bases, family):
    return bases.load_unet(bases.open(small_bases[family]), Compute(CPU, torch.float32))


@pytest.fixture
def sd15(small_bases):
    """Its UNet, where the family does not matter."""
    return bases.load_unet(bases.open(small_bases["sd15"]), Compute(CPU, torch.float32))


def shake(adapter):
    random = torch.Generator().manual_seed(3)
    for weight in adapter.parameters():
        weight.data = 0.1 * torch.randn(weight.shape, generator=random)


@pytest.mark.parametrize(
    "targets, algorithm",
    [("attention", "lora"), *(("attention+conv", algorithm) for algorithm in ("lora", "dora", "loha", "lokr"))],
)
def test_a_fresh_adapter_changes_nothing_and_ejecting_restores_exactly(unet, family, targets, algorithm):
    before, modules = answer(unet, family), {n: type(m) for n, m in unet.named_modules()}
    adapter = injection.inject(unet, layer_specs(unet, 4, 2, targets, conv_rank=2, algorithm=algorithm))
    assert {algorithm_of(layer.parts).name for layer in adapter.layers.values()} == {algorithm}
    assert torch.equal(answer(unet, family), before)
    shake(adapter)
    full = answer(unet, family)
    assert not torch.allclose(full, before)
    with injection.strength(adapter, 0.0):
        assert torch.equal(answer(unet, family), before)
    with injection.strength(adapter, 0.5):
        half = answer(unet, family)
    assert not torch.equal(half, full) and not torch.equal(half, before)
    assert torch.equal(answer(unet, family), full)  # and it is as it was after the block
    injection.eject(unet)
    assert torch.equal(answer(unet, family), before)
    assert {n: type(m) for n, m in unet.named_modules()} == modules
    assert not hasattr(unet, "peft_config")


def test_only_the_adapter_trains_and_in_float32(small_bases):
    unet = bases.load_unet(bases.open(small_bases["sd15"]), Compute(CPU, torch.bfloat16))
    adapter = injection.inject(unet, layer_specs(unet, 4, 2))
    trainable = [p for p in unet.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in adapter.parameters()}
    assert {p.dtype for p in trainable} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.bfloat16


KINDS_OF_LAYERS = pytest.mark.parametrize("family", ["sd15", "sd2"])  # its projections are linear, as SDXL's


@KINDS_OF_LAYERS
@pytest.mark.parametrize("algorithm", ["lora", "dora", "loha", "lokr"])
def test_delta_is_what_a_layer_adds(unet, algorithm):
    adapter = injection.inject(
        unet, layer_specs(unet, 4, 3, "attention+conv", conv_rank=2, conv_alpha=1, algorithm=algorithm)
    )
    shake(adapter)
    for name, layer in adapter.layers.items():
        plain = layer.get_base_layer()
        x = (
            torch.randn(2, plain.in_channels, 5, 5)
            if hasattr(plain, "kernel_size")
            else torch.randn(2, plain.in_features)
        )
        with torch.no_grad():
            added = layer(x) - plain(x)
            weight = plain.weight.clone()
            bias, plain.bias = plain.bias, None
            plain.weight.copy_(adapter.layers[name].delta())
            expected = plain(x)
            plain.weight.copy_(weight)
            plain.bias = bias
        assert torch.allclose(added, expected, atol=1e-5), name


@KINDS_OF_LAYERS
def test_ranks_and_alphas_by_module(unet):
    adapter = injection.inject(unet, layer_specs(unet, 8, 4, "attention+conv", conv_rank=2, conv_alpha=1))
    state = adapter.state()
    for name, rank in adapter.ranks.items():
        wide = state[f"{name}.down"].dim() == 4 and state[f"{name}.down"].shape[-1] == 3
        assert (rank, adapter.alphas[name]) == ((2, 1.0) if wide else (8, 4.0))
        assert state[f"{name}.down"].shape[0] == rank == state[f"{name}.up"].shape[1]
        assert adapter.layers[name].scaling["default"] == adapter.alphas[name] / rank


@KINDS_OF_LAYERS
def test_doras_lengths_and_directions_are_learned_apart(unet):
    """Against the paper's formula, its weight made whole, its norm held constant: outputs and gradients."""
    adapter = injection.inject(unet, layer_specs(unet, 4, 3, "attention+conv", algorithm="dora"))
    for weight in adapter.parameters():
        weight.data *= 1 + 0.1 * torch.randn(weight.shape)
        weight.data += 0.05 * torch.randn(weight.shape)
    for name, layer in adapter.layers.items():
        plain, own = layer.get_base_layer(), layer.parts
        x = (
            torch.randn(2, plain.in_channels, 5, 5)
            if hasattr(plain, "kernel_size")
            else torch.randn(2, 3, plain.in_features)
        )
        wanted = torch.randn_like(layer(x))
        ours = torch.autograd.grad((layer(x) * wanted).sum(), list(own.values()))
        merged = plain.weight + (0.75 * own["up"].flatten(1) @ own["down"].flatten(1)).view_as(plain.weight)
        columns = merged.detach().transpose(0, 1).flatten(1).norm(dim=1).view_as(own["dora_scale"])
        weight = {"weight": merged * own["dora_scale"] / columns}
        paper = torch.autograd.grad(
            (torch.func.functional_call(plain, weight, (x,)) * wanted).sum(), list(own.values())
        )
        for part, mine, theirs in zip(own, ours, paper, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max()), (name, part)


def test_a_lokr_of_whole_matrices_has_no_scale(sd15):
    adapter = injection.inject(sd15, layer_specs(sd15, 64, 3, algorithm="lokr"))
    whole = [name for name, layer in adapter.layers.items() if layer.algorithm.rank(layer.parts) is None]
    assert whole and all(adapter.alphas[name] == adapter.ranks[name] for name in whole)


def test_settings_know_the_algorithms():
    assert get_args(Config.model_fields["algorithm"].annotation) == tuple(ALGORITHMS)
    assert tuple(name for name, algorithm in ALGORITHMS.items() if not algorithm.quantizable) == WHOLE


def test_several_algorithms_are_not_injected_together(sd15):
    specs = layer_specs(sd15, 4, 2)
    first = next(iter(specs))
    with pytest.raises(ValueError, match=naming("dora", "lora")):
        injection.inject(sd15, specs | {first: replace(specs[first], algorithm="dora")})
    injection.inject(sd15, specs)  # nothing was changed


def test_specs_say_what_each_module_gets(sd15):
    """LoKrs of several factors, one of them with a small matrix of low rank, in one adapter."""
    one, two, three = list(layer_specs(sd15, 1, 1))[:3]
    both = LayerSpec("lokr", 1, 2.0, factor=4, decompose_both=True)
    specs = {one: LayerSpec("lokr", 2, 1.0, factor=2), two: both, three: LayerSpec("lokr", 1, 1.0, factor=8)}
    adapter = injection.inject(sd15, specs)
    assert {name: layer.spec for name, layer in adapter.layers.items()} == specs
    assert [adapter.state()[f"{name}.lokr_w1"].shape[0] for name in (one, three)] == [2, 8]
    assert adapter.state()[f"{two}.lokr_w1_a"].shape == (4, 1) and adapter.alphas[two] == 2.0
    for layer in adapter.layers.values():
        assert torch.equal(layer.get_delta_weight("default"), layer.delta())  # PEFT's own


def test_unknown_algorithms_are_refused(sd15):
    with pytest.raises(ValueError, match=naming("oft", "lora", "dora", "loha", "lokr")):
        injection.inject(sd15, layer_specs(sd15, 4, 2, algorithm="oft"))


def test_the_start_depends_on_the_seed_alone(small_bases):
    def start(seed):
        torch.rand(7)
        unet = bases.load_unet(bases.open(small_bases["sd15"]), Compute(CPU, torch.float32))
        return injection.inject(unet, layer_specs(unet, 4, 2), seed).state()

    a, b, c = start(1), start(1), start(2)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)
    before = torch.random.get_rng_state()
    start(1)
    torch.random.set_rng_state(before)  # start() draws 7 numbers itself; injecting drew none
    torch.rand(7)
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(before)
    start(5)
    assert torch.equal(torch.random.get_rng_state(), after)


def test_a_second_adapter_is_refused(sd15):
    specs = layer_specs(sd15, 4, 2)
    injection.inject(sd15, specs)
    with pytest.raises(RuntimeError, match=naming("unet", "adapter.eject")):
        injection.inject(sd15, specs)


def test_weights_of_other_settings_are_refused_and_change_nothing(sd15):
    adapter = injection.inject(sd15, layer_specs(sd15, 4, 2))
    shake(adapter)
    before = {k: v.clone() for k, v in adapter.state().items()}
    wrong = {k: v.new_zeros(8, *v.shape[1:]) if k.endswith(".down") else v for k, v in before.items()}
    with pytest.raises(ValueError, match=naming(len(wrong) // 2, "lora", 4, "attention")):
        adapter.load(wrong)
    with pytest.raises(ValueError, match=naming(1, next(iter(before)))):
        adapter.load(dict(list(before.items())[1:]))
    assert all(torch.equal(before[k], v) for k, v in adapter.state().items())


def test_unknown_targets_are_refused(sd15):
    with pytest.raises(ValueError, match=naming("everything", "attention", "attention+conv")):
        injection.inject(sd15, layer_specs(sd15, 4, 2, "everything"))


@pytest.mark.parametrize(
    ("form", "attention", "everything"),
    [
        (dict(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8), 192, 278),
        (
            dict(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024, use_linear_projection=True),
            192, 278
        ),
        (
            dict(
                block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
                transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ), 722, 788
        ),
    ],
    ids=["sd15", "sd2", "sdxl"],
)  # fmt: skip
def test_the_real_families_have_the_published_number_of_modules(form, attention, everything):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**form)
    assert len(targets_module.target_names(unet)) == attention
    assert len(targets_module.target_names(unet, "attention+conv")) == everything


def test_a_renamed_class_is_noticed(sd15):
    count = len(targets_module.target_names(sd15))
    block = next(m for n, m in sd15.named_modules() if n.endswith("attn1"))
    block.query = block.to_q
    del block.to_q
    with pytest.raises(RuntimeError, match=naming(count - 1, count)):
        targets_module.target_names(sd15)


# ── Ranks and rates by place ────────────────────────────────────────────────────────────────────────────────────────


def by_place(unet, **changes):
    return injection.inject(
        unet, run_specs(unet, Config(steps=1, rank=4, alpha=2, targets="attention+conv", **changes))
    )


def test_the_longest_path_decides_the_rank_and_the_scale_stays(sd15):
    block_ranks = {"down_blocks": 8, "down_blocks.0.attentions": 2, "mid_block": 0}
    adapter = by_place(sd15, block_ranks=block_ranks, conv_rank=1)
    ranks = {
        place: {rank for name, rank in adapter.ranks.items() if name.startswith(place)}
        for place in ("down_blocks.0.attentions", "down_blocks.0.resnets", "down_blocks.1", "mid_block", "up_blocks")
    }
    assert ranks == {
        "down_blocks.0.attentions": {2}, "down_blocks.0.resnets": {8}, "down_blocks.1": {8}, "mid_block": set(),
        "up_blocks": {1, 4},
    }  # fmt: skip
    scales = {name: adapter.alphas[name] / rank for name, rank in adapter.ranks.items()}
    kernels = {n: getattr(layer.get_base_layer(), "kernel_size", (1, 1)) for n, layer in adapter.layers.items()}
    wide = {name for name, kernel in kernels.items() if kernel != (1, 1)}
    assert wide and {scales[name] for name in wide} == {2.0}  # alpha 2 / conv_rank 1
    assert {scale for name, scale in scales.items() if name not in wide} == {0.5}
    for name, layer in adapter.layers.items():
        assert layer.lora_A["default"].weight.shape[0] == adapter.ranks[name]


def test_a_rank_stabilized_adapter_has_its_scale_in_its_alphas(sd15):
    adapter = by_place(sd15, rank_stabilized=True, block_ranks={"mid_block": 16})
    assert {name for name, rank in adapter.ranks.items() if rank == 16}
    for name, layer in adapter.layers.items():
        scale = 2 / adapter.ranks[name] ** 0.5  # alpha / √rank
        assert layer.scaling["default"] == pytest.approx(scale)
        assert adapter.alphas[name] / adapter.ranks[name] == pytest.approx(scale)  # what every file's reader computes


def test_places_that_are_not_there_are_named(sd15):
    places = "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"
    with pytest.raises(ValueError, match=naming("block_ranks", "middle", *places)):
        by_place(sd15, block_ranks={"middle": 8})
    with pytest.raises(ValueError, match=naming("block_ranks", 0)):
        by_place(sd15, block_ranks={"down_blocks": 0, "mid_block": 0, "up_blocks": 0})


# ── Text encoders ─────────────────────────────────────────────────────────────────────────────────────────────────────


ENCODERS = pytest.mark.parametrize("family", ["sd15", "sdxl"])  # one and two


@pytest.fixture
def models(small_bases, family):
    base = bases.open(small_bases[family])
    encoders = {
        which: bases.load_text_encoder(base, Compute(CPU, torch.float32), which)[0] for which in base.text_encoders
    }
    return {"unet": bases.load_unet(base, Compute(CPU, torch.float32))} | encoders


@ENCODERS
@pytest.mark.parametrize("algorithm", ["lora", "dora", "loha", "lokr"])
def test_text_encoders_are_adapted_and_restored(models, family, algorithm):
    encoders = [model for which, model in models.items() if which != "unet"]
    tokens = torch.randint(0, 100, (2, 77), generator=torch.Generator().manual_seed(0))
    said = lambda: [out for model in encoders for out in model(tokens, output_hidden_states=True).hidden_states[1:]]  # noqa: E731
    before, state = said(), [{key: id(w) for key, w in model.named_parameters()} for model in encoders]
    adapter = injection.inject(models, layer_specs(models, 4, 2, algorithm=algorithm))
    assert adapter.models == models and list(adapter.encoders.values()) == encoders
    names = [name for name in adapter.layers if targets_module.model_of(name) != "unet"]
    assert len(names) == 12 * len(encoders)  # two layers each: q, k, v, out, fc1, fc2
    assert "text_encoder.encoder.layers.1.self_attn.out_proj" in names
    assert all(torch.equal(a, b) for a, b in zip(said(), before, strict=True))
    shake(adapter)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(said(), before, strict=True))
    with injection.strength(adapter, 0):
        assert all(torch.equal(a, b) for a, b in zip(said(), before, strict=True))
    injection.eject(models)
    assert all(torch.equal(a, b) for a, b in zip(said(), before, strict=True))
    assert state == [{key: id(w) for key, w in model.named_parameters()} for model in encoders]
    injection.inject(models, layer_specs(models, 4, 2))  # nothing stands in the way of another


@ENCODERS
def test_places_reach_into_text_encoders(models):
    settings = Config(steps=1, rank=4, alpha=2, text_encoder_rate=1e-4, block_ranks={"text_encoder": 2, "up_blocks": 0})
    adapter = injection.inject(models, run_specs(models, settings))
    assert {rank for name, rank in adapter.ranks.items() if name.startswith("text_encoder.")} == {2}
    assert {alpha for name, alpha in adapter.alphas.items() if name.startswith("text_encoder.")} == {1.0}
    assert not any(name.startswith("up_blocks") for name in adapter.layers)
    injection.eject(models)
    only = injection.inject(models, run_specs(models, settings.with_(train_unet=False, block_ranks={})))
    assert "unet" not in only.models and not any(targets_module.model_of(name) == "unet" for name in only.layers)
    injection.eject(models)
    with pytest.raises(ValueError, match=naming("text_model", "text_encoder")):
        injection.inject(models, run_specs(models, settings.with_(block_ranks={"text_model": 2})))


@ENCODERS
def test_an_encoder_of_other_modules_is_refused(models):
    models["text_encoder"].config.num_hidden_layers = 3
    with pytest.raises(RuntimeError, match=naming("text_encoder", 12, 18)):
        injection.inject(models, layer_specs(models, 4, 2))
