"""Compare the methods on real data; interrupted, it goes on where it stopped.

    python launch/compare.py --workers 2
    python launch/compare.py --report docs/comparison

``--help`` lists the arguments.
"""

from addax_ds.comparison.cli import main

if __name__ == "__main__":
    main()
