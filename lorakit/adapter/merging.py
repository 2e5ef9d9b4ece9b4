"""LoRAs from LoRAs and bases: several merged into one or into a base, another rank, what parts two bases; their size.

All of it is arithmetic on one module's weights at a time, on the CPU, in float32 or better: no model is loaded.
"""

import errno
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit import base as bases
from lorakit import storage
from lorakit.adapter import layers, write
from lorakit.adapter import metadata as metadata_module
from lorakit.adapter import targets as targets_module
from lorakit.adapter.lora import FAMILIES, Lora, finite, usual
from lorakit.base import Base, WeightPlace

Parts = Mapping[str, Tensor]  # of a module, as `adapter.parts` names them
Addend = tuple[Parts, float, float]  # parts, alpha, strength
Spectrum = tuple[Tensor, Tensor, Tensor, float]  # U (out, n), singular values (n,), Vᵀ (n, in · k · k), energy of all


@dataclass(frozen=True)
class Made:
    """A LoRA that was made here, and how much it keeps of the change that it stands for."""

    lora: Lora
    energies: dict[str, tuple[float, float]] = field(repr=False)
    """Module → squared Frobenius norm of what is kept of its change, and of the whole."""

    @property
    def kept(self) -> dict[str, float]:
        """Module → the share of its change's energy that is kept, 0 to 1."""
        return {module: part / whole if whole else 1.0 for module, (part, whole) in self.energies.items()}

    @property
    def share(self) -> float:
        """The share of all modules' energy that is kept, 0 to 1."""
        part, whole = map(sum, zip(*self.energies.values(), strict=True))
        return part / whole if whole else 1.0

    def describe(self) -> str:
        kept, ranks = self.kept, [len(parts["down"]) for parts in self.lora.parts.values()]
        least = min(kept, key=kept.__getitem__)
        said = f"{len(kept)} modules of rank {_span(ranks)} keep {self.share:.1%} of the change"
        return said + (f", the least {kept[least]:.1%} in {least}" if kept[least] < 0.9995 else "")


# ── Several in one ────────────────────────────────────────────────────────────────────────────────────────────────────


def merge(loras: Sequence[Lora], strengths: Sequence[float], rank: int | None = None, base: Base | None = None) -> Made:
    """One LoRA that does what several do together. Scales and strengths go into the weights: alpha is the rank.

    Args:
        rank: None puts the matrices of plain LoRAs side by side, which is exact: a module's rank is the sum of theirs.
            A number keeps the best approximation of at most that rank, of LoRAs of any kind.
        base: the one whose weights a DoRA's change depends on.

    Raises:
        ValueError: LoRAs of several families or bases; a kind that needs a rank or a base, without it.
    """
    family = _family(loras, strengths, base)
    _sensible(rank)
    kinds = {layers.algorithm_of(parts): lora.name for lora in loras for parts in lora.parts.values()}
    for kind, name in kinds.items():
        if kind != "lora" and rank is None:
            raise ValueError(f"{name} is a {kind}, and plain LoRAs alone can be put side by side. Give a rank.")
        if kind == "dora" and base is None:
            raise ValueError(f"{name} is a DoRA: what it changes depends on the base's weights. Give the base.")
    sizes: dict[str, tuple[int, int]] = {}
    for lora in loras:
        for module, (out, inputs) in _sizes(lora).items():
            if sizes.setdefault(module, (out, inputs)) != (out, inputs):
                raise ValueError(
                    f"{lora.name} is for another base than those before it: its {module} is {out}×{inputs}, theirs "
                    f"{sizes[module][0]}×{sizes[module][1]}."
                )
    places = _places(base, sizes, _named(loras, strengths)) if "dora" in kinds else {}
    modules, energies = {}, {}
    for module in sizes:
        addends = _addends(module, loras, strengths)
        if all(parts.keys() == {"down", "up"} for parts, _, _ in addends):
            up, down = _side_by_side(addends)
            energies[module] = (_square_of_product(up, down),) * 2
            if rank is not None:
                up, down, energies[module] = _cut(_svd_of_product(up, down), rank)
        else:
            change = _added(addends, places[module].read() if places else None)
            up, down, energies[module] = _cut(_svd(change, rank), rank)
        modules[module] = _formed(up, down, _kernel(module, addends[0][0], family)), float(len(down))
    told = {key: {lora.metadata[key] for lora in loras if key in lora.metadata} for key in OF_BASE}
    agreed = {key: values.pop() for key, values in told.items() if len(values) == 1}
    metadata = _of_base(family) | {
        key: value for key, value in agreed.items() if not metadata_module.names_machine(value)
    }
    words = dict.fromkeys(word.strip() for lora in loras for word in lora.metadata.get(TRIGGER, "").split(","))
    if trigger := ", ".join(filter(None, words)):
        metadata[TRIGGER] = trigger
    metadata |= _of_network(modules, f"merged from {_named(loras, strengths)}")
    aside = {key: tensor for lora in reversed(loras) for key, tensor in lora.aside.items()}
    return Made(Lora("the merged LoRA", family, metadata, modules, aside), energies)


def _family(loras: Sequence[Lora], strengths: Sequence[float], base: Base | None) -> str | None:
    """The family that LoRAs, and a base, have in common; None where none of them tells.

    Raises:
        ValueError: they have none in common; a LoRA without modules; strengths that are not a finite number each.
    """
    if not loras or len(loras) != len(strengths) or not all(map(math.isfinite, strengths)):
        raise ValueError(f"{len(loras)} LoRAs and strengths {list(strengths)}: give a number for each LoRA.")
    if empty := [lora.name for lora in loras if not lora.modules]:
        raise ValueError(f"{empty[0]} adapts no module of a UNet or text encoder: leave it out.")
    known = [(f"the base {base.name}", base.family)] if base else []
    known += [(lora.name, lora.family) for lora in loras if lora.family]
    for name, family in known:
        if family != known[0][1]:
            raise ValueError(
                f"{name} is an {FAMILIES[family]} LoRA, {known[0][0]} is {FAMILIES[known[0][1]]}: the two do not go "
                "together. Use LoRAs and bases of one family."
            )
    return known[0][1] if known else None


def _sensible(rank: int | None, energy: float | None = None) -> None:
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank} leaves nothing. Give 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy {energy} is no share of the change. Give one above 0 and up to 1, such as 0.98.")


def _named(loras: Sequence[Lora], strengths: Sequence[float]) -> str:
    return ", ".join(f"{lora.name} at {strength:g}" for lora, strength in zip(loras, strengths, strict=True))


def _sizes(lora: Lora) -> dict[str, tuple[int, int]]:
    return {module: layers.size(parts) for module, parts in lora.parts.items()}


def _addends(module: str, loras: Sequence[Lora], strengths: Sequence[float]) -> list[Addend]:
    return [(*lora.modules[module], s) for lora, s in zip(loras, strengths, strict=True) if module in lora.modules]


def _side_by_side(addends: Sequence[Addend]) -> tuple[Tensor, Tensor]:
    """Up (out, r) and down (r, in · k · k) whose product is the sum of plain LoRAs' changes, float32."""
    ups, downs = [], []
    for parts, alpha, strength in addends:
        factor = strength * _scale(parts, alpha)
        root = abs(factor) ** 0.5  # on one side alone a small scale would leave float16 few digits
        ups.append(parts["up"].flatten(1).float() * math.copysign(root, factor))
        downs.append(parts["down"].flatten(1).float() * root)
    return torch.cat(ups, 1), torch.cat(downs)


def _added(addends: Sequence[Addend], weight: Tensor | None) -> Tensor:
    """What is added to a module's weight by one after the other: (out, in · k · k), float32.

    Args:
        weight: (out, in[, k, k]); asked of DoRA alone.
    """
    total: Tensor | None = None
    for parts, alpha, strength in addends:
        so_far = weight if weight is None or total is None else weight.float() + total.view_as(weight)
        change = strength * layers.change(parts, alpha, so_far)
        total = change if total is None else total.add_(change)
    return total


def _places(base: Base, sizes: Mapping[str, tuple[int, int]], name: str) -> dict[str, WeightPlace]:
    """Where a base has the weights of modules.

    Args:
        sizes: module → (out, in · k · k).
        name: whose modules they are.

    Raises:
        ValueError: it lacks one, or has it in another size.
    """
    weights = {
        w: bases.weight_places(base, w) for w in {targets_module.model_of(m) for m in sizes} & base.configs.keys()
    }
    places, wrong = {}, []
    for module, size in sizes.items():
        which = targets_module.model_of(module)
        path = module if which == "unet" else module.partition(".")[2]
        place = weights.get(which, {}).get(f"{path}.weight")
        here = place and (place.shape[0], math.prod(place.shape[1:]))
        if here != size:
            wrong.append(f"{module} is {size[0]}×{size[1]} there, {f'{here[0]}×{here[1]}' if here else 'missing'} here")
        places[module] = place
    if wrong:
        raise ValueError(
            f"{name} does not fit {base.name} in {len(wrong)} of {len(sizes)} modules: " + "; ".join(wrong[:3])
            + ". It was made for another base."
        )  # fmt: skip
    return places


# ── Into a base ───────────────────────────────────────────────────────────────────────────────────────────────────────

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")  # of the weights as they were


def merge_into_base(
    base: Base, loras: Sequence[Lora], strengths: Sequence[float], out: str | Path, *,
    dtype: torch.dtype | None = None, say: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Write a base with LoRAs merged into it, one after the other; whole or not at all.

    It has its source's form: a diffusers folder with the same shards, or a file with the same keys and metadata. One
    tensor at a time is in memory; sums are made in float32 and rounded once.

    Args:
        out: a new folder, or a `.safetensors` file where the base is one.
        dtype: of all models' weights; None leaves each as it is.
        say: told of each file that is written anew, and of embeddings in a LoRA, which a base has no place for.

    Raises:
        ValueError: LoRAs of another family, or with modules that the base lacks; an `out` of the wrong form.
        FloatingPointError: a sum is too large for the dtype.
        OSError: no room for it, or no right to write; nothing is left behind.
    """
    out = Path(out)
    _family(loras, strengths, base)
    kind, form = ("file", "another file's, with .safetensors") if base.file else ("folder", "a new folder's")
    if bool(base.file) != (out.suffix == ".safetensors") or (base.file and out.resolve() == base.file.resolve()):
        raise ValueError(
            f"{base.name} is a {kind}, and what is made of it is one too: give {form} name, not {out.name}."
        )
    places: dict[str, WeightPlace] = {}
    for lora in loras:
        places |= _places(base, _sizes(lora), lora.name)
        if lora.aside:
            say(f"merge     {len(lora.aside)} embeddings of {lora.name} are left out: a base has no place for them")
    changes: dict[Path, dict[str, list]] = defaultdict(lambda: defaultdict(list))  # file → key → its parts' addends
    for module, place in places.items():
        changes[place.file][place.key].append((place, _addends(module, loras, strengths)))
    note = {"modelspec.merged_from": f"{base.name}, {_named(loras, strengths)}"}
    metadata_module.check_private(note)
    plans, copied = _plans(base, changes, note, dtype)
    size = sum(plan.size for plan in plans.values()) + sum(file.stat().st_size for file in copied)
    _check_room(out, size)
    with storage.write_file(out, size) if base.file else storage.write_folder(out) as partial:
        for file in (*copied, *plans):
            target = partial if base.file else partial / file.relative_to(base.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file not in plans:
                shutil.copyfile(file, target)
                continue
            _rewrite(file, target, plans[file], changes[file])
            name = out.name if base.file else file.relative_to(base.folder).as_posix()
            say(f"merge     {name}: {len(changes[file])} of {len(plans[file].dtypes)} tensors changed")
    return out


class _Plan(NamedTuple):
    """A file that is to be written."""

    header: bytes
    dtypes: dict[str, torch.dtype | None]  # of its tensors in their order; None as it is
    size: int


def _plans(
    base: Base, changes: Mapping[Path, Mapping], note: dict[str, str], dtype: torch.dtype | None
) -> tuple[dict[Path, _Plan], list[Path]]:
    """A base's files that are written anew, and those that are copied.

    Args:
        note: what the metadata of those that change say more.
    """
    if base.file:  # noise schedules beside the models' weights keep their dtype
        models = (bases.UNET_PREFIX, bases.VAE_PREFIX, *bases.ENCODER_PREFIXES[base.family].values())
        return {base.file: _plan(base.file, note, dtype, models)}, []
    plans, copied = {}, [file for file in [base.folder / "model_index.json"] if file.is_file()]
    for folder in bases.component_folders(base):
        own = sorted(file for file in folder.rglob("*") if file.is_file())
        if folder.name in base.configs.keys() - {"scheduler"}:
            # Other forms of the weights (fp16, non-EMA, pickles) would not be merged: they stay behind.
            weights = bases.weight_files(base, folder.name)
            for file in weights:
                if dtype or file in changes:
                    plans[file] = _plan(file, note if file in changes else {}, dtype)
            own = [file for file in own if file.suffix in (".json", ".txt") or file in weights and file not in plans]
        copied += own
    return plans, copied


def _plan(file: Path, note: dict[str, str], dtype: torch.dtype | None, models: tuple[str, ...] = ("",)) -> _Plan:
    """A file as it will be.

    Args:
        models: what keys begin with whose tensors get the dtype.
    """
    metadata, table = bases.read_header(file)
    name = next((name for name, own in FLOATS.items() if own == dtype), "")
    dtypes, at = {}, 0
    for key, entry in table.items():
        begin, end = entry["data_offsets"]
        if name and entry["dtype"] in FLOATS and key.startswith(models):
            entry["dtype"], end = name, begin + math.prod(entry["shape"]) * dtype.itemsize
        entry["data_offsets"] = [at, at := at + end - begin]
        dtypes[key] = FLOATS.get(entry["dtype"])
    header = write.header({key: x for key, x in metadata.items() if key not in HASHES} | note, table)
    return _Plan(header, dtypes, len(header) + at)


def _check_room(path: Path, size: int) -> None:
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    if (free := shutil.disk_usage(folder).free) < size:
        needed = f"{size:,} bytes are needed, {free:,} are free. Make room or choose another folder"
        raise OSError(errno.ENOSPC, f"no room for {path.name} in {folder}: {needed}")


def _rewrite(
    file: Path, target: Path, plan: _Plan, changes: Mapping[str, list[tuple[WeightPlace, list[Addend]]]]
) -> None:
    """Write a file as planned, one tensor at a time.

    Args:
        changes: key → places in that tensor, and what is added there.
    """
    with bases.open_checkpoint(file) as source, target.open("wb") as stream:
        stream.write(plan.header)
        for key, dtype in plan.dtypes.items():
            tensor = source.get_tensor(key)
            dtype = dtype or tensor.dtype
            if key in changes:
                pieces = list(tensor.chunk(changes[key][0][0].parts))
                for place, addends in changes[key]:
                    piece = pieces[place.part].float()
                    pieces[place.part] = _added(addends, piece).view_as(piece).add_(piece)
                tensor = torch.cat([piece.to(dtype) for piece in pieces])
                finite({key: tensor}, file.name, f"Sums exceed {dtype}: give lower strengths, or another dtype")
            stream.write(tensor.to(dtype).contiguous().flatten().view(torch.uint8).numpy())


# ── Another rank ──────────────────────────────────────────────────────────────────────────────────────────────────────


def resize(lora: Lora, rank: int | None = None, energy: float | None = None) -> Made:
    """A LoRA of another rank. LoHa and LoKr become plain LoRAs.

    The scale, alpha / rank, of each module stays, so that programs and training go on as before. Singular values are
    split evenly between down and up.

    Args:
        rank: at most this.
        energy: each module's smallest rank that keeps this share, 0 to 1, of the sum of squared singular values.

    Raises:
        ValueError: neither is given, or nonsense; a DoRA.
    """
    if rank is None and energy is None:
        raise ValueError("Give a rank, the share of energy to keep, or both.")
    _sensible(rank, energy)
    if any("dora_scale" in parts for parts in lora.parts.values()):
        raise ValueError(
            f"{lora.name} is a DoRA, whose lengths belong to its matrices as they are. Merge it alone, with a rank and "
            "its base: that makes a plain LoRA of what it changes there."
        )
    modules, energies = {}, {}
    for module, (parts, alpha) in lora.modules.items():
        if "down" in parts:
            spectrum = _svd_of_product(parts["up"].flatten(1), parts["down"].flatten(1))
        else:
            spectrum = _svd(layers.change(parts, layers.rank_of(parts) or 1), rank)
        up, down, own = _cut(spectrum, rank, energy)
        scale = _scale(parts, alpha)
        energies[module] = scale**2 * own[0], scale**2 * own[1]
        modules[module] = _formed(up, down, _kernel(module, parts, lora.family)), scale * len(down)
    # Alphas in diffusers' settings would not be these; what tells of its maker's machine could not be written again.
    gone = ("lora_adapter_metadata", "ss_network_args", *HASHES)
    metadata = {
        key: value
        for key, value in lora.metadata.items()
        if key not in gone and not metadata_module.names_machine(value)
    }
    asked = [f"rank {rank}"] * (rank is not None) + [f"{energy} of the energy"] * (energy is not None)
    comment = f"resized from {lora.name} to {', '.join(asked)}; {metadata.get(COMMENT, '')}".rstrip("; ")
    return Made(Lora(lora.name, lora.family, metadata | _of_network(modules, comment), modules, lora.aside), energies)


# ── Out of two bases ──────────────────────────────────────────────────────────────────────────────────────────────────


def extract(
    tuned: Base, original: Base, rank: int, *, energy: float | None = None, targets: str = "attention",
    text_encoders: bool = True, say: Callable[[str], None] = print,
) -> Made:  # fmt: skip
    """What parts a fine-tuned base from the one that it was made of, as a LoRA for that one. Alpha is the rank.

    Either is a folder or a file; one pair of weights is read at a time. Modules that do not differ are left out, and so
    are those that differ because one base was rounded.

    Args:
        rank, energy: as for `resize`.
        targets: as for `adapter.target_names`.
        text_encoders: theirs as well.

    Raises:
        ValueError: bases of several families; a weight that one lacks, or has in another size; no difference.
        RuntimeError: not all modules are found that the config says there are.
        FloatingPointError: weights are NaN.
    """
    _sensible(rank, energy)
    if tuned.family != original.family:
        raise ValueError(
            f"{tuned.name} is {FAMILIES[tuned.family]}, {original.name} is {FAMILIES[original.family]}: the one was "
            "not made of the other."
        )
    sizes = {}
    for which in ("unet", *(original.text_encoders if text_encoders else ())):
        model = bases.empty(original, which)
        names = (
            targets_module.target_names(model, targets) if which == "unet" else targets_module.text_names(model, which)
        )
        shapes = {name: targets_module.find({which: model}, name).weight.shape for name in names}
        sizes |= {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items()}
    pairs = [_places(base, sizes, original.name) for base in (original, tuned)]
    modules, energies = {}, {}
    for count, module in enumerate(sizes):
        if count % 100 == 0:
            say(f"extract   module {count + 1} of {len(sizes)}")
        before, after = (places[module].read() for places in pairs)
        finite({original.name: before, tuned.name: after}, module, "A base is damaged")
        coarser = max(before.dtype, after.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        if torch.equal(before.flatten(1).to(coarser), after.flatten(1).to(coarser)):
            continue
        change = after.flatten(1).float() - before.flatten(1).float()
        up, down, energies[module] = _cut(_svd(change, rank), rank, energy)
        modules[module] = _formed(up, down, before.shape[2:]), float(len(down))
    if not modules:
        raise ValueError(f"{tuned.name} does not differ from {original.name} in any of {len(sizes)} modules.")
    comment = f"difference of {tuned.name} and {original.name}"
    metadata = _of_base(original.family, original) | _of_network(modules, comment)
    return Made(Lora("the extracted LoRA", original.family, metadata, modules, {}), energies)


# ── Singular values ───────────────────────────────────────────────────────────────────────────────────────────────────


LARGE = 256  # the smaller side from which a few singular values are found faster than all


def _svd(matrix: Tensor, rank: int | None = None) -> Spectrum:
    """The singular values of a matrix; of a large one only those that a small rank needs.

    Those are found to about 1e-4 of their energy, of the flattest spectra to 1e-2, the same at every call.

    Source: Halko et al. 2011, arXiv:0909.4061 (power iterations on random vectors).
    """
    whole = matrix.double().square().sum().item()
    if rank and min(matrix.shape) > max(LARGE, 4 * rank):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=2 * rank + 16, niter=8)
        return u, s.double(), v.T, whole
    # Many times faster than torch's own where one side is long; in float64 right down to 1e-8 of the largest.
    small, wide = matrix.shape[0] <= matrix.shape[1], matrix.double()
    wide = wide if small else wide.T
    squares, u = torch.linalg.eigh(wide @ wide.T)
    s, u = squares.flip(0).clamp(min=0).sqrt(), u.flip(1)
    vh = (u.T @ wide) / s.clamp(min=1e-12 * s[0].item() + 1e-300)[:, None]
    return (u, s, vh, whole) if small else (vh.T, s, u.T, whole)


def _svd_of_product(up: Tensor, down: Tensor) -> Spectrum:
    """The singular values of up @ down, which is never made: those of the R in their QR decompositions."""
    (left, inner), (right, outer) = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(inner @ outer.T, full_matrices=False)
    return left @ u, s, vh @ right.T, s.square().sum().item()


def _cut(spectrum: Spectrum, rank: int | None, energy: float | None = None) -> tuple[Tensor, Tensor, tuple]:
    """The best approximation of a rank: up (out, r) and down (r, in · k · k), float32; its energy, and that of all.

    Source: Eckart and Young 1936, doi:10.1007/BF02288367.
    """
    u, s, vh, whole = spectrum
    energies = s.square().cumsum(0).clamp(max=whole)
    enough = len(s) if energy is None else 1 + int((energies < energy * whole).sum())
    r = min(rank or len(s), enough, len(s))
    root = s[:r].sqrt()
    return (u[:, :r] * root).float(), (root[:, None] * vh[:r]).float(), (energies[r - 1].item(), whole)


def _formed(up: Tensor, down: Tensor, kernel: Sequence[int]) -> Parts:
    """Parts in the form of a module's layer: down (r, in[, k, k]), up (out, r[, 1, 1])."""
    down, up = down.reshape(len(down), -1, *kernel), up.reshape(*up.shape, *[1] * len(kernel))
    return {"down": down.contiguous(), "up": up.contiguous()}


def _kernel(module: str, parts: Parts, family: str | None) -> Sequence[int]:
    """A module's kernel, () of a linear layer: by its matrices, or of LoHa and LoKr, whose do not tell, by its name."""
    if "down" in parts:
        return parts["down"].shape[2:]
    leaf = module.rpartition(".")[2]
    if leaf in ("conv", "conv1", "conv2", "conv_in", "conv_out"):
        return (3, 3)
    return (1, 1) if leaf == "conv_shortcut" or (leaf in ("proj_in", "proj_out") and family == "sd15") else ()


def _scale(parts: Parts, alpha: float) -> float:
    rank = layers.rank_of(parts)
    return alpha / rank if rank else 1.0


# ── Metadata ──────────────────────────────────────────────────────────────────────────────────────────────────────────

COMMENT, TRIGGER = "ss_training_comment", "modelspec.trigger_phrase"
OF_BASE = (
    "ss_base_model_version", "ss_v2", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_clip_skip",
    "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.prediction_type",
    "modelspec.resolution", "modelspec.encoder_layer",
)  # fmt: skip


def _of_base(family: str | None, base: Base | None = None) -> dict[str, str]:
    """What programs tell families by, and the base's name."""
    version = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", None: ""}[family]
    v = "_v" if base and base.prediction_type == "v_prediction" and family != "sdxl" else ""
    known = {"ss_base_model_version": version + v, "ss_v2": str(family == "sd2")} if family else {}
    return known | ({"ss_sd_model_name": base.name} if base else {})


def _of_network(modules: Mapping[str, tuple[Parts, float]], comment: str) -> dict[str, str]:
    """Ranks and alphas that most modules have, those of wide convolutions apart, as kohya writes them."""
    ranks = {module: len(parts["down"]) for module, (parts, _) in modules.items()}
    alphas = {module: alpha for module, (_, alpha) in modules.items()}
    wide = [module for module, (parts, _) in modules.items() if max(parts["down"].shape[2:], default=1) > 1]
    narrow = [module for module in modules if module not in set(wide)] or wide
    facts = {
        "ss_network_module": "networks.lora", "ss_network_dim": f"{usual(ranks[m] for m in narrow)}",
        "ss_network_alpha": f"{usual(alphas[m] for m in narrow):g}", COMMENT: comment,
    }  # fmt: skip
    if wide:
        convolutions = {"conv_dim": f"{usual(ranks[m] for m in wide)}"}
        convolutions["conv_alpha"] = f"{usual(alphas[m] for m in wide):g}"
        facts["ss_network_args"] = json.dumps(convolutions)
    return facts


# ── What a file does, and where ───────────────────────────────────────────────────────────────────────────────────────

ORDER = (
    "text_encoder", "text_encoder_2", "conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block",
    "up_blocks", "conv_out",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """How much a LoRA changes in a block."""

    block: str  # "text_encoder", "down_blocks.0", "mid_block" …
    part: str  # "attention" or "convolutions" of a UNet's block
    modules: int
    ranks: list[int]  # that occur; none where nothing is of low rank
    norm: float  # Frobenius norm of all its changes together
    share: float  # of the whole LoRA's squared norm, 0 to 1
    largest: str  # the module with the largest change
    low_rank_only: bool  # a DoRA's lengths are not counted, because its base is not known


def norms(lora: Lora, base: Base | None = None) -> list[Row]:
    """What a LoRA changes, block by block, from the text to the picture. Of LoRA and LoKr no change is made whole.

    Args:
        base: that the change of a DoRA is taken of; without it only the low-rank part is.

    Raises:
        ValueError: the LoRA does not fit the base.
    """
    dora = any("dora_scale" in parts for parts in lora.parts.values())
    if base:
        _family([lora], [1.0], base)
    places = _places(base, _sizes(lora), lora.name) if base and dora else {}
    squares, blocks = {}, defaultdict(list)
    for module, (parts, alpha) in lora.modules.items():
        squares[module] = _square(parts, alpha, places[module].read() if places else None)
        first, second, *_ = [*module.split("."), ""]
        block = f"{first}.{second}" if first in ("down_blocks", "up_blocks") else first
        part = "attention" if ".attentions." in module else "convolutions"
        blocks[ORDER.index(first), block, part if "block" in first else ""].append(module)
    whole = sum(squares.values()) or 1.0
    rows = []
    for (_, block, part), own in sorted(blocks.items()):
        ranks = {rank for module in own if (rank := layers.rank_of(lora.parts[module]))}
        square, largest = sum(squares[module] for module in own), max(own, key=squares.__getitem__)
        only = dora and not places
        rows.append(Row(block, part, len(own), sorted(ranks), square**0.5, square / whole, largest, only))
    return rows


def _square(parts: Parts, alpha: float, weight: Tensor | None = None) -> float:
    """The squared Frobenius norm of a module's change; of a DoRA without its weight that of the low-rank part."""
    kind = layers.algorithm_of(parts)
    if kind == "loha" or weight is not None:
        return layers.change(parts, alpha, weight).double().square().sum().item()
    if kind != "lokr":
        return _scale(parts, alpha) ** 2 * _square_of_product(parts["up"].flatten(1), parts["down"].flatten(1))
    one, two = (  # ‖A ⊗ B‖ = ‖A‖ · ‖B‖
        parts[whole].double().square().sum().item()
        if (whole := f"lokr_w{n}") in parts
        else _square_of_product(parts[f"{whole}_a"], parts[f"{whole}_b"].flatten(1))
        for n in (1, 2)
    )
    return _scale(parts, alpha) ** 2 * one * two


def _square_of_product(a: Tensor, b: Tensor) -> float:
    """‖a @ b‖² = tr((aᵀa)(bbᵀ)), of matrices (m, r) and (r, n)."""
    a, b = a.double(), b.double()
    return ((a.T @ a) * (b @ b.T)).sum().item()


def norms_table(rows: Sequence[Row]) -> str:
    """What `norms` tells, in aligned lines for a terminal."""
    lines = [f"{'block':<15} {'part':<13}{'modules':>8}{'rank':>9}{'norm':>11}{'share':>8}  largest"]
    for row in rows:
        size = f"{row.modules:>8}{_span(row.ranks):>9}{row.norm:>11.4g}{row.share:>8.1%}"
        lines.append(f"{row.block:<15} {row.part:<13}{size}  {row.largest}")
    lines.append(f"{'all':<29}{sum(row.modules for row in rows):>8}{math.hypot(*(row.norm for row in rows)):>20.4g}")
    if any(row.low_rank_only for row in rows):
        lines.append("A DoRA without its base: its low-rank part alone, without the lengths that it gives to columns.")
    return "\n".join(lines)


def _span(numbers: Sequence[int]) -> str:
    return f"{min(numbers)}–{max(numbers)}" if len(set(numbers)) > 1 else "".join(map(str, set(numbers)))
