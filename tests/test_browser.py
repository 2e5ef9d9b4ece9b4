"""What a person clicks, clicked: the panels in JupyterLab and a real browser, without a screen."""

import json
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
    browser.notebook(
        folder / "training.ipynb",
        "from lorakit import demo\nfrom lorakit.widgets.training import Training\n"
        "config = demo.config(steps=5000, sample_every=5000, sample_steps=4, save_every=1000, validation_share=0.1,\n"
        "                     validate_every=20)\n"
        "panel, clicked = Training(config, 'run'), []\n"
        "panel.stop.on_click(lambda _: clicked.append(panel.live.step))\n"
        "result = panel.train()",
        "print('STEPS-MORE', result.steps - clicked[0])",
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
        page.wait_for_selector('.widget-html-content:has-text("1 caption saved")')
        assert file.read_text() == "flatto, a cookie that was clicked\n"
        page.click('button:has-text("Undo the last save")')
        page.wait_for_selector('.widget-html-content:has-text("1 caption brought back")')
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


def test_training_is_steered_and_a_page_opened_anew_stops_it(lab):
    address, folder = lab
    run = folder / "run"
    with browser.opened(address.format("training.ipynb")) as page:
        browser.run_all(page)
        page.wait_for_selector('.widget-html-content:has-text("of 5000")')
        page.wait_for_selector('.widget-html-content:has-text("overfit dial")')
        page.click('button:has-text("Sample now")')
        page.wait_for_selector('.widget-html-content:has-text("samples of step") img')
        page.click('button:has-text("Save now")')
        page.click("text=Change while it runs")
        page.fill('.widget-text input[type="number"]', "0.0005")
        page.click('button:has-text("Use it")')
        page.wait_for_selector('.widget-html-content:has-text("0.0005 from the next step on")')
        page.wait_for_selector('.widget-html-content:has-text("5.00e-04")')
        browser.picture(page, "training")
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        page.reload()
        page.wait_for_selector('.widget-html-content:has-text("of 5000")')
        before = page.inner_text('.widget-html-content:has-text("of 5000") >> nth=0')
        page.wait_for_function(
            "before => [...document.querySelectorAll('.widget-html-content')].some("
            "each => /step \\d+ of 5000/.test(each.innerText) && each.innerText != before)", arg=before
        )  # fmt: skip
        page.click('button:has-text("Stop")')
        page.wait_for_selector('.widget-html-content:has-text("stopped at step")')
        page.set_viewport_size({"width": 640, "height": 1400})
        browser.picture(page, "training-narrow")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["asked"] for line in log if "asked" in line] == [{"learning_rate": 0.0005}]
    assert len(list((run / "samples").iterdir())) == 1
    # One checkpoint was asked for, one is of the stop: it has the last step that was done.
    saved = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in saved][-1] == f"step-{log[-1]['step']:06d}.safetensors" and len(saved) == 2


def test_a_click_stops_it_within_a_step(lab):
    address, folder = lab
    shutil.rmtree(folder / "run", ignore_errors=True)
    with browser.opened(address.format("training.ipynb")) as page:
        browser.run_all(page)
        page.wait_for_selector('.widget-html-content:has-text("of 5000")')
        page.click('button:has-text("Stop")')
        page.wait_for_selector('.jp-OutputArea-output:has-text("STEPS-MORE")')
        assert page.inner_text('.jp-OutputArea-output:has-text("STEPS-MORE")').strip() in (
            "STEPS-MORE 0",
            "STEPS-MORE 1",
        )
        page.wait_for_selector(".jp-OutputArea-output img")  # the figure, which stays in the notebook
        browser.picture(page, "training-stopped")


def test_quickstart_is_run_whole_in_the_dark(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DEMO.parents[2]))
    notebook = json.loads((DEMO.parents[2] / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        text = (
            "".join(cell["source"])
            .replace("steps = 400", "steps = 12")
            .replace("seed=seed)", "seed=seed, sample_steps=2)")
        )
        cell["source"] = text
    (tmp_path / "quickstart.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    with browser.jupyterlab(tmp_path, dark=True) as address, browser.opened(address.format("quickstart.ipynb")) as page:
        browser.run_all(page)
        page.wait_for_selector(".jp-OutputArea-output:has-text(\"'hash': 'verified'\")")
        assert page.locator(".jp-OutputArea-output img").count() == 4  # pictures, loss, before and after, prompt
        assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
        browser.picture(page, "quickstart-dark")
