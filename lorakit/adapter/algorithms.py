"""The algorithms of adapters: which parts a module has, and what they add to its weight.

The parts of a module have the names that files give them: "down" and "up" of a LoRA, "dora_scale" as well in DoRA,
"hada_w1_a" … of LoHa, "lokr_w1" … of LoKr. `layers` has the torch layers of each algorithm.

Source: Hu et al. 2021, arXiv:2106.09685 (LoRA); Liu et al. 2024, arXiv:2402.09353 (DoRA); Yeh et al. 2023,
arXiv:2309.14859 (LoCon, LoHa, LoKr); Hyeon-Woo et al. 2021, arXiv:2108.06098 (LoHa). LoHa's and LoKr's parts are those
of LyCORIS.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import product

import torch
from torch import Tensor

from lorakit import base as bases
from lorakit.adapter import targets

Parts = Mapping[str, Tensor]
Entry = tuple[Parts, float]  # a module's parts and alpha
LEAST = 1e-6  # smallest length of a column that is divided by: a column of zeros has none


class Algorithm(ABC):
    """One algorithm: how its parts are recognised, what they mean, and what it can be combined with."""

    name: str  # in settings
    title: str  # for people
    forms: tuple[frozenset[str], ...]  # the names of a module's parts, in each form that they can have
    scaled: tuple[str, ...]  # the part that takes a factor of the whole change: the first of these that a module has
    layouts: tuple[str, ...] = ("kohya",)  # the layouts of files that can hold it
    peft: tuple[str, str] = ("LoraConfig", "lora_alpha")  # PEFT's configuration, and the name of alpha in it
    lycoris: Mapping[str, str] = {}  # the arguments that make LyCORIS train it; none of a plain LoRA
    exact: frozenset[str] = frozenset()  # parts that stay float32 in every file, and that weight decay leaves out
    quantizable = True  # whether the base may be quantized
    needs_base = False  # whether the change depends on the base's weight
    sums = False  # whether the sum of several is one of a larger rank

    @abstractmethod
    def rank(self, parts: Parts) -> int | None:
        """The rank; None where no part is of low rank, so that there is no scale."""

    @abstractmethod
    def size(self, parts: Parts) -> tuple[int, int]:
        """(out, in · k · k) of the weight that the parts change.

        Raises:
            ValueError: their shapes do not match.
        """

    @abstractmethod
    def product(self, parts: Parts) -> Tensor:
        """The product of the parts without the scale: (out, in · k · k), float32."""

    def delta(self, parts: Parts, alpha: float, weight: Tensor | None = None) -> Tensor:
        """What the parts add to a weight at strength 1: (out, in · k · k), float32.

        Args:
            weight: the frozen weight, (out, in[, k, k]); only DoRA needs it, and without it adds what its LoRA adds.
        """
        return self.product(parts) * self.scale(parts, alpha)

    def square(self, parts: Parts, alpha: float, weight: Tensor | None = None) -> float:
        """The squared Frobenius norm of `delta`; most algorithms compute it without `delta`."""
        return _square(self.delta(parts, alpha, weight))

    def scale(self, parts: Parts, alpha: float) -> float:
        """alpha / rank."""
        rank = self.rank(parts)
        return alpha / rank if rank else 1.0

    @abstractmethod
    def layer_rank(self, parts: Parts) -> int:
        """The rank setting of a layer with these parts."""

    def kernel(self, parts: Parts) -> tuple[int, ...] | None:
        """The kernel of the module, () of a linear layer; None where the shapes of the parts do not say."""
        return None

    def times(self, parts: Parts, factor: float) -> dict[str, Tensor]:
        """Parts whose product is `factor` times as large."""
        part = next(part for part in self.scaled if part in parts)
        return {**parts, part: parts[part].float() * factor}

    def rounded(self, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parts as a file of a dtype holds them."""
        return {part: w.to(torch.float32 if part in self.exact else dtype) for part, w in parts.items()}

    def refusal(self, parts: Parts) -> str | None:
        """Why lorakit does not read parts of these shapes; None where it does."""
        return None

    def loss(self, dtype: torch.dtype) -> str | None:
        """What other programs lose of a file in this dtype, in a sentence; None where nothing is known."""
        return None

    def peft_settings(self, modules: Mapping[str, Parts], name: str) -> dict[str, object]:
        """Settings of PEFT, besides ranks and alphas, that give modules these parts. `name` is the file's, for errors.

        Raises:
            ValueError: no settings do.
        """
        return {}


class LoRA(Algorithm):
    """W + scale · up @ down."""

    name, title = "lora", "LoRA"
    forms, scaled = (frozenset({"down", "up"}),), ("up",)
    layouts: tuple[str, ...] = ("kohya", "diffusers", "peft")
    sums = True

    def rank(self, parts: Parts) -> int:
        return parts["down"].shape[0]

    layer_rank = rank

    def kernel(self, parts: Parts) -> tuple[int, ...]:
        return tuple(parts["down"].shape[2:])

    def size(self, parts: Parts) -> tuple[int, int]:
        if parts["down"].ndim != parts["up"].ndim:
            raise ValueError(f"shapes {tuple(parts['up'].shape)} and {tuple(parts['down'].shape)} do not match")
        return _size_of_product(parts["up"], parts["down"])

    def product(self, parts: Parts) -> Tensor:
        return parts["up"].float().flatten(1) @ parts["down"].float().flatten(1)

    def square(self, parts: Parts, alpha: float, weight: Tensor | None = None) -> float:
        return self.scale(parts, alpha) ** 2 * square_of_product(parts["up"].flatten(1), parts["down"].flatten(1))


class DoRA(LoRA):
    """A LoRA that learns the length of each column of the weight apart from its direction.

    A column is an input's: the paper's reading, and the one on which A1111, Forge, ComfyUI and LyCORIS agree. PEFT
    takes rows, which those programs read differently from each other.
    """

    name, title = "dora", "DoRA"
    forms = (frozenset({"down", "up", "dora_scale"}),)
    layouts, sums, needs_base = ("kohya",), False, True
    lycoris = {"algo": "lora", "dora_wd": "True"}
    exact = frozenset({"dora_scale"})  # a length of 1 rounds by 2⁻¹¹ in float16: training changes it by hardly more

    def size(self, parts: Parts) -> tuple[int, int]:
        if self.refusal(parts) is None and parts["dora_scale"].numel() != (columns := parts["down"].shape[1]):
            raise ValueError(f"{parts['dora_scale'].numel()} lengths for {columns} columns")
        return super().size(parts)

    def delta(self, parts: Parts, alpha: float, weight: Tensor | None = None) -> Tensor:
        change = super().delta(parts, alpha)
        if weight is None:
            return change
        before = weight.float()
        merged = before + change.view_as(before)
        lengths = bases.column_norm(merged).clamp(min=LEAST)
        return (merged * (parts["dora_scale"].float().flatten() / lengths).view(row(before)) - before).flatten(1)

    def square(self, parts: Parts, alpha: float, weight: Tensor | None = None) -> float:
        return super().square(parts, alpha) if weight is None else _square(self.delta(parts, alpha, weight))

    def loss(self, dtype: torch.dtype) -> str | None:
        return "sd-scripts and diffusers read a DoRA without its lengths (dora_scale), as a plain LoRA"

    def refusal(self, parts: Parts) -> str | None:
        if parts["dora_scale"].shape[0] == 1:
            return None
        return (
            "is a DoRA file whose lengths are those of rows. Programs disagree on what they mean; lorakit reads and "
            "writes lengths of columns, on which they agree"
        )


class _TwoMatrices(Algorithm):
    """A change that two matrices make, each of them whole or a product of low rank."""

    layouts, quantizable = ("kohya", "peft"), False
    matrices: tuple[str, str]

    def factors(self, parts: Parts) -> list[tuple[Tensor, ...]]:
        """(matrix,) or (a, b), whose product is the matrix, of the first and of the second matrix."""
        return [tuple(parts[p] for p in (w, f"{w}_a", f"{w}_b") if p in parts) for w in self.matrices]

    def loss(self, dtype: torch.dtype) -> str | None:
        if dtype != torch.bfloat16:
            return None
        return f"A1111 multiplies {self.title}'s matrices in the file's bf16, up to 18 % off: write it in fp16 or fp32"

    def sizes(self, parts: Parts) -> list[tuple[int, int]]:
        return [_size_of_product(*f) if len(f) == 2 else (len(f[0]), f[0][0].numel()) for f in self.factors(parts)]

    def whole(self, parts: Parts) -> list[Tensor]:
        """The two matrices, 2-D, float32."""
        factors = [[factor.float() for factor in each] for each in self.factors(parts)]
        return [f[0] @ f[1].flatten(1) if len(f) == 2 else f[0].flatten(1) for f in factors]


class LoHa(_TwoMatrices):
    """W + scale · (w1_a @ w1_b) ⊙ (w2_a @ w2_b)."""

    name, title = "loha", "LoHa"
    matrices = ("hada_w1", "hada_w2")
    forms = (frozenset(f"{matrix}_{side}" for matrix in matrices for side in "ab"),)
    scaled, peft, lycoris = ("hada_w1_a",), ("LoHaConfig", "alpha"), {"algo": "loha"}

    def rank(self, parts: Parts) -> int:
        return parts["hada_w1_b"].shape[0]

    layer_rank = rank

    def size(self, parts: Parts) -> tuple[int, int]:
        one, two = self.sizes(parts)
        if one != two:
            raise ValueError(f"shapes {one} and {two} do not match")
        return one

    def product(self, parts: Parts) -> Tensor:
        one, two = self.whole(parts)
        return one * two


class LoKr(_TwoMatrices):
    """W + scale · w1 ⊗ w2: w2, multiplied by each number of w1, side by side. Either may be a product of low rank."""

    name, title = "lokr", "LoKr"
    matrices = ("lokr_w1", "lokr_w2")
    forms = tuple(frozenset({*one, *two}) for one, two in product(*([(w,), (f"{w}_a", f"{w}_b")] for w in matrices)))
    scaled, peft, lycoris = ("lokr_w1", "lokr_w1_a"), ("LoKrConfig", "alpha"), {"algo": "lokr"}

    def rank(self, parts: Parts) -> int | None:
        return next((parts[part].shape[0] for part in ("lokr_w1_b", "lokr_w2_b") if part in parts), None)

    def layer_rank(self, parts: Parts) -> int:
        return self.rank(parts) or max(parts["lokr_w2"].shape[:2])

    def times(self, parts: Parts, factor: float) -> dict[str, Tensor]:
        return super().times(parts, factor if self.rank(parts) else 1.0)

    def size(self, parts: Parts) -> tuple[int, int]:
        one, two = self.sizes(parts)
        return one[0] * two[0], one[1] * two[1]

    def product(self, parts: Parts) -> Tensor:
        return torch.kron(*self.whole(parts))

    def square(self, parts: Parts, alpha: float, weight: Tensor | None = None) -> float:
        one, two = (  # ‖A ⊗ B‖ = ‖A‖ · ‖B‖
            square_of_product(f[0], f[1].flatten(1)) if len(f) == 2 else _square(f[0]) for f in self.factors(parts)
        )
        return self.scale(parts, alpha) ** 2 * one * two

    def peft_settings(self, modules: Mapping[str, Parts], name: str) -> dict[str, object]:
        from peft.tuners.lokr.layer import factorization

        both = any("lokr_w1_a" in parts for parts in modules.values())
        divided, same = set(), True  # (a side of a weight, the same side of w1)
        for module, parts in modules.items():
            (out, inputs), one = self.size(parts), self.factors(parts)[0]
            small = one[0].shape[0], one[-1].shape[1]
            inputs //= 9 if targets.is_wide(module) else 1
            divided |= {(out, small[0]), (inputs, small[1])}
            rank, large = self.layer_rank(parts), (out // small[0], inputs // small[1])
            whole = {"lokr_w1": not both or rank >= max(small) / 2, "lokr_w2": rank >= max(large) / 2}
            same &= all((part in parts) == is_whole for part, is_whole in whole.items())
        for factor in (-1, *sorted({part for _, part in divided if part > 1})):
            if same and all(factorization(side, factor)[0] == part for side, part in divided):
                return {"decompose_factor": factor, "decompose_both": both}
        raise ValueError(f"{name} divides its matrices as PEFT does not. Use layout 'kohya'.")


ALGORITHMS: dict[str, Algorithm] = {algorithm.name: algorithm for algorithm in (LoRA(), DoRA(), LoHa(), LoKr())}
PARTS = tuple(dict.fromkeys(p for algorithm in ALGORITHMS.values() for form in algorithm.forms for p in sorted(form)))


def algorithm_of(parts: Iterable[str]) -> Algorithm:
    """The algorithm whose parts have these names.

    Raises:
        ValueError: there is none.
    """
    names = frozenset(parts)
    for algorithm in ALGORITHMS.values():
        if names in algorithm.forms:
            return algorithm
    raise ValueError(f"{', '.join(sorted(names))} make no adapter")


def row(weight: Tensor) -> tuple[int, ...]:
    """The shape of one number for each column of a weight: (1, in[, 1, 1])."""
    return (1, weight.shape[1], *[1] * (weight.ndim - 2))


def square_of_product(a: Tensor, b: Tensor) -> float:
    """‖a @ b‖² = tr((aᵀa)(bbᵀ)), of matrices (m, r) and (r, n)."""
    a, b = a.double(), b.double()
    return ((a.T @ a) * (b @ b.T)).sum().item()


def _square(matrix: Tensor) -> float:
    return matrix.double().square().sum().item()


def _size_of_product(a: Tensor, b: Tensor) -> tuple[int, int]:
    if a.shape[1] != b.shape[0] or any(n != 1 for n in a.shape[2:]):
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not match")
    return a.shape[0], b[0].numel()
