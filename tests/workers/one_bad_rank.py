"""Runs the recipe with another flag on rank 1: ``one_bad_rank.py FLAG ... --NAME=OTHER``."""

import os
import sys

from addax_ds.cli.train import main

if __name__ == "__main__":
    *flags, own = sys.argv[1:]
    if os.environ["RANK"] == "1":
        name = own[: own.index("=") + 1]
        flags = [*(flag for flag in flags if not flag.startswith(name)), own]
    main(flags)
