"""LoRA layers and LoRA files: inject, read, write, prove, merge."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = [
    "Adapter",
    "Lora",
    "eject",
    "extract",
    "inject",
    "load",
    "merge",
    "merge_into_base",
    "prove",
    "resize",
    "save",
    "strength",
]

if TYPE_CHECKING:
    from lorakit.adapter.algorithms import ALGORITHMS
    from lorakit.adapter.attachment import attach, copy_weights, file_specs
    from lorakit.adapter.injection import Adapter, eject, inject, stack, strength, use
    from lorakit.adapter.lora import FAMILIES, Lora
    from lorakit.adapter.merging import extract, merge, merge_into_base, norms, norms_table, resize
    from lorakit.adapter.metadata import adapter_metadata, check_private, names_machine, precision_name, public_metadata
    from lorakit.adapter.metadata import thumbnail
    from lorakit.adapter.proof import describe_file, prove
    from lorakit.adapter.read import load
    from lorakit.adapter.specs import LayerSpec, layer_specs, run_specs
    from lorakit.adapter.targets import Models, TEXT_ENCODERS, check_places, model_of, value_at
    from lorakit.adapter.write import DTYPES, dtype_of, save, save_adapter
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
