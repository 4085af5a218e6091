"""TRL's trainers through `AddaxMixin`, on every back end, against a plain loop with own losses."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForSequenceClassification

from tests.support.rank_group import Lazy, RankGroup
from tests.support.tiny import tiny_model

trl_cases = pytest.importorskip("tests.workers.trl_cases")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("program_alone")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    for kind in ("sft", "dpo"):
        tiny_model("llama").save_pretrained(folder / kind)
    config = AutoConfig.from_pretrained(folder / "sft")
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    return folder


@pytest.fixture(scope="module", params=["zero3", "fsdp2"])
def of_two_ranks(request, folder) -> Iterator[Callable[[str], list[Any]]]:
    """Runs a kind; a process that has once used DeepSpeed keeps to it."""
    (folder / request.param).mkdir()
    group = RankGroup("trl_cases", 2, folder / request.param)
    yield lambda kind: group.call("run_case", kind, folder, request.param, 2)
    group.close()


@pytest.fixture(scope="module")
def alone(folder) -> Lazy[str, Any]:
    return Lazy(trl_cases.KINDS, lambda kind: trl_cases.run_case(kind, folder, "none", 1))


@pytest.mark.parametrize("kind", trl_cases.KINDS)
def test_ten_steps_equal_a_plain_loop_with_the_same_loss(kind, folder, alone):
    found = alone[kind]
    expected = trl_cases.plain_loop(kind, folder, found["rows"])
    assert len(found["g0"]) == trl_cases.STEPS
    assert found["g0"] == pytest.approx(expected["g0"], rel=0.02, abs=0.02)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", trl_cases.KINDS)
def test_two_ranks_take_the_steps_of_one(kind, alone, of_two_ranks):
    for found in of_two_ranks(kind):
        assert found["g0"] == pytest.approx(alone[kind]["g0"], rel=0.02, abs=0.02)
        for name, weight in alone[kind]["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-3)
