"""Predict memory, time and file size, and choose settings that fit."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = ["Prediction", "choose_settings", "compare_methods", "ladder", "plan_for_cards", "predict", "verdict"]

if TYPE_CHECKING:
    from lorakit.plan.memory import Prediction, free_memory_bytes, predict, readable_bytes, verdict
    from lorakit.plan.planning import choose_settings, compare_methods, ladder, plan_for_cards, predict_cached
    from lorakit.plan.planning import prediction_store, this_machine
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
