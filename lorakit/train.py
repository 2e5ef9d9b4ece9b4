"""The loop: a generator of Steps, and `run` that drains it.

Nothing here knows of files, plots or widgets. A listener is any callable that takes a Step.

A step whose loss or gradients are not finite is skipped: weights and optimizer stay what they were. Whether it was is
known on the device first; the loop looks every `LOOK` steps, listeners whenever they like.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorakit import buckets, loss, optim
from lorakit.adapter import Adapter
from lorakit.base import Base
from lorakit.cache import Encoded, Text
from lorakit.config import Config

LOOK = 10  # steps between two looks at whether steps were skipped
TOO_MANY = 3  # skipped steps in a row


class Diverged(FloatingPointError):
    """So many steps in a row were not finite that the weights themselves must be at fault."""


@dataclass
class State:
    """Everything that changes while training. Saving it resumes the run; randomness needs the step alone."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    skipped: Tensor  # (2,), int32, on the device: steps skipped in a row just now, and the most since the last look
    ema: optim.Ema | None = None
    step: int = 0  # optimizer updates done, skipped ones too
    rate_factor: float = 1.0  # halved whenever the run had to go back

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, the adapter holds the weights to sample, judge and export: the average, where one is kept."""
        with ExitStack() as stack:
            stack.enter_context(optim.averaged(self.optimizer))
            if self.ema:
                stack.enter_context(self.ema.swapped())
            yield


@dataclass(frozen=True)
class Step:
    """One optimizer update that is done."""

    number: int  # from 1
    total: int
    epoch: int  # from 1
    loss: Tensor  # scalar on the training device: reading it waits for the device
    learning_rate: float
    examples: tuple[int, ...]  # the pictures it saw
    finite: Tensor  # bool scalar on the training device: False where the step was skipped


def start(adapter: Adapter, config: Config, device: torch.device, dtype: torch.dtype) -> State:
    """The state before the first step."""
    optimizer = optim.optimizer(config.optimizer, groups(adapter, config), config.learning_rate, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    ema = optim.Ema(adapter.parameters(), config.ema_decay) if config.ema_decay else None
    return State(adapter, optimizer, scaler, torch.zeros(2, dtype=torch.int32, device=device), ema)


def groups(adapter: Adapter, config: Config) -> list[dict]:
    """Parameter groups; `ratio` is what their rate is of the run's.

    Source: Hayou et al. 2024, arXiv:2402.12354 (LoRA+: the up matrices learn faster).
    """
    if config.learning_rate_ratio == 1:
        return [{"params": adapter.parameters(), "ratio": 1.0}]
    ratios = {"down": 1.0, "up": config.learning_rate_ratio}
    return [
        {"params": [w for name, w in adapter.state().items() if name.endswith(f".{part}")], "ratio": ratio}
        for part, ratio in ratios.items()
    ]


def plan(pictures: Sequence[Encoded], repeats: Sequence[int], config: Config) -> tuple[int, int]:
    """How long the run is.

    Returns:
        Optimizer updates in an epoch, and in the whole run.
    """
    batches = buckets.steps_per_epoch(_sizes(pictures), repeats, config.batch_size)
    return -(-batches // config.gradient_accumulation_steps), config.total_steps(batches)


def _sizes(pictures: Sequence[Encoded]) -> list[tuple[int, int]]:
    return [(p.latents.shape[-1], p.latents.shape[-2]) for p in pictures]


def _batches(sizes, repeats, config: Config, epoch: int) -> list[list[list[int]]]:
    """The batches of an epoch in groups that share one update; the last group may be short, as in kohya's loop."""
    order = buckets.epoch(sizes, repeats, config.batch_size, seed=config.seed, epoch=epoch)
    n = config.gradient_accumulation_steps
    return [order[i : i + n] for i in range(0, len(order), n)]


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs, on the CPU."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,)
    perturbation: Tensor | None  # (B, C, h, w)
    embeddings: Tensor  # (B, tokens, width)
    pooled: Tensor  # (B, width)
    sizes: Tensor  # (B, 6)


def batch(
    pictures: Sequence[Encoded], texts: dict[str, Text], indices: Sequence[int], step: int, offset: int, config: Config
) -> Batch:
    """Put a batch together; every draw comes from (seed, step, place in the step) and nothing else.

    Args:
        indices: the pictures.
        step: the update, from 0.
        offset: place of the first example in the whole update.
    """
    latents, chosen = [], []
    for place, index in enumerate(indices, offset):
        picture = pictures[index]
        draws = np.random.default_rng([config.seed, step, place, 1]).random(2)
        mirror = picture.mirrored is not None and draws[0] < 0.5
        latents.append(picture.mirrored if mirror else picture.latents)
        chosen.append(texts["" if draws[1] < config.caption_dropout else picture.caption])
    draws = loss.draw(
        config.seed, step, range(offset, offset + len(indices)), latents[0].shape, noise_offset=config.noise_offset,
        multires_iterations=config.multires_noise_iterations, multires_discount=config.multires_noise_discount,
        input_perturbation=config.input_perturbation, timesteps=(config.min_timestep, config.max_timestep),
        timestep_sampling=config.timestep_sampling, timestep_shift=config.timestep_shift,
    )  # fmt: skip
    return Batch(
        torch.stack(latents), *draws, torch.stack([text.embeddings for text in chosen]),
        torch.stack([text.pooled for text in chosen]), torch.stack([pictures[i].sizes for i in indices]),
    )  # fmt: skip


def batch_loss(unet, base: Base, alphas_cumprod: Tensor, item: Batch, config: Config) -> Tensor:
    """The training loss of one batch, a scalar on the UNet's device."""
    device, dtype = unet.device, unet.dtype

    def move(x: Tensor) -> Tensor:
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    latents, noise, timesteps = move(item.latents), move(item.noise), move(item.timesteps)
    alpha_bar = alphas_cumprod[timesteps]
    seen = noise if item.perturbation is None else noise + move(item.perturbation)
    noisy = loss.add_noise(latents, seen, alpha_bar).to(dtype)
    conditions = None
    if base.family == "sdxl":
        conditions = {"text_embeds": move(item.pooled).to(dtype), "time_ids": move(item.sizes).to(dtype)}
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
        predicted = unet(
            noisy, timesteps, encoder_hidden_states=move(item.embeddings).to(dtype), added_cond_kwargs=conditions
        ).sample
    snr, weight = alpha_bar / (1 - alpha_bar), None
    if config.min_snr_gamma is not None:
        weight = loss.min_snr_weight(snr, config.min_snr_gamma, base.prediction_type)
    elif config.debiased:
        weight = loss.debiased_weight(snr, base.prediction_type)
    wanted = loss.target(base.prediction_type, latents, noise, alpha_bar)
    return loss.error(predicted, wanted, weight, config.loss, config.huber_delta)


def steps(
    unet, base: Base, state: State, pictures: Sequence[Encoded], repeats: Sequence[int], texts: dict[str, Text],
    config: Config,
) -> Iterator[Step]:  # fmt: skip
    """Train the adapter on the frozen base, yielding after each optimizer update.

    Args:
        unet: the base's UNet that holds `state.adapter`.
        repeats: times each picture counts in an epoch.
        texts: embeddings of every caption, and of "" where captions are dropped.

    Yields:
        A Step for each update from `state.step` to the end; `state` is up to date then.

    Raises:
        Diverged: TOO_MANY steps in a row were not finite. The state is that after the last good one.
    """
    per_epoch, total = plan(pictures, repeats, config)
    sizes = _sizes(pictures)
    alphas_cumprod = base.alphas_cumprod().to(unet.device)
    parameters = state.adapter.parameters()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    epoch, batches = -1, []
    while state.step < total:
        if state.step // per_epoch != epoch:
            epoch = state.step // per_epoch
            batches = _batches(sizes, repeats, config, epoch)
        if state.step % LOOK == 0:
            if int(state.skipped[1]) >= TOO_MANY:
                raise Diverged(f"{TOO_MANY} steps in a row before step {state.step + 1} were not finite.")
            state.skipped[1] = state.skipped[0]
        group = batches[state.step % per_epoch]
        rate = state.rate_factor * learning_rate(config, state.step, total)
        for settings in state.optimizer.param_groups:
            settings["lr"] = rate * settings["ratio"]
        summed, offset = torch.zeros((), device=unet.device), 0
        for indices in group:
            item = batch(pictures, texts, indices, state.step, offset, config)
            value = batch_loss(unet, base, alphas_cumprod, item, config) / len(group)
            state.scaler.scale(value).backward()
            summed += value.detach()
            offset += len(indices)
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or float("inf"))
        finite = _update(state, summed, norm)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if state.ema:
            state.ema.update(state.step)
        examples = tuple(index for indices in group for index in indices)
        yield Step(state.step, total, epoch + 1, summed, rate, examples, finite)


def learning_rate(config: Config, step: int, total: int) -> float:
    """The rate of update `step`, counted from 0."""
    return config.learning_rate * optim.factor(
        config.schedule, step, total, config.warmup_steps, cycles=config.schedule_cycles, power=config.schedule_power
    )


def _update(state: State, loss: Tensor, norm: Tensor) -> Tensor:
    """Let the optimizer step, unless loss or gradients are not finite. Returns whether they are, on the device.

    Gradients that a GradScaler scaled too high are its own affair: it skips them and halves its scale, as it does in
    the first steps of every run in float16. They count as not finite once there is nothing left to halve.
    """
    optimizer, scaler = state.optimizer, state.scaler
    finite = torch.isfinite(loss)
    if scaler.is_enabled():
        finite &= torch.isfinite(norm) | (scaler._get_scale_async() > 1)
        scaler.step(optimizer)
        scaler.update()
    else:
        finite &= torch.isfinite(norm)
        if optim.skips_on_device(optimizer):
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
            optimizer.step()
        elif bool(finite):  # these optimizers cannot be told on the device
            optimizer.step()
    row = (state.skipped[0] + 1) * ~finite
    state.skipped = torch.stack([row, torch.maximum(row, state.skipped[1])])
    return finite


@contextmanager
def interruptible(stop: threading.Event) -> Iterator[threading.Event]:
    """Let the first Interrupt (Ctrl-C) set `stop` instead of raising inside a step; a second one raises.

    Outside the main thread nothing is changed: whoever supervises the thread sets `stop`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def run(loop: Iterable[Step], *listeners: Callable[[Step], None], stop: threading.Event | None = None) -> list[Step]:
    """Drain the loop, showing listeners every step. An Interrupt, or `stop` set by anyone, ends it after the step.

    Returns:
        The steps that were done.
    """
    done = []
    with interruptible(stop or threading.Event()) as stop:
        for step in loop:
            done.append(step)
            for listener in listeners:
                listener(step)
            if stop.is_set():
                break
    return done
