"""The programs in the documentation run as they stand there."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def photos(drawn, small_bases, tmp_path, monkeypatch):
    """A folder with `photos/`, where the style preset is a run of seconds on a small base."""
    from lorakit import presets
    from lorakit.storage import models

    shutil.copytree(drawn / "2_sks thing", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "fetch_from_hub", lambda *_: small_bases["sd15"])
    small = {"resolution": 64, "bucket_step": 64, "steps": 4, "rank": 4, "device": "cpu", "sample_steps": 2}
    preset = presets.preset
    monkeypatch.setattr(presets, "preset", lambda *names, **changes: preset(*names, **changes).with_(**small))
    return tmp_path


def test_the_readme_program_runs_as_it_stands(photos, capsys):
    (program,) = programs("README.md")
    names: dict = {}
    exec(program, names)
    assert capsys.readouterr().out.count("tensor(") == 4  # a line for each step
    assert (photos / "style.safetensors").is_file() and (photos / "runs" / "style" / "comparison.png").is_file()
    assert len(names["pictures"]) == 6 and names["run"].result.steps == 4


def test_a_loop_of_ones_own_runs_as_it_stands(photos, capsys):
    (program,) = programs("lorakit/README.md")
    exec(program, {})
    assert [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()] == [1, 2, 3, 4]
