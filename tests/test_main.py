"""The commands, called as their process calls them."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from said import line, names

from lorakit.__main__ import main

ERROR = 1  # the exit status of a mistake


def called(*arguments, expect: int = 0) -> tuple[str, str]:
    """A command: what it writes to standard output and to standard error.

    An error that `main` does not turn into a message is raised here, as it would be shown with its traceback there.
    """
    out, err, own = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["lorakit", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = own
    assert (ended.value.code or 0) == expect, err.getvalue()
    return out.getvalue(), err.getvalue()


def told(*arguments) -> str:
    """What a command prints."""
    return called(*arguments)[0]


def refused(*arguments) -> str:
    """The message of a command that ends with an error, which alone is printed."""
    out, err = called(*arguments, expect=ERROR)
    assert out == "" and err.startswith("error: ")
    return err


def test_ctrl_c_saves_and_ends_with_130(settings, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(settings.with_(steps=2000).to_json())
    command = [sys.executable, "-m", "lorakit", "train", str(path), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        log = tmp_path / "run" / "log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= 10):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and "Traceback" not in errors
    done = json.loads(told("info", tmp_path / "run", "--json"))
    assert done["steps"] == done["checkpoints"][-1]["step"] > 0
    assert line(output.splitlines(), "stopped", done["steps"], 2000)
    assert not list((tmp_path / "run").rglob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ("train none.json", ["none.json"]),
        ("info absent", ["absent"]),
        ("preset landscape", ["landscape", "style", "sdxl"]),
        ("sample cat --base nowhere", ["nowhere", "demo"]),
        ("sample cat --scheduler dpm", ["dpm", "euler_a", "unipc"]),
        ("sample cat --steps 0", [0]),
        ("sample cat --width 0", ["0×64"]),
        ("sample cat --width -64", ["-64×64"]),
        ("sample cat --guidance nan", ["nan"]),
        ("sample cat --base {base} --lora {run} --strength nan", ["nan"]),
        ("plan --rank 0", ["rank", 0]),
        ("plan --card T5", ["T5", "T4"]),
        ("frames none.mp4 out", ["none.mp4"]),
        ("generate cat --name cat --out out --base nowhere", ["nowhere", "demo"]),
        ("export {run} --step 5 --out a.safetensors", [5, 3, 6]),
        ("export {run} --dtype fp8 --out a.safetensors", ["fp8", "fp16"]),
        ("export {run} --format ckpt --out a.safetensors", ["ckpt", "kohya"]),
        ("export {run} --out a.pt", ["kohya", ".safetensors"]),
        ("upload {run} nobody", ["nobody"]),
    ],
)
def test_mistakes_get_a_message_and_leave_nothing(finished, tmp_path, monkeypatch, arguments, values):
    monkeypatch.chdir(tmp_path)
    places = {"{run}": str(finished[0].folder), "{base}": finished[0].config.base}
    message = refused(*(places.get(word, word) for word in arguments.split()))
    assert names(message, *values) and "pydantic" not in message
    assert list(tmp_path.rglob("*.png")) == []


def test_a_strength_that_leaves_no_picture_is_an_error(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ("--base", finished[0].config.base, "--lora", finished[0].folder)
    out, err = called("sample", "cat", *run, "--strength", "1e30", expect=ERROR)
    assert names(out, "strength", "1e+30") and names(err, "strength", "black")
    assert list(tmp_path.rglob("*.png")) == []


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_terminal_that_lacks_characters_or_is_closed_ends_nothing(finished, stream):
    """A run's lines, with × and …, used to end it at a terminal of cp1252 or ASCII."""
    command = [sys.executable, "-m", "lorakit", "info", str(finished[0].folder)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "HOME": "", "XDG_CACHE_HOME": ""}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0 and not done.stderr
    shell = f"{shlex.join(command)} {'1' if stream == 'stdout' else '2'}>&-"
    assert subprocess.run(shell, shell=True, capture_output=True).returncode == 0


def test_a_preset_is_a_config_to_start_from():
    settings = json.loads(told("preset", "style", "sdxl", "--trigger", "sks style"))
    assert (settings["rank"], settings["resolution"], settings["trigger"]) == (128, 1024, "sks style")


@pytest.mark.usefixtures("weights_only")
def test_what_can_be_made_of_a_run_at_a_terminal(finished, settings, tmp_path):
    """A run forked from another, with copies elsewhere; exports, merges, another rank, a base and back; pictures."""
    run, out = finished[0].folder, tmp_path / "out"
    facts = json.loads(told("info", run, "--json"))
    shown = told("info", run)
    assert f"{facts['loss']:.6g}" in shown and f"{facts['loss']!r}" not in shown and "None" not in shown
    assert (facts["kind"], facts["steps"]) == ("run", 6)
    longer = tmp_path / "longer.json"
    longer.write_text(settings.with_(steps=8).to_json())
    lora, drive = tmp_path / "two" / "thing.safetensors", tmp_path / "drive"
    said = told("train", longer, "--out", lora.parent, "--fork", run, "--backup", drive).splitlines()
    assert line(said, "fork", "run", 6) and line(said, "proof") and line(said, "done", lora)
    assert (drive / "two" / "step-000008.safetensors").is_file()
    facts = json.loads(told("info", lora, "--json"))
    assert (facts["kind"], facts["family"], facts["rank"]) == ("LoRA", "sd15", [4])
    assert names(told("info", lora), "sks thing")

    said = told("export", run, "--step", 3, "--format", "diffusers", "--dtype", "bf16", "--out", out / "a.safetensors")
    assert line(said.splitlines(), "proof")
    told("export", lora, "--format", "peft", "--out", out / "peft")
    assert (out / "peft" / "unet" / "adapter_config.json").is_file()
    assert json.loads(told("info", out / "a.safetensors", "--json"))["dtype"] == ["bfloat16"]
    assert json.loads(told("info", out / "peft", "--json"))["kind"] == "LoRA"

    said = told("merge", run, lora, "--strength", 0.5, "--strength", -0.2, "--out", out / "both.safetensors")
    assert names(said, 8, "100.0%")  # the rank, and how much of the change it keeps
    assert names(told("resize", out / "both.safetensors", "--rank", 2, "--out", out / "small.safetensors"), 2)
    tables = told("info", out / "small.safetensors")
    assert line(tables.splitlines(), "down_blocks.0", "attention") and json.loads(
        told("info", out / "small.safetensors", "--json")
    )["rank"] == [2]

    told("merge", lora, "--base", settings.base, "--out", out / "tuned")
    told("extract", out / "tuned", settings.base, "--rank", 4, "--out", out / "again.safetensors", "--dtype", "fp32")
    facts = json.loads(told("info", out / "again.safetensors", "--json"))
    assert (facts["family"], facts["rank"]) == ("sd15", [4])

    said = told(
        "sample", "sks thing", "a house", "--base", settings.base, "--lora", lora,
        "--strength", 0, "--strength", 1, "--steps", 2, "--out", out / "pictures",
    )  # fmt: skip
    made = [
        "sheet.png", "strength-0/00-seed-0.png", "strength-0/01-seed-1.png",
        "strength-1/00-seed-0.png", "strength-1/01-seed-1.png",
    ]  # fmt: skip
    assert sorted(p.relative_to(out / "pictures").as_posix() for p in out.rglob("*.png")) == made
    assert sorted(said.splitlines()) == sorted(str(out / "pictures" / path) for path in made)


def test_pictures_are_checked_and_captioned_at_a_terminal(pictures, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (pictures / "2_sks thing" / "broken.png").write_bytes(b"not a picture")
    facts = json.loads(told("check", pictures, "--resolution", 64, "--trigger", "sks thing", "--json"))
    assert facts["pictures"] == 6 and [each["picture"] for each in facts["left_out"]] == ["2_sks thing/broken.png"]
    assert {"picture", "kind", "severity", "message"} == facts["findings"][0].keys()
    assert str(tmp_path) not in json.dumps(facts)
    assert names(told("check", pictures, "--resolution", 64), 6, "2_sks thing/broken.png")

    file = pictures / "2_sks thing" / "0.txt"
    shown = told("caption", "replace", pictures, "number", "no.")
    assert names(shown, "--write", "sks thing, number 0", "sks thing, no. 0")
    assert file.read_text() == "sks thing, number 0"
    assert names(told("caption", "replace", pictures, "number", "no.", "--write"), 6)
    assert file.read_text() == "sks thing, no. 0\n"
    assert names(told("caption", "undo", pictures), 6)
    assert file.read_text() == "sks thing, number 0"
    assert names(told("caption", "audit", pictures, "--trigger", "sks thing"), "sks thing")


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_a_check_for_programs_tells_all_that_was_found(tmp_path, packed):
    folder = tmp_path / "cats" / "2_cat"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number, size in enumerate([(512, 512)] * 3 + [(100, 512)]):
        Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(folder / f"{number}.png")
    for number, text in enumerate(["sks cat, sitting", "a cat"]):
        (folder / f"{number}.txt").write_text(text)
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "again.png").write_bytes(whole)
    source = folder.parent
    if packed:
        source = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder.parent))
    facts = json.loads(told("check", source, "--trigger", "sks cat", "--json"))
    assert (facts["pictures"], facts["per_epoch"], facts["resolution"]) == (5, 10, 512)
    (left_out,), (double,) = facts["left_out"], facts["to_look_at"]
    assert left_out["picture"] == "2_cat/cut.png" and names(left_out["reason"], "truncated")  # Pillow's word
    assert double["picture"] == "2_cat/again.png" and names(double["reason"], "2_cat/0.png")
    assert facts["captions"] == {  # three have their folder's name
        "with": 5, "without": 0, "own": 2, "shared": 3, "words": {"least": 1, "median": 1, "most": 3},
        "without_trigger": 4,
    }  # fmt: skip
    for finding in facts["findings"]:
        assert finding.keys() == {"picture", "kind", "severity", "message"} and finding["message"]
        assert finding["severity"] in ("serious", "warning", "info")
    found = {(finding["picture"], finding["kind"]) for finding in facts["findings"]}
    assert {(None, "count"), ("2_cat/1.png", "caption"), ("2_cat/3.png", "resolution")} <= found
    assert str(tmp_path) not in json.dumps(facts)
    own = json.loads(told("check", source, "--rule", "no_upscale", "--json"))
    assert "resolution" not in {finding["kind"] for finding in own["findings"]}
    assert names(refused("check", source, "--max-side", 256), 512, 256)


def test_a_check_fails_where_training_could_not_start(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"not a picture")
    (tmp_path / "none.zip").write_bytes(b"PK")
    for name in ("empty", "broken", "none.zip", "nowhere"):
        assert names(refused("check", tmp_path / name, "--json"), name)


def test_frames_of_a_video(tmp_path):
    pytest.importorskip("av")
    from films import film, shapes

    clip = film(tmp_path / "clip.mp4", [shapes(number // 10) for number in range(30)])  # three scenes of a second
    assert line(told("frames", clip, tmp_path / "all").splitlines(), "done", 3, tmp_path / "all")
    told("frames", clip, tmp_path / "scenes", "--scenes", "--suffix", ".jpg")
    assert sorted(path.suffix for path in (tmp_path / "scenes").iterdir()) == [".jpg"] * 3
    assert line(told("frames", clip, tmp_path / "few", "--every", 10).splitlines(), "done", 1)


def test_pictures_are_generated_and_none_twice(tmp_path):
    pytest.importorskip("torch")
    command = ["generate", "flatto style, cup", "--out", tmp_path, "--name", "cup", "--steps", 2, "--width", 48,
               "--negative", "grey"]  # fmt: skip
    said = told(*command, "--count", 2, "--seed", 5, "--repeats", 3)
    assert line(said.splitlines(), "done", 2, tmp_path / "3_cup")
    made = sorted((tmp_path / "3_cup").glob("*.png"))
    assert len(made) == 2
    for path in made:
        with Image.open(path) as picture:
            assert picture.size == (48, 64)
    before = [path.stat().st_mtime_ns for path in made]
    said = told(*command, "--count", 3, "--seed", 5, "--repeats", 3)
    assert line(said.splitlines(), "done", 3)
    assert [path.stat().st_mtime_ns for path in made] == before
    assert {path.read_text() for path in (tmp_path / "3_cup").glob("*.txt")} == {"flatto style, cup\n"}


def test_a_preset_of_ones_own_is_kept_and_printed(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(settings.to_json())
    said = told("preset", "quick", "--save-from", tmp_path / "run")
    assert names(said, "quick", tmp_path / "home" / "presets", "rank") and not names(said, "trigger")
    own = json.loads(told("preset", "quick", "sdxl", "--trigger", "sks", "--dataset", "d"))
    assert (own["rank"], own["trigger"], own["dataset"], own["name"]) == (4, "sks", "d", "my_quick_v1")
    assert own["base"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert json.loads(told("preset", "style", "sdxl"))["rank"] == 128
    halved = json.loads(told("preset", "style", "--quick"))
    assert (halved["steps"], halved["initialisation"], halved["schedule"]) == (1000, "eva", "cosine")
    assert names(refused("preset", "style", "--save-from", tmp_path / "run"), "style")
    assert json.loads(told("preset", "style"))["rank"] != 4


@pytest.mark.usefixtures("weights_only")
def test_a_sweep_and_a_comparison_at_a_terminal(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(settings.with_(steps=1).to_json())
    said = told("sweep", "config.json", "schedule", "constant", "cosine", "--no-pictures")
    assert line(said.splitlines(), "schedule=cosine", 2) and line(said.splitlines(), "schedule", "constant", "cosine")
    folder = tmp_path / "runs" / "thing-schedule"
    assert (folder / "comparison.html").is_file() and (folder / "schedule=cosine" / "checkpoints").is_dir()
    said = told("compare", folder, "--prompt", "a house", "--seed", 1, "--seed", 2, "--out", "out")
    assert line(said.splitlines(), "schedule", "constant", "cosine") and names(said, Path("out", "comparison.html"))
    facts = json.loads(Path("out", "comparison.json").read_text())
    assert facts["pictures"]["asked"] == [["a house", 1], ["a house", 2]]
    assert facts["pictures"]["columns"] == ["base", "schedule=constant", "schedule=cosine"]
    before = sorted(tmp_path.rglob("*"))
    for command, values in (
        ("sweep config.json rank 4 0", ["rank=0"]),
        ("sweep config.json seed 1", ["seed", 1]),
        ("compare nowhere", ["nowhere"]),
    ):
        assert names(refused(*command.split()), *values)
    assert sorted(tmp_path.rglob("*")) == before
