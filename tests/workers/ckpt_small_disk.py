"""Runs the recipe with a kernel that refuses long files to rank 0: ``... FLAG ...``."""

import os
import resource
import sys

from addax_ds.cli.train import main

LONGEST_FILE = 50_000
"""Bytes: enough for logs and all of a checkpoint but its weights."""

if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LONGEST_FILE, LONGEST_FILE))
    main(sys.argv[1:])
