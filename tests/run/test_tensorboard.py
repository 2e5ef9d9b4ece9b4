import socket
import sys

import pytest
from PIL import Image
from said import QUIET, line
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from lorakit.run import log as log_module
from lorakit.run import run, run_folder


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def curve(events, name: str) -> list[tuple[int, float]]:
    """TensorBoard's own reading of a curve."""
    return [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(name)]


def test_tensorboard_reads_what_was_written(tmp_path):
    writer = log_module.Board(tmp_path)
    for step in (1, 2, 3):
        writer.figures(step, loss=0.5 / step, learning_rate=1e-4)
    writer.picture(3, "a prompt", Image.new("RGB", (20, 10), "red"))
    writer.flush()
    events = read(tmp_path)  # while it is still open
    assert curve(events, "loss") == [(1, 0.5), (2, 0.25), (3, pytest.approx(0.5 / 3))]
    (image,) = events.Tensors("a prompt")
    width, height, png = make_ndarray(image.tensor_proto)
    assert (image.step, width, height) == (3, b"20", b"10")
    assert png.startswith(b"\x89PNG")
    writer.close()


def test_steps_that_are_trained_again_replace_the_old_ones(tmp_path):
    for resumed_at, value in ((0, 1.0), (2, 2.0)):
        writer = log_module.Board(tmp_path, resumed_at)
        for step in range(resumed_at + 1, 5):
            writer.figures(step, loss=value)
        writer.close()
    assert curve(read(tmp_path), "loss") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_no_name_of_the_machine_is_in_it(tmp_path):
    log_module.Board(tmp_path).close()
    (file,) = tmp_path.iterdir()
    assert file.name == "events.out.tfevents.000000"
    assert socket.gethostname().encode() not in file.read_bytes()


@pytest.mark.usefixtures("weights_only")
def test_a_run_writes_the_curves_of_its_log_and_its_samples(settings, tmp_path):
    run.start(settings.with_(steps=4, sample_every=2), tmp_path / "run", **QUIET)
    events = read(tmp_path / "run" / "tensorboard")
    log = run_folder.read_log(tmp_path / "run" / "log.jsonl")
    assert [step for step, _ in curve(events, "loss")] == [entry["step"] for entry in log]
    assert [value for _, value in curve(events, "loss")] == pytest.approx([entry["loss"] for entry in log], abs=1e-6)
    assert [image.step for image in events.Tensors("sks thing")] == [2, 4]


@pytest.mark.usefixtures("weights_only")
def test_a_run_without_tensorboard_is_not_ended_by_that(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)  # fails to import, as where it is not installed
    said = []
    result = run.start(settings.with_(steps=1), tmp_path / "run", say=said.append, progress=False)
    assert result.lora and not (tmp_path / "run" / "tensorboard").exists()
    assert line(said, "tensorboard", "log.jsonl")
