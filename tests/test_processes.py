"""Several processes on this CPU, talking by gloo: the same run as one process."""

import subprocess
import sys
import time

import pytest
import torch

from lorakit import checkpoint, export, plots, run
from lorakit.processes import Team

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
LAUNCH += ["-m", "lorakit"]


def start(settings, folder, out, *, wait: bool = True):
    file = folder / "config.json"
    file.write_text(settings.to_json())
    command = [*LAUNCH, "train", str(file), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if wait:
        told, trouble = process.communicate(timeout=300)
        assert process.returncode == 0, trouble
        return told
    return process


def test_each_thing_is_one_process_business():
    for count in range(8):
        shares = [list(range(count))[Team(number, 3).share(count)] for number in range(3)]
        assert sum(shares, []) == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_processes_learn_what_one_does(settings, tmp_path):
    """Batches of 2, shared out one each; a bucket's last batch may leave the second process nothing."""
    settings = settings.with_(repeats=1, steps=5, save_every=5, validation_share=0.2, validate_every=5)
    one = run.start(settings, tmp_path / "one", say=lambda _: None, progress=False)
    told = start(settings, tmp_path, tmp_path / "two")
    assert told.count("proof") == 1  # only the first speaks
    two = [line["loss"] for line in plots.read_log(tmp_path / "two" / "log.jsonl")]
    assert two == pytest.approx(one.losses, rel=1e-5, abs=2e-6)  # the log has six decimals
    first, second = (checkpoint.newest(tmp_path / name / "checkpoints") for name in ("one", "two"))
    assert first.step == second.step == 5 and first.settings == second.settings
    # As a whole: AdamW makes full steps of gradients that are nothing but rounding, and so of their sign.
    one, two = (
        torch.cat([tensor.flatten() for name, tensor in sorted(found.tensors.items()) if name.startswith("adapter.")])
        for found in (first, second)
    )
    assert (one - two).norm() < 1e-3 * one.norm(), (one - two).norm() / one.norm()
    assert export.describe(tmp_path / "two" / "thing.safetensors")["hash"] == "verified"


def test_a_stop_stops_all_and_the_run_goes_on(settings, tmp_path, monkeypatch):
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # tracing takes as long again
    settings = settings.with_(steps=5000, save_every=5000, sample_every=5000)
    process = start(settings, tmp_path, tmp_path / "run", wait=False)
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(600):
        if log.exists() and log.stat().st_size:
            break
        time.sleep(0.2)
    (tmp_path / "run" / "STOP").touch()
    told, _ = process.communicate(timeout=120)
    assert "stopped" in told
    stopped = checkpoint.newest(tmp_path / "run" / "checkpoints").step
    assert 0 < stopped < 5000
    told = start(settings.with_(fit_memory=False), tmp_path, tmp_path / "run", wait=False)
    for _ in range(600):
        if plots.read_log(log)[-1]["step"] > stopped:
            break
        time.sleep(0.2)
    (tmp_path / "run" / "STOP").touch()
    assert f"at step {stopped}" in told.communicate(timeout=120)[0]


def test_a_batch_that_cannot_be_shared_out_is_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(run.processes, "join", lambda device: Team(0, 4))
    with pytest.raises(ValueError, match="batch_size 2 cannot be shared out among 4 processes: set it to 4"):
        run.start(settings, tmp_path / "run", say=lambda _: None, progress=False)
