"""Predict memory, time and file size, and choose settings that fit."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = ["Card", "Prediction", "StepCost", "choose_settings", "compare_methods", "ladder", "plan_for_cards",
           "predict", "step_cost", "verdict"]  # fmt: skip

if TYPE_CHECKING:
    from lorakit.plan.cards import Card, free_memory_bytes, this_machine
    from lorakit.plan.memory import StepCost, readable_bytes
    from lorakit.plan.methods import compare_methods
    from lorakit.plan.planning import choose_settings, ladder, largest, plan_for_cards, predict, verdict
    from lorakit.plan.prediction import Prediction
    from lorakit.plan.store import prediction_store, step_cost
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
