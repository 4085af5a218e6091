"""Lets ``ds_configs/`` travel inside the package; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["addax_ds*"]), "addax_ds.ds_configs"],
    package_dir={"addax_ds.ds_configs": "ds_configs"},
)
