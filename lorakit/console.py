"""Where text and progress bars go, the wish to stop, and the list of what could not be made."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, how many there are


@dataclass
class Console:
    """What a long call is given to talk and listen through.

    Attributes:
        show: called with each line of text.
        progress: True draws progress bars, False draws none; a function is called instead of drawing.
        stop: set from any thread to end the work after the current step.
        failures: what could not be made → the steps at which it failed, and the last reason.
    """

    show: Callable[[str], None] = print
    progress: bool | Progress = True
    stop: threading.Event = field(default_factory=threading.Event)
    failures: dict[str, tuple[list[int], str]] = field(default_factory=dict, repr=False)

    @classmethod
    def quiet(cls, stop: threading.Event | None = None) -> "Console":
        """A console that shows nothing."""
        return cls(lambda _: None, False, stop or threading.Event())

    def say(self, text: str) -> None:
        with suppress(OSError):  # the terminal was closed
            try:
                self.show(text)
            except UnicodeEncodeError as error:  # the terminal lacks a character
                self.show(text.encode(error.encoding, "replace").decode(error.encoding))

    @contextmanager
    def bar(self) -> Iterator[Progress]:
        """A progress bar that is called with what it counts, how many are done, and how many there are.

        Raises:
            KeyboardInterrupt: `stop` was set; raised when the bar is called before the end.
        """
        from tqdm.auto import tqdm

        with tqdm(disable=self.progress is not True, leave=False) as line:

            def draw(what: str, done: int, total: int) -> None:
                if callable(self.progress):
                    self.progress(what, done, total)
                else:
                    line.set_description(what, refresh=False)
                    line.total, line.n = total, done
                    line.refresh()
                if self.stop.is_set() and done < total:
                    raise KeyboardInterrupt(f"stopped after {done} of {total} {what}; these are kept")

            yield draw

    def failed(self, what: str, error: Exception | str, step: int | None = None) -> None:
        """Note that something could not be made, and why."""
        steps, _ = self.failures.get(what, ([], ""))
        steps += [] if step is None or step in steps else [step]
        text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else error
        self.failures[what] = steps, (text.splitlines() or [""])[0]

    def made(self, what: str) -> None:
        """Note that something was made after all."""
        self.failures.pop(what, None)

    @property
    def missing(self) -> tuple[str, ...]:
        """One line for each thing that could not be made: what, at which steps, and why."""
        return tuple(f"{what}{_at(steps)}: {why}" for what, (steps, why) in self.failures.items())

    def end(self) -> tuple[str, ...]:
        """Show the list of missing things, and return it."""
        for text in self.missing:
            self.say(f"missing   {text}")
        return self.missing


def _at(steps: Sequence[int]) -> str:
    """The steps at which something failed, in a few words."""
    if len(steps) < 2:
        return "".join(f" of step {step}" for step in steps)
    few = ", ".join(map(str, steps)) if len(steps) <= 5 else f"{steps[0]} to {steps[-1]}, {len(steps)} of them"
    return f" of steps {few}"
