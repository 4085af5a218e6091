"""One training on every layout: replayed steps to the bit, live ones against the float64 loop.

The deviations of the table in the docs are recorded by
``pytest tests/sharding/test_parity.py --junitxml=FILE -o junit_family=xunit1``.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.cases import batches, float64_outcome
from tests.support.layouts import LAYOUTS, on_layouts
from tests.support.reference import distance, norm
from tests.workers.parity import DTYPES, LIVE, MIXED, REPLAYED, REPLAYED_STEPS, RUNS

pytestmark = pytest.mark.slow

FIRST = "unsharded x1"
STILL = {"layers.1.0.weight", "unused.bias"}
"""Of a replayed run: frozen, or read by no pass, and decay leaves a bias as it is."""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Iterator[Any]:
    """Outcome of a run, by layout and rank."""
    with on_layouts("parity", tmp_path_factory.mktemp, RUNS) as found:
        yield found


@pytest.fixture(scope="module")
def float64_runs() -> dict[str, dict[str, Any]]:
    return {method: float64_outcome(case, batches()[: case.steps]) for method, case in LIVE.items()}


@pytest.mark.parametrize("method", REPLAYED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != FIRST])
def test_replayed_steps_are_equal_to_the_bit(results, layout, dtype, method):
    weights = require_equal(results, layout, method, dtype)
    assert {weight.dtype for weight in weights.values()} == {DTYPES[dtype]}


@pytest.mark.parametrize("layout", ["unsharded x2", "ZeRO-3 x2", "ZeRO-3 x2, CPU offload"])
def test_weights_of_two_dtypes_are_replayed_to_the_bit(results, layout):
    """FSDP2 refuses them."""
    weights = require_equal(results, layout, "addax", MIXED)
    start = results[FIRST][0]["replayed", "addax", MIXED]["start"]
    for name, weight in weights.items():
        assert weight.dtype == (torch.float32 if name.endswith("bias") else torch.bfloat16), name
        assert torch.equal(weight, start[name]) == (name in STILL), name


def require_equal(results, layout, method, dtype) -> dict[str, torch.Tensor]:
    """Compare a replayed run with the one of `FIRST`, and return its weights."""
    wanted = results[FIRST][0]["replayed", method, dtype]
    for rank in results[layout]:
        found = rank["replayed", method, dtype]
        assert found["g0"] == wanted["g0"]
        assert found["seen"] == wanted["seen"]  # theta + eps z, theta - eps z and theta
        assert found["weights"].keys() == wanted["weights"].keys()
        for name, weight in wanted["weights"].items():
            assert found["weights"][name].dtype == weight.dtype
            assert torch.equal(found["weights"][name], weight), name
    return wanted["weights"]


PASSES = {"addax": 3, "mezo": 2, "ip-sgd": 1, "addax, q = 4": 9}


@pytest.mark.parametrize(("method", "passes"), PASSES.items())
@pytest.mark.parametrize("dtype", DTYPES)
def test_replayed_steps_move_what_they_should(results, dtype, method, passes):
    run = results[FIRST][0]["replayed", method, dtype]
    start = run["start"]
    # A parameter of one bf16 element may stay where it is by stochastic rounding.
    whole = {n: p for n, p in run["weights"].items() if p.numel() > 1}
    still = {n for n, p in whole.items() if torch.equal(p, start[n])}
    assert still == STILL
    decay = 1 - REPLAYED[method].lr * REPLAYED[method].weight_decay
    decayed = start["unused.weight"].double() * decay**REPLAYED_STEPS
    close = {"rtol": 1e-6 if dtype == "fp32" else 2**-6, "atol": 0.0}
    torch.testing.assert_close(run["weights"]["unused.weight"].double(), decayed, **close)
    embeddings_seen = run["seen"][0][::2]
    assert len(embeddings_seen) == len(set(embeddings_seen)) == passes * REPLAYED_STEPS


@pytest.mark.parametrize("method", LIVE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_live_runs_equal_the_float64_loop(results, float64_runs, record_property, layout, method):
    reference = float64_runs[method]
    moved = distance(reference["start"], reference["end"])
    assert moved >= 3e-3 * norm(reference["start"])
    deviations = []
    for rank in results[layout]:
        found = rank["live", method, "fp32"]
        end = {name: found["weights"][name] for name in reference["end"]}
        deviations.append(distance(end, reference["end"]) / moved)
        assert found["g0"] == pytest.approx(reference["g0"], rel=2e-3, abs=2e-3)
        assert found["g0"] == results[layout][0]["live", method, "fp32"]["g0"]
    record_property("deviation", f"{max(deviations):.1e}")
    assert max(deviations) <= 5e-4
