"""Notebooks and panels on Colab's versions of kernel and widgets: run whole without a screen, and clicked in a browser.

A test of another panel needs a notebook of its own in `browser.PANELS`.
"""

import os
import shutil
import subprocess
from pathlib import Path

import browser
import colab
import nbformat
import pytest
from nbclient import NotebookClient
from said import names, naming

pytestmark = [pytest.mark.host, pytest.mark.no_cover]
clicked = pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no chromium here: .ci/run installs it")
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> colab.Machine:
    """A machine after the set-up, which tests leave as it is."""
    return colab.machine(tmp_path_factory.mktemp("ready") / "machine", ready=True)


@pytest.fixture
def content(tmp_path) -> Path:
    """What /content is on Colab: of this test alone."""
    folder = tmp_path / "content"
    folder.mkdir()
    return folder


@pytest.fixture
def executed(tmp_path, content, monkeypatch):
    """Runs notebooks whole in one new kernel of a machine, in `content`; texts in their cells exchanged.

    Returns each code cell's outputs.
    """
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def execute(machine: colab.Machine, exchanged: dict[str, str], *notebooks: str) -> list[list]:
        for name, value in (browser.at_home(tmp_path / "home") | machine.environment).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WORKSPACE", str(content))
        whole = nbformat.v4.new_notebook()
        for name in notebooks:
            whole.cells += nbformat.read(colab.ROOT / "notebooks" / name, as_version=4).cells
        for cell in whole.cells:
            for old, new in exchanged.items():
                cell.source = cell.source.replace(old, new)
        place = {"metadata": {"path": str(content)}}
        NotebookClient(whole, timeout=300, kernel_name="colab", resources=place).execute()
        return [cell.outputs for cell in whole.cells if cell.cell_type == "code"]

    return execute


def kinds(cells: list[list], kind: str) -> int:
    """How many outputs have data of a kind."""
    return sum(kind in output.get("data", {}) for outputs in cells for output in outputs)


def test_the_machine_is_colabs(tmp_path, monkeypatch):
    """Its versions come first, all else from here, but not lorakit; and peft refuses its torchao."""
    machine = colab.machine(tmp_path / "machine")
    versions = {"IPython": "7.34.0", "ipykernel": "6.17.1", "ipywidgets": "7.7.1", "notebook": "6.5.7",
                "jupyter_client": "7.4.9", "tornado": "6.5.7", "torchao": "0.10.0"}  # fmt: skip
    code = "\n".join(
        ["import importlib, importlib.metadata as m", f"names = {list(versions)}",
         "print(*(f'{n}={m.version(n)}' for n in names), importlib.import_module('google.colab').__file__)",
         "import google.protobuf; print(*(n for n in ('lorakit', 'torch') if importlib.util.find_spec(n)))"]
    )  # fmt: skip
    environment = os.environ | browser.at_home(tmp_path / "home")
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [machine.python, "-c", code], capture_output=True, text=True, cwd=machine.folder, env=environment
    )
    assert all(f"{name}={version}" in done.stdout for name, version in versions.items()), done.stderr
    assert str(colab.FAKES) in done.stdout and done.stdout.splitlines()[-1] == "torch"
    from peft.import_utils import is_torchao_available

    monkeypatch.syspath_prepend(machine.site)
    is_torchao_available.cache_clear()
    with pytest.raises(ImportError, match=naming("0.10.0")):  # peft's
        is_torchao_available()
    is_torchao_available.cache_clear()


def test_quickstart_runs_whole_on_a_new_machine(executed, tmp_path, content, small_bases):
    """The set-up cell finds the checkout, installs it and takes the torchao away that peft refuses."""
    machine = colab.machine(tmp_path / "machine")
    (content / "checkout").symlink_to(colab.ROOT, target_is_directory=True)
    cells = executed(machine, browser.shorter_quickstart(small_bases["sd15"]), "quickstart.ipynb")
    assert names(str(cells[0]), "torchao 0.10.0") and not (machine.site / "torchao").exists()
    assert kinds(cells, "image/png") == 3  # loss, before/after, prompt
    assert "'hash': 'verified'" in cells[-1][-1]["data"]["text/plain"]
    assert next(content.rglob("flatto.safetensors")).is_file()
    assert (machine.site / "lorakit" / "__init__.py").is_file()


def test_a_session_that_ended_is_gone_on_with_by_run_all_in_a_new_one(executed, ready, content, small_bases):
    """Pictures are prepared and a run is compared; training is cut, the machine is gone, Drive is there: settings,
    decisions and steps come from it."""
    compared = f"base={str(small_bases['sd15'])!r}, resolution=32, bucket_step=8, steps=2, save_every=1"
    shorter = {
        "steps=100, batch_size=2, save_every=50": compared, "validate_every=50": "validate_every=1",  # of the compared
        "use_drive = False": "use_drive = True", 'strengths = "0, 0.7, 1"': 'strengths = "1"',
        "name=name, trigger": "name=name, steps=6, batch_size=1, save_every=2, sample_steps=1, trigger",
        "validation_share=0.1": 'validation_share=0.04, sample_prompts=("flatto style, pizza",)',
    }  # fmt: skip
    cut = "training.control.stop.is_set = lambda: training.control.step >= 3\nresult = training.train()"
    notebooks = ("prepare_dataset.ipynb", "compare_and_export.ipynb", "train_lora.ipynb")
    cells = executed(ready, shorter | {"result = training.train()": cut}, *notebooks)
    panels = [number for number, outputs in enumerate(cells) if kinds([outputs], WIDGET)]  # bars of progress are some
    assert {2, 4} <= {*panels}  # pictures, captions
    assert names(str(cells[5]), "flatto")  # the audit
    assert len(list(content.glob("pictures/**/*.png"))) == 30
    assert {8, 10} <= {*panels}  # comparison, proof
    exports = [path.name for path in (content / "lorakit" / "exports").iterdir()]
    assert [name for name in exports if name in [f"flatto-step-00000{n}.safetensors" for n in (1, 2)]]
    run = content / "lorakit" / "runs" / "flatto_v1"
    before = (run / "log.jsonl").read_text()
    assert 3 <= before.count("\n") < 6 and not (run / "flatto_v1.safetensors").exists()
    settings = content / "drive" / "MyDrive" / "lorakit" / "flatto_v1.settings.json"
    assert settings.is_file() and settings.with_name("flatto_v1.decisions.json").is_file()

    shutil.rmtree(content / "lorakit")
    cells = executed(ready, shorter, "train_lora.ipynb")
    after = (run / "log.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == 6 and (run / "flatto_v1.safetensors").is_file()
    copies = [path.name for path in settings.parent.rglob("*.safetensors")]
    assert "flatto_v1-step-000006.safetensors" in copies
    assert kinds(cells, WIDGET) == 6  # pictures, captions, settings, training, comparison, proof


@pytest.fixture(scope="module")
def pages(tmp_path_factory, ready, small_bases):
    """Notebook 6 with a notebook for each panel, which share a kernel: a function that opens one, and its folder."""
    folder = browser.panels(tmp_path_factory.mktemp("notebook6"), "colab", small_bases["sd15"])
    with colab.notebook6(ready, folder) as address, browser.chromium() as context:
        browser.session(address, "colab", *browser.PANELS)
        yield lambda name: colab.opened(context, address, name), folder


@clicked
def test_a_picture_is_left_out_with_a_click(pages, tmp_path):
    opened, _ = pages
    with opened("pictures.ipynb") as page:
        colab.run_all(page)
        browser.leave_out(page, ".code_cell >> nth=1")
        page.click('button:has-text("replace") >> nth=0')
        page.wait_for_selector('input[placeholder="by the file …"]')
        browser.picture(page, "colab-pictures", tmp_path, "#site")
        page.set_viewport_size({"width": 640, "height": 1400})
        browser.picture(page, "colab-pictures-narrow", tmp_path, "#site")


@clicked
def test_a_caption_is_edited_saved_and_brought_back(pages, tmp_path):
    opened, folder = pages
    with opened("captions.ipynb") as page:
        colab.run_all(page)
        browser.edit_a_caption(page, folder / "pictures" / "10_flatto" / "cookie.txt")
        browser.picture(page, "colab-captions", tmp_path, "#site")
        page.set_viewport_size({"width": 640, "height": 1400})
        browser.picture(page, "colab-captions-narrow", tmp_path, "#site")


@clicked
def test_a_click_stops_training_within_a_step(pages, tmp_path):
    opened, folder = pages
    try:
        with opened("training.ipynb") as page:
            colab.run_all(page)
            browser.sample_now(page)
            browser.picture(page, "colab-training", tmp_path, "#site")
            browser.stop_at_once(page)
    finally:
        if (folder / "run").is_dir():
            (folder / "run" / "STOP").touch()  # the kernel is not kept from the next test
    assert list((folder / "run" / "checkpoints").glob("*.safetensors"))
