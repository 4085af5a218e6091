"""Log-likelihoods against those of one sequence at a time, with the logits of all positions."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    RecurrentGemmaConfig,
)

from addax_ds.data.examples import Example
from addax_ds.data.train_rows import pad
from addax_ds.evaluation.likelihood import (
    model_inputs,
    scores_of_logits,
    target_scores,
    target_tensors,
    targets_of,
)
from addax_ds.evaluation.scored_set import EvaluationSet
from addax_ds.utils.errors import UserError
from tests.support.tiny import tiny_model

NO_LOSS = -100


def examples(lengths: list[int]) -> list[Example]:
    """Random sequences of which the second half counts."""
    generator = np.random.default_rng(0)
    made = []
    for length in lengths:
        ids = generator.integers(5, 60, length, dtype=np.int32)
        labels = np.where(np.arange(length) < length // 2, NO_LOSS, ids).astype(np.int32)
        made.append(Example(ids, labels, "made"))
    return made


def reference(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[float, int]:
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    targets = [(t, int(label)) for t, label in enumerate(labels[1:]) if label >= 0]
    return sum(float(logits[t].log_softmax(0)[label]) for t, label in targets), len(targets)


class AllPositions(nn.Module):
    """A model that cannot leave positions out, as a few in Transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        output = self._model(input_ids=input_ids, attention_mask=attention_mask)
        return SimpleNamespace(logits=output.logits)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("whole", [False, True])
def test_target_scores(family, whole):
    model = tiny_model(family).eval()
    rows = examples([7, 12, 3])
    batch = pad(rows, 0)
    seen = AllPositions(model) if whole else model
    with torch.no_grad():
        scores = target_scores(seen, {**batch, **target_tensors(batch["labels"])})
    for score, row in zip(scores, rows, strict=True):
        ids, labels = (torch.from_numpy(x).long() for x in (row.input_ids, row.labels))
        expected, count = reference(model, ids, labels)
        assert score[0].item() == pytest.approx(expected, rel=1e-5)
        assert score[1].item() == count


HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
GROUPED = {**HEADS, "intermediate_size": 64, "num_key_value_heads": 2}
FAMILIES: dict[str, PreTrainedConfig] = {
    "bloom, alibi": BloomConfig(**HEADS),
    "falcon": FalconConfig(**HEADS),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97),
    "gpt_oss, sinks": GptOssConfig(**GROUPED, num_local_experts=4, sliding_window=4, head_dim=8),
    "jamba": JambaConfig(
        **GROUPED, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, num_experts=2
    ),
    "mamba2": Mamba2Config(
        hidden_size=32, num_hidden_layers=2, vocab_size=97, num_heads=4, head_dim=16, n_groups=1
    ),
    "mistral, sliding window": MistralConfig(**GROUPED, sliding_window=4),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "recurrent_gemma": RecurrentGemmaConfig(
        **{**GROUPED, "num_hidden_layers": 3}, head_dim=8, lru_width=32, attention_window_size=4
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_same_scores_beside_longer_ones(family):
    """Nothing masks the padding behind it."""
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large enough for attention to tell tokens apart
            nn.init.normal_(parameter, std=0.4)
    model.config.use_cache = False
    rows = examples([12, 7, 3])
    batch = pad(rows, 0)
    assert "attention_mask" not in batch
    with torch.no_grad():
        scores = target_scores(model, {**batch, **target_tensors(batch["labels"])})
    for score, row in zip(scores, rows, strict=True):
        ids, labels = (torch.from_numpy(x).long() for x in (row.input_ids, row.labels))
        assert score.tolist() == pytest.approx(reference(model, ids, labels), rel=5e-6)


def test_a_mask_of_the_batch_reaches_the_model():
    """As a user's collator makes it, with padding on the left."""
    model = tiny_model("opt").eval()
    (row,) = examples([6])
    ids, labels = (torch.from_numpy(x).long() for x in (row.input_ids, row.labels))
    left = torch.tensor([NO_LOSS] * 3)
    batch = {
        "input_ids": torch.cat((torch.tensor([7, 8, 9]), ids))[None],
        "attention_mask": torch.tensor([[0] * 3 + [1] * 6]),
        **target_tensors(torch.cat((left, labels))[None]),
    }
    with torch.no_grad():
        scores = target_scores(model, batch)
    assert scores[0].tolist() == pytest.approx(reference(model, ids, labels), rel=1e-5)


def test_a_model_gets_what_it_takes_of_a_batch():
    rows = torch.ones(1, 3, dtype=torch.int64)
    tokens = {"labels": rows, "index": rows[:, 0], **target_tensors(rows)}
    batch = {"input_ids": rows, "attention_mask": rows, "token_type_ids": rows, "note": ["a"]}
    assert model_inputs(Named(), batch | tokens).keys() == batch.keys() - {"note"}
    assert model_inputs(Anything(), batch | tokens).keys() == batch.keys()
    assert "position_ids" in model_inputs(Named(), {**batch, "position_ids": rows})  # or an error


class Named(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Any = None, token_type_ids: Any = None):
        raise NotImplementedError


class Anything(nn.Module):
    def forward(self, input_ids: Tensor, **kwargs: Any):
        raise NotImplementedError


def test_sequences_of_a_row_that_positions_tell_apart():
    """As a collator makes it that packs; the first token of each has nothing to predict it."""
    model = tiny_model("llama").eval()
    model.config.use_cache = False
    rows = examples([7, 12, 3])
    packed = torch.cat([torch.from_numpy(row.input_ids).long() for row in rows])[None]
    labels = torch.cat([torch.from_numpy(row.labels).long() for row in rows])[None]
    positions = torch.cat([torch.arange(row.length) for row in rows])[None]
    batch = {"input_ids": packed, "position_ids": positions, **target_tensors(labels)}
    with torch.no_grad():
        (found,) = target_scores(model, batch).tolist()
    alone = [
        reference(model, *(torch.from_numpy(x).long() for x in (row.input_ids, row.labels)))
        for row in rows
    ]
    assert found == pytest.approx([sum(parts) for parts in zip(*alone, strict=True)], rel=1e-5)


def test_logits_at_target_positions_alone():
    """The model is asked for no others: they would be most of the memory of a long prompt."""
    model = tiny_model("opt").eval()
    seen = []
    model.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape[1]))
    batch = pad(examples([30]), 0)
    batch["labels"][:, :-1] = -100
    target_scores(model, {**batch, **target_tensors(batch["labels"])})
    assert seen == [1]


class LastPositions(AllPositions):
    """As code of before logits_to_keep could be a tensor, which one of one element passes for."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int = 0
    ) -> SimpleNamespace:
        logits = super().forward(input_ids, attention_mask).logits
        return SimpleNamespace(logits=logits[:, -logits_to_keep:, :])


def test_a_model_that_takes_a_number_of_last_positions_gets_none():
    model = tiny_model("llama").eval()
    batch = pad(examples([9]), 0)
    batch["labels"][:, :4] = batch["labels"][:, 5:] = -100
    given = {**batch, **target_tensors(batch["labels"])}
    expected = reference(model, batch["input_ids"][0], batch["labels"][0])
    with torch.no_grad():
        found = target_scores(LastPositions(model), given)
    assert found[0].tolist() == pytest.approx(expected)


def test_a_batch_without_targets_goes_through():
    model = tiny_model("opt").eval()
    batch = pad(examples([5]), 0)
    scores = target_scores(model, {**batch, **target_tensors(torch.full((1, 5), NO_LOSS))})
    assert scores.tolist() == [[0.0, 0.0]]
    scores.sum().backward()


def test_the_softmax_is_wide():
    logits = torch.tensor([[[0.0, 0.0], [9.0, 0.0]], [[1.0, 0.0]] * 2])
    scores = scores_of_logits(logits.bfloat16(), torch.tensor([[1, NO_LOSS], [NO_LOSS, NO_LOSS]]))
    assert scores.dtype == torch.float64
    assert scores.tolist() == [[pytest.approx(math.log(0.5)), 1.0], [0.0, 0.0]]


def test_candidates_that_differ_in_the_last_token_share_a_row():
    prompts = examples([5, 9])
    candidates = [
        replace(
            prompt,
            input_ids=np.append(prompt.input_ids, np.int32(answer)),
            labels=np.append(np.full(prompt.length, NO_LOSS, np.int32), np.int32(answer)),
        )
        for prompt in prompts
        for answer in (7, 8, 9)
    ]
    dataset, model = EvaluationSet(candidates), tiny_model("opt").eval()
    batch = dataset.collator(0)([dataset[index] for index in range(6)])
    assert batch["input_ids"].shape == (2, 9)
    assert batch["targets"]["row"].tolist() == [0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        scores = dataset.score(model, batch)
    for score, row in zip(scores, candidates, strict=True):
        ids, labels = (torch.from_numpy(x).long() for x in (row.input_ids, row.labels))
        assert score.tolist() == pytest.approx(reference(model, ids, labels), rel=1e-5)


@pytest.mark.parametrize(("kind", "works"), [("prompt", False), ("prefix", True), ("lora", True)])
def test_adapters(kind, works):
    """Virtual tokens in front of the prompt would move the positions, and nothing would show it."""
    configs = {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=2),
    }
    model = peft.get_peft_model(tiny_model("llama"), configs[kind]).eval()
    batch = pad(examples([9, 6]), 0)
    batch |= target_tensors(batch["labels"])
    if not works:
        with pytest.raises(UserError, match="in front of the prompt"):
            target_scores(model, batch)
        return
    with torch.no_grad():
        scores = target_scores(model, batch)
        logits = model(input_ids=batch["input_ids"]).logits
        whole = scores_of_logits(logits, targets_of(batch["labels"]))
    assert torch.allclose(scores, whole, rtol=1e-5)
