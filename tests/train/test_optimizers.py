import sys

import pytest
import torch
from safetensors.torch import load_file
from said import naming

from lorakit.adapter import injection
from lorakit.run import checkpoint
from lorakit.train import loop, optimizers

EIGHT_BIT = ["adamw8bit", "paged_adamw8bit"]


def weights(count: int = 1) -> list[torch.nn.Parameter]:
    """Weights of 8192 numbers: bitsandbytes keeps moments below 4096 numbers in float32."""
    return [torch.nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128)) for _ in range(count)]


def moments(optimizer, weight) -> set[torch.dtype]:
    """The dtypes of the two moments of a weight in bitsandbytes."""
    return {optimizer.state[weight][name].dtype for name in ("state1", "state2")}


@pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS])
def test_an_optimizer_lowers_the_loss(name):
    parameters = weights()
    optimizer = optimizers.optimizer(name, parameters, 1.0 if name == "prodigy" else 0.01, weight_decay=0.0)
    first = parameters[0].square().mean().item()
    for _ in range(120 if name == "prodigy" else 30):  # its rate starts at a millionth
        parameters[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with optimizers.averaged(optimizer):
        assert parameters[0].square().mean().item() < 0.8 * first
    if name in EIGHT_BIT:
        assert moments(optimizer, parameters[0]) == {torch.uint8}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    monkeypatch.setitem(sys.modules, "lion_pytorch.lion_pytorch", None)
    with pytest.raises(ImportError, match=naming("lion", "pip install lion-pytorch")):
        optimizers.optimizer("lion", weights(), 1e-4, 0.0)


def test_rate_decay_and_betas_are_the_given_ones():
    group = optimizers.optimizer("adamw", weights(), learning_rate=3e-4, weight_decay=0.02).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (3e-4, 0.02, (0.9, 0.999), 1e-8)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=naming("sgdd", *optimizers.OPTIMIZERS)):
        optimizers.optimizer("sgdd", weights(), 1e-3, 0)
    with pytest.raises(ValueError, match=naming("cosin", *optimizers.SCHEDULES)):
        optimizers.factor("cosin", 0, 10)


def test_schedules():
    for name in ("constant_with_warmup", "cosine", "linear"):
        rates = [optimizers.factor(name, step, 100, warmup=10) for step in range(100)]
        assert all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True))  # rises
        assert rates[10] == pytest.approx(1.0, abs=0.01)
        assert max(rates) <= 1.0
    assert {optimizers.factor("constant", step, 100) for step in range(100)} == {1.0}
    assert optimizers.factor("cosine", 50, 100) == pytest.approx(0.5)
    assert optimizers.factor("linear", 75, 100) == pytest.approx(0.25)
    assert 0 < optimizers.factor("cosine", 99, 100) < 0.001


def test_schedules_agree_with_diffusers():
    from diffusers.optimization import get_scheduler

    for name in ("cosine", "linear", "constant", "cosine_with_restarts", "polynomial"):
        optimizer = torch.optim.SGD(weights(), lr=1.0)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=40, num_cycles=3, power=2.0)
        for step in range(40):
            # diffusers' polynomial ends at 1e-7, ours at 0
            ours = optimizers.factor(name, step, 40, cycles=3, power=2.0)
            assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-6)
            optimizer.step()
            scheduler.step()


def test_warm_up_as_a_share_of_the_run():
    assert [optimizers.factor("cosine", s, 200, 0.05) for s in range(200)] == [
        optimizers.factor("cosine", s, 200, 10) for s in range(200)
    ]


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_adamws_moments_are_converted_to_8_bit(name):
    from bitsandbytes.functional import dequantize_blockwise

    parameters = [*weights(), torch.nn.Parameter(torch.linspace(0, 1, 16))]  # the second is too small to be rounded
    before = optimizers.optimizer("adamw", parameters, 0.01, weight_decay=0.0)
    for _ in range(3):
        sum(weight.pow(3).sum() for weight in parameters).backward()
        before.step()
    saved = before.state_dict()["state"]
    after = optimizers.optimizer(name, parameters, 0.01, weight_decay=0.0)
    optimizers.to_8bit(after, saved)
    large, small = (after.state[weight] for weight in parameters)
    for ours, theirs in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        assert large[f"state{ours}"].dtype == torch.uint8
        back = dequantize_blockwise(
            large[f"state{ours}"], code=large[f"qmap{ours}"], absmax=large[f"absmax{ours}"], blocksize=256
        )
        expected = saved[0][theirs]
        assert (back - expected).abs().max() < 0.02 * expected.abs().max() and back.abs().max() > 0
        assert torch.equal(small[f"state{ours}"], saved[1][theirs])
    assert large["step"] == small["step"] == 3
    after.step()


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_an_8_bit_state_survives_its_file(name, tmp_path):
    """bitsandbytes shares one table among all weights, which safetensors refuses to write twice."""
    config = {"learning_rate": 0.01, "weight_decay": 0.0}

    def state(parameters) -> loop.State:
        none = injection.Adapter({}, {})
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return loop.State(
            none, optimizers.optimizer(name, parameters, **config), scaler, torch.zeros(2, dtype=torch.int32)
        )

    def step(state, parameters) -> None:
        sum(weight.pow(3).sum() for weight in parameters).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    ours, theirs = weights(2), weights(2)
    before, after = state(ours), state(theirs)
    for _ in range(3):
        step(before, ours)
    path = checkpoint.save(tmp_path / checkpoint.name(3), before, {})
    saved = [tensor for key, tensor in load_file(path).items() if key.endswith(("state1", "state2"))]
    assert len(saved) == 4 and {tensor.dtype for tensor in saved} == {torch.uint8}
    for mine, other in zip(ours, theirs, strict=True):
        other.data.copy_(mine.data)
    checkpoint.restore(after, checkpoint.read(path))
    assert all(moments(after.optimizer, weight) == {torch.uint8} for weight in theirs)
    step(before, ours)
    step(after, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
