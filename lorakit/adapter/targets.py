"""Which modules of a UNet and of text encoders an adapter changes, and how settings name them."""

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
Models = Mapping[str, nn.Module]  # "unet" and TEXT_ENCODERS -> what is adapted together
TRANSFORMER = re.compile(
    r"(^|\.)attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))$"
)
RESNET = re.compile(
    r"(^|\.)(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|downsamplers\.0\.conv|upsamplers\.0\.conv)$"
)


TEXT = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")


# ── Into the models and out of them ───────────────────────────────────────────────────────────────────────────────────


def together(models: nn.Module | Models) -> dict[str, nn.Module]:
    """A UNet alone, or models by name."""
    return {"unet": models} if isinstance(models, nn.Module) else dict(models)


def model_of(name: str) -> str:
    """The model that a layer of this name belongs to."""
    first = name.partition(".")[0]
    return first if first in TEXT_ENCODERS else "unet"


def within(models: Models, name: str) -> tuple[nn.Module, str]:
    """The module that a layer's path starts from, and that path."""
    model = models[model_of(name)]
    if model_of(name) == "unet":
        return model, name
    return getattr(model, "text_model", model), name.partition(".")[2]  # newer transformers have no inner text_model


def find(models: nn.Module | Models, name: str) -> nn.Module | None:
    """The module of a name; None where there is none."""
    models = together(models)
    if model_of(name) not in models:
        return None
    start, path = within(models, name)
    try:
        return start.get_submodule(path)
    except AttributeError:
        return None


def paths(models: Models) -> Iterator[str]:
    """The name of every module of models, in their own order."""
    for own, model in models.items():
        start, prefix = (model, "") if own == "unet" else (getattr(model, "text_model", model), f"{own}.")
        yield from (prefix + path for path, _ in start.named_modules())


def text_names(encoder: nn.Module, own: str = "text_encoder") -> list[str]:
    """The modules of a text encoder that a LoRA adapts, as kohya's: every Linear of its attention and feed-forward.

    72 for SD 1.x, 138 for SD 2.x, 72 and 192 for SDXL's two.

    Args:
        own: the encoder's name, "text_encoder" or "text_encoder_2".

    Raises:
        RuntimeError: the encoder has other modules than its config says.
    """
    start, _ = within({own: encoder}, f"{own}.")
    found = [name for name, module in start.named_modules() if isinstance(module, nn.Linear) and TEXT.fullmatch(name)]
    if len(found) != (expected := 6 * encoder.config.num_hidden_layers):
        raise RuntimeError(
            f"{len(found)} modules to adapt were found in this {own}, {expected} belong there. "
            "An adapter that is still injected must be ejected first; else this transformers release names them "
            "otherwise."
        )
    return [f"{own}.{name}" for name in found]


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


def adapted_names(models: Models, targets: str) -> list[str]:
    names = target_names(models["unet"], targets) if "unet" in models else []
    return names + [name for own in TEXT_ENCODERS if own in models for name in text_names(models[own], own)]


def value_at(values: dict, module: str):
    """What is given for a module: by the longest path in `values` that leads to it; None where none does."""
    paths = [path for path in values if module == path or module.startswith(path + ".")]
    return values[max(paths, key=len)] if paths else None


def check_places(values: dict, modules: Sequence[str], setting: str) -> None:
    """Raise ValueError where a setting by place names one that no adapted module is in."""
    for path in values:
        if not any(value_at({path: 1}, module) for module in modules):
            places = sorted({".".join(m.split(".")[: 1 if m.startswith(("mid", "text")) else 2]) for m in modules})
            raise ValueError(
                f"{setting}: nothing is adapted at {path!r}. The places are {', '.join(places)}, and below."
            )
