import warnings
from contextlib import contextmanager

import pytest
import readers
import torch
from said import QUIET, naming
from torch import nn

from lorakit.adapter import attachment, injection, names, proof, write
from lorakit.adapter.specs import layer_specs
from lorakit.base import model as bases
from lorakit.base import quantization
from lorakit.device import Compute
from lorakit.run import run, run_folder

CPU = torch.device("cpu")


def predict(unet, text: int):
    """The UNet's prediction for a fixed input."""
    random = torch.Generator().manual_seed(0)
    x, words = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 77, text, generator=random)
    return unet(x, torch.tensor([100, 700]), encoder_hidden_states=words).sample


# ── Any processor ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["plain", "fast"])
def processor(request, monkeypatch):
    """bitsandbytes' choice by the processor, forced: "fast" as with AVX512-BF16, "plain" as without."""
    import bitsandbytes as bnb

    fast = request.param == "fast"
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: fast)
    # torch._int_mm is exact on processors where bitsandbytes uses it, and overflows on those without VNNI.
    with int8_product(lambda a, b: a.int() @ b.int() if fast else (a.float() @ b.float()).to(torch.int32)):
        yield request.param


@contextmanager
def int8_product(product):
    """Make bitsandbytes multiply int8 matrices with another function on the CPU."""
    library = torch.library.Library("bitsandbytes", "IMPL")

    def kernel(a, b):
        return product(a.reshape(-1, a.shape[-1]), b.t()).reshape(*a.shape[:-1], b.shape[0])

    with warnings.catch_warnings():  # torch warns that a kernel is replaced
        warnings.simplefilter("ignore")
        library.impl("int8_linear_matmul", kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


SIZES = [(64, 64), (64, 16), (128, 40), (32, 16), (96, 32), (31, 64), (320, 96)]  # inputs, outputs


@pytest.fixture(scope="module")
def answers():
    """(kind, size, dtype) → output and gradients on the first processor."""
    return {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_layers_output_is_the_same_on_any_processor_and_after_sampling(processor, kind, dtype, answers):
    """Sampling (no gradients), training, sampling: the weight does not change, and gradients pass."""
    for size in SIZES:
        random = torch.Generator().manual_seed(0)
        inner = nn.Linear(*size).to(dtype)
        for weight in inner.parameters():
            weight.data.normal_(0, size[0] ** -0.5, generator=random)
        whole = inner.weight.detach().float()
        model = nn.ModuleDict({"attentions": nn.ModuleList([inner])})
        layer = quantization.quantize(model, kind, CPU)["attentions"][0]
        assert quantization.is_quantized(layer) == (kind == "int8" or size[0] % quantization.BLOCK == 0)
        packed = layer.weight.data.clone()
        x = torch.randn(5, 3, size[0], generator=random).to(dtype).requires_grad_()
        with torch.no_grad():
            first = layer.eval()(x.detach())
        trained = layer.train()(x)
        trained.float().square().sum().backward()
        with torch.no_grad():
            again = layer.eval()(x.detach())
        assert torch.equal(first, again) and torch.equal(layer.weight.data, packed)
        rounded = 0.02 if kind == "int8" or dtype == torch.bfloat16 else 1e-5  # int8 rounds x in evaluation
        assert (first - trained).norm() < rounded * trained.norm()
        assert (quantization.layer_weight(layer).float() - whole).norm() < 0.15 * whole.norm()
        assert x.grad is not None and x.grad.abs().sum() > 0
        known = answers.setdefault((kind, size, dtype), (first, x.grad))
        assert torch.allclose(first, known[0], rtol=1e-2, atol=1e-5) and torch.allclose(x.grad, known[1], rtol=1e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_run_makes_all_outputs(processor, settings, tmp_path, kind):
    settings = settings.with_(quantize=kind, steps=4, sample_every=2, validation_share=0.2, validate_every=2)
    result = run.start(settings, tmp_path / "run", **QUIET)
    assert result.steps == 4 and result.missing == () and result.comparison.is_file()
    assert len(list(result.folder.glob("samples/*/*.png"))) == 2
    assert [line["step"] for line in run_folder.read_log(result.folder / "log.jsonl") if "validation_loss" in line] == [
        2,
        4,
    ]


# ── A quantized base ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "loss"), [("nf4", 0.3), ("int8", 0.05)])
def test_a_quantized_base_predicts_nearly_the_same(kind, loss):
    base = bases.open("demo")
    plain = bases.load_unet(base, Compute(CPU, torch.float32))
    quantized = bases.load_unet(base, Compute(CPU, torch.float32, kind))
    with torch.no_grad():
        exact, rounded = predict(plain, 128), predict(quantized, 128)
    assert 0 < float((exact - rounded).norm() / exact.norm()) < loss
    layers = dict(quantization.quantizable_layers(quantized, kind))
    assert layers and all(type(layer).__module__.startswith("bitsandbytes") for layer in layers.values())
    for (name, layer), other in zip(plain.named_modules(), quantized.modules(), strict=True):
        if isinstance(layer, nn.Conv2d):
            assert torch.equal(layer.weight, other.weight), name
        if name in layers:
            assert quantization.weight_shape(other) == tuple(layer.weight.shape)


def test_the_size_is_that_of_bitsandbytes():
    unet = bases.load_unet(bases.open("demo"), Compute(CPU, torch.float32, "nf4"))
    for _, layer in quantization.quantizable_layers(unet, "nf4"):
        state = layer.weight.quant_state
        tensors = [layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        size = sum(tensor.nbytes for tensor in (*tensors, layer.column_norm))
        assert quantization.quantized_size(quantization.weight_shape(layer), "nf4") == size


@pytest.mark.no_cover
@pytest.mark.usefixtures("weights_only")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_run_exports_a_file_for_the_full_base(settings, finished, tmp_path, kind):
    result, (plain, _) = run.start(settings.with_(quantize=kind), tmp_path / "run", **QUIET), finished
    assert result.losses == pytest.approx(plain.losses, rel=0.1) and result.losses != plain.losses
    base = bases.open(settings.base)
    for unet in (bases.load_unet(base, Compute(CPU, torch.float32, quantize)) for quantize in ("none", kind)):
        adapter = attachment.attach(unet, base, result.lora)
        with torch.no_grad():
            learned = predict(unet, 16)
            with injection.strength(adapter, 0.0):
                bare = predict(unet, 16)
        assert not torch.allclose(learned, bare)
        injection.eject(unet)
        with torch.no_grad():
            assert torch.equal(predict(unet, 16), bare)


def test_impossible_quantizations_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=naming("int4", "nf4", "int8")):
        quantization.quantize(nn.Linear(1, 1), "int4", CPU)
    with pytest.raises(ValueError, match=naming("quantize", "none")):
        quantization.quantize(nn.Linear(1, 1), "nf4", torch.device("mps"))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=naming("bitsandbytes", "nf4")):
        quantization.quantize(nn.Linear(1, 1), "nf4", CPU)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_doras_column_norms_are_those_of_the_full_base(tmp_path, kind):
    """An untrained DoRA file has no effect: column norms of quantized weights differ by as much as a LoRA learns."""
    base = bases.open("demo")
    plain, quantized = (bases.load_unet(base, Compute(CPU, torch.float32, quantize)) for quantize in ("none", kind))
    with torch.no_grad():
        bare = predict(quantized, 128)
        adapter = injection.inject(quantized, layer_specs(quantized, 4, 2, algorithm="dora"))
        assert torch.allclose(predict(quantized, 128), bare, atol=1e-6)
        path = write.save_adapter(adapter, base, tmp_path / "a.safetensors")
        moved, changes = [], readers.updates(path)
        for name in adapter.layers:
            weight = plain.get_submodule(name).weight
            change = readers.change(weight, changes[names.kohya_name(name, "sd15")])
            moved.append((change.norm() / weight.norm()).item())
        assert max(moved) < 1e-6
        for weight in adapter.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        learned = predict(quantized, 128)
        assert not torch.allclose(learned, bare, atol=1e-3)
        write.save_adapter(adapter, base, path, dtype=torch.float32)
        assert proof.prove(path, adapter, base).error < 1e-6
        merged = readers.merge(path, plain, "sd15")
        assert merged == len(adapter.layers)
        again = bases.load_unet(base, Compute(CPU, torch.float32, kind))
        attachment.attach(again, base, path)
        assert torch.allclose(predict(again, 128), learned, atol=1e-5)
