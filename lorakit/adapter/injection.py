"""Adapters in a frozen UNet and text encoders: inject, set the strength, read and load the weights, eject.

A layer is named by its path in the UNet; in a text encoder by `text_encoder.` (SDXL's second: `text_encoder_2.`) and
the path in its `text_model`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit import base as bases
from lorakit import storage
from lorakit.adapter.algorithms import ALGORITHMS
from lorakit.adapter.specs import LayerSpec
from lorakit.adapter.targets import RESNET, Models, by_name, find, model_of, within

if TYPE_CHECKING:
    from lorakit.adapter.layers import AdapterLayer


@dataclass
class Adapter:
    """Adapter layers in a UNet, in text encoders, or in both."""

    models: dict[str, nn.Module]  # that hold the layers: "unet", "text_encoder", "text_encoder_2"
    layers: dict[str, AdapterLayer]  # by the name of the module that each wraps

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders that hold layers."""
        return {which: model for which, model in self.models.items() if which != "unet"}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the frozen models compute in."""
        model: Any = next(iter(self.models.values()))
        return model.dtype

    @property
    def algorithm(self) -> str:
        return next((layer.spec.algorithm for layer in self.layers.values()), "lora")

    @property
    def ranks(self) -> dict[str, int]:
        return {name: layer.spec.rank for name, layer in self.layers.items()}

    @property
    def alphas(self) -> dict[str, float]:
        return {name: layer.spec.alpha for name, layer in self.layers.items()}

    @property
    def targets(self) -> str:
        """ "attention+conv" where ResNet blocks or samplers are adapted, else "attention"."""
        return "attention+conv" if any(map(RESNET.search, self.layers)) else "attention"

    def parameters(self) -> list[nn.Parameter]:
        """The trainable weights, in a fixed order."""
        return list(self.state().values())

    def state(self) -> dict[str, nn.Parameter]:
        """The live weights by name, `<module>.<part>`: `….down` (r, in[, k, k]), `….up` (out, r[, 1, 1]) and so on."""
        return {f"{name}.{part}": w for name, layer in self.layers.items() for part, w in layer.parts.items()}

    def file_size(self) -> int:
        """Bytes of the tensors of a float16 file: an alpha is float32, and so are DoRA's lengths."""
        layers = self.layers.values()
        exact = sum(w.numel() for layer in layers for part, w in layer.parts.items() if part in layer.algorithm.exact)
        return 4 * len(layers) + 2 * sum(weight.numel() for weight in self.parameters()) + 2 * exact

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy weights in.

        Raises:
            ValueError: names or shapes differ from this adapter's; nothing is changed then.
        """
        live = self.state()
        wrong = sorted(live.keys() ^ state.keys())
        wrong += [f"{k} {tuple(state[k].shape)}" for k in live.keys() & state.keys() if live[k].shape != state[k].shape]
        if wrong:
            raise ValueError(
                f"{len(wrong)} weights do not fit this adapter ({self.algorithm}, rank {max(self.ranks.values())}, "
                f"{self.targets}): {', '.join(wrong[:4])}{' …' if len(wrong) > 4 else ''}. "
                "They are another run's or base's."
            )
        for name, weight in live.items():
            weight.copy_(state[name])


@storage.exclusive
def inject(models: nn.Module | Models, specs: Mapping[str, LayerSpec], seed: int = 0) -> Adapter:
    """Put fresh adapter layers into models (in place) and freeze everything else. `eject` is the inverse.

    One part of each layer is zero, so the models' output is unchanged until training; weights are float32 whatever the
    base's dtype.

    Args:
        models: a UNet, or a UNet and text encoders by name.
        specs: by module, all of one algorithm; `layer_specs` and `run_specs` make them.
        seed: of the parts that are not zero.

    Raises:
        RuntimeError: a model already holds an adapter.
        ValueError: several algorithms; LoHa or LoKr on a quantized base.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from lorakit.adapter import layers as layers_module

    models = by_name(models)
    for which, model in models.items():
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise RuntimeError(f"This {which} already holds an adapter. Call adapter.eject on it first.")
    algorithms = {spec.algorithm for spec in specs.values()}
    if len(algorithms) > 1:
        raise ValueError(f"An adapter has one algorithm, not {', '.join(sorted(algorithms))}.")
    whole = [name for name in algorithms if not ALGORITHMS[name].quantizable]
    if whole and any(bases.is_quantized(find(models, name)) for name in specs):
        raise ValueError(f"algorithm {whole[0]!r} needs a base that is not quantized. Use 'lora' or 'dora'.")
    holders = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for which, model in models.items():
            model.requires_grad_(False)
            starts: dict[nn.Module, dict[str, LayerSpec]] = defaultdict(dict)
            for name in (name for name in specs if model_of(name) == which):
                start, path = within(models, name)
                starts[start][path] = specs[name]
                holders[which] = model
            for start, adapted in starts.items():
                layers_module.wrap(start, adapted)
    layers = {name: layer for name in specs if isinstance(layer := find(models, name), layers_module.AdapterLayer)}
    assert len(layers) == len(specs)
    return Adapter(holders, layers)


@storage.exclusive
def eject(models: nn.Module | Models) -> None:
    """Take every adapter out again (in place): the models are then the very ones they were before `inject`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for model in by_name(models).values():
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        for holder in {model, getattr(model, "text_model", model)}:
            if hasattr(holder, "peft_config"):
                del holder.peft_config


@storage.exclusive
def stack(models: nn.Module | Models, adapters: Sequence[Adapter]) -> Adapter:
    """Put ejected adapters back into models (in place), several at once; `eject` is the inverse.

    What each adds to the base at its strength is summed; a DoRA's, too, is that of the base without the others.

    Returns:
        All of them as one. Its strength cannot be set: set that of each, with `use`, before.
    """
    from lorakit.adapter.layers import Stack

    models = by_name(models)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        several = [adapter.layers[name] for adapter in adapters if name in adapter.layers]
        start, path = within(models, name)
        parent, _, child = path.rpartition(".")
        setattr(start.get_submodule(parent), child, Stack(several) if len(several) > 1 else several[0])
    return Adapter({which: model for adapter in adapters for which, model in adapter.models.items()}, {})


def use(adapter: Adapter, value: float) -> None:
    """Use the adapter at a strength from now on: 1 is as trained, 0 is the bare base.

    In between a weight is in between too: W + value · ΔW, as the programs that read the files do it.
    """
    for layer in adapter.layers.values():
        layer.use(value)


@contextmanager
def strength(adapter: Adapter, value: float) -> Iterator[None]:
    """`use` the adapter at a strength inside a `with` block."""
    before = {name: layer.strength for name, layer in adapter.layers.items()}
    try:
        use(adapter, value)
        yield
    finally:
        for name, layer in adapter.layers.items():
            layer.use(before[name])
