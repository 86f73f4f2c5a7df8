"""Python's garbage collector where tests compile: a tenth of the seconds went into it.

What imports have made stays, and there is much of it (torch, transformers): it is not looked at again. How often the
rest is, ``tests/startup`` says.
"""

from __future__ import annotations

import atexit
import gc


def look_at_new_things_only() -> None:
    """From now on, and in forks of this process."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries count as leaks, at exit, what only ends here


look_at_new_things_only()
