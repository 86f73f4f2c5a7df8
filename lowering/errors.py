"""What can go wrong between the compiler and the ops."""

from __future__ import annotations

from moe_ops.errors import MoeEpError


class LoweringError(MoeEpError):
    """Base class of the errors that ``lowering`` raises on purpose."""


class UnsupportedTorchError(LoweringError):
    """This torch is outside the range whose compiler internals are known."""


class UnknownPassError(LoweringError, ValueError):
    """A pass was named that does not exist."""


class AgreementError(LoweringError):
    """The ranks of a group compiled graphs whose communication differs."""
