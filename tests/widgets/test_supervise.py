"""Clicks while a cell works, in a real kernel, as a page sends them."""

import gc
import sys
import threading
import time
import weakref
from queue import Empty

import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec

from lorakit.widgets import supervise

CELL = """
import threading, time
import ipywidgets
from lorakit.widgets import supervise
stop, clicks, seen = threading.Event(), [], []
button = ipywidgets.Button()
button.on_click(lambda _: (clicks.append(len(seen)), len(clicks) == 2 and stop.set()))
def work():
    return stop.wait(60) and 'made'
{}
"""


def kernel(python: str = sys.executable, **environment):
    """A started kernel of a Python, and its client."""
    manager = KernelManager()
    manager._kernel_spec = KernelSpec(argv=[python, "-m", "ipykernel_launcher", "-f", "{connection_file}"])
    manager.start_kernel(**environment)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    return manager, client


@pytest.fixture(scope="module")
def answered() -> tuple[str, list[str]]:
    """What the cells of `clicked` printed in a real kernel, and the kernel's replies in their order."""
    manager, client = kernel()
    call = (
        "print('begun', flush=True)\nprint(supervise.supervise(work, lambda: seen.append(1), stop), clicks, flush=True)"
    )
    try:
        text, replies = "".join(clicked(client, call)), []
        while replies.count("execute_reply") < 2 or "comm_info_reply" not in replies:
            replies.append(client.get_shell_msg(timeout=60)["msg_type"])
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return text, replies


def until(client, wanted, seconds=60):
    """Messages of the kernel up to the first that is wanted."""
    found, ends = [], time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            found.append(client.get_iopub_msg(timeout=1))
        except Empty:
            continue
        if wanted(found[-1]):
            return found
    raise AssertionError([message["content"] for message in found])


def printed(text):
    return lambda message: message["msg_type"] == "stream" and text in message["content"]["text"]


def click(client, comm: str) -> None:
    content = {"comm_id": comm, "data": {"method": "custom", "content": {"event": "click"}}}
    client.shell_channel.send(client.session.msg("comm_msg", content))


def clicked(client, call: str) -> list[str]:
    """What is printed by a cell that begins with `call`, whose button is clicked twice, and by a cell behind it."""
    client.execute(CELL.format(call))
    opened = until(client, lambda m: m["msg_type"] == "comm_open" and "ButtonModel" in str(m["content"]["data"]))
    client.execute("print('next cell', len(clicks))")  # waits its turn, in front of the clicks
    until(client, printed("begun"))
    client.shell_channel.send(client.session.msg("comm_info_request", {"target_name": "jupyter.widget"}))
    for _ in range(2):
        click(client, opened[-1]["content"]["comm_id"])
    said = until(client, printed("next cell"))
    return [message["content"]["text"] for message in said if message["msg_type"] == "stream"]


def test_clicks_are_answered_in_the_midst_of_a_cell_and_the_next_cell_keeps_its_place(answered):
    text, _ = answered
    assert "made [" in text and text.index("made") < text.index("next cell 2")


def test_a_page_that_is_opened_anew_is_answered(answered):
    _, replies = answered
    wanted = [kind for kind in replies if kind != "kernel_info_reply"]  # of waiting for the kernel
    assert wanted == ["comm_info_reply", "execute_reply", "execute_reply"]  # within the first cell


# ── Without a kernel ────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_the_work_returns_and_raises_comes_back():
    seen, stop = [], threading.Event()
    assert supervise.supervise(lambda: time.sleep(0.3) or 5, lambda: seen.append(1), stop) == 5
    assert len(seen) >= 2
    with pytest.raises(ZeroDivisionError):
        supervise.supervise(lambda: 1 / 0, lambda: None, stop)


def test_a_drawing_that_fails_ends_no_work(capsys):
    done = []

    def refresh():
        raise RuntimeError("no room to draw")

    assert supervise.supervise(lambda: time.sleep(0.3) or done.append(1) or 7, refresh, threading.Event()) == 7
    assert done == [1] and capsys.readouterr().err.count("no room to draw") == 1


def test_what_failed_holds_on_to_nothing():
    class Model:
        pass

    seen = []

    def work():
        model = Model()
        seen.append(weakref.ref(model))
        raise RuntimeError("the card is full")

    with pytest.raises(RuntimeError, match="the card is full") as caught:
        supervise.supervise(work, lambda: None, threading.Event())
    gc.collect()
    assert caught.value and seen[0]() is None


def test_an_interrupt_sets_stop_and_the_third_one_leaves():
    stop, times = threading.Event(), []

    def refresh():
        times.append(1)
        if len(times) <= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise.supervise(lambda: time.sleep(2), refresh, stop)
    assert stop.is_set() and len(times) == 3
    stop.clear()
    times[:] = [1, 1]  # one interrupt alone
    assert supervise.supervise(lambda: stop.wait(30), refresh, stop) is True


def test_a_callback_off_the_main_thread_returns_at_once():
    outcomes, stop = [], threading.Event()
    caller = threading.Thread(target=lambda: supervise.react(lambda: stop.wait(30), outcomes.append, stop))
    caller.start()
    caller.join(5)
    assert not caller.is_alive() and not stop.is_set()
    stop.set()
    while not outcomes or outcomes[-1] is None:
        time.sleep(0.05)
    assert outcomes[-1].result() is True
