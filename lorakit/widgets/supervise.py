"""Clicks that are answered while a cell works.

A kernel handles one message after the other, so that a click waits for the end of the cell. Here a worker thread does
the work; the cell's own thread looks for clicks ten times a second, and is the only one that touches widgets: what a
worker thread changes does not show in Colab.
"""

import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

import zmq
from IPython import get_ipython

from lorakit import device

EVERY = 0.1  # seconds between two looks
COMMS = ("comm_open", "comm_msg", "comm_close")
QUESTIONS = ("kernel_info_request", "comm_info_request")  # what a page asks that was opened anew
Made = TypeVar("Made")


def supervise(work: Callable[[], Made], refresh: Callable[[], None], stop: threading.Event) -> Made:
    """Let a worker thread work, while this thread answers clicks.

    Args:
        work: called once. It looks at `stop`, and ends soon after that is set.
        refresh: called ten times a second, and once more when the work is done; brings widgets up to date. A failure
            of it ends nothing, and is told once on standard error.
        stop: set by an Interrupt. A third one leaves the worker alone.

    Returns:
        What `work` returned.

    Raises:
        KeyboardInterrupt: interrupted for the third time; the worker may still be busy.
        BaseException: what `work` raised.
    """
    outcome = _begin(work)
    _watch(outcome, refresh, stop)
    return outcome.result()


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
            # What is raised again is kept by the notebook, and with its frames the models in them.
            traceback.clear_frames(error.__traceback__)
            outcome.set_exception(error)

    device.rest_threads()
    threading.Thread(target=run, name="lorakit worker", daemon=True).start()
    return outcome


def _watch(outcome: Future, refresh: Callable[[], None], stop: threading.Event) -> None:
    """Refresh and answer clicks until the outcome is there."""
    pump, interrupts, failed, done = Pump(), 0, False, False
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
                if not failed:
                    print(f"What is shown may be out of date: {error!r}. The work goes on.", file=sys.stderr)
                failed = True
    finally:
        pump.close()


class Pump:
    """Hands clicks that wait in the kernel's queue to their widgets; all else keeps its place in it.

    It stands on private parts of ipykernel (6: `msg_queue`; 7: the pair of sockets to the main thread). Where those
    are missing or fail, it does nothing any more: Interrupt and the file STOP still work.
    """

    held: list = []  # of all pumps of the kernel: one may begin within a click that another one answers
    within = 0

    def __init__(self):
        self.kernel = getattr(get_ipython(), "kernel", None)
        Pump.within += threading.current_thread() is threading.main_thread()
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
                        Pump.held.append(self.pair.recv_multipart(zmq.NOBLOCK, copy=False))  # lost by no Interrupt
                        mine = Pump.held[-1]
                        if self._handled(mine):
                            Pump.held.remove(mine)
            else:
                self.kernel.shell_stream.flush(zmq.POLLIN)
                waiting, kept = [], []
                try:
                    while not self.queue.empty():
                        waiting.append(self.queue.get_nowait())  # (when, what handles it, its arguments)
                    while waiting:
                        handled = self._handled(waiting[0][2][0])
                        kept += [] if handled else waiting[:1]
                        del waiting[0]
                finally:
                    for item in kept + waiting:
                        self.queue.put_nowait(item)
        except Exception as error:
            self.failed = error

    def close(self) -> None:
        """Hand back what was kept, in its order."""
        if threading.current_thread() is not threading.main_thread():
            return
        Pump.within -= 1
        held, Pump.held = (Pump.held, []) if Pump.within == 0 else ([], Pump.held)
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
