"""Initial adapter weights: the base's output does not change, and EVA follows the layers' inputs."""

import pytest
import torch
from loops import CPU, examples
from said import QUIET, naming

from lorakit.adapter import injection
from lorakit.adapter.specs import run_specs
from lorakit.base import model
from lorakit.config import parse
from lorakit.device import Compute
from lorakit.run import checkpoint, run
from lorakit.run.control import Control
from lorakit.train import initialisation


def test_the_strongest_directions_are_those_of_the_svd():
    random = torch.Generator().manual_seed(0)
    scales = 0.7 ** torch.arange(40)
    x = torch.randn(500, 40, generator=random) * scales @ torch.linalg.qr(torch.randn(40, 40, generator=random))[0]
    start = torch.linalg.qr(torch.randn(40, 16, generator=random))[0]
    directions = initialisation.strongest(start, x.T @ (x @ start), 8)
    exact = torch.linalg.svd(x, full_matrices=False)[2][:8]
    assert torch.allclose(directions @ directions.T, torch.eye(8), atol=1e-5)
    assert torch.allclose(torch.linalg.svdvals(directions[:4] @ exact[:4].T), torch.ones(4), atol=1e-3)
    assert (x @ directions.T).norm() > 0.999 * (x @ exact.T).norm()


@pytest.mark.parametrize(("rank", "wide"), [(3, 5), (8, 2)])
def test_a_matrix_of_low_rank_has_few_directions(rank, wide):
    basis = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))[0]
    start = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0][:, : max(wide, 2)]
    directions = initialisation.strongest(start, basis @ basis.T @ start, rank)
    assert len(directions) == 2 and torch.allclose(torch.linalg.svdvals(directions @ basis), torch.ones(2), atol=1e-5)
    assert len(initialisation.strongest(start, torch.zeros_like(start), rank)) == 0


def initialised(ready, **changes):
    config = ready.config.with_(**changes)
    encoders = config.text_rates(ready.base.text_encoders)
    models = {"unet": model.load_unet(ready.base, Compute(CPU, torch.float32))}
    models |= {name: model.load_text_encoder(ready.base, Compute(CPU, torch.float32), name)[0] for name in encoders}
    adapter = injection.inject(models, run_specs(models, config), config.seed)
    initialisation.initialise(adapter, models["unet"], ready.base, examples(ready, config))
    return models["unet"], adapter


def predict(unet, ready):
    text = next(iter(ready.examples.texts.values()))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8, generator=random), 300, encoder_hidden_states=text.embeddings[None]).sample


@pytest.mark.parametrize("targets", ["attention", "attention+conv"])
@pytest.mark.parametrize("kind", ["orthogonal", "eva"])
def test_the_output_of_the_base_does_not_change(ready, kind, targets):
    bare = predict(model.load_unet(ready.base, Compute(CPU, torch.float32)).eval(), ready)
    unet, adapter = initialised(ready, initialisation=kind, targets=targets, text_encoder_rate=1e-3)
    again = initialised(ready, initialisation=kind, targets=targets, text_encoder_rate=1e-3)[1]
    usual = initialised(ready, targets=targets, text_encoder_rate=1e-3)[1]
    for name, weight in adapter.state().items():
        assert torch.equal(weight, again.state()[name])  # depends only on the seed
        changed = not torch.equal(weight, usual.state()[name])
        assert changed == (kind == "orthogonal" or name.endswith("down"))
    assert torch.allclose(predict(unet.eval(), ready), bare, atol=1e-5)
    for layer in adapter.layers.values():
        down, up = layer.parts["down"].flatten(1), layer.parts["up"].flatten(1)
        assert torch.allclose(up @ down, torch.zeros(()), atol=1e-5)
        if kind == "eva":
            assert torch.allclose(down @ down.T, torch.eye(len(down)), atol=1e-4)


def test_inputs_of_a_layer_lie_along_evas_directions(ready):
    unet, adapter = initialised(ready, initialisation="eva")
    usual = initialised(ready)[1]
    name, layer = next((n, m) for n, m in adapter.layers.items() if n.endswith("attn1.to_q"))
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1])))
    predict(unet, ready)
    hook.remove()
    share = lambda down: float((seen[0] @ torch.linalg.qr(down.T)[0]).norm() / seen[0].norm())  # noqa: E731
    assert share(layer.parts["down"].detach()) > share(usual.layers[name].parts["down"].detach()) + 0.1


@pytest.mark.usefixtures("weights_only")
def test_a_resumed_run_with_eva_is_bit_identical(settings, tmp_path):
    config = settings.with_(initialisation="eva")
    whole = run.start(config, tmp_path / "whole", **QUIET)
    live = Control()
    run.start(config, tmp_path / "cut", control=live, listeners=[lambda s: live.stop.set() if s.number == 3 else None],
              **QUIET)  # fmt: skip
    cut = run.start(config, tmp_path / "cut", **QUIET)
    one, other = (checkpoint.newest(r.folder / "checkpoints", print).tensors for r in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("settings", [{"algorithm": "lokr"}, {"start_from": "x.safetensors"}])
def test_adapters_with_their_own_initial_weights_are_refused(settings):
    with pytest.raises(ValueError, match=naming("initialisation")):
        parse({"steps": 1, "initialisation": "eva"} | settings)


def test_all_processes_get_the_weights_of_the_first(ready):
    class Second:
        """Another process's part in the sum; this process must add zeros."""

        first = False

        def add_up(self, tensors):
            assert all(not tensor.any() for tensor in tensors)
            for tensor in tensors:
                tensor.data.fill_(7)

    unet, adapter = initialised(ready, initialisation="eva")
    config = ready.config.with_(initialisation="eva")
    initialisation.initialise(adapter, unet, ready.base, examples(ready, config), Second())
    assert all(bool((weight == 7).all()) for weight in adapter.parameters())
