"""A run without what Windows lacks: file locks of Unix, signals of terminals, and flushing of folders."""

import os
import signal
import sys

import pytest
from said import line

from lorakit.run import run

pytestmark = pytest.mark.usefixtures("weights_only")


def test_a_run_trains_and_resumes_without_what_only_unix_has(settings, tmp_path, monkeypatch):
    opened = os.open

    def open_no_folder(path, flags, *mode, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *mode, **more)

    for name in ("fcntl", "pwd", "grp", "resource", "termios"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("SIGHUP", "SIGUSR1", "SIGALRM"):
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.delattr(os, "sched_getaffinity")
    short = settings.with_(steps=2, save_every=1)
    whole = run.start(short, tmp_path / "run", progress=False, say=lambda _: None)
    before = whole.lora.read_bytes()
    for path in (*(tmp_path / "run" / "checkpoints").glob("*2.safetensors"), whole.lora):
        path.unlink()
    again = run.start(short, tmp_path / "run", progress=False, say=(said := []).append)
    assert line(said, "resume", 1) and again.lora.read_bytes()[-5000:] == before[-5000:]
