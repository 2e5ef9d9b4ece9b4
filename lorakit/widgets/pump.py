"""Clicks that are answered while a cell works.

A kernel handles one message after the other, so that a click waits for the end of the cell. Here a worker thread does
the work; the cell's own thread looks for clicks ten times a second, and is the only one that touches widgets: what a
worker thread changes does not show in Colab.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

import zmq
from IPython import get_ipython

from lorakit import base as bases

EVERY = 0.1  # seconds between two looks
COMMS = ("comm_open", "comm_msg", "comm_close")
QUESTIONS = ("kernel_info_request", "comm_info_request")  # what a page asks that was opened anew
Made = TypeVar("Made")


def supervise(work: Callable[[], Made], refresh: Callable[[], None], stop: threading.Event) -> Made:
    """Let a worker thread work, while this thread answers clicks.

    Args:
        work: called once. It looks at `stop`, and ends soon after that is set.
        refresh: called ten times a second, and once more when the work is done; brings widgets up to date. A failure
            of it does not end the work.
        stop: set by an Interrupt. A third one leaves the worker alone.

    Returns:
        What `work` returned.

    Raises:
        KeyboardInterrupt: interrupted for the third time; the worker may still be busy.
        BaseException: what `work` raised, or else `refresh`.
    """
    outcome = _begin(work)
    trouble = _watch(outcome, refresh, stop)
    made = outcome.result()
    if trouble:
        raise trouble
    return made


def react(work: Callable[[], Made], refresh: Callable[["Future[Made] | None"], None], stop: threading.Event) -> None:
    """`supervise` for a button's callback: other clicks are answered while the work goes on.

    Where clicks have a thread of their own (a subshell, as JupyterLab asks of new kernels), that must not be held up,
    and this returns at once; elsewhere when the work is done.

    Args:
        refresh: called with None while the work goes on, and at last with its outcome.
    """
    outcome = _begin(work)
    arguments = (outcome, lambda: refresh(outcome if outcome.done() else None), stop)
    if threading.current_thread() is threading.main_thread():
        _watch(*arguments)
    else:
        threading.Thread(target=_watch, args=arguments, name="lorakit watcher", daemon=True).start()


def _begin(work: Callable[[], Made]) -> "Future[Made]":
    outcome: Future = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    bases.rest_threads()
    threading.Thread(target=run, name="lorakit worker", daemon=True).start()
    return outcome


def _watch(outcome: Future, refresh: Callable[[], None], stop: threading.Event) -> Exception | None:
    """Refresh and answer clicks until the outcome is there; returns what went wrong first in doing so."""
    pump, interrupts, trouble, done = Pump(), 0, None, False
    try:
        while not done:
            try:
                done = bool(wait([outcome], EVERY).done)
                pump.poll()
                refresh()
            except KeyboardInterrupt:
                stop.set()
                interrupts += 1
                if interrupts == 3:
                    raise
            except Exception as error:
                trouble = trouble or error
    finally:
        pump.close()
    return trouble


class Pump:
    """Hands clicks that wait in the kernel's queue to their widgets; all else keeps its place in it.

    It stands on private parts of ipykernel (6: `msg_queue`; 7: the pair of sockets to the main thread). Where those
    are missing or fail, it does nothing any more: Interrupt and the file STOP still work.
    """

    def __init__(self):
        self.kernel, self.held = getattr(get_ipython(), "kernel", None), []
        self.failed: Exception | None = None
        manager = getattr(getattr(self.kernel, "shell_channel_thread", None), "manager", None)
        self.pair = getattr(getattr(manager, "_shell_channel_to_main", None), "to_socket", None)
        self.reply = manager.get_subshell_to_shell_channel_socket(None) if self.pair else None
        self.queue = None if self.pair else getattr(self.kernel, "msg_queue", None)
        if self.queue is not None:
            self.reply = self.kernel.shell_stream

    @property
    def works(self) -> bool:
        """Whether clicks can be seen from here."""
        mine = threading.current_thread() is threading.main_thread()
        return mine and not self.failed and (self.pair or self.queue) is not None

    def poll(self) -> None:
        """Handle the clicks that wait."""
        if not self.works:
            return
        try:
            if self.pair:
                with suppress(zmq.Again):
                    while True:
                        frames = self.pair.recv_multipart(zmq.NOBLOCK, copy=False)
                        if not self._handled(frames):
                            self.held.append(frames)
            else:
                self.kernel.shell_stream.flush(zmq.POLLIN)
                waiting = [self.queue.get_nowait() for _ in range(self.queue.qsize())]
                for item in waiting:  # (when, what handles it, its arguments)
                    if not self._handled(item[2][0]):
                        self.queue.put_nowait(item)
        except Exception as error:
            self.failed = error

    def close(self) -> None:
        """Hand back what was kept, in its order."""
        held, self.held = self.held, []
        for frames in held:
            self.kernel.io_loop.add_callback(self.kernel.shell_main, None, frames)

    def _handled(self, frames: list) -> bool:
        """Handle a message if it is a click or a page's question; the cell stays the parent of what it prints."""
        kernel, session = self.kernel, self.kernel.session
        identities, parts = session.feed_identities(frames, copy=False)
        kind = session.unpack(parts[1].bytes)["msg_type"]
        if kind not in COMMS + QUESTIONS:
            return False
        message = session.deserialize(parts, content=True, copy=False)
        kernel._publish_status("busy", "shell", parent=message)
        try:
            answer = kernel.shell_handlers[kind](self.reply, identities, message)
            if hasattr(answer, "send"):  # a coroutine that waits for nothing
                with suppress(StopIteration):
                    answer.send(None)
        finally:
            kernel._publish_status("idle", "shell", parent=message)
        return True
