"""Command line of `tests.versions`."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMBINATIONS = (
    ("torch==2.11.0",),
    ("torch==2.12.1",),
    ("torch==2.14.1",),
    ("transformers==5.24.0",),
)
TESTS = (
    "tests/sharding/test_fsdp2_seams.py",
    "tests/sharding/test_zero3_seams.py",
    "tests/training/test_trainer_seams.py",
    "tests/planner/test_trace_seams.py",
    "tests/kernels/test_kernels.py",
    "tests/sharding/test_fsdp2.py",
    "tests/sharding/test_zero3.py",
    "tests/sharding/test_zero3_passes.py",
    "tests/sharding/test_zero3_units.py",
    "tests/sharding/test_parity.py",
    "tests/training/test_trainer.py",
)
FLAGS = ("-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile", "-m", "not exhaustive")
WITH_NEEDS = ("torch",)  # all other packages find theirs here


def main() -> None:
    """Test each combination and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for packages and logs")
    parser.add_argument("--only", help="combinations whose names match this regular expression")
    parser.add_argument("tests", nargs="*", default=TESTS, help="what to run")
    arguments = parser.parse_args()
    rows = []
    for combination in COMBINATIONS:
        name = ", ".join(combination)
        if re.search(arguments.only or "", name):
            outcome = _test(combination, arguments.folder / "+".join(combination), arguments.tests)
            rows.append(f"| {name} | {outcome} |")
            print(rows[-1], flush=True)
    print("\n| instead of the pinned | outcome |\n|---|---|", *rows, sep="\n")


def _test(combination: tuple[str, ...], folder: Path, tests: tuple[str, ...]) -> str:
    packages = folder / "packages"
    if not (folder / "installed").exists():
        for requirement in combination:
            _install(requirement, packages)
        (folder / "installed").touch()
    path = os.pathsep.join((str(packages), str(ROOT)))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "pytest", *FLAGS, *tests]
    log = folder / "pytest.log"
    with log.open("w") as output:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    found = re.findall(r"^(\d+ \w+, .+|\d+ \w+) in [\d.]+s", log.read_text(), re.MULTILINE)
    return found[-1] if found else f"did not end: {log}"


def _install(requirement: str, packages: Path) -> None:
    name = requirement.partition("==")[0]
    flags = ["-q", "--target", str(packages)]
    if name not in WITH_NEEDS:
        flags.append("--no-deps")
    pip = [sys.executable, "-m", "pip", "install", *flags, requirement]
    subprocess.run(pip, check=True)


if __name__ == "__main__":
    main()
