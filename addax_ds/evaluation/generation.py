"""Evaluation of tasks whose answer the model writes: greedy decoding, one line.

The answer ends at the first token with a line break in it, or at EOS. Transformers' ``generate``
does the decoding, with its key-value cache; with several ranks, which may share one sharded model,
all of them run as many forward passes as the one with the longest answer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from addax_ds.data.examples import Example
from addax_ds.data.train_rows import dummy_example
from addax_ds.distributed.collectives import get_world_size
from addax_ds.evaluation.likelihood import target_scores, target_tensors
from addax_ds.evaluation.scored_set import (
    EvaluationCollator,
    ScoredSet,
    Scores,
    mean_loss,
)


class Decoder:
    """Generated answers: their end, their longest length, and their text.

    Attributes:
        max_new_tokens: longest answer in tokens.
        stop: ids of the tokens that end an answer: EOS, and those with a line break in their text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self._tokenizer = tokenizer
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.stop = [token for token, text in enumerate(texts) if "\n" in text]
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in self.stop:
            self.stop.append(tokenizer.eos_token_id)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the first line of what was written, without spaces around it."""
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text.partition("\n")[0].strip()


@dataclass(frozen=True)
class Question:
    """A prompt with its right answers.

    Attributes:
        prompt: tokens before the answer.
        example: prompt and first right answer, with loss on the answer.
        answers: texts of the right answers.
    """

    prompt: Example
    example: Example
    answers: tuple[str, ...]


class GenerationSet(ScoredSet):
    """Questions that a model answers in writing.

    The scores of an example are those of `target_scores` for the first right answer, followed by
    the tokens that were written, padded with -1.

    Args:
        questions: at least one.
        decoder: ends and reads answers.
        judge: metrics of one answer, from its text and the right ones.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        decoder: Decoder,
        judge: Callable[[str, Sequence[str]], Mapping[str, float]],
    ) -> None:
        super().__init__([question.example for question in questions])
        self.questions = questions
        self.width = 2 + decoder.max_new_tokens
        self._decoder = decoder
        self._judge = judge

    def __getitem__(self, index: int) -> tuple[int, Example, Example]:
        """Return the index of a question, its example and its prompt."""
        return index, self.questions[index].example, self.questions[index].prompt

    def _right_answers(self) -> Any:
        return [question.answers for question in self.questions]

    def collator(self, pad_token_id: int) -> "GenerationCollator":
        """Return what makes a batch of items."""
        return GenerationCollator(pad_token_id)

    def score(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Measure the likelihood of the right answers, and write others."""
        prompt_ids, prompt_mask = batch["prompt_ids"], batch["prompt_mask"]
        answers = {k: v for k, v in batch.items() if k not in ("prompt_ids", "prompt_mask")}
        scores = target_scores(model, answers)
        written = self._write(model, prompt_ids, prompt_mask)
        return torch.cat((scores, written.double()), dim=1)

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Return ``loss``, as for other sets, and the means of what the judge says."""
        rows = [row["metrics"] for row in self.predictions(scores)]
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        return {"loss": mean_loss(scores), **means}

    def predictions(self, scores: Scores) -> Iterator[dict[str, Any]]:
        """Yield each question's answer with its metrics."""
        for question, row in zip(self.questions, scores, strict=True):
            answer = self._decoder.text([int(token) for token in row[2:] if token >= 0])
            yield {
                "origin": question.example.origin,
                "answer": answer,
                "right_answers": list(question.answers),
                "metrics": dict(self._judge(answer, question.answers)),
            }

    def _write(self, model: Any, prompts: Tensor, mask: Tensor) -> Tensor:
        """Return the tokens written after left-padded prompts, int64 ``(rows, max_new_tokens)``."""
        longest = self._decoder.max_new_tokens
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=longest,
            use_cache=True,
            eos_token_id=self._decoder.stop,
            pad_token_id=self._decoder.stop[0],
        )
        with _own_generation_config(model):
            sequences = model.generate(
                input_ids=prompts,
                attention_mask=mask,
                generation_config=config,
                synced_gpus=get_world_size() > 1,
            )
        tokens = sequences[:, prompts.shape[1] :]
        written = torch.full((len(prompts), longest), -1, dtype=torch.int64, device=tokens.device)
        ended = torch.isin(tokens, torch.tensor(self._decoder.stop, device=tokens.device))
        before_end = (ended.cumsum(dim=1) - ended.long()) == 0  # the token that ends it included
        written[:, : tokens.shape[1]] = torch.where(before_end, tokens, -1)
        return written


class GenerationCollator(EvaluationCollator):
    """Pads items of a `GenerationSet`; prompts on the left, so that all answers begin together."""

    def _collate(
        self, examples: Sequence[Example], prompts: Sequence[Example] = ()
    ) -> dict[str, Any]:
        shape = len(prompts), max(prompt.length for prompt in prompts)
        ids = np.full(shape, self._pad_token_id, np.int64)
        mask = np.zeros(shape, np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, shape[1] - prompt.length :] = prompt.input_ids
            mask[row, shape[1] - prompt.length :] = 1
        batch = super()._collate(examples)
        return {
            **batch,
            **target_tensors(batch["labels"]),
            "prompt_ids": torch.from_numpy(ids),
            "prompt_mask": torch.from_numpy(mask),
        }

    def _filler(self) -> tuple[Any, ...]:
        return (*super()._filler(), dummy_example(self._pad_token_id))


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Keep what the model's checkpoint recommends (sampling, penalties) out of greedy decoding.

    ``generate`` fills what a given configuration leaves open from the model's.
    """
    # Inside the wrappers of DeepSpeed and PEFT, of which the latter copies it inwards.
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    recommended = [module.generation_config for module in owners]
    try:
        for module in owners:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, config in zip(owners, recommended, strict=True):
            module.generation_config = config
