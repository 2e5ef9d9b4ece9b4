"""Merge LoRAs into one or into a base, change their rank, extract the difference of two bases, compare their norms.

All of it computes one module's weights at a time, on the CPU, in float32 or better: no model is loaded.
"""

import errno
import math
import shutil
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit import base as bases
from lorakit import storage
from lorakit.adapter import metadata as metadata_module
from lorakit.adapter import targets as targets_module
from lorakit.adapter import write
from lorakit.adapter.algorithms import ALGORITHMS, Entry, Parts, algorithm_of, square_of_product
from lorakit.adapter.lora import FAMILIES, Lora, Size, check_sizes, distinct, finite
from lorakit.base import Base, WeightPlace
from lorakit.console import Console

Addend = tuple[Parts, float, float]  # parts, alpha, strength
Spectrum = tuple[Tensor, Tensor, Tensor, float]  # U (out, n), singular values (n,), Vᵀ (n, in · k · k), energy of all


@dataclass(frozen=True)
class Approximation:
    """A computed LoRA, and how much of the change that it approximates it keeps."""

    lora: Lora
    energies: dict[str, tuple[float, float]] = field(repr=False)
    """Module → squared Frobenius norm of its change that is kept, and of its whole change."""

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
        text = f"{len(kept)} modules of rank {_span(ranks)} keep {self.share:.1%} of the change"
        return text + (f", the least {kept[least]:.1%} in {least}" if kept[least] < 0.9995 else "")


# ── Several in one ────────────────────────────────────────────────────────────────────────────────────────────────────


def merge(
    loras: Sequence[Lora], strengths: Sequence[float], rank: int | None = None, base: Base | None = None
) -> Approximation:
    """One LoRA that adds what several add together. Scales and strengths go into the weights: alpha is the rank.

    Args:
        rank: None puts the matrices of plain LoRAs side by side, which is exact: a module's rank is the sum of theirs.
            A number keeps the best approximation of at most that rank, of LoRAs of any algorithm.
        base: the one whose weights a DoRA's change depends on.

    Raises:
        ValueError: LoRAs of several families or bases; an algorithm that needs a rank or a base, without it.
    """
    family = _family(loras, strengths, base)
    _sensible(rank)
    algorithms = {algorithm: lora.name for lora in loras for algorithm in lora.algorithms.values()}
    for algorithm, name in algorithms.items():
        if rank is None and not algorithm.sums:
            raise ValueError(f"{name} is a {algorithm.name}; only plain LoRAs can be put side by side. Give a rank.")
        if base is None and algorithm.needs_base:
            raise ValueError(f"{name} is a {algorithm.title}: its change depends on the base's weights. Give the base.")
    sizes: dict[str, Size] = {}
    for lora in loras:
        for module, (out, inputs) in lora.sizes.items():
            if sizes.setdefault(module, (out, inputs)) != (out, inputs):
                raise ValueError(
                    f"{lora.name} is for another base than those before it: its {module} is {out}×{inputs}, theirs "
                    f"{sizes[module][0]}×{sizes[module][1]}."
                )
    places = _places(base, sizes, _named(loras, strengths)) if base and any(a.needs_base for a in algorithms) else {}
    modules, energies = {}, {}
    for module in sizes:
        addends = _addends(module, loras, strengths)
        if all(algorithm_of(parts).sums for parts, _, _ in addends):
            up, down = _side_by_side(addends)
            energies[module] = (square_of_product(up, down),) * 2
            if rank is not None:
                up, down, energies[module] = _cut(_svd_of_product(up, down), rank)
        else:
            change = _added(addends, places[module].read() if places else None)
            up, down, energies[module] = _cut(_svd(change, rank), rank)
        modules[module] = _formed(up, down, _kernel(module, addends[0][0], family)), float(len(down))
    entries = {key: {lora.metadata[key] for lora in loras if key in lora.metadata} for key in OF_BASE}
    agreed = {key: values.pop() for key, values in entries.items() if len(values) == 1}
    metadata = metadata_module.base_metadata(family) | metadata_module.public_metadata(agreed)
    words = dict.fromkeys(word.strip() for lora in loras for word in lora.metadata.get(TRIGGER, "").split(","))
    if trigger := ", ".join(filter(None, words)):
        metadata[TRIGGER] = trigger
    metadata |= _network(modules, f"merged from {_named(loras, strengths)}")
    aside = {key: tensor for lora in reversed(loras) for key, tensor in lora.aside.items()}
    return Approximation(Lora("the merged LoRA", family, metadata, modules, aside), energies)


def _family(loras: Sequence[Lora], strengths: Sequence[float], base: Base | None) -> str | None:
    """The family that LoRAs, and a base, have in common; None where it is not known of any.

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
                f"{name} is an {FAMILIES[family]} LoRA, {known[0][0]} is {FAMILIES[known[0][1]]}: they cannot "
                "be combined. Use LoRAs and bases of one family."
            )
    return known[0][1] if known else None


def _sensible(rank: int | None, energy: float | None = None) -> None:
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank} leaves nothing. Give 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy {energy} is no share. Give one above 0 and up to 1, such as 0.98.")


def _named(loras: Sequence[Lora], strengths: Sequence[float]) -> str:
    return ", ".join(f"{lora.name} at {strength:g}" for lora, strength in zip(loras, strengths, strict=True))


def _addends(module: str, loras: Sequence[Lora], strengths: Sequence[float]) -> list[Addend]:
    return [(*lora.modules[module], s) for lora, s in zip(loras, strengths, strict=True) if module in lora.modules]


def _side_by_side(addends: Sequence[Addend]) -> tuple[Tensor, Tensor]:
    """Up (out, r) and down (r, in · k · k) whose product is the sum of plain LoRAs' changes, float32."""
    ups, downs = [], []
    for parts, alpha, strength in addends:
        factor = strength * algorithm_of(parts).scale(parts, alpha)
        root = abs(factor) ** 0.5  # a small scale in one of the two would leave float16 few digits
        ups.append(parts["up"].flatten(1).float() * math.copysign(root, factor))
        downs.append(parts["down"].flatten(1).float() * root)
    return torch.cat(ups, 1), torch.cat(downs)


def _added(addends: Sequence[Addend], weight: Tensor | None) -> Tensor:
    """The sum of changes to a module's weight, one after the other: (out, in · k · k), float32.

    Args:
        weight: (out, in[, k, k]); only DoRA needs it.
    """
    (parts, alpha, strength), *others = addends
    total = strength * algorithm_of(parts).delta(parts, alpha, weight)
    for parts, alpha, strength in others:
        so_far = None if weight is None else weight.float() + total.view_as(weight)
        total.add_(strength * algorithm_of(parts).delta(parts, alpha, so_far))
    return total


def _places(base: Base, sizes: Mapping[str, Size], name: str) -> dict[str, WeightPlace]:
    """Where a base has the weights of modules.

    Args:
        sizes: module → (out, in · k · k).
        name: of the LoRA with these modules, for the message.

    Raises:
        ValueError: it lacks one, or has it in another size.
    """
    models = {targets_module.model_of(module) for module in sizes} & base.configs.keys()
    weights = {which: bases.weight_places(base, which) for which in models}
    keys = {module: (targets_module.model_of(module), f"{targets_module.path_of(module)}.weight") for module in sizes}
    places = {module: weights[which][key] for module, (which, key) in keys.items() if key in weights.get(which, ())}
    check_sizes(name, sizes, base.name, {module: place.shape for module, place in places.items()})
    return places


# ── Into a base ───────────────────────────────────────────────────────────────────────────────────────────────────────

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
MUCH = 0.5  # noise of rounding, as a share of the change, from which another dtype is advised
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")  # they do not hold for changed weights


def merge_into_base(
    base: Base, loras: Sequence[Lora], strengths: Sequence[float], out: str | Path, *,
    dtype: torch.dtype | None = None, console: Console | None = None,
) -> Path:  # fmt: skip
    """Write a base with LoRAs merged into it, one after the other; whole or not at all.

    It has its source's form: a diffusers folder with the same shards, or a file with the same keys and metadata. One
    tensor at a time is in memory; sums are computed in float32 and rounded once.

    Args:
        out: a new folder, or a `.safetensors` file where the base is one.
        dtype: of all models' weights; None leaves each as it is.
        console: gets a line for each changed file, for embeddings in a LoRA, which a base cannot hold, and for what
            rounding leaves of the change: next to nothing in fp8.

    Raises:
        ValueError: LoRAs of another family, or with modules that the base lacks; an `out` of the wrong form.
        FloatingPointError: a sum is too large for the dtype.
        OSError: no room for it, or no right to write; nothing is left behind.
    """
    out, console = Path(out), console or Console()
    _family(loras, strengths, base)
    kind, form = ("file", "another file's, with .safetensors") if base.file else ("folder", "a new folder's")
    if bool(base.file) != (out.suffix == ".safetensors") or (base.file and out.resolve() == base.file.resolve()):
        raise ValueError(f"{base.name} is a {kind}, and so is the merged base: give {form} name, not {out.name}.")
    places: dict[str, WeightPlace] = {}
    for lora in loras:
        places |= _places(base, lora.sizes, lora.name)
        if lora.aside:
            console.say(f"merge     {len(lora.aside)} embeddings of {lora.name} are left out: a base cannot hold them")
    changes: dict[Path, dict[str, list]] = defaultdict(lambda: defaultdict(list))  # file → key → its parts' addends
    for module, place in places.items():
        changes[place.file][place.key].append((place, _addends(module, loras, strengths)))
    note = {"modelspec.merged_from": f"{base.name}, {_named(loras, strengths)}"}
    metadata_module.check_private(note)
    plans, copied = _plans(base, changes, note, dtype)
    size = sum(plan.size for plan in plans.values()) + sum(file.stat().st_size for file in copied)
    _check_room(out, size)
    rounding = Rounding()
    with storage.write_file(out, size) if base.file else storage.write_folder(out) as partial:
        for file in (*copied, *plans):
            target = partial if base.file else partial / file.relative_to(base.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file not in plans:
                shutil.copyfile(file, target)
                continue
            _rewrite(file, target, plans[file], changes[file], rounding)
            name = out.name if base.file else file.relative_to(base.folder).as_posix()
            console.say(f"merge     {name}: {len(changes[file])} of {len(plans[file].dtypes)} tensors changed")
    console.say(f"merge     {rounding.describe()}")
    return out


class _Plan(NamedTuple):
    """A file of the merged base."""

    header: bytes
    dtypes: dict[str, torch.dtype | None]  # of its tensors in their order; None leaves one as it is
    size: int


Pieces = Sequence[tuple[WeightPlace, Sequence[Addend]]]  # places in a tensor, and the changes of each


def _plans(
    base: Base, changed: Container[Path], note: dict[str, str], dtype: torch.dtype | None
) -> tuple[dict[Path, _Plan], list[Path]]:
    """A base's files that are written anew, and those that are copied.

    Args:
        changed: the files with tensors that LoRAs change.
        note: more metadata for those.
    """
    if base.file:  # noise schedules in the file keep their dtype
        models = (bases.UNET_PREFIX, bases.VAE_PREFIX, *bases.ENCODER_PREFIXES[base.family].values())
        return {base.file: _plan(base.file, note, dtype, models)}, []
    plans, copied = {}, [file for file in [base.folder / "model_index.json"] if file.is_file()]
    for folder in bases.component_folders(base):
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if folder.name in base.configs.keys() - {"scheduler"}:
            # Other forms of the weights (fp16, non-EMA, pickles) would not be merged: they are not copied.
            weights = bases.weight_files(base, folder.name)
            anew = [file for file in weights if dtype or file in changed]
            plans.update({file: _plan(file, note if file in changed else {}, dtype) for file in anew})
            files = [file for file in files if file.suffix in (".json", ".txt") or file in weights and file not in anew]
        copied += files
    return plans, copied


def _plan(file: Path, note: dict[str, str], dtype: torch.dtype | None, models: tuple[str, ...] = ("",)) -> _Plan:
    """A file as it will be.

    Args:
        models: prefixes of the keys whose tensors get the dtype.
    """
    metadata, table = storage.read_header(file)
    name = next((name for name, known in FLOATS.items() if known == dtype), "")
    dtypes, at = {}, 0
    for key, entry in table.items():
        begin, end = entry["data_offsets"]
        if dtype and name and entry["dtype"] in FLOATS and key.startswith(models):
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


@dataclass
class Rounding:
    """What rounding to a file's dtype leaves of the changes of its weights; sums over all numbers."""

    wanted: float = 0.0  # change · change
    kept: float = 0.0  # rounded · change
    noise: float = 0.0  # of (rounded − change), squared

    def add(self, change: Tensor, rounded: Tensor) -> None:
        """Add one weight's change, and that change after rounding. `rounded` is overwritten."""
        self.wanted += change.norm().item() ** 2
        self.kept += torch.dot(change.flatten(), rounded.flatten()).item()
        self.noise += rounded.sub_(change).norm().item() ** 2

    def describe(self) -> str:
        """What is left, in words."""
        if not self.wanted:
            return "the LoRAs change nothing"
        noise = math.sqrt(self.noise / self.wanted)
        text = f"rounding leaves {self.kept / self.wanted:.1%} of the change, and adds noise of {noise:.1%} of its size"
        return text + ("; give another dtype, such as fp16, to keep it" if noise > MUCH else "")


def _rewrite(file: Path, target: Path, plan: _Plan, changes: Mapping[str, Pieces], rounding: Rounding) -> None:
    """Write a file as planned, one tensor at a time. `changes` are by key."""
    with storage.open_safetensors(file) as source, target.open("wb") as stream:
        stream.write(plan.header)
        for key, dtype in plan.dtypes.items():
            tensor = source.get_tensor(key)
            dtype = dtype or tensor.dtype
            if key in changes:
                tensor = _changed(tensor, changes[key], dtype, rounding)
                finite({key: tensor}, file.name, f"Sums exceed {dtype}: give lower strengths, or another dtype")
            stream.write(tensor.to(dtype).contiguous().flatten().view(torch.uint8).numpy())


def _changed(tensor: Tensor, changes: Pieces, dtype: torch.dtype, rounding: Rounding) -> Tensor:
    place = changes[0][0]
    pieces = list(place.split(tensor))
    for place, addends in changes:
        before = pieces[place.part].float()
        change = _added(addends, before).view_as(before)
        pieces[place.part] = (change + before).to(dtype)
        rounding.add(change, pieces[place.part].float().sub(before))
    return place.join([piece.to(dtype) for piece in pieces])


# ── Another rank ──────────────────────────────────────────────────────────────────────────────────────────────────────


def resize(lora: Lora, rank: int | None = None, energy: float | None = None) -> Approximation:
    """A LoRA of another rank. LoHa and LoKr become plain LoRAs.

    The scale, alpha / rank, of each module stays, so that programs and training treat it as before. Singular values are
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
    if any(algorithm.needs_base for algorithm in lora.algorithms.values()):
        raise ValueError(
            f"{lora.name} is a DoRA, whose lengths belong to its matrices as they are. Merge it by itself, with a rank "
            "and its base: that makes a plain LoRA of its change there."
        )
    modules, energies = {}, {}
    for module, (parts, alpha) in lora.modules.items():
        algorithm = algorithm_of(parts)
        if algorithm.sums:
            spectrum = _svd_of_product(parts["up"].flatten(1), parts["down"].flatten(1))
        else:
            spectrum = _svd(algorithm.product(parts), rank)
        up, down, (kept, whole) = _cut(spectrum, rank, energy)
        scale = algorithm.scale(parts, alpha)
        energies[module] = scale**2 * kept, scale**2 * whole
        modules[module] = _formed(up, down, _kernel(module, parts, lora.family)), scale * len(down)
    outdated = ("lora_adapter_metadata", "ss_network_args", *HASHES)  # ranks, alphas and weights of before
    before = {key: value for key, value in lora.metadata.items() if key not in outdated}
    metadata = metadata_module.public_metadata(before)
    limits = [f"rank {rank}"] * (rank is not None) + [f"{energy} of the energy"] * (energy is not None)
    comment = f"resized from {lora.name} to {', '.join(limits)}; {metadata.get(COMMENT, '')}".rstrip("; ")
    metadata |= _network(modules, comment)
    return Approximation(replace(lora, metadata=metadata, modules=modules), energies)


# ── The difference of two bases ───────────────────────────────────────────────────────────────────────────────────────


def extract(
    tuned: Base, original: Base, rank: int, *, energy: float | None = None, targets: str = "attention",
    text_encoders: bool = True, console: Console | None = None,
) -> Approximation:  # fmt: skip
    """The difference of a fine-tuned base and its original, as a LoRA for the original. Alpha is the rank.

    Either is a folder or a file; one pair of weights is read at a time. Modules that do not differ are left out, and so
    are those that differ only because one base was rounded.

    Args:
        rank, energy: as for `resize`.
        targets: as for `target_names`.
        text_encoders: extract the difference of the text encoders too.

    Raises:
        ValueError: bases of several families; a weight that one lacks, or has in another size; no difference.
        RuntimeError: as `target_names`.
        FloatingPointError: weights are NaN.
    """
    _sensible(rank, energy)
    if tuned.family != original.family:
        raise ValueError(
            f"{tuned.name} is {FAMILIES[tuned.family]}, {original.name} is {FAMILIES[original.family]}: one cannot be "
            "a fine-tuned form of the other."
        )
    console = console or Console()
    parts = ("unet", *(original.text_encoders if text_encoders else ()))
    models = {which: bases.empty(original, which) for which in parts}
    names = targets_module.adapted_names(models, targets)
    shapes = {name: bases.weight_shape(targets_module.find(models, name)) for name in names}
    sizes = {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items()}
    pairs = [_places(base, sizes, original.name) for base in (original, tuned)]
    modules, energies = {}, {}
    for count, module in enumerate(sizes):
        if count % 100 == 0:
            console.say(f"extract   module {count + 1} of {len(sizes)}")
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
    metadata = metadata_module.base_metadata(original.family, original) | _network(modules, comment)
    return Approximation(Lora("the extracted LoRA", original.family, metadata, modules, {}), energies)


# ── Singular values ───────────────────────────────────────────────────────────────────────────────────────────────────


LARGE = 256  # the smaller side from which computing a few singular values is faster than all


def _svd(matrix: Tensor, rank: int | None = None) -> Spectrum:
    """The singular values of a matrix; of a large one only those that a small rank needs.

    Those are exact to about 1e-4 of their energy, of the flattest spectra to 1e-2, and the same at every call.

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
    """The singular values of up @ down, without computing it: those of the R in their QR decompositions."""
    (left, inner), (right, outer) = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(inner @ outer.T, full_matrices=False)
    return left @ u, s, vh @ right.T, s.square().sum().item()


def _cut(spectrum: Spectrum, rank: int | None, energy: float | None = None) -> tuple[Tensor, Tensor, tuple]:
    """The best approximation of a rank: up (out, r) and down (r, in · k · k), float32; its energy, and the whole's.

    Source: Eckart and Young 1936, doi:10.1007/BF02288367.
    """
    u, s, vh, whole = spectrum
    energies = s.square().cumsum(0).clamp(max=whole)
    enough = len(s) if energy is None else 1 + int((energies < energy * whole).sum())
    r = min(rank or len(s), enough, len(s))
    root = s[:r].sqrt()
    return (u[:, :r] * root).float(), (root[:, None] * vh[:r]).float(), (energies[r - 1].item(), whole)


def _formed(up: Tensor, down: Tensor, kernel: Sequence[int]) -> Parts:
    """Parts in the shapes of a module's layer: down (r, in[, k, k]), up (out, r[, 1, 1])."""
    down, up = down.reshape(len(down), -1, *kernel), up.reshape(*up.shape, *[1] * len(kernel))
    return {"down": down.contiguous(), "up": up.contiguous()}


def _kernel(module: str, parts: Parts, family: str | None) -> Sequence[int]:
    """A module's kernel, () of a linear layer: by its parts, or where these do not say (LoHa, LoKr) by its name."""
    if (kernel := algorithm_of(parts).kernel(parts)) is not None:
        return kernel
    if targets_module.is_wide(module):
        return (3, 3)
    leaf = module.rpartition(".")[2]
    return (1, 1) if leaf == "conv_shortcut" or (leaf in ("proj_in", "proj_out") and family == "sd15") else ()


# ── Metadata ──────────────────────────────────────────────────────────────────────────────────────────────────────────

COMMENT, TRIGGER = "ss_training_comment", "modelspec.trigger_phrase"
OF_BASE = (
    "ss_base_model_version", "ss_v2", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_clip_skip",
    "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.prediction_type",
    "modelspec.resolution", "modelspec.encoder_layer",
)  # fmt: skip


def _network(modules: Mapping[str, Entry], comment: str) -> dict[str, str]:
    """The metadata of computed LoRAs."""
    ranks = {module: len(parts["down"]) for module, (parts, _) in modules.items()}
    alphas = {module: alpha for module, (_, alpha) in modules.items()}
    kernels = {module: parts["down"].shape[2:] for module, (parts, _) in modules.items()}
    return metadata_module.network_metadata(ranks, alphas, kernels, ALGORITHMS["lora"]) | {COMMENT: comment}


# ── The size of the change by block ───────────────────────────────────────────────────────────────────────────────────

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
    ranks: list[int]  # the different ones; none of a LoKr without a part of low rank
    norm: float  # Frobenius norm of all its changes together
    share: float  # of the whole LoRA's squared norm, 0 to 1
    largest: str  # the module with the largest change
    low_rank_only: bool  # a DoRA's lengths are not counted, because its base is not known


def norms(lora: Lora, base: Base | None = None) -> list[Row]:
    """How much a LoRA changes, block by block, from the text to the picture.

    Args:
        base: whose weights a DoRA's change depends on; without it, only its low-rank part is measured.

    Raises:
        ValueError: the LoRA does not fit the base.
    """
    algorithms, ranks = lora.algorithms, lora.ranks
    needs_base = any(algorithm.needs_base for algorithm in algorithms.values())
    if base:
        _family([lora], [1.0], base)
    places = _places(base, lora.sizes, lora.name) if base and needs_base else {}
    squares, blocks = {}, defaultdict(list)
    for module, (parts, alpha) in lora.modules.items():
        squares[module] = algorithms[module].square(parts, alpha, places[module].read() if places else None)
        first, second, *_ = [*module.split("."), ""]
        block = f"{first}.{second}" if first in ("down_blocks", "up_blocks") else first
        part = "attention" if ".attentions." in module else "convolutions"
        blocks[ORDER.index(first), block, part if "block" in first else ""].append(module)
    whole = sum(squares.values()) or 1.0
    rows = []
    for (_, block, part), modules in sorted(blocks.items()):
        square, largest = sum(squares[module] for module in modules), max(modules, key=squares.__getitem__)
        only = needs_base and not places
        of_block = distinct(ranks[module] for module in modules)
        rows.append(Row(block, part, len(modules), of_block, square**0.5, square / whole, largest, only))
    return rows


def norms_table(rows: Sequence[Row]) -> str:
    """Rows of `norms` as aligned lines for a terminal."""
    lines = [f"{'block':<15} {'part':<13}{'modules':>8}{'rank':>9}{'norm':>11}{'share':>8}  largest"]
    for row in rows:
        size = f"{row.modules:>8}{_span(row.ranks):>9}{row.norm:>11.4g}{row.share:>8.1%}"
        lines.append(f"{row.block:<15} {row.part:<13}{size}  {row.largest}")
    lines.append(f"{'all':<29}{sum(row.modules for row in rows):>8}{math.hypot(*(row.norm for row in rows)):>20.4g}")
    if any(row.low_rank_only for row in rows):
        lines.append("A DoRA without its base: only its low-rank part, without the lengths of columns.")
    return "\n".join(lines)


def _span(numbers: Sequence[int]) -> str:
    return f"{min(numbers)}–{max(numbers)}" if len(set(numbers)) > 1 else "".join(map(str, set(numbers)))
