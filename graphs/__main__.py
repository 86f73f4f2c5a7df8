"""``python -m graphs`` is ``moe-ep``."""

from .cli import main

main()
