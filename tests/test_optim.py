import pytest
import torch

from lorakit import optim


def weights():
    return [torch.nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128))]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_an_optimizer_walks_downhill(name):
    parameters = weights()
    optimizer = optim.optimizer(name, parameters, learning_rate=0.01, weight_decay=0.0)
    first = parameters[0].square().mean().item()
    for _ in range(30):
        parameters[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parameters[0].square().mean().item() < 0.8 * first


def test_rate_decay_and_betas_are_what_was_asked():
    group = optim.optimizer("adamw", weights(), learning_rate=3e-4, weight_decay=0.02).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (3e-4, 0.02, (0.9, 0.999), 1e-8)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'adamw' or 'adamw8bit'"):
        optim.optimizer("sgdd", weights(), 1e-3, 0)
    with pytest.raises(ValueError, match="no schedule 'cosin'"):
        optim.factor("cosin", 0, 10)


def test_schedules():
    for name in ("constant_with_warmup", "cosine", "linear"):
        rates = [optim.factor(name, step, 100, warmup=10) for step in range(100)]
        assert all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True))  # rises
        assert rates[10] == pytest.approx(1.0, abs=0.01)
        assert max(rates) <= 1.0
    assert {optim.factor("constant", step, 100) for step in range(100)} == {1.0}
    assert optim.factor("cosine", 50, 100) == pytest.approx(0.5)
    assert optim.factor("linear", 75, 100) == pytest.approx(0.25)
    assert 0 < optim.factor("cosine", 99, 100) < 0.001


def test_schedules_agree_with_diffusers():
    from diffusers.optimization import get_scheduler

    for ours, theirs in [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant")]:
        optimizer = torch.optim.SGD(weights(), lr=1.0)
        scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=0, num_training_steps=40)
        for step in range(40):
            assert optim.factor(ours, step, 40) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
            optimizer.step()
            scheduler.step()
