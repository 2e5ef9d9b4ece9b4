"""JupyterLab in a headless browser, for tests that click what a person clicks.

Debian's chromium (or $CHROMIUM), driven by playwright; nothing is fetched. Screenshots go to the folder that
LORAKIT_SCREENSHOTS names, else to the test's own. All that servers and browsers write is below a folder of the test.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import nbformat
import pytest
from said import names

ROOT = Path(__file__).parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
# Without these it asks the network for updates.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]  # fmt: skip
SLOW = 120_000  # milliseconds: two busy cores


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """A server of the notebooks in a folder; yields its address."""
    command = [
        sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", "--port={port}",
        "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    settings = _lab_settings(folder)
    settings.mkdir(parents=True)
    news = '{"fetchNews": "false", "checkForUpdates": false}'  # else a question lies over the page
    (settings / "notification.jupyterlab-settings").write_text(news)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with served(folder, command, {"PYTHONPATH": paths}) as address:
        yield address


def _lab_settings(folder: Path) -> Path:
    return folder / ".jupyter" / "settings" / "@jupyterlab" / "apputils-extension"


@contextmanager
def darkened(folder: Path) -> Iterator[None]:
    """Pages of that folder's JupyterLab that are opened meanwhile have its dark theme."""
    theme = _lab_settings(folder) / "themes.jupyterlab-settings"
    theme.write_text('{"theme": "JupyterLab Dark"}')
    try:
        yield
    finally:
        theme.unlink()


@contextmanager
def served(folder: Path, command: list[str], environment: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
    """A Jupyter server with settings of its own, ready; yields its address.

    Args:
        folder: its settings go into a folder of it.
        command: with {port} for the port, and "t" as the token.
        environment: what it gets besides this process's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = folder / ".jupyter"
    own.mkdir(exist_ok=True)
    with (own / "log").open("w") as log:
        variables = os.environ | at_home(own) | environment
        command = [word.replace("{port}", str(port)) for word in command]
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            assert server.poll() is None, (own / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token=t")
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()  # its kernels end with it
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()  # kernels whose server is gone end by themselves
            server.wait()


def at_home(folder: Path) -> dict[str, str]:
    """Variables with which Jupyter, IPython, matplotlib, fontconfig and chromium write below a folder, not at home."""
    places = {"HOME": "", "TMPDIR": "tmp", "XDG_CONFIG_HOME": "config",
              "XDG_DATA_HOME": "data", "XDG_RUNTIME_DIR": "run", "IPYTHONDIR": "ipython",
              "JUPYTER_CONFIG_DIR": "jupyter", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "jupyter-data",
              "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}  # fmt: skip
    for place in places.values():
        (folder / place).mkdir(parents=True, exist_ok=True)
    return {name: str(folder / place) for name, place in places.items()}


def session(address: str, kernel: str, *notebooks: str) -> None:
    """Start a kernel that notebooks of a server share: a page that opens one finds it there."""
    about: dict = {"name": kernel}
    for path in notebooks:
        asked = {"path": path, "name": path, "type": "notebook", "kernel": about}
        about = {"id": _asked(f"{address}/api/sessions?token=t", asked)["kernel"]["id"]}


def _asked(address: str, content: dict) -> dict:
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def notebook(path: Path, *cells: str, kernel: str = "python3") -> Path:
    """Write a notebook of code cells."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata["kernelspec"] = {"name": kernel, "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


@contextmanager
def chromium() -> Iterator:
    """A browser, for any number of pages one after the other: yields playwright's context."""
    from playwright.sync_api import sync_playwright

    # A folder of its own, not pytest's: chromium has a socket there, whose path is to be short.
    with tempfile.TemporaryDirectory(prefix="lorakit-", ignore_cleanup_errors=True) as folder:
        home = at_home(Path(folder))
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("TMPDIR", home["TMPDIR"])  # of playwright's driver, where profiles are
            playwright = sync_playwright().start()
        how = {"executable_path": CHROMIUM, "headless": True, "args": OPTIONS, "env": os.environ | home}
        try:
            with playwright.chromium.launch(**how) as launched:
                yield launched.new_context()  # one, so that programs of pages are compiled once
        finally:
            playwright.stop()


@contextmanager
def browsed(context, address: str) -> Iterator:
    """A page in a browser, closed at the end: yields playwright's."""
    with context.new_page() as page:
        page.set_viewport_size({"width": 1200, "height": 1600})
        page.set_default_timeout(SLOW)
        page.goto(address)
        yield page


@contextmanager
def opened(context, address: str, name: str) -> Iterator:
    """A notebook of a JupyterLab in a browser, its kernel ready: yields playwright's page."""
    with browsed(context, f"{address}/lab/tree/{name}?token=t&reset") as page:
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        # Run All before the kernel is idle opens a dialog that asks for one.
        ready = "/\\| Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText || '')"
        page.wait_for_function(ready)
        yield page


def run_all(page) -> None:
    page.click(".jp-Notebook .jp-Cell >> nth=0")
    page.click("text=Run >> nth=0")
    page.click('li[data-command="runmenu:run-all"] >> nth=0')


def picture(page, name: str, folder: Path, selector: str = ".jp-Notebook") -> Path:
    """A screenshot of what a selector finds, to be looked at.

    Args:
        folder: for it, unless LORAKIT_SCREENSHOTS names another.
    """
    path = Path(os.environ.get("LORAKIT_SCREENSHOTS") or folder, f"{name}.png")
    page.locator(selector).first.screenshot(path=path)
    return path


# ── Panels, the same on every page; labels that are clicked stand here once ─────────────────────────────────────────

PANELS = {  # notebook → its cells, beside a folder `pictures` with the demo's and a `base`
    "pictures.ipynb": [
        "from lorakit.widgets.dataset import Pictures\n"
        "chosen = Pictures('pictures', kind='style', resolution=64, trigger='flatto')\nchosen",
        "print('LEFT', len(chosen.dataset))",
    ],
    "captions.ipynb": [
        "from lorakit import dataset\nfrom lorakit.widgets.captions import Captions\n"
        "panel = Captions(dataset.scan('pictures'), trigger='flatto')\npanel",
    ],
    "training.ipynb": [
        "import slow\nfrom lorakit import demo\nfrom lorakit.widgets.training import Training\n"
        "config = demo.config(base='base', resolution=32, bucket_step=8, steps=5000, batch_size=1, sample_every=5000,\n"
        "                     sample_steps=2, save_every=1000, validation_share=0.04, validate_every=5)\n"
        "panel, clicked = Training(config, 'run'), []\n"
        "panel.stop.on_click(lambda _: clicked.append(panel.control.step))\n"
        "result = panel.train()",
        "print('STEPS-MORE', result.steps - clicked[0])",
    ],
}
SLOW_STEPS = """
import time
from lorakit import run

train = run.Run.train
run.Run.train = lambda self: train(self, lambda step: time.sleep(0.2))  # leaves the processor to others
"""
STOP = 'button:has-text("Stop")'


def shorter_quickstart(base: Path) -> dict[str, str]:
    """What is exchanged in quickstart.ipynb: few steps on a small base."""
    smaller = f"demo.config(base={str(base)!r}, resolution=32, bucket_step=8, sample_steps=1)"
    return {"demo.config()": smaller, "steps = 400": "steps = 2"}


def panels(folder: Path, kernel: str, base: Path) -> Path:
    """A folder with the notebooks of PANELS, pictures that may be changed, and a small base."""
    (folder / "base").symlink_to(base)
    shutil.copytree(ROOT / "lorakit" / "demo" / "pictures", folder / "pictures")
    (folder / "slow.py").write_text(SLOW_STEPS)
    for name, cells in PANELS.items():
        notebook(folder / name, *cells, kernel=kernel)
    return folder


def until(page, condition: Callable[[], object]) -> None:
    """Wait for something outside the page."""
    for _ in range(SLOW // 100):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it did not come about")


def shows(page, selector: str, number: int) -> None:
    """Wait until so many of something are to be seen."""
    seen = "[...document.querySelectorAll(selector)].filter(e => e.offsetParent).length"
    page.wait_for_function(f"([selector, number]) => {seen} == number", arg=[selector, number])


def leave_out(page, second_cell: str) -> None:
    """In pictures.ipynb, which was run: leave a picture out, run the second cell again, and find the picture."""
    page.wait_for_selector('pre:has-text("LEFT 30")')
    page.click('button:has-text("leave out") >> nth=0')
    page.click(second_cell)
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector('pre:has-text("LEFT 29")')
    page.select_option('.widget-dropdown:has-text("show") select', label="left out")
    shows(page, "img.widget-image", 1)


def edit_a_caption(page, file: Path) -> None:
    """In captions.ipynb, which was run: find a caption, write and save another, take that back; preview an edit."""
    before, boxes = file.read_bytes(), ".widget-textarea textarea"
    page.wait_for_selector(f"{boxes} >> nth=0")
    search = 'input[placeholder="only with this text"]'
    page.fill(search, file.stem)
    page.keyboard.press("Enter")
    shows(page, boxes, 1)
    page.fill(boxes, "flatto, a caption that was clicked")
    page.keyboard.press("Tab")
    assert file.read_bytes() == before  # not saved yet
    page.click('button:has-text("Save")')
    until(page, lambda: file.read_text() == "flatto, a caption that was clicked\n")
    page.click('button:has-text("Undo the last save")')
    until(page, lambda: file.read_bytes() == before)
    page.fill(search, "")
    page.keyboard.press("Enter")
    page.select_option('.widget-dropdown:has-text("edit all") select', label="add tags at the end")
    page.fill('input[placeholder="tag, tag"]', "flat colours")
    page.click('button:has-text("Preview")')
    preview = page.wait_for_selector('.widget-html-content:has-text("flat colours")')
    assert names(preview.inner_text(), 30)
    assert file.read_bytes() == before


def sample_now(page) -> None:
    """In training.ipynb, whose run goes on: ask for samples, and see them."""
    page.wait_for_selector(".widget-html-content svg")  # the loss
    page.click('button:has-text("Sample now")')
    page.wait_for_selector(".widget-html-content figure img")


def stop_at_once(page) -> None:
    """In training.ipynb, whose run goes on: the run ends within a step of the click, and Run all goes on."""
    page.wait_for_selector(".widget-html-content svg")
    page.click(STOP)
    printed = "[...document.querySelectorAll('pre')].map(e => /STEPS-MORE (-?\\d+)/.exec(e.textContent))"
    assert page.wait_for_function(f"({printed}.find(found => found) || [])[1]").json_value() in ("0", "1")
