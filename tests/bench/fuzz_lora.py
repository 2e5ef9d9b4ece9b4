"""Feed the reader of LoRA files what nobody should have written, and see that it reads or refuses, and nothing else.

    python tests/bench/fuzz_lora.py --seconds 600 --seed 0

Valid files of every layout and algorithm are damaged with a sense for their structure: bytes, sizes, dtypes, offsets,
names, metadata, PEFT's settings; some files are put together at random. Each is loaded, described, put into a small
UNet and text encoder that are run and got back, begun from, and written again. A fault is an exception other than
ValueError, FloatingPointError and FileNotFoundError, a message that does not name the file or cannot be shown, a call
of more than SECONDS, more than MEMORY bytes taken, or models that are not as they were before. Its files are kept in
artefacts/fuzz_lora/. Cases depend on the seed and their number alone.
"""

import argparse
import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import safetensors
import torch

from lorakit.adapter import algorithms, attachment, injection, proof, specs, targets, write
from lorakit.adapter import names as adapter_names
from lorakit.adapter import read as read_module
from lorakit.base.model import Base

SECONDS, MEMORY = 5, 2**29
REFUSALS = (ValueError, FloatingPointError, FileNotFoundError)
KINDS = {
    "lora": {}, "dora": {"algorithm": "dora"}, "loha": {"algorithm": "loha"}, "lokr": {"algorithm": "lokr", "rank": 1},
    "lokr of four": {"algorithm": "lokr", "rank": 1, "decompose_both": True},
    "lokr of two": {"algorithm": "lokr", "rank": 64},
}  # fmt: skip
Files = dict[str, bytes]  # path within a folder -> contents


# ── What is damaged ─────────────────────────────────────────────────────────────────────────────────────────────────


def models() -> dict[str, torch.nn.Module]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=20, bos_token_id=18, eos_token_id=19, **small)
    return {"unet": unet, "text_encoder": CLIPTextModel(text)}


def a_base(family: str = "sd15") -> Base:
    return Base(Path("nowhere"), "somebody/small", family, {"scheduler": {"prediction_type": "epsilon"}})


def examples(bare: dict[str, torch.nn.Module], folder: Path) -> dict[str, Files]:
    """Valid files by what they are: each algorithm in each layout that has a place for it."""
    names = targets.target_names(bare["unet"], "attention+conv") + targets.text_names(bare["text_encoder"])
    few = [name for name in names if name.startswith(("mid_block", "text_encoder")) or "samplers" in name]
    found = {}
    for kind, given in KINDS.items():
        adapter = injection.inject(
            copy.deepcopy(bare),
            dict.fromkeys(few, specs.LayerSpec(**{"algorithm": "lora", "rank": 2, "alpha": 3.0} | given)),
        )
        for weight in adapter.parameters():
            weight.data = 0.3 * torch.randn(weight.shape)
        for layout, family in (("kohya", "sd15"), ("kohya", "sdxl"), ("diffusers", "sd15"), ("peft", "sd15")):
            if adapter.algorithm in write.LAYOUTS[layout]:
                name = f"{kind} {layout} {family}"
                path = folder / name / ("lora" if layout == "peft" else "a.safetensors")
                write.save_adapter(adapter, a_base(family), path, dtype=torch.float32, layout=layout)
                place = path if layout == "peft" else path.parent
                files = [file for file in place.rglob("*") if file.is_file()]
                found[name] = {file.relative_to(place).as_posix(): file.read_bytes() for file in files}
    return found


# ── How ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

COUNTS = (
    0, 1, 2, 3, 7, 12, 2**20, 2**31 - 1, 2**32, 2**53, 2**62, 2**63, 2**64 - 1, 2**64, -1, 1.5, True, None, "4", [],
)  # fmt: skip
DTYPES = {
    "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "I64": 8, "I8": 1,
    "U8": 1, "U64": 8, "BOOL": 1, "C64": 8, "F6_E2M3": 0.75, "Q4": 1,
}  # fmt: skip
TEXTS = (
    "", "\0", "\x1b[31mred\x1b[0m", "é" * 50, "٣", "." * 3000, "a." * 3000, "lora_unet_", "__metadata__", "‮abc", "\n",
    "text_encoder", "lora_te_", "a" * 100_000, "../../etc/passwd", "%s{0}{x}", "\U0001f600", "bundle_emb.x",
)  # fmt: skip
MODULES = {  # how files call a module -> outputs and inputs of the one in the small models, where there is one
    "lora_unet_mid_block_attentions_0_proj_in": (8, 8), "unet.mid_block.attentions.0.proj_in": (8, 8), "none": (8, 8),
    "lora_unet_middle_block_1_proj_in": (8, 8), "base_model.model.conv_in": (4, 36), "lora_unet_conv_in": (4, 36),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (12, 8), "lora_te2_text_model_encoder_layers_0_mlp_fc1": (12, 8),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8), "encoder.layers.00.mlp.fc1": (12, 8),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q": (8, 8), "lora_te1_projection": (8, 8),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (8, 12), "encoder.layers.0.mlp.fc2": (8, 12),
    "text_encoder_2.encoder.layers.9.mlp.fc2": (8, 12),
}  # fmt: skip
NESTED = "[" * 100_000
SETTINGS = (
    "", "{}", "[]", "null", "3", '"x"', "{", NESTED, '{"a":' * 5000, '{"lora_alpha": NaN}', '{"lora_alpha": 1e400}',
    '{"lora_alpha": "4"}', '{"lora_alpha": -2.5}', '{"lora_alpha": ' + "9" * 5000 + "}", '{"lora_alpha": [[[]]]}',
    '{"unet.lora_alpha": 0, "alpha": true}', '{"alpha_pattern": []}', '{"alpha_pattern": {"(a+)+$": 4}}',
    '{"alpha_pattern": {"(.*)*(.*)*(.*)*x": 4}}', '{"alpha_pattern": {"[": 1}}', '{"alpha_pattern": {"": 1}}',
    '{"alpha_pattern": {"^mid_block\\\\.attentions\\\\.0\\\\.proj_in$": 4}}', '{"step": 3}', '{"settings": []}',
    '{"alpha_pattern": {"' + "a." * 9000 + '": 3}}', '{"lora_alpha": {"lora_alpha": {}}}', '{"use_dora": true}',
    '{"alpha_pattern": {"to_q": null}}', '{"use_rslora": "yes"}', '{"rank_pattern": 7}',
    '{"alpha_pattern": {' + ",".join(f'"to_q{n}": {n}' for n in range(20_000)) + "}}",
    '{"\\ud800": 1, "alpha_pattern": {"\\ud800": 1}}',
)  # fmt: skip


def split(raw: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def bytes_changed(raw: bytes, chance: random.Random) -> bytes:
    """Flipped, cut off, cut out, put in, or said twice; as often in the header as in the weights."""
    raw, length = bytearray(raw), 8 + int.from_bytes(raw[:8], "little")
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(chance.choice((8, max(9, min(length, len(raw) or 9)), len(raw) or 1))) if raw else 0
        size, how = chance.choice((1, 1, 4, 100)), chance.randrange(6)
        if how == 0 and at < len(raw):
            raw[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            del raw[at:]
        elif how == 2:
            del raw[at : at + size]
        elif how == 3:
            raw[at:at] = chance.randbytes(size)
        elif how == 4:
            raw[at : at + size] = bytes([chance.choice((0, 255, 0x7F))]) * size
        else:
            raw[at:at] = raw[at : at + size]
    return bytes(raw)


def header_changed(raw: bytes, chance: random.Random) -> bytes:
    """An entry's sizes, dtype, offsets or name, or what the file says of itself."""
    header, body = split(raw)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(chance.choice((1, 1, 1, 3))):
        name = chance.choice(names)
        if not isinstance(entry := header.get(name), dict) or not {"shape", "data_offsets"} <= entry.keys():
            continue  # it was changed before
        entry, how = dict(entry), chance.randrange(9)
        if how == 0:
            entry["shape"] = [chance.choice(COUNTS) for _ in range(chance.choice((0, 1, 2, 2, 4, 4, 9)))]
        elif how == 1:  # the same numbers in another form
            shape = [*entry["shape"], *[1] * chance.randrange(4)]
            entry["shape"] = chance.choice((shape, shape[::-1], [1, *shape], [*shape, 0], [*shape, 2**40], [1] * 3000))
        elif how == 2:
            entry["dtype"] = chance.choice(list(DTYPES))
        elif how == 3:
            places = (*COUNTS, *entry["data_offsets"])
            entry["data_offsets"] = [chance.choice(places) for _ in range(chance.choice((2, 2, 3)))]
        elif how == 4:
            entry = chance.choice((None, [], {}, 3, {**entry, "x": 1}, {"dtype": "F32"}))
        elif how == 5:
            header[named(name, chance)] = header.pop(name)
            continue
        elif how == 6:
            del header[name]
            continue
        elif how == 7:
            said = dict(before) if isinstance(before := header.get("__metadata__"), dict) else {}
            said[chance.choice(("lora_adapter_metadata", "lorakit", "ss_base_model_version", chance.choice(TEXTS)))] = (
                chance.choice((*SETTINGS, *TEXTS, "sdxl_base_v1-0", 3, None))
            )  # fmt: skip
            header["__metadata__"] = chance.choice((said, said, said, said, None, [], "x"))
            continue
        else:
            header[named(name, chance)] = entry
            continue
        header[name] = entry
    return joined(header, body)


def named(name: str, chance: random.Random) -> str:
    stem, suffix = chance.choice((name.partition(".")[0], *MODULES)), chance.choice(list(adapter_names.PARTS))
    text = chance.choice(TEXTS)
    return chance.choice((stem + suffix, stem + suffix, stem + text + suffix, name + text))


def numbers_changed(raw: bytes, chance: random.Random) -> bytes:
    """NaN, infinity, the largest and smallest numbers, among the weights and alphas."""
    header, body = split(raw)
    body = bytearray(body)
    for name, entry in header.items():
        if name != "__metadata__" and chance.random() < 0.02:
            begin, end = entry["data_offsets"]
            at = begin + 4 * chance.randrange(max(1, (end - begin) // 4))
            value = chance.choice((float("nan"), float("inf"), 3e38, -3.4e38, 1e-45, 0.0, -1.0, -0.0, 1e30))
            body[at : at + 4] = struct.pack("<f", value)
    return joined(header, bytes(body))


def put_together(raw: bytes, chance: random.Random) -> bytes:
    """A whole file of random tensors, whose offsets hold, and whose sizes do more often than not."""
    header, body = {}, b""
    groups = [
        [".lora_down.weight", ".lora_up.weight"], [".lora_down.weight", ".lora_up.weight", ".dora_scale"],
        [".lora_A.weight", ".lora_B.weight"], [f".hada_w{n}_{side}" for n in (1, 2) for side in "ab"],
        [".lokr_w1", ".lokr_w2"], [".lokr_w1", ".lokr_w2_a", ".lokr_w2_b"], chance.sample(list(adapter_names.PARTS), 2),
        [".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b"],
    ]  # fmt: skip
    for stem in chance.sample(list(MODULES), chance.choice((1, 1, 2, 4))):
        kind, rank = chance.choice((*["F32", "F16", "BF16", "F8_E4M3"] * 5, *DTYPES)), chance.choice((0, 1, 2, 3, 4, 8))
        out, inner = chance.choice((*[MODULES[stem]] * 8, (2**20, 2**20), (2**12, 2**13), (1, 1), (3, 5)))
        m, n = chance.choice((1, 2, 4)), chance.choice((1, 2, 4))
        shapes = {
            "down": [rank, inner], "up": [out, rank], "dora_scale": [1, inner], "alpha": [1] * chance.randrange(3),
            "lokr_w1": [m, n], "lokr_w1_a": [m, rank], "lokr_w1_b": [rank, n], "lokr_w2": [out // m, inner // n],
            "lokr_w2_a": [out // m, rank], "lokr_w2_b": [rank, inner // n],
        }  # fmt: skip
        shapes |= {f"hada_w{n}_{side}": shapes[part] for n in (1, 2) for side, part in (("a", "up"), ("b", "down"))}
        wide = stem.endswith("conv_in")
        for suffix in chance.choice(groups) + chance.choice(([], [".alpha"])):
            part = adapter_names.PARTS[suffix]
            shape = shapes[part]
            if wide and part in ("down", "up"):
                shape = [rank, 4, 3, 3] if part == "down" else [*shape, 1, 1]
            if chance.random() < 0.1:
                shape = chance.choice(([*shape, 1, 1], [*shape, 3, 3], shape[::-1], shape[:1], [0, *shape]))
            if (size := int(math.prod(shape) * DTYPES[kind])) > 2**22:
                continue
            header[stem + suffix] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + size]}
            body += chance.choice((bytes(size), chance.randbytes(size), bytes([0x3C, 0x30] * size)[:size]))
    return joined(header, body)


def random_bytes(raw: bytes, chance: random.Random) -> bytes:
    start = chance.choice((b"", (50).to_bytes(8, "little") + b"{", b"PK\3\4", b"<html>", b"\x80\2", bytes(8)))
    return start + chance.randbytes(chance.choice((0, 1, 7, 8, 9, 100, 5000)))


def settings_changed(raw: bytes, chance: random.Random) -> bytes:
    """Other settings, or one of them another."""
    if chance.random() < 0.3:
        return chance.choice((*SETTINGS, *TEXTS)).encode("utf-8", "replace")
    said = json.loads(raw)
    keys = ("r", "lora_alpha", "alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
    for key in chance.sample(keys, 2):
        said[key] = chance.choice((*COUNTS, {"proj_in": chance.choice(COUNTS)}, {chance.choice(TEXTS): 1}))
    return json.dumps(said).encode()


CHANGES: tuple[Callable, ...] = (
    bytes_changed, header_changed, header_changed, header_changed, numbers_changed, numbers_changed, put_together,
    put_together, random_bytes,
)  # fmt: skip


def damaged(files: Files, chance: random.Random) -> tuple[str, Files]:
    """What was done, and the files afterwards."""
    place = chance.choice(sorted(files))
    change = chance.choice((bytes_changed, settings_changed, settings_changed) if place.endswith(".json") else CHANGES)
    changed = files | {place: change(files[place], chance)}
    if len(changed) > 1 and chance.random() < 0.05:
        del changed[chance.choice(sorted(changed))]
    return change.__name__, changed


# ── What must hold ──────────────────────────────────────────────────────────────────────────────────────────────────


class Reader:
    """Loads files into the same small models again and again."""

    def __init__(self):
        self.bare = models()
        self.before = {which: copy.deepcopy(model.state_dict()) for which, model in self.bare.items()}

    def outcome(self, path: Path, family: str) -> str:
        """How far a file came. Anything that it must not do is an AssertionError or goes through."""
        base, reached = a_base(family), "refused"
        try:
            if path.is_file():
                proof.describe_file(path)
            read = read_module.load(path)
            reached = "loaded"
            for module, (parts, alpha) in read.modules.items():
                algorithm = algorithms.algorithm_of(parts)
                added = algorithm.delta(parts, alpha)
                assert tuple(added.shape) == algorithm.size(parts), f"{module} makes {tuple(added.shape)}"
            adapter = attachment.attach({which: self.bare[which] for which in self.bare}, base, read)
            reached = "injected"
            self.bare["unet"](torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 12))
            self.bare["text_encoder"](torch.tensor([[3, 5, 19]]))
            for layer in adapter.layers.values():
                layer.spec = replace(layer.spec, alpha=5.0)
            attachment.copy_weights(adapter, base, read)
            reached = "begun from"
            with tempfile.TemporaryDirectory() as folder:
                known = replace(read, family=read.family or family)
                write.save(known, Path(folder) / "again.safetensors", dtype=torch.float32)
            reached = "written again"
        except REFUSALS as error:
            told = str(error)
            files = (path.name, read_module.PEFT, "adapter_config.json", "again.safetensors")
            assert any(file in told for file in files), told
            assert len(told) < 3000 and told.replace("\n", "").isprintable(), ascii(told[:3000])
            reached = f"{reached}, then {type(error).__name__}" if reached != "refused" else type(error).__name__
        finally:
            injection.eject(self.bare)
        for which, model in self.bare.items():
            now = model.state_dict()
            assert now.keys() == self.before[which].keys(), f"{which} is not as it was"
            assert all(torch.equal(now[name], weight) for name, weight in self.before[which].items())
        return reached


def case(number: int, seed: int, all_files: dict[str, Files], folder: Path) -> tuple[str, str, Path, str]:
    """Write the files of a case into an empty folder.

    Returns:
        What was done to which example, the path to load, and the family that the base should have.
    """
    chance = random.Random(f"{seed} {number}")
    name = chance.choice(sorted(all_files))
    change, changed = damaged(all_files[name], chance)
    shutil.rmtree(folder, ignore_errors=True)
    for place, content in changed.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)
    path = folder / "a.safetensors" if "a.safetensors" in changed else folder
    return change.replace("_", " "), name, path, "sdxl" if "sdxl" in name else "sd15"


def too_slow(*_) -> None:
    raise TimeoutError(f"takes more than {4 * SECONDS} s")


def peak() -> int:
    """Bytes that the process has held at most since `forget`, where the system tells."""
    status = Path("/proc/self/status")
    told = status.read_text().partition("VmHWM:")[2] if status.exists() else ""
    return int(told.split()[0]) * 1024 if told else 0


def forget() -> int:
    """Let `peak` count anew; the bytes held now."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--keep", type=Path, default=Path("artefacts/fuzz_lora"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fuzz_lora.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_slow)
    reader = Reader()
    with tempfile.TemporaryDirectory() as folder:
        all_files = examples(reader.bare, Path(folder))
    # What asks for far more than is there is to fail here, not to take the machine along.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**33, used + 2**33))
    outcomes, slowest, most, started, number = Counter(), 0.0, 0, time.time(), options.first
    while time.time() - started < options.seconds:
        change, name, path, family = case(number, options.seed, all_files, options.keep / "current")  # left by a crash
        before, begun = forget(), time.time()
        signal.alarm(4 * SECONDS)
        try:
            outcome = reader.outcome(path, family)
            took, taken = time.time() - begun, peak() - before
            slowest, most = max(slowest, took), max(most, taken)
            assert took < SECONDS, f"took {took:.1f} s"
            assert taken < MEMORY, f"took {taken / 2**20:.0f} MiB"
        except BaseException as error:  # a panic in the library is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome, kept = f"FAULT: {type(error).__name__}", options.keep / f"{options.seed}-{number}"
            shutil.copytree(options.keep / "current", kept, dirs_exist_ok=True)
            print(f"case {number}, {change} of {name}, kept in {kept}:\n{traceback.format_exc(limit=-6)[-3000:]}")
            reader = Reader()
        finally:
            signal.alarm(0)
        outcomes[change, outcome] += 1
        number += 1
    shutil.rmtree(options.keep / "current", ignore_errors=True)
    faults = sum(count for (_, outcome), count in outcomes.items() if outcome.startswith("FAULT"))
    report = (
        "# The reader of LoRA files, fed with damaged ones\n\n"
        f"`python tests/bench/fuzz_lora.py --seconds {options.seconds:g} --seed {options.seed}` with "
        f"torch {torch.__version__}, safetensors {safetensors.__version__}, peft {peft.__version__}\n\n"
        f"{number - options.first:,} cases in {time.time() - started:.0f} s on one core: "
        f"**{faults} faults**. Slowest case {slowest:.2f} s, most memory taken by one {most / 2**20:.0f} MiB.\n\n"
        + table(outcomes)
    )
    print("\n" + report)
    options.out.write_text(report, encoding="utf-8")
    return min(faults, 1)


def table(outcomes: Counter) -> str:
    """How often each change of a file had each outcome."""
    changes, reached = (sorted({pair[place] for pair in outcomes}) for place in (0, 1))
    lines = [["", *changes, "together"], ["---"] * (len(changes) + 2)]
    for outcome in reached:
        counts = [outcomes[change, outcome] for change in changes]
        lines.append([outcome, *(f"{count:,}" for count in (*counts, sum(counts)))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
