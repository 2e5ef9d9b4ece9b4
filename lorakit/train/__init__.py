"""The training loop and what it is made of: losses, optimizers, validation."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = ["State", "Step", "drain", "initial_state", "steps", "validate_every"]

if TYPE_CHECKING:
    from lorakit.train.distributed import ALONE, Team, join_team
    from lorakit.train.initialisation import initialise
    from lorakit.train.loop import Diverged, State, Step, batch_prompts, drain, initial_state, plan_epochs, steps
    from lorakit.train.loss import add_noise, error, target
    from lorakit.train.optimizers import OPTIMIZERS, is_8bit, to_8bit
    from lorakit.train.validation import Advice, advise, hold_out, representative, traits, validate_every
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
