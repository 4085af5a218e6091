"""Losses by the output projection, a chunk at a time, against logits of all tokens in float64."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, LlamaForCausalLM

from addax_ds.data.examples import Example
from addax_ds.data.train_rows import pad
from addax_ds.evaluation import output_head
from addax_ds.evaluation.likelihood import target_scores, target_tensors
from addax_ds.planner.shapes import shape_of
from addax_ds.planner.trace import Batch, trace
from benchmarks.live import peak
from tests.support.tiny import VOCABULARY, tiny_model

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 97}


def text_batch(*lengths: int) -> dict[str, Tensor]:
    """Return random rows in which every token is a target."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(5, 60, length, dtype=np.int32) for length in lengths]
    batch = pad([Example(row, row, "made") for row in ids], 0)
    return {**batch, **target_tensors(batch["labels"])}


def chunks_of(tokens: int, vocabulary: int = VOCABULARY) -> Any:
    return mock.patch.object(output_head, "CHUNK_ELEMENTS", tokens * vocabulary)


def scores_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    scores = target_scores(model, batch)
    scores[:, 0].sum().backward()
    return scores.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("tokens", [1, 7, 30, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_gradients_are_as_near_as_those_of_whole_logits(dtype, bias, tokens):
    torch.manual_seed(0)
    head = nn.Linear(16, VOCABULARY, bias=bias).to(dtype)
    hidden = torch.randn(30, 16).to(dtype).requires_grad_()
    target, scale = torch.randint(VOCABULARY, (30,)), torch.rand(30)
    inputs = [hidden, *head.parameters()]

    def outcome(losses: Tensor) -> list[Tensor]:
        assert losses.dtype in (torch.float32, torch.float64)
        gradients = torch.autograd.grad((losses * scale).sum(), inputs)
        return [losses.detach(), *gradients]

    def whole(logits: Tensor) -> list[Tensor]:
        return outcome(F.cross_entropy(logits, target, reduction="none"))

    exact = whole(F.linear(hidden.double(), *(p.double() for p in head.parameters())))
    usual = whole(head(hidden).float())
    with chunks_of(tokens):
        found = outcome(output_head.chunked_losses(hidden, head, target))
    for value, wanted, other in zip(found, exact, usual, strict=True):
        assert value.dtype == other.dtype
        error, usual_error = ((x.double() - wanted).norm() for x in (value, other))
        assert error <= 1.5 * usual_error + 1e-6 * wanted.norm()


@pytest.mark.parametrize("family", ["opt", "llama", "gemma3", "qwen3"])
def test_a_model_has_the_same_scores_and_gradients(family):
    model, batch = tiny_model(family).eval(), text_batch(7, 12, 3)
    heads: list[tuple[int, ...]] = []
    output_head_of(model).register_forward_hook(lambda *args: heads.append(tuple(args[2].shape)))
    scores, gradients = scores_and_gradients(model, batch)
    with chunks_of(4):
        found, others = scores_and_gradients(model, batch)
    assert heads == [(3, 11, VOCABULARY), (6 + 11 + 2,)]  # its hooks run, and see no logits
    assert torch.allclose(found, scores, rtol=1e-6)
    assert len(others) == len(gradients) > 0
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert "forward" not in vars(output_head_of(model))


def output_head_of(model: Any) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()
    return head


class AllPositions(LlamaForCausalLM):
    """A model that cannot leave positions out."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        return super().forward(input_ids, attention_mask, use_cache=use_cache)


def test_positions_are_found_where_the_head_sees_all():
    model, batch = AllPositions(LlamaConfig(**TINY)).eval(), text_batch(9, 6)
    batch["labels"][:, 3:5] = -100
    batch |= target_tensors(batch["labels"])
    scores, _ = scores_and_gradients(model, batch)
    with chunks_of(2, 97):
        assert output_head.plain_head(model, 9) is not None
        found, _ = scores_and_gradients(model, batch)
    assert torch.allclose(found, scores, rtol=1e-6)


def compiled(model: nn.Module) -> nn.Module:
    model.get_submodule("model.layers.0").compile()
    return model


def with_adapters(model: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    base: nn.Module = peft.get_peft_model(model, config).get_base_model()
    return base


@pytest.mark.parametrize(
    "model",
    [
        lambda: AutoModelForCausalLM.from_config(Gemma2Config(**TINY, head_dim=16)),  # caps logits
        lambda: compiled(LlamaForCausalLM(LlamaConfig(**TINY))),
        lambda: with_adapters(LlamaForCausalLM(LlamaConfig(**TINY))),
        lambda: nn.Linear(2, 3),
    ],
)
def test_other_heads_keep_their_logits(model):
    with chunks_of(1, 97):
        assert output_head.plain_head(model(), 50) is None


def test_few_targets_are_computed_as_ever():
    assert output_head.plain_head(tiny_model("llama"), 100) is None


def test_autocast_reaches_the_head():
    model, batch = tiny_model("llama").eval(), text_batch(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, gradients = scores_and_gradients(model, batch)
        with chunks_of(3):
            found, others = scores_and_gradients(model, batch)
    assert torch.allclose(found, scores, rtol=1e-6)
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).norm() <= 1e-2 * one.norm()


@pytest.mark.parametrize("backward", [False, True])
def test_a_long_text_row_takes_a_fifth_of_its_logits(backward):
    """8,192 tokens, 128k words; planned, and the plan is what a pass allocates (test_families)."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    shape = shape_of(config, "model", "bf16")

    def planned() -> int:
        return peak(trace(shape, Batch(1, 8192, 8191), backward=backward))["total"]

    chunked = planned()
    trace.cache_clear()
    with chunks_of(8192, 128256):
        whole = planned()
    trace.cache_clear()
    assert chunked <= whole / 5
