"""TRL's trainers through `AddaxMixin`, on every back end, against a plain loop with own losses."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForSequenceClassification

from addax_ds import AddaxMixin, UserError
from tests.support.rank_group import Lazy, RankGroup
from tests.support.reference import distance
from tests.support.tiny import tiny_model

pytest.importorskip("trl")
from tests.workers import trl_cases

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
def of_two_ranks(request, folder) -> Iterator[Callable[..., list[Any]]]:
    """Runs a function for a back end; a process that has once used DeepSpeed keeps to it."""
    (folder / request.param).mkdir()
    group = RankGroup("trl_cases", 2, folder / request.param)
    yield lambda name, *words: group.call(name, *words, folder, request.param, 2)
    group.close()


@pytest.fixture(scope="module")
def alone(folder) -> Lazy[str, Any]:
    return Lazy(trl_cases.KINDS, lambda kind: trl_cases.run_case(kind, folder, "none", 1))


def assert_same_steps(kind: str, folder: Path, found: Any, expected: Any) -> None:
    start = dict(trl_cases.load(kind, folder).state_dict())
    moved = distance(start, expected["weights"])
    assert distance(found["weights"], expected["weights"]) < 0.01 * moved
    assert found["g0"] == pytest.approx(expected["g0"], rel=0.02, abs=0.02)


@pytest.mark.parametrize("kind", trl_cases.KINDS)
def test_ten_steps_equal_a_plain_loop_with_the_same_loss(kind, folder, alone):
    found = alone[kind]
    expected = trl_cases.plain_loop(kind, folder, found["rows"])
    assert len(found["g0"]) == trl_cases.STEPS
    assert_same_steps(kind, folder, found, expected)


@pytest.mark.parametrize("kind", trl_cases.KINDS)
def test_two_ranks_take_the_steps_of_one(kind, folder, alone, of_two_ranks):
    for found in of_two_ranks("run_case", kind):
        assert_same_steps(kind, folder, found, alone[kind])


def test_two_ranks_save_and_go_on(of_two_ranks):
    for found in of_two_ranks("run_saved"):
        assert found["whole"].keys() == found["again"].keys() == found["saved"].keys()
        for name, weight in found["whole"].items():
            assert torch.equal(found["again"][name], weight), name
            assert torch.equal(found["saved"][name], weight), name


def test_the_rest_of_a_trainer_works_as_before(folder, tmp_path):
    """Adapters, two micro-batches, clipping, evaluation while training, saving, going on."""

    def make(output: Path) -> Any:
        return trl_cases.make(
            "sft",
            folder,
            output,
            "none",
            1,
            adapters=True,
            eval_dataset=trl_cases.data("sft"),
            eval_strategy="steps",
            eval_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            max_steps=6,
            save_strategy="steps",
            save_steps=4,
        )

    whole = make(tmp_path / "whole")
    before = {name: weight.clone() for name, weight in whole.model.state_dict().items()}
    whole.train()
    after = whole.model.state_dict()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed
    assert all("lora" in name for name in changed)
    losses = [e["eval_loss"] for e in whole.state.log_history if "eval_loss" in e]
    assert len(losses) == 3
    assert len(set(losses)) == 3
    accuracies = [
        e["eval_mean_token_accuracy"] for e in whole.state.log_history if "eval_loss" in e
    ]
    assert accuracies[-1] == whole.evaluate()["eval_mean_token_accuracy"], "of no training rows"
    again = make(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, after[name]), name
    whole.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "adapter_config.json").is_file()


def test_a_trainer_that_generates_in_its_step_is_refused_by_name():
    import trl

    with pytest.raises(UserError, match="GRPOTrainer has a training_step of its own"):
        type("Mixed", (AddaxMixin, trl.GRPOTrainer), {})
