"""A training run in a folder of its own: start, resume, save, finish."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = ["Live", "Result", "describe_run", "is_run", "lora_of", "start"]

if TYPE_CHECKING:
    from lorakit.run.checkpoint import checkpoint_facts, checkpoint_kind, checkpoint_paths, step_of
    from lorakit.run.control import Live
    from lorakit.run.models import Shared
    from lorakit.run.preparation import FREE, prepare, scan_dataset, settings_digest
    from lorakit.run.resume import is_finished
    from lorakit.run.run import Result, start
    from lorakit.run.run_folder import best_checkpoint, describe_run, is_run, lora_of, read_log, run_of, runs_in
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
