"""Measure how steps scale over ranks, sizes, lengths and methods; interrupted, it goes on.

    python launch/scaling.py --models opt-11m opt-34m --ranks 1 2 --lengths 64 256

``--help`` lists the arguments.
"""

from addax_ds.scaling.cli import main

if __name__ == "__main__":
    main()
