"""The loop: a generator of Steps, and `run` that drains it.

Nothing here knows of files, plots or widgets. A listener is any callable that takes a Step.

A step whose loss or gradients are not finite is skipped: weights and optimizer stay what they were. Whether it was is
known on the device first; the loop looks every `LOOK` steps, listeners whenever they like.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lorakit import adapter as adapters
from lorakit import base as bases
from lorakit import dataset as datasets
from lorakit.adapter import Adapter
from lorakit.base import Base, Encoded, Text
from lorakit.config import Config
from lorakit.device import autocast
from lorakit.train import loss as loss_module
from lorakit.train import optimizers
from lorakit.train.distributed import ALONE, Team

LOOK = 10  # steps between two looks at whether steps were skipped
TOO_MANY = 3  # skipped steps in a row
Item = TypeVar("Item")


class Diverged(FloatingPointError):
    """So many steps in a row were not finite that the weights themselves must be at fault."""


@dataclass
class State:
    """Everything that changes while training. Saving it resumes the run; randomness needs the step alone."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    skipped: Tensor  # (2,), int32, on the device: steps skipped in a row just now, and the most since the last look
    ema: optimizers.Ema | None = None
    step: int = 0  # optimizer updates done, skipped ones too
    rate_factor: float = 1.0  # halved whenever the run had to go back
    asked_factor: float = 1.0  # what a person asked of the learning rate since, over the settings' own
    updating: bool = False  # in the midst of an update: what an error leaves then is neither the old state nor the new

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, the adapter holds the weights to sample, judge and export: the average, where one is kept."""
        self.updating, stack = True, ExitStack()
        try:
            stack.enter_context(optimizers.averaged(self.optimizer))
            if self.ema:
                stack.enter_context(self.ema.swapped())
            yield
        finally:
            stack.close()  # an interrupt in its midst leaves weights that are neither, and the next line undone
            self.updating = False


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


def initial_state(adapter: Adapter, config: Config, device: torch.device, dtype: torch.dtype) -> State:
    """The state before the first step."""
    optimizer = optimizers.optimizer(
        config.optimizer, groups(adapter, config), config.learning_rate, config.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    ema = optimizers.Ema(adapter.parameters(), config.ema_decay) if config.ema_decay else None
    return State(adapter, optimizer, scaler, torch.zeros(2, dtype=torch.int32, device=device), ema)


def groups(adapter: Adapter, config: Config) -> list[dict]:
    """Parameter groups; `ratio` is what their rate is of the run's.

    Raises:
        ValueError: `block_rates` names a place where nothing is adapted.

    Source: Hayou et al. 2024, arXiv:2402.12354 (LoRA+: the up matrices learn faster).
    """
    adapters.check_places(config.block_rates, list(adapter.layers), "block_rates")
    rates = config.text_rates(adapters.TEXT_ENCODERS)
    found: dict[tuple[float, bool], list[Tensor]] = {}
    for name, weight in adapter.state().items():
        module, _, part = name.rpartition(".")
        factor = adapters.value_at(config.block_rates, module)
        ratio = (1.0 if factor is None else factor) * (config.learning_rate_ratio if part == "up" else 1.0)
        ratio *= rates.get(adapters.model_of(module), config.learning_rate) / config.learning_rate
        found.setdefault((ratio, part == "dora_scale"), []).append(weight)
    return [
        {"params": weights, "ratio": ratio} | ({"weight_decay": 0.0} if lengths else {})  # which would shrink the base
        for (ratio, lengths), weights in found.items()
    ]


def batch_prompts(pictures: Sequence[Encoded], config: Config) -> list[str]:
    """Every text that `batch` can ask for."""
    words = [word for picture in pictures for word in (picture.caption, *picture.variants)]
    if config.asks_class:
        words += [datasets.without_trigger(word, config.trigger, config.class_word) for word in words]
    return list(dict.fromkeys(["", *words]))


def plan_epochs(pictures: Sequence[Encoded], repeats: Sequence[int], config: Config) -> tuple[int, int]:
    """How long the run is.

    Returns:
        Optimizer updates in an epoch, and in the whole run.
    """
    batches = datasets.steps_per_epoch(_sizes(pictures), repeats, config.batch_size)
    return -(-batches // config.gradient_accumulation_steps), config.total_steps(batches)


def _sizes(pictures: Sequence[Encoded]) -> list[tuple[int, int]]:
    return [(p.latents.shape[-1], p.latents.shape[-2]) for p in pictures]


def _batches(sizes, repeats, config: Config, epoch: int) -> list[list[list[int]]]:
    """The batches of an epoch in groups that share one update; the last group may be short, as in kohya's loop."""
    order = datasets.epoch_batches(sizes, repeats, config.batch_size, seed=config.seed, epoch=epoch)
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
    tokens: Tensor  # (B, encoders, length): for text encoders that are trained
    mask: Tensor | None = None  # (B, 1, h, w): what each place counts
    weight: Tensor | None = None  # (B,): what each example counts
    asks_base: Tensor | None = None  # (B,), bool: whose target is what the base answers without the adapter


def counted(picture: Encoded, config: Config) -> Tensor:
    """What each latent cell of a picture counts, by its mask: (1, h, w)."""
    if picture.mask is None:
        return torch.ones(1, 1, 1).expand(1, *picture.latents.shape[1:])
    return picture.mask + config.unmasked_weight * (1 - picture.mask)


def batch(
    pictures: Sequence[Encoded], texts: dict[str, Text], indices: Sequence[int], step: int, offset: int,
    config: Config, *, of_class: bool = False,
) -> Batch:  # fmt: skip
    """Put a batch together; every draw comes from (seed, step, place in the step) and nothing else.

    Args:
        indices: the pictures.
        step: the update, from 0.
        offset: place of the first example in the whole update.
        of_class: the same pictures and noise under the caption of the class, which the base shall answer as ever.
    """
    latents, masks, words = [], [], []
    for place, index in enumerate(indices, offset):
        picture = pictures[index]
        draws = np.random.default_rng([config.seed, step, place, 1]).random(3)
        mirror = picture.mirrored is not None and draws[0] < 0.5
        latents.append(picture.mirrored if mirror else picture.latents)
        masks.append(counted(picture, config).flip(-1) if mirror else counted(picture, config))
        variants = picture.variants or (picture.caption,)
        words.append("" if draws[1] < config.caption_dropout else variants[int(draws[2] * len(variants))])
    weight = asks_base = None
    prior = torch.tensor([pictures[i].prior for i in indices])
    if of_class:
        asked = [datasets.without_trigger(word, config.trigger, config.class_word) for word in words]
        # A caption without the trigger says the same in both, and cannot be learned and kept at once.
        weight = config.prior_weight * torch.tensor([float(a != b) for a, b in zip(asked, words, strict=True)])
        words, asks_base = asked, torch.ones_like(prior)
    elif prior.any():
        weight = torch.where(prior, config.prior_weight, 1.0)
        asks_base = prior if config.prior_prediction else None
    chosen = [texts[word] for word in words]
    draws = loss_module.draw(
        config.seed, step, range(offset, offset + len(indices)), latents[0].shape, noise_offset=config.noise_offset,
        multires_iterations=config.multires_noise_iterations, multires_discount=config.multires_noise_discount,
        input_perturbation=config.input_perturbation, timesteps=(config.min_timestep, config.max_timestep),
        timestep_sampling=config.timestep_sampling, timestep_shift=config.timestep_shift,
    )  # fmt: skip
    return Batch(
        torch.stack(latents), *draws, torch.stack([text.embeddings for text in chosen]),
        torch.stack([text.pooled for text in chosen]), torch.stack([pictures[i].sizes for i in indices]),
        torch.stack([text.tokens for text in chosen]),
        torch.stack(masks) if any(pictures[i].mask is not None for i in indices) else None, weight, asks_base,
    )  # fmt: skip


def batch_loss(
    unet, base: Base, alphas_cumprod: Tensor, item: Batch, config: Config, adapter: Adapter | None = None
) -> Tensor:
    """The training loss of one batch, a scalar on the UNet's device.

    Args:
        adapter: the one that is trained, switched off where the batch asks the base; texts are as its encoders say
            them, where it has some.
    """
    device, dtype = unet.device, unet.dtype

    def move(x: Tensor) -> Tensor:
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    latents, noise, timesteps = move(item.latents), move(item.noise), move(item.timesteps)
    alpha_bar = alphas_cumprod[timesteps]
    seen = noise if item.perturbation is None else noise + move(item.perturbation)
    noisy = loss_module.add_noise(latents, seen, alpha_bar).to(dtype)
    bare = move(item.embeddings).to(dtype), move(item.pooled).to(dtype)
    sizes = move(item.sizes).to(dtype) if base.family == "sdxl" else None

    def answer(embeddings: Tensor, pooled: Tensor) -> Tensor:
        conditions = None if sizes is None else {"text_embeds": pooled, "time_ids": sizes}
        return unet(noisy, timesteps, encoder_hidden_states=embeddings, added_cond_kwargs=conditions).sample

    wanted = loss_module.target(base.prediction_type, latents, noise, alpha_bar)
    with autocast(device, dtype):
        if item.asks_base is not None:
            with torch.no_grad(), adapters.strength(adapter, 0.0):
                wanted = torch.where(move(item.asks_base).view(-1, 1, 1, 1), answer(*bare).float(), wanted)
        texts = bare
        if adapter and adapter.encoders:
            texts = bases.reencode(base, adapter.encoders, *bare, move(item.tokens), config.clip_skip)
        predicted = answer(*texts)
    snr, weight = alpha_bar / (1 - alpha_bar), None
    if config.min_snr_gamma is not None:
        weight = loss_module.min_snr_weight(snr, config.min_snr_gamma, base.prediction_type)
    elif config.debiased:
        weight = loss_module.debiased_weight(snr, base.prediction_type)
    if item.weight is not None:
        weight = move(item.weight) * (1 if weight is None else weight)
    mask = None if item.mask is None else move(item.mask)
    return loss_module.error(predicted, wanted, weight, config.loss, config.huber_delta, mask)


def steps(
    unet, base: Base, state: State, pictures: Sequence[Encoded], repeats: Sequence[int], texts: dict[str, Text],
    config: Config, team: Team = ALONE,
) -> Iterator[Step]:  # fmt: skip
    """Train the adapter on the frozen base, yielding after each optimizer update.

    Args:
        unet: the base's UNet that holds `state.adapter`.
        repeats: times each picture counts in an epoch.
        texts: embeddings of every caption, as `prompts` lists them.
        team: the processes that share each batch; every one of them goes through the same steps.

    Yields:
        A Step for each update from `state.step` to the end; `state` is up to date then.

    Raises:
        Diverged: TOO_MANY steps in a row were not finite. The state is that after the last good one.
    """
    per_epoch, total = plan_epochs(pictures, repeats, config)
    sizes = _sizes(pictures)
    alphas_cumprod = base.alphas_cumprod().to(unet.device)
    parameters = state.adapter.parameters()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    order = lru_cache(2)(lambda epoch: _batches(sizes, repeats, config, epoch))

    def work(step: int) -> tuple[list[list[int]], list[tuple[Batch, float]]]:
        """The pictures of a step in batches, and this process's part of each with its share of the mean."""
        group, items, offset = order(step // per_epoch)[step % per_epoch], [], 0
        for indices in group:
            mine = team.share(len(indices))
            part, place = indices[mine], offset + mine.start
            for of_class in (False, True) if config.asks_class else (False,):
                for first in range(0, len(part), config.at_once):
                    some = part[first : first + config.at_once]
                    item = batch(pictures, texts, some, step, place + first, config, of_class=of_class)
                    items.append((item, len(some) / len(indices)))
            offset += len(indices)
        return group, items

    for group, items in _ahead(work, range(state.step, total)):
        if state.step % LOOK == 0:
            if int(state.skipped[1]) >= TOO_MANY:
                raise Diverged(f"{TOO_MANY} steps in a row before step {state.step + 1} were not finite.")
            state.skipped[1] = state.skipped[0]
        rate = state.asked_factor * state.rate_factor * learning_rate(config, state.step, total)
        for settings in state.optimizer.param_groups:
            settings["lr"] = rate * settings["ratio"]
        summed = torch.zeros((), device=unet.device)
        for item, share in items:
            value = batch_loss(unet, base, alphas_cumprod, item, config, state.adapter) * share / len(group)
            state.scaler.scale(value).backward()
            summed += value.detach()
        for weight in parameters:  # the last layers of an encoder say nothing where clip skip leaves them out
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if not items:  # a scaler that has seen no loss yet cannot unscale
            state.scaler.scale(summed)
        if team.size > 1:
            team.add_up([*(weight.grad for weight in parameters), summed])
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or float("inf"))
        state.updating = True
        finite = _update(state, summed, norm)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if state.ema:
            state.ema.update(state.step)
        state.updating = False
        examples = tuple(index for indices in group for index in indices)
        yield Step(state.step, total, (state.step - 1) // per_epoch + 1, summed, rate, examples, finite)


def _ahead(make: Callable[[int], Item], numbers: Iterable[int]) -> Iterator[Item]:
    """What `make` gives for each number; the next is made in a thread while the caller works with this one."""
    with ThreadPoolExecutor(1) as worker:
        made = None
        for number in numbers:
            coming = worker.submit(make, number)
            if made:
                yield made.result()
            made = coming
        if made:
            yield made.result()


def learning_rate(config: Config, step: int, total: int) -> float:
    """The rate of update `step`, counted from 0."""
    return config.learning_rate * optimizers.factor(
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
        if optimizers.skips_on_device(optimizer):
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
            optimizer.step()
        elif bool(finite):  # these optimizers cannot be told on the device
            optimizer.step()
    row = (state.skipped[0] + 1) * ~finite
    state.skipped = torch.stack([row, torch.maximum(row, state.skipped[1])])
    return finite


@contextmanager
def interruptible(stop: threading.Event) -> Iterator[threading.Event]:
    """Let the first Interrupt (Ctrl-C, or the host's SIGTERM) set `stop` instead of ending a step; a second one raises.

    A closed terminal counts too (SIGHUP), unless the program was told not to mind it. Outside the main thread nothing
    is changed: whoever supervises the thread sets `stop`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, frame):
        if stop.is_set() and number == signal.SIGINT:  # hosts and launchers say the others twice
            raise KeyboardInterrupt
        stop.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield stop
    finally:
        for number, own in zip(numbers, before, strict=True):
            signal.signal(number, own or signal.SIG_DFL)  # None: not Python's own


def drain(
    loop: Iterable[Step], *listeners: Callable[[Step], None], stop: threading.Event | None = None, team: Team = ALONE
) -> list[Step]:
    """Drain the loop, showing listeners every step. An Interrupt, or `stop` set by anyone, ends it after the step.

    Args:
        team: processes that run the same loop; where one of them is stopped, all stop after the same step.

    Returns:
        The steps that were done.
    """
    done = []
    with interruptible(stop or threading.Event()) as stop:
        for step in loop:
            done.append(step)
            for listener in listeners:
                listener(step)
            if team.any(stop.is_set()):
                break
    return done
