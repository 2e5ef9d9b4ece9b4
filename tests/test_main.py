"""The commands, called as a person calls them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lorakit.__main__ import app


def lorakit(*arguments, cwd=None, expect=0):
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300
    )
    assert done.returncode == expect, done.stderr
    return done


def told(*arguments) -> str:
    """What a command that needs no process of its own prints."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def config_file(settings, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(settings.to_json())
    return path


def test_train_info_and_sample(config_file, settings, tmp_path):
    trained = lorakit("train", config_file, "--out", tmp_path / "run")
    assert "done" in trained.stdout and "proof" in trained.stdout
    facts = json.loads(told("info", tmp_path / "run", "--json"))
    assert (facts["kind"], facts["steps"]) == ("run", 6)
    lora = tmp_path / "run" / "thing.safetensors"
    assert json.loads(told("info", lora, "--json"))["family"] == "sd15"
    assert "sks thing" in told("info", lora)
    out = tmp_path / "pictures-out"
    lorakit(
        "sample", "sks thing", "a house", "--base", settings.base, "--lora", lora,
        "--strength", 0, "--strength", 1, "--steps", 2, "--out", out,
    )  # fmt: skip
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png")) == [
        "sheet.png", "strength-0/00-seed-0.png", "strength-0/01-seed-1.png",
        "strength-1/00-seed-0.png", "strength-1/01-seed-1.png",
    ]  # fmt: skip


def test_ctrl_c_saves_and_the_same_command_goes_on(settings, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(settings.with_(steps=2000).to_json())
    command = [sys.executable, "-m", "lorakit", "train", str(path), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 10):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in output and "Traceback" not in errors
    done = json.loads(told("info", tmp_path / "run", "--json"))
    assert done["steps"] == done["checkpoints"][-1]["step"] > 0
    assert not list((tmp_path / "run").rglob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.json"], "no config file none.json"),
        (["info", "nothing"], "There is no nothing"),
        (["preset", "landscape"], "no preset for 'landscape'"),
        (["sample", "a cat", "--base", "nowhere"], "no base 'nowhere'"),
        (["sample", "a cat", "--scheduler", "dpm"], "no scheduler 'dpm'"),
        (["check", "nowhere"], "nowhere does not exist"),
        (["frames", "none.mp4", "out"], "There is no video none.mp4"),
        (["generate", "a cat", "--name", "cat", "--out", "out", "--base", "nowhere"], "no base 'nowhere'"),
    ],
)
def test_mistakes_get_a_message_and_no_traceback(tmp_path, arguments, message):
    errors = lorakit(*arguments, cwd=tmp_path, expect=1).stderr
    assert message in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_preset_is_a_config_to_start_from(tmp_path):
    (tmp_path / "style.json").write_text(lorakit("preset", "style", "sdxl", "--trigger", "sks style").stdout)
    settings = json.loads((tmp_path / "style.json").read_text())
    assert (settings["rank"], settings["resolution"], settings["trigger"]) == (128, 1024, "sks style")


def test_what_can_be_made_of_a_run_at_a_terminal(config_file, settings, tmp_path):
    """A second run forked from the first with copies elsewhere; exports, merges, another rank, a base and back."""
    run, out = tmp_path / "run", tmp_path / "out"
    told("train", config_file, "--out", run, "--backup", tmp_path / "drive")
    assert (tmp_path / "drive" / "run" / "step-000006.safetensors").is_file()
    longer = tmp_path / "longer.json"
    longer.write_text(settings.with_(steps=8).to_json())
    assert "fork      begins where run was at step 6" in told("train", longer, "--out", tmp_path / "two", "--fork", run)
    lora = tmp_path / "two" / "thing.safetensors"

    said = told("export", run, "--step", 3, "--format", "diffusers", "--dtype", "bf16", "--out", out / "a.safetensors")
    assert "proof     read back: ΔW of all" in said
    told("export", lora, "--format", "peft", "--out", out / "peft")
    assert (out / "peft" / "unet" / "adapter_config.json").is_file()
    assert json.loads(told("info", out / "a.safetensors", "--json"))["dtype"] == ["bfloat16"]
    assert "kind         LoRA" in told("info", out / "peft")

    said = told("merge", run, lora, "--strength", 0.5, "--strength", -0.2, "--out", out / "both.safetensors")
    assert "modules of rank 8 keep 100.0% of the change" in said
    assert "of rank 2 keep" in told("resize", out / "both.safetensors", "--rank", 2, "--out", out / "small.safetensors")
    tables = told("info", out / "small.safetensors")
    assert "down_blocks.0   attention" in tables and "share" in tables and "all " in tables

    told("merge", lora, "--base", settings.base, "--out", out / "tuned")
    told("extract", out / "tuned", settings.base, "--rank", 4, "--out", out / "again.safetensors", "--dtype", "fp32")
    facts = json.loads(told("info", out / "again.safetensors", "--json"))
    assert (facts["family"], facts["rank"]) == ("sd15", [4])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["export", "{run}", "--step", "5", "--out", "a.safetensors"], "run has no checkpoint of step 5. It has 3, 6"),
        (["export", "{run}", "--dtype", "fp8", "--out", "a.safetensors"], "dtype 'fp8' is unknown. Use fp16"),
        (["export", "{run}", "--format", "ckpt", "--out", "a.safetensors"], "layout 'ckpt' is unknown"),
        (["export", "{run}", "--out", "a.pt"], "layout 'kohya' is written as a file"),
        (["upload", "{run}", "nobody"], "names no repository on the Hub"),
    ],
)  # fmt: skip
def test_mistakes_with_a_run(settings, tmp_path, arguments, message):
    from lorakit import run

    run.start(settings, tmp_path / "run", say=lambda _: None, progress=False)
    done = CliRunner().invoke(app, [argument.replace("{run}", str(tmp_path / "run")) for argument in arguments])
    assert message in str(done.exception)


def test_pictures_are_checked_and_captioned_at_a_terminal(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (pictures / "2_sks thing" / "broken.png").write_bytes(b"not a picture")
    facts = json.loads(told("check", pictures, "--resolution", 64, "--trigger", "sks thing", "--json"))
    assert facts["pictures"] == 6 and [each["picture"] for each in facts["left_out"]] == ["2_sks thing/broken.png"]
    assert {"picture", "kind", "severity", "message"} == facts["findings"][0].keys()
    assert str(tmp_path) not in json.dumps(facts)
    assert "6 pictures" in told("check", pictures, "--resolution", 64)
    (tmp_path / "empty").mkdir()
    failed = CliRunner().invoke(app, ["check", str(tmp_path / "empty")])
    assert failed.exit_code and "has no picture to train on" in str(failed.exception)

    file = pictures / "2_sks thing" / "0.txt"
    assert "Nothing is written yet" in told("caption", "replace", pictures, "number", "no.")
    assert file.read_text() == "sks thing, number 0"
    assert "written   6 captions" in told("caption", "replace", pictures, "number", "no.", "--write")
    assert file.read_text() == "sks thing, no. 0\n"
    assert "undone    6 captions" in told("caption", "undo", pictures)
    assert file.read_text() == "sks thing, number 0"
    assert "sks" in told("caption", "audit", pictures, "--trigger", "sks thing")


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
    facts = json.loads(lorakit("check", source, "--trigger", "sks cat", "--json", cwd=tmp_path).stdout)
    assert (facts["pictures"], facts["per_epoch"], facts["resolution"]) == (5, 10, 512)
    (left_out,), (double,) = facts["left_out"], facts["to_look_at"]
    assert left_out["picture"] == "2_cat/cut.png" and "truncated" in left_out["reason"]
    assert double["picture"] == "2_cat/again.png" and "the same picture as 2_cat/0.png" in double["reason"]
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
    failed = CliRunner().invoke(app, ["check", str(source), "--max-side", "256"])
    assert failed.exit_code and "leave out the resolution 512" in str(failed.exception)


def test_a_check_fails_where_training_could_not_start(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"not a picture")
    (tmp_path / "none.zip").write_bytes(b"PK")
    for name in ("empty", "broken", "none.zip", "nowhere"):
        done = lorakit("check", name, "--json", cwd=tmp_path, expect=1)
        assert done.stdout == "" and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_frames_of_a_video(tmp_path):
    pytest.importorskip("av")
    from test_video import film, shapes

    clip = film(tmp_path / "clip.mp4", [shapes(number // 10) for number in range(30)])  # three scenes of a second
    assert f"done      3 pictures in {tmp_path / 'all'}\n" in told("frames", clip, tmp_path / "all")
    told("frames", clip, tmp_path / "scenes", "--scenes", "--suffix", ".jpg")
    assert sorted(path.suffix for path in (tmp_path / "scenes").iterdir()) == [".jpg"] * 3
    assert "1 pictures" in told("frames", clip, tmp_path / "few", "--every", 10)
    assert "--scenes" in told("frames", "--help")


def test_pictures_are_generated_and_none_twice(tmp_path):
    command = ["generate", "flatto style, cup", "--out", tmp_path, "--name", "cup", "--steps", 2, "--width", 48]
    said = told(*command, "--count", 2, "--seed", 5, "--repeats", 3)
    assert f"done      2 pictures in {tmp_path / '3_cup'}\n" in said
    made = sorted((tmp_path / "3_cup").glob("*.png"))
    assert [Image.open(path).size for path in made] == [(48, 64)] * 2
    before = [path.stat().st_mtime_ns for path in made]
    assert "done      3 pictures" in told(*command, "--count", 3, "--seed", 5, "--repeats", 3)
    assert [path.stat().st_mtime_ns for path in made] == before
    assert {path.read_text() for path in (tmp_path / "3_cup").glob("*.txt")} == {"flatto style, cup\n"}
    assert "--negative" in told("generate", "--help")


def test_a_preset_of_ones_own_is_kept_and_printed(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(settings.to_json())
    said = told("preset", "quick", "--save-from", tmp_path / "run")
    assert said.startswith("kept      quick in ") and "rank" in said and "trigger" not in said
    own = json.loads(told("preset", "quick", "sdxl", "--trigger", "sks", "--dataset", "d"))
    assert (own["rank"], own["trigger"], own["dataset"], own["name"]) == (4, "sks", "d", "my_quick_v1")
    assert own["base"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert json.loads(told("preset", "style", "sdxl"))["rank"] == 128
    halved = json.loads(told("preset", "style", "--quick"))
    assert (halved["steps"], halved["initialisation"], halved["schedule"]) == (1000, "eva", "cosine")
    failed = CliRunner().invoke(app, ["preset", "style", "--save-from", str(tmp_path / "run")])
    assert "built-in preset" in str(failed.exception)


def test_a_sweep_and_a_comparison_at_a_terminal(config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"steps": 2}))
    said = told("sweep", config_file, "schedule", "constant", "cosine", "--no-pictures")
    assert "schedule=cosine, 2 of 2" in said and "settings that differ" in said
    folder = tmp_path / "runs" / "thing-schedule"
    assert (folder / "comparison.html").is_file() and (folder / "schedule=cosine" / "checkpoints").is_dir()
    said = told("compare", folder, "--prompt", "a house", "--seed", 1, "--seed", 2, "--out", tmp_path / "out")
    assert "schedule" in said and f"look at {tmp_path / 'out' / 'comparison.html'}" in said
    facts = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert facts["pictures"]["asked"] == [["a house", 1], ["a house", 2]]
    assert facts["pictures"]["columns"] == ["base", "schedule=constant", "schedule=cosine"]
    for arguments, message in (
        (["sweep", config_file, "rank", "4", "0"], "rank=0: rank = 0"),
        (["sweep", config_file, "seed", "1"], "nothing to compare: give two"),
        (["compare", tmp_path / "nowhere"], "There is no folder"),
    ):
        failed = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert failed.exit_code and message in str(failed.exception)
