"""No zeroth-order pass reads what another has computed from its weights, on any back end."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from addax_ds.optim.passes import ModuleState, evaluation_mode
from tests.support.layouts import on_layouts
from tests.workers.cached_passes import KINDS, STEPS

LAYOUTS = ("unsharded x1", "ZeRO-3 x2", "FSDP2 x2")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Iterator[Any]:
    with on_layouts("cached_passes", tmp_path_factory.mktemp, KINDS, LAYOUTS) as found:
        yield found


@pytest.mark.slow
# To compile around DeepSpeed's hooks takes 20 seconds.
@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pair
        for pair in product(LAYOUTS, KINDS)
        if pair[0] != "ZeRO-3 x2" or "compiled" not in pair[1]
    ],
)
def test_what_remembers_weights_changes_nothing(results, layout, kind):
    for rank in results[layout]:
        found, twin = rank[kind]["remembering"], rank[kind]["twin"]
        plus, minus = rank[kind]["explicit"]
        assert abs(plus - minus) > 1e-4 * plus
        assert twin["seen"][:2] == pytest.approx([plus, minus], rel=5e-6)
        assert len(found["seen"]) == 3 * STEPS
        assert found["seen"] == twin["seen"]
        assert twin["weights"]
        for name, weight in twin["weights"].items():
            assert torch.equal(found["weights"][name], weight), name


class Recorder(nn.Module):
    """Stores what it is given, if it is a tensor, and notes that it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.count, self.notes, self.inside = 0, [], {"first": (torch.ones(1),)}

    def forward(self, x: torch.Tensor | None) -> None:
        self.count += 1
        self.notes.append("called")
        if x is not None:
            self.last = x
            self.mean += x
            self.inside["second"] = x
            del self.inside["first"]


def test_a_module_that_stores_a_tensor_is_taken_back():
    module = Recorder()
    state = ModuleState(module)
    module(torch.ones(2))
    assert state.restore()
    assert not hasattr(module, "last")
    assert torch.equal(module.mean, torch.zeros(2))
    assert list(module.inside) == ["first"]
    assert (module.count, module.notes) == (0, [])


def test_a_module_that_stores_no_tensor_keeps_what_it_noted():
    module = Recorder()
    state = ModuleState(module)
    module(None)
    assert not state.restore()
    assert (module.count, module.notes) == (1, ["called"])


def test_modes_are_set_without_calling_train():
    class Merging(nn.Module):
        def train(self, mode=True):
            raise AssertionError("was called")

    model = nn.Sequential(Merging(), nn.Dropout())
    model[1].training = False
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
