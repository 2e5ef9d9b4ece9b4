"""The loop: a generator of Steps, and `run` that drains it.

Nothing here knows of files, plots or widgets. A listener is any callable that takes a Step.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorakit import buckets, loss, optim
from lorakit.adapter import Adapter
from lorakit.base import Base
from lorakit.cache import Encoded, Text
from lorakit.config import Config


@dataclass
class State:
    """Everything that changes while training. Saving it resumes the run; randomness needs the step alone."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer updates done


@dataclass(frozen=True)
class Step:
    """One optimizer update that is done."""

    number: int  # from 1
    total: int
    epoch: int  # from 1
    loss: Tensor  # scalar on the training device: reading it waits for the device
    learning_rate: float
    examples: tuple[int, ...]  # the pictures it saw


def start(adapter: Adapter, config: Config, device: torch.device, dtype: torch.dtype) -> State:
    """The state before the first step."""
    optimizer = optim.optimizer(config.optimizer, adapter.parameters(), config.learning_rate, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return State(adapter, optimizer, scaler)


def plan(pictures: Sequence[Encoded], repeats: Sequence[int], config: Config) -> tuple[int, int]:
    """How long the run is.

    Returns:
        Optimizer updates in an epoch, and in the whole run.
    """
    batches = buckets.steps_per_epoch(_sizes(pictures), repeats, config.batch_size)
    return -(-batches // config.gradient_accumulation_steps), config.total_steps(batches)


def _sizes(pictures: Sequence[Encoded]) -> list[tuple[int, int]]:
    return [(p.latents.shape[-1], p.latents.shape[-2]) for p in pictures]


def _groups(sizes, repeats, config: Config, epoch: int) -> list[list[list[int]]]:
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
    embeddings: Tensor  # (B, 77, width)
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
    noise, timesteps = loss.draw(
        config.seed, step, range(offset, offset + len(indices)), latents[0].shape, config.noise_offset
    )
    return Batch(
        torch.stack(latents), noise, timesteps, torch.stack([text.embeddings for text in chosen]),
        torch.stack([text.pooled for text in chosen]), torch.stack([pictures[i].sizes for i in indices]),
    )  # fmt: skip


def batch_loss(unet, base: Base, alphas_cumprod: Tensor, item: Batch, config: Config) -> Tensor:
    """The training loss of one batch, a scalar on the UNet's device."""
    device, dtype = unet.device, unet.dtype

    def move(x: Tensor) -> Tensor:
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    latents, noise, timesteps = move(item.latents), move(item.noise), move(item.timesteps)
    alpha_bar = alphas_cumprod[timesteps]
    noisy = loss.add_noise(latents, noise, alpha_bar).to(dtype)
    conditions = None
    if base.family == "sdxl":
        conditions = {"text_embeds": move(item.pooled).to(dtype), "time_ids": move(item.sizes).to(dtype)}
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
        predicted = unet(
            noisy, timesteps, encoder_hidden_states=move(item.embeddings).to(dtype), added_cond_kwargs=conditions
        ).sample
    weight = None
    if config.min_snr_gamma is not None:
        weight = loss.min_snr_weight(alpha_bar / (1 - alpha_bar), config.min_snr_gamma, base.prediction_type)
    return loss.mean_squared(predicted, loss.target(base.prediction_type, latents, noise, alpha_bar), weight)


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
    """
    per_epoch, total = plan(pictures, repeats, config)
    sizes = _sizes(pictures)
    alphas_cumprod = base.alphas_cumprod().to(unet.device)
    parameters = state.adapter.parameters()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    epoch, groups = -1, []
    while state.step < total:
        if state.step // per_epoch != epoch:
            epoch = state.step // per_epoch
            groups = _groups(sizes, repeats, config, epoch)
        group = groups[state.step % per_epoch]
        rate = config.learning_rate * optim.factor(config.schedule, state.step, total, config.warmup_steps)
        for settings in state.optimizer.param_groups:
            settings["lr"] = rate
        summed, offset = torch.zeros((), device=unet.device), 0
        for indices in group:
            item = batch(pictures, texts, indices, state.step, offset, config)
            value = batch_loss(unet, base, alphas_cumprod, item, config) / len(group)
            state.scaler.scale(value).backward()
            summed += value.detach()
            offset += len(indices)
        if config.max_grad_norm:
            state.scaler.unscale_(state.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        examples = tuple(index for indices in group for index in indices)
        yield Step(state.step, total, epoch + 1, summed, rate, examples)


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
