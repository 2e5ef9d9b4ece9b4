"""How an adapter begins: the base is left as it is, and EVA finds what the inputs are made of."""

import pytest
import torch
from loops import CPU
from said import QUIET, naming

from lorakit.adapter import injection
from lorakit.adapter.layers import layer_parts
from lorakit.base import model
from lorakit.config import parse
from lorakit.run import checkpoint, run
from lorakit.run.control import Live
from lorakit.train import initialisation


def test_the_strongest_directions_are_those_of_the_svd():
    random = torch.Generator().manual_seed(0)
    scales = 0.7 ** torch.arange(40)
    x = torch.randn(500, 40, generator=random) * scales @ torch.linalg.qr(torch.randn(40, 40, generator=random))[0]
    start = torch.linalg.qr(torch.randn(40, 16, generator=random))[0]
    found = initialisation.strongest(start, x.T @ (x @ start), 8)
    exact = torch.linalg.svd(x, full_matrices=False)[2][:8]
    assert torch.allclose(found @ found.T, torch.eye(8), atol=1e-5)
    assert torch.allclose(torch.linalg.svdvals(found[:4] @ exact[:4].T), torch.ones(4), atol=1e-3)
    assert (x @ found.T).norm() > 0.999 * (x @ exact.T).norm()


@pytest.mark.parametrize(("rank", "wide"), [(3, 5), (8, 2)])
def test_what_has_few_directions_gives_no_more(rank, wide):
    basis = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))[0]
    start = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0][:, : max(wide, 2)]
    found = initialisation.strongest(start, basis @ basis.T @ start, rank)
    assert len(found) == 2 and torch.allclose(torch.linalg.svdvals(found @ basis), torch.ones(2), atol=1e-5)
    assert len(initialisation.strongest(start, torch.zeros_like(start), rank)) == 0


def begun(ready, **changes):
    config = ready.config.with_(**changes)
    encoders = config.text_rates(ready.base.text_encoders)
    models = {"unet": model.load_unet(ready.base, torch.float32, CPU)}
    models |= {which: model.load_text_encoder(ready.base, torch.float32, CPU, which)[0] for which in encoders}
    adapter = injection.fresh(models, config)
    initialisation.initialise(adapter, models["unet"], ready.base, ready.pictures, ready.repeats, ready.texts, config)
    return models["unet"], adapter


def answer(unet, ready):
    text = next(iter(ready.texts.values()))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8, generator=random), 300, encoder_hidden_states=text.embeddings[None]).sample


@pytest.mark.parametrize("targets", ["attention", "attention+conv"])
@pytest.mark.parametrize("how", ["orthogonal", "eva"])
def test_the_base_is_left_as_it_is(ready, how, targets):
    bare = answer(model.load_unet(ready.base, torch.float32, CPU).eval(), ready)
    unet, adapter = begun(ready, initialisation=how, targets=targets, text_encoder_rate=1e-3)
    again = begun(ready, initialisation=how, targets=targets, text_encoder_rate=1e-3)[1]
    usual = begun(ready, targets=targets, text_encoder_rate=1e-3)[1]
    for name, weight in adapter.state().items():
        assert torch.equal(weight, again.state()[name])  # nothing but the seed decides
        changed = not torch.equal(weight, usual.state()[name])
        assert changed == (how == "orthogonal" or name.endswith("down"))
    assert torch.allclose(answer(unet.eval(), ready), bare, atol=1e-5)
    for layer in adapter.layers.values():
        own = layer_parts(layer)
        down, up = own["down"].flatten(1), own["up"].flatten(1)
        assert torch.allclose(up @ down, torch.zeros(()), atol=1e-5)
        if how == "eva":
            whole = down @ down.T
            assert torch.allclose(whole, torch.eye(len(whole)), atol=1e-4)


def test_inputs_of_a_layer_lie_along_what_eva_finds(ready):
    unet, adapter = begun(ready, initialisation="eva")
    usual = begun(ready)[1]
    name, layer = next((n, m) for n, m in adapter.layers.items() if n.endswith("attn1.to_q"))
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1])))
    answer(unet, ready)
    hook.remove()
    share = lambda down: float((seen[0] @ torch.linalg.qr(down.T)[0]).norm() / seen[0].norm())  # noqa: E731
    assert share(layer_parts(layer)["down"].detach()) > share(layer_parts(usual.layers[name])["down"].detach()) + 0.1


@pytest.mark.usefixtures("weights_only")
def test_a_run_that_began_so_is_gone_on_with_bit_for_bit(settings, tmp_path):
    config = settings.with_(initialisation="eva")
    whole = run.start(config, tmp_path / "whole", **QUIET)
    live = Live()
    run.start(config, tmp_path / "cut", live=live, listeners=[lambda s: live.stop.set() if s.number == 3 else None],
              **QUIET)  # fmt: skip
    cut = run.start(config, tmp_path / "cut", **QUIET)
    one, other = (checkpoint.newest(r.folder / "checkpoints", print).tensors for r in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("settings", [{"algorithm": "lokr"}, {"start_from": "x.safetensors"}])
def test_what_has_a_beginning_already_is_told(settings):
    with pytest.raises(ValueError, match=naming("initialisation")):
        parse({"steps": 1, "initialisation": "eva"} | settings)


def test_all_processes_begin_as_the_first_does(ready):
    class Second:
        """Another process's part in the sum; what this one brings must be nothing."""

        first = False

        def add_up(self, tensors):
            assert all(not tensor.any() for tensor in tensors)
            for tensor in tensors:
                tensor.data.fill_(7)

    unet, adapter = begun(ready)
    config = ready.config.with_(initialisation="eva")
    initialisation.initialise(adapter, unet, ready.base, ready.pictures, ready.repeats, ready.texts, config, Second())
    assert all(bool((weight == 7).all()) for weight in adapter.parameters())
