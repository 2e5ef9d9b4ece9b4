"""Small stand-ins for hub models: the real classes of diffusers and transformers with few, random weights."""

import gc
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

try:
    import torch
except ModuleNotFoundError:  # the Pythons that only have what needs no torch
    torch = None

# One thread: models are so small that a second one waits more than it computes, and more still beside other processes.
# The commands that tests call read the variable.
os.environ["OMP_NUM_THREADS"] = "1"
if torch:
    torch.set_num_threads(1)
# What comes with torch, or is not asked for without it.
WITH_TORCH = {"torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tensorboard"}


# What lorakit and other libraries keep for their user is kept for one session of tests, for all of its processes.
OWN = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    OWN = tempfile.TemporaryDirectory(prefix="lorakit-tests-")
    names = {"LORAKIT_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"}
    for name in names | {"MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"}:
        os.environ[name] = str(Path(OWN.name, name.lower()))
        Path(os.environ[name]).mkdir()


def pytest_unconfigure() -> None:
    if OWN:
        OWN.cleanup()


def pytest_addoption(parser) -> None:
    parser.addoption("--all", action="store_true", help="also what needs a browser, another Python or many minutes")


def pytest_collection_modifyitems(config, items) -> None:
    """Leave out tests marked `host` unless --all asks for them, or their file is named."""
    named = {Path(argument.partition("::")[0]).name for argument in config.args}
    out = [] if config.getoption("--all") else [i for i in items if i.get_closest_marker("host")]
    out = [item for item in out if item.path.name not in named]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Without torch, a file that imports it is skipped."""
    report = yield
    if torch is None and report.failed:
        missing = [name for name in WITH_TORCH if f"No module named '{name}'" in str(report.longrepr)]
        if missing:
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {missing[0]}")
    return report


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_imported():
    if torch:
        import diffusers  # noqa: F401
        import peft  # noqa: F401
        import transformers  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def _nothing_to_collect_in_libraries(_libraries_are_imported):
    """Looking through their half million objects takes a third of a second, and every run collects several times."""
    gc.collect()
    gc.freeze()


TOKENIZER = Path(__file__).parent.parent / "lorakit" / "demo" / "base" / "tokenizer"


def copy_tokenizer(folder: Path) -> None:
    """The embedded base's words with the real families' length of 77 tokens."""
    shutil.copytree(TOKENIZER, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 77}))


def write_base(folder: Path, family: str = "sd15", prediction_type: str = "epsilon") -> Path:
    """A diffusers folder of a family's form: 32×32 px, 8×8 latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)  # as in the real families
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")
        copy_tokenizer(folder / "tokenizer")
        form = {"sd15": {}, "sd2": {"use_linear_projection": True}}.get(family)
        if family == "sdxl":
            CLIPTextModelWithProjection(text).save_pretrained(folder / "text_encoder_2")
            copy_tokenizer(folder / "tokenizer_2")
            form = {
                "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 6 * 4 + 16, "transformer_layers_per_block": (1, 2),
            }  # fmt: skip
        UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
            cross_attention_dim=32 if family == "sdxl" else 16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[:: 1 if family == "sdxl" else -1],
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[:: 1 if family == "sdxl" else -1], **form,
        ).save_pretrained(folder / "unet")  # fmt: skip
        AutoencoderKL(
            block_out_channels=(8, 8, 16), down_block_types=["DownEncoderBlock2D"] * 3, sample_size=32,
            up_block_types=["UpDecoderBlock2D"] * 3, norm_num_groups=4, latent_channels=4,
        ).save_pretrained(folder / "vae")  # fmt: skip
        DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            steps_offset=1, set_alpha_to_one=False, prediction_type=prediction_type,
        ).save_pretrained(folder / "scheduler")  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def small_bases(tmp_path_factory) -> dict[str, Path]:
    """family -> folder of a small base with random weights; "sd2" predicts v."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("bases")
    kinds = {"sd15": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
    return {family: write_base(root / family, family, kind) for family, kind in kinds.items()}


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """A dataset in kohya's form: two sizes, six pictures, two repeats. To read; `pictures` is a copy."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("drawn") / "pictures" / "2_sks thing"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(6):
        size = (32, 32) if number < 4 else (48, 24)
        Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks thing, number {number}")
    return folder.parent


@pytest.fixture
def pictures(drawn, tmp_path) -> Path:
    """A dataset of the test's own."""
    return Path(shutil.copytree(drawn, tmp_path / "pictures"))


def run_settings(base: Path, dataset: Path):
    """A run of a second on a small base."""
    from lorakit.config import Config

    return Config(
        base=str(base), dataset=str(dataset), name="thing", trigger="sks thing", resolution=32,
        bucket_step=8, rank=4, alpha=2, batch_size=2, steps=6, learning_rate=1e-3, save_every=3, sample_every=100,
        sample_prompts=("sks thing",), sample_steps=2, device="cpu", mixed_precision="no",
    )  # fmt: skip


@pytest.fixture
def settings(small_bases, pictures):
    """A run of a second on the small SD 1.5 base."""
    return run_settings(small_bases["sd15"], pictures)


@pytest.fixture
def ready(settings, tmp_path):
    """The run of `settings`, prepared."""
    from loops import prepared

    return prepared(settings, tmp_path)


@pytest.fixture(scope="session")
def finished(small_bases, drawn, tmp_path_factory):
    """The run of `settings`, trained once: its Result, and the lines that it said. To read, not to change."""
    from lorakit.run import run

    said: list[str] = []
    folder = tmp_path_factory.mktemp("finished") / "run"
    return run.start(run_settings(small_bases["sd15"], drawn), folder, say=said.append, progress=False), said


@pytest.fixture
def trained(finished, tmp_path):
    """A copy of that run's folder, for the test to change: its Result."""
    result, _ = finished
    folder = Path(shutil.copytree(result.folder, tmp_path / "run"))
    here = {name: folder / path.relative_to(result.folder)
            for name in ("lora", "comparison") if (path := getattr(result, name))}  # fmt: skip
    return replace(result, folder=folder, **here)


@pytest.fixture
def colab_package(monkeypatch):
    """A small fake of the package google.colab, by which Colab is known."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "fakes")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260801")
    yield
    for name in [name for name in sys.modules if name.startswith("google.colab")]:
        del sys.modules[name]


@pytest.fixture
def weights_only(monkeypatch):
    """Runs end without the sheet and the figure, which take half of so short a run: the test is about other things."""
    pytest.importorskip("torch")
    from lorakit.run import finish

    monkeypatch.setattr(finish, "attempt", lambda *_: None)
