"""LoRA layers on a frozen UNet: inject, set their strength, read and load their weights, eject.

PEFT makes the layers; the names and their number are checked here against what the UNet's config says there must be,
because a renamed class would otherwise train half of a LoRA in silence.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.config import Config

NAME = "default"
TRANSFORMER = re.compile(
    r"(^|\.)attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))$"
)
RESNET = re.compile(
    r"(^|\.)(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|downsamplers\.0\.conv|upsamplers\.0\.conv)$"
)


@dataclass
class Adapter:
    """LoRA layers that sit in a UNet."""

    unet: nn.Module
    layers: dict[str, nn.Module]  # module path in the UNet -> PEFT's layer around the frozen one
    ranks: dict[str, int]
    alphas: dict[str, float]
    targets: str

    def parameters(self) -> list[nn.Parameter]:
        """The trainable weights, in a fixed order."""
        return [weight for layer in self.layers.values() for weight in _pair(layer)]

    def state(self) -> dict[str, Tensor]:
        """The live weights by name: `<module>.down` (r, in[, k, k]) and `<module>.up` (out, r[, 1, 1])."""
        return {
            f"{name}.{part}": weight
            for name, layer in self.layers.items()
            for part, weight in zip(("down", "up"), _pair(layer), strict=True)
        }

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Copy weights in.

        Raises:
            ValueError: names or shapes differ from this adapter's; nothing is changed then.
        """
        own = self.state()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [f"{k} {tuple(state[k].shape)}" for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
        if wrong:
            raise ValueError(
                f"{len(wrong)} weights do not fit this adapter (rank {max(self.ranks.values())}, {self.targets}): "
                f"{', '.join(wrong[:4])}{' …' if len(wrong) > 4 else ''}. They are another run's or base's."
            )
        for name, weight in own.items():
            weight.copy_(state[name])


def _pair(layer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


def target_names(unet: nn.Module, targets: str = "attention") -> list[str]:
    """The modules a LoRA adapts, in the UNet's own order.

    Args:
        targets: "attention": every Linear and 1×1 convolution inside the transformer blocks, which is kohya's
            default; "attention+conv": the ResNet blocks and samplers as well (LoCon).

    Raises:
        ValueError: unknown targets.
        RuntimeError: the UNet has other modules than its config says (a renamed class, a layer already adapted).
    """
    if targets not in ("attention", "attention+conv"):
        raise ValueError(f"targets {targets!r} is unknown. Use 'attention' or 'attention+conv'.")
    plain = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    found = [name for name in plain if TRANSFORMER.search(name)]
    expected = transformer_modules(unet.config)
    if len(found) != expected:
        raise RuntimeError(
            f"{len(found)} attention modules were found in this UNet, {expected} belong there. "
            "An adapter that is still injected must be ejected first; else this diffusers release names them otherwise."
        )
    if targets == "attention+conv":
        found += [name for name in plain if RESNET.search(name)]
    order = {name: i for i, (name, _) in enumerate(unet.named_modules())}
    return sorted(found, key=order.__getitem__)


def transformer_modules(config) -> int:
    """How many modules "attention" must find: 2 projections a transformer and 10 a block in it.

    192 for SD 1.x and 2.x, 722 for SDXL.
    """
    downs, ups = config["down_block_types"], config["up_block_types"]
    layers, depths = config["layers_per_block"], config["transformer_layers_per_block"]
    layers = [layers] * len(downs) if isinstance(layers, int) else list(layers)
    depths = [depths] * len(downs) if isinstance(depths, int) else list(depths)
    count = 0
    for kinds, extra, order in ((downs, 0, 1), (ups, 1, -1)):
        for kind, n, depth in zip(kinds, layers[::order], depths[::order], strict=True):
            count += (n + extra) * (2 + 10 * depth) if "CrossAttn" in kind else 0
    return count + (2 + 10 * depths[-1] if "CrossAttn" in (config.get("mid_block_type") or "") else 0)


def inject(
    unet: nn.Module,
    rank: int,
    alpha: float,
    targets: str = "attention",
    *,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    modules: Sequence[str] | None = None,
    ranks: dict[str, int] | None = None,
    alphas: dict[str, float] | None = None,
    seed: int = 0,
) -> Adapter:
    """Put fresh LoRA layers into the UNet (in place) and freeze everything else. `eject` is the inverse.

    The up matrices are zero, so the UNet's output is unchanged until training; weights are float32 whatever the
    base's dtype (GradScaler cannot unscale half-precision gradients).

    Args:
        rank, alpha: of the linear layers and 1×1 convolutions; the update is scaled by alpha / rank.
        conv_rank, conv_alpha: of the 3×3 convolutions, the same when None.
        modules: adapt these instead of what `targets` names (an adapter read from a file).
        ranks, alphas: by module, over the ones above.
        seed: of the down matrices.

    Raises:
        RuntimeError: an adapter is already there.

    Source: Hu et al. 2021, arXiv:2106.09685; Yeh et al. 2023, arXiv:2309.14859 for the convolutions.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in unet.modules()):
        raise RuntimeError("This UNet already holds an adapter. Call adapter.eject(unet) first.")
    names = list(modules) if modules is not None else target_names(unet, targets)
    kernels = {name: unet.get_submodule(name) for name in names}
    wide = {n for n, m in kernels.items() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}
    ranks = {n: (conv_rank or rank) if n in wide else rank for n in names} | (ranks or {})
    alphas = {n: float((conv_alpha or alpha) if n in wide else alpha) for n in names} | (alphas or {})
    exact = {f"^{re.escape(n)}$": n for n in names}
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights=True,
        rank_pattern={p: ranks[n] for p, n in exact.items() if ranks[n] != rank},
        alpha_pattern={p: alphas[n] for p, n in exact.items() if alphas[n] != alpha},
    )  # fmt: skip
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, unet, NAME)
    layers = {name: unet.get_submodule(name) for name in names}
    for layer in layers.values():
        for weight in _pair(layer):
            weight.data = weight.data.float()
            weight.requires_grad_(True)
    return Adapter(unet, layers, ranks, alphas, targets)


def fresh(unet: nn.Module, config: Config) -> Adapter:
    """`inject` what a run's settings ask for.

    Raises:
        ValueError: `block_ranks` names a place that the UNet does not have, or leaves nothing to train.
        RuntimeError: as `inject`.

    Source: Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA). Its scale goes into the alphas, and so into every file.
    """
    modules = target_names(unet, config.targets)
    known(config.block_ranks, modules, "block_ranks")
    ranks = {name: of_place(config.block_ranks, name) for name in modules}
    modules = [name for name in modules if ranks[name] != 0]
    if not modules:
        raise ValueError("block_ranks leaves no module to train. Give some place a rank above 0.")
    alphas = {}
    for name in modules:
        wide = getattr(unet.get_submodule(name), "kernel_size", (1, 1)) != (1, 1)
        rank = (wide and config.conv_rank) or config.rank
        alpha = (wide and config.conv_alpha) or config.alpha
        ranks[name] = ranks[name] or rank
        # Where a place has a rank of its own, the scale stays what it is elsewhere.
        alphas[name] = alpha * (ranks[name] ** 0.5 if config.rank_stabilized else ranks[name] / rank)
    ranks = {name: ranks[name] for name in modules}
    return inject(
        unet, config.rank, config.alpha, config.targets, modules=modules, ranks=ranks, alphas=alphas, seed=config.seed
    )


def of_place(values: dict, module: str):
    """What is given for a module: by the longest path in `values` that leads to it; None where none does."""
    paths = [path for path in values if module == path or module.startswith(path + ".")]
    return values[max(paths, key=len)] if paths else None


def known(values: dict, modules: Sequence[str], setting: str) -> None:
    """Raise ValueError where a setting by place names one that no adapted module is in."""
    for path in values:
        if not any(of_place({path: 1}, module) for module in modules):
            places = sorted({".".join(m.split(".")[: 1 if m.startswith("mid") else 2]) for m in modules})
            raise ValueError(
                f"{setting}: nothing is adapted at {path!r}. The places are {', '.join(places)}, and below."
            )


def eject(unet: nn.Module) -> None:
    """Take every adapter out again (in place): the UNet is then the very one it was before `inject`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(unet.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, module.get_base_layer())
    if hasattr(unet, "peft_config"):
        del unet.peft_config


@contextmanager
def strength(adapter: Adapter, value: float) -> Iterator[None]:
    """Use the adapter at a strength (1 is as trained, 0 is the bare base) inside a `with` block."""
    before = {name: layer.scaling[NAME] for name, layer in adapter.layers.items()}
    try:
        for name, layer in adapter.layers.items():
            layer.scaling[NAME] = value * adapter.alphas[name] / adapter.ranks[name]
        yield
    finally:
        for name, layer in adapter.layers.items():
            layer.scaling[NAME] = before[name]


def delta(adapter: Adapter, name: str) -> Tensor:
    """What the adapter adds to a module's weight at strength 1: (alpha / rank) · up · down, in the weight's shape."""
    down, up = _pair(adapter.layers[name])
    product = up.flatten(1).float() @ down.flatten(1).float()
    return product.view(up.shape[0], *down.shape[1:]) * (adapter.alphas[name] / adapter.ranks[name])
