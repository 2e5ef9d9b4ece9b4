"""What a base answers with is measured: the embedded base predicts v, and twins of it predict epsilon and a flow."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from said import QUIET, line, names, naming

from lorakit import dataset, demo
from lorakit.adapter import read
from lorakit.base import model as bases
from lorakit.base.encode import encode_pictures, encode_texts
from lorakit.device import Compute
from lorakit.run import run
from lorakit.train import prediction
from lorakit.train.examples import Examples

COMPUTE = Compute(torch.device("cpu"), torch.float32)


class Epsilon(torch.nn.Module):
    """A UNet that predicts v as one that predicts epsilon: the same model, converted exactly."""

    def __init__(self, unet, alphas):
        super().__init__()
        self.unet, self.alphas, self.device, self.dtype = unet, alphas, unet.device, unet.dtype

    def forward(self, x, t, embeddings, added_cond_kwargs=None):
        v, a = self.unet(x, t, embeddings).sample, self.alphas[t].view(-1, 1, 1, 1)
        return SimpleNamespace(sample=a.sqrt() * v + (1 - a).sqrt() * x)


class Flow(Epsilon):
    """The same as a rectified flow: (1 − σ) x + σ noise is the diffusion's noisy picture, scaled."""

    def forward(self, x, t, embeddings, added_cond_kwargs=None):
        sigma = (t / 1000).view(-1, 1, 1, 1)
        scale = ((1 - sigma) ** 2 + sigma**2).sqrt()
        same = (self.alphas - ((1 - sigma) / scale).square().flatten()[:, None]).abs().argmin(1)
        v, a = self.unet(x / scale, same, embeddings).sample, self.alphas[same].view(-1, 1, 1, 1)
        return SimpleNamespace(sample=(x - a.sqrt() * x / scale + (1 - a).sqrt() * v) / sigma)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The embedded base, its UNet, and the demo's pictures and captions, encoded."""
    base, found = bases.open("demo"), dataset.scan(demo.PICTURES)
    fits = dataset.Buckets(64, 16).fit([(picture.width, picture.height) for picture in found.pictures])
    cache = tmp_path_factory.mktemp("cache")
    pictures = encode_pictures(base, found.pictures, fits, cache, COMPUTE)
    texts = encode_texts(base, [picture.caption for picture in found.pictures], cache, COMPUTE)
    return base, bases.load_unet(base, COMPUTE), pictures, texts


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero terminal SNR"])
@pytest.mark.parametrize("kind", prediction.KINDS)
def test_the_answer_is_recognised(asked, kind, zero):
    base, unet, pictures, texts = asked
    alphas, opened = base.alphas_cumprod(), bases.open("demo", zero_terminal_snr=zero)
    unet = {"epsilon": Epsilon, "flow": Flow}.get(kind, lambda unet, _: unet)(unet, alphas)
    draws = random.Random(1)
    for _ in range(5):
        examples = Examples(draws.sample(pictures, 4), [1] * 4, texts, demo.config())
        before = torch.get_rng_state()
        answer = prediction.probe(unet, opened, examples)
        assert answer.kind == kind, answer.describe()
        assert torch.equal(torch.get_rng_state(), before)


def test_one_picture_is_enough_and_a_random_unet_is_undecided(asked, small_bases):
    base, unet, pictures, texts = asked
    examples = Examples(pictures[:1], [1], texts, demo.config())
    assert prediction.probe(unet, base, examples).kind == "v_prediction"
    assert prediction.probe(unet, base, Examples([], [], texts, demo.config())).kind is None
    torch.manual_seed(0)
    blank = bases._from_config("unet", base.configs["unet"])
    assert prediction.probe(blank, base, examples).kind is None


@pytest.fixture
def misnamed(tmp_path):
    """The embedded base in a folder whose files say that it predicts epsilon, and a short run on it."""
    folder = shutil.copytree(bases.DEMO, tmp_path / "base")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "epsilon"}))
    changes = {"steps": 4, "save_every": 2, "sample_every": 4, "sample_steps": 1, "sample_prompts": ["a cat"]}
    return demo.config(base=str(folder), **changes)


def test_a_base_whose_files_are_wrong_is_taken_for_what_it_is(misnamed, tmp_path):
    said = []
    result = run.start(misnamed, tmp_path / "run", say=said.append, progress=False)
    told = line(said, "base", "v_prediction", "epsilon")
    assert told and json.loads((tmp_path / "run" / "config.json").read_text())["prediction_type"] == "v_prediction"
    assert read.load(result.lora).metadata["ss_base_model_version"] == "sd_v1_v"
    right = run.start(misnamed.with_(prediction_type="v_prediction"), tmp_path / "right", **QUIET)
    assert result.lora.read_bytes()[-1000:] == right.lora.read_bytes()[-1000:]  # the same weights
    # It resumes with the settings that were given, and with those that were found.
    for settings in (misnamed, misnamed.with_(prediction_type="v_prediction")):
        for file in (tmp_path / "run" / "checkpoints").glob("*4.safetensors"):
            file.unlink()
        result.lora.unlink(missing_ok=True)
        said.clear()
        again = run.start(settings, tmp_path / "run", say=said.append, progress=False)
        assert line(said, "resume", 2) and again.lora.read_bytes()[-1000:] == right.lora.read_bytes()[-1000:]
        assert json.loads((tmp_path / "run" / "config.json").read_text())["prediction_type"] == "v_prediction"


def test_a_setting_that_contradicts_the_base_stops_the_run(misnamed, tmp_path):
    with pytest.raises(ValueError, match=naming("base", "v_prediction", "epsilon", "auto")):
        run.start(misnamed.with_(prediction_type="epsilon"), tmp_path / "run", **QUIET)


def test_a_flow_is_refused(misnamed, tmp_path, monkeypatch):
    answer = prediction.Answer({"epsilon": 1.1, "v_prediction": 0.8, "flow": 0.2})
    monkeypatch.setattr(run.train, "probe", lambda *_: answer, raising=False)
    with pytest.raises(ValueError, match=naming("base", "flow")):
        run.start(misnamed, tmp_path / "run", **QUIET)


@pytest.mark.parametrize(
    "errors, kind",
    [
        ((0.1, 1.0, 0.8), "epsilon"),
        ((0.3, 0.4, 0.9), None),
        ((0.9, 2.0, 2.0), None),
        ((0.75, 1.2, 1.1), "epsilon"),
        ((0.5, 0.7, 0.7), "epsilon"),
        ((1.0, 0.3, 0.4), "v_prediction"),
        ((1.0, 0.4, 0.3), None),
        ((1.0, 0.9, 0.3), "flow"),
    ],
)
def test_what_is_not_clear_is_not_decided(errors, kind):
    assert prediction.Answer(dict(zip(prediction.KINDS, errors, strict=True))).kind == kind
    assert names(prediction.Answer(dict(zip(prediction.KINDS, errors, strict=True))).describe(), f"{errors[0]:.2f}")
