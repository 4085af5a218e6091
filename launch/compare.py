"""Compare the methods on real data; interrupted, it goes on where it stopped.

    python launch/compare.py --workers 2
    python launch/compare.py --report docs/comparison

``--help`` lists the arguments.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # studies belong to a checkout, not the package

from studies.comparison.cli import main

if __name__ == "__main__":
    main()
