"""Seconds and memory of a long row, zeroth-order against first-order with checkpointing.

    python benchmarks/context.py --output benchmarks/results

One process trains SmolLM2-135M's shape (random fp32 weights) with one row a step: by MeZO, two
forward passes, and by IP-SGD with activation checkpointing. All tokens of the row are targets, or
one is. The peak is that of live tensors over the second step, weights included, beside what the
planner says. Writes context.json and prints a table.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from addax_ds import Addax, attach
from addax_ds.optim.methods import Method
from addax_ds.planner.memory import StepSpec, step_memory
from addax_ds.planner.shapes import shape_of
from addax_ds.planner.tape import Tape
from addax_ds.planner.trace import Batch
from benchmarks.common import collect_provenance
from benchmarks.live import ALPHAS, batch_of, closure, peak

CONFIG = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
METHODS: tuple[Method, ...] = ("mezo", "ip-sgd")


def measure(method: Method, length: int, targets: int) -> dict[str, Any]:
    """Take two steps and measure the second; bytes include the weights."""
    torch.manual_seed(0)
    first_order = method == "ip-sgd"
    model: Any = LlamaForCausalLM(CONFIG).train()
    model.config.use_cache = False
    if first_order:
        model.activation_checkpointing_enable()
    optimizer = Addax(model.parameters(), lr=1e-6, alpha=ALPHAS[method])
    attach(optimizer, model)

    def step(tokens: int) -> None:
        loss = closure(model, batch_of(1, tokens, min(targets, tokens - 1)))
        found = optimizer.measure([] if first_order else [loss], [loss] if first_order else [])
        if found is not None:
            found.backward()
        optimizer.step()

    step(16)
    tape = Tape(lambda *_: "all")
    for parameter in model.parameters():
        tape.note(parameter)
    begin = time.perf_counter()
    with tape:
        step(length)
    seconds = time.perf_counter() - begin
    batch = Batch(1, length, targets)
    planned = step_memory(
        StepSpec(
            shape=shape_of(CONFIG, "SmolLM2-135M", "fp32"),
            method=method,
            sharding="none",
            ranks=1,
            zeroth_order=None if first_order else batch,
            first_order=batch if first_order else None,
            checkpointing=first_order,
            cuda=False,
        )
    )
    return {
        "method": method,
        "length": length,
        "targets": targets,
        "seconds": round(seconds, 2),
        "peak_bytes": peak(tape)["total"],
        "planned_bytes": planned.total,
    }


def row(pair: list[dict[str, Any]]) -> str:
    """Return a line of the table."""
    cells = [f"{pair[0]['length']:,}", f"{pair[0]['targets']:,}"]
    for found in pair:
        peaks = (found["peak_bytes"], found["planned_bytes"])
        cells += [f"{found['seconds']:.1f}", *(f"{size / 1e9:.2f}" for size in peaks)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--output", type=Path, required=True, help="folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    print("| tokens | targets | mezo: s | GB | planned | ip-sgd: s | GB | planned |")
    print("|---|---|---|---|---|---|---|---|")
    for length in arguments.lengths:
        for targets in (length - 1, 1):
            pair = [measure(method, length, targets) for method in METHODS]
            results += pair
            report = {"circumstances": collect_provenance(), "results": results}
            path = arguments.output / "context.json"
            path.write_text(json.dumps(report, indent=1) + "\n")
            print(row(pair), flush=True)


if __name__ == "__main__":
    main()
