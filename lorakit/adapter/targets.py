"""The modules of a UNet and of text encoders that an adapter changes, and the paths by which settings name them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
Models = Mapping[str, nn.Module]  # by name: "unet" and those of TEXT_ENCODERS
TRANSFORMER = re.compile(
    r"(^|\.)attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))$"
)
RESNET = re.compile(
    r"(^|\.)(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|downsamplers\.0\.conv|upsamplers\.0\.conv)$"
)
TEXT = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
PROJECTION = "text_encoder_2.text_projection"  # adapted by OneTrainer's files, not by lorakit's runs
WIDE = ("conv", "conv1", "conv2", "conv_in", "conv_out")  # the last names of a UNet's 3×3 convolutions


def by_name(models: nn.Module | Models) -> dict[str, nn.Module]:
    """Models by name; a module by itself is a UNet."""
    return {"unet": models} if isinstance(models, nn.Module) else dict(models)


def model_of(name: str) -> str:
    """The model that a layer of this name belongs to."""
    first = name.partition(".")[0]
    return first if first in TEXT_ENCODERS else "unet"


def path_of(name: str) -> str:
    """The path of a layer in its model."""
    return name if model_of(name) == "unet" else name.partition(".")[2]


def is_wide(name: str) -> bool:
    """Whether a module of a Stable Diffusion, by its name, is a convolution over 3×3 pixels."""
    return model_of(name) == "unet" and name.rpartition(".")[2] in WIDE


def within(models: Models, name: str) -> tuple[nn.Module, str]:
    """The module that a layer's path starts from, and that path."""
    model, path = models[model_of(name)], path_of(name)
    return model if name == PROJECTION else getattr(
        model, "text_model", model
    ), path  # newer transformers have no inner one


def find(models: nn.Module | Models, name: str) -> nn.Module | None:
    """The module with a name; None where there is none."""
    models = by_name(models)
    if model_of(name) not in models:
        return None
    start, path = within(models, name)
    try:
        return start.get_submodule(path)
    except AttributeError:
        return None


def paths(models: Models) -> Iterator[str]:
    """The name of every module of models, in their own order."""
    for which in models:
        prefix = "" if which == "unet" else f"{which}."
        start, _ = within(models, prefix)
        yield from (prefix + path for path, _ in start.named_modules())
        if start is not models[which] and find(models, PROJECTION):
            yield PROJECTION


def text_names(encoder: nn.Module, which: str = "text_encoder") -> list[str]:
    """The modules of a text encoder that a LoRA adapts, as kohya's: every Linear of its attention and feed-forward.

    72 for SD 1.x, 138 for SD 2.x, 72 and 192 for SDXL's two.

    Args:
        which: the encoder's name, "text_encoder" or "text_encoder_2".

    Raises:
        RuntimeError: the encoder has other modules than its config says.
    """
    start, _ = within({which: encoder}, f"{which}.")
    names = [name for name, module in start.named_modules() if isinstance(module, nn.Linear) and TEXT.fullmatch(name)]
    config: Any = encoder.config
    _check_count(len(names), 6 * config.num_hidden_layers, which, "transformers")
    return [f"{which}.{name}" for name in names]


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
    plain = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    names = {name for name in plain if TRANSFORMER.search(name)}
    config: Any = unet.config
    _check_count(len(names), transformer_modules(config), "UNet's attention", "diffusers")
    if targets == "attention+conv":
        names |= {name for name in plain if RESNET.search(name)}
    return [name for name in plain if name in names]


def _check_count(count: int, expected: int, place: str, library: str) -> None:
    """Check that no class was renamed: a run would otherwise train a part of a LoRA without notice."""
    if count != expected:
        raise RuntimeError(
            f"{count} modules to adapt were found in this {place}, {expected} were expected. An adapter that is still "
            f"injected must be ejected first; otherwise this release of {library} has other names for them."
        )


def transformer_modules(config: Mapping[str, Any]) -> int:
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
    """`target_names` of the UNet, if it is among the models, and `text_names` of their text encoders."""
    names = target_names(models["unet"], targets) if "unet" in models else []
    return names + [name for which in TEXT_ENCODERS if which in models for name in text_names(models[which], which)]


def value_at(values: Mapping[str, Any], module: str) -> Any:
    """The value for a module: that of the longest path in `values` that leads to it; None where none does."""
    paths = [path for path in values if module == path or module.startswith(path + ".")]
    return values[max(paths, key=len)] if paths else None


def check_places(values: Mapping[str, Any], modules: Sequence[str], setting: str) -> None:
    """Raise ValueError where a setting by place names a place without adapted modules."""
    for path in values:
        if not any(value_at({path: 1}, module) for module in modules):
            places = sorted({".".join(m.split(".")[: 1 if m.startswith(("mid", "text")) else 2]) for m in modules})
            raise ValueError(
                f"{setting}: no module at {path!r} is adapted. The places are {', '.join(places)}, and those in them."
            )
