import errno
import json

import pytest
import torch
from conftest import run_settings
from killing import OF_8_BITS, has_8_bits
from loops import begin, prepared
from said import line, naming

from lorakit.run import checkpoint
from lorakit.train import loop as loop_module
from lorakit.train import optimizers


@pytest.fixture(scope="module")
def ready(small_bases, drawn, tmp_path_factory):
    """The run of `settings`, prepared once."""
    return prepared(run_settings(small_bases["sd15"], drawn), tmp_path_factory.mktemp("ready"))


@pytest.mark.parametrize("optimizer", [*optimizers.OPTIMIZERS, "adamw with ema"])
def test_a_resumed_run_ends_bit_identical(settings, ready, tmp_path, optimizer):
    changes = {
        "prodigy": {"learning_rate": 1.0}, "adamw_schedulefree": {"schedule": "constant_with_warmup"},
        "adamw with ema": {"optimizer": "adamw", "ema_decay": 0.9},
    }.get(optimizer, {})  # fmt: skip
    bits = "8bit" in optimizer
    settings = settings.with_(
        steps=6, caption_dropout=0.3, warmup_steps=2, rank=OF_8_BITS if bits else 4,
        **{"optimizer": optimizer, "schedule": "cosine"} | changes,
    )  # fmt: skip
    _, whole, loop = begin(settings, ready)
    losses = [float(step.loss) for step in loop_module.drain(loop)]
    saved = {}
    _, first, loop = begin(settings, ready)
    for step in loop:
        if step.number in (1, 4):
            path = checkpoint.save(tmp_path / checkpoint.name(step.number), first, {"rank": 4})
            saved[step.number] = checkpoint.read(path)
        if step.number == 4:
            break
    assert has_8_bits(saved[4]) == bits
    for cut, found in saved.items():
        _, second, loop = begin(settings.with_(seed=settings.seed), ready)
        checkpoint.restore(second, found)
        rest = loop_module.drain(loop)
        assert [s.number for s in rest] == list(range(cut + 1, 7))
        assert [float(s.loss) for s in rest] == losses[cut:]
        for a, b in zip(whole.adapter.parameters(), second.adapter.parameters(), strict=True):
            assert torch.equal(a, b)
        with whole.evaluated(), second.evaluated():
            for a, b in zip(whole.adapter.parameters(), second.adapter.parameters(), strict=True):
                assert torch.equal(a, b)


def test_any_flipped_or_missing_byte_is_noticed(settings, ready, tmp_path):
    _, state, loop = begin(settings, ready)
    next(loop)
    path = checkpoint.save(tmp_path / "step-000001.safetensors", state, {"rank": 4})
    good = path.read_bytes()
    random = torch.Generator().manual_seed(0)
    for _ in range(40):
        at = int(torch.randint(len(good), (1,), generator=random))
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(ValueError, match=naming("step-000001.safetensors")):
            checkpoint.read(path)
        path.write_bytes(good[:at])
        with pytest.raises(ValueError, match=naming("step-000001.safetensors")):
            checkpoint.read(path)
    path.write_bytes(good)
    assert checkpoint.read(path).step == 1


def test_the_newest_sound_one_is_taken_and_the_others_are_told(settings, ready, tmp_path):
    _, state, loop = begin(settings, ready)
    for _ in range(3):
        step = next(loop)
        checkpoint.save(tmp_path / checkpoint.name(step.number), state, {})
    damaged = tmp_path / checkpoint.name(3)
    damaged.write_bytes(damaged.read_bytes()[:-8])
    told = []
    assert checkpoint.newest(tmp_path, told.append).step == 2
    assert len(told) == 1 and line(told, "step-000003.safetensors")
    assert checkpoint.newest(tmp_path / "none") is None


def test_a_full_disk_leaves_nothing_half_written(settings, ready, tmp_path, monkeypatch):
    _, state, _ = begin(settings, ready)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError) as error:
        checkpoint.save(tmp_path / "out" / "step-000001.safetensors", state, {})
    assert error.value.errno == errno.ENOSPC
    assert list((tmp_path / "out").iterdir()) == []


def test_settings_and_step_are_readable_by_anyone(settings, ready, tmp_path):
    from safetensors import safe_open

    _, state, loop = begin(settings, ready)
    next(loop)
    path = checkpoint.save(tmp_path / "a.safetensors", state, {"rank": 4})
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["lorakit"])
    assert (facts["step"], facts["settings"]) == (1, {"rank": 4})


def test_other_files_are_no_checkpoints(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=naming("other.safetensors")):
        checkpoint.read(tmp_path / "other.safetensors")
    assert not checkpoint.is_one(tmp_path / "other.safetensors")


def test_every_saves_in_its_rhythm_and_at_the_end(settings, ready, tmp_path):
    _, state, loop = begin(settings.with_(steps=5), ready)
    saved, now = [], iter(range(0, 10_000, 100))  # seconds: 100 pass between any two looks
    loop_module.drain(
        loop, checkpoint.every(4, 3, lambda regular: saved.append((state.step, regular)), lambda: next(now))
    )
    assert saved == [(2, False), (4, True), (5, True)]
    _, state, loop = begin(settings.with_(steps=5), ready)
    saved = []
    loop_module.drain(loop, checkpoint.every(2, 0, lambda regular: saved.append((state.step, regular))))
    assert saved == [(2, True), (4, True), (5, True)]
