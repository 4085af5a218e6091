"""Recipes of the Makefile, with stubs for the programs that they start."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import ROOT


@pytest.fixture
def programs(tmp_path) -> Path:
    """A folder in place of ``.venv/bin``, whose ``deepspeed`` says what it was called with."""
    (tmp_path / "bin").mkdir()
    for name, command in {
        "python": f'{sys.executable} "$@"',
        "deepspeed": "echo called $*",
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "installed").touch()
    return tmp_path / "bin"


def demo(programs: Path) -> str:
    """Return the command of ``make demo``."""
    variables = {
        "VENV": programs.parent,
        "VENV_PATH": f'PATH="{programs}:$$PATH"',
        "COUNT_ACCELERATORS": "print(0)",
        "ARGS": "--seed 1",
    }
    words = [f"{name}={value}" for name, value in variables.items()]
    made = subprocess.run(["make", "demo", *words], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (command,) = re.findall(r"^called (.*)$", made.stdout, re.M)
    return command


def test_demos_on_one_machine_meet_at_ports_of_their_own(programs):
    words = "--num_gpus 2 launch/train.py --deepspeed ds_configs/zero3.json --seed 1"
    pattern = rf"--master_port (\d+) {re.escape(words)}"
    first = int(re.fullmatch(pattern, demo(programs)).group(1))
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert int(re.fullmatch(pattern, demo(programs)).group(1)) != first
