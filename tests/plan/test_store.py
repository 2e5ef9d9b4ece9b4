"""Predictions that are kept: found again for the same question, never for another one."""

import typing
from pathlib import Path

import pytest
import torch
from test_memory import make_base
from test_planning import GIB, made_up, quick  # noqa: F401

from lorakit.base import model as bases
from lorakit.config import Config
from lorakit.plan import memory
from lorakit.plan import store as stores

STEP = {"size": (512, 512), "dtype": torch.float16, "device": "cuda"}


def test_an_answer_is_kept_and_found_again(quick, tmp_path):  # noqa: F811
    base, config = bases.known("sd15"), Config(steps=100)
    ask = lambda config: stores.step_cost(base, config, **STEP, store=tmp_path)  # noqa: E731
    first = ask(config)
    assert ask(config.with_(steps=7, seed=3)) == first and made_up.calls == 1  # neither takes memory
    ask(config.with_(rank=8))
    assert made_up.calls == 2
    for text in ("{", "{}", "[]", '{"size": 3}'):  # damaged
        for file in tmp_path.iterdir():
            file.write_text(text)
        made_up.calls = 0
        assert ask(config) == first and made_up.calls == 1


def test_predictions_work_where_nothing_can_be_kept(quick, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    answer = stores.step_cost(bases.known("sd15"), Config(steps=1), **STEP, store=tmp_path / "file")
    assert answer.peak > GIB


def test_what_is_adapted_decides_which_prediction_is_kept(quick, tmp_path):  # noqa: F811
    base, config = bases.known("sd15"), Config(steps=1)
    kinds = [
        {}, {"algorithm": "loha"}, {"algorithm": "lokr"}, {"algorithm": "lokr", "lokr_factor": 4}, {"clip_skip": 2},
        {"text_encoder_rate": 1e-4}, {"text_encoder_rate": 1e-4, "train_unet": False}, {"batch_size": 4},
        {"batch_size": 4, "micro_batch_size": 2},
    ]  # fmt: skip
    for _ in range(2):
        for changes in kinds:
            stores.step_cost(base, config.with_(**changes), **STEP, store=tmp_path)
        assert made_up.calls == len(kinds)


# ── The key ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CONFIG = Config(
    steps=10, rank=8, alpha=8, schedule="cosine", text_encoder_rate=1e-4, prior_prediction=True, trigger="sks",
    class_word="cat", sample_prompts=("a",), warmup_steps=2,
)  # fmt: skip


def another(name: str):
    """Another value of a setting, of the same type; the whole need not be valid."""
    value, annotation = getattr(CONFIG, name), Config.model_fields[name].annotation
    if isinstance(value, bool | dict | tuple):
        return {bool: not value, dict: {"mid_block": 3}, tuple: ("other",)}[type(value)]
    kind, *more = [kind for kind in typing.get_args(annotation) if kind is not type(None)] or [annotation]
    if typing.get_origin(kind) is typing.Literal:
        kind, *more = typing.get_args(kind)
    if kind in (int, float):
        return kind((value or 0) + 1)
    return "other" if kind is str else next(word for word in (kind, *more) if word != value)


def key(config: Config, base: bases.Base | None = None, **changes) -> str:
    step = {"size": (64, 64), "dtype": torch.float32, "device": "cpu"} | changes
    return stores._key(base or make_base("small sd15"), config, **step)


@pytest.mark.parametrize("name", Config.model_fields)
def test_each_setting_is_in_the_key_or_changes_nothing(name):
    changed = CONFIG.model_copy(update={name: another(name)})
    assert changed != CONFIG
    assert (key(changed) == key(CONFIG)) == (name in stores.UNRELATED)


def test_settings_outside_the_key_change_no_prediction():
    """All of them at once: a prediction takes half a second."""
    changed = CONFIG.model_copy(update={name: another(name) for name in stores.UNRELATED})
    assert Config.model_fields.keys() >= stores.UNRELATED and key(changed) == key(CONFIG)
    before, after = (
        memory.count_step(make_base("small sd15"), config, size=(64, 64), dtype=torch.float32, device="cpu")
        for config in (CONFIG, changed)
    )
    assert {**vars(after), "seconds": 0} == {**vars(before), "seconds": 0}


def test_base_step_versions_and_code_are_in_the_key(monkeypatch):
    base = make_base("small sd15")
    others = [
        key(CONFIG, make_base("demo")), key(CONFIG, size=(64, 128)), key(CONFIG, dtype=torch.float16),
        key(CONFIG, device="cuda"),
        key(CONFIG, bases.replace(base, configs=base.configs | {"scheduler": {"prediction_type": "v_prediction"}})),
    ]  # fmt: skip
    version = stores.version
    for package in stores.PACKAGES:
        with monkeypatch.context() as patch:
            patch.setattr(stores, "find_spec", lambda _: True)
            patch.setattr(stores, "version", lambda name, of=package: "0" if name == of else version(name))
            others.append(key(CONFIG))
    with monkeypatch.context() as patch:
        patch.setattr(stores, "_code", lambda: "other")
        others.append(key(CONFIG))
    assert len({key(CONFIG), *others}) == 1 + len(others)


def test_code_means_all_files_of_its_folders(monkeypatch):
    read, files = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: files.append(path) or read(path))
    stores._code.__wrapped__()
    root = Path(stores.__file__).parents[1]
    names = {file.relative_to(root).as_posix() for file in files}
    assert {"device.py", "config.py", "plan/memory.py", "adapter/layers.py", "base/model.py", "train/loss.py"} <= names
