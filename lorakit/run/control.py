"""A run while it goes on, as others see and steer it: stop, save now, sample now, another learning rate, other prompts.

What is asked for is done after the step at work, in the run's own thread, and written into log.jsonl.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from lorakit import base as bases
from lorakit import device, train
from lorakit import sample as sampling
from lorakit.config import Config
from lorakit.run import log as log_module
from lorakit.run import saver
from lorakit.run.preparation import Prepared
from lorakit.train import ALONE, Step, Team


@dataclass
class Live:
    """Wishes for a run, set from any thread, and how far it is."""

    stop: threading.Event = field(default_factory=threading.Event)  # end after this step, saved
    save: threading.Event = field(default_factory=threading.Event)
    sample: threading.Event = field(default_factory=threading.Event)
    learning_rate: float | None = None  # the schedule's highest, from now on; None: as it is
    prompts: Sequence[str] | None = None  # of the samples, from now on; None: as in the settings
    prepared: Prepared | None = None  # once it is
    step: int = 0
    total: int = 0  # 0: not known yet


def obeying(
    live: Live, state: train.State, prepared: Prepared, config: Config, keeper: saver.Keeper, log: log_module.Log,
    stop_file: Path, say: Callable[[str], None], team: Team = ALONE,
) -> Callable[[Step], None]:  # fmt: skip
    """A listener that does what is asked for, but for samples, which are the sampler's.

    A learning rate that was changed is part of the state, as a factor of the run's own: a run that is cut later goes
    on with it, and ends as if it had not been cut. What was asked for before the first step holds for that one, too.
    """
    prompts = None

    def rate() -> dict:
        """Use the learning rate that is asked for from the next step on; what is told of it in the log."""
        wanted = live.learning_rate
        if wanted is None or wanted / config.learning_rate == state.asked_factor:
            return {}
        if not 0 < wanted < math.inf or team.size > 1:
            why = "is none: give a number above 0" if team.size == 1 else "would not reach the other processes"
            say(f"rate      {wanted} {why}. It stays as it was")
            live.learning_rate = None
            return {}
        state.asked_factor = wanted / config.learning_rate
        say(f"rate      {wanted:g} as asked, from step {state.step + 1} on")
        return {"learning_rate": wanted}

    if begun := rate():
        log.marks[state.step + 1] = {"asked": begun}

    def listener(step: Step) -> None:
        nonlocal prompts
        live.step = step.number
        if stop_file.exists():
            live.stop.set()
        asked = rate()
        if live.prompts != prompts:
            prompts = live.prompts
            asked["prompts"] = list(prompts or prepared.prompts)
            say(f"prompts   {len(asked['prompts'])} as asked, for the samples from now on")
        if asked:
            mark = log.marks.setdefault(step.number, {})
            mark["asked"] = mark.get("asked", {}) | asked
        if live.save.is_set():
            live.save.clear()
            keeper(False)
            if keeper.saved == step.number:
                say(f"save      step {step.number} is saved, as asked")

    return listener


def sampler(
    unet, state: train.State, prepared: Prepared, config: Config, folder: Path, live: Live, say: log_module.Console,
    log: log_module.Log,
) -> Callable[[Step], None]:  # fmt: skip
    """A listener that samples prompts every so many steps and when asked. A failure is said and never ends training."""

    def listener(step: Step) -> None:
        due = step.number % config.sample_every == 0 or step.number == step.total
        if not (due or live.sample.is_set()):
            return
        live.sample.clear()
        try:
            prompts = list(live.prompts or prepared.prompts)
            with sampling.borrow(unet), state.evaluated():
                said = _said([*prompts, ""])
                *asked, empty = bases.reencode_texts(prepared.base, state.adapter.encoders, said, config.clip_skip)
                seeds = list(range(config.seed, config.seed + len(prompts)))
                latents = sampling.sample_latents(
                    unet, prepared.base, asked, empty, seeds,
                    size=(config.resolution, config.resolution), steps=config.sample_steps,
                    guidance=config.sample_guidance, batch=at_once(config),
                )  # fmt: skip
                vae = bases.load_vae(prepared.base, unet.dtype, unet.device)
                pictures = sampling.decode_latents(vae, latents)
                del vae
                device.free_memory(unet.device)
            sampling.save_picture(
                pictures, folder / "samples" / f"step-{step.number:06d}", prompts, seeds, steps=config.sample_steps,
                guidance=config.sample_guidance, scheduler_name=sampling.DEFAULT_SCHEDULER, clip_skip=config.clip_skip,
                model=prepared.base.name, loras=[(config.name, 1.0)],
            )  # fmt: skip
        except Exception as error:  # anything, a full disk or card too: the LoRA matters more than its preview
            say(f"samples   none at step {step.number}: {type(error).__name__}: {error}")
            say.failed("samples", error, step.number)
            return
        for prompt, picture in zip(prompts, pictures, strict=True):
            log.draw(partial(log_module.Board.picture, step=step.number, name=prompt, picture=picture))

    def _said(prompts: Sequence[str]) -> list[bases.Text]:
        """The prompts' embeddings; of new ones made on the CPU, because the card is full of training."""
        new = [prompt for prompt in prompts if prompt not in prepared.said]
        made = bases.encode_prompts(
            prepared.base, new, folder / "cache", device=torch.device("cpu"), dtype=torch.float32,
            clip_skip=config.clip_skip, say=say,
        ) if new else {}  # fmt: skip
        return [(prepared.said | made)[prompt] for prompt in prompts]

    return listener


def at_once(config: Config) -> int:
    """Pictures sampled together: one, so that samples need no more memory than training; small ones go in eights."""
    return 8 if config.resolution < 256 else 1
