"""Every family of models, tied and untied, through `AddaxTrainer` in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

import addax_ds
from addax_ds.config.addax_config import AddaxConfig
from addax_ds.data.train_rows import pad
from addax_ds.optim.report import NonFiniteError
from addax_ds.training.trainer import AddaxTrainer
from addax_ds.utils.errors import UserError
from tests.support.reference import distance
from tests.support.tiny import FAMILIES, examples, rows, tiny_model, tiny_tokenizer
from tests.support.trainer_reference import Settings, reference_run
from tests.workers.trainer_cases import gathered

SEED = 5
EPS = 1e-2
every_family = pytest.mark.parametrize("family", FAMILIES)
both_ties = pytest.mark.parametrize("tied", [True, False])


def trainer(model: nn.Module, folder: Path, **options: Any) -> AddaxTrainer:
    """Addax with a batch of all long rows and a batch of all short ones."""
    args = AddaxConfig(
        **{
            "output_dir": str(folder),
            "alpha": 0.1,
            "zo_eps": EPS,
            "length_threshold": 12,
            "per_device_zo_batch_size": 2,
            "use_cpu": True,
            "per_device_train_batch_size": 3,
            "learning_rate": 0.05,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "seed": SEED,
            "disable_tqdm": True,
            **options,
        }
    )
    return AddaxTrainer(
        model, args, train_dataset=examples(rows(2, 3)), processing_class=tiny_tokenizer()
    )


@every_family
@both_ties
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_see_perturbed_weights_and_the_stored_ones_stay(family, tied, dtype):
    batch = pad(examples(rows(2, 1)), 0)
    model = tiny_model(family, dtype, tie_word_embeddings=tied).train()
    optimizer = addax_ds.Addax(model.parameters(), lr=1.0, alpha=1.0, zo_eps=EPS, seed=SEED)
    addax_ds.attach(optimizer, model)
    before = gathered(model)
    seen = []

    def closure() -> Tensor:
        seen.append(model(**batch).loss)
        return seen[-1]

    optimizer.measure(closure, None)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    explicit = tiny_model(family, dtype, tie_word_embeddings=tied).eval()
    for sign, loss in zip((1, -1), seen, strict=True):
        with torch.no_grad():
            for name, p in explicit.named_parameters():
                z = addax_ds.gaussian(SEED, 0, name, 0, p.numel()).view(p.shape)
                p.copy_(before[name].float() + sign * EPS * z)
            assert loss.item() == explicit(**batch).loss.item()
    assert seen[0] != seen[1]


@every_family
@both_ties
def test_one_step_equals_the_float64_one(family, tied, tmp_path):
    model = tiny_model(family, tie_word_embeddings=tied)
    before = gathered(model)
    trainer(model, tmp_path).train()
    reference = tiny_model(family, tie_word_embeddings=tied)
    long, short = (
        [e for e in examples(rows(2, 3)) if (e.length > 12) == is_long] for is_long in (True, False)
    )
    reference_run(reference, [long], [short], [0.05], Settings(0.1, SEED, EPS))
    moved = distance(before, gathered(reference))
    assert distance(gathered(model), gathered(reference)) <= 5e-4 * moved


def test_gradient_checkpointing_changes_no_bit(tmp_path):
    ends = []
    for flag in (False, True):
        model = tiny_model("llama")
        runs = trainer(model, tmp_path, max_steps=3, gradient_checkpointing=flag)
        recomputed = count_forwards(model.model.layers[0])
        runs.train()
        assert len(recomputed) == 3 * (4 if flag else 3)
        ends.append(gathered(model))
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


def count_forwards(module: nn.Module) -> list[None]:
    calls: list[None] = []
    original = module.self_attn.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    module.self_attn.forward = forward
    return calls


def test_training_stops_after_ten_losses_in_a_row_that_are_not_finite(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    before = gathered(model)
    training = trainer(model, tmp_path, max_steps=20)
    with pytest.raises(NonFiniteError, match="10th step in a row"):
        training.train()
    assert training.state.global_step == 9
    after = gathered(model)
    for name, weight in after.items():
        assert torch.allclose(weight, before[name], rtol=0, atol=0, equal_nan=True)


class OwnMean(nn.Module):
    """A user's wrapper: it insists on a mask, and its loss is a mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("opt")
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        return self.inner(input_ids, attention_mask, labels=labels)


def test_trainers_own_evaluation_of_a_model_that_insists_on_a_mask(tmp_path):
    evaluated = []
    for model in (OwnMean(), tiny_model("opt")):
        args = AddaxConfig(output_dir=str(tmp_path), learning_rate=0.1, use_cpu=True, report_to=[])
        fit = AddaxTrainer(
            model,
            args,
            eval_dataset=examples(rows(2, 3)),
            processing_class=tiny_tokenizer(),
            compute_metrics=lambda prediction: {"rows": len(prediction.label_ids)},
        )
        evaluated.append(fit.evaluate())
    own, plain = evaluated
    assert own["eval_rows"] == 5
    assert own["eval_loss"] == plain["eval_loss"]


def test_a_model_that_ignores_the_number_of_targets_trains_like_any_other(tmp_path):
    model, plain = OwnMean(), tiny_model("opt")
    before = gathered(plain)
    logs = []
    for folder, module in (("own", model), ("plain", plain)):
        fit = trainer(module, tmp_path / folder, max_steps=1)
        fit.train()
        logs.append(fit.state.log_history[0])
    assert logs[0]["fo_loss"] == logs[1]["fo_loss"]
    assert distance(gathered(plain), before) > 0


def test_the_weights_have_the_type_that_the_arguments_ask_for(tmp_path):
    with pytest.raises(addax_ds.UserError, match=r"torch\.float32.* ask for torch\.bfloat16"):
        trainer(tiny_model("opt"), tmp_path, bf16=True).train()
    with pytest.raises(addax_ds.UserError, match=r"torch\.bfloat16.* ask for torch\.float32"):
        trainer(tiny_model("opt", torch.bfloat16), tmp_path).train()
    trainer(tiny_model("opt", torch.bfloat16), tmp_path, bf16=True).train()


def test_a_loss_that_nothing_calls_is_refused(tmp_path):
    class Mine(AddaxTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            raise AssertionError

    with pytest.raises(UserError, match=r"Mine has a compute_loss of its own.*AddaxMixin"):
        Mine(tiny_model("opt"), AddaxConfig(output_dir=str(tmp_path), learning_rate=1.0))


def test_rows_to_evaluate_are_read_before_the_training(tmp_path):
    """Once, whatever their number of evaluations; and a bad one ends no training."""

    class Rows(list):
        read = 0

        def __getitem__(self, index: int) -> Any:
            Rows.read += 1
            return super().__getitem__(index)

    def evaluating(dataset: Any) -> AddaxTrainer:
        often = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
        args = AddaxConfig(
            str(tmp_path), learning_rate=0.05, report_to=[], use_cpu=True, save_strategy="no",
            length_threshold=12, per_device_train_batch_size=2, disable_tqdm=True, **often,
        )  # fmt: skip
        return AddaxTrainer(
            tiny_model("opt"), args, train_dataset=examples(rows(2, 3)), eval_dataset=dataset
        )

    good = Rows([{"input_ids": [5, 6, 7]}, {"input_ids": [5, 8]}])
    watched = evaluating({"a": good, "b": examples(rows(1, 1))})
    before = Rows.read
    watched.train()
    assert Rows.read == before > 0
    logged = [entry for entry in watched.state.log_history if "eval_a_loss" in entry]
    assert len(logged) == 3
    watched.template_time = "2001-01-01T00:00:00"  # that of the first start, in a resumed run
    for _ in range(2):
        watched.evaluate()
    assert Rows.read == 2 * before
    for bad, said in (
        ([{"input_ids": [5, 6]}, {"input_ids": [10**6, 6]}], r"eval_dataset: row 1: input_ids"),
        ([], "eval_dataset holds no rows"),
        ({"a": iter(())}, "eval_dataset 'a' is a .*whose rows come one after the other"),
    ):
        with pytest.raises(UserError, match=said):
            evaluating(bad)


def test_label_smoothing_is_refused_because_no_loss_would_see_it(tmp_path):
    with pytest.raises(UserError, match="Trainer's label smoother is never called"):
        trainer(tiny_model("opt"), tmp_path, label_smoothing_factor=0.1)
    step = trainer(tiny_model("opt").eval(), tmp_path)
    batch = pad(examples(rows(2, 1)), 0)
    targets = int((batch["labels"] != -100).sum())
    seen = []
    for smoother in (None, LabelSmoother(epsilon=0.5)):
        step.label_smoother = smoother
        training = step.micro_batch_loss(step.model, step.prepare_micro_batch(batch), targets)
        evaluation = step.compute_loss(step.model, dict(batch), num_items_in_batch=targets)
        seen.append((training.item(), evaluation.item()))
    assert seen[0] == seen[1]
