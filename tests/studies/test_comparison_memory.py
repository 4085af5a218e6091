"""Studies at a limit of memory: every method has the largest step there that the planner allows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from addax_ds.cli import plan
from benchmarks.context import CONFIG
from studies.comparison.study import STUDIES, Contender, Study

EXAMPLES = 8  # of a first-order batch, as in the other studies, if they fit
LIMITED = [
    pytest.param(study, contender, id=f"{study.name}-{contender.name}")
    for study in STUDIES.values()
    if study.memory_gb is not None
    for contender in study.contenders
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    CONFIG.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("study", "contender"), LIMITED)
def test_a_method_has_the_largest_step_that_fits(
    study: Study, contender: Contender, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fits(contender: Contender) -> bool:
        flags = {**contender.flags, "length": str(study.max_length), "target_tokens": "1"}
        recomputing = flags.pop("activation_checkpointing", None)
        for name in ("max_steps", "eval_steps", "save_steps", "num_dev"):
            del flags[name]
        method = flags.pop("method")
        if method == "ip-sgd" and "length_threshold" in flags:  # no longer row is trained on
            flags["length"] = flags.pop("length_threshold")
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        arguments += ["--activation_checkpointing"] * (recomputing is not None)
        arguments += ["--model", str(model), "--gpus=1", "--gpu_memory=80", "--methods", method]
        plan.main([*arguments, "--json"])
        (planned,) = json.loads(capsys.readouterr().out)["methods"]
        assert study.memory_gb is not None
        return bool(planned["total"] <= study.memory_gb * 1e9)

    assert fits(contender)
    more = dict(contender.more)
    if "length_threshold" in more:
        longer = {**more, "length_threshold": str(int(more["length_threshold"]) + 16)}
        assert not fits(replace(contender, more=tuple(longer.items())))
    elif 0 < contender.first_order < EXAMPLES:
        assert not fits(replace(contender, first_order=contender.first_order + 1))
    else:
        assert (contender.first_order or contender.zeroth_order) == EXAMPLES
