"""What a person clicks, clicked: the panels in JupyterLab and a real browser, without a screen."""

import shutil
from pathlib import Path

import browser
import pytest

DEMO = Path(__file__).parent.parent / "lorakit" / "demo" / "pictures"
pytestmark = [
    pytest.mark.no_cover,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no chromium here: .ci/run installs it"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Notebooks beside a dataset that may be changed: an address and its folder."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(DEMO, folder / "pictures")
    browser.notebook(
        folder / "pictures.ipynb",
        "from lorakit.widgets.dataset import Pictures\n"
        "chosen = Pictures('pictures', kind='style', resolution=64, trigger='flatto')\nchosen",
        "print('LEFT', len(chosen.dataset))",
    )
    browser.notebook(
        folder / "captions.ipynb",
        "from lorakit import dataset\nfrom lorakit.widgets.captions import Captions\n"
        "panel = Captions(dataset.scan('pictures'), trigger='flatto')\npanel",
    )
    with browser.jupyterlab(folder) as address:
        yield address, folder


def test_a_picture_is_left_out_with_a_click(lab):
    address, _ = lab
    with browser.opened(address.format("pictures.ipynb")) as page:
        browser.run_all(page)
        page.wait_for_selector('.jp-OutputArea-output:has-text("LEFT 30")')
        browser.picture(page, "pictures")
        page.click('button:has-text("leave out") >> nth=0')
        page.click(".jp-Notebook .jp-Cell >> nth=1")
        page.keyboard.press("Shift+Enter")
        page.wait_for_selector('.jp-OutputArea-output:has-text("LEFT 29")')
        page.select_option('.widget-dropdown:has-text("show") select', label="left out")
        page.wait_for_selector('.widget-html-content:has-text("1–1 of 1")')
        page.set_viewport_size({"width": 640, "height": 1400})
        browser.picture(page, "pictures-narrow")


def test_a_caption_is_edited_and_found_in_its_file(lab):
    address, folder = lab
    file = folder / "pictures" / "10_flatto" / "cookie.txt"
    before = file.read_bytes()
    with browser.opened(address.format("captions.ipynb")) as page:
        browser.run_all(page)
        page.wait_for_selector("textarea >> nth=0")
        browser.picture(page, "captions")
        page.fill('input[placeholder="only with this text"]', "cookie")
        page.keyboard.press("Enter")
        page.wait_for_selector('.widget-html-content:has-text("1–1 of 1")')
        page.fill("textarea >> nth=0", "flatto, a cookie that was clicked")
        page.keyboard.press("Tab")
        page.wait_for_selector('.widget-html-content:has-text("1 edited, not saved yet")')
        page.click('button:has-text("Save")')
        page.wait_for_selector('.widget-html-content:has-text("1 captions saved")')
        assert file.read_text() == "flatto, a cookie that was clicked\n"
        page.click('button:has-text("Undo the last save")')
        page.wait_for_selector('.widget-html-content:has-text("as they were")')
        assert file.read_bytes() == before
        page.fill('input[placeholder="only with this text"]', "")
        page.keyboard.press("Enter")
        page.select_option('.widget-dropdown:has-text("edit all") select', label="add tags at the end")
        page.fill('input[placeholder="tag, tag"]', "flat colours")
        page.click('button:has-text("Preview")')
        page.wait_for_selector('.widget-html-content:has-text("30 captions would change")')
        browser.picture(page, "captions-preview")
        page.set_viewport_size({"width": 640, "height": 1400})
        browser.picture(page, "captions-narrow")
