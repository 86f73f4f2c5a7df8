"""What a process that interprets kernels does before it is forked, so that no rank's first call takes longer."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moe_ops.emulator import Rank
from tests.moe_ops.emulated import Shape
from tests.moe_ops.test_zero_copy import any_order

torch.set_num_threads(1)
any_order(Rank(0, 1, False, dist.HashStore()), Shape((2,), rows=2, hidden_size=16), "dcDCM")
