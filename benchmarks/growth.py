"""Growth of the cost of an Addax step with the model and with the ranks, beside its parts.

    python benchmarks/growth.py --output benchmarks/results

Starts `step` once for every size on two ranks, and for one size on 1, 2 and 4 ranks. Writes
growth.json and growth.png. Each rank trains on as many rows whatever their number is. Where there
are fewer cores than ranks, seconds say little: over ranks, bytes and CPU seconds are shown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

sys.path.insert(0, str(Path(__file__).parent.parent))  # this file is run as a script

from addax_ds.cli.plotting import plain_axes
from benchmarks.common import one_thread_each
from studies.jobs import script

STEP = Path(__file__).with_name("step.py")
SIZES = ["opt-11m", "opt-34m", "opt-125m", "opt-350m"]
SIZES_RANKS = 2
RANKS = [1, 2, 4]
RANKS_SHAPE = "opt-34m"
LABELS = {"addax": "Addax", "parts": "the sum of its parts"}
COLORS = {"addax": "#D55E00", "parts": "#0072B2"}  # as in `addax_ds.cli.plotting`


def measure(shape: str, ranks: int, rounds: int, port: int) -> dict[str, Any]:
    """Run `step` on a number of ranks and return what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [script("deepspeed"), f"--num_gpus={ranks}", f"--master_port={port}", str(STEP)]
        command += ["--shape", shape, "--rounds", str(rounds), "--output", folder]
        command += ["--no_memory", "--contenders", *LABELS]
        with log.open("w") as file:
            code = subprocess.run(
                command, env=one_thread_each(), stdout=file, stderr=file
            ).returncode
        if code:
            raise SystemExit(f"{log.read_text()}\n{shape} on {ranks} ranks failed")
        result = json.loads((Path(folder) / "step.json").read_text())
    ratio = result["addax_over_parts"]["seconds"]["median"]
    print(f"{shape} on {ranks} ranks: addax over parts {ratio:.3f}", flush=True)
    return result


def draw(sizes: list[dict[str, Any]], ranks: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds over sizes, and bytes and CPU seconds of one rank over ranks, as a PNG."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    time, sent, cpu = figure.subplots(1, 3)

    plain_axes(time, "parameters, millions", "seconds a step")
    millions = [run["configuration"]["parameters"] / 1e6 for run in sizes]
    for name in LABELS:
        _curve(time, name, millions, [run["contenders"][name]["seconds"] for run in sizes])
    time.set(xscale="log", yscale="log")
    time.set_title(f"{SIZES_RANKS} ranks", fontsize="medium")
    time.xaxis.set_major_locator(FixedLocator(millions))
    time.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    time.xaxis.set_minor_locator(NullLocator())
    time.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    time.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    time.yaxis.set_minor_locator(NullLocator())

    numbers = [run["configuration"]["ranks"] for run in ranks]
    plain_axes(sent, "ranks", "MB that a rank sends in a step")
    plain_axes(cpu, "ranks", "CPU seconds of a rank in a step")
    for name in LABELS:
        results = [run["contenders"][name] for run in ranks]
        _curve(sent, name, numbers, [_megabytes(r["communication"]) for r in results])
        _curve(cpu, name, numbers, [_per_rank(r, n) for r, n in zip(results, numbers, strict=True)])
    for axes in (sent, cpu):
        axes.set_title(RANKS_SHAPE, fontsize="medium")
        axes.xaxis.set_major_locator(FixedLocator(numbers))
        axes.set_ylim(bottom=0)
    time.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _megabytes(communication: dict[str, Any]) -> dict[str, Any]:
    exact = communication["sent_bytes_per_rank"] / 1e6
    return {"median": exact, "quartiles": [exact, exact]}


def _per_rank(result: dict[str, Any], ranks: int) -> dict[str, Any]:
    seconds = result["cpu_seconds"]
    return {
        "median": seconds["median"] / ranks,
        "quartiles": [quartile / ranks for quartile in seconds["quartiles"]],
    }


def _curve(axes: Axes, name: str, x: list[float], spreads: list[dict[str, Any]]) -> None:
    """Draw medians, with quartiles as bars."""
    medians = [spread["median"] for spread in spreads]
    below = [spread["median"] - spread["quartiles"][0] for spread in spreads]
    above = [spread["quartiles"][1] - spread["median"] for spread in spreads]
    axes.errorbar(
        x,
        medians,
        yerr=[below, above],
        color=COLORS[name],
        label=LABELS[name],
        linestyle="-" if name == "addax" else "--",  # the curves may cover each other
        marker="o",
        markersize=3.5,
        linewidth=1.4,
        capsize=3,
    )


def main() -> None:
    """Measure everything, and write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds a run, at least 2")
    parser.add_argument("--port", type=int, default=29500, help="of the launcher's rank 0")
    parser.add_argument("--output", type=Path, required=True, help="folder for JSON and PNG")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be 2 or more")
    arguments.output.mkdir(parents=True, exist_ok=True)

    sizes = [measure(shape, SIZES_RANKS, arguments.rounds, arguments.port) for shape in SIZES]
    same = sizes[SIZES.index(RANKS_SHAPE)]  # also one of the runs over ranks
    ranks = [
        same
        if number == SIZES_RANKS
        else measure(RANKS_SHAPE, number, arguments.rounds, arguments.port)
        for number in RANKS
    ]
    text = json.dumps({"sizes": sizes, "ranks": ranks}, indent=2)
    (arguments.output / "growth.json").write_text(text + "\n")
    draw(sizes, ranks, arguments.output / "growth.png")


if __name__ == "__main__":
    main()
