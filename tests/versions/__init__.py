"""The back ends, the trainer and the kernels on other versions of what they stand on.

    python -m tests.versions --folder /tmp/versions

installs each combination of `COMBINATIONS` into a folder of its own, in front of the packages of
this environment, runs `TESTS` on it, and prints a table. Most of them pyproject.toml does not
allow: the table says what it would take. Not part of ``make test``: it downloads some GB, and takes
minutes a combination.
"""
