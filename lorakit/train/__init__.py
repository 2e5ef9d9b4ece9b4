"""The training loop and its parts: examples, losses, optimizers, validation."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = ["Batch", "Examples", "Noise", "State", "Step", "Validation", "batch_loss", "drain", "initial_state", "steps",
           "validate_every"]  # fmt: skip

if TYPE_CHECKING:
    from lorakit.train.distributed import ALONE, Team, join_team
    from lorakit.train.examples import Batch, Examples, captions_of
    from lorakit.train.initialisation import initialise
    from lorakit.train.loop import Diverged, State, Step, batch_loss, drain, initial_state, steps, watched
    from lorakit.train.loss import Noise, add_noise, error, target
    from lorakit.train.optimizers import OPTIMIZERS, is_8bit, to_8bit
    from lorakit.train.prediction import Answer, probe
    from lorakit.train.validation import Advice, Validation, advise, hold_out, representative, traits, validate_every
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
