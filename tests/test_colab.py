"""Notebooks and panels on Colab's versions of kernel and widgets: run whole without a screen, and clicked in a browser.

A test of another panel needs a notebook of its own in `pages`, and `colab.opened` and `colab.run_all` to click it.
"""

import shutil
import subprocess

import browser
import colab
import nbformat
import pytest
from nbclient import NotebookClient

DEMO = colab.ROOT / "lorakit" / "demo" / "pictures"
pytestmark = pytest.mark.no_cover
clicked = pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no chromium here: .ci/run installs it")


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Runs a notebook whole on a fresh machine, the checkout beside it; texts in its cells exchanged."""
    machine = colab.machine(tmp_path / "machine")
    folder = tmp_path / "content"
    folder.mkdir()
    (folder / "checkout").symlink_to(colab.ROOT, target_is_directory=True)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)

    def execute(name: str, exchanged: dict[str, str]) -> list:
        notebook = nbformat.read(colab.ROOT / "notebooks" / name, as_version=4)
        for cell in notebook.cells:
            for old, new in exchanged.items():
                cell.source = cell.source.replace(old, new)
        client = NotebookClient(
            notebook, timeout=300, kernel_name="colab", resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
        return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]

    return execute, machine, folder


def told(machine: colab.Machine, code: str, expect: int = 0) -> str:
    done = subprocess.run([machine.python, "-c", code], capture_output=True, text=True, cwd=machine.folder)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


def test_the_machine_is_colabs(tmp_path):
    machine = colab.machine(tmp_path / "machine")
    names = {"IPython": "7.34.0", "ipykernel": "6.17.1", "ipywidgets": "7.7.1", "notebook": "6.5.7",
             "jupyter_client": "7.4.9", "tornado": "6.5.7", "torchao": "0.10.0"}  # fmt: skip
    code = "\n".join(
        ["import importlib, importlib.metadata as m", f"names = {list(names)}",
         "print(*(f'{n}={m.version(n)}' for n in names), importlib.import_module('google.colab').__file__)",
         "import torch, google.protobuf; print('lorakit:', importlib.util.find_spec('lorakit'))"]
    )  # fmt: skip
    said = told(machine, code)
    assert all(f"{name}={version}" in said for name, version in names.items())
    assert str(colab.FAKES) in said and "lorakit: None" in said
    refused = told(machine, "from peft.import_utils import is_torchao_available as there; there()", expect=1)
    assert "incompatible version of torchao" in refused


def test_quickstart_runs_whole_on_a_new_machine(executed):
    """The set-up cell finds the checkout, installs it and takes the torchao away that peft refuses."""
    execute, machine, folder = executed
    outputs = execute("quickstart.ipynb", {"steps = 400": "steps = 20", "seed=seed)": "seed=seed, sample_steps=4)"})
    assert "removed torchao 0.10.0" in str(outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert "'hash': 'verified'" in str(outputs[-1])
    assert next(folder.rglob("flatto.safetensors")).is_file()
    assert not (machine.site / "torchao").exists()


def test_a_dataset_is_prepared_from_end_to_end(executed):
    execute, _, folder = executed
    outputs = execute("prepare_dataset.ipynb", {})
    panels = [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    assert len(panels) == 2 and "flatto" in str(outputs[-1])
    assert len(list(folder.glob("pictures/**/*.png"))) == 30


def test_a_session_that_ended_is_gone_on_with_by_run_all_in_a_new_one(executed):
    """Training is cut, the machine is gone, Drive is there: settings, decisions and steps come from it."""
    execute, _, folder = executed
    content = folder.parent / "machine" / "content"  # WORKSPACE, as /content is on Colab
    shorter = {
        "use_drive = False": "use_drive = True", 'strengths = "0, 0.7, 1"': 'strengths = "1"',
        "name=name, trigger": "name=name, steps=60, save_every=20, sample_steps=2, trigger",
        "validation_share=0.1": 'validation_share=0.1, sample_prompts=("flatto style, pizza",)',
    }  # fmt: skip
    cut = (
        "read = training.curves.read\n"
        "training.curves.read = lambda file, step: step >= 4 and training.live.stop.set() or read(file, step)\n"
        "result = training.train()"
    )
    execute("train_lora.ipynb", shorter | {"result = training.train()": cut})
    run = content / "lorakit" / "runs" / "flatto_v1"
    before = (run / "log.jsonl").read_text()
    assert 4 <= before.count("\n") < 60 and not (run / "flatto_v1.safetensors").exists()
    settings = content / "drive" / "MyDrive" / "lorakit" / "flatto_v1.settings.json"
    assert settings.is_file() and settings.with_name("flatto_v1.decisions.json").is_file()
    shutil.rmtree(content / "lorakit")
    execute("train_lora.ipynb", shorter)
    after = (run / "log.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == 60 and (run / "flatto_v1.safetensors").is_file()
    copies = [path.name for path in settings.parent.rglob("*.safetensors")]
    assert "flatto_v1-step-000060.safetensors" in copies


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Notebook 6 with a notebook for each panel, beside a dataset that may be changed: an address and its folder."""
    folder = tmp_path_factory.mktemp("notebook6")
    shutil.copytree(DEMO, folder / "pictures")
    browser.notebook(
        folder / "pictures.ipynb",
        "from lorakit.widgets.dataset import Pictures\n"
        "chosen = Pictures('pictures', kind='style', resolution=64, trigger='flatto')\nchosen",
        "print('LEFT', len(chosen.dataset))",
        kernel="colab",
    )
    browser.notebook(
        folder / "captions.ipynb",
        "from lorakit import dataset\nfrom lorakit.widgets.captions import Captions\n"
        "panel = Captions(dataset.scan('pictures'), trigger='flatto')\npanel",
        kernel="colab",
    )
    browser.notebook(
        folder / "training.ipynb",
        "from lorakit import demo\nfrom lorakit.widgets.training import Training\n"
        "panel, clicked = Training(demo.config(steps=5000, sample_every=5000, sample_steps=2), 'run'), []\n"
        "panel.stop.on_click(lambda _: clicked.append(panel.live.step))\n"
        "result = panel.train()",
        "print('STEPS-MORE', result.steps - clicked[0])",
        kernel="colab",
    )
    with colab.notebook6(colab.machine(folder / "machine", ready=True), folder) as address:
        yield address, folder


@clicked
def test_a_picture_is_left_out_with_a_click(pages):
    address, _ = pages
    with colab.opened(address.format("pictures.ipynb")) as page:
        colab.run_all(page)
        page.wait_for_selector('.output_area:has-text("LEFT 30")')
        browser.picture(page, "colab-pictures", "#site")
        page.click('button:has-text("leave out") >> nth=0')
        page.click(".code_cell >> nth=1")
        page.keyboard.press("Shift+Enter")
        page.wait_for_selector('.output_area:has-text("LEFT 29")')
        page.select_option('.widget-dropdown:has-text("show") select', label="left out")
        page.wait_for_selector('.widget-html-content:has-text("1–1 of 1")')
        page.click('button:has-text("replace") >> nth=0')
        page.wait_for_selector('input[placeholder="by the file …"]')
        page.set_viewport_size({"width": 640, "height": 1400})
        browser.picture(page, "colab-pictures-narrow", "#site")


@clicked
def test_a_caption_is_edited_saved_and_brought_back(pages):
    address, folder = pages
    file = folder / "pictures" / "10_flatto" / "cookie.txt"
    before = file.read_bytes()
    with colab.opened(address.format("captions.ipynb")) as page:
        colab.run_all(page)
        page.wait_for_selector("#notebook-container .output_area textarea >> nth=0")
        browser.picture(page, "colab-captions", "#site")
        page.fill('input[placeholder="only with this text"]', "cookie")
        page.keyboard.press("Enter")
        page.wait_for_selector('.widget-html-content:has-text("1–1 of 1")')
        page.fill(".output_area textarea >> nth=0", "flatto, a cookie that was clicked")
        page.keyboard.press("Tab")
        page.wait_for_selector('.widget-html-content:has-text("1 edited, not saved yet")')
        page.click('button:has-text("Save")')
        page.wait_for_selector('.widget-html-content:has-text("1 caption saved")')
        assert file.read_text() == "flatto, a cookie that was clicked\n"
        page.click('button:has-text("Undo the last save")')
        page.wait_for_selector('.widget-html-content:has-text("1 caption brought back")')
        assert file.read_bytes() == before
        page.select_option('.widget-dropdown:has-text("edit all") select', label="find and replace")
        page.set_viewport_size({"width": 640, "height": 1400})
        browser.picture(page, "colab-captions-narrow", "#site")


@clicked
def test_a_click_stops_training_within_a_step(pages):
    address, folder = pages
    with colab.opened(address.format("training.ipynb")) as page:
        colab.run_all(page)
        page.wait_for_selector('.widget-html-content:has-text("of 5000")')
        page.wait_for_selector('.widget-html-content:has-text("learning rate")')
        page.click('button:has-text("Sample now")')
        page.wait_for_selector('.widget-html-content:has-text("samples of step") img')
        browser.picture(page, "colab-training", "#site")
        page.click('button:has-text("Stop")')
        said = page.wait_for_selector('.output_area:has-text("STEPS-MORE")').inner_text()
    assert 0 <= int(said.split()[-1]) <= 1
    assert list((folder / "run" / "checkpoints").glob("*.safetensors"))
