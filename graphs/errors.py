"""Mistakes that only the model layer can see; the ops' own are in ``moe_ops.errors``."""

from moe_ops.errors import MoeEpError


class TransformersVersionError(MoeEpError, ImportError):
    """transformers is missing, or older than the experts interface this package plugs into."""


class UnsupportedModelError(MoeEpError):
    """A model, a gate or a checkpoint that ``"moe_ep"`` does not serve; the message says why and what to do."""


class CheckpointError(MoeEpError):
    """A checkpoint lacks weights, or holds weights that do not fit the model."""


class ShardingError(MoeEpError, ValueError):
    """The experts cannot be split over the group as asked, or the ranks disagree about the model."""


class RequestError(MoeEpError, ValueError):
    """Prompts or sizes that a decode loop cannot take."""


class RankFailedError(MoeEpError):
    """A rank that this process started ended with an error."""
