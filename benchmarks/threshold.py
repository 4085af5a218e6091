"""Memory of a step against L_T, on the lengths of real data.

    python benchmarks/threshold.py --output benchmarks/results

L_T is put at quantiles of the lengths of the comparison's reviews (MultiEmo, 1,000 training rows,
the demo's tokenizer, nothing cut off). At each, one step of Addax is measured on two ZeRO-3 ranks
at its worst: four rows a rank of the longest sequence zeroth-order, four of L_T tokens first-order;
at quantile 1 everything is first-order, which is IP-SGD. OPT-125M's shape, random bf16 weights, one
target a row. Writes threshold.json and a figure, and prints a table.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from addax_ds.models.demo import model_folder
from benchmarks.common import collect_provenance
from benchmarks.plan import completed, launch
from studies.comparison.tasks import MULTIEMO

QUANTILES = (0.25, 0.5, 0.75, 1.0)
MODEL, RANKS, ROWS = "opt-125m", 2, 4


def lengths() -> np.ndarray:
    """Return the tokens of each training row, prompt and answer."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    rows = MULTIEMO.rows().train
    return np.array([len(tokenizer(row.prompt + row.answer).input_ids) for row in rows])


def case(threshold: int, longest: int) -> dict[str, Any]:
    """Return what `benchmarks.plan` measures for an L_T."""
    return completed(
        {
            "model": MODEL,
            "sharding": "zero3",
            "ranks": RANKS,
            "method": "addax" if threshold < longest else "ip-sgd",
            "zeroth": (ROWS, longest, 1),
            "first": (ROWS, threshold, 1),
        }
    )


def row(result: dict[str, Any]) -> str:
    """Return a line of the table, in MB a rank."""
    categories = result["categories"]
    measured = {name: sizes["measured"] for name, sizes in categories.items()}
    activations = measured.get("activations", 0) + measured.get("logits", 0)
    cells = (
        f"{result['quantile']:g}",
        str(result["threshold"]),
        f"{result['total']['measured'] / 1e6:.0f}",
        f"{activations / 1e6:.0f}",
        f"{(result['total']['measured'] - activations) / 1e6:.0f}",
        f"{result['total']['planned'] / 1e6:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw total and activations against the quantile."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    quantiles = [result["quantile"] for result in results]
    for name, values in (
        ("all live tensors", [result["total"]["measured"] for result in results]),
        ("as planned", [result["total"]["planned"] for result in results]),
    ):
        axes.plot(quantiles, [value / 1e6 for value in values], "o-", label=name)
    axes.set_xticks(quantiles, [f"{r['quantile']:g}\n{r['threshold']} tokens" for r in results])
    axes.set_xlabel("quantile at which L_T is put")
    axes.set_ylabel("peak of a step, MB a rank")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure each quantile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokens = lengths()
    longest = int(tokens.max())
    results = []
    for quantile in QUANTILES:
        threshold = int(np.quantile(tokens, quantile, method="lower"))
        found = launch(case(threshold, longest))
        results.append({"quantile": quantile, "threshold": threshold, **found})
        report = {"circumstances": collect_provenance(), "longest": longest, "results": results}
        (arguments.output / "threshold.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(results, arguments.output / "threshold.png")
    print("| quantile | L_T | peak, MB a rank | activations and logits | the rest | planned |")
    print("|---|---|---|---|---|---|")
    print("\n".join(map(row, results)))


if __name__ == "__main__":
    main()
