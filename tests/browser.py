"""JupyterLab in a headless browser, for tests that click what a person clicks.

Debian's chromium (or $CHROMIUM), driven by playwright; nothing is fetched. Screenshots go to artefacts/.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
# Without these it asks the network for updates.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]  # fmt: skip
ARTEFACTS = Path(__file__).parent.parent / "artefacts"
SLOW = 120_000  # milliseconds: two busy cores


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """A server of the notebooks in a folder; yields the address of its files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = folder / ".jupyter"
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "data",
              "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
              "IPYTHONDIR": "ipython"}  # fmt: skip
    command = [
        sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    own.mkdir()
    news = own / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # else a question lies over the page
    with (own / "log").open("w") as log:
        environment = os.environ | {name: str(own / place) for name, place in places.items()}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            assert server.poll() is None, (own / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token=t")
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token=t&reset"
    finally:
        server.terminate()
        server.wait(20)


def notebook(path: Path, *cells: str) -> Path:
    """Write a notebook of code cells."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


@contextmanager
def opened(address: str, width: int = 1200, height: int = 1600) -> Iterator:
    """A notebook in a browser, its kernel ready: yields playwright's page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=OPTIONS)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(SLOW)
        page.goto(address)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        # Run All before the kernel is idle opens a dialog that asks for one.
        ready = "/\\| Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText || '')"
        page.wait_for_function(ready)
        yield page
        browser.close()


def run_all(page) -> None:
    page.click(".jp-Notebook .jp-Cell >> nth=0")
    page.click("text=Run >> nth=0")
    page.click('li[data-command="runmenu:run-all"] >> nth=0')


def picture(page, name: str, selector: str = ".jp-Notebook") -> Path:
    """A screenshot of what a selector finds, kept to be looked at."""
    ARTEFACTS.mkdir(exist_ok=True)
    path = ARTEFACTS / f"{name}.png"
    page.locator(selector).first.screenshot(path=path)
    return path
