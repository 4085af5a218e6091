"""Model folders that are broken, or written to run code or to read what is not theirs."""

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPConfig, T5Config

import addax_ds
from addax_ds.config.arguments import ModelArguments
from addax_ds.models.source import ModelSource
from addax_ds.utils.errors import UserError
from tests.support.fuzz import JSON, fuzzed, outcome
from tests.support.tiny import VOCABULARY, tiny_model, write_model

CONFIG, INDEX = "config.json", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


def load(folder: Path | str, **arguments: Any) -> Any:
    source = ModelSource.find(ModelArguments(model_name_or_path=str(folder), **arguments))
    source.load_tokenizer()
    return source.load(torch.float32)


def change(folder: Path, file: str, **entries: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **entries}))


def weights_as_pickle(folder: Path, **more: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({**tiny_model().state_dict(), **more}, folder / "pytorch_model.bin")


class Runs:
    """Leaves a mark when it is unpickled without `weights_only`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.mark),)


# ---- code ----------------------------------------------------------------------------------------


def test_weights_that_are_pickled(folder, monkeypatch):
    """The larger OPT models have no other files; nothing but tensors is unpickled."""
    weights_as_pickle(folder)
    asked = []
    load_torch = torch.load

    def recorded(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["weights_only"])
        return load_torch(*args, **kwargs)

    monkeypatch.setattr(torch, "load", recorded)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    loaded, expected = load(folder).state_dict(), tiny_model().state_dict()
    assert set(asked) == {True}
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["among weights", "plain pickle"])
def test_pickles_that_run_code(kind, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    code = Runs(tmp_path / "mark")
    weights_as_pickle(folder, code=code)
    if kind == "plain pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(code, protocol=2))
    with pytest.raises(
        UserError, match=r"holds more than tensors, which could run any code"
    ) as said:
        load(folder)
    assert "weights_only=False" not in str(said.value)
    assert not code.mark.exists()


def test_safetensors_are_preferred(folder, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "mark")))
    load(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["configuration", "tokenizer", "known type", "generation"])
def test_code_of_the_folder_does_not_run(kind, folder, tmp_path):
    mark = tmp_path / "mark"
    (folder / "code.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import LlamaConfig as C\n"
        "from transformers import LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    )
    classes = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    if kind == "configuration":
        change(folder, CONFIG, model_type="unheard-of", auto_map=classes)
    elif kind == "tokenizer":
        tokenizer = {"AutoTokenizer": ["code.T", "code.T"]}
        change(folder, "tokenizer_config.json", tokenizer_class="T", auto_map=tokenizer)
    elif kind == "known type":
        change(folder, CONFIG, auto_map=classes)
    else:
        (folder / "custom_generate").mkdir()
        shutil.copy(folder / "code.py", folder / "custom_generate" / "generate.py")
    loaded, refusal = outcome(lambda: load(folder))
    assert not mark.exists()
    if kind in ("configuration", "tokenizer"):
        assert "--trust_remote_code" in refusal
        assert str(folder) in refusal
    else:  # Transformers has classes of its own for them
        assert type(loaded).__module__.startswith("transformers.models.llama")


def test_kernels_of_the_hub_are_code(folder):
    change(folder, CONFIG, _attn_implementation="someone/kernel")
    for arguments in (
        {},
        {"attn_implementation": "sdpa"},
    ):  # Transformers fetches it in either case
        with pytest.raises(UserError, match=r"the attention kernel someone/kernel, which is code"):
            load(folder, **arguments)


def test_the_package_unpickles_tensors_only():
    """Every call of its own that could unpickle or evaluate."""
    loads = 0
    for path in Path(addax_ds.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads"), path
            if called == "np.load":
                assert "allow_pickle=False" in map(ast.unparse, node.keywords), path
            assert called not in ("yaml.unsafe_load", "yaml.full_load", "__import__"), path
            if called == "yaml.load":
                assert ast.unparse(node.args[1]) == "_Loader", path
            if called == "torch.load":
                loads += 1
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", path
    assert loads > 0


# ---- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [INDEX, "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(
    "where", ["../outside.safetensors", "absolute", "a/../../outside.safetensors"]
)
def test_an_index_does_not_lead_out_of_its_folder(index, where, folder, tmp_path):
    """Transformers alone would read the file outside, which is a good one."""
    outside = tmp_path / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "a").mkdir()
    where = str(outside) if where == "absolute" else where
    names = dict.fromkeys(tiny_model().state_dict(), where)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(UserError, match=rf"{index}: it names {where}, which is not a file of this"):
        load(folder)


def test_adapters_name_a_model_elsewhere(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/other"}')
    with pytest.raises(UserError, match="the folder holds an adapter"):
        load(folder)


# ---- broken folders ------------------------------------------------------------------------------


def test_weights_that_are_missing(folder):
    """Transformers would make them up."""
    change(folder, CONFIG, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"lack 9 weights .* such as model\.layers\.2\."):
        load(folder)


@pytest.mark.parametrize("size", [0, 7, 100, 5000])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_cut_short(name, size, folder):
    if name == "pytorch_model.bin":
        weights_as_pickle(folder)
    os.truncate(folder / name, size)
    with pytest.raises(UserError, match=f"cannot load the model from {folder}"):
        load(folder)


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
CONTENTS = ["", "{", "[]", "null", "3", '"x"', "[" * 100_000, "\ufeff{}", "{}"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_broken_files(name, content, folder):
    (folder / name).write_text(content)
    loaded, refusal = outcome(lambda: load(folder))
    assert loaded is not None or str(folder) in refusal
    if name in ("config.json", "tokenizer.json"):
        assert loaded is None


ENTRIES = {
    "config.json": [
        *("hidden_size", "num_attention_heads", "hidden_act", "model_type", "auto_map"),
        *("pad_token_id", "rope_parameters", "max_position_embeddings", "dtype", "architectures"),
        *("quantization_config", "text_config", "tie_word_embeddings", "_attn_implementation"),
    ],
    "tokenizer_config.json": [
        *("tokenizer_class", "eos_token", "added_tokens_decoder", "extra_special_tokens"),
        *("chat_template", "padding_side", "model_max_length", "auto_map"),
    ],
}


@pytest.mark.parametrize("name", ENTRIES)
@fuzzed(60)
@given(data=st.data())
@pytest.mark.slow
def test_any_value_of_an_entry(name, good, data, tmp_path_factory):
    entry = data.draw(st.sampled_from(ENTRIES[name]))
    folder = tmp_path_factory.getbasetemp() / "entry"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    change(folder, name, **{entry: data.draw(JSON)})
    loaded, refusal = outcome(lambda: load(folder))
    assert loaded is not None or str(folder) in refusal
    if loaded is not None:
        assert loaded.get_input_embeddings().weight.shape == (VOCABULARY, 32)


@pytest.mark.parametrize(
    "name", ["a/b/c", "", "..", "/dev/null", "a\0b", "a" * 5000, "\ud800", "~"], ids=range(8)
)
def test_names_that_are_no_model(name):
    with pytest.raises(UserError, match="--model_name_or_path"):
        ModelSource.find(ModelArguments(model_name_or_path=name))


@pytest.mark.parametrize("config", [T5Config(), CLIPConfig()], ids=lambda config: config.model_type)
def test_models_that_predict_no_next_token_are_refused_before_anything_else(config, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{config.model_type}.* no causal language model"):
        ModelSource.find(ModelArguments(model_name_or_path=str(tmp_path)))


def test_the_size_of_the_vocabulary(folder):
    source = ModelSource.find(ModelArguments(model_name_or_path=str(folder)))
    assert source.vocabulary_size == VOCABULARY
