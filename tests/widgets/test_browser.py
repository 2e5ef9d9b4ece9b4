"""What a person clicks, clicked: the panels in JupyterLab and a real browser, without a screen."""

import json

import browser
import pytest
from said import names

pytestmark = [
    pytest.mark.host, pytest.mark.no_cover,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no chromium here: .ci/run installs it"),
]  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_bases):
    """JupyterLab with a notebook for each panel, which share kernels: a function that opens one, and its folder."""
    folder = browser.panels(tmp_path_factory.mktemp("lab"), "python3", small_bases["sd15"])
    notebook = json.loads((browser.ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        for old, new in browser.shorter_quickstart(small_bases["sd15"]).items():
            cell["source"] = cell["source"].replace(old, new)
    (folder / "quickstart.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    with browser.jupyterlab(folder) as address, browser.chromium() as context:
        # A page that was opened anew during the training stayed empty where its kernel also had the panels of others.
        browser.session(address, "python3", "pictures.ipynb", "captions.ipynb")
        browser.session(address, "python3", "training.ipynb", "quickstart.ipynb")
        yield lambda name: browser.opened(context, address, name), folder


def test_a_picture_is_left_out_with_a_click(lab, tmp_path):
    opened, _ = lab
    with opened("pictures.ipynb") as page:
        browser.run_all(page)
        page.wait_for_selector("img.widget-image:visible >> nth=0")
        browser.picture(page, "pictures", tmp_path)
        browser.leave_out(page, ".jp-Notebook .jp-Cell >> nth=1")
        page.set_viewport_size({"width": 640, "height": 1400})
        browser.picture(page, "pictures-narrow", tmp_path)


def test_a_caption_is_edited_and_found_in_its_file(lab, tmp_path):
    opened, folder = lab
    with opened("captions.ipynb") as page:
        browser.run_all(page)
        page.wait_for_selector("textarea >> nth=0")
        browser.picture(page, "captions", tmp_path)
        browser.edit_a_caption(page, folder / "pictures" / "10_flatto" / "cookie.txt")
        browser.picture(page, "captions-preview", tmp_path)
        page.set_viewport_size({"width": 640, "height": 1400})
        browser.picture(page, "captions-narrow", tmp_path)


def test_training_is_steered_and_a_page_opened_anew_stops_it(lab, tmp_path):
    """A click stops it within a step; run again it goes on, is steered, and is stopped from a page opened anew."""
    opened, folder = lab
    run, head = folder / "run", ".widget-html-content >> nth=0"

    def log() -> list[dict]:
        return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]

    try:
        with opened("training.ipynb") as page:
            browser.run_all(page)
            browser.stop_at_once(page)
            page.wait_for_selector(".jp-OutputArea-output img")  # the figure, which stays in the notebook
            browser.picture(page, "training-stopped", tmp_path)
            stopped = log()[-1]["step"]
            browser.run_all(page)
            browser.until(page, lambda: log()[-1]["step"] > stopped)
            browser.sample_now(page)
            browser.until(page, lambda: any("validation_loss" in line for line in log()[stopped:]))
            losses = [f"{line['validation_loss']:.4f}" for line in log() if "validation_loss" in line]
            page.wait_for_function(
                "losses => losses.some(loss => document.querySelector('.jp-Notebook').innerText.includes(loss))",
                arg=losses[-1:] + losses[:-1],
            )
            page.click('button:has-text("Save now")')
            page.click("text=Change while it runs")
            page.fill('.widget-text input[type="number"]', "0.0005")
            page.click('button:has-text("Use it")')
            page.wait_for_selector('.widget-html-content:has-text("5.00e-04")')
            browser.picture(page, "training", tmp_path)
            page.keyboard.press("Control+s")
            page.wait_for_timeout(1000)
            page.reload()
            page.wait_for_selector(".widget-html-content svg")
            before = page.inner_text(head)
            assert names(before, 5000)
            browser.until(page, lambda: page.inner_text(head) != before)
            assert (run / "config.json").is_file() and log()[-1]["step"] < 5000
            page.click(browser.STOP)
            page.wait_for_selector(f"{browser.STOP}[disabled]")
            ended = log()[-1]["step"]
            assert names(page.inner_text(head), ended, 5000)
            page.set_viewport_size({"width": 640, "height": 1400})
            browser.picture(page, "training-narrow", tmp_path)
    finally:
        if run.is_dir():
            (run / "STOP").touch()  # the kernel is not kept from the next test
    assert [line["asked"] for line in log() if "asked" in line] == [{"learning_rate": 0.0005}]
    assert len(list((run / "samples").iterdir())) == 1
    assert list((run / "checkpoints").glob(f"step-*{ended}.safetensors"))


def test_quickstart_is_run_whole_in_the_dark(lab, tmp_path):
    opened, folder = lab
    with browser.darkened(folder), opened("quickstart.ipynb") as page:
        browser.run_all(page)
        page.wait_for_selector(".jp-OutputArea-output:has-text(\"'hash': 'verified'\")")
        image = '.jp-OutputArea-output img[src^="data:image/{}"]'
        assert page.locator(image.format("png")).count() == 3  # loss, before and after, prompt
        assert page.locator(image.format("jpeg")).count() > 20  # the pictures
        assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
        browser.picture(page, "quickstart-dark", tmp_path)
