"""Tiny random models of several families with a tokenizer, rows and files, all made here.

A word is a token, so a text of n words has n tokens, and EOS closes each row: `row(5, 2)` is a
sequence of 8 tokens of which 3 carry loss.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from addax_ds.data.encoding import encode, encode_prompts
from addax_ds.data.examples import Example
from addax_ds.evaluation.generation import Decoder, GenerationSet, Question
from addax_ds.evaluation.scored_set import Choice, EvaluationSet
from addax_ds.reading.records import prompt_completion
from addax_ds.tasks.metrics import squad_scores

VOCABULARY = 211  # odd, so that partitions of the embedding are uneven
POSITIONS = 48
SPECIAL = ("<pad>", "<eos>", "<unk>")
MARKER = VOCABULARY - 1
"""The last word, which occurs in no row unless a test puts it there."""

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": POSITIONS,
    "init_std": 0.1,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "opt": (OPTConfig, _OPT),
    "llama": (LlamaConfig, _DECODER),
    "qwen3": (Qwen3Config, _DECODER),
    "mistral": (MistralConfig, {**_DECODER, "sliding_window": 16}),
    "gemma3": (Gemma3TextConfig, {**_DECODER, "sliding_window": 16}),
}


def tiny_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """Random weights, the same in every process; ``options`` override the configuration."""
    config_class, defaults = FAMILIES[family]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config_class(**{**defaults, **options}))
    return model.to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{index}" for index in range(VOCABULARY - len(SPECIAL)))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Any text, a token a byte; with ``bos``, one in front. It has `BYTE_VOCABULARY` tokens."""
    words = [*SPECIAL, "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        bos_token="<bos>" if bos else None,
    )


BYTE_VOCABULARY = len(SPECIAL) + 1 + 256


def write_byte_model(folder: Path, family: str = "llama", **options: Any) -> Path:
    """Write a model for any text of up to 512 bytes."""
    sizes = {"vocab_size": BYTE_VOCABULARY, "max_position_embeddings": 512}
    tiny_model(family, **sizes, **options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_model(folder: Path, family: str = "llama", **options: Any) -> Path:
    """Write model and tokenizer as `from_pretrained` reads them."""
    tiny_model(family, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, MARKER - len(SPECIAL), (count,), generator=generator)
    return " ".join(f"w{number}" for number in numbers.tolist())


def row(prompt: int, completion: int, seed: int = 0) -> dict[str, str]:
    """A row of so many words; no two words rows of different seeds are likely to be equal."""
    return {"prompt": words(prompt, 2 * seed), "completion": " " + words(completion, 2 * seed + 1)}


def rows(long: int, short: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of very unequal completions: ``long`` ones of 17 tokens and more, ``short`` up to 12."""
    lengths = [(10 + i % 5, 6 + 7 * (i % 3)) for i in range(long)]
    lengths += [(2 + i % 3, 1 + 3 * (i % 3)) for i in range(short)]
    return [row(p, c, 1000 * seed + i) for i, (p, c) in enumerate(lengths)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(rows: list[dict[str, str]]) -> list[Example]:
    records = [
        prompt_completion(r["prompt"], r["completion"], f"row {i}") for i, r in enumerate(rows)
    ]
    return encode(records, tiny_tokenizer(), max_length=None, model_positions=POSITIONS)[0]


def repeatable(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A trainer's log of losses without what no two runs agree on."""
    costs = {"train_seconds", "train_cpu_seconds", "peak_memory_bytes"}
    return [
        {name: value for name, value in entry.items() if name not in costs}
        for entry in log
        if "train_runtime" not in entry
    ]


def choice_set() -> EvaluationSet:
    """5 rows with 2 or 3 candidates of 1 to 4 words, 13 candidates in all."""
    candidates, choices = [], []
    for index, count in enumerate((3, 2, 3, 2, 3)):
        choices.append(Choice(len(candidates), count, index % count))
        prompt = words(3 + 2 * index, 500 + index)
        candidates += [
            {"prompt": prompt, "completion": " " + words(1 + (index + c) % 4, 600 + 10 * index + c)}
            for c in range(count)
        ]
    return EvaluationSet(examples(candidates), choices)


def question_set(count: int = 7, max_new_tokens: int = 6) -> GenerationSet:
    """Questions with prompts of 2 to 2 + 3 * count words; every fifth word ends an answer."""
    tokenizer = tiny_tokenizer()
    decoder = Decoder(tokenizer, max_new_tokens)
    decoder.stop = list(range(0, VOCABULARY, 5))
    records = [
        prompt_completion(words(2 + 3 * i, 800 + i), " " + words(1 + i % 3, 900 + i), f"row {i}")
        for i in range(count)
    ]
    whole, _ = encode(records, tokenizer, max_length=None, model_positions=POSITIONS)
    prompts = encode_prompts(
        [replace(r, text=r.text[: r.targets[0][0]]) for r in records], tokenizer, max_length=40
    )
    questions = [
        Question(prompt, example, (record.text[record.targets[0][0] :].strip(), "w7 w8"))
        for prompt, example, record in zip(prompts, whole, records, strict=True)
    ]
    return GenerationSet(questions, decoder, squad_scores)
