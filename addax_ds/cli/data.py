"""Loading of the data, from a task, files or a data set, and their encoding."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from addax_ds.config.arguments import DEMO_TASK, DataArguments
from addax_ds.data.arrow import ArrowExamples
from addax_ds.data.cache import Encoder, encoded
from addax_ds.data.encoding import TooLongError, encode, encode_prompts, padding_token
from addax_ds.data.examples import Example
from addax_ds.evaluation.generation import Decoder, GenerationSet, Question
from addax_ds.evaluation.scored_set import Choice, EvaluationSet, ScoredSet
from addax_ds.models.source import ModelSource
from addax_ds.reading.records import Record, prompt_completion
from addax_ds.reading.shapes import parse_columns
from addax_ds.reading.sources import Rows, open_rows
from addax_ds.tasks import GenerationTask, Task, find_task
from addax_ds.tasks.base import Row
from addax_ds.utils.errors import UserError

logger = logging.getLogger(__name__)

TASK_LENGTH = 2048
"""Longest sequence of a task in tokens, as in the experiments on MeZO and Addax."""


@dataclass(frozen=True)
class Data:
    """Training, dev and test data of a run.

    Attributes:
        description: what the data are, for reports.
        train: encoded sequences; empty if the model is only to be tested.
        validation: for evaluation during training, if any.
        test: for the end, if any.
        metric: what a figure of the course of training shows beside the loss.
        test_before: whether the test set is also read before training.
    """

    description: str
    train: Sequence[Example]
    validation: ScoredSet | None
    test: ScoredSet | None
    metric: str = "accuracy"
    test_before: bool = True


def load_data(
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelSource,
    now: datetime | None = None,
    *,
    progress: bool = False,
) -> Data:
    """Read and encode what the arguments name.

    Tokens of files are kept in the cache (`addax_ds.data.cache`), those of tasks in memory.

    Args:
        args: the arguments.
        tokenizer: of the model.
        model: says what positions and token ids there are.
        now: date and time that chat templates read, local and without a zone; None for the clock.
        progress: whether to show a bar.

    Raises:
        UserError: the data cannot be read, or a row cannot be used.
    """
    padding_token(tokenizer, model.vocabulary_size)  # the trainer does it when there is a model
    if args.train_file is None and args.dataset_name is None:
        return _load_task(args, tokenizer, model)

    encoder = Encoder(
        tokenizer,
        now or datetime.now(),
        append_eos=args.append_eos,
        max_length=args.max_length,
        model_positions=model.positions,
        vocabulary_size=model.vocabulary_size,
    )

    def read(rows: Rows) -> ArrowExamples:
        return encoded(rows, encoder, processes=args.dataset_num_proc, progress=progress)

    sources = _sources(args)
    train = read(sources["train"])
    validation, test = (
        EvaluationSet(read(sources[part])) if part in sources else None
        for part in ("validation", "test")
    )
    return Data(sources["train"].name, train, validation, test)


def _sources(args: DataArguments) -> dict[str, Rows]:
    """Return the rows that the arguments name, those of the test unless they are to be left."""
    columns = parse_columns(args.columns or ())
    found = {}
    for part in ("train", "validation") if args.skip_test else ("train", "validation", "test"):
        files, split = getattr(args, f"{part}_file"), getattr(args, f"{part}_split")
        if files is not None:
            found[part] = open_rows(files, columns=columns)
        elif args.dataset_name is not None and split is not None:
            where = {"dataset": args.dataset_name, "config": args.dataset_config, "split": split}
            found[part] = open_rows(**where, columns=columns)
    return found


def _load_task(args: DataArguments, tokenizer: PreTrainedTokenizerBase, model: ModelSource) -> Data:
    task = find_task(args.task or DEMO_TASK, args.task_data)
    asked = {"train": args.num_train, "dev": args.num_dev, "test": args.num_test}
    sizes = replace(task.sizes, **{name: n for name, n in asked.items() if n is not None})
    rows = task.rows(sizes, args.task_seed)
    for note in rows.notes:
        logger.info("%s: %s", task.title, note)
    encoder = _Encoder(task, tokenizer, args.max_length, model)
    return Data(
        rows.description,
        encoder.examples(rows.train),
        encoder.scored(rows.dev) if rows.dev else None,
        encoder.scored(rows.test) if rows.test and not args.skip_test else None,
        task.metric,
        test_before=args.task is None,
    )


class _Encoder:
    """Encodes a task's rows, all with the same longest sequence."""

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        model: ModelSource,
    ) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._model = model
        # Of no rows: checks the user's own number, before room for an answer is taken from it.
        encode((), tokenizer, max_length=max_length, model_positions=model.positions)
        self._longest = max_length or min(TASK_LENGTH, model.positions or TASK_LENGTH)
        self._room = ""
        if isinstance(task, GenerationTask):
            # Room for the answer, in training sequences too, as MeZO has it.
            positions, answer = self._longest, task.max_new_tokens
            self._longest -= answer
            if self._longest < 2:
                raise UserError(
                    f"task {task.name} writes answers of {answer} tokens, for which {positions} "
                    "positions leave no room; raise --max_length or take a model with more"
                )
            self._room = f" ({positions} positions less {answer} for the answer)"

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Return prompts with the answer that is learnt."""
        return self._encode(rows, [row.answer for row in rows])

    def scored(self, rows: Sequence[Any]) -> ScoredSet:
        """Return what a model is scored on."""
        if isinstance(self._task, GenerationTask):
            return self._questions(self._task, rows)
        choices: list[Choice] = []
        first = 0
        for row in rows:
            size = len(row.candidates)
            choices.append(Choice(first, size, row.label, row.also_right, row.candidates))
            first += size
        pairs = [(row, candidate) for row in rows for candidate in row.candidates]
        return EvaluationSet(self._encode(*zip(*pairs, strict=True)), choices)

    def _questions(self, task: GenerationTask, rows: Sequence[Any]) -> GenerationSet:
        decoder = Decoder(self._tokenizer, task.max_new_tokens)
        task.check_score(rows)
        with self._naming_the_room():
            prompts = encode_prompts(
                [Record(row.prompt, (), row.origin, append_eos=False) for row in rows],
                self._tokenizer,
                max_length=self._longest,
                vocabulary_size=self._model.vocabulary_size,
            )
        questions = [
            Question(prompt, example, row.answers)
            for prompt, example, row in zip(prompts, self.examples(rows), rows, strict=True)
        ]
        return GenerationSet(questions, decoder, task.score)

    def _encode(self, rows: Sequence[Row], answers: Sequence[str]) -> list[Example]:
        records = [
            prompt_completion(row.prompt, answer, row.origin, append_eos=False)
            for row, answer in zip(rows, answers, strict=True)
        ]
        with self._naming_the_room():
            examples, cuts = encode(
                records,
                self._tokenizer,
                max_length=self._longest,
                model_positions=self._model.positions,
                vocabulary_size=self._model.vocabulary_size,
            )
        cuts.log(self._task.title, self._longest)
        return examples

    @contextmanager
    def _naming_the_room(self) -> Iterator[None]:
        """Say, of a row that is too long, how the limit comes about."""
        try:
            yield
        except TooLongError as error:
            raise UserError(f"{error}{self._room}") from error
