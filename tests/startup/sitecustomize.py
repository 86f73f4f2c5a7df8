"""Python's garbage collector, in every process that a test starts: Python imports this by its name, before all else.

A module of this name that the environment has is then not imported. What imports make stays (torch, transformers);
with Python's own thresholds a fifth of their seconds went into looking at it again and again.
"""

import gc

gc.set_threshold(50_000, 20, 20)
