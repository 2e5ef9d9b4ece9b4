"""Compare checkpoints, LoRAs and runs, and measure what a LoRA learned."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = [
    "Comparison", "PictureOptions", "Report", "ReportOptions", "compare_runs", "find_candidates", "report",
    "save_comparison", "save_report", "sweep",
]  # fmt: skip

if TYPE_CHECKING:
    from lorakit.evaluate.candidates import Candidates, find_candidates, newest, open_for, starting_point
    from lorakit.evaluate.checklist import Report, report, save_report
    from lorakit.evaluate.comparison import Comparison, PictureOptions, compare_runs, save_comparison
    from lorakit.evaluate.pictures import ReportOptions
    from lorakit.evaluate.sweeps import sweep
    from lorakit.evaluate.variants import Column, columns, make_variants, variant
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
