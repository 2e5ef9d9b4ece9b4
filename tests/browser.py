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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import nbformat

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
# Without these it asks the network for updates.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]  # fmt: skip
ARTEFACTS = Path(__file__).parent.parent / "artefacts"
SLOW = 120_000  # milliseconds: two busy cores


@contextmanager
def jupyterlab(folder: Path, dark: bool = False) -> Iterator[str]:
    """A server of the notebooks in a folder; yields the address of its files.

    Args:
        dark: show JupyterLab's dark theme.
    """
    command = [
        sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", "--port={port}",
        "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    news = folder / ".jupyter" / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # else a question lies over the page
    if dark:
        news.with_name("themes.jupyterlab-settings").write_text('{"theme": "JupyterLab Dark"}')
    with served(folder, command) as address:
        yield f"{address}/lab/tree/{{}}?token=t&reset"


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
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "data",
              "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
              "IPYTHONDIR": "ipython"}  # fmt: skip
    with (own / "log").open("w") as log:
        variables = os.environ | {name: str(own / place) for name, place in places.items()} | environment
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
        server.terminate()
        server.wait(20)


def notebook(path: Path, *cells: str, kernel: str = "python3") -> Path:
    """Write a notebook of code cells."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata["kernelspec"] = {"name": kernel, "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


@contextmanager
def browsed(address: str, width: int, height: int) -> Iterator:
    """A page in a browser: yields playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=OPTIONS)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(SLOW)
        page.goto(address)
        yield page
        browser.close()


@contextmanager
def opened(address: str, width: int = 1200, height: int = 1600) -> Iterator:
    """A notebook in a browser, its kernel ready: yields playwright's page."""
    with browsed(address, width, height) as page:
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        # Run All before the kernel is idle opens a dialog that asks for one.
        ready = "/\\| Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText || '')"
        page.wait_for_function(ready)
        yield page


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
