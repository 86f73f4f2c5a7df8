"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits inside.

Rules that keep it safe, for a chain of our own launches:
the first of a chain is launched the ordinary way (what runs before is not ours, so it must have ended);
every later one waits (``gdc_wait``) in every program, before it touches what the chain wrote and before
its own writes; so the end of a kernel implies the end of all before it. What was there before the first one may be
read ahead of the wait. One that shares the work of the kernel before
it, and neither reads nor overwrites what that one writes, may wait at its end instead, if that one lets it start only
after its own wait (``fused_moe_rest_kernels``).
"""

from __future__ import annotations

from typing import Any

import torch


def supports_pdl(device: torch.device) -> bool:
    """Compute capability 9.0 (Hopper) and up."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def chain_start(on: bool, device: torch.device, behind: bool = False) -> dict[str, Any]:
    """Launch options of the first kernel of a chain: it lets the next one start early, and starts in order itself.

    ``behind``: the launch before it on this stream is another chain's last, which lets it start early. Then PDL is 2:
    it waits before anything else, and lets the next one start only after that, so that both chains are one.
    """
    on = on and supports_pdl(device)
    return {"PDL": 2, "launch_pdl": True} if on and behind else {"PDL": int(on)}


def chain_link(on: bool, device: torch.device) -> dict[str, Any]:
    """Launch options of a later kernel of a chain."""
    on = on and supports_pdl(device)
    return {"PDL": on, "launch_pdl": True} if on else {"PDL": False}
