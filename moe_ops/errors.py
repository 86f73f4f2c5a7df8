"""One exception class for each mistake a user can make; every message says what to do about it."""


class MoeEpError(RuntimeError):
    """Base class of every error that moe-ep raises on purpose."""


class ShapeError(MoeEpError, ValueError):
    """Two tensors disagree about a dimension, or a size is out of its range."""


class DtypeError(MoeEpError, TypeError):
    """A tensor has an element type that the op does not take."""


class DeviceError(MoeEpError, ValueError):
    """Tensors of one call live on different devices, or on one the group cannot serve."""


class CapacityError(MoeEpError, ValueError):
    """More live rows than a buffer was set up for."""


class ArgumentError(MoeEpError, ValueError):
    """A keyword argument is unknown, or does not go with another one."""


class WorkspaceError(MoeEpError):
    """A group has no workspace, a closed one, or one set up with other values."""


class SymmetricMemoryError(MoeEpError, ValueError):
    """A tensor that other ranks must reach does not lie in symmetric memory of their group."""


class TransportError(MoeEpError):
    """The transport asked for does not work between the ranks of this group."""


class PeerTimeoutError(MoeEpError):
    """A rank did not arrive at a communication op within ``timeout_s``.

    ``op`` is the op's name, ``epoch`` the number of the communication call (counted from 0 per
    workspace), ``missing_ranks`` the ranks (of the group) that were not seen.
    """

    def __init__(self, op: str, epoch: int, missing_ranks: list[int], timeout_s: float):
        self.op, self.epoch, self.missing_ranks, self.timeout_s = op, epoch, missing_ranks, timeout_s
        ranks = ", ".join(map(str, missing_ranks)) or "unknown"
        super().__init__(
            f"{op}: rank(s) {ranks} did not arrive at communication call {epoch} within {timeout_s:g} s; "
            "restart the missing rank(s), or call workspace.reset(group) on the survivors' new group and go on."
        )

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (self.op, self.epoch, self.missing_ranks, self.timeout_s)
