"""Convert settings of kohya's sd-scripts, or of its GUI, to a lorakit config, and read its dataset TOMLs."""

from typing import TYPE_CHECKING

from lorakit import _lazy

__all__ = ["Imported", "convert", "from_command", "read"]

if TYPE_CHECKING:
    from lorakit.kohya.conversion import Imported, convert
    from lorakit.kohya.files import from_command, read
    from lorakit.kohya.folders import Subset, subsets
else:
    __getattr__, __dir__ = _lazy.attach(__name__)
