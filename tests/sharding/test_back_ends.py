"""A back end is an object: a new one is in use once the registry knows it."""

import ast
import gc
import sys
from functools import partial
from pathlib import Path
from weakref import ref

import pytest
import torch

import addax_ds
from addax_ds.checkpoint.weights import local_slices
from addax_ds.config.arguments import ModelArguments
from addax_ds.models.source import ModelSource
from addax_ds.planner.rules import RULES, rules_of
from addax_ds.sharding import registry
from addax_ds.sharding.fsdp2 import Fsdp2, shard_model
from addax_ds.sharding.layout import Layout
from addax_ds.sharding.unsharded import Unsharded
from addax_ds.sharding.zero3 import Zero3Sharding
from addax_ds.utils.errors import UserError
from tests.support.cases import mean_loss
from tests.support.models import tiny_opt, token_batches
from tests.support.passes import measured_g0
from tests.support.tiny import tiny_model, write_model

PACKAGE = Path(addax_ds.__file__).parent


class Toy(Unsharded):
    """Whole models that carry a mark; it notes what it is asked."""

    name = "toy"
    asked: list[str] = []  # noqa: RUF012

    @classmethod
    def accepts(cls, model):
        return hasattr(model, "mark_of_toy")

    @classmethod
    def lay_out(cls, model, device):
        cls.asked.append("lay_out")
        super().lay_out(model, device)
        model.mark_of_toy = True

    @classmethod
    def shard_loaded(cls, model, device):
        cls.asked.append("shard_loaded")
        model.mark_of_toy = True

    @classmethod
    def free_gathered(cls, model):
        cls.asked.append("free_gathered")


@pytest.fixture
def toy(monkeypatch):
    entry = registry.Entry(Toy.__module__, Toy.__name__)
    monkeypatch.setattr(registry, "BACK_ENDS", {"toy": entry, **registry.BACK_ENDS})
    monkeypatch.setattr(Toy, "asked", [])
    return Toy


def load(folder: Path, sharding: str) -> torch.nn.Module:
    source = ModelSource.find(ModelArguments(model_name_or_path=str(folder)))
    return source.load(torch.float32, Layout(sharding))


def one_step(model: torch.nn.Module) -> tuple[float, list[torch.Tensor]]:
    optimizer = addax_ds.Addax(model.parameters(), lr=1e-2, alpha=0.1, seed=3)
    sharding = addax_ds.attach(optimizer, model)
    ids = torch.arange(12).reshape(2, 6)

    def loss():
        return model(input_ids=ids, labels=ids).loss

    g0 = measured_g0(optimizer, loss)
    loss().backward()
    optimizer.step()
    sharding.detach()
    return g0, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_new_back_end_loads_a_model_and_trains_it(toy, tmp_path, form):
    folder = write_model(tmp_path / "model")
    if form == "pytorch_model.bin":  # in a form of torch before 1.6, which Transformers has to read
        torch.save(tiny_model().state_dict(), folder / form, _use_new_zipfile_serialization=False)
        (folder / "model.safetensors").unlink()
    model = load(folder, "toy")
    assert registry.back_end_of(model) is Toy
    assert toy.asked == ["lay_out" if form == "model.safetensors" else "shard_loaded"]
    assert [part.start for part in local_slices(model)] == [0] * len(list(local_slices(model)))

    g0, weights = one_step(model)
    expected_g0, expected = one_step(load(folder, "none"))
    assert g0 == expected_g0
    for ours, theirs in zip(weights, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_planner_says_that_it_has_no_rules_for_a_new_back_end():
    with pytest.raises(UserError, match="no rules for --sharding toy"):
        rules_of("toy")


def test_every_back_end_is_registered_by_its_own_name_and_planned_for():
    found = {name: registry.back_end(name) for name in registry.BACK_ENDS}
    assert found == {"zero3": Zero3Sharding, "fsdp2": Fsdp2, "none": Unsharded}
    assert all(each.name == name for name, each in found.items())
    assert list(RULES) == list(registry.BACK_ENDS)
    for name, each in found.items():
        rules = rules_of(name)
        assert rules.uses_deepspeed == each.uses_deepspeed
        assert rules.is_sharded == each.is_sharded
        assert rules.has_replicas == (each.why_no_replicas is None)
        assert (rules.offload_flag == "--cpu_offload") == (each.why_no_cpu_offload is None)


@pytest.mark.parametrize(
    ("name", "deepspeed", "expected"),
    [(None, False, Unsharded), (None, True, Zero3Sharding), ("fsdp2", False, Fsdp2)],
)
def test_the_default_depends_on_deepspeed(name, deepspeed, expected):
    assert registry.back_end(name, deepspeed) is expected


def test_a_plain_model_is_not_looked_at_with_an_engine_that_was_never_imported(monkeypatch):
    entry = registry.Entry("no.such.module", "None", engine="no_such_engine")
    monkeypatch.setattr(registry, "BACK_ENDS", {"other": entry, **registry.BACK_ENDS})
    assert "no_such_engine" not in sys.modules
    assert registry.back_end_of(torch.nn.Linear(2, 2)) is Unsharded


def names_compared(path: Path) -> list[str]:
    """Lines in which a value is compared with the name of a back end, or matched against it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        operands: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        inner = [
            e for o in operands if isinstance(o, ast.Tuple | ast.List | ast.Set) for e in o.elts
        ]
        values = [o.value for o in (*operands, *inner) if isinstance(o, ast.Constant)]
        if any(value in registry.BACK_ENDS for value in values if isinstance(value, str)):
            found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    return found


def test_nobody_branches_on_the_name_of_a_back_end(tmp_path):
    compared = [line for path in PACKAGE.rglob("*.py") for line in names_compared(path)]
    assert compared == [], "ask the back end, or its rules in the planner, instead"


def test_a_branch_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    module = tmp_path / "module.py"
    module.write_text(
        "if a == 'zero3': pass\nif b not in (None, 'fsdp2'): pass\n"
        "match c:\n    case 'none': pass\nd = e.get('x', 'none') == 'cpu'\n"
    )
    assert names_compared(module) == ["module.py:1", "module.py:2", "module.py:4"]


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("shard", [None, shard_model], ids=["unsharded", "fsdp2"])
def test_a_model_that_was_trained_is_freed_with_its_last_name(shard):
    """In a notebook there is no room for the last model beside the next one."""
    torch.distributed.init_process_group("gloo")
    model = tiny_opt()
    if shard is not None:
        shard(model)
    optimizer = addax_ds.Addax(model.parameters(), lr=0.1, alpha=0.5)
    addax_ds.attach(optimizer, model)
    for long, short in token_batches(2):
        loss = optimizer.measure(partial(mean_loss, model, long), partial(mean_loss, model, short))
        loss.backward()
        optimizer.step()
    seen = ref(model), ref(optimizer), ref(next(model.parameters()))
    del model, optimizer, loss
    gc.collect()
    assert [each() for each in seen] == [None, None, None]
