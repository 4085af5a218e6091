"""Loading a model from its files, on every back end: the same model, in the memory of the share."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTJConfig, GPTNeoXConfig, MixtralConfig

from tests.ranks import run_ranks
from tests.tiny import tiny_model, write_model
from tests.workers.loading_cases import CHUNK_BYTES, FILE_SIZE, LARGE, RUN_ON

FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {},
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3": {},
}
OTHER_MODELS = {
    # A name in the files that is not the model's.
    "gpt-neox": GPTNeoXConfig(
        vocab_size=211,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
    ),
    # Buffers in no file, whose values depend on the dtype that they are computed in.
    "gptj": GPTJConfig(
        vocab_size=211, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=48
    ),
}
OTHER_FORMS = {
    "bin-only": "there is neither model.safetensors",
    "experts": "Transformers converts",
}
INDEX = "model.safetensors.index.json"
SIZES = {
    "vocab_size": 1001,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    for family, options in FAMILIES.items():
        write_model(folder / "models" / family, family, **options)
    for name, config in OTHER_MODELS.items():
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "models" / name)
    bin_only = tiny_model("llama")
    (folder / "models" / "bin-only").mkdir()
    bin_only.config.save_pretrained(folder / "models" / "bin-only")
    torch.save(bin_only.state_dict(), folder / "models" / "bin-only" / "pytorch_model.bin")
    write_experts(folder / "models" / "experts")
    large = tiny_model("llama", torch.bfloat16, **SIZES)
    large.save_pretrained(folder / "models" / LARGE, max_shard_size=FILE_SIZE)
    return folder


def write_experts(folder: Path) -> None:
    """Files with a matrix an expert, of which Transformers makes one a layer."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="module", params=[1, 2])
def loaded(models, request) -> list[dict[Any, Any]]:
    """What each rank found."""
    run_ranks("loading_cases", request.param, models)
    return [
        torch.load(models / f"loading-{request.param}-rank{rank}.pt")
        for rank in range(request.param)
    ]


@pytest.mark.parametrize("name", [*FAMILIES, *OTHER_MODELS, *OTHER_FORMS])
def test_a_loaded_model_is_the_one_that_transformers_loads(loaded, name):
    """Parameters, ties, buffers with their dtype, configuration; from fp32 files to each dtype."""
    for rank, layout in itertools.product(loaded, RUN_ON[len(loaded)]):
        found = rank[layout, name]
        assert found["different"] == []
        assert found["parameters"][0] == found["parameters"][1]
        assert found["generation"]
        assert found["config"]
        assert not found["training"]


def test_files_of_another_form_are_loaded_whole_with_a_warning(loaded):
    """Unless the whole model is what a rank is to hold."""
    for rank, layout in itertools.product(loaded, RUN_ON[len(loaded)]):
        for name, reason in OTHER_FORMS.items():
            warnings = rank[layout, name]["warnings"]
            assert len(warnings) == (layout != "none")
            for warning in warnings:
                assert reason in warning
                assert "save_pretrained" in warning
                assert ("on rank 0" in warning) == layout.startswith("zero3")
        assert all(not rank[layout, family]["warnings"] for family in (*FAMILIES, *OTHER_MODELS))


@pytest.mark.parametrize("case", [("llama", False), ("llama", True), ("opt", True)])
def test_zero3_takes_the_step_that_it_takes_after_transformers_load(loaded, case):
    """The engine, with parameters offloaded, and adapters on top that it partitions itself."""
    for rank in loaded:
        assert rank["step", *case] == dict.fromkeys(("logits", "moved", "after", "buffers"), True)


# ---- memory ------------------------------------------------------------------------------------


def test_a_rank_holds_its_share_and_one_tensor_or_file(loaded, models):
    """Counted in live tensors. A rank without shards holds the model, as the count shows."""
    files = list((models / "models" / LARGE).glob("*.safetensors"))
    assert len(files) > 5
    whole = {name: tensor for file in files for name, tensor in load_file(file).items()}
    model, largest = (f(t.nbytes for t in whole.values()) for f in (sum, max))
    written = max(file.stat().st_size for file in files)
    buffers = 4096
    for rank, layout in itertools.product(loaded, RUN_ON[len(loaded)]):
        found, share = rank[layout, LARGE], model / len(loaded) + buffers
        assert share - 2 * buffers <= found["held"] <= share
        assert found["held"] <= found["loading"] <= share + largest + buffers
        assert found["saving"] <= share + written + CHUNK_BYTES + buffers


def test_what_is_saved_are_the_files_that_were_loaded(loaded, models):
    start = models / "models" / LARGE
    files = sorted(path.name for path in start.glob("*.safetensors"))
    for layout in RUN_ON[len(loaded)]:
        saved = models / f"saved-{len(loaded)}-{layout}"
        names, expected = (
            json.loads((f / INDEX).read_text())["weight_map"] for f in (saved, start)
        )
        assert names == expected
        assert sorted(path.name for path in saved.glob("*.safetensors")) == files
        assert all((saved / f).read_bytes() == (start / f).read_bytes() for f in files)


# ---- what cannot be loaded ---------------------------------------------------------------------


def damage_missing(folder: Path) -> str:
    rewrite(folder, lambda weights: weights.pop("model.norm.weight"))
    return "its files lack 1 weights of the model, such as model.norm.weight"


def damage_shape(folder: Path) -> str:
    rewrite(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(31)}))
    return "model.norm.weight has shape [31], but the model's is [32]"


def damage_cut_short(folder: Path) -> str:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    return f"{path}: the file is damaged"


def damage_ties(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return "differ in the files, but config.json makes them one weight"


def damage_bin(folder: Path) -> str:
    weights = rewrite(folder, lambda weights: None)
    (folder / "model.safetensors").unlink()
    weights.pop("model.norm.weight")
    torch.save(weights, folder / "pytorch_model.bin")
    return "its files lack 1 weights that config.json asks for, such as model.norm.weight"


def damage_bin_cut_short(folder: Path) -> str:
    weights = rewrite(folder, lambda weights: None)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    os.truncate(folder / "pytorch_model.bin", 5000)
    return ""


def damage_damaged_later(folder: Path) -> str:
    return "Input/output error"


def damage_on_one_rank(folder: Path) -> str:
    return damage_missing(Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-1"))))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


DAMAGES = {
    n.removeprefix("damage_").replace("_", "-"): f
    for n, f in list(globals().items())
    if n.startswith("damage_")
}
ON_ONE_RANK = ("damaged-later", "on-one-rank")


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[dict[str, str], list[dict[str, dict[str, str]]]]:
    """What ought to be said, and what each of two ranks was told."""
    folder = tmp_path_factory.mktemp("failures")
    expected = {name: damage(write_model(folder / name)) for name, damage in DAMAGES.items()}
    run_ranks("loading_failures", 2, folder, *DAMAGES, timeout=120)
    return expected, [json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("layout", RUN_ON[2])
def test_every_rank_is_told_what_cannot_be_loaded(told, name, layout):
    """No rank waits for another one, whether the damage is on one or on both."""
    expected, ranks = told
    first, second = (rank[name][layout] for rank in ranks)
    assert second.startswith("cannot load the model from")
    assert expected[name] in second
    stopped = f"stopped, as 1 other rank(s) had an error: {second}"
    assert first == (stopped if name in ON_ONE_RANK else second)
