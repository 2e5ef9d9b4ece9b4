"""Cards by name, and the free memory of this machine."""

import pytest
import torch
from said import naming

from lorakit.plan import cards


def test_a_card_is_known_by_name():
    assert cards.card("T4").dtype() == torch.float16 and cards.card("A100").dtype() == torch.bfloat16
    assert cards.card("A100").dtype("no") == torch.float32 and cards.card("A100").dtype("fp16") == torch.float16
    with pytest.raises(ValueError, match=naming("T5", *cards.CARDS)):
        cards.card("T5")
    for name in ("t4", "Tesla T4", "RTX 4090", "rtx-4090", "NVIDIA GeForce RTX 3060", "a100"):
        assert cards.card(name) in cards.CARDS.values()


def test_the_device_that_trains_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(cards, "free_memory_bytes", lambda _: 3 * 2**30)
    local = cards.local_card()
    assert (local.device, local.free, local.tflops, local.dtype()) == ("cpu", 3 * 2**30, 0, torch.float32)
    monkeypatch.setattr(cards, "free_memory_bytes", lambda _: None)
    assert cards.local_card().free is None
    with pytest.raises(ValueError, match=naming("cuda")):
        cards.local_card("cuda")


@pytest.mark.parametrize(
    ("name", "capability", "rate", "dtype"),
    [
        ("Tesla T4", (7, 5), 65, torch.float16),
        ("NVIDIA H200", (9, 0), 0, torch.bfloat16),
        ("NVIDIA GeForce GTX 1080", (6, 1), 0, torch.float16),
    ],
)
def test_an_nvidia_card_here_has_the_tables_rate_and_its_own_memory(monkeypatch, name, capability, rate, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * 2**30)
    local = cards.local_card()
    assert local == cards.this_machine() and (local.name, local.tflops, local.device) == (name, rate, "cuda")
    assert local.free == 11 * 2**30 and local.dtype() == dtype and local.dtype("no") == torch.float32


def test_free_memory_of_this_machine():
    free = cards.free_memory_bytes("cpu")
    assert free is None or 2**20 < free < 2**50


def test_a_container_may_have_less_than_the_machine(tmp_path):
    def write(folder, **files):
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("_dot_", ".")).write_text(text)

    assert cards._container_limits(tmp_path) == []
    write(
        tmp_path / "memory", memory_dot_limit_in_bytes="5000\n", memory_dot_usage_in_bytes="3000\n",
        memory_dot_stat="inactive_file 7\ntotal_inactive_file 500\n",
    )  # fmt: skip
    assert cards._container_limits(tmp_path) == [2500]
    write(tmp_path, memory_dot_max="4000\n", memory_dot_current="3000\n", memory_dot_stat="anon 1\ninactive_file 300\n")
    assert cards._container_limits(tmp_path) == [1300]
    write(tmp_path, memory_dot_max="max\n")
    assert cards._container_limits(tmp_path) == [2500]
