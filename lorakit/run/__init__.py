"""A training run in a folder of its own: start, resume, save, finish."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = ["Control", "Result", "Run", "RunFolder", "is_run", "lora_of", "prepare", "read_log", "scan_dataset", "start"]

if TYPE_CHECKING:
    from lorakit.run.checkpoint import checkpoint_facts, checkpoint_paths, step_of
    from lorakit.run.control import Control
    from lorakit.run.models import Shared
    from lorakit.run.preparation import FREE, Prepared, prepare, scan_dataset, settings_digest
    from lorakit.run.resume import OtherSettings, is_finished
    from lorakit.run.run import TRAINING, Result, Run, start
    from lorakit.run.run_folder import RunFolder, is_run, lora_of, read_log, run_of, runs_in
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
