"""A first run on one bare GPU: ``make gpu-kit`` packs it, ``part1.sh`` and ``part2.sh`` run it."""
