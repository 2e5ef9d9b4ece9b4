"""Small stand-ins for hub models: the real classes of diffusers and transformers with few, random weights."""

import gc
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# At most two threads, fewer where processes test side by side. The commands that tests call read the variable.
THREADS = min(2, max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)


@pytest.fixture(scope="session", autouse=True)
def _nothing_to_collect_in_libraries():
    """Looking through their half million objects takes a third of a second, and every run collects several times."""
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory):
    """Predictions and presets are kept for one session of tests, not among the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["LORAKIT_HOME"] = str(tmp_path_factory.mktemp("home"))


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
            down_block_types=("DownBlock2D" if family == "sdxl" else "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D" if family == "sdxl" else "CrossAttnUpBlock2D"), **form,
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
    root = tmp_path_factory.mktemp("bases")
    kinds = {"sd15": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
    return {family: write_base(root / family, family, kind) for family, kind in kinds.items()}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A dataset in kohya's form: two sizes, six pictures, two repeats."""
    folder = tmp_path / "pictures" / "2_sks thing"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(6):
        size = (32, 32) if number < 4 else (48, 24)
        Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks thing, number {number}")
    return folder.parent


@pytest.fixture
def ready(settings, tmp_path):
    """The run of `settings`, prepared."""
    from loops import prepared

    return prepared(settings, tmp_path)


@pytest.fixture
def settings(small_bases, pictures):
    """A run of seconds on the small SD 1.5 base."""
    from lorakit.config import Config

    return Config(
        base=str(small_bases["sd15"]), dataset=str(pictures), name="thing", trigger="sks thing", resolution=32,
        bucket_step=8, rank=4, alpha=2, batch_size=2, steps=6, learning_rate=1e-3, save_every=3, sample_every=100,
        sample_prompts=("sks thing",), sample_steps=2, device="cpu", mixed_precision="no",
    )  # fmt: skip
