"""A LoRA file may hold any bytes: it is read, or refused with a message that names it. The long form of the last test
is tests/bench/fuzz_lora.py; each fault that it found, and each that was looked for, has a test here."""

import copy
import json
import math
import os
import random
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from said import names, naming

from lorakit.adapter import attachment, injection, lora, proof
from lorakit.adapter import names as adapter_names
from lorakit.adapter import read as read_module
from lorakit.adapter.specs import LayerSpec
from lorakit.base import names as base_names

BENCH = Path(__file__).parents[1] / "bench"
NAME = "lora_unet_mid_block_attentions_0_proj_in"
MODULE = "mid_block.attentions.0.proj_in"
DOWN, UP = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "I8": 1, "BOOL": 1, "C64": 8, "F4": 0.5, "F6_E2M3": 0.75, "F8_E4M3": 1}


@pytest.fixture(scope="module")
def fuzz():
    """The fuzzer as a module."""
    sys.path.insert(0, str(BENCH))
    import fuzz_lora

    sys.path.remove(str(BENCH))
    return fuzz_lora


@pytest.fixture(scope="module")
def bare(fuzz):
    """A UNet and a text encoder of a few modules; `MODULE` is 8×8 in it."""
    return fuzz.models()


def raw(
    path: Path, tensors: dict[str, tuple[str, list]], metadata: dict | None = None, body: bytes | None = None
) -> Path:
    """A safetensors file of zeros, or of a body, whose header says what it is told to."""
    header, at = {} if metadata is None else {"__metadata__": metadata}, 0
    for key, (kind, shape) in tensors.items():
        size = int(math.prod(shape) * SIZES[kind])
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (bytes(at) if body is None else body))
    return path


def a_lora(path: Path, metadata: dict[str, str] | None = None, **more: torch.Tensor) -> Path:
    """A LoRA of rank 2 for one module; `more` by part."""
    tensors = {DOWN: torch.ones(2, 8), UP: torch.ones(8, 2)} | {f"{NAME}.{part}": t for part, t in more.items()}
    save_file(tensors, path, metadata)
    return path


def refused(path: Path, *named: object, error: type = ValueError, name: str = "") -> str:
    """The message, which names the path or, where given, another name."""
    with pytest.raises(error, match=naming(name or path.name, *named)) as raised:
        read_module.load(path)
    message = str(raised.value)
    assert raised.type is error and len(message) < 1000 and message.isprintable()
    return message


# ── What is no file, or too much of one ─────────────────────────────────────────────────────────────────────────────


def test_what_is_no_ordinary_file_is_not_waited_upon(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for read in (read_module.load, proof.describe_file):
        for path in (tmp_path / "pipe.safetensors", Path("/dev/zero"), tmp_path / "none.safetensors"):
            with pytest.raises(FileNotFoundError, match=naming(path.name)):
                read(path)
    refused(tmp_path / "folder.safetensors", "adapter_model.safetensors", error=FileNotFoundError)


def test_a_header_is_not_read_that_would_take_much_memory(tmp_path):
    path = tmp_path / "a.safetensors"
    text = b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(1_500_000)) + b"}}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    refused(path, f"{len(text):,}", "16,777,216")


def test_hostile_headers_take_no_memory(tmp_path):
    """In a process that may have 256 MB more than it had before."""
    huge, tall = 2**20, 2**12
    cases = {
        "lora": {DOWN: ("F16", [1, huge]), UP: ("F16", [huge, 1])},
        "loha": {f"{NAME}.hada_w{n}_{s}": ("F16", [huge, 1] if s == "a" else [1, huge]) for n in (1, 2) for s in "ab"},
        "lokr": {f"{NAME}.lokr_w{n}": ("F16", [tall, 64]) for n in (1, 2)},
        "lokr of four": {
            f"{NAME}.lokr_w{n}_{s}": ("F16", [tall, 1] if s == "a" else [1, tall]) for n in (1, 2) for s in "ab"
        },
        "none": {DOWN: ("F16", [2**63, 0]), UP: ("F16", [0, 2**62])},
    }  # fmt: skip
    for name, tensors in cases.items():
        raw(tmp_path / f"{name}.safetensors", tensors)
    for name, length in (("long", 2**60), ("longer", 2**63 + 1), ("cut", 99_999_999)):
        (tmp_path / f"{name}.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"' + b"a" * 1000)
    script = """
import resource, sys
from pathlib import Path
from lorakit import adapter
reads = (adapter.load, adapter.describe_file)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for path in sorted(Path(sys.argv[1]).iterdir()):
    for read in reads:
        try:
            read(path)
        except ValueError as error:
            assert path.name in str(error)
        else:
            raise AssertionError(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, cwd=Path.cwd())
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("start", [8, 2**20])
def test_tensors_that_overlap_or_leave_gaps(tmp_path, start):
    header = {key: {"dtype": "F32", "shape": [4, 4], "data_offsets": [start, start + 64]} for key in (DOWN, UP)}
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(128))
    refused(tmp_path / "a.safetensors", (tmp_path / "a.safetensors").stat().st_size)


# ── Tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "tensors, named",
    [
        ({DOWN: ("F32", [2**63, 0]), UP: ("F32", [4, 4])}, (DOWN, "[9223372036854775808, 0]")),
        ({DOWN: ("F32", [0, 8]), UP: ("F32", [8, 0])}, (DOWN, "[0, 8]")),
        ({DOWN: ("F32", [2, 8, 1]), UP: ("F32", [8, 2, 1])}, (DOWN, "[2, 8, 1]")),
        ({DOWN: ("F32", [1] * 3000), UP: ("F32", [1] * 3000)}, (DOWN, "[1, 1, 1")),
        ({DOWN: ("F32", [2, 8]), UP: ("F32", [8, 3])}, (MODULE, "(8, 3)", "(2, 8)")),
        ({DOWN: ("F16", [1, 2**20]), UP: ("F16", [2**20, 1])}, (MODULE, "1,048,576 × 1,048,576")),
        ({f"{NAME}.lokr_w{n}": ("F32", [90, 90]) for n in (1, 2)}, (MODULE, "8,100 × 8,100")),
        ({f"{NAME}.hada_w{n}_{s}": ("F32", []) for n in (1, 2) for s in "ab"}, (f"{NAME}.hada_w1_a", "[]")),
        (
            {f"{NAME}.hada_w{n}_{s}": ("F32", [2, 2, 1, 1]) for n in (1, 2) for s in "ab"},
            (f"{NAME}.hada_w1_a", "[2, 2, 1, 1]"),
        ),
        ({f"{NAME}.lokr_w1": ("F32", [2]), f"{NAME}.lokr_w2": ("F32", [2, 2])}, (f"{NAME}.lokr_w1", "[2]")),
    ],
)  # fmt: skip
def test_sizes_that_no_weight_has(tmp_path, tensors, named):
    """Of no dimensions was an IndexError, of 2⁶³ a TypeError, of four in a LoHa one that could not be multiplied."""
    refused(raw(tmp_path / "a.safetensors", tensors), *named)


def test_the_largest_weights_are_read(tmp_path):
    tensors = {UP: torch.ones(1280, 1, 1, 1), DOWN: torch.ones(1, 2560, 3, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert read_module.load(tmp_path / "a.safetensors").sizes[MODULE] == (1280, 23040)


@pytest.mark.parametrize("kind", ["I64", "I8", "BOOL", "C64", "F4", "F6_E2M3"])
def test_numbers_that_are_no_weights(tmp_path, kind):
    path = raw(tmp_path / "a.safetensors", {DOWN: (kind, [2, 8]), UP: (kind, [8, 2])})
    message = refused(path)
    older = f"{path.stat().st_size:,}" in message  # a safetensors that does not know them
    assert older or names(message, DOWN, kind, "float16")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.bfloat16])
def test_weights_of_every_precision(tmp_path, bare, fuzz, dtype):
    path = a_lora(tmp_path / "a.safetensors", alpha=torch.tensor(1.0).to(dtype))
    save_file({key: tensor.to(dtype) for key, tensor in lora_tensors(path).items()}, path)
    read = read_module.load(path)
    assert {tensor.dtype for tensor in read.parts[MODULE].values()} == {dtype} and read.modules[MODULE][1] == 1.0
    adapter = attachment.attach(models := copy.deepcopy(bare), fuzz.a_base(), read)
    assert torch.equal(adapter.layers[MODULE].delta().flatten(1), torch.ones(8, 8))
    models["unet"](torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 12))
    assert proof.describe_file(path)["dtype"] == [str(dtype).removeprefix("torch.")]


def lora_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {
        f"{NAME}.{adapter_names.KOHYA[part]}": tensor for part, tensor in read_module.load(path).parts[MODULE].items()
    } | {f"{NAME}.alpha": torch.tensor(read_module.load(path).modules[MODULE][1])}


def test_overlong_names_that_would_steer_a_terminal(tmp_path):
    """One came into the message by way of the library's own."""
    for name in ("a" * 100_000, "\x1b[31mred", "‮abc", "." * 5000, "\n"):
        path = raw(tmp_path / "a.safetensors", {f"unet.{name}.lora_A.weight": ("F32", [2, 8])})
        assert refused(path, 1) != refused(raw(path, {f"{name}.weight": ("F32", [2, 8])}), 1)
        refused(raw(path, {f"{name}.weight": ("F32", [2, 8])}, body=b""), f"{path.stat().st_size:,}")


@pytest.mark.parametrize(
    "other", ["unet.mid_block.attentions.0.proj_in", "lora_unet_middle_block_1_proj_in", f"base_model.model.{MODULE}"]
)
def test_a_module_under_two_names(tmp_path, other):
    suffixes = ("lora_A", "lora_B") if "." in other else ("lora_down", "lora_up")
    again = {
        f"{other}.{suffix}.weight": ("F32", shape) for suffix, shape in zip(suffixes, ([2, 8], [8, 2]), strict=True)
    }
    path = raw(tmp_path / "a.safetensors", {DOWN: ("F32", [2, 8]), UP: ("F32", [8, 2])} | again)
    message = refused(path, 2)
    assert any(key in message for key in (DOWN, UP, *again))


@pytest.mark.parametrize(
    "stem", ["lora_te7_text_model_encoder_layers_0_mlp_fc1", "lora_te_text_model_encoder_layers_٣_mlp_fc1",
             "lora_te_text_model_encoder_layers_1000_mlp_fc1", "lora_te1_text_projection"],
)  # fmt: skip
def test_what_only_looks_like_a_text_encoders_layer(tmp_path, stem):
    """An eighth text encoder, a layer of Arabic numbers, the 1000th, and a projection that the first one lacks."""
    path = a_lora(tmp_path / "a.safetensors")
    save_file(lora_tensors(path) | {f"{stem}.alpha": torch.tensor(1.0)}, path)
    refused(path, 1)


def test_a_second_text_encoder_is_sdxls_alone():
    """Under another family's name it was a KeyError."""
    assert adapter_names.kohya_name("text_encoder_2.encoder.layers.0.mlp.fc1", "sdxl").startswith("lora_te2_")
    with pytest.raises(ValueError, match=naming("text_encoder_2.encoder.layers.0.mlp.fc1")):
        adapter_names.kohya_name("text_encoder_2.encoder.layers.0.mlp.fc1", "sd15")


def test_lengths_for_other_columns(tmp_path):
    refused(a_lora(tmp_path / "a.safetensors", dora_scale=torch.ones(1, 5)), MODULE, 8)


# ── Alpha ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "alpha, expected",
    [
        (torch.tensor(-4.0), -4),  # turns the LoRA round, on purpose
        (torch.tensor(0.0), 0),
        (torch.tensor(4), 4),  # as a program that counts writes it
        (torch.tensor([4.0]), 4),
        (torch.tensor([[3]], dtype=torch.uint8), 3),
    ],
)
def test_alphas_of_every_form(tmp_path, bare, fuzz, alpha, expected):
    read = read_module.load(a_lora(tmp_path / "a.safetensors", alpha=alpha))
    assert read.modules[MODULE][1] == expected and isinstance(read.modules[MODULE][1], float)
    adapter = attachment.attach(copy.deepcopy(bare), fuzz.a_base(), read)
    assert torch.equal(adapter.layers[MODULE].delta().flatten(1), torch.full((8, 8), float(expected)))


@pytest.mark.parametrize(
    "alpha, error, named",
    [
        (torch.tensor(math.nan), FloatingPointError, (1, "alpha")),
        (torch.tensor(-math.inf), FloatingPointError, (1, "alpha")),
        (torch.tensor(1e300, dtype=torch.float64), FloatingPointError, (1, "alpha")),
        (torch.empty(0), ValueError, (f"{NAME}.alpha", "[0]")),
        (torch.tensor([4.0, 4.0]), ValueError, (f"{NAME}.alpha", "[2]")),
        (torch.tensor(True), ValueError, (f"{NAME}.alpha", "BOOL")),
    ],
)
def test_alphas_that_are_none(tmp_path, alpha, error, named):
    refused(a_lora(tmp_path / "a.safetensors", alpha=alpha), *named, error=error)


# ── PEFT's settings ─────────────────────────────────────────────────────────────────────────────────────────────────

DEEP, LONG = "[" * 100_000, "9" * 5000
BAD_SETTINGS = {
    "": ("char 0",), "{": ("char 1",), DEEP: (), '{"a":' * 5000: (),
    '{"lora_alpha": ' + LONG + "}": (), "[]": (), "null": (), '"{}"': (), '{"lora_alpha": NaN}': ("alpha",),
    '{"lora_alpha": 1e400}': ("alpha",), '{"lora_alpha": ' + LONG[:400] + "}": ("alpha",),
    '{"lora_alpha": "4"}': ("alpha",), '{"lora_alpha": true}': ("alpha",),
    '{"lora_alpha": ' + DEEP[:900] + "]" * 900 + "}": ("alpha",), '{"alpha_pattern": {"proj_in": {}}}': ("alpha",),
    '{"alpha_pattern": [3]}': ("alpha_pattern",), '{"alpha_pattern": {"(a+)+$": 4}}': ("(a+)+$", "alpha_pattern"),
    '{"alpha_pattern": {"[": 4}}': ("[", "alpha_pattern"), '{"alpha_pattern": {"": 4}}': ("alpha_pattern",),
    '{"alpha_pattern": {"\\u001b[2J": 4}}': ("\\x1b[2J", "alpha_pattern"), '{"use_dora": true}': ("DoRA",),
}  # fmt: skip


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=lambda text: text[:40])
def test_settings_that_are_none(tmp_path, settings):
    """In a file's metadata, where diffusers keeps them, and beside PEFT's file."""
    refused(a_lora(tmp_path / "a.safetensors", {"lora_adapter_metadata": settings}), *BAD_SETTINGS[settings])
    a_lora(tmp_path / read_module.PEFT)
    (tmp_path / "adapter_config.json").write_text(settings)
    for path in (tmp_path, tmp_path / read_module.PEFT):
        with pytest.raises(ValueError, match=naming(*BAD_SETTINGS[settings])) as raised:
            read_module.load(path)
        assert names(str(raised.value), "adapter_config.json") or names(str(raised.value), read_module.PEFT)


@pytest.mark.parametrize(
    "settings, alpha",
    [
        ({}, 2),
        ({"lora_alpha": 5}, 5),
        ({"alpha": 5}, 5),  # of LoHa and LoKr
        ({"r": "x", "lora_alpha": -5.5, "target_modules": 3}, -5.5),
        ({"lora_alpha": 5, "alpha_pattern": None}, 5),
        ({"lora_alpha": 5, "alpha_pattern": {MODULE: 7}}, 7),
        ({"lora_alpha": 5, "alpha_pattern": {"proj_in": 7, MODULE: 9}}, 7),  # the first that fits counts
        ({"lora_alpha": 5, "alpha_pattern": {"roj_in": 7, "proj_out": 8}}, 5),
        ({"lora_alpha": 5, "alpha_pattern": {r"^mid_block\.attentions\.0\.proj_in$": 7}}, 7),
        ({"lora_alpha": 5, "alpha_pattern": {"x" * 10_000: 7, "a." * 5000: 8}}, 5),
        ({"lora_alpha": 5, "use_rslora": True}, 5 * math.sqrt(2)),
        ({"use_rslora": True, "alpha_pattern": {"proj_in": 7}}, 7 * math.sqrt(2)),
        ({"lora_alpha": 5, "rank_pattern": {"proj_in": 64}}, 5),
    ],
)
def test_alphas_as_peft_says_them(tmp_path, settings, alpha):
    of_diffusers = {f"unet.{key}": value for key, value in settings.items()} | {"text_encoder.lora_alpha": 99}
    for said in (settings, of_diffusers):
        read = read_module.load(
            a_lora(tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(said), "x": "y"})
        )
        assert read.modules[MODULE][1] == pytest.approx(alpha)
        assert read.metadata == {"x": "y"}  # what is known now need not be said to the next reader
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    a_lora(tmp_path / read_module.PEFT)
    assert read_module.load(tmp_path).modules[MODULE][1] == pytest.approx(alpha)


def test_peft_takes_the_same_alphas():
    """The rule above is PEFT's own."""
    from peft.utils.other import get_pattern_key

    patterns = {"proj_in": 7, MODULE: 9, r"^up_blocks\.0\.attentions\.0\.proj_out$": 8}
    alpha_of = read_module._alphas({"lora_alpha": 5, "alpha_pattern": patterns}, "unet", "a file")
    for module in (MODULE, "up_blocks.0.attentions.0.proj_out", "down_blocks.0.attentions.0.proj_out"):
        assert alpha_of(module, 4) == patterns.get(get_pattern_key(patterns, module), 5)


def test_settings_are_read_once(tmp_path, monkeypatch):
    """They were parsed again for every module, and every pattern compared with every name."""
    modules = [path for path in base_names.adaptable() if "transformer_blocks" in path][:700]
    tensors = {f"unet.{path}.lora_{side}.weight": ("F32", [1, 1]) for path in modules for side in "AB"}
    said = {"lora_alpha": 1, "alpha_pattern": {path: n for n, path in enumerate(modules)}}
    path = raw(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(said)})
    parsed, loads = [], json.loads
    monkeypatch.setattr(read_module.json, "loads", lambda text: parsed.append(text) or loads(text))
    read = read_module.load(path)
    assert [read.modules[module][1] for module in modules] == list(range(700)) and len(parsed) == 1


# ── Folders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_of_two_text_encoders_without_metadata(tmp_path):
    """CLIP-L alone is taken for SD 1.5's: it was said that the folder holds two families."""
    for which, name, width in [
        ("unet", "mid_block.attentions.0.transformer_blocks.9.attn1.to_q", 16),
        ("text_encoder", "encoder.layers.0.self_attn.q_proj", 768),
        ("text_encoder_2", "text_model.encoder.layers.0.self_attn.q_proj", 1280),
    ]:
        (tmp_path / which).mkdir()
        tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(2, width)}
        tensors |= {f"base_model.model.{name}.lora_B.weight": torch.ones(width, 2)}
        save_file(tensors, tmp_path / which / read_module.PEFT)
    read = read_module.load(tmp_path)
    assert read.family == "sdxl" and read.adapts == ("text_encoder", "text_encoder_2", "unet")
    assert read_module.load(tmp_path / "text_encoder").family == "sd15"


def test_folders_that_hold_none(tmp_path):
    folder = tmp_path / "lora"
    (folder / "unet").mkdir(parents=True)
    nothing = refused(folder, read_module.PEFT, "pytorch_lora_weights.safetensors", error=FileNotFoundError)
    (folder / "unet" / "adapter_model.bin").write_bytes(b"\x80\2}.")
    assert "adapter_model.bin" not in nothing
    refused(folder, "adapter_model.bin", error=FileNotFoundError)
    for place in (folder, folder / "unet"):
        a_lora(place / read_module.PEFT)
    refused(folder, MODULE)
    (folder / read_module.PEFT).unlink()
    with (folder / "unet" / "adapter_config.json").open("wb") as stream:
        stream.truncate(2**34)  # takes no room on the disk
    refused(folder, name="unet/adapter_config.json")


# ── Into models ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_several_algorithms_in_one_file(tmp_path, bare, fuzz):
    """A LoRA among LoKrs was an AttributeError halfway through a model."""
    path = a_lora(tmp_path / "a.safetensors")
    names = [f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{x}" for x in "qk"]
    save_file(lora_tensors(path) | {f"{name}.lokr_w{n}": torch.ones(2, 4) for name in names for n in (1, 2)}, path)
    read = read_module.load(path)
    assert read.algorithm == "lokr" and len(read.modules) == 3
    models = copy.deepcopy(bare)
    with pytest.raises(ValueError, match=naming("a.safetensors", "lokr", "lora")):
        attachment.attach(models, fuzz.a_base(), read)
    assert models["unet"].state_dict().keys() == bare["unet"].state_dict().keys()


def test_going_on_from_a_file_for_a_wider_base_names_it(tmp_path, bare, fuzz):
    tensors = {DOWN: torch.ones(2, 5), UP: torch.ones(8, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = injection.inject(copy.deepcopy(bare), {MODULE: LayerSpec("lora", 2, 2.0)})
    before = adapter.state()[f"{MODULE}.down"].clone()
    with pytest.raises(ValueError, match=naming("a.safetensors", 1, f"{MODULE}.down")):
        attachment.copy_weights(adapter, fuzz.a_base(), tmp_path / "a.safetensors")
    assert torch.equal(adapter.state()[f"{MODULE}.down"], before)


@pytest.mark.parametrize("record", ["", "[]", "{", DEEP, "3"])
def test_a_checkpoints_record_that_is_none(tmp_path, record):
    path = a_lora(tmp_path / "a.safetensors", {"lorakit": record} if record else {"lorakit": "nothing"})
    with pytest.raises(ValueError, match=naming("a.safetensors")):
        proof.describe_file(path)
    assert proof.describe_file(a_lora(path, {"lorakit": '{"step": 3}'})) == {
        "file": "a.safetensors", "bytes": path.stat().st_size, "kind": "checkpoint", "steps": 3, "settings": None,
    }  # fmt: skip


# ── Anything ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_damaged_files_are_read_or_refused(fuzz, tmp_path):
    """Two seconds of the fuzzer."""
    reader = fuzz.Reader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and torch's, of numbers that no one has written
        examples = fuzz.examples(reader.bare, tmp_path / "examples")
        assert {name.partition(" ")[0] for name in examples} == {"lora", "dora", "loha", "lokr"} and len(examples) == 18
        outcomes = set()
        for number in range(150):
            _, _, path, family = fuzz.case(number, 7, examples, tmp_path / "case")
            outcomes.add(reader.outcome(path, family))
    assert outcomes >= {"ValueError", "FloatingPointError", "written again"}


def test_every_byte_of_a_small_file_may_be_any(tmp_path):
    path = a_lora(tmp_path / "a.safetensors", {"lora_adapter_metadata": '{"lora_alpha": 4}'}, alpha=torch.tensor(1.0))
    whole, chance = path.read_bytes(), random.Random(0)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + struct.pack("B", chance.randrange(256)) + whole[at + 1 :])
        try:
            assert isinstance(read_module.load(path), lora.Lora)
        except (ValueError, FloatingPointError) as error:
            assert "a.safetensors" in str(error)
