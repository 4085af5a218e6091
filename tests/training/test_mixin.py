"""Addax in trainers of any loss and data, against a loop that knows nothing of Trainer."""

from functools import partial
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from addax_ds import Addax, AddaxConfig, AddaxMixin, AddaxTrainer, UserError, attach
from addax_ds.data.batches import StepSchedule
from addax_ds.data.partition import partition
from addax_ds.data.train_rows import pad
from addax_ds.evaluation.scored_set import EvaluationSet
from tests.support.classifier import LLAMA, classifier, padding
from tests.support.tiny import examples, rows, tiny_model, tiny_tokenizer

STEPS, BATCH, SEED = 10, 2, 3
LENGTHS = (20, 5, 18, 6, 16, 7, 19, 8, 17, 4, 15)


class AnyTrainer(AddaxMixin, Trainer):
    pass


@pytest.fixture(autouse=True)
def _alone(program_alone) -> None:
    pass


def config(folder: Any, **more: Any) -> AddaxConfig:
    usual = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "alpha": 0.1,
        "length_threshold": 10,
        "seed": SEED,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return AddaxConfig(**(usual | more))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


# ---- data sets of any kind, a causal language model --------------------------------------------


def trained(
    folder: Any, dataset: Any, length_threshold: int = 12, **more: Any
) -> dict[str, torch.Tensor]:
    trainer = AddaxTrainer(
        model=tiny_model("opt"),
        args=config(folder, length_threshold=length_threshold),
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
        **more,
    )
    trainer.train()
    return weights(trainer.model)


def columns(padded: bool = False) -> list[dict[str, Any]]:
    """The same rows as tokens, padded as `padding="max_length"` does it or not at all."""
    found = []
    for example in examples(rows(5, 6)):
        more = 64 - example.length if padded else 0
        row = {
            "input_ids": example.input_ids.tolist() + [0] * more,
            "labels": example.labels.tolist() + [-100] * more,
        }
        if padded:
            row["attention_mask"] = [1] * example.length + [0] * more
        found.append(row)
    return found


def test_rows_of_any_data_set_are_the_same_examples(tmp_path):
    expected = trained(tmp_path, examples(rows(5, 6)))
    for dataset in (
        columns(),
        columns(padded=True),
        datasets.Dataset.from_list(columns(padded=True)),
        datasets.Dataset.from_list(columns()).with_format("torch"),
        datasets.Dataset.from_list(rows(5, 6)),
        rows(5, 6),
    ):
        assert_same(trained(tmp_path, dataset), expected)


def test_a_collator_makes_the_batches(tmp_path):
    """Rows without labels are learnt whole. Six of them fill all batches of D1."""
    plain = [{"input_ids": row["input_ids"]} for row in columns()]
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    calls = []

    class Collator(DataCollatorForLanguageModeling):
        def __call__(self, features: Any, return_tensors: Any = None) -> Any:
            calls.append(len(features))
            batch = super().__call__(features, return_tensors)
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            return batch

    own = trained(tmp_path, plain, data_collator=Collator(tokenizer, mlm=False))
    assert calls == [BATCH] * (2 * STEPS)
    for name, weight in trained(tmp_path, plain).items():
        torch.testing.assert_close(own[name], weight, rtol=1e-5, atol=1e-7)


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 211, "n_positions": 48}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=1, eos_token_id=1))


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of one length, learnt whole."""
    batch = {name: torch.tensor([row[name] for row in features]) for name in features[0]}
    return {**batch, "labels": batch["input_ids"]}


def test_evaluation_of_a_collator_s_batches_is_a_mean_over_predicted_tokens(tmp_path):
    """The first token of a row is none, whatever the class of the model says of its own loss."""
    data = [{"input_ids": [5 + i] * 6} for i in range(BATCH)]
    model = gpt2()
    expected = model(**collate(data)).loss.item()
    trainer = AddaxTrainer(model, config(tmp_path), eval_dataset=data, data_collator=collate)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_a_collator_without_targets_changes_nothing(tmp_path):
    """As where a prompt fills max_length."""

    def prompts(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(features)
        return {**batch, "labels": torch.full_like(batch["input_ids"], -100)}

    data = [{"input_ids": [5 + i] * 6} for i in range(BATCH)]
    model = gpt2()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    args = config(tmp_path, method="addax-wa", length_threshold=None, max_steps=2)
    AddaxTrainer(model, args, train_dataset=data, data_collator=prompts).train()
    assert_same(dict(model.named_parameters()), before)


def test_a_model_gets_what_the_collator_makes_in_training_and_evaluation(tmp_path):
    """Token types are added to the embeddings of GPT-2."""
    data = [{"input_ids": [5 + i] * 6, "token_type_ids": [100] * 6} for i in range(BATCH)]
    model = gpt2()
    expected = model(**collate(data)).loss.item()
    trainer = AddaxTrainer(
        model,
        config(tmp_path, method="addax-wa", length_threshold=None, max_steps=1, logging_steps=1),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "fo_loss" in entry)
    assert logged["fo_loss"] == pytest.approx(expected, rel=1e-5)
    assert logged["zo_loss"] == pytest.approx(expected, rel=1e-3)


def test_evaluation_takes_the_same_data_sets(tmp_path):
    def loss_of(dataset: Any) -> float:
        trainer = AddaxTrainer(
            model=tiny_model("opt"),
            args=config(tmp_path),
            eval_dataset=dataset,
            processing_class=tiny_tokenizer(),
        )
        return trainer.evaluate()["eval_loss"]

    expected = loss_of(EvaluationSet(examples(rows(5, 6))))
    assert loss_of(columns()) == expected
    assert loss_of(datasets.Dataset.from_list(rows(5, 6))) == expected


def test_several_evaluation_sets(tmp_path):
    sets = {"short": columns()[5:], "long": columns()[:5]}
    trainer = AddaxTrainer(
        model=tiny_model("opt"), args=config(tmp_path), eval_dataset=sets, train_dataset=columns()
    )
    metrics = trainer.evaluate()
    for name, dataset in sets.items():
        assert metrics[f"eval_{name}_loss"] == trainer.evaluate(dataset)["eval_loss"]
    assert metrics["eval_short_loss"] != metrics["eval_long_loss"]


def test_a_second_trainer_of_the_same_model_goes_on_from_its_weights(tmp_path):
    model = tiny_model("opt")
    for _ in range(2):
        trainer = AddaxTrainer(model, config(tmp_path), train_dataset=columns())
        trainer.train()
    other = tiny_model("opt")
    AddaxTrainer(other, config(tmp_path), train_dataset=columns()).train()
    fresh = tiny_model("opt")
    fresh.load_state_dict(other.state_dict())
    AddaxTrainer(fresh, config(tmp_path), train_dataset=columns()).train()
    assert_same(weights(model), weights(fresh))


def test_a_model_is_free_when_its_trainer_has_trained(tmp_path):
    first = AddaxTrainer(tiny_model("opt"), config(tmp_path), train_dataset=columns())
    first.train()
    model, trained = first.model, weights(first.model)
    batch = {name: torch.tensor([columns()[0][name]]) for name in ("input_ids", "labels")}
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert_same(weights(model), trained)
    torch.save(model, tmp_path / "model.pt")
    model.zero_grad()
    attach(Addax(model.parameters(), lr=0.1), model).detach()
    first.train()  # it may go on
    assert any(not torch.equal(w, trained[n]) for n, w in weights(model).items())


def test_a_plain_trainer_gets_the_model_as_it_was(tmp_path):
    """Accelerate gives it autocast, which it leaves out of a model that it takes for prepared."""
    model, seen = tiny_model("llama"), []
    addax = AddaxTrainer(model, config(tmp_path), train_dataset=columns(), eval_dataset=columns())
    addax.evaluate()
    addax.train()
    model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits.dtype))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, bf16=True, use_cpu=True, report_to="none", save_strategy="no"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = [{"input_ids": row["input_ids"]} for row in columns()]
    Trainer(model, arguments, train_dataset=data, data_collator=collator).train()
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaModel(LlamaConfig(**LLAMA)),
        lambda: classifier(),
        lambda: BertForMaskedLM(BertConfig(**BERT)),
        lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1)),
    ],
    ids=["base", "classifier", "masked", "encoder-decoder"],
)
def test_a_model_that_predicts_no_next_token_is_refused(make, tmp_path):
    model = make()
    with pytest.raises(UserError, match=f"{type(model).__name__} is none: AddaxMixin gives"):
        AddaxTrainer(model, config(tmp_path), train_dataset=columns())


def test_predict_has_metrics_and_the_trainer_the_scores(tmp_path):
    trainer = AddaxTrainer(tiny_model("opt"), config(tmp_path), train_dataset=columns())
    found = trainer.predict(columns()[:4])
    assert found.predictions is None
    assert trainer.scores.shape[0] == 4
    log_likelihood, targets = trainer.scores[:, 0].sum(), trainer.scores[:, 1].sum()
    assert found.metrics["test_loss"] == pytest.approx(-log_likelihood / targets)


class Fails(TrainerCallback):
    """Raises in the third step, before or after its backward."""

    def __init__(self, event: str) -> None:
        self.event = event

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and self.event == "step":
            raise KeyboardInterrupt

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and self.event == "backward":
            hooks = []

            def fail(gradient: torch.Tensor) -> None:
                hooks[0].remove()
                raise KeyboardInterrupt

            parameter = next(kwargs["model"].parameters())
            hooks.append(parameter.register_hook(fail))


@pytest.mark.parametrize("event", ["backward", "step"])
def test_a_trainer_trains_anew_after_a_step_that_was_interrupted(event, tmp_path):
    trainer = AddaxTrainer(tiny_model("opt"), config(tmp_path), train_dataset=columns())
    trainer.add_callback(Fails(event))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    trainer.remove_callback(Fails)
    interrupted = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert any(not torch.equal(w, interrupted[n]) for n, w in weights(trainer.model).items())


def test_what_cannot_be_attached_is_said_as_it_is(tmp_path):
    trainer = AddaxTrainer(tiny_model("opt"), config(tmp_path), train_dataset=columns())
    parameter = next(trainer.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(UserError, match=r"call model\.zero_grad\(\) first"):
        trainer.train()
    assert "eval_loss" in trainer.evaluate(columns())
    trainer.model.zero_grad()
    held = attach(Addax(trainer.model.parameters(), lr=0.1), trainer.model)
    with pytest.raises(UserError, match="another Addax optimizer is attached"):
        trainer.train()
    held.detach()
    trainer.train()


def test_a_data_set_that_was_refused_is_refused_again(tmp_path):
    trainer = AddaxTrainer(tiny_model("opt"), config(tmp_path), train_dataset=columns())
    trainer.train_dataset = columns()[-2:]
    for _ in range(2):
        with pytest.raises(UserError, match="the zeroth-order stream D0 holds 1 examples"):
            trainer.train()


def test_a_sweep_is_over_the_data_set_that_there_is(tmp_path):
    found = []
    for rows_of in (columns, lambda: columns()[::-1]):
        args = config(tmp_path, learning_rate=None, find_learning_rate=True)
        trainer = AddaxTrainer(tiny_model("opt"), args, train_dataset=rows_of())
        trainer.train_dataset = columns()[::-1]
        found.append(trainer.find_learning_rate())
    assert found[0] == found[1]


def test_another_data_set_may_follow(tmp_path):
    trainer = AddaxTrainer(tiny_model("opt"), config(tmp_path), train_dataset=columns())
    trainer.train_dataset = columns()[::-1]
    trainer.train()
    assert_same(weights(trainer.model), trained(tmp_path, columns()[::-1], length_threshold=10))


def test_a_model_without_a_trainable_parameter_is_refused(tmp_path):
    model = tiny_model("opt").requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter: set requires_grad"):
        AddaxTrainer(model, config(tmp_path), train_dataset=columns()).train()


# ---- any loss ----------------------------------------------------------------------------------


def loop(model: nn.Module, data: list[Any], collate: Any, lengths: Any, **more: Any) -> Any:
    """Ten steps of Addax with the model's own loss; returns the weights and every g0."""
    streams = partition(lengths, "addax", 10)
    schedule = StepSchedule(
        streams.zeroth_order, streams.first_order, BATCH, BATCH, SEED, drop_last=True
    )
    model.train()
    optimizer = Addax(model.parameters(), lr=0.05, alpha=0.1, seed=SEED, **more)
    attach(optimizer, model)
    g0 = []

    def loss(indices: Any) -> Any:
        batch = collate([data[i] for i in indices])
        return lambda: model(**batch).loss

    for step in range(STEPS):
        first = optimizer.measure(
            loss(schedule.zeroth_order_indices(step)), loss(schedule.first_order_indices(step))
        )
        first.backward()
        optimizer.step()
        g0.append(optimizer.report.g0)
    return weights(model), g0


BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}


def classified() -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    return [
        {"input_ids": draw.integers(1, 100, n).tolist(), "label": int(draw.integers(3))}
        for n in LENGTHS
    ]


def test_a_sequence_classifier(tmp_path):
    collator = padding()
    trainer = AnyTrainer(
        model=classifier(),
        args=config(tmp_path, logging_steps=1),
        train_dataset=datasets.Dataset.from_list(classified()),
        eval_dataset=datasets.Dataset.from_list(classified()[:4]),
        data_collator=collator,
        compute_metrics=lambda p: {"rows": len(p.label_ids)},
    )
    trainer.train()
    expected, g0 = loop(classifier(), classified(), collator, list(LENGTHS))
    assert [entry["g0"] for entry in trainer.state.log_history if "g0" in entry] == g0
    assert_same(weights(trainer.model), expected)
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 4
    assert np.isfinite(metrics["eval_loss"])


def vision_language_model() -> nn.Module:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**LLAMA),
            image_token_index=99,
            vision_feature_layer=-1,
        )
    )


def described(rows_: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows_)
    ids = torch.zeros(len(rows_), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows_):
        ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        labels[index, 5 : len(row["input_ids"])] = ids[index, 5 : len(row["input_ids"])]
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": labels,
        "pixel_values": torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows_]),
    }


def test_a_vision_language_model(tmp_path):
    """Its loss is a mean over the targets of the batch, of which Trainer tells the model."""
    draw = np.random.default_rng(1)
    data = [
        {
            "input_ids": [99] * 4 + draw.integers(1, 98, n + 2).tolist(),
            "pixel_values": draw.normal(size=(3, 8, 8)).astype(np.float32),
        }
        for n in LENGTHS
    ]
    trainer = AnyTrainer(
        model=vision_language_model(),
        args=config(tmp_path, logging_steps=1, length_threshold=16),
        train_dataset=data,
        data_collator=described,
    )
    trainer.train()
    expected, g0 = loop(vision_language_model(), data, described, list(LENGTHS))
    found = [entry["g0"] for entry in trainer.state.log_history if "g0" in entry]
    assert found == pytest.approx(g0, rel=2e-3)
    for name, weight in weights(trainer.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


def test_micro_batches_are_summed_as_trainer_does(tmp_path):
    """Two of two rows are one of four: the same rows, divided by the same number of targets."""

    def run(**more: Any) -> dict[str, torch.Tensor]:
        trainer = AnyTrainer(
            model=vision_language_model(),
            args=config(tmp_path, length_threshold=16, max_steps=3, **more),
            train_dataset=[
                {
                    "input_ids": [99] * 4 + [7 + i] * (n + 2),
                    "pixel_values": np.full((3, 8, 8), i, np.float32),
                }
                for i, n in enumerate(LENGTHS)
            ],
            data_collator=described,
        )
        trainer.train()
        return weights(trainer.model)

    whole = run(per_device_train_batch_size=4)
    parts = run(gradient_accumulation_steps=2)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=2e-5)


def test_a_batch_without_targets_does_not_say_how_the_loss_is_reduced(tmp_path):
    """Its loss is 0, whatever it is divided by; the next step tells."""
    trainer = AnyTrainer(
        model=tiny_model("llama"),
        args=config(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=1),
        train_dataset=columns(),
    )
    trainer.create_optimizer()
    known = {name: t for name, t in pad(examples(rows(0, 2)), 0).items() if name != "index"}
    ignored = {**known, "labels": torch.full_like(known["labels"], -100)}
    trainer.settle_loss(trainer.model, {"first_order": [ignored, known]})
    assert trainer.model_accepts_loss_kwargs
    trainer.model.forward = partial(mean_of_its_own, trainer.model.forward)
    trainer.settle_loss(trainer.model, {"first_order": [known, known]})
    assert not trainer.model_accepts_loss_kwargs


def mean_of_its_own(forward: Any, num_items_in_batch: Any, **given: Any) -> Any:
    return forward(**given)


@pytest.mark.parametrize("name", ["LlamaModel", "Anything"])
def test_a_model_of_one_s_own_may_have_any_name(name, tmp_path):
    model = type(name, (OwnModel,), {})()
    AddaxTrainer(model, config(tmp_path), train_dataset=columns()).train()


class OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("llama")

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids)


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    def make(train_dataset: Any) -> AnyTrainer:
        return AnyTrainer(
            model=classifier(),
            args=config(tmp_path, save_strategy="steps", save_steps=4),
            train_dataset=train_dataset,
            data_collator=padding(),
        )

    whole = make(classified())
    whole.train()
    again = make(classified())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.resumed_step == 4
    assert_same(weights(again.model), weights(whole.model))
    other = make(classified()[::-1])
    with pytest.raises(UserError, match="the training data had the digest"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_trainer_may_take_its_arguments_in_any_form(tmp_path):
    class Weighted(Trainer):
        def __init__(self, *args: Any, weight: float = 1.0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.weight = weight

    class Mixed(AddaxMixin, Weighted):
        pass

    more = {"train_dataset": classified(), "data_collator": padding()}
    results = []
    for positional, named in (
        ((classifier(), config(tmp_path)), {}),
        ((), {"model": classifier(), "args": config(tmp_path)}),
    ):
        trainer = Mixed(*positional, weight=0.5, **named, **more)
        assert trainer.weight == 0.5
        trainer.train()
        results.append(weights(trainer.model))
    assert_same(*results)


class Writing(TrainerCallback):
    """Writes a weight between two steps, as a callback of the user's might."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                next(kwargs["model"].parameters()).view(-1)[0].add_(1)


def test_a_write_between_two_steps_stops_the_training(tmp_path):
    trainer = AnyTrainer(
        model=classifier(),
        args=config(tmp_path, desync_check_steps=1),
        train_dataset=classified(),
        data_collator=padding(),
        callbacks=[Writing()],
    )
    with pytest.raises(UserError, match="the weights changed between steps 1 and 2"):
        trainer.train()


# ---- what is refused ---------------------------------------------------------------------------


class OwnStep(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().training_step(*args, **kwargs)


class HalfLoss(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs).bfloat16()


@pytest.mark.parametrize("method", ["get_train_dataloader", "create_optimizer"])
def test_a_trainer_with_a_method_that_the_step_replaces_is_refused(method):
    own = type("Own", (Trainer,), {method: lambda self, *_: None})
    with pytest.raises(UserError, match=f"Own has a {method} of its own"):
        type("Mixed", (AddaxMixin, own), {})


def test_what_an_addax_step_cannot_carry_is_refused_by_name(tmp_path):
    def make(base: type, **more: Any) -> Any:
        kind = type("Mixed", (AddaxMixin, base), {})
        usual = {"model": classifier(), "args": config(tmp_path), "train_dataset": classified()}
        return kind(**(usual | {"data_collator": padding()} | more))

    with pytest.raises(UserError, match="OwnStep has a training_step of its own"):
        make(OwnStep)
    with pytest.raises(UserError, match="Last: AddaxMixin comes first among the base classes"):
        type("Last", (Trainer, AddaxMixin), {})
    with pytest.raises(UserError, match=r"a loss in torch.bfloat16, .*let it reduce in fp32"):
        make(HalfLoss).train()
    optimizer = torch.optim.SGD(classifier().parameters(), lr=0.1)
    with pytest.raises(UserError, match="takes no optimizers"):
        make(Trainer, optimizers=(optimizer, None))
    with pytest.raises(UserError, match="takes no model_init"):
        make(Trainer, model=None, model_init=classifier)
    with pytest.raises(UserError, match="rows come one after the other"):
        make(Trainer, train_dataset=datasets.IterableDataset.from_generator(classified))
    with pytest.raises(UserError, match=r"the columns label and no input_ids.*override row_length"):
        make(Trainer, train_dataset=[{"label": 1}] * 4)
    with pytest.raises(UserError, match="takes no compute_loss_func"):
        AddaxTrainer(tiny_model("opt"), config(tmp_path), compute_loss_func=lambda *_: None)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [[1, 2], [3, 4]]}, r"row 3: input_ids must be integers, one a token"),
        ({"input_ids": [0.5, 1.5]}, r"row 3: input_ids must be integers, one a token"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "row 3: .* but 3 in input_ids, 2 in labels"),
        ({"input_ids": [1, 2, 3], "labels": [1, -100, -100]}, "row 3: no token after the first"),
        ({"input_ids": [1, 2, 211]}, "row 3: input_ids from 1 to 211, and the model has"),
        ({"input_ids": [1, 2**32 + 7]}, "row 3: input_ids from 1 to 4294967303, and the model has"),
        ({"input_ids": [1, 2], "labels": [-1, 2]}, "row 3: labels from -1 to 2, .* or -100 where"),
        ({"input_ids": [1, 2], "labels": [-100, 211]}, "row 3: labels from 211 to 211, and the"),
        ({"input_ids": [1, 2], "assistant_masks": [1]}, "row 3: .* 1 in assistant_masks"),
        ({"input_ids": [1, 2], "completion_mask": [1, 0]}, "row 3: no token after the first"),
        ({"input_ids": [1, 2], "position_ids": [0, 0]}, "row 3: position_ids is of packed rows"),
        ({"input_ids": [1, 2], "seq_idx": [0, 1]}, "row 3: seq_idx is of packed rows, whose"),
        ({"input_ids": [1, 2], "seq_lengths": [1, 1]}, "row 3: seq_lengths is of packed rows"),
        ({"text": "w1 w2"}, "row 3: no input_ids"),
        ({"input_ids": [1, 2] * 40}, "row 3: 80 tokens, and the model takes 48"),
        (
            {"input_ids": [1, 2], "attention_mask": [1]},
            "row 3: .* 2 in input_ids, 1 in att",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, said, tmp_path):
    with pytest.raises(UserError, match=f"train_dataset: {said}"):
        AddaxTrainer(tiny_model("opt"), config(tmp_path), train_dataset=[*columns()[:3], row])


def test_text_needs_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="give the trainer its tokenizer as processing_class"):
        AddaxTrainer(tiny_model("opt"), config(tmp_path), train_dataset=rows(2, 2))
