"""Steer a run while it trains: stop, save now, sample now, another learning rate, other prompts.

Requests are carried out after the current step, in the run's own thread, and are written into log.jsonl.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from lorakit import base as bases
from lorakit import sample as sampling
from lorakit.config import Config
from lorakit.console import Console
from lorakit.device import Compute, free_memory
from lorakit.run.log import Board, Log
from lorakit.run.preparation import Prepared
from lorakit.run.saver import Saver
from lorakit.run.session import Session
from lorakit.sample import Denoiser, Sampling
from lorakit.train import Step


@dataclass
class Control:
    """Requests to a run, set from any thread, and its progress."""

    stop: threading.Event = field(default_factory=threading.Event)  # save and end after this step
    save: threading.Event = field(default_factory=threading.Event)
    sample: threading.Event = field(default_factory=threading.Event)
    learning_rate: float | None = None  # the schedule's highest, from now on; None leaves it
    prompts: Sequence[str] | None = None  # of the samples, from now on; None takes the config's
    prepared: Prepared | None = None  # once it is
    step: int = 0
    total: int = 0  # 0: not known yet


class Requests:
    """A listener that carries out requests, except for samples.

    A changed learning rate is part of the state, as a factor on the config's: a run that is cut later continues with
    it, and ends as if it had not been cut. A request made before the first step holds for that step too.
    """

    def __init__(self, session: Session, control: Control, saver: Saver, log: Log):
        self.session, self.control, self.saver, self.log = session, control, saver, log
        self.prompts: Sequence[str] | None = None
        if changes := self._learning_rate():
            log.marks[session.state.step + 1] = {"asked": changes}

    def __call__(self, step: Step) -> None:
        control, console = self.control, self.session.console
        control.step = step.number
        if self.session.folder.stop_file.exists():
            control.stop.set()
        changes = self._learning_rate()
        if control.prompts != self.prompts:
            self.prompts = control.prompts
            changes["prompts"] = list(self.prompts or self.session.prepared.prompts)
            console.say(f"prompts   {len(changes['prompts'])} new ones for the samples from now on")
        if changes:
            mark = self.log.marks.setdefault(step.number, {})
            mark["asked"] = mark.get("asked", {}) | changes
        if control.save.is_set():
            control.save.clear()
            self.saver(False)
            if self.saver.saved == step.number:
                console.say(f"save      step {step.number} is saved")

    def _learning_rate(self) -> dict:
        """Use a requested learning rate from the next step on; what to write about it into the log."""
        rate, session = self.control.learning_rate, self.session
        full, state, single = session.config.learning_rate, session.state, session.team.size == 1
        if rate is None or rate / full == state.asked_factor:
            return {}
        if not 0 < rate < math.inf or not single:
            why = "is not a learning rate: give a number above 0" if single else "would not reach the other processes"
            session.console.say(f"rate      {rate} {why}. It stays as it was")
            self.control.learning_rate = None
            return {}
        state.asked_factor = rate / full
        session.console.say(f"rate      {rate:g} from step {state.step + 1} on")
        return {"learning_rate": rate}


class Sampler:
    """A listener that makes sample pictures every so many steps and on request. A failure never ends training."""

    def __init__(self, session: Session, control: Control, log: Log):
        self.session, self.control, self.log = session, control, log

    def __call__(self, step: Step) -> None:
        due = step.number % self.session.config.sample_every == 0 or step.number == step.total
        if not (due or self.control.sample.is_set()):
            return
        self.control.sample.clear()
        prompts = list(self.control.prompts or self.session.prepared.prompts)
        try:
            pictures = self._write(prompts, step.number)
        except Exception as error:  # of any kind: the LoRA matters more than its preview
            self.session.console.say(f"samples   none at step {step.number}: {type(error).__name__}: {error}")
            self.session.console.failed("samples", error, step.number)
            return
        for prompt, picture in zip(prompts, pictures, strict=True):
            self.log.draw(partial(Board.picture, step=step.number, name=prompt, picture=picture))

    def _write(self, prompts: Sequence[str], step: int) -> list:
        """Make a picture of each prompt and write it into the folder of the step."""
        session, base = self.session, self.session.prepared.base
        settings = Sampling.of(session.config)
        seeds, size = settings.resolve(len(prompts), base)
        unet = session.unet
        with sampling.borrow(unet), session.state.evaluated():
            encoded = self._texts([*prompts, ""])
            encoders = session.state.adapter.encoders
            *texts, empty = bases.reencode_texts(base, encoders, encoded, session.config.clip_skip)
            denoiser = Denoiser(unet, base, settings, size, at_once(session.config))
            latents = torch.cat(list(denoiser(texts, seeds, empty, empty)))
            vae = bases.load_vae(base, Compute(unet.device, unet.dtype))
            pictures = sampling.decode_latents(vae, latents)
            del vae
            free_memory(unet.device)
        folder, loras = session.folder.samples(step), [(session.config.name, 1.0)]
        for number, (prompt, seed, picture) in enumerate(zip(prompts, seeds, pictures, strict=True)):
            text = sampling.infotext(prompt, seed, picture.size[::-1], settings, base.name, loras)
            sampling.write_picture(picture, folder / f"{number:02d}-seed-{seed}.png", text)
        return pictures

    def _texts(self, prompts: Sequence[str]) -> list[bases.Text]:
        """The prompts' embeddings; new ones are made on the CPU, because the card is full of training."""
        session, known = self.session, self.session.prepared.prompt_texts
        if new := [prompt for prompt in prompts if prompt not in known]:
            compute = Compute(torch.device("cpu"), torch.float32)
            quiet = Console(session.console.say, False)
            known = known | bases.encode_prompts(
                session.prepared.base, new, session.folder.cache, compute, session.config.clip_skip, quiet
            )
        return [known[prompt] for prompt in prompts]


def at_once(config: Config) -> int:
    """Pictures sampled together: one, so that samples need no more memory than training; eight when they are small."""
    return 8 if config.resolution < 256 else 1
