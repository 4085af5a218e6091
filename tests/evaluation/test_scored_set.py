"""Evaluation in one process against a computation example by example; `test_trainer` has ranks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from addax_ds.config.addax_config import AddaxConfig
from addax_ds.data.examples import Example
from addax_ds.evaluation.scored_set import (
    Choice,
    EvaluationSet,
    ScoreTable,
    evaluation_dataloader,
)
from addax_ds.training.trainer import AddaxTrainer
from tests.support.tiny import choice_set, examples, rows, tiny_model, tiny_tokenizer


@pytest.fixture
def model() -> nn.Module:
    return tiny_model("opt", dropout=0.5).train()


def evaluator(model: nn.Module, folder, **options: Any) -> AddaxTrainer:
    given = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "learning_rate": 0}
    args = AddaxConfig(**given, **options)
    return AddaxTrainer(model, args, processing_class=tiny_tokenizer())


@torch.no_grad()
def log_likelihood(model: nn.Module, example: Example) -> tuple[float, int]:
    """Of the target tokens, without padding, in float64; and their number."""
    ids = torch.tensor(example.input_ids.tolist())
    logits = model(input_ids=ids[None]).logits[0].double()
    total, count = 0.0, 0
    for position in range(1, len(ids)):
        if example.labels[position] != -100:
            total += F.log_softmax(logits[position - 1], dim=-1)[ids[position]].item()
            count += 1
    return total, count


def by_hand(model: nn.Module, dataset: EvaluationSet) -> dict[str, float]:
    model = model.double().eval()
    scores = [log_likelihood(model, example) for example in dataset.examples]
    right, total, count = 0, 0.0, 0
    for choice in dataset.choices:
        own = scores[choice.first : choice.first + choice.count]
        means = [t / c for t, c in own]
        right += means.index(max(means)) == choice.label
        total += own[choice.label][0]
        count += own[choice.label][1]
    return {"eval_accuracy": right / len(dataset.choices), "eval_loss": -total / count}


@pytest.mark.parametrize("batch", [1, 4, 13, 64])
def test_choices_equal_a_computation_by_hand(model, tmp_path, batch):
    dataset = choice_set()
    assert len(dataset) == 13
    metrics = evaluator(model, tmp_path, per_device_eval_batch_size=batch).evaluate(dataset)
    wanted = by_hand(model, dataset)
    assert 0.0 < wanted["eval_accuracy"] < 1.0
    assert metrics["eval_accuracy"] == wanted["eval_accuracy"]
    assert metrics["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-6)


def test_candidates_of_unequal_length_compare_by_their_mean(model, tmp_path):
    """By the sum of its log-likelihoods the shortest nearly always wins."""
    dataset = choice_set()
    scores = [log_likelihood(model.double().eval(), e) for e in dataset.examples]
    by_mean, by_sum = [], []
    for c in dataset.choices:
        own = scores[c.first : c.first + c.count]
        by_mean.append(max(range(c.count), key=lambda i, own=own: own[i][0] / own[i][1]))
        by_sum.append(max(range(c.count), key=lambda i, own=own: own[i][0]))
    assert by_mean != by_sum
    choices = [
        Choice(c.first, c.count, best) for c, best in zip(dataset.choices, by_mean, strict=True)
    ]
    metrics = evaluator(model.float(), tmp_path).evaluate(EvaluationSet(dataset.examples, choices))
    assert metrics["eval_accuracy"] == 1.0


def test_plain_text_has_a_loss_per_token_and_no_accuracy(model, tmp_path):
    data = examples(rows(3, 4))
    metrics = evaluator(model, tmp_path, per_device_eval_batch_size=3).evaluate(EvaluationSet(data))
    scores = [log_likelihood(model.double().eval(), example) for example in data]
    wanted = -sum(total for total, _ in scores) / sum(count for _, count in scores)
    assert metrics["eval_loss"] == pytest.approx(wanted, rel=1e-6)
    assert "eval_accuracy" not in metrics


def test_several_data_sets_and_the_mode(model, tmp_path):
    text = EvaluationSet(examples(rows(3, 4)))
    trainer = evaluator(model, tmp_path)
    metrics = trainer.evaluate({"text": text, "choice": choice_set()})
    assert {"eval_text_loss", "eval_choice_loss", "eval_choice_accuracy"} <= metrics.keys()
    assert metrics["eval_text_loss"] == trainer.evaluate(text)["eval_loss"]


def test_own_compute_metrics(model, tmp_path):
    """Then Trainer's evaluation runs as it does without Addax."""
    data = examples(rows(2, 3))
    args = AddaxConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], learning_rate=0)
    trainer = AddaxTrainer(
        model,
        args,
        compute_metrics=lambda p: {"rows": float(len(p.predictions))},
        processing_class=tiny_tokenizer(),
    )
    metrics = trainer.evaluate(EvaluationSet(data))
    assert metrics["eval_rows"] == 5.0
    assert math.isfinite(metrics["eval_loss"])


SCORES = np.array([[-4.0, 2.0], [-3.0, 2.0], [-1.0, 1.0], [-3.0, 4.0]])


def test_metrics_and_predictions_from_known_scores():
    choices = [Choice(0, 2, 1, (), ("a", "b")), Choice(2, 2, 0, (), ("c", "d"))]
    dataset = EvaluationSet(examples(rows(1, 3)), choices)
    assert dataset.metrics(SCORES) == pytest.approx({"loss": (3.0 + 1.0) / 3.0, "accuracy": 0.5})
    assert list(dataset.predictions(SCORES)) == [
        {
            "origin": "row 0",
            "tokens": dataset.examples[1].length,
            "answer_tokens": 2,
            "candidates": ["a", "b"],
            "scores": [-2.0, -1.5],
            "predicted": 1,
            "label": 1,
            "also_right": [],
            "right": True,
        },
        {
            "origin": "row 2",
            "tokens": dataset.examples[2].length,
            "answer_tokens": 1,
            "candidates": ["c", "d"],
            "scores": [-1.0, -0.75],
            "predicted": 1,
            "label": 0,
            "also_right": [],
            "right": False,
        },
    ]


def test_any_of_several_right_candidates_counts_and_the_first_has_the_loss():
    data = examples(rows(1, 3))
    dataset = EvaluationSet(data, [Choice(0, 2, 1), Choice(2, 2, 0, also_right=(1,))])
    assert dataset.metrics(SCORES) == pytest.approx({"loss": (3.0 + 1.0) / 3.0, "accuracy": 1.0})


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_ranks_share_the_same_batches(world_size, size):
    """All do as many rounds, and together every example once, in the batches of a single rank."""
    dataset = choice_set()
    loaders = [
        evaluation_dataloader(dataset, size, rank, world_size, pad_token_id=0)
        for rank in range(world_size)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    seen = [
        batch["index"].tolist()
        for together in zip(*loaders, strict=True)
        for batch in together
        if batch["index"].tolist() != [-1]
    ]
    assert seen == [batch.tolist() for batch in dataset.batches(size)]
    assert sorted(index for batch in seen for index in batch) == list(range(13))
    lengths = [max(dataset.examples[i].length for i in batch) for batch in seen]
    assert lengths == sorted(lengths, reverse=True)


def test_a_table_that_is_not_complete_is_noticed():
    table = ScoreTable(choice_set())
    table.add(torch.tensor([0, -1, 3]), torch.ones(3, 2, dtype=torch.float64))
    with pytest.raises(AssertionError, match="every example is scored once"):
        table.complete()


def test_the_digest_is_of_rows_and_of_what_is_right():
    candidates = examples(rows(2, 2))
    sets = [
        EvaluationSet(candidates),
        EvaluationSet(candidates[::-1]),
        EvaluationSet(candidates, [Choice(0, 2, 0), Choice(2, 2, 0)]),
        EvaluationSet(candidates, [Choice(0, 2, 0), Choice(2, 2, 1)]),
    ]
    assert len({each.digest for each in sets}) == 4
    assert EvaluationSet(candidates).digest == sets[0].digest
