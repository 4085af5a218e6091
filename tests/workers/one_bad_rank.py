"""Runs the recipe with another flag on rank 1: ``one_bad_rank.py FLAG ... --NAME=OTHER``.

``--version_of_deepspeed=OTHER`` is no flag: rank 1 then takes this for the version installed.
"""

import os
import sys

from addax_ds.cli import prepare
from addax_ds.cli.train import main
from addax_ds.utils.versions import versions

if __name__ == "__main__":
    *flags, own = sys.argv[1:]
    if os.environ["RANK"] == "1":
        name, _, value = own.partition("=")
        if name == "--version_of_deepspeed":
            prepare.versions = lambda: {**versions(), "deepspeed": value}  # type: ignore[assignment]
        else:
            flags = [*(flag for flag in flags if not flag.startswith(f"{name}=")), own]
    main(flags)
