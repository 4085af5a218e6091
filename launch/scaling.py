"""Measure how steps scale over ranks, sizes, lengths and methods; interrupted, it goes on.

    python launch/scaling.py --models opt-11m opt-34m --ranks 1 2 --lengths 64 256

``--help`` lists the arguments.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # studies belong to a checkout, not the package

from studies.scaling.cli import main

if __name__ == "__main__":
    main()
