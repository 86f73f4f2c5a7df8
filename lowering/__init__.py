"""What only a compiler can do for the ops: rewrites of the captured graph, and reports on it.

``import lowering`` turns the passes on for every later ``torch.compile`` (``enable``). Results do not depend on
them, only speed does. ``lowering.enable(without=["hoist_metadata"])`` leaves passes out, ``lowering.disable()``
takes them all away; ``lowering.NAMES`` lists them; ``lowering.explain`` says what they did to a model.
``lowering.enable(inexact=True)`` adds those of ``lowering.INEXACT``, which may change bits.
"""

from .errors import AgreementError, LoweringError, UnknownPassError, UnsupportedTorchError
from .explain import Explanation, explain
from .passes import INEXACT, NAMES, Options, allow_inexact, disable, enable, enabled_options

__all__ = [
    "INEXACT",
    "NAMES",
    "AgreementError",
    "Explanation",
    "LoweringError",
    "Options",
    "UnknownPassError",
    "UnsupportedTorchError",
    "allow_inexact",
    "disable",
    "enable",
    "enabled_options",
    "explain",
]

enable()
