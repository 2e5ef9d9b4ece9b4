"""Several processes on this CPU, communicating by gloo: the same run as one process."""

import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killing import processes
from said import QUIET, line, naming

from lorakit.adapter import proof
from lorakit.config import Config
from lorakit.run import checkpoint, finish, run, run_folder
from lorakit.train import distributed
from lorakit.train.distributed import Team

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
LAUNCH += ["-m", "lorakit"]


def child(number: int, count: int, port: int, settings: str, folder: str, stop_at: int | None, report: str) -> None:
    """One process of a run, in the environment that `accelerate launch --multi_gpu` gives it.

    Args:
        stop_at: the step in which a file named STOP appears.
        report: file for the printed lines and the last step of this process.
    """
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no",
    }  # fmt: skip
    gc.freeze()  # every run collects garbage several times: skip objects from before the fork
    torch.set_num_threads(1)
    finish.attempt = lambda *_: None
    lines = []

    def stop(step) -> None:
        if step.number == stop_at:
            (Path(folder) / "STOP").touch()

    result = run.start(Config(**json.loads(settings)), folder, **QUIET | {"say": lines.append}, listeners=[stop])
    Path(report).write_text(json.dumps({"lines": lines, "steps": result.steps}))


def together(settings: Config, folder: Path, stop_at: int | None = None) -> list[dict]:
    """Run two processes of one run and return their reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reports = [folder.with_name(f"{folder.name}-{number}.json") for number in range(2)]
    team = [
        processes.Process(target=child, args=(i, 2, port, settings.to_json(), str(folder), stop_at, str(reports[i])))
        for i in range(2)
    ]
    try:
        for process in team:
            process.start()
        for process in team:
            process.join(240)
        assert [process.exitcode for process in team] == [0, 0]
    finally:
        for process in team:
            process.kill()
    return [json.loads(file.read_text()) for file in reports]


def test_each_item_belongs_to_one_process():
    for count in range(8):
        shares = [list(range(count))[Team(number, 3).share(count)] for number in range(3)]
        assert sum(shares, []) == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.usefixtures("weights_only")
def test_two_processes_stopped_and_resumed_equal_one_process(settings, tmp_path):
    """Batches of 2, one picture for each process; the second may get none of a bucket's last batch."""
    settings = settings.with_(repeats=1, steps=5, save_every=5, validation_share=0.2, validate_every=5)
    one = run.start(settings, tmp_path / "one", **QUIET)
    first, second = together(settings, tmp_path / "two", stop_at=2)
    stopped = checkpoint.newest(tmp_path / "two" / "checkpoints").step
    assert 2 <= stopped == first["steps"] == second["steps"] < 5
    assert line(first["lines"], "stopped", stopped, 5) and second["lines"] == []  # only the first prints
    first, second = together(settings.with_(fit_memory=False), tmp_path / "two")
    assert line(first["lines"], "resume", stopped) and second["lines"] == []
    assert first["steps"] == second["steps"] == 5
    two = [entry["loss"] for entry in run_folder.read_log(tmp_path / "two" / "log.jsonl")]
    assert two == pytest.approx(one.losses, rel=1e-5, abs=2e-6)  # the log has six decimals
    first, second = (checkpoint.newest(tmp_path / name / "checkpoints") for name in ("one", "two"))
    assert first.step == second.step == 5 and first.settings == second.settings
    # Compared as a whole: AdamW makes full steps even for gradients that are only rounding errors.
    one, two = (
        torch.cat([tensor.flatten() for name, tensor in sorted(saved.tensors.items()) if name.startswith("adapter.")])
        for saved in (first, second)
    )
    assert (one - two).norm() < 1e-3 * one.norm(), (one - two).norm() / one.norm()
    assert proof.describe_file(tmp_path / "two" / "thing.safetensors")["hash"] == "verified"


@pytest.mark.host
def test_accelerate_launch_starts_them(settings, tmp_path):
    """The real command, with three new Python processes."""
    file = tmp_path / "config.json"
    file.write_text(settings.with_(steps=2, save_every=2).to_json())
    command = [*LAUNCH, "train", str(file), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sum(text.startswith("proof") for text in done.stdout.splitlines()) == 1  # only the first prints
    assert proof.describe_file(tmp_path / "run" / "thing.safetensors")["hash"] == "verified"


def test_a_batch_smaller_than_the_team_is_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "join_team", lambda device: Team(0, 4))
    with pytest.raises(ValueError, match=naming("batch_size", 2, 4)):
        run.start(settings, tmp_path / "run", **QUIET)
