"""What is merged, resized and extracted does what it was made of did, by a reader that knows nothing of lorakit."""

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import readers
import torch
from conftest import copy_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from said import line, names, naming
from stability import write_file
from test_write import TEXT, distance, narrow_unet
from test_write import answer as of_unet
from test_write import said as of_text

from lorakit.adapter import merging, proof, targets, write
from lorakit.adapter import names as adapter_names
from lorakit.adapter.algorithms import algorithm_of
from lorakit.adapter.lora import Lora
from lorakit.adapter.read import load
from lorakit.base import model as bases
from lorakit.base import single_file
from lorakit.console import Console
from lorakit.device import Compute
from lorakit.plan.memory import _Ledger
from lorakit.storage import files

CPU = torch.device("cpu")
LAYERS = {"sd15": (3,), "sd2": (4,), "sdxl": (2, 3)}  # of the text encoders
FAMILIES = ["sd15", "sd2", pytest.param("sdxl", marks=pytest.mark.no_cover)]  # tracing SDXL takes as long again


QUIET = Console.quiet()


def write_base(folder: Path, family: str) -> Path:
    """A diffusers folder with all the blocks of a family's UNet, as narrow as can be; SDXL's are of less depth."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    parts = {"unet": narrow_unet(family, whole=family != "sdxl")}
    if family != "sdxl":  # as in the real ones no shortcut leads to the last level
        config = parts["unet"].config | {"block_out_channels": (4, 8, 12, 12)}
        parts["unet"] = UNet2DConditionModel.from_config(config)
    parts["vae"] = AutoencoderKL(
        block_out_channels=(4,) * 4, norm_num_groups=2, layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    width = TEXT // len(LAYERS[family])
    for place, (which, layers) in enumerate(zip(targets.TEXT_ENCODERS, LAYERS[family], strict=False)):
        kind = CLIPTextModelWithProjection if place else CLIPTextModel
        config = CLIPTextConfig(
            vocab_size=20, hidden_size=width, intermediate_size=10, num_hidden_layers=layers, num_attention_heads=2,
            projection_dim=width, eos_token_id=19, bos_token_id=18,
        )  # fmt: skip
        parts[which] = kind(config)
        copy_tokenizer(folder / which.replace("text_encoder", "tokenizer"))
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    for name, model in parts.items():
        model.save_pretrained(folder / name)
    DDIMScheduler(clip_sample=False, steps_offset=1).save_pretrained(folder / "scheduler")
    index |= {place.name: ["diffusers", "Any"] for place in folder.iterdir() if place.is_dir()}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(family, "folder" or "file") -> the same base in both forms; lorakit's configs of the families are as narrow."""
    root = tmp_path_factory.mktemp("merge")
    (root / "families").mkdir()
    found, counts = {}, {}
    for family in LAYERS:
        folder = write_base(root / family, family)
        base = bases.open(folder)
        counts[family] = len(load_file(folder / "unet" / bases.WEIGHTS[0]))
        for name in {"sd2": ("sd21", "sd21-base")}.get(family, (family,)):
            (root / "families" / f"{name}.json").write_text(json.dumps(base.configs))
        file = write_file(folder, root / f"{family}.safetensors", family, **{"ss_x": "kept", "sshs_model_hash": "old"})
        found |= {(family, "folder"): folder, (family, "file"): file}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bases, "FAMILIES", root / "families")
        patch.setattr(single_file, "UNET_TENSORS", counts)
        yield found


def models_of(base: bases.Base) -> dict[str, torch.nn.Module]:
    compute = Compute(CPU, torch.float32)
    return {which: bases._load(base, which, compute) for which in ("unet", *base.text_encoders)}


@pytest.fixture(scope="module")
def bare(made):
    """family -> its models, not to be changed."""
    return {family: models_of(bases.open(made[family, "folder"])) for family in LAYERS}


def a_lora(models: dict, family: str, kind: str = "lora", rank: int = 4, alpha: float = 3.0, every: int = 1, seed=1):
    """A LoRA of random weights for every so many modules of the models, convolutions and text encoders too."""
    generator = torch.Generator().manual_seed(seed)
    names = targets.target_names(models["unet"], "attention+conv")
    names += [name for which in models if which != "unet" for name in targets.text_names(models[which], which)]
    random = lambda *shape: 0.3 * torch.randn(*shape, generator=generator)  # noqa: E731
    modules = {}
    for name in names[seed % every :: every]:
        weight = targets.find(models, name).weight
        (out, inner, *kernel), flat = weight.shape, weight[0].numel()
        if kind in ("lora", "dora"):
            parts = {"down": random(rank, inner, *kernel), "up": random(out, rank, *[1] * len(kernel))}
        elif kind == "loha":
            parts = {f"hada_w{n}_{x}": random(*shape) for n in (1, 2)
                     for x, shape in (("a", (out, rank)), ("b", (rank, flat)))}  # fmt: skip
        elif kind == "lokr":
            parts = {"lokr_w1": random(2, 2), "lokr_w2_a": random(out // 2, rank), "lokr_w2_b": random(rank, flat // 2)}
        else:  # LoKr of two whole matrices
            parts = {"lokr_w1": random(2, 1), "lokr_w2": random(out // 2, inner, *kernel)}
        if kind == "dora":
            length = weight.transpose(0, 1).flatten(1).norm(dim=1)
            parts["dora_scale"] = (length * (1 + random(inner))).view(1, inner, *[1] * len(kernel)).detach()
        modules[name] = parts, alpha
    version = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[family]
    metadata = {"ss_base_model_version": version, "ss_sd_model_name": "twin", "modelspec.trigger_phrase": f"word{seed}"}
    return Lora(f"{kind}{seed}.safetensors", family, metadata, modules, {})


def written(lora: Lora, folder: Path) -> Path:
    return write.save(lora, folder / f"{lora.name}.safetensors", dtype=torch.float32)


def merged(models: dict, family: str, *files_and_strengths) -> dict:
    """Copies of models, changed by the independent reader as the files say."""
    changed = copy.deepcopy(models)
    for file, strength in files_and_strengths:
        assert readers.merge(file, changed["unet"], family, strength, text=changed) > 0
    return changed


def apart(a: dict, b: dict) -> float:
    """How far two sets of models are from each other, by the weight that differs most."""
    pairs = [zip(a[which].state_dict().values(), b[which].state_dict().values(), strict=True) for which in a]
    return max(distance(x, y) for pair in pairs for x, y in pair)


def changes(lora: Lora) -> dict[str, torch.Tensor]:
    return {module: algorithm_of(parts).delta(parts, alpha) for module, (parts, alpha) in lora.modules.items()}


# ── Several in one ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_side_by_side_does_what_both_do(bare, tmp_path, family):
    models = bare[family]
    a, b = a_lora(models, family), a_lora(models, family, rank=2, alpha=0.7, every=3, seed=2)
    result = merging.merge([a, b], [0.8, -0.5])
    assert result.lora.family == family and result.lora.modules.keys() == a.modules.keys()
    for module, (parts, alpha) in result.lora.modules.items():
        assert alpha == len(parts["down"]) == (6 if module in b.modules else 4)
    both = merged(models, family, (written(a, tmp_path), 0.8), (written(b, tmp_path), -0.5))
    one = merged(models, family, (written(result.lora, tmp_path), 1.0))
    assert apart(one, both) < 1e-5 < 1e-2 < apart(both, models)
    answers, others, bares = (of_unet(x["unet"].eval(), family) for x in (one, both, models))
    assert distance(answers, others) < 1e-5 < 1e-2 < distance(others, bares)
    assert distance(of_text(one, family), of_text(both, family)) < 1e-5
    assert result.share == 1 and set(result.kept.values()) == {1.0}
    assert names(result.describe(), len(a.modules), "4–6", "100.0%")


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "loha"), ("lokr", "lokr2")])
def test_a_rank_is_the_best_of_that_rank(bare, tmp_path, kinds):
    loras = [a_lora(bare["sd15"], "sd15", kind, rank=3 + n, seed=n) for n, kind in enumerate(kinds)]
    result = merging.merge(loras, [0.7, 1.2], rank=3)
    whole = [readers.updates(written(lora, tmp_path)) for lora in loras]
    left = readers.updates(written(result.lora, tmp_path))
    assert left.keys() == whole[0].keys()
    for module, kept in result.kept.items():
        name = adapter_names.kohya_name(module, "sd15")
        dense = (0.7 * whole[0][name]["added"].flatten(1) + 1.2 * whole[1][name]["added"].flatten(1)).double()
        squares = torch.linalg.svdvals(dense).square()
        error = (dense - left[name]["added"].flatten(1)).norm().square().item()
        total = squares.sum().item()
        assert error == pytest.approx(squares[3:].sum().item(), rel=1e-3, abs=1e-9 * total)
        assert kept == pytest.approx(squares[:3].sum().item() / total, abs=1e-6)
        parts, alpha = result.lora.modules[module]
        assert alpha == len(parts["down"]) == min(3, *dense.shape)
        shape = targets.find(bare["sd15"], module).weight.shape
        assert parts["down"].shape[1:] == shape[1:] and parts["up"].ndim == len(shape)
        assert parts["down"].norm().item() == pytest.approx(parts["up"].norm().item(), rel=1e-4)
    least = min(result.kept, key=result.kept.__getitem__)
    assert 0.2 < result.share < 1 and result.kept[least] < result.share < max(result.kept.values())
    assert names(result.describe(), len(result.kept), 3, f"{result.share:.1%}", f"{result.kept[least]:.1%}", least)


def test_one_rank_of_plain_loras_never_makes_the_change(bare):
    """Factors of rank 2 into 8: the decomposition sees nothing larger than the factors."""
    up, down = torch.randn(3000, 2), torch.randn(2, 4000)
    ledger = _Ledger([up, down])
    with ledger:
        u, s, vh, _ = merging._svd_of_product(up, down)
    assert ledger.peak < 3000 * 4000
    assert torch.allclose((u * s) @ vh, up.double() @ down.double(), atol=1e-10 * s[0].item())


def test_oblong_matrices_are_decomposed_as_torch_does():
    torch.manual_seed(0)
    for shape in ((30, 700), (700, 30), (5, 5), (1, 9)):
        matrix = torch.randn(shape)
        u, s, vh, _ = merging._svd(matrix)
        assert torch.allclose(s, torch.linalg.svdvals(matrix.double()), rtol=1e-6)
        assert torch.allclose((u * s) @ vh, matrix.double(), atol=1e-10)
    low = torch.randn(40, 2) @ torch.randn(2, 60)
    u, s, vh, _ = merging._svd(low)
    assert torch.allclose((u * s) @ vh, low.double(), atol=1e-6) and s[2] < 1e-5 * s[0]
    assert torch.isfinite(vh).all()
    u, s, vh, _ = merging._svd(torch.zeros(4, 6))
    assert not s.any() and torch.isfinite(vh).all()


@pytest.mark.parametrize("shape", [(300, 280), (270, 900), (900, 270)])
def test_a_small_rank_of_a_large_matrix(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)  # no spectrum is flatter, and so harder
    best = torch.linalg.svdvals(matrix.double()).square()
    before = torch.random.get_rng_state()
    u, s, vh, whole = merging._svd(matrix, 20)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(s) < min(shape) and whole == pytest.approx(best.sum().item())
    up, down, (kept, _) = merging._cut((u, s, vh, whole), 20)
    assert 0.99 * best[:20].sum() < kept <= best[:20].sum() * 1.0001
    assert whole - (matrix - up @ down).double().square().sum().item() == pytest.approx(kept, rel=1e-3)
    again = merging._svd(matrix, 20)
    assert all(torch.equal(a, b) for a, b in zip((u, s, vh), again, strict=False))
    low = torch.randn(shape[0], 20, generator=generator) @ torch.randn(20, shape[1], generator=generator)
    up, down, (kept, whole) = merging._cut(merging._svd(low, 20), 20)
    assert kept == pytest.approx(whole, rel=1e-5) and distance(up @ down, low) < 1e-5


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_doras_are_merged_by_what_they_do_to_the_base(made, bare, tmp_path, family):
    models = bare[family]
    loras = [a_lora(models, family, "dora", every=5), a_lora(models, family, "dora", rank=2, every=10, seed=11)]
    loras.append(a_lora(models, family, rank=1, every=5))
    assert loras[0].modules.keys() > loras[1].modules.keys()
    strengths = [0.6, 0.9, 1.0]
    for form in ("folder", "file"):
        result = merging.merge(loras, strengths, rank=1000, base=bases.open(made[family, form]))
        one = merged(models, family, (written(result.lora, tmp_path), 1.0))
        in_turn = zip((written(lora, tmp_path) for lora in loras), strengths, strict=True)
        assert apart(one, merged(models, family, *in_turn)) < 1e-4 and result.lora.algorithm == "lora"
        assert result.share == pytest.approx(1)


def test_convolutions_and_linear_layers_go_together(bare):
    a, b = a_lora(bare["sd2"], "sd2"), a_lora(bare["sd2"], "sd2", seed=2)
    flat = "mid_block.attentions.0.proj_in"
    parts, alpha = b.modules[flat]
    b.modules[flat] = {name: x[..., None, None] for name, x in parts.items()}, alpha
    one = changes(merging.merge([a, b], [1, 1]).lora)
    assert torch.allclose(one[flat], changes(a)[flat] + changes(b)[flat], atol=1e-6)


def test_small_scales_keep_their_digits_in_half_precision(bare, tmp_path):
    """An alpha of 1 for a rank of 128 is worked into both sides: on one alone it would leave few digits of float16."""
    lora = a_lora(bare["sd15"], "sd15", rank=64, alpha=0.05, every=40)
    for parts in lora.parts.values():
        parts["up"] *= 0.1
    path = write.save(merging.merge([lora], [0.5]).lora, tmp_path / "a.safetensors")
    got = {module: algorithm_of(parts).delta(parts, alpha) for module, (parts, alpha) in load(path).modules.items()}
    assert all(distance(got[module], 0.5 * change) < 1e-3 for module, change in changes(lora).items())


def test_what_a_merged_file_says(bare, tmp_path):
    models = bare["sdxl"]
    a, b = a_lora(models, "sdxl", every=9), a_lora(models, "sdxl", rank=2, every=9, seed=10)
    a.metadata.update({"modelspec.prediction_type": "epsilon", "ss_network_dim": "99", "ss_tag_frequency": "{}",
                       "ss_dataset_dirs": "/home/anna/x"})  # fmt: skip
    a.metadata["modelspec.resolution"] = "/home/anna/x"  # not that anybody does
    b.metadata.update({"ss_sd_model_name": "another", "modelspec.trigger_phrase": "word1, hat"})
    a.aside["bundle_emb.x.string_to_param.*"] = torch.ones(2, 3)
    path = write.save(merging.merge([a, b], [0.8, 1]).lora, tmp_path / "both.safetensors")
    metadata = readers.read(path)[1]
    assert {key: value for key, value in metadata.items() if "hash" not in key} == {
        "ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False", "modelspec.prediction_type": "epsilon",
        "ss_network_module": "networks.lora", "ss_network_dim": "6", "ss_network_alpha": "6",
        "ss_network_args": '{"conv_dim": "6", "conv_alpha": "6"}', "modelspec.title": "both",
        "modelspec.trigger_phrase": "word1, hat",
        "ss_training_comment": "merged from lora1.safetensors at 0.8, lora10.safetensors at 1",
    }  # fmt: skip
    assert list(load(path).aside) == ["bundle_emb.x.string_to_param.*"]
    assert proof.describe_file(path)["hash"] == "verified"


def test_what_cannot_be_merged(made, bare):
    sd15, sdxl = a_lora(bare["sd15"], "sd15", every=9), a_lora(bare["sdxl"], "sdxl", every=9)
    loha, dora = a_lora(bare["sd15"], "sd15", "loha", every=9), a_lora(bare["sd15"], "sd15", "dora", every=9)
    base, other = bases.open(made["sd15", "folder"]), bases.open(made["sdxl", "folder"])
    wide = copy.deepcopy(sd15)
    module = next(iter(wide.modules))
    wide.modules[module][0]["up"] = torch.cat([wide.modules[module][0]["up"]] * 2)
    empty = Lora("empty.safetensors", None, {}, {}, {})
    size = "×".join(map(str, wide.sizes[module]))
    for arguments, named in (
        (([sd15, sdxl], [1, 1]), ("lora1.safetensors", "SDXL", "SD 1.5")),
        (([sd15], [1], 4, other), ("lora1.safetensors", "SD 1.5", "sdxl", "SDXL")),
        (([sd15, loha], [1, 1]), ("loha1.safetensors", "loha")),
        (([dora], [1], 4), ("dora1.safetensors", "DoRA")),
        (([dora], [1]), ("dora1.safetensors", "dora")),
        (([sd15, wide], [1, 1]), ("lora1.safetensors", module, size)),
        (([wide, dora], [1, 1], 2, base), ("dora1.safetensors", module, size)),
        (([sd15], [1, 2]), (1, 2)),
        (([sd15], [math.nan]), ("nan",)),
        (([], []), (0,)),
        (([empty], [1]), ("empty.safetensors",)),
        (([sd15], [1], 0), ("rank", 0)),
    ):
        with pytest.raises(ValueError, match=naming(*named)):
            merging.merge(*arguments)


# ── Into a base ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_with_loras_in_it(made, bare, tmp_path, family, form):
    models, base = bare[family], bases.open(made[family, form])
    loras = [a_lora(models, family, every=2), a_lora(models, family, rank=2, every=5, seed=2)]
    lines = []
    out = tmp_path / ("out.safetensors" if form == "file" else "out")
    assert merging.merge_into_base(base, loras, [0.8, -0.3], out, console=Console(lines.append)) == out
    wanted = merged(models, family, (written(loras[0], tmp_path), 0.8), (written(loras[1], tmp_path), -0.3))
    result = models_of(bases.open(out))
    for which, model in result.items():
        before, state = models[which].state_dict(), wanted[which].state_dict()
        adapted = {module for lora in loras for module in lora.modules if targets.model_of(module) == which}
        for name, tensor in model.state_dict().items():
            path = name.removeprefix("text_model.").removesuffix(".weight")
            if (path if which == "unet" else f"{which}.{path}") in adapted and name.endswith(".weight"):
                assert torch.allclose(tensor, state[name], rtol=1e-6, atol=1e-6) and not tensor.equal(before[name])
            else:
                assert torch.equal(tensor, before[name]), name
    assert apart(result, wanted) < 1e-5 < 0.01 < apart(result, models)
    note = "lora1.safetensors at 0.8, lora2.safetensors at -0.3"
    if form == "file":
        before, after = (json.loads(x[8 : 8 + x[0] + 256 * x[1] + 65536 * x[2]]) for x in
                         (file.read_bytes() for file in (base.file, out)))  # fmt: skip
        assert after.pop("__metadata__") == {"ss_x": "kept", "modelspec.merged_from": f"{family}.safetensors, {note}"}
        assert before.pop("__metadata__") == {"ss_x": "kept", "sshs_model_hash": "old"} and after == before
        assert len(lines) == 2 and names(lines[0], "merge", "out.safetensors", len(before))
    else:
        ours, own = ({f.relative_to(x): f for f in x.rglob("*") if f.is_file()} for x in (base.folder, out))
        assert ours.keys() == own.keys()
        changed = {place for place in ours if ours[place].read_bytes() != own[place].read_bytes()}
        assert {place.parts[0] for place in changed} == {"unet", *base.text_encoders}
        assert len(lines) == len(changed) + 1 and all(line(lines, "merge", place.as_posix()) for place in changed)
        for place in changed:
            with safe_open(out / place, "pt") as file:
                assert file.metadata() == {"format": "pt", "modelspec.merged_from": f"{family}, {note}"}
    assert names(lines[-1], "100.0%", "0.0%")  # what rounding leaves, and its noise
    load_file(out if form == "file" else out / "unet" / bases.WEIGHTS[0])  # by the library that others use


@pytest.mark.parametrize("family", FAMILIES[::2])
def test_half_precision_rounds_once(made, bare, tmp_path, family):
    folder = shutil.copytree(made[family, "folder"], tmp_path / "half")
    file = shutil.copyfile(made[family, "file"], tmp_path / "half.safetensors")
    for weights in (file, *folder.rglob("*.safetensors")):
        tensors = {key: x.half() if x.is_floating_point() else x for key, x in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})
    lora = a_lora(bare[family], family, every=4)
    for base in (bases.open(folder), bases.open(file)):
        before = models_of(base)
        out = tmp_path / f"out-{base.name}"
        merging.merge_into_base(base, [lora, lora, lora], [0.3, 0.3, 0.4], out, console=QUIET)
        after = models_of(bases.open(out))
        for module, (parts, alpha) in lora.modules.items():
            weight = targets.find(before, module).weight
            addends = [(parts, alpha, strength) for strength in (0.3, 0.3, 0.4)]
            exact = weight + merging._added(addends, weight).view_as(weight)
            assert torch.equal(targets.find(after, module).weight, exact.half().float())


@pytest.mark.parametrize("form", ["folder", "file"])
def test_another_dtype(made, bare, tmp_path, form):
    lora = a_lora(bare["sd15"], "sd15", every=50)
    base = bases.open(made["sd15", form])
    out = tmp_path / ("out.safetensors" if form == "file" else "out")
    merging.merge_into_base(base, [lora], [1], out, dtype=torch.bfloat16, console=QUIET)
    for file in [out] if form == "file" else out.rglob("*.safetensors"):
        for key, tensor in load_file(file).items():
            kept = key in ("alphas_cumprod", "model_ema.decay") or key.endswith("position_ids")
            assert (tensor.dtype == torch.bfloat16) != kept, key
    assert bases.load_vae(bases.open(out), Compute(CPU, torch.float32)).dtype == torch.float32


@pytest.fixture(scope="module")
def in_fp8(made, tmp_path_factory):
    """The SDXL base in both forms with its UNet and text encoders in fp8, as published files are."""
    root, (folder, file) = tmp_path_factory.mktemp("fp8"), (made["sdxl", "folder"], made["sdxl", "file"])
    shutil.copytree(folder, root / "folder")
    for part in ("unet", "text_encoder", "text_encoder_2"):
        (weights,) = (root / "folder" / part).glob("*.safetensors")
        save_file({key: x.to(FP8) for key, x in load_file(weights).items()}, weights, {"format": "pt"})
    vae = single_file.VAE_PREFIX
    tensors = {k: x.to(FP8) if x.is_floating_point() and x.ndim and not k.startswith(vae) else x
               for k, x in load_file(file).items()}  # fmt: skip
    save_file(tensors, root / "file.safetensors")
    return {"folder": root / "folder", "file": root / "file.safetensors"}


FP8 = torch.float8_e4m3fn


@pytest.mark.no_cover
@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_base_in_fp8(in_fp8, tmp_path, form, dtype):
    """It stays fp8 or becomes what --dtype says, and the log says how much of the LoRA is left."""
    base = bases.open(in_fp8[form])
    before = models_of(base)
    lora, lines, out = a_lora(before, "sdxl", rank=1, every=3), [], tmp_path / ("o.safetensors" if base.file else "o")
    lora = replace(lora, modules={m: (algorithm_of(x).times(x, 0.01), a) for m, (x, a) in lora.modules.items()})
    merging.merge_into_base(base, [lora], [1], out, dtype=dtype, console=Console(lines.append))
    files_of = [out] if base.file else list((out / "unet").glob("*.safetensors"))
    kinds = {x.dtype for f in files_of for k, x in load_file(f).items() if "diffusion_model" in k or not base.file}
    assert kinds == {dtype or FP8}
    after, wanted, kept, noise = models_of(bases.open(out)), 0.0, 0.0, 0.0
    for module, change in changes(lora).items():
        old, new = (targets.find(x, module).weight.detach().flatten(1) for x in (before, after))
        wanted, kept = wanted + (change**2).sum().item(), kept + (change * (new - old)).sum().item()
        noise += ((new - old - change) ** 2).sum().item()
    said = f"{kept / wanted:.1%}", f"{(noise / wanted) ** 0.5:.1%}"
    assert names(lines[-1], "merge", *said) and names(lines[-1], "fp16") == (dtype is None)
    assert (noise / wanted) ** 0.5 < 0.02 if dtype else (noise / wanted) ** 0.5 > 0.5


@pytest.mark.no_cover
@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_text_projection_goes_into_a_base(made, bare, tmp_path, form):
    """In Stability's files it is transposed, and no layer of a text encoder."""
    base, models, module = bases.open(made["sdxl", form]), bare["sdxl"], targets.PROJECTION
    weight = models["text_encoder_2"].text_projection.weight
    parts = {"down": torch.randn(2, weight.shape[1]), "up": torch.randn(weight.shape[0], 2)}
    out = tmp_path / ("o.safetensors" if base.file else "o")
    merging.merge_into_base(base, [Lora("x", "sdxl", {}, {module: (parts, 1.0)}, {})], [0.5], out, console=QUIET)
    result = models_of(bases.open(out))
    changed = result["text_encoder_2"].text_projection.weight
    assert torch.allclose(changed, weight + 0.25 * parts["up"] @ parts["down"], atol=1e-6)
    with torch.no_grad():
        changed.copy_(weight)
    assert apart(result, models) == 0.0


def test_shards_stay_shards_and_other_forms_of_the_weights_stay_behind(made, bare, tmp_path):
    folder = shutil.copytree(made["sd15", "folder"], tmp_path / "base")
    whole = folder / "unet" / bases.WEIGHTS[0]
    tensors, index = load_file(whole), {}
    for number, keys in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / "unet" / name, {"format": "pt"})
        index |= dict.fromkeys(keys, name)
    (folder / "unet" / f"{bases.WEIGHTS[0]}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    whole.rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    (folder / "safety_checker").mkdir()  # which model_index.json has none of
    (folder / "model.ckpt").write_bytes(b"x")
    lora = a_lora(bare["sd15"], "sd15")
    out = merging.merge_into_base(bases.open(folder), [lora], [1], tmp_path / "out", console=QUIET)
    names = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.suffix != ".json"}
    assert not {name for name in names if "fp16" in name or name.endswith((".bin", ".ckpt"))}
    assert {f"unet/{name}" for name in index.values()} < names and "safety_checker" not in names
    wanted = merged(bare["sd15"], "sd15", (written(lora, tmp_path), 1))
    assert apart(models_of(bases.open(out)), wanted) < 1e-5


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_every_kind_goes_into_a_base(made, bare, tmp_path, kind):
    lora = a_lora(bare["sd2"], "sd2", kind)
    wanted = merged(bare["sd2"], "sd2", (written(lora, tmp_path), 0.5))
    out = merging.merge_into_base(
        bases.open(made["sd2", "file"]), [lora], [0.5], tmp_path / "o.safetensors", console=QUIET
    )
    assert apart(models_of(bases.open(out)), wanted) < 1e-4


def test_one_tensor_at_a_time(made, bare, tmp_path):
    base, lora = bases.open(made["sdxl", "file"]), a_lora(bare["sdxl"], "sdxl", rank=1)
    with safe_open(base.file, "pt") as file:
        sizes = [4 * math.prod(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118
    ledger = _Ledger(tensor for parts in lora.parts.values() for tensor in parts.values())
    with ledger:
        merging.merge_into_base(base, [lora], [1], tmp_path / "out.safetensors", console=QUIET)
    assert max(sizes) < ledger.peak <= 5 * max(sizes) < sum(sizes) / 7


def test_nothing_is_written_where_something_does_not_fit(made, bare, tmp_path, monkeypatch):
    base, file = bases.open(made["sd15", "folder"]), bases.open(made["sd15", "file"])
    sd15, sdxl = a_lora(bare["sd15"], "sd15", every=9), a_lora(bare["sdxl"], "sdxl", every=9)
    wide, more = copy.deepcopy(sd15), copy.deepcopy(sd15)
    module = next(iter(wide.modules))
    wide.modules[module][0]["up"] = torch.cat([wide.modules[module][0]["up"]] * 2)
    more.modules["text_encoder_2.encoder.layers.0.mlp.fc1"] = sd15.modules[module]
    huge = copy.deepcopy(sd15)
    huge.modules[module][0]["up"].fill_(1e30)
    one, extra = tmp_path / "one.safetensors", "text_encoder_2.encoder.layers.0.mlp.fc1"
    sizes = ["×".join(map(str, some.sizes[module])) for some in (wide, sd15)]
    for arguments, error, named in (
        ((base, [sdxl], [1], tmp_path / "out"), ValueError, ("lora1.safetensors", "SDXL", "sd15", "SD 1.5")),
        ((base, [sd15, wide], [1, 1], tmp_path / "out"), ValueError,
         ("lora1.safetensors", "sd15", 1, len(wide.modules), module, *sizes)),
        ((file, [more], [1], one), ValueError, ("lora1.safetensors", "sd15.safetensors", 1, len(more.modules), extra)),
        ((base, [sd15], [1], one), ValueError, ("sd15", "one.safetensors")),
        ((file, [sd15], [1], tmp_path / "out"), ValueError, ("sd15.safetensors", ".safetensors", "out")),
        ((file, [sd15], [1], file.file), ValueError, ("sd15.safetensors",)),
        ((base, [sd15], [1], base.folder), FileExistsError, ("sd15",)),
        ((file, [huge], [1e9], one), FloatingPointError, ("float32",)),
        ((base, [huge], [1e9], tmp_path / "out"), FloatingPointError, ("float32",)),
        ((base, [sd15], [], tmp_path / "out"), ValueError, (1,)),
    ):  # fmt: skip
        with pytest.raises(error, match=naming(*named)):
            merging.merge_into_base(*arguments, console=QUIET)
        assert not list(tmp_path.iterdir())
    merging.merge_into_base(base, [sd15], [1], tmp_path / "out", console=QUIET)
    merging.merge_into_base(file, [sd15], [1], one, console=QUIET)
    needed = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()), one.stat().st_size
    shutil.rmtree(tmp_path / "out")
    one.unlink()
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    for opened, out, size in zip((base, file), (tmp_path / "out", one), needed, strict=True):
        with pytest.raises(OSError, match=naming(out.name, f"{size:,}", 0)):
            merging.merge_into_base(opened, [sd15], [1], out, console=QUIET)
    monkeypatch.undo()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    for opened, out in ((base, tmp_path / "out"), (file, one)):
        with pytest.raises(OSError, match=naming(out.name)):
            merging.merge_into_base(opened, [sd15], [1], out, console=QUIET)
    assert not list(tmp_path.iterdir())


def test_embeddings_in_a_lora_are_told_of(made, bare, tmp_path):
    lora, lines = a_lora(bare["sd15"], "sd15", every=9), []
    lora.aside["bundle_emb.x.string_to_param.*"] = torch.ones(2, 3)
    merging.merge_into_base(
        bases.open(made["sd15", "file"]), [lora], [1], tmp_path / "o.safetensors", console=Console(lines.append)
    )
    assert names(lines[0], "merge", 1, "lora1.safetensors") and len(lines) == 3


# ── Another rank ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr2"])
def test_full_rank_is_exact(bare, tmp_path, kind):
    lora = a_lora(bare["sd15"], "sd15", kind, every=2)
    result = merging.resize(lora, rank=1000)
    assert result.lora.algorithm == "lora" and result.share == pytest.approx(1)
    before, after = readers.updates(written(lora, tmp_path)), readers.updates(write.save(
        result.lora, tmp_path / "after.safetensors", dtype=torch.float32))  # fmt: skip
    for name, update in before.items():
        wanted = update["added"].flatten(1)
        assert distance(after[name]["added"].flatten(1), wanted) < 1e-5
    for module, (parts, alpha) in result.lora.modules.items():
        assert parts["down"].shape[1:] == targets.find(bare["sd15"], module).weight.shape[1:]
        scale = 1.0 if kind == "lokr2" else 3 / 4
        assert alpha / len(parts["down"]) == pytest.approx(scale)


def test_energy_is_the_share_of_squared_singular_values(bare):
    lora = a_lora(bare["sd15"], "sd15", rank=6, alpha=2)
    result = merging.resize(lora, energy=0.8)
    capped = merging.resize(lora, rank=2, energy=0.8)
    ranks = set()
    for module, change in changes(lora).items():
        shares = torch.linalg.svdvals(change.double()).square()
        shares = shares.cumsum(0) / shares.sum()
        rank = len(result.lora.parts[module]["down"])
        ranks.add(rank)
        assert shares[rank - 1] >= 0.8 - 1e-6 and (rank == 1 or shares[rank - 2] < 0.8 + 1e-6)
        assert result.kept[module] == pytest.approx(shares[rank - 1].item(), abs=1e-6)
        assert len(capped.lora.parts[module]["down"]) == min(2, rank)
        assert result.lora.modules[module][1] == pytest.approx(rank / 3)
    assert len(ranks) > 1
    exact, wanted = changes(merging.resize(lora, energy=1.0).lora), changes(lora)
    assert all(distance(exact[module], wanted[module]) < 1e-5 for module in wanted)


def test_what_a_resized_file_says(bare, tmp_path):
    lora = a_lora(bare["sd15"], "sd15", "loha", every=9)
    lora.metadata.update({"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha"}', "ss_steps": "9",
                          "ss_training_comment": "mine", "sshs_model_hash": "old", "ss_dir": "/home/anna/pictures",
                          "ss_dataset_dirs": json.dumps({"C:\\Users\\anna\\cats": {}}), "lora_adapter_metadata": "{}",
                          "modelspec.thumbnail": "data:image/jpeg;base64,/9j/4A"})  # fmt: skip
    path = write.save(merging.resize(lora, rank=2, energy=0.9).lora, tmp_path / "a.safetensors")
    metadata = readers.read(path)[1]
    assert metadata["ss_training_comment"] == "resized from loha1.safetensors to rank 2, 0.9 of the energy; mine"
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_network_dim"] == "2"
    assert metadata["ss_steps"] == "9" and json.loads(metadata["ss_network_args"]).keys() == {"conv_dim", "conv_alpha"}
    assert metadata["modelspec.thumbnail"] == "data:image/jpeg;base64,/9j/4A"
    assert not {"ss_dir", "ss_dataset_dirs"} & metadata.keys() and "lora_adapter_metadata" not in metadata
    assert proof.describe_file(path)["hash"] == "verified" and load(path).family == "sd15"


def test_what_cannot_be_resized(bare):
    lora, dora = (a_lora(bare["sd15"], "sd15", kind, every=9) for kind in ("lora", "dora"))
    for arguments, named in (
        ((lora,), ("rank", "energy")), ((lora, 0), ("rank", 0)), ((lora, None, 1.5), ("energy", 1.5)),
        ((lora, None, 0), ("energy", 0)),
        ((dora, 2), ("dora1.safetensors", "DoRA")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=naming(*named)):
            merging.resize(*arguments)


# ── Out of two bases ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_merged_is_extracted_again(made, bare, tmp_path, family):
    lora, folder = a_lora(bare[family], family, rank=2, every=3), bases.open(made[family, "folder"])
    file = bases.open(made[family, "file"])
    tuned = bases.open(merging.merge_into_base(file, [lora], [0.8], tmp_path / "tuned.safetensors", console=QUIET))
    result = merging.extract(tuned, folder, 2, targets="attention+conv", console=QUIET)
    assert result.lora.modules.keys() == lora.modules.keys() and result.share > 0.9999
    wanted, got = changes(lora), changes(result.lora)
    assert all(distance(got[module], 0.8 * wanted[module]) < 1e-3 for module in wanted)
    for module, (parts, alpha) in result.lora.modules.items():
        assert parts["down"].shape[1:] == targets.find(bare[family], module).weight.shape[1:]
        assert alpha == len(parts["down"]) == 2
    path = write.save(result.lora, tmp_path / "extracted.safetensors", dtype=torch.float32)
    done = merged(bare[family], family, (path, 1.0))
    assert apart(done, models_of(tuned)) < 1e-4
    metadata = readers.read(path)[1]
    assert metadata["ss_sd_model_name"] == family and metadata["ss_v2"] == str(family == "sd2")
    assert metadata["ss_training_comment"] == f"difference of tuned.safetensors and {family}"
    assert load(path).family == family


def test_a_part_is_extracted(made, bare, tmp_path):
    lora, base = a_lora(bare["sd15"], "sd15", rank=5, every=2), bases.open(made["sd15", "folder"])
    tuned = bases.open(merging.merge_into_base(base, [lora], [1], tmp_path / "tuned", console=QUIET))
    lines = []
    unet = merging.extract(tuned, base, 5, text_encoders=False, console=Console(lines.append)).lora
    assert unet.adapts == ("unet",) and not any("resnets" in module for module in unet.modules)
    assert unet.modules.keys() < lora.modules.keys()  # what did not change is left out
    assert [names(text, "extract", number, 192) for text, number in zip(lines, (1, 101), strict=True)] == [True, True]
    again = merging.extract(tuned, base, 5, text_encoders=False, console=QUIET).lora
    for module, parts in unet.parts.items():
        assert all(torch.equal(x, again.parts[module][part]) for part, x in parts.items())
    some = merging.extract(tuned, base, 5, energy=0.5, console=QUIET)
    assert {len(parts["down"]) for parts in some.lora.parts.values()} >= {1, 2}
    assert min(some.kept.values()) >= 0.5


def test_rounding_is_no_difference(made, bare, tmp_path):
    base, lora = bases.open(made["sd15", "file"]), a_lora(bare["sd15"], "sd15", every=20)
    one, two = (
        bases.open(
            merging.merge_into_base(
                base, [lora], [s], tmp_path / f"{s}.safetensors", dtype=torch.float16, console=QUIET
            )
        )
        for s in (0, 1)
    )
    result = merging.extract(two, base, 4, targets="attention+conv", console=QUIET)
    assert result.lora.modules.keys() == lora.modules.keys()
    with pytest.raises(ValueError, match=naming("0.safetensors", "sd15.safetensors")):
        merging.extract(one, base, 4, console=QUIET)


def test_bases_that_do_not_go_together(made, tmp_path, monkeypatch):
    sd15, sdxl, sd2 = (bases.open(made[family, "folder"]) for family in ("sd15", "sdxl", "sd2"))
    with pytest.raises(ValueError, match=naming("sdxl", "SDXL", "sd15", "SD 1.5")):
        merging.extract(sdxl, sd15, 4)
    folder = shutil.copytree(sd15.folder, tmp_path / "cut")
    weights = folder / "unet" / bases.WEIGHTS[0]
    tensors = load_file(weights)
    del tensors["mid_block.attentions.0.proj_in.weight"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=naming("sd15", "cut", 1, "mid_block.attentions.0.proj_in", "12×12")):
        merging.extract(bases.open(folder), sd15, 4)
    tensors["mid_block.attentions.0.proj_in.weight"] = torch.full((12, 12, 1, 1), math.nan)
    save_file(tensors, weights)
    with pytest.raises(FloatingPointError, match=naming("mid_block.attentions.0.proj_in", 1, "cut")):
        merging.extract(bases.open(folder), sd15, 4, console=QUIET)
    monkeypatch.setattr(targets, "transformer_modules", lambda config: 5)
    with pytest.raises(RuntimeError, match=naming(192, 5)):
        merging.extract(sd2, sd2, 4)


# ── What a file does, and where ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "lokr2"])
def test_norms_are_those_of_the_changes(made, bare, tmp_path, kind):
    lora = a_lora(bare["sdxl"], "sdxl", kind)
    base = bases.open(made["sdxl", "file"]) if kind == "dora" else None
    rows = merging.norms(lora, base)
    dense = {}
    for module, (parts, alpha) in lora.modules.items():
        dense[module] = algorithm_of(parts).delta(parts, alpha, targets.find(bare["sdxl"], module).weight).norm().item()
    assert [(row.block, row.part) for row in rows if row.part != "convolutions"] == [
        ("text_encoder", ""), ("text_encoder_2", ""), ("down_blocks.1", "attention"), ("down_blocks.2", "attention"),
        ("mid_block", "attention"), ("up_blocks.0", "attention"), ("up_blocks.1", "attention"),
    ]  # fmt: skip
    assert sum(row.modules for row in rows) == len(lora.modules)
    assert sum(row.share for row in rows) == pytest.approx(1)
    whole = math.hypot(*dense.values())
    for row in rows:
        own = {module: norm for module, norm in dense.items() if f"{module}.".startswith(f"{row.block}.")}
        if row.part:
            own = {m: norm for m, norm in own.items() if ("attentions" in m) == (row.part == "attention")}
        assert row.norm == pytest.approx(math.hypot(*own.values()), rel=1e-4)
        assert row.share == pytest.approx(row.norm**2 / whole**2, rel=1e-4)
        assert (row.modules, row.largest) == (len(own), max(own, key=own.__getitem__))
        assert row.ranks == ([] if kind == "lokr2" else [4]) and not row.low_rank_only


def test_norms_of_plain_loras_make_no_change_whole():
    up, down = torch.randn(3000, 2), torch.randn(2, 4000)
    dense = (up.double() @ down.double()).norm().item()
    lora = Lora("a", "sd15", {}, {"mid_block.attentions.0.proj_in": ({"down": down, "up": up}, 2.0)}, {})
    with _Ledger([up, down]) as ledger:
        (row,) = merging.norms(lora)
    assert ledger.peak < 3000 * 4000 and row.norm == pytest.approx(dense)


def test_a_dora_without_its_base_says_so(made, bare):
    dora, plain = (a_lora(bare["sd15"], "sd15", kind) for kind in ("dora", "lora"))
    rows = merging.norms(dora)
    assert all(row.low_rank_only for row in rows)
    assert [row.norm for row in rows] == pytest.approx([row.norm for row in merging.norms(dora_without(dora))])
    tables = merging.norms_table(rows).splitlines(), merging.norms_table(merging.norms(plain)).splitlines()
    assert names(tables[0][-1], "DoRA") and len(tables[0]) == len(tables[1]) + 1
    with pytest.raises(ValueError, match=naming("dora1.safetensors", "SD 1.5", "sdxl", "SDXL")):
        merging.norms(dora, bases.open(made["sdxl", "folder"]))


def dora_without(lora: Lora) -> Lora:
    plain = {m: ({k: x for k, x in parts.items() if k != "dora_scale"}, a) for m, (parts, a) in lora.modules.items()}
    return Lora(lora.name, lora.family, {}, plain, {})


def test_the_table(bare):
    lines = merging.norms_table(merging.norms(a_lora(bare["sd15"], "sd15"))).splitlines()
    assert lines[0].split() == ["block", "part", "modules", "rank", "norm", "share", "largest"]
    assert [line.split()[0] for line in lines[1:]] == [
        "text_encoder", *(f"down_blocks.{n}" for n in (0, 0, 1, 1, 2, 2, 3)), "mid_block", "mid_block",
        *(f"up_blocks.{n}" for n in (0, 1, 1, 2, 2, 3, 3)), "all",
    ]  # fmt: skip
    assert lines[-1].split()[1] == str(sum(int(line.split()[-5]) for line in lines[1:-1]))
    assert {line[: lines[0].index("largest")][-2:] for line in lines[:-1]} == {"  "}
    assert all(line[lines[0].index("largest")] != " " for line in lines[:-1])
