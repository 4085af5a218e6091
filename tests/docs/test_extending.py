"""docs/extending.md: its examples run, and do what the page says."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import addax_ds
from addax_ds.tasks import find_task
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)
EXAMPLES = {
    section.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    for section in SECTIONS
}


def only_example(section: str) -> str:
    (example,) = EXAMPLES[section]
    return example


def test_every_section_has_an_example() -> None:
    named = {section: len(examples) for section, examples in EXAMPLES.items() if examples}
    assert named == {
        "A task": 1,
        "A back end": 1,
        "An estimator": 1,
        "A flag of the optimizer": 3,
    }


def test_a_task_is_found_and_reads_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"say": f"Day {day}.", "label": day % 2} for day in range(30)]
    Path("mood.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my_tasks.py").write_text(only_example("A task"))
    drawn = find_task("my_tasks.py:MOOD").rows()
    every = [*drawn.train, *drawn.dev, *drawn.test]
    assert {row.prompt for row in every} == {f"Day {day}. I feel" for day in range(30)}
    for row in every:
        day = int(row.prompt.split()[1].rstrip("."))
        assert row.answer == (" well" if day % 2 else " bad")


def step_of(model: torch.nn.Module) -> tuple[str, float, list[torch.Tensor]]:
    """One mixed step: the back end's name, g0 and the weights afterwards."""
    optimizer = addax_ds.Addax(model.parameters(), lr=1e-2, alpha=0.1, seed=3)
    sharding = addax_ds.attach(optimizer, model)
    ids = torch.arange(12).reshape(2, 6)

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    first = optimizer.measure(loss, loss)
    assert first is not None
    first.backward()
    optimizer.step()
    sharding.detach()
    assert optimizer.report is not None
    assert optimizer.report.g0 is not None
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return sharding.name, optimizer.report.g0, weights


def test_a_back_end_trains_as_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from addax_ds.sharding import registry

    module = ModuleType("single")
    exec(only_example("A back end"), vars(module))
    monkeypatch.setitem(sys.modules, "single", module)
    entry = registry.Entry("single", "Single")
    monkeypatch.setattr(registry, "BACK_ENDS", {"single": entry, **registry.BACK_ENDS})

    model = tiny_model()
    module.Single.shard_loaded(model, torch.device("cpu"))
    assert registry.back_end_of(model) is module.Single
    name, g0, weights = step_of(model)
    expected_name, expected_g0, expected = step_of(tiny_model())
    assert (name, expected_name) == ("single", "none")
    assert g0 == expected_g0
    for ours, theirs in zip(weights, expected, strict=True):
        assert torch.equal(ours, theirs)

    laid_out = tiny_model().to("meta")
    module.Single.lay_out(laid_out, torch.device("cpu"))
    assert registry.back_end_of(laid_out) is module.Single
    assert not any(parameter.is_meta for parameter in laid_out.parameters())


def test_an_estimator_moves_the_weights_along_its_direction(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(only_example("An estimator"))
    torch.manual_seed(0)
    found = runpy.run_path(str(file))
    torch.manual_seed(0)
    untouched = torch.nn.Linear(4, 1)

    z = {
        name: addax_ds.gaussian(6, 0, name, 0, parameter.numel()).view(parameter.shape).double()
        for name, parameter in untouched.named_parameters()
    }
    stored = {name: p.detach().double() for name, p in untouched.named_parameters()}

    def loss(scale: float) -> float:
        weight = stored["weight"] + scale * z["weight"]
        bias = stored["bias"] + scale * z["bias"]
        return float((weight.sum() + bias).square().mean())

    optimizer = found["optimizer"]
    g0 = (loss(optimizer.zo_eps) - loss(0.0)) / optimizer.zo_eps
    assert optimizer.report.zeroth_order_loss == pytest.approx(loss(0.0), rel=1e-5)
    assert optimizer.report.g0 == pytest.approx(g0, rel=1e-2)
    for name, parameter in found["model"].named_parameters():
        moved = stored[name] - 1e-2 * optimizer.report.g0 * z[name]
        torch.testing.assert_close(parameter.detach().double(), moved, atol=1e-6, rtol=1e-5)


USES_FLAG = """
import torch
import addax_ds

weights = [torch.nn.Parameter(torch.zeros(2, 2))]
assert addax_ds.Addax(weights, lr=1e-3).max_g0 == 0.0
assert addax_ds.Addax(weights, lr=1e-3, max_g0=2.0).max_g0 == 2.0
try:
    addax_ds.Addax(weights, lr=1e-3, max_g0=-1.0)
except addax_ds.UserError as error:
    assert "max_g0" in str(error)
    assert "at least 0" in str(error)
else:
    raise AssertionError("a value outside the range was taken")

config = addax_ds.AddaxConfig(output_dir="output", learning_rate=1e-3, max_g0=2.0)
assert config.settings.hyperparameters.max_g0 == 2.0

from addax_ds.config.arguments import parse_arguments

parsed = parse_arguments(["--max_g0", "3"])
(config,) = (each for each in parsed if isinstance(each, addax_ds.AddaxConfig))
assert config.settings.hyperparameters.max_g0 == 3.0
"""


@pytest.mark.slow
def test_a_flag_is_known_everywhere(tmp_path: Path) -> None:
    """The page's fields are put into a copy of the package, and nothing else is changed there."""
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "addax_ds", tmp_path / "addax_ds", ignore=skipped)
    for example in EXAMPLES["A flag of the optimizer"]:
        add_field(tmp_path, example)
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", USES_FLAG], cwd=tmp_path, env=environment, check=True, timeout=200
    )


def add_field(folder: Path, example: str) -> None:
    """Put an example after the last field of the class that its first line names."""
    header, _, code = example.partition("\n")
    named = re.fullmatch(r"# (\S+), class (\w+)", header)
    assert named is not None
    file = folder / named[1]
    lines = file.read_text().splitlines()
    body = ast.parse(file.read_text()).body
    found = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == named[2])
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    assert fields[-1].end_lineno is not None
    lines.insert(fields[-1].end_lineno, textwrap.indent(code.rstrip(), "    "))
    file.write_text("\n".join(lines) + "\n")
