"""Back ends on GPUs over NCCL: stream order, and the float64 loop."""

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.reference import distance

RANKS = max(1, min(torch.cuda.device_count(), 2))


def test_late_kernels_change_nothing(tmp_path):
    """Gathers, updates and the next gathers are ordered by streams, not by luck."""
    for how in ("sleep", "synchronize"):
        run_ranks("gpu_race", RANKS, tmp_path, how, accelerator="cuda")
    for rank in range(RANKS):
        late = torch.load(tmp_path / f"sleep-rank{rank}.pt")
        alone = torch.load(tmp_path / f"synchronize-rank{rank}.pt")
        for case, expected in alone.items():
            assert late[case]["g0"] == expected["g0"], case
            for name, weight in expected["weights"].items():
                assert torch.equal(late[case]["weights"][name], weight), (case, name)


@pytest.mark.parametrize("worker", ["zero3_cases", "attached_cases"])
def test_ten_steps_equal_the_float64_loop(worker, tmp_path, float64_results):
    layout = ("fsdp2",) if worker == "attached_cases" else ()
    names = ("tied", "untied", "frozen", "unused", "ip-sgd", "mezo")
    run_ranks(worker, RANKS, tmp_path, *layout, *names, accelerator="cuda")
    for name in names:
        reference = float64_results[name]
        moved = distance(reference["start"], reference["end"])
        result = torch.load(tmp_path / f"{name}-rank0.pt", map_location="cpu")
        end = {n: result["weights"][n] for n in reference["end"]}
        assert distance(end, reference["end"]) <= 5e-4 * moved, name
        assert result["g0"] == pytest.approx(reference["g0"], rel=2e-3, abs=2e-3)
