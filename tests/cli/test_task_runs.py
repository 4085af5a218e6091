"""The command line on tasks: training, choosing, testing once, and no training at all."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from addax_ds import UserError
from addax_ds.cli import train
from addax_ds.cli.data import load_data
from addax_ds.config.arguments import DataArguments
from addax_ds.evaluation.generation import GenerationSet
from addax_ds.evaluation.scored_set import EvaluationSet
from addax_ds.tasks import TASKS, Sizes, find_task
from tests.support.launcher import launch
from tests.support.tiny import byte_tokenizer, write_byte_model

FIXTURES = Path(__file__).parents[1] / "fixtures"

pytestmark = pytest.mark.usefixtures("program_alone")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("model"))


def flags(model: Path, output: Path, task: str, **values: Any) -> list[str]:
    given = {
        "model_name_or_path": model,
        "output_dir": output,
        "task": task,
        "task_data": FIXTURES / task,
        "per_device_eval_batch_size": 3,
        "report_to": "none",
        **({} if values.get("num_train") == 0 else {"learning_rate": 0.01}),
        **values,
    }
    return [f"--{name}={value}" for name, value in given.items()]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(folder: Path, key: str) -> list[float]:
    history = read(folder / "trainer_state.json")["log_history"]
    return [entry[key] for entry in history if key in entry]


# ---- encoded -------------------------------------------------------------------------------------


def model_with(positions: int | None) -> Any:
    return SimpleNamespace(positions=positions, vocabulary_size=None)


def load(task: str, bos: bool = True, **values: Any) -> Any:
    args = DataArguments(task=task, task_data=str(FIXTURES / task), **values)
    return load_data(args, byte_tokenizer(bos), model_with(values.get("positions", 512)))


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"sst2-demo"}))
def test_sequences_are_prompt_and_answer_with_loss_on_the_answer(name):
    """So the lengths by which sequences are assigned are those of what is trained on."""
    tokenizer = byte_tokenizer(bos=True)
    data = load(name, num_train=8, num_dev=4)
    rows = find_task(name, str(FIXTURES / name)).rows(Sizes(8, 4, 1000))
    assert len(data.train) == len(rows.train) == 8
    for example, row in zip(data.train, rows.train, strict=True):
        assert example.input_ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(example.input_ids[1:]) == row.prompt + row.answer
        assert tokenizer.decode(example.input_ids[example.labels != -100]) == row.answer
        assert example.length == 1 + len((row.prompt + row.answer).encode())
        assert example.origin == row.origin
    assert data.metric == ("f1" if name in ("squad", "drop") else "accuracy")
    assert not data.test_before
    if name in ("squad", "drop"):
        assert isinstance(data.test, GenerationSet)
        for question, row in zip(data.test.questions, rows.test, strict=True):
            assert tokenizer.decode(question.prompt.input_ids[1:]) == row.prompt
            assert question.answers == row.answers
    else:
        assert isinstance(data.test, EvaluationSet)
        texts = [
            tokenizer.decode(example.input_ids[example.labels != -100])
            for example in data.test.examples
        ]
        assert texts == [candidate for row in rows.test for candidate in row.candidates]
        for choice, row in zip(data.test.choices, rows.test, strict=True):
            assert texts[choice.first : choice.first + choice.count] == list(row.candidates)
            assert (choice.label, choice.also_right) == (row.label, row.also_right)


@pytest.mark.parametrize("bos", [True, False])
def test_long_prompts_lose_their_beginning_never_bos_nor_the_answer(bos):
    tokenizer = byte_tokenizer(bos)
    whole = load("record", bos, num_train=8, num_dev=4)
    cut = load("record", bos, num_train=8, num_dev=4, max_length=80)
    for short, long in zip(
        cut.train + list(cut.test.examples), whole.train + list(whole.test.examples), strict=True
    ):
        assert short.length == 80 < long.length
        kept = short.input_ids[bos:]
        assert (long.input_ids[-len(kept) :] == kept).all()
        if bos:
            assert short.input_ids[0] == tokenizer.bos_token_id
        answers = [example.input_ids[example.labels != -100].tolist() for example in (short, long)]
        assert answers[0] == answers[1]
    with pytest.raises(UserError, match=r"record.*needs 5\d tokens, more than --max_length 20"):
        load("record", bos, num_train=8, num_dev=4, max_length=20)


def opt_tokenizer() -> PreTrainedTokenizerFast:
    """As OPT's: byte-level BPE with </s>, token 2, in front of a text and as its end."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("h", "e")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 2)])
    special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


@pytest.mark.parametrize("name", ["boolq", "squad"])
def test_long_prompts_keep_the_bos_that_opt_has(name):
    values = {"num_train": 8, "num_dev": 4, "max_length": 100}
    args = DataArguments(task=name, task_data=str(FIXTURES / name), **values)
    tokenizer = opt_tokenizer()
    data = load_data(args, tokenizer, model_with(512))
    rows = find_task(name, str(FIXTURES / name)).rows(Sizes(8, 4, 1000))
    examples, texts = list(data.train), [row.prompt + row.answer for row in rows.train]
    if isinstance(data.test, GenerationSet):
        examples += [question.prompt for question in data.test.questions]
        texts += [row.prompt for row in rows.test]
    cut = 0
    for example, text in zip(examples, texts, strict=True):
        kept = tokenizer.decode(example.input_ids[1:])
        assert example.input_ids[0] == 2
        assert 2 not in example.input_ids[1:]
        assert text.endswith(kept)
        cut += kept != text
    assert cut > 0


def test_answers_that_are_written_have_room():
    """Of 2048 positions, or what the model has, 50 are the answer's; as MeZO cuts both."""
    data = load("squad", num_train=8, num_dev=4, max_length=150)
    prompts = [question.prompt.length for question in data.test.questions]
    assert max(prompts) == 100
    assert max(example.length for example in data.train) == 100
    with pytest.raises(UserError, match="writes answers of 50 tokens, for which 51 positions"):
        load("squad", num_train=8, num_dev=4, max_length=51)


@pytest.mark.parametrize("name", ["squad", "boolq"])
def test_a_longest_sequence_beyond_the_model_is_refused_by_the_users_number(name):
    """Less the answer's 50 tokens it would pass, and the model fail at its first evaluation."""
    values = {"num_train": 8, "num_dev": 4, "max_length": 250}
    args = DataArguments(task=name, task_data=str(FIXTURES / name), **values)
    with pytest.raises(UserError, match="--max_length 250 is more than the model's 200 positions"):
        load_data(args, byte_tokenizer(bos=True), model_with(200))


def test_a_row_that_leaves_no_room_for_its_answer_is_said_with_the_users_number():
    values = {"num_train": 8, "num_dev": 4, "max_length": 54}
    args = DataArguments(task="squad", task_data=str(FIXTURES / "squad"), **values)
    with pytest.raises(UserError, match=r"\(54 positions less 50 for the answer\)$"):
        load_data(args, byte_tokenizer(bos=True), model_with(200))


@pytest.mark.parametrize(("positions", "limit"), [(4096, 2048), (None, 2048), (512, 512)])
def test_a_task_has_2048_positions_if_the_model_has(positions, limit, tmp_path):
    rows = [{"sentence": "x" * 3000, "label": 1, "idx": 0}, {"sentence": "y", "label": 0, "idx": 1}]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    args = DataArguments(task="sst2", task_data=str(file), num_train=8, num_dev=0, num_test=0)
    data = load_data(args, byte_tokenizer(), model_with(positions))
    assert max(example.length for example in data.train) == limit


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_chooses_by_dev_and_reads_test_once(model, tmp_path):
    output = tmp_path / "output"
    values = {
        **{"num_train": 8, "num_dev": 4, "max_steps": 6, "learning_rate": 0.2, "logging_steps": 1},
        **{"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "seed": 5},
        **{"load_best_model_at_end": True, "method": "ip-sgd"},
    }
    train.main(flags(model, output, "cb", **values))
    state = read(output / "trainer_state.json")
    dev = log_of(output, "eval_accuracy")
    assert len(dev) == 6
    assert len(set(dev)) > 1, "there is something to choose"
    assert state["best_metric"] == max(dev)
    best = output / f"checkpoint-{1 + dev.index(max(dev))}"
    assert Path(state["best_model_checkpoint"]).name == best.name
    chosen, kept, last = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (best, output / "model", output / "checkpoint-6")
    )
    assert all(torch.equal(parameter, kept[name]) for name, parameter in chosen.items())
    assert best.name != "checkpoint-6"
    assert not all(torch.equal(parameter, last[name]) for name, parameter in chosen.items())

    of_dev = read(output / "dev_results.json")
    assert (of_dev["dev_accuracy"], of_dev["dev_step"]) == (max(dev), 1 + dev.index(max(dev)))

    assert len(log_of(output, "test_accuracy")) == 1
    assert log_of(output, "test_before_accuracy") == []
    results = read(output / "test_results.json")
    predictions = lines(output / "predictions_test.jsonl")
    assert [row["origin"] for row in predictions] == [
        row.origin for row in find_task("cb", str(FIXTURES / "cb")).rows(Sizes(8, 4, 4)).test
    ]
    assert results["test_accuracy"] == sum(row["right"] for row in predictions) / 4
    for row in predictions:
        assert row["candidates"] == ["Yes", "No", "Maybe"]
        assert row["predicted"] == row["scores"].index(max(row["scores"]))
        assert row["right"] == (row["predicted"] == row["label"])
    assert results["test_accuracy"] == read(output / "all_results.json")["test_accuracy"]


def test_a_task_whose_answers_are_written(model, tmp_path, capsys):
    output = tmp_path / "output"
    values = {
        **{"num_train": 8, "num_dev": 2, "num_test": 3, "max_steps": 2, "learning_rate": 0.01},
        **{"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1},
        **{"load_best_model_at_end": True, "per_device_train_batch_size": 2},
    }
    train.main(flags(model, output, "drop", **values))
    assert len(log_of(output, "eval_f1")) == 2
    results = read(output / "test_results.json")
    for name in ("loss", "f1", "exact_match", "drop_f1", "drop_exact_match"):
        assert f"test_{name}" in results
    predictions = lines(output / "predictions_test.jsonl")
    assert len(predictions) == 3
    assert all({"answer", "right_answers", "metrics"} <= row.keys() for row in predictions)
    assert read(output / "trainer_state.json")["best_metric"] == max(log_of(output, "eval_f1"))
    assert "Test f1: " in capsys.readouterr().err


@pytest.mark.parametrize("task", ["cb", "squad"])
def test_without_training_rows_the_model_is_tested_as_it_is(task, model, tmp_path, capsys):
    output = tmp_path / "output"
    output.mkdir()
    earlier = {"train_runtime": 1.0, "train_steps": 3, "test_of_the_earlier": 1.0}
    (output / "all_results.json").write_text(json.dumps(earlier))
    (output / "training.png").write_bytes(b"curves")
    train.main(flags(model, output, task, num_train=0))
    assert not earlier.keys() & read(output / "all_results.json").keys()
    assert (output / "training.png").read_bytes() == b"curves"
    (output / "training.png").unlink()
    said = capsys.readouterr().err
    assert "Trained" not in said
    assert "0 training examples" in said
    assert "nothing is trained, and arguments of training have no effect" in said
    assert "4 test rows, not 1000: 4 rows in the validation split" in said
    assert {path.name for path in output.iterdir()} == {
        *("all_results.json", "test_results.json", "predictions_test.jsonl", "trainer_state.json")
    }
    metric = "test_accuracy" if task == "cb" else "test_f1"
    assert metric in read(output / "all_results.json")


@pytest.mark.slow
def test_two_ranks_that_share_the_model_predict_the_same_to_the_bit(model, tmp_path):
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    train.main(flags(model, alone, "squad", num_train=0))
    more = {"num_train": 0, "deepspeed": "ds_configs/zero3.json"}
    given = flags(model, sharded, "squad", **more)
    outcome = launch("launch/train.py", *given, launcher="fork")
    assert outcome.status == 0, outcome.output
    assert outcome.left_behind == 0
    name = "predictions_test.jsonl"
    assert (alone / name).read_text() == (sharded / name).read_text()
    results = [read(folder / "test_results.json") for folder in (alone, sharded)]
    for key in ("test_loss", "test_f1", "test_exact_match"):
        assert results[0][key] == results[1][key]


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "sst3"}, "--task sst3: no such task. Did you mean 'sst2'?"),
        ({"task": "nowhere.py:MINE"}, "there is no file nowhere.py"),
        ({"task_data": "/no/folder"}, "--task_data /no/folder: there is no such file or folder"),
        ({"train_file": __file__}, "--task has no effect with --train_file"),
        ({"num_dev": -1}, "--num_dev -1: it must not be below 0"),
        ({"validation_file": __file__}, "--validation_file needs --train_file"),
        ({"num_train": 0, "eval_strategy": "epoch"}, "needs dev rows, and there are none"),
        ({"num_train": 0, "skip_test": True}, "leaves only the test rows"),
        ({"num_train": 0, "push_to_hub": True}, "--push_to_hub needs training rows"),
        ({"num_train": 0, "find_learning_rate": True}, "--find_learning_rate needs training"),
        ({"num_train": 5, "num_dev": 12}, "none is left for train"),
    ],
)
def test_mistakes(values, message, model, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(flags(model, tmp_path / "output", **{"task": "rte", **values}))
    assert exit_.value.code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_numbers_of_rows_need_a_task(model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([f"--model_name_or_path={model}", "--num_test=3"])
    assert "--num_test needs --task" in capsys.readouterr().err
