"""Answer clicks while a cell works.

A kernel handles one message after the other, so a click waits for the end of the cell. Here a worker thread does the
work, and the cell's own thread looks for clicks ten times a second. Only that thread changes widgets, because Colab
does not show the changes of other threads.
"""

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager, suppress
from typing import Any, TypeVar

import zmq
from IPython import get_ipython

from lorakit import device

EVERY = 0.1  # seconds between two looks
COMMS = ("comm_open", "comm_msg", "comm_close")
WATCHED: list[Future] = []  # the work that cells and clicks wait for
QUESTIONS = ("kernel_info_request", "comm_info_request")  # of a page that was opened again
T = TypeVar("T")


def supervise(work: Callable[[], T], refresh: Callable[[], None], stop: threading.Event) -> T:
    """The result of work done in a worker thread, while this thread answers clicks.

    Args:
        work: called once. It looks at `stop`, and ends soon after that is set.
        refresh: called ten times a second, and once after the work, to update widgets. Its errors do not end the work;
            the first one is printed on standard error.
        stop: set by an Interrupt. The third Interrupt abandons the worker.

    Raises:
        KeyboardInterrupt: the third Interrupt; the worker may still be busy.
        BaseException: the error of `work`.
    """
    outcome = _start(work)
    _watch(outcome, refresh, stop)
    return outcome.result()


def react(work: Callable[[], T], refresh: Callable[["Future[T] | None"], None], stop: threading.Event) -> None:
    """`supervise` for a button's callback: other clicks are answered during the work.

    Returns when the work is done. Where clicks have a thread of their own (a subshell, which JupyterLab asks new
    kernels for), it returns at once, so as not to block that thread.

    Args:
        refresh: called with None during the work, and at last with its outcome.
    """
    outcome = _start(work)
    arguments = (outcome, lambda: refresh(outcome if outcome.done() else None), stop)
    if threading.current_thread() is threading.main_thread():
        _watch(*arguments)
    else:
        threading.Thread(target=_watch, args=arguments, name="lorakit watcher", daemon=True).start()


def _start(work: Callable[[], T]) -> "Future[T]":
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            # The notebook keeps the error that is raised again, and its frames would keep the models.
            traceback.clear_frames(error.__traceback__)
            outcome.set_exception(error)

    device.rest_threads()
    threading.Thread(target=run, name="lorakit worker", daemon=True).start()
    return outcome


def _watch(outcome: Future, refresh: Callable[[], None], stop: threading.Event) -> None:
    """Refresh and answer clicks until the work is done."""
    interrupts, failed, done = 0, False, False
    with _watched(outcome), closing(Pump()) as pump:
        while not done:
            try:
                done = bool(wait([outcome], EVERY).done)
                pump.poll()
                failed = _refreshed(refresh, failed)
            except KeyboardInterrupt:
                stop.set()
                interrupts += 1
            if interrupts == 3:
                raise KeyboardInterrupt


@contextmanager
def _watched(outcome: Future) -> Iterator[None]:
    WATCHED.append(outcome)
    try:
        yield
    finally:
        WATCHED.remove(outcome)


def _refreshed(refresh: Callable[[], None], failed: bool) -> bool:
    """Refresh, and return whether this or an earlier refresh has failed; the first error is printed."""
    try:
        refresh()
    except Exception as error:
        if not failed:
            print(f"The display may be out of date: {error!r}. The work continues.", file=sys.stderr)
        return True
    return failed


class Pump:
    """Delivers clicks that wait in the kernel's queue to their widgets; other messages keep their order.

    It uses private parts of ipykernel (6: `msg_queue`; 7: the pair of sockets to the main thread). If these are missing
    or fail, it does nothing: Interrupt and the file STOP still work.
    """

    held: list[list] = []  # other messages, of all pumps: one may start within a click that another one delivers
    running = 0  # pumps

    def __init__(self) -> None:
        self.kernel: Any = getattr(get_ipython(), "kernel", None)
        Pump.running += threading.current_thread() is threading.main_thread()
        self.error: Exception | None = None
        manager: Any = getattr(getattr(self.kernel, "shell_channel_thread", None), "manager", None)
        self.socket: Any = getattr(getattr(manager, "_shell_channel_to_main", None), "to_socket", None)
        self.reply = manager.get_subshell_to_shell_channel_socket(None) if self.socket else None
        self.queue: Any = None if self.socket else getattr(self.kernel, "msg_queue", None)
        if self.queue is not None:
            self.reply = getattr(self.kernel, "shell_stream", None)

    @property
    def works(self) -> bool:
        """Whether this thread can see clicks."""
        main = threading.current_thread() is threading.main_thread()
        return main and not self.error and (self.socket or self.queue) is not None

    def poll(self) -> None:
        """Deliver the waiting clicks."""
        if not self.works:
            return
        try:
            if self.socket:
                self._poll_socket()
            else:
                self._poll_queue()
        except Exception as error:
            self.error = error

    def _poll_socket(self) -> None:
        with suppress(zmq.Again):
            while True:
                Pump.held.append(self.socket.recv_multipart(zmq.NOBLOCK, copy=False))  # an Interrupt must not lose it
                frames = Pump.held[-1]
                if self._deliver(frames):
                    Pump.held.remove(frames)

    def _poll_queue(self) -> None:
        self.kernel.shell_stream.flush(zmq.POLLIN)
        waiting: list[tuple] = []  # (time, handler, its arguments)
        others: list[tuple] = []
        try:
            while not self.queue.empty():
                waiting.append(self.queue.get_nowait())
            while waiting:
                delivered = self._deliver(waiting[0][2][0])
                others += [] if delivered else waiting[:1]
                del waiting[0]
        finally:
            for item in others + waiting:
                self.queue.put_nowait(item)

    def close(self) -> None:
        """Hand other messages back, in their order."""
        if threading.current_thread() is not threading.main_thread():
            return
        Pump.running -= 1
        messages, Pump.held = (Pump.held, []) if Pump.running == 0 else ([], Pump.held)
        for frames in messages:
            self.kernel.io_loop.add_callback(self.kernel.shell_main, None, frames)

    def _deliver(self, frames: list[Any]) -> bool:
        """Handle a click or a page's question, and return whether it was one; the cell remains the printing cell."""
        kernel, session = self.kernel, self.kernel.session
        identities, parts = session.feed_identities(frames, copy=False)
        kind = session.unpack(parts[1].bytes)["msg_type"]
        if kind not in COMMS + QUESTIONS:
            return False
        message = session.deserialize(parts, content=True, copy=False)
        kernel._publish_status("busy", "shell", parent=message)
        try:
            answer = kernel.shell_handlers[kind](self.reply, identities, message)
            if hasattr(answer, "send"):  # a coroutine that awaits nothing
                with suppress(StopIteration):
                    answer.send(None)
        finally:
            kernel._publish_status("idle", "shell", parent=message)
        return True
