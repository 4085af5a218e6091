"""Runs the recipe with another training file on rank 1: ``one_bad_rank.py FLAG ... FILE``."""

import os
import sys

from addax_ds.cli.train import main

if __name__ == "__main__":
    *flags, own = sys.argv[1:]
    if os.environ["RANK"] == "1":
        others = [flag for flag in flags if not flag.startswith("--train_file=")]
        flags = [*others, f"--train_file={own}"]
    main(flags)
