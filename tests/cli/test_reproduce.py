"""docs/reproduce.md: each of its commands is one that the programs take, and says what is meant."""

import argparse
import json
import re
import shlex
import string
from pathlib import Path

import pytest

from addax_ds.cli import plan
from addax_ds.config.arguments import parse_arguments
from addax_ds.planner.shapes import OPT_FAMILY

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reproduce.md").read_text()
TRAINING = ["deepspeed", "--num_gpus", "launch/train.py"]
PLANNING = ["python", "launch/plan.py"]

(_BLOCK,) = re.findall(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
_TEMPLATES = _BLOCK.replace("\\\n", " ").strip().splitlines()
_FLAGS = dict(re.findall(r"^\| ([\w-]+) \| `(--.+)` \|$", TEXT, re.MULTILINE))
_ROWS = re.findall(
    r"^\| (opt-\S+) \| (\d) \| (\S+) \| (\S+) \| (\d+) \| (\S+) \| (\d+) \| (\d*) ?\| ([\d.]+) \|",
    TEXT,
    re.MULTILINE,
)


def filled(row: tuple[str, ...]) -> list[list[str]]:
    """The training and the plan of a row, as a shell would split them."""
    model, gpus, name, task, length, method, first, zeroth, _ = row
    batches = f"--per_device_train_batch_size {first}"
    if zeroth:
        batches += f" --per_device_zo_batch_size {zeroth}"
    values = {
        "MODEL": model,
        "GPUS": gpus,
        "JSON": name,
        "TASK": task,
        "LENGTH": length,
        "METHOD": method,
        "BATCHES": batches,
        "FLAGS": _FLAGS[method],
    }
    return [shlex.split(string.Template(line).substitute(values)) for line in _TEMPLATES]


BLOCKS = [filled(row) for row in _ROWS]
TRAININGS = [block[0] for block in BLOCKS]
PLANS = [block[-1] for block in BLOCKS]
FIGURES = [row[-1] for row in _ROWS]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where the document's commands are called."""
    monkeypatch.chdir(ROOT)


def planned(command: list[str]) -> argparse.Namespace:
    assert command[:2] == PLANNING
    arguments = plan._parser().parse_args(command[2:])
    plan.request_of(arguments)
    return arguments


def test_the_document_has_the_commands_that_it_announces() -> None:
    assert len(BLOCKS) == TEXT.count("| opt-")
    methods = [
        (c[c.index("--model_name_or_path") + 1], c[c.index("--method") + 1]) for c in TRAININGS
    ]
    large = [f"facebook/opt-{size}" for size in ("13b", "30b", "66b")]
    assert {(model, method) for model in large for method in ("addax", "mezo")} <= set(methods)
    assert {method for _, method in methods} == {"addax", "mezo", "ip-sgd", "adamw"}


@pytest.mark.parametrize("command", PLANS, ids=" ".join)
def test_the_planner_takes_its_commands(command: list[str]) -> None:
    arguments = planned(command)
    assert arguments.model.removeprefix("facebook/") in OPT_FAMILY


def quickest(command: list[str]) -> bool:
    return "facebook/opt-13b" in command and "mezo" in command


@pytest.mark.parametrize(
    ("command", "figure"),
    [
        pytest.param(
            command,
            figure,
            marks=() if quickest(command) else pytest.mark.exhaustive,
            id=" ".join(command[2:]),
        )
        for command, figure in zip(PLANS, FIGURES, strict=True)
    ],
)
def test_a_figure_is_what_the_planner_prints(command: list[str], figure: str) -> None:
    (result,) = json.loads(plan.plan([*command[2:], "--json"]))["methods"]
    assert result["fits"]
    assert f"{result['total'] / 1e9:.2f}" == figure


@pytest.mark.exhaustive
def test_the_planners_document_has_what_it_recommends() -> None:
    """The table of docs/planner.md, from the command above it."""
    text = (ROOT / "docs" / "planner.md").read_text()
    section = text[text.index("## Which method serves") : text.index("## The total")]
    command = section.replace("\\\n", " ").split("addax-plan ")[1].splitlines()[0]
    report = json.loads(plan.plan([*shlex.split(command), "--json"]))
    rows = re.findall(
        r"^\| (.+) \| ([\d.]+) \| (yes|no) \| ([\d.]+) \| (\d+) \|$", section, re.MULTILINE
    )
    assert len(rows) == 9
    planned = {
        option["name"]: (
            f"{option['total'] / 1e9:.1f}",
            "yes" if option["fits"] else "no",
            f"{option['units']:.3g}",
            f"{option['moved'] / 1e9:.0f}",
        )
        for option in report["options"]
    }
    for name, *figures in rows:
        assert tuple(figures) == planned[name.strip("*")]
    assert [name for name, *_ in rows if "*" in name] == [f"**{report['recommended']}**"]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: " ".join(block[-1][2:]))
def test_a_training_is_what_the_planner_was_asked_about(
    block: list[list[str]], launched: None
) -> None:
    training, planning = block
    assert [training[0], training[1], training[3]] == TRAINING
    plan = planned(planning)
    model, data, args = parse_arguments(training[4:])
    assert model.model_name_or_path == plan.model
    assert int(training[2]) == plan.gpus
    assert [args.method] == plan.methods
    assert args.per_device_train_batch_size == plan.per_device_train_batch_size
    assert args.per_device_zo_batch_size == plan.per_device_zo_batch_size
    assert args.deepspeed == (plan.deepspeed or "ds_configs/zero3.json")
    assert args.gradient_checkpointing == plan.activation_checkpointing
    assert args.bf16
    assert plan.dtype == "bf16"
    assert args.lr_scheduler_type == "constant"
    assert data.task in ("rte", "multirc")


def method_of(command: list[str]) -> str:
    return command[command.index("--method") + 1]


PUBLISHED = [command for command in TRAININGS if method_of(command) in ("addax", "mezo")]


@pytest.mark.parametrize("command", PUBLISHED, ids=" ".join)
def test_batches_and_evaluations_are_the_published_ones(command: list[str], launched: None) -> None:
    gpus = int(command[2])
    _, _, args = parse_arguments(command[4:])
    first, zeroth = args.per_device_train_batch_size * gpus, args.per_device_zo_batch_size
    if args.method == "mezo":
        assert (first, args.max_steps, args.eval_steps, args.save_steps) == (16, 20000, 4000, 4000)
    else:
        assert args.max_steps == 1000
        assert zeroth is not None
        # 6 does not divide over four ranks.
        assert (first, zeroth * gpus) == (4, 6 if 6 % gpus == 0 else 8)
