"""The training loop: a generator of Steps, and `drain` that runs it to the end.

It does not depend on files, plots or widgets: a listener is any callable that takes a Step.

A step with a loss or gradients that are not finite is skipped: weights and optimizer state stay unchanged. The device
decides that; the loop reads its decision every `LOOK` steps, listeners at any time.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit.adapter import Adapter
from lorakit.base import Base
from lorakit.config import Config
from lorakit.device import autocast
from lorakit.train import optimizers
from lorakit.train.distributed import ALONE, Team
from lorakit.train.examples import Batch, Examples
from lorakit.train.loss import add_noise, debiased_weight, error, min_snr_weight, target

LOOK = 10  # steps between two checks for skipped steps
TOO_MANY = 3  # skipped steps in a row
Item = TypeVar("Item")


class Diverged(FloatingPointError):
    """TOO_MANY steps in a row were not finite, so the weights themselves are probably the cause."""


@dataclass
class State:
    """Everything that changes while training. Saving it resumes the run; randomness needs only the step."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    skipped: Tensor  # (2,), int32, on the device: skipped steps in a row, now and at most since the last check
    ema: optimizers.Ema | None = None
    step: int = 0  # optimizer updates so far, including skipped ones
    rate_factor: float = 1.0  # on the learning rate: halved whenever the run returned to a checkpoint
    asked_factor: float = 1.0  # on the learning rate: set by the user during the run
    updating: bool = False  # during an update: after an error the state is then neither the old nor the new one

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, the adapter has the weights to sample, validate and export: their average, if there is one."""
        self.updating, stack = True, ExitStack()
        try:
            stack.enter_context(optimizers.averaged(self.optimizer))
            if self.ema:
                stack.enter_context(self.ema.swapped())
            yield
        finally:
            stack.close()  # if it is interrupted, the weights are mixed, and `updating` stays True
            self.updating = False


@dataclass(frozen=True)
class Step:
    """A completed optimizer update."""

    number: int  # from 1
    total: int
    epoch: int  # from 1
    loss: Tensor  # scalar on the training device: reading it waits for the device
    learning_rate: float  # the schedule's
    own_rate: float | None  # the one that Prodigy found, times the schedule's; None with other optimizers
    examples: tuple[int, ...]  # numbers of its pictures
    finite: Tensor  # bool scalar on the training device: False if the step was skipped


def initial_state(adapter: Adapter, config: Config, device: torch.device, dtype: torch.dtype) -> State:
    """The state before the first step."""
    optimizer = optimizers.optimizer(
        config.optimizer, groups(adapter, config), config.learning_rate, config.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    ema = optimizers.Ema(list(adapter.parameters()), config.ema_decay) if config.ema_decay else None
    return State(adapter, optimizer, scaler, torch.zeros(2, dtype=torch.int32, device=device), ema)


def groups(adapter: Adapter, config: Config) -> list[dict[str, Any]]:
    """Parameter groups; `ratio` is their learning rate divided by the run's.

    Raises:
        ValueError: `block_rates` names a place without adapted layers.

    Source: Hayou et al. 2024, arXiv:2402.12354 (LoRA+: the up matrices learn faster).
    """
    adapters.check_places(config.block_rates, list(adapter.layers), "block_rates")
    rates = config.text_rates(adapters.TEXT_ENCODERS)
    weights: dict[tuple[float, bool], list[Tensor]] = {}
    for name, weight in adapter.state().items():
        module, _, part = name.rpartition(".")
        factor = adapters.value_at(config.block_rates, module)
        ratio = (1.0 if factor is None else factor) * (config.learning_rate_ratio if part == "up" else 1.0)
        ratio *= rates.get(adapters.model_of(module), config.learning_rate) / config.learning_rate
        weights.setdefault((ratio, part in adapter.layers[module].algorithm.exact), []).append(weight)
    return [
        {"params": params, "ratio": ratio} | ({"weight_decay": 0.0} if exact else {})  # decay would shrink the base
        for (ratio, exact), params in weights.items()
    ]


def batch_loss(
    unet: Any, base: Base, alphas_cumprod: Tensor, item: Batch, config: Config, adapter: Adapter | None = None
) -> Tensor:
    """The training loss of one batch, a scalar on the UNet's device.

    Args:
        adapter: switched off to predict base targets; its text encoders, if any, encode the captions again.
    """
    device, dtype = unet.device, unet.dtype

    def move(x: Tensor) -> Tensor:
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    latents, noise, timesteps = move(item.latents), move(item.noise), move(item.timesteps)
    alpha_bar = alphas_cumprod[timesteps]
    perturbed = noise if item.perturbation is None else noise + move(item.perturbation)
    noisy = add_noise(latents, perturbed, alpha_bar).to(dtype)
    texts = move(item.embeddings).to(dtype), move(item.pooled).to(dtype)
    sizes = move(item.sizes).to(dtype) if base.family == "sdxl" else None

    expected = target(base.prediction_type, latents, noise, alpha_bar)
    with autocast(device, dtype):
        if item.base_target is not None and adapter:
            with torch.no_grad(), adapters.strength(adapter, 0.0):
                of_base = bases.ask(unet, noisy, timesteps, texts, sizes).float()
            expected = torch.where(move(item.base_target).view(-1, 1, 1, 1), of_base, expected)
        if adapter and adapter.encoders:
            texts = bases.reencode(base, adapter.encoders, *texts, move(item.tokens), config.clip_skip)
        predicted = bases.ask(unet, noisy, timesteps, texts, sizes)
    snr, weight = alpha_bar / (1 - alpha_bar), None
    if config.min_snr_gamma is not None:
        weight = min_snr_weight(snr, config.min_snr_gamma, base.prediction_type)
    elif config.debiased:
        weight = debiased_weight(snr, base.prediction_type)
    if item.weight is not None:
        weight = move(item.weight) * (1 if weight is None else weight)
    mask = None if item.mask is None else move(item.mask)
    return error(predicted, expected, weight, config.loss, config.huber_delta, mask)


def steps(unet: Any, base: Base, state: State, examples: Examples, team: Team = ALONE) -> Iterator[Step]:
    """Train the adapter on the frozen base, yielding after each optimizer update.

    Args:
        unet: the base's UNet with `state.adapter`.
        team: processes that share each batch; all of them run the same steps.

    Yields:
        A Step for each update from `state.step` to the end, after updating `state`.

    Raises:
        Diverged: TOO_MANY steps in a row were not finite, or all of a shorter run. The state is that after the last
            finite one.
    """
    config, total = examples.config, examples.total_steps
    alphas_cumprod = base.alphas_cumprod().to(unet.device)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    for group, items in _prefetch(
        lambda step: (examples.group(step), examples.update(step, team)), range(state.step, total)
    ):
        if state.step % LOOK == 0:
            if int(state.skipped[1]) >= TOO_MANY:
                raise Diverged(f"{TOO_MANY} steps in a row before step {state.step + 1} were not finite.")
            state.skipped[1] = state.skipped[0]
        rate = state.asked_factor * state.rate_factor * learning_rate(config, state.step, total)
        for settings in state.optimizer.param_groups:
            settings["lr"] = rate * settings["ratio"]
        found = state.optimizer.param_groups[0].get("d")
        loss = torch.zeros((), device=unet.device)
        for item, share in items:
            value = batch_loss(unet, base, alphas_cumprod, item, config, state.adapter) * share / len(group)
            state.scaler.scale(value).backward()
            loss += value.detach()
        norm = _gather_gradients(state, loss, config, team, scaled=bool(items))
        state.updating = True
        finite = _update(state, loss, norm)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if state.ema:
            state.ema.update(state.step)
        state.updating = False
        epoch = (state.step - 1) // examples.steps_per_epoch + 1
        own = None if found is None else found * rate
        yield Step(state.step, total, epoch, loss, rate, own, tuple(chain(*group)), finite)
    if int(state.skipped[1]) >= min(TOO_MANY, total):
        raise Diverged(f"{int(state.skipped[1])} steps in a row up to step {state.step}, the last, were not finite.")


def _prefetch(make: Callable[[int], Item], numbers: Iterable[int]) -> Iterator[Item]:
    """`make(number)` for each number; a thread computes the next result while the caller uses this one."""
    with ThreadPoolExecutor(1) as worker:
        futures = (worker.submit(make, number) for number in numbers)
        for future, _ in pairwise(chain(futures, [Future[Item]()])):
            yield future.result()


def _gather_gradients(state: State, loss: Tensor, config: Config, team: Team, scaled: bool) -> Tensor:
    """Sum gradients and loss over the processes (in place) and clip the gradients. Returns their norm."""
    parameters = state.adapter.parameters()
    for weight in parameters:  # with clip skip, an encoder's last layers do not affect the loss
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    if not scaled:  # no part of the batch was this process's; without a scaled loss, a GradScaler cannot unscale
        state.scaler.scale(loss)
    if team.size > 1:
        team.add_up([*(weight.grad for weight in parameters if weight.grad is not None), loss])
    state.scaler.unscale_(state.optimizer)
    return torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or float("inf"))


def learning_rate(config: Config, step: int, total: int) -> float:
    """The rate of update `step`, counted from 0."""
    return config.learning_rate * optimizers.factor(
        config.schedule, step, total, config.warmup_steps, cycles=config.schedule_cycles, power=config.schedule_power
    )


def _update(state: State, loss: Tensor, norm: Tensor) -> Tensor:
    """Step the optimizer if loss and gradients are finite. Returns whether they are, on the device.

    A GradScaler skips gradients that overflow because of its scale, and halves it, as in the first steps of every run
    in float16. These count as not finite only once the scale is at 1.
    """
    optimizer: Any = state.optimizer
    scaler: Any = state.scaler
    finite = torch.isfinite(loss)
    if scaler.is_enabled():
        finite &= torch.isfinite(norm) | (scaler._get_scale_async() > 1)
        scaler.step(optimizer)
        scaler.update()
    else:
        finite &= torch.isfinite(norm)
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's fused kernels skip on the device
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
            optimizer.step()
        elif bool(finite):  # waits for the device
            optimizer.step()
    row = (state.skipped[0] + 1) * ~finite
    state.skipped = torch.stack([row, torch.maximum(row, state.skipped[1])])
    return finite


@contextmanager
def interruptible(stop: threading.Event) -> Iterator[threading.Event]:
    """Inside, the first Interrupt (Ctrl-C, or the host's SIGTERM) sets `stop`; a second Ctrl-C raises.

    SIGHUP (a closed terminal) also sets it, unless the program ignores SIGHUP. Outside the main thread nothing is
    changed: the supervisor of the thread sets `stop`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:  # hosts and launchers send the other signals twice
            raise KeyboardInterrupt
        stop.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    handlers = [signal.signal(number, handle) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that Python did not install


def drain(
    loop: Iterable[Step], *listeners: Callable[[Step], None], stop: threading.Event | None = None, team: Team = ALONE
) -> list[Step]:
    """Run the loop, passing every step to the listeners, and return the completed steps.

    An Interrupt, or a set `stop`, ends it after the step, in all processes of the team after the same one.
    """
    return list(watched(loop, listeners, stop or threading.Event(), team))


def watched(
    loop: Iterable[Step], listeners: Sequence[Callable[[Step], None]], stop: threading.Event, team: Team
) -> Iterator[Step]:
    """The loop's steps, each after the listeners had it; ends as `drain` does."""
    with interruptible(stop) as stop:
        for step in loop:
            for listener in listeners:
                listener(step)
            yield step
            if team.any(stop.is_set()):
                return
