"""The planner's tape of other model families, against what a real step on a CPU allocates."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    JambaConfig,
    JetMoeConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    Zamba2Config,
)

from addax_ds.data.examples import NO_LOSS
from addax_ds.evaluation import output_head
from addax_ds.evaluation.likelihood import target_scores, target_tensors
from addax_ds.planner.memory import StepSpec, step_memory
from addax_ds.planner.shapes import shape_of
from addax_ds.planner.tape import Tape
from addax_ds.planner.trace import MOST_OPERATIONS, Batch, PlanError, Trace, trace
from addax_ds.utils.errors import UserError
from benchmarks.live import peak

LENGTH = 128
HEADS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 301}
GROUPED = {**HEADS, "intermediate_size": 128, "num_key_value_heads": 2}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "mistral, sliding window": MistralConfig(**GROUPED, sliding_window=32),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "gpt_neox, another layout of queries": GPTNeoXConfig(**HEADS, intermediate_size=128),
    "falcon, one key for all heads": FalconConfig(**HEADS),
    "bloom, alibi": BloomConfig(**HEADS),
    "opt": OPTConfig(**HEADS, ffn_dim=256, word_embed_proj_dim=64, dropout=0.0),
    "mamba2": Mamba2Config(
        hidden_size=64, num_hidden_layers=2, vocab_size=301, num_heads=4, head_dim=32, n_groups=1
    ),
    "jamba, both kinds of layer": JambaConfig(
        **GROUPED, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, num_experts=2
    ),
}


def batch_of(rows: int, length: int, text: bool = False) -> dict[str, Tensor]:
    """Return a batch with a target in each row, at positions of their own.

    Or, of text, with all tokens as targets.
    """
    ids = torch.randint(3, 300, (rows, length))
    labels = torch.full_like(ids, NO_LOSS)
    for row in range(rows):
        labels[row, length - 1 - row] = 5
    if text:
        labels = ids
    return {"input_ids": ids, **target_tensors(labels)}


def allocated(
    config: PreTrainedConfig,
    rows: int,
    backward: bool,
    length: int = LENGTH,
    attention: str | None = None,
    checkpointing: bool = False,
    text: bool = False,
) -> Tape:
    """Return what a pass over a real model allocates, weights left out."""
    torch.manual_seed(0)
    kernel = {"attn_implementation": attention} if attention else {}
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **kernel)
    model.config.use_cache = False
    model.train(backward)
    if checkpointing:
        model.activation_checkpointing_enable()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = batch_of(rows, length, text)
    tape = Tape(lambda *_: "all")
    targets = batch.pop("targets")
    for tensor in (*model.parameters(), *model.buffers(), *batch.values(), *targets.values()):
        tape.ignore(tensor)
    batch["targets"] = targets
    with tape, torch.set_grad_enabled(backward):
        loss = target_scores(model, batch)[:, 0].sum()
        if backward:
            loss.backward()
    return tape


def planned(
    config: PreTrainedConfig,
    rows: int,
    backward: bool,
    length: int = LENGTH,
    targets: int = 1,
    **more: Any,
) -> Trace:
    shape = shape_of(config, "model", "bf16")
    found = trace(shape, Batch(rows, length, targets), backward=backward, cuda=False, **more)
    memory = tuple(event for event in found.events if event[0] in ("alloc", "free"))
    return Trace(memory, found.categories)


def total(tape: Tape | Trace) -> int:
    """Return the bytes of everything that was ever allocated."""
    return sum(rest[0] for kind, _, *rest in tape.events if kind == "alloc")


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_is_planned_as_it_is(family, rows, backward):
    config = FAMILIES[family]
    measured = peak(allocated(config, rows, backward))["total"]
    found = peak(planned(config, rows, backward))["total"]
    assert found == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox, another layout of queries"])
def test_losses_of_text_rows_are_planned_as_they_are(family, backward):
    """With a few tokens' logits at a time."""
    config = FAMILIES[family]
    with mock.patch.object(output_head, "CHUNK_ELEMENTS", 40 * config.vocab_size):
        measured = peak(allocated(config, 2, backward, text=True))
        found = peak(planned(config, 2, backward, targets=LENGTH - 1))
    trace.cache_clear()
    whole = peak(planned(config, 2, backward, targets=LENGTH - 1))
    trace.cache_clear()
    # The plan has the batch's indices, three for each target and the positions; the test has not.
    indices = 8 * (3 * 2 * (LENGTH - 1) + LENGTH - 1)
    assert found["total"] - indices == pytest.approx(measured["total"], rel=0.005)
    assert found["total"] < 0.95 * whole["total"]


@pytest.mark.parametrize("rows", [1, 2])
def test_eager_attention_is_planned_as_it_is(rows):
    config = LlamaConfig(**GROUPED)
    measured = peak(allocated(config, rows, True, attention="eager"))["total"]
    found = peak(planned(config, rows, True, attention="eager"))["total"]
    assert found == pytest.approx(measured, rel=0.005)


def test_the_linear_layer_of_deepspeed_is_planned_where_it_is_used():
    """It keeps what torch's does, but a block that is recomputed has to go further for it."""
    config, case = FAMILIES["opt"], {"length": 32, "checkpointing": True}
    plain = total(allocated(config, 4, True, **case))
    with mock.patch.object(F, "linear", zero3_linear_wrap):
        replaced = total(allocated(config, 4, True, **case))
    usual, efficient = (
        total(planned(config, 4, True, **case, zero3_linear=used)) for used in (False, True)
    )
    assert efficient - usual == replaced - plain != 0


def test_a_block_without_parameters_is_no_group_of_fsdp2():
    """Granite-SWA has its rotary embeddings in a list."""
    shape = shape_of(CONFIG_MAPPING["granite_swa"](**GROUPED), "granite-swa", "bf16")
    assert () in shape.block_parameters
    totals = []
    for kept in (True, False):
        pairs = zip(shape.blocks, shape.block_parameters, strict=True)
        blocks, parameters = zip(*(p for p in pairs if kept or p[1]), strict=True)
        cut = replace(shape, blocks=blocks, block_parameters=parameters)
        batch = Batch(2, 32, 32)
        spec = StepSpec(cut, "addax", "fsdp2", 2, zeroth_order=batch, first_order=batch)
        totals.append(step_memory(spec).total)
    assert totals[0] == totals[1] > 0


def test_a_block_that_shares_parameters_is_planned_with_the_root_of_fsdp2():
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    heads = {**GROUPED, "num_hidden_layers": 4, "n_mamba_heads": 4, "mamba_headdim": 32}
    zamba = shape_of(Zamba2Config(**heads, layers_block_type=kinds, num_mem_blocks=1), "zamba2")
    assert zamba.separate == {zamba.blocks[0], zamba.blocks[2]}
    shape = shape_of(FAMILIES["llama"], "llama")
    assert shape.separate == set(shape.blocks)
    batch = Batch(2, 32, 32)
    totals = []
    for changed in (
        {"separate": frozenset(shape.blocks[:1])},
        {"blocks": shape.blocks[:1], "block_parameters": shape.block_parameters[:1]},
    ):
        cut = replace(shape, **changed)
        spec = StepSpec(cut, "addax", "fsdp2", 2, zeroth_order=batch, first_order=batch)
        totals.append(step_memory(spec).total)
    assert totals[0] == totals[1] > 0


def test_a_model_that_asks_for_values_is_refused_by_name():
    config = JetMoeConfig(**GROUPED, num_local_experts=4)
    with pytest.raises(UserError, match=r"small: .* type jetmoe .*, with 2 row\(s\) of 64 tokens"):
        trace(shape_of(config, "small"), Batch(2, 64, 1), backward=True)


LOOPING: dict[str, PreTrainedConfig] = {
    "rwkv": RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=301),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=301),
    "recurrent_gemma": RecurrentGemmaConfig(
        **{**HEADS, "num_hidden_layers": 3}, intermediate_size=128, lru_width=64
    ),
}
DEEP: dict[str, PreTrainedConfig] = {
    "llama of 405 billion": LlamaConfig(**GROUPED | {"num_hidden_layers": 126}),
    "opt of 66 billion": OPTConfig(**HEADS | {"num_hidden_layers": 64}, word_embed_proj_dim=64),
    "94 layers of 128 experts": Qwen3MoeConfig(
        **GROUPED | {"num_hidden_layers": 94}, num_experts=128, moe_intermediate_size=32
    ),
}


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("family", LOOPING)
def test_a_model_that_loops_over_tokens_is_refused_after_a_number_of_operations(
    family, backward, monkeypatch
):
    """Its trace would take minutes, of as many operations as it has tokens."""
    monkeypatch.setattr("addax_ds.planner.trace.MOST_OPERATIONS", 4000)
    shape = shape_of(LOOPING[family], "small")
    assert trace(shape, Batch(1, 8, 1), backward=backward).events
    said = rf"small: .* {family} cannot be planned with 1 row\(s\) of 512 tokens.* more than 4000 "
    with pytest.raises(PlanError, match=said):
        trace(shape, Batch(1, 512, 1), backward=backward)


@pytest.mark.slow
@pytest.mark.parametrize("family", DEEP)
def test_a_deep_model_is_far_from_where_it_is_refused(family, monkeypatch):
    monkeypatch.setattr("addax_ds.planner.trace.MOST_OPERATIONS", MOST_OPERATIONS // 5)
    shape = shape_of(DEEP[family], "deep")
    assert trace(shape, Batch(2, 1024, 1023), backward=True, checkpointing=True).events


@pytest.mark.parametrize("backward", [True, False])
def test_a_padding_token_keeps_no_model_from_being_planned(backward):
    """GPT-2 looks for it in its input, unless it has a mask."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 211, "n_positions": 48}
    plain, padded = (
        planned(GPT2Config(**sizes, **more), 1, backward, length=8)
        for more in ({}, {"pad_token_id": 0})
    )
    assert padded.events == plain.events
