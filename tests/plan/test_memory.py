"""The cost of a step, as counted, is that of a real step."""

import gc
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from said import names, naming
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lorakit.adapter import injection
from lorakit.adapter.specs import run_specs
from lorakit.base import model as bases
from lorakit.base import quantization
from lorakit.config import Config
from lorakit.plan import memory
from lorakit.train import loss, optimizers

CHANNELS = {"in_channels": 4, "out_channels": 4}
CROSS, PLAIN, UP, CROSS_UP = "CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
SD15 = CHANNELS | {
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
}  # fmt: skip
SDXL = CHANNELS | {
    "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "down_block_types": (PLAIN, CROSS, CROSS),
    "up_block_types": (CROSS_UP, CROSS_UP, UP), "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
UNETS = {
    # The embedded base's form: attention on every level.
    "demo": CHANNELS | {
        "block_out_channels": (64, 128, 192), "layers_per_block": 1, "cross_attention_dim": 128,
        "attention_head_dim": (1, 2, 4), "norm_num_groups": 16, "down_block_types": (CROSS,) * 3,
        "up_block_types": (CROSS_UP,) * 3,
    },
    # One level with attention, for what does not depend on the base: the number of layers decides what a test costs.
    "small sd15": CHANNELS | {
        "block_out_channels": (64, 128), "layers_per_block": 1, "cross_attention_dim": 64, "attention_head_dim": 2,
        "norm_num_groups": 16, "down_block_types": (CROSS, PLAIN), "up_block_types": (UP, CROSS_UP),
    },
    "small sdxl": SDXL | {
        "block_out_channels": (64, 128), "layers_per_block": 1, "cross_attention_dim": 128,
        "attention_head_dim": (2, 4), "norm_num_groups": 16, "down_block_types": (PLAIN, CROSS),
        "up_block_types": (CROSS_UP, UP), "transformer_layers_per_block": (1, 2), "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 6 * 32 + 80,
    },
    # The real families' blocks, a tenth as wide, and shallower.
    "sd15": SD15,  # for tests/bench/memory_truth.py
    "narrow sd15": SD15 | {
        "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 96, "attention_head_dim": 4,
        "norm_num_groups": 8, "layers_per_block": 1,
    },
    "narrow sdxl": SDXL | {
        "block_out_channels": (32, 64, 128), "cross_attention_dim": 128, "attention_head_dim": (2, 4, 8),
        "norm_num_groups": 8, "layers_per_block": 1, "transformer_layers_per_block": (1, 1, 2),
        "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 6 * 32 + 80,
    },
}  # fmt: skip


def text_config(width: int) -> dict:
    """A CLIP's, four layers deep."""
    return {
        "max_position_embeddings": 77, "vocab_size": 1000, "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": 80, "bos_token_id": 998,
        "eos_token_id": 999,
    }  # fmt: skip


def make_base(name: str) -> bases.Base:
    """A base of configs alone, 8 pixels a latent cell (4 in the demo): there is no folder, so nothing can be read."""
    configs = {
        "unet": UNETS[name],
        "vae": {"block_out_channels": [1] * (3 if name == "demo" else 4), "latent_channels": 4},
        "scheduler": {"prediction_type": "epsilon"},
        "text_encoder": text_config(96 if name == "narrow sd15" else 64), "text_encoder_2": text_config(64),
    }  # fmt: skip
    return bases.Base(Path("nowhere"), name, "sdxl" if "sdxl" in name else "sd15", configs)


def make_config(**changes) -> Config:
    return Config(**({"steps": 10, "rank": 8, "alpha": 8} | changes))


@cache
def predict(name: str, side: int = 128, dtype=torch.float32, device: str = "cpu", **changes) -> memory.StepCost:
    """A prediction, made once for all tests that ask for it."""
    return memory.count_step(make_base(name), make_config(**changes), size=(side, side), dtype=dtype, device=device)


class RealStep:
    """A real UNet with its adapter and optimizer on the CPU, one step done; text encoders that learn beside it."""

    encoders: dict[str, nn.Module] = {}

    def __init__(self, name: str, dtype: torch.dtype, config: Config):
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        self.base, self.config, self.dtype = make_base(name), config, dtype
        self.unet = nn.Module.to(UNet2DConditionModel.from_config(self.base.configs["unet"]), dtype)
        if config.quantize != "none":
            quantization.quantize(self.unet, config.quantize, torch.device("cpu"))
        self.encoders = {which: self.encoder(which) for which in config.text_rates(self.base.text_encoders)}
        models = {"unet": self.unet} | self.encoders
        self.adapter = injection.inject(models, run_specs(models, config), config.seed)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        self.weights = self.adapter.parameters()
        self.optimizer = optimizers.optimizer(config.optimizer, self.weights, 1e-4, 0.01)

    def encoder(self, which: str) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        kind = CLIPTextModelWithProjection if which == "text_encoder_2" else CLIPTextModel
        return nn.Module.to(kind(CLIPTextConfig(**self.base.configs[which])), self.dtype).eval()

    def __call__(self, side: int) -> None:
        # Where a processor emulates bf16, oneDNN takes memory for that; torch's own kernels are alike on all.
        with torch.backends.mkldnn.flags(enabled=self.dtype == torch.float32):
            self._step(side)

    def _step(self, side: int) -> None:
        settings, batch, cells = self.base.configs["unet"], self.config.batch_size, side // self.base.vae_factor
        for _ in range(self.config.gradient_accumulation_steps):
            latents, noise = torch.randn(2, batch, 4, cells, cells)
            conditions = None
            if self.base.family == "sdxl":
                conditions = {"text_embeds": torch.randn(batch, 80), "time_ids": torch.ones(batch, 6)}
            text = torch.randn(batch, 77, settings["cross_attention_dim"]).to(self.dtype)
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                if self.encoders:
                    tokens = torch.randint(1000, (batch, 2, 77))
                    pooled = conditions and conditions["text_embeds"]
                    text, pooled = bases.reencode(self.base, self.encoders, text, pooled, tokens)
                    conditions = conditions and conditions | {"text_embeds": pooled}
                predicted = self.unet(
                    loss.add_noise(latents, noise, torch.full((batch,), 0.5)).to(self.dtype),
                    torch.randint(1000, (batch,)),
                    text,
                    added_cond_kwargs=conditions,
                ).sample
            torch.autograd.backward(loss.error(predicted, noise))
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resident(self) -> int:
        """Bytes that stay between two steps."""
        state = [value for of_weight in self.optimizer.state.values() for value in of_weight.values()]
        models = [self.unet, *self.encoders.values()]
        for weight in self.unet.parameters():
            if scales := getattr(weight, "quant_state", None):  # what NF4 keeps beside the weights
                state += [scales.absmax, scales.code, scales.offset, scales.state2.absmax, scales.state2.code]
        state += [module.state.SCB for module in self.unet.modules() if hasattr(module, "state")]  # int8's scales
        state += [module.column_norm for module in self.unet.modules() if hasattr(module, "column_norm")]
        return sum(tensor.nbytes for tensor in [*(w for model in models for w in model.parameters()), *state])

    def peak(self, side: int) -> int:
        """The most bytes above `resident` that the allocator held in one more step, from the profiler's record."""
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            self(side)
        events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak


def numbers(name: str) -> int:
    """How many weights a UNet has."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return sum(weight.numel() for weight in UNet2DConditionModel.from_config(UNETS[name]).parameters())


def check(predicted: memory.StepCost, step: RealStep, side: int) -> None:
    step(side)  # makes the optimizer's state
    resident, moment = step.resident(), step.peak(side)
    assert predicted.weights + predicted.adapter + predicted.optimizer == resident
    assert predicted.peak == pytest.approx(resident + moment, rel=0.05)
    # What the CPU's convolutions keep for themselves on the way back, a second copy of their result, is not predicted.
    assert predicted.gradients + predicted.activations == pytest.approx(moment, rel=0.05, abs=400_000)


CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("name", "side", "batch", "dtype"),
    [
        ("demo", 64, 1, torch.float32),
        ("small sd15", 128, 4, torch.bfloat16),
        ("narrow sd15", 128, 4, torch.float32),
        ("narrow sdxl", 128, 1, torch.bfloat16),
    ],
)
def test_predicted_peak_is_the_real_peak(name, side, batch, dtype):
    step = RealStep(name, dtype, make_config(batch_size=batch))
    check(predict(name, side, dtype, batch_size=batch), step, side)
    if name != "demo":  # the others have all kinds of its blocks
        step.unet.enable_gradient_checkpointing()
        check(predict(name, side, dtype, batch_size=batch, **CHECKPOINTED), step, side)


@pytest.mark.no_cover
def test_a_base_in_four_bits():
    step = RealStep("small sdxl", torch.float32, make_config(quantize="nf4"))
    kept = predict("small sdxl", quantize="nf4")
    check(kept, step, 128)
    step.unet.enable_gradient_checkpointing()
    check(predict("small sdxl", quantize="nf4", **CHECKPOINTED), step, 128)
    assert kept.weights < 0.7 * 4 * numbers("small sdxl")


@pytest.mark.no_cover
@pytest.mark.parametrize("algorithm", ["dora", "loha", "lokr"])
def test_other_algorithms(algorithm):
    changes = {"algorithm": algorithm, "targets": "attention+conv"}
    check(predict("small sd15", **changes), RealStep("small sd15", torch.float32, make_config(**changes)), 128)


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "name, changes",
    [
        ("small sd15", {"text_encoder_rate": 1e-4}),
        ("small sd15", {"text_encoder_rate": 1e-4, "train_unet": False}),
        ("small sdxl", {"text_encoder_2_rate": 1e-4, "gradient_checkpointing": True}),
    ],
)
def test_text_encoders_are_counted(name, changes):
    check(predict(name, **changes), RealStep(name, torch.float32, make_config(**changes)), 128)


@pytest.mark.no_cover
def test_a_base_in_eight_bits():
    # The CPU multiplies floats where a card multiplies integers: what stays is compared, the moment is not.
    base, changes = ("small sdxl", 128, torch.bfloat16), {"batch_size": 4, "gradient_checkpointing": True}
    eight, four = (predict(*base, "cuda", quantize=bits, **changes) for bits in ("int8", "nf4"))
    step = RealStep("small sdxl", torch.bfloat16, make_config(quantize="int8", **changes))
    step(128)
    assert eight.weights + eight.adapter + eight.optimizer == step.resident()
    assert four.weights < eight.weights < 2 * numbers("small sdxl")
    assert eight.activations >= four.activations


@pytest.mark.no_cover
def test_gradients_wait_for_the_last_micro_batch():
    # Rank 64 on a small picture: gradients are as large as activations, and checkpointing hides nothing.
    changes = {"rank": 64, "gradient_checkpointing": True}
    three = predict("small sd15", 32, gradient_accumulation_steps=3, **changes)
    assert three.gradients == three.adapter
    config = make_config(gradient_accumulation_steps=3, **changes)
    check(three, RealStep("small sd15", torch.float32, config), 32)
    assert three.flops == 3 * predict("small sd15", 32, **changes).flops
    # A batch in parts takes what a part takes, and as much work as so many parts.
    parts = predict("small sd15", 32, batch_size=3, micro_batch_size=1, **changes)
    assert (parts.peak, parts.flops, parts.batch_size) == (three.peak, three.flops, 1)


class CardsAutocast(TorchFunctionMode):
    """Autocast's rule on CUDA for the functions of a UNet, at the functions themselves."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (F.group_norm, F.layer_norm):
            args = [arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args]
            kwargs = {name: arg.float() if isinstance(arg, torch.Tensor) else arg for name, arg in kwargs.items()}
        return function(*args, **kwargs)


def test_other_devices_than_the_cpu_keep_more():
    # Predicting a card with the CPU's autocast came out a fifth short. Apple's attention is not fused in training.
    step = RealStep("small sd15", torch.bfloat16, make_config(batch_size=4))
    cpu, cuda, mps = (predict("small sd15", 128, torch.bfloat16, on, batch_size=4) for on in ("cpu", "cuda", "mps"))
    for predicted, attention in ((cuda, nullcontext()), (mps, sdpa_kernel(SDPBackend.MATH))):
        assert predicted.activations > 1.15 * cpu.activations
        with CardsAutocast(), attention:
            check(predicted, step, 128)


@pytest.mark.no_cover
def test_half_precision_kinds_and_full_precision():
    fp16, bf16 = (predict("small sd15", 128, dtype, "cuda", batch_size=4) for dtype in (torch.float16, torch.bfloat16))
    assert (fp16.peak, fp16.flops, fp16.precision) == (bf16.peak, bf16.flops, "float16")
    full = predict("small sd15", batch_size=4)
    assert full.weights == 2 * fp16.weights and full.adapter == fp16.adapter and full.flops == fp16.flops
    on_card = predict("small sd15", device="cuda", batch_size=4)
    assert on_card.peak == full.peak  # without autocast the kinds of device agree


@pytest.mark.no_cover
def test_parts_add_up_and_checkpointing_trades_memory_for_work():
    kept, checkpointed = predict("small sd15"), predict("small sd15", **CHECKPOINTED)
    for p in (kept, checkpointed):
        assert p.peak == p.weights + p.adapter + p.gradients + p.optimizer + p.activations
    assert checkpointed.activations < kept.activations / 2
    assert 1.2 * kept.flops < checkpointed.flops < 1.5 * kept.flops
    four = predict("small sd15", batch_size=4)
    assert four.flops == pytest.approx(4 * kept.flops, rel=0.01)  # the time embedding's share is not 4-fold
    assert four.activations == pytest.approx(4 * kept.activations, rel=0.05)


def test_predicting_needs_no_folder_and_disturbs_nothing():
    first, before = predict("small sd15"), torch.get_rng_state()
    second = predict.__wrapped__("small sd15")
    assert not make_base("small sd15").folder.exists()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32 and torch.ones(1).sum().item() == 1
    assert (first.peak, first.flops, first.file_size) == (second.peak, second.flops, second.file_size)


def test_sizes_that_do_not_suit_the_base_are_refused():
    with pytest.raises(ValueError, match=naming(100, 64, 16)):
        memory.count_step(make_base("demo"), make_config(), size=(64, 100), dtype=torch.float32)


# ── The optimizer's share ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS])
def test_optimizer_state_is_what_the_optimizer_keeps(name):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    # bitsandbytes leaves less than 4096 weights in float32
    for shape in ((100,), (32, 100), (32, 320), (70, 100), (32, 64, 3, 3), (64, 32, 1, 1)):
        weight = nn.Parameter(torch.randn(shape))
        optimizer = optimizers.optimizer(name, [weight], 1.0 if name == "prodigy" else 1e-3, 0.0)
        weight.grad = torch.randn(shape)
        optimizer.step()
        kept = {key: value for key, value in optimizer.state[weight].items() if torch.is_tensor(value)}
        shared = ("qmap1", "qmap2")  # one table for all tensors
        real = sum(value.nbytes for key, value in kept.items() if key not in shared)
        assert memory.optimizer_state(name, shape) == pytest.approx(real, abs=16)  # 0-d figures


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match=naming("sgd", "adamw")):
        memory.optimizer_state("sgd", (1, 1))


# ── Text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


GIB = 2**30


def made_up(**changes) -> memory.StepCost:
    facts = dict(
        weights=2 * GIB, adapter=GIB // 10, gradients=0, optimizer=GIB // 5, activations=2 * GIB, file_size=GIB // 20,
        flops=2 * 10**12, seconds=3.0, size=(512, 768), batch_size=2, precision="float16", gradient_checkpointing=False,
    )  # fmt: skip
    return memory.StepCost(**(facts | changes))


def test_describe_says_that_it_is_predicted():
    text = made_up().describe()
    assert names(text, 768, 512, 2, "float16")
    parts = {"2.00 GiB": 2, "102.4 MiB": 1, "204.8 MiB": 1, "0.0 MiB": 1, "4.30 GiB": 1, "51.2 MiB": 1, "2.00 TFLOP": 1}
    for part, times in parts.items():
        assert sum(names(line, part) for line in text.splitlines()) == times, part
    other = made_up(gradient_checkpointing=True).describe()
    assert other != text


# ── Work ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def bare_answer(name: str, side: int) -> int:
    """Floating-point operations of a real UNet without an adapter, the way there alone."""
    step = RealStep(name, torch.float32, make_config())
    injection.eject(step.unet)
    cells, width = side // step.base.vae_factor, step.base.configs["unet"]["cross_attention_dim"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step.unet(torch.randn(1, 4, cells, cells), 1, torch.randn(1, 77, width))
    return counter.get_total_flops()


@pytest.mark.no_cover
def test_the_classs_share_of_the_work_is_counted():
    plain = predict("small sd15", 32).flops
    trained = {"regularisation": "class", "prior_prediction": True}
    of_class = {"trigger": "sks", "class_word": "cat", "prior_prediction": True}
    answer = predict("small sd15", 32, **trained).flops - plain
    bare = bare_answer("small sd15", 32)
    assert bare <= answer < 1.2 * bare  # the adapter is a sixth of so narrow a UNet
    assert predict("small sd15", 32, gradient_accumulation_steps=2, **of_class).flops == 2 * (2 * plain + answer)
