import errno

import pytest
from said import QUIET, line, names

from lorakit import plots
from lorakit.__main__ import main
from lorakit.console import Console
from lorakit.evaluate import sweeps
from lorakit.run import finish, log, run
from lorakit.run.control import Control
from lorakit.sample import denoise
from lorakit.storage import backup

# ── What could not be made ──────────────────────────────────────────────────────────────────────────────────────────


def test_what_failed_is_listed_until_it_is_made():
    said: list[str] = []
    console = Console(said.append)
    assert console.missing == () and console.end() == () and said == []
    for step in (10, 20, 20, 30):
        console.failed("samples", RuntimeError(f"no room at {step}\nand a traceback"), step)
    console.failed("loss.png", "stopped")
    console.failed("lines", OSError("full"))
    console.made("lines")
    console.made("what never failed")
    assert console.missing == ("samples of steps 10, 20, 30: RuntimeError: no room at 30", "loss.png: stopped")
    for step in range(40, 90, 10):
        console.failed("samples", "again", step)
    assert names(console.missing[0], 10, 80, 8, "again") and not names(console.missing[0], 40)
    assert said == [] and console.end() == console.missing
    assert said == [f"missing   {text}" for text in console.missing]


def test_a_terminal_that_was_closed_ends_nothing():
    def closed(text):
        raise BrokenPipeError

    Console(closed).say("a line")


def broken(*_, **__):
    raise RuntimeError("this machine cannot")


def test_a_run_ends_with_a_list_of_what_it_could_not_make(settings, tmp_path, monkeypatch):
    """Samples, the figure and the sheet fail, and copies find no place: the LoRA is made, the rest is named last."""
    (tmp_path / "drive").mkdir()
    monkeypatch.setattr(denoise, "decode_latents", broken)
    monkeypatch.setattr(finish, "draw_comparison", broken)
    monkeypatch.setattr(plots, "loss", broken)
    monkeypatch.setattr(backup.Folder, "put", broken)
    said: list[str] = []
    settings = settings.with_(sample_every=4, backup=str(tmp_path / "drive"))
    result = run.start(settings, tmp_path / "run", say=said.append, progress=False)
    assert result.lora.is_file() and result.comparison is None and len(result.missing) == 4
    for values in (("samples", 4, 6), ("loss.png",), ("comparison.png",), ("second",)):
        assert line(result.missing, *values, "this machine cannot"), values
    assert said[-4:] == [f"missing   {text}" for text in result.missing]


def test_a_stopped_run_lists_it_too(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(denoise, "decode_latents", broken)
    live, said = Control(), []
    result = run.start(
        settings.with_(sample_every=1), tmp_path / "run", control=live, listeners=[lambda _: live.stop.set()],
        say=said.append, progress=False,
    )  # fmt: skip
    assert result.lora is None and line(result.missing, "samples", 1)
    assert line(said[-2:-1], "stopped", 1) and said[-1] == f"missing   {result.missing[0]}"


def test_a_board_that_cannot_be_written_is_closed(settings, tmp_path, monkeypatch, weights_only):
    """A disk that fills ends the curves in TensorBoard, and nothing else; no file stays open."""
    files = []

    def full(self, step, **_):
        files.append(self.file)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log.Board, "figures", full)
    result = run.start(settings, tmp_path / "run", **QUIET)
    assert len(files) == 1 and files[0].closed and (tmp_path / "run" / "samples" / "step-000006").is_dir()
    assert line(result.missing, "TensorBoard") and len(result.missing) == 1


@pytest.mark.parametrize(("fails", "status"), [(False, 0), (True, 3)])
def test_the_exit_status_tells_whether_something_is_missing(settings, tmp_path, monkeypatch, fails, status):
    (tmp_path / "config.json").write_text(settings.with_(steps=1).to_json())
    monkeypatch.setattr(finish, "draw_comparison", broken if fails else lambda *a, **_: a[2])
    arguments = ["lorakit", "train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status and (tmp_path / "run" / "thing.safetensors").is_file()


def test_a_sweep_tells_what_its_runs_could_not_make(settings, tmp_path, monkeypatch):
    """In its page, too, which names no path of this machine."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, f"no room for comparison.png in {tmp_path / 'sweep'}")

    monkeypatch.setattr(finish, "draw_comparison", full)
    made = sweeps.sweep(
        settings.with_(steps=1), "rank", [2, 4], tmp_path / "sweep", pictures=False, console=Console.quiet()
    )
    assert line(made.missing, "rank=2", "comparison.png") and line(made.missing, "rank=4", "comparison.png")
    assert set(made.missing) <= set(made.notes)
    assert str(tmp_path) not in (tmp_path / "sweep" / "comparison.html").read_text()
    assert str(tmp_path) not in (tmp_path / "sweep" / "comparison.json").read_text()
