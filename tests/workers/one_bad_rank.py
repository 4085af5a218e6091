"""Runs the recipe with another training file on rank 1: ``one_bad_rank.py FLAG ... FILE``."""

import os
import sys

from addax_ds.cli.train import main

if __name__ == "__main__":
    *flags, own = sys.argv[1:]
    if os.environ["RANK"] == "1":
        flags.append(f"--train_file={own}")
    main(flags)
