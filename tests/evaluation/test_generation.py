"""Written answers: greedy decoding against a loop without cache and padding; ranks agree."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from addax_ds.config.addax_config import AddaxConfig
from addax_ds.data.encoding import encode_prompts
from addax_ds.evaluation.generation import Decoder, GenerationSet
from addax_ds.evaluation.scored_set import Scores
from addax_ds.reading.records import Record
from addax_ds.training.trainer import AddaxTrainer
from addax_ds.utils.errors import UserError
from tests.support.rank_group import Lazy, RankGroup
from tests.support.tiny import byte_tokenizer, question_set, tiny_model, tiny_tokenizer, write_model
from tests.workers.evaluation_cases import CASES, run_case
from tests.workers.trainer_cases import with_adapters

FAMILIES = ("opt", "llama", "qwen3", "mistral", "gemma3")


def scores_of(model: nn.Module, dataset: GenerationSet, folder: Path, batch: int) -> Scores:
    args = AddaxConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        learning_rate=0,
        per_device_eval_batch_size=batch,
    )
    trainer = AddaxTrainer(model, args, processing_class=tiny_tokenizer())
    trainer.evaluate(dataset)
    assert trainer.scores is not None
    return trainer.scores


@torch.no_grad()
def greedy(model: nn.Module, prompt: Any, stop: list[int], longest: int) -> list[int]:
    """One sequence, whole at every step."""
    ids, written = prompt.tolist(), []
    while len(written) < longest and (not written or written[-1] not in stop):
        logits = model(input_ids=torch.tensor([ids + written]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_greedy_decoding_equals_a_plain_loop(family, batch, tmp_path):
    model, dataset = tiny_model(family).eval(), question_set()
    wanted = [
        greedy(model, question.prompt.input_ids, dataset._decoder.stop, 6)
        for question in dataset.questions
    ]
    assert len({len(tokens) for tokens in wanted}) > 1, "answers of several lengths"
    assert 6 in map(len, wanted)
    scores = scores_of(model, dataset, tmp_path, batch)
    assert [[int(t) for t in row[2:] if t >= 0] for row in scores] == wanted


def test_what_a_checkpoint_recommends_for_chatting_plays_no_part(tmp_path):
    model, dataset = tiny_model("llama").eval(), question_set()
    plain = scores_of(model, dataset, tmp_path, 4)
    recommended = model.generation_config
    recommended.do_sample, recommended.temperature, recommended.repetition_penalty = True, 3.0, 9.0
    recommended.suppress_tokens, recommended.max_length = list(range(50, 200)), 5
    assert np.array_equal(scores_of(model, dataset, tmp_path, 4), plain)
    assert model.generation_config is recommended


def test_a_model_with_adapters(tmp_path):
    model, dataset = with_adapters(tiny_model("llama")).eval(), question_set()
    model.generation_config.repetition_penalty = 9.0
    adapted = scores_of(model, dataset, tmp_path, 4)
    merged = model.merge_and_unload()
    assert merged.generation_config.repetition_penalty == 9.0
    wanted = scores_of(merged, dataset, tmp_path, 4)
    assert np.array_equal(adapted[:, 2:], wanted[:, 2:])
    assert not np.array_equal(
        wanted[:, 2:], scores_of(tiny_model("llama").eval(), dataset, tmp_path, 4)[:, 2:]
    )


def test_loss_and_metrics(tmp_path):
    """The loss is that of the first right answer; the others are means of the judge's verdicts."""
    model, dataset = tiny_model("llama").eval(), question_set()
    scores = scores_of(model, dataset, tmp_path, 4)
    total = count = 0.0
    for example in dataset.examples:
        ids = torch.tensor([example.input_ids.tolist()])
        labels = torch.tensor([example.labels.tolist()])
        targets = example.target_count
        total += model(input_ids=ids, labels=labels).loss.item() * targets
        count += targets
    answers = [
        Decoder(tiny_tokenizer(), 6).text([int(t) for t in row[2:] if t >= 0]) for row in scores
    ]
    # Two right answers are put in, so that the metrics are not 0.
    questions = [
        question if i not in (1, 4) else type(question)(question.prompt, question.example, (a,))
        for i, (question, a) in enumerate(zip(dataset.questions, answers, strict=True))
    ]
    judged = GenerationSet(questions, dataset._decoder, dataset._judge)
    metrics = judged.metrics(scores)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["exact_match"] == pytest.approx(2 / 7)
    assert metrics["f1"] >= metrics["exact_match"]
    report = list(judged.predictions(scores))
    assert [row["answer"] for row in report] == answers
    assert report[4]["right_answers"] == [answers[4]]
    assert report[4]["metrics"] == {"exact_match": 1.0, "f1": 1.0}


# ---- answers and prompts as tokens ---------------------------------------------------------------


def test_an_answer_ends_with_its_line():
    tokenizer = byte_tokenizer()
    decoder = Decoder(tokenizer, 5)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert sorted(decoder.stop) == sorted([*newline, tokenizer.eos_token_id])

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert decoder.text(ids(" 23 years\n")) == "23 years"
    assert decoder.text([*ids(" 23"), tokenizer.eos_token_id]) == "23"
    assert decoder.text(ids(" 23\n\nQuestion")) == "23"
    assert decoder.text(ids("\n 23")) == ""
    assert decoder.text([]) == ""


def prompt(text: str) -> Record:
    return Record(text, (), "row", append_eos=False)


@pytest.mark.parametrize("bos", [True, False])
def test_prompts_are_cut_on_the_left_and_keep_bos(bos):
    tokenizer = byte_tokenizer(bos)
    short, long = encode_prompts([prompt("abc"), prompt("abcdefghij")], tokenizer, max_length=6)
    front = [tokenizer.bos_token_id] if bos else []
    assert tokenizer.decode(short.input_ids[len(front) :]) == "abc"
    assert short.input_ids[: len(front)].tolist() == front
    assert long.input_ids[: len(front)].tolist() == front
    assert tokenizer.decode(long.input_ids[len(front) :]) == ("fghij" if bos else "efghij")
    assert long.length == 6
    assert (long.labels == -100).all()


def test_special_tokens_behind_a_prompt_are_left_out():
    """Some tokenizers add EOS, after which nothing is to be written."""
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    (example,) = encode_prompts([prompt("abc")], tokenizer, max_length=6)
    assert tokenizer.decode(example.input_ids) == "abc"


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(UserError, match="row: the tokenizer makes nothing of the prompt"):
        encode_prompts([prompt("")], byte_tokenizer(), max_length=6)


# ---- ranks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def topologies(tmp_path_factory) -> Iterator[Any]:
    """What a case found, by back end and number of ranks, and by rank."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_model(folder / "model", "llama")
    with ExitStack() as stack:

        def of_topology(topology: str) -> list[Lazy[str, dict[str, Any]]]:
            sharding, world_size = topology.split("-")[0], int(topology.split("-")[1])
            group = RankGroup("evaluation_cases", world_size, tmp_path_factory.mktemp(topology))
            stack.callback(group.close)

            def of_case(name: str) -> list[dict[str, Any]]:
                given = name, folder, sharding, world_size
                return [run_case(*given)] if world_size == 1 else group.call("run_case", *given)

            by_case = Lazy(CASES, of_case)
            return [Lazy(CASES, lambda n, r=rank: by_case[n][r]) for rank in range(world_size)]

        yield Lazy(("none-1", "none-2", "fsdp2-2", "zero3-2"), of_topology)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["choices, untrained", "questions, untrained"])
def test_all_topologies_find_the_same_to_the_bit(topologies, case):
    wanted = topologies["none-1"][0][case]
    assert len(wanted["scores"]) == 1
    for ranks in topologies.values():
        for found in ranks:
            assert torch.equal(found[case]["scores"][0], wanted["scores"][0])
            kept = {k: v for k, v in found[case]["metrics"].items() if "runtime" not in k}
            for name in ("eval_loss", "eval_accuracy", "eval_f1", "eval_exact_match"):
                assert kept.get(name) == wanted["metrics"].get(name)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["choices, in training", "questions, in training"])
def test_evaluation_in_the_course_of_training(topologies, case):
    """Ranks agree to the bit, back ends up to the rounding of two steps; the mode is put back."""
    wanted = topologies["none-1"][0][case]["scores"]
    assert len(wanted) == 2
    assert not torch.equal(wanted[0][:, :2], wanted[1][:, :2])
    for ranks in topologies.values():
        for found in ranks:
            for own, first in zip(found[case]["scores"], ranks[0][case]["scores"], strict=True):
                assert torch.equal(own, first)
            for own, other in zip(found[case]["scores"], wanted, strict=True):
                assert torch.allclose(own[:, :2], other[:, :2], rtol=1e-3)
