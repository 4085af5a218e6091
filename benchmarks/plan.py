"""Measures what a step holds, by category, beside what the planner says.

    python benchmarks/plan.py --output benchmarks/results

Starts itself on one or two ranks for every case (ZeRO-3 by the ``deepspeed`` launcher, FSDP2 by
``torchrun``), trains random weights for three steps and records the last one (`benchmarks.live`).
Writes plan.json, each result with the circumstances in which it was measured, and prints a table.
"""

import argparse
import gc
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import OPTConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # the launcher runs this file as a script

from addax_ds.distributed.collectives import shutdown
from addax_ds.distributed.startup import init_deepspeed
from addax_ds.optim.methods import ZEROTH_ORDER
from addax_ds.planner.memory import Memory, StepSpec, step_memory
from addax_ds.planner.shapes import shape_of
from addax_ds.planner.trace import Batch
from addax_ds.planner.zero3 import Zero3Settings, automatic_sizes
from addax_ds.utils.bf16_matmul import multiply_in_fp32
from benchmarks.common import collect_provenance, one_thread_each
from benchmarks.live import MODELS, measure
from studies.jobs import free_port, script, write_json

# ---- beside the planner --------------------------------------------------------------------------


def planned(case: dict[str, Any], ranks: int) -> Memory:
    """Return what the planner says of a case on this CPU."""
    method = case["method"]
    shape = shape_of(OPTConfig(**MODELS[case["model"]]), case["model"], case["dtype"])
    return step_memory(
        StepSpec(
            shape,
            method,
            case["sharding"],
            ranks,
            Batch(*case["zeroth"]) if method in ZEROTH_ORDER else None,
            Batch(*case["first"]) if method != "mezo" else None,
            checkpointing=case["checkpointing"],
            attention=case["attention"],
            zero3=Zero3Settings.from_json(case["zero_optimization"], shape.hidden),
            accumulation=case["accumulation"],
            cuda=False,
            replicas=case["replicas"],
            cpu_offload=case["cpu_offload"],
        )
    )


def completed(case: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a case does not say; bucket sizes are those that Trainer puts for "auto"."""
    automatic = automatic_sizes(MODELS[case["model"]]["hidden_size"])
    usual = {
        "attention": None,
        "checkpointing": False,
        "accumulation": 1,
        "dtype": "bf16",
        "replicas": 1,
        "cpu_offload": False,
    }
    batches = {"zeroth": (1, 128, 127), "first": (1, 64, 63)}
    return {**usual, **batches, "zero_optimization": automatic, **case}


def offloaded(model: str) -> dict[str, Any]:
    """Return a ``zero_optimization`` block as Trainer makes it of ds_configs/zero3_offload.json."""
    home = {"device": "cpu", "pin_memory": True}
    return {**automatic_sizes(MODELS[model]["hidden_size"]), "offload_param": home}


def compare(measured: dict[str, int], plan: Memory) -> dict[str, Any]:
    """Put measurement and plan side by side, bytes by category.

    Parameters that ZeRO-3 keeps whole are gathered like the others, and cannot be told apart.
    """
    said = {category: size for category, size in plan.categories.items() if size}
    said["gathered"] = said.pop("persistent", 0) + said.get("gathered", 0)
    names = sorted((measured.keys() | said.keys()) - {"total", "host", "resident"})
    return {
        "stage": plan.stage,
        "total": {"measured": measured["total"], "planned": plan.total},
        "host": {"measured": measured["host"], "planned": plan.host},
        "resident": measured["resident"],
        "categories": {
            name: {"measured": measured.get(name, 0), "planned": said.get(name, 0)}
            for name in names
            if measured.get(name, 0) or said.get(name, 0)
        },
    }


def examine(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure cases on the ranks of this process group; rank 0's results are returned."""
    cases = [completed(case) for case in cases]
    # Before zero.Init replaces torch's linear layer, and before from_config finds a JSON.
    plans = [planned(case, dist.get_world_size()) for case in cases]
    results = []
    for case, plan in zip(cases, plans, strict=True):
        results.append({"case": case, **compare(measure(case), plan)})
        gc.collect()
        dist.barrier()
    return results


# ---- the table -----------------------------------------------------------------------------------


def _case(model: str, sharding: str, method: str, ranks: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "sharding": sharding, "method": method, "ranks": ranks, **more}


_LONG: dict[str, Any] = {"zeroth": (2, 512, 64), "first": (2, 256, 64)}
CASES = [
    *(_case("opt-125m", "zero3", "addax", ranks, **_LONG) for ranks in (1, 2)),
    *(_case("opt-125m", "zero3", method, 2, **_LONG) for method in ("mezo", "sgd", "adamw")),
    _case("opt-125m", "zero3", "ip-sgd", 2, first=(2, 512, 64), checkpointing=True),
    _case("opt-125m", "zero3", "ip-sgd", 2, first=(2, 512, 64), attention="eager"),
    _case("opt-125m", "zero3", "addax", 2, **_LONG, zero_optimization={}),
    *(_case("opt-125m", "fsdp2", method, 2, **_LONG) for method in ("addax", "mezo")),
    _case("opt-125m", "zero3", "addax", 2, **_LONG, zero_optimization=offloaded("opt-125m")),
    *(
        _case("opt-125m", sharding, "addax", 2, **_LONG, **more)
        for sharding in ("zero3", "fsdp2")
        for more in ({"accumulation": 2}, {"dtype": "fp32"})
    ),
    *(_case("opt-350m", "zero3", "addax", ranks, **_LONG) for ranks in (1, 2)),
    _case("opt-350m", "zero3", "adamw", 2, **_LONG),
    _case("opt-350m", "fsdp2", "addax", 2, **_LONG),
    *(_case("opt-1.3b", "zero3", "addax", ranks) for ranks in (2, 1)),
    _case("opt-1.3b", "fsdp2", "addax", 2),
    _case("opt-1.3b", "zero3", "mezo", 2),
]


def launch(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case with the launcher that a user would take."""
    flags = {"zero3": ("deepspeed", "--num_gpus"), "fsdp2": ("torchrun", "--nproc_per_node")}
    launcher, number = flags[case["sharding"]]
    command = [script(launcher), number, str(case["ranks"]), "--master_port", str(free_port())]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        words = [*command, __file__, "--cases", json.dumps([case]), "--output", str(path)]
        done = subprocess.run(words, env=one_thread_each(), capture_output=True, text=True)
        if not path.exists():
            raise RuntimeError(f"{shlex.join(words)} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(path.read_text())[0]


def row(result: dict[str, Any]) -> str:
    """Return a line of the table.

    Total, its error, the category that is furthest off, host memory where it is another, RSS.
    """
    case, total = result["case"], result["total"]
    flags = {
        "checkpointing": case["checkpointing"],
        str(case["attention"]): case["attention"],
        "default buckets": not case["zero_optimization"],
        "offload": case["zero_optimization"].get("offload_param"),
        f"{case['accumulation']} micro-batches": case["accumulation"] > 1,
        case["dtype"]: case["dtype"] != "bf16",
    }
    host = result["host"]
    name, off = worst(result)
    cells = (
        case["model"],
        f"{case['sharding']} x {case['ranks']}",
        " ".join([case["method"], *(flag for flag, holds in flags.items() if holds)]),
        f"{total['measured'] / 1e9:.3f}",
        f"{total['planned'] / 1e9:.3f}",
        f"{100 * (total['planned'] / total['measured'] - 1):+.1f} %",
        f"{name} {100 * off:+.1f} %",
        f"{host['measured'] / 1e9:.3f}, {host['planned'] / 1e9:.3f}" if any(host.values()) else "",
        f"{result['resident'] / 1e9:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def worst(result: dict[str, Any]) -> tuple[str, float]:
    """Return the category that is furthest off, relative to what was measured.

    A category below a twentieth of the total is compared with that.
    """
    floor = result["total"]["measured"] / 20
    errors = {
        name: (sizes["planned"] - sizes["measured"]) / max(sizes["measured"], floor)
        for name, sizes in result["categories"].items()
    }
    return max(errors.items(), key=lambda entry: abs(entry[1]))


HEADER = (
    "| model | back end x ranks | method | measured GB | planned GB | off | worst category "
    "| host GB, measured and planned | RSS GB |",
    "|---|---|---|---|---|---|---|---|---|",
)


def main() -> None:
    """Measure one list of cases as a rank, or all cases, each on ranks of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder; of a rank, a file")
    parser.add_argument("--cases", help="JSON: measure these as one rank of several")
    parser.add_argument(
        "--only", default="", help="models, with commas; plan.json keeps what it has of others"
    )
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_args()
    if arguments.cases:
        torch.set_num_threads(1)
        multiply_in_fp32()
        init_deepspeed()
        measured = examine(json.loads(arguments.cases))
        if dist.get_rank() == 0:
            arguments.output.write_text(json.dumps(measured))
        shutdown()
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "plan.json"
    chosen = arguments.only.split(",") if arguments.only else sorted({c["model"] for c in CASES})
    kept = json.loads(path.read_text())["results"] if path.exists() else []
    results = {_key(result["case"]): result for result in kept}
    for case in CASES:
        if case["model"] in chosen:
            found = {**launch(case), "circumstances": collect_provenance()}
            results[_key(case)] = found
            print(row(found), flush=True)
            write_json(path, {"results": _in_order(results)})
    print("\n".join([*HEADER, *map(row, _in_order(results))]))


def _key(case: dict[str, Any]) -> str:
    return json.dumps(completed(case), sort_keys=True)


def _in_order(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what there is of the table's cases; others are no longer measured."""
    return [results[key] for key in map(_key, CASES) if key in results]


if __name__ == "__main__":
    main()
