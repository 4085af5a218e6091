"""A built wheel, installed outside of any checkout, trains and plans."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.launcher import finish, start
from tests.support.ranks import ROOT, free_port
from tests.support.tiny import rows, write_model, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.launcher,
    pytest.mark.usefixtures("program_alone"),
]

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder with the wheel's files and commands; the other packages are this environment's."""
    built, folder = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("installed")
    source = built / "source"
    source.mkdir()
    # Not in the checkout, where a build leaves its folders.
    names = ("addax_ds", "ds_configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    subprocess.run(["cp", "-r", *(ROOT / name for name in names), source], check=True)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source]
    subprocess.run([*PIP, *build], check=True, timeout=200)
    (wheel,) = built.glob("addax_ds-*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--target", folder, wheel], check=True)
    return folder


def run_installed(installed: Path, folder: Path, command: list[str], timeout: float = 250.0) -> str:
    """Run a command beside the installed package, in an empty folder; return what it wrote."""
    port = free_port()
    environment = {"PYTHONPATH": str(installed)}
    command = [word.format(port=port) for word in command]
    outcome = finish(start(command, port, environment, folder), timeout)
    assert outcome.status == 0, outcome.output
    assert outcome.left_behind == 0
    return outcome.output


def test_the_package_is_not_the_checkout(installed, tmp_path):
    code = "import addax_ds; print(addax_ds.__file__, addax_ds.__version__)"
    found, version = run_installed(installed, tmp_path, [sys.executable, "-c", code]).split()
    assert Path(found).is_relative_to(installed)
    assert (installed / f"addax_ds-{version}.dist-info").is_dir()


def test_it_trains_with_a_json_of_its_own(installed, tmp_path):
    launcher = ["deepspeed", "--num_gpus=1", "--master_port={port}", "--module"]
    flags = ["--deepspeed", "zero3", "--max_steps=1", "--output_dir=out"]
    model = write_model(tmp_path / "tiny", dtype=torch.bfloat16)
    data = write_rows(tmp_path / "train.jsonl", rows(4, 4))
    flags += [f"--model_name_or_path={model}", f"--train_file={data}", "--method=addax-wa"]
    flags += ["--bf16", "--per_device_train_batch_size=1", "--learning_rate=1e-3"]
    run_installed(installed, tmp_path, [*launcher, "addax_ds.cli.train", *flags])
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["train_steps"] == 1
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "training.png").is_file()


def test_its_commands_run(installed, tmp_path):
    command = str(installed / "bin" / "addax-plan")
    plan = ["--model", "facebook/opt-125m", "--sharding", "none", "--methods", "mezo", "--json"]
    planned = run_installed(installed, tmp_path, [command, *plan])
    assert json.loads(planned[planned.index("{") :])["sharding"] == "none"
    train = str(installed / "bin" / "addax-train")
    done = subprocess.run(
        [train, "--deepspeed", "zero4"],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Did you mean 'zero3'? Ready are: zero3, zero3_offload." in done.stderr
    assert "Traceback" not in done.stderr
