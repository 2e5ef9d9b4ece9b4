import pytest
import readers
import torch
from torch import nn

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import export, quantize, run

CPU = torch.device("cpu")


def ask(unet, text: int):
    """The UNet's answer to one fixed question."""
    random = torch.Generator().manual_seed(0)
    x, words = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 77, text, generator=random)
    return unet(x, torch.tensor([100, 700]), encoder_hidden_states=words).sample


@pytest.mark.parametrize(("kind", "loss"), [("nf4", 0.3), ("int8", 0.05)])
def test_a_base_in_fewer_bits_answers_nearly_the_same(kind, loss):
    base = bases.open("demo")
    plain = bases.load_unet(base, torch.float32, CPU)
    few = bases.load_unet(base, torch.float32, CPU, kind)
    with torch.no_grad():
        right, nearly = ask(plain, 128), ask(few, 128)
    off = float((right - nearly).norm() / right.norm())
    assert 0 < off < loss
    held = dict(quantize.layers(few))
    assert held and all(type(layer).__module__.startswith("bitsandbytes") for layer in held.values())
    for (name, layer), other in zip(plain.named_modules(), few.modules(), strict=True):
        if isinstance(layer, nn.Conv2d):
            assert torch.equal(layer.weight, other.weight), name
        if name in held:
            assert quantize.shape(other) == tuple(layer.weight.shape)


def test_the_size_is_what_bitsandbytes_keeps():
    unet = bases.load_unet(bases.open("demo"), torch.float32, CPU, "nf4")
    for _, layer in quantize.layers(unet):
        state = layer.weight.quant_state
        kept = [layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        kept.append(layer.column_norm)
        assert quantize.size(quantize.shape(layer), "nf4") == sum(tensor.nbytes for tensor in kept)


@pytest.mark.no_cover
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_it_ends_in_a_file_for_the_whole_base(settings, tmp_path, kind):
    result = run.start(settings.with_(quantize=kind), tmp_path / "run", say=lambda _: None, progress=False)
    assert result.steps == 6 and result.comparison.is_file()
    plain = run.start(settings, tmp_path / "plain", say=lambda _: None, progress=False)
    assert result.losses == pytest.approx(plain.losses, rel=0.1) and result.losses != plain.losses
    base = bases.open(settings.base)
    for unet in (bases.load_unet(base, torch.float32, CPU, few) for few in ("none", kind)):
        adapter = export.inject(unet, base, result.lora)
        with torch.no_grad():
            learned = ask(unet, 16)
            with adapters.strength(adapter, 0.0):
                bare = ask(unet, 16)
        assert not torch.allclose(learned, bare)
        adapters.eject(unet)
        with torch.no_grad():
            assert torch.equal(ask(unet, 16), bare)


def test_what_cannot_be_done_is_said(monkeypatch):
    with pytest.raises(ValueError, match="quantize 'int4' is unknown"):
        quantize.hold(nn.Linear(1, 1), "int4", CPU)
    with pytest.raises(ValueError, match="does not work on Apple's"):
        quantize.hold(nn.Linear(1, 1), "nf4", torch.device("mps"))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="needs bitsandbytes, which is not installed"):
        quantize.hold(nn.Linear(1, 1), "nf4", CPU)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_doras_lengths_are_those_of_the_base_that_others_have(tmp_path, kind):
    """Untrained, a DoRA file changes nothing: the lengths of packed weights are off by as much as a LoRA learns."""
    base = bases.open("demo")
    plain, few = (bases.load_unet(base, torch.float32, CPU, few) for few in ("none", kind))
    with torch.no_grad():
        bare = ask(few, 128)
        adapter = adapters.inject(few, 4, 2, algorithm="dora")
        assert torch.allclose(ask(few, 128), bare, atol=1e-6)
        path = export.save(adapter, base, tmp_path / "a.safetensors")
        moved, changes = [], readers.updates(path)
        for name in adapter.layers:
            weight = plain.get_submodule(name).weight
            change = readers.change(weight, changes[export.kohya_name(name, "sd15")])
            moved.append((change.norm() / weight.norm()).item())
        assert max(moved) < 1e-6
        for weight in adapter.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        learned = ask(few, 128)
        assert not torch.allclose(learned, bare, atol=1e-3)
        export.save(adapter, base, path, dtype=torch.float32)
        assert export.prove(path, adapter, base).error < 1e-6
        merged = readers.merge(path, plain, "sd15")
        assert merged == len(adapter.layers)
        again = bases.load_unet(base, torch.float32, CPU, kind)
        export.inject(again, base, path)
        assert torch.allclose(ask(again, 128), learned, atol=1e-5)
