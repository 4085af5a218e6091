"""Loading a model from its files, on every back end: the same model, in the memory of the share."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTJConfig, GPTNeoXConfig, MixtralConfig

from addax_ds import UserError
from addax_ds.config.arguments import ModelArguments
from addax_ds.models import source as model_source
from addax_ds.models.source import ModelSource
from tests.support.rank_group import Lazy, ranks_by_size
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model, tiny_tokenizer, write_model
from tests.workers.loading_cases import (
    CHUNK_BYTES,
    FILE_SIZE,
    LARGE,
    LARGE_BIN,
    LARGE_EXPERTS,
    RUN_ON,
    STEPS,
)

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
    # A matrix an expert in the files, of which the model makes one a layer.
    "experts": MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    ),
}
BINS = ("opt-bins", "llama-bin")
OTHER_FORMS = {"old-bin": "pytorch_model.bin has the format of torch before 1.6"}
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SIZES = {
    "vocab_size": 1001,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
}
EXPERTS = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    for family, options in FAMILIES.items():
        write_model(folder / "models" / family, family, **options)
    for name, config in OTHER_MODELS.items():
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "models" / name)
    write_bins(folder / "models" / "opt-bins", opt_weights())
    tiny_model("opt").config.save_pretrained(folder / "models" / "opt-bins")
    for name, zipped in (("llama-bin", True), ("old-bin", False)):
        llama = tiny_model("llama")
        llama.config.save_pretrained(folder / "models" / name)
        path = folder / "models" / name / "pytorch_model.bin"
        torch.save(llama.state_dict(), path, _use_new_zipfile_serialization=zipped)
    large = tiny_model("llama", torch.bfloat16, **SIZES)
    large.save_pretrained(folder / "models" / LARGE, max_shard_size=FILE_SIZE)
    large.config.save_pretrained(folder / "models" / LARGE_BIN)
    write_bins(folder / "models" / LARGE_BIN, large.state_dict())
    experts = MixtralConfig(**EXPERTS)
    AutoModelForCausalLM.from_config(experts, dtype=torch.bfloat16).save_pretrained(
        folder / "models" / LARGE_EXPERTS, max_shard_size=FILE_SIZE
    )
    return folder


def opt_weights() -> dict[str, Tensor]:
    """As OPT was published: fp16, the head beside the embedding, no prefix of the base model.

    One weight lies by columns, and the weights of a layer's projections lie in one storage.
    """
    model = tiny_model("opt", torch.float16)
    weights = {n.removeprefix("model."): t for n, t in model.state_dict().items()}
    columns = "decoder.layers.0.fc1.weight"
    weights[columns] = weights[columns].T.contiguous().T
    projections = [f"decoder.layers.1.self_attn.{p}_proj.weight" for p in "qkv"]
    together = torch.cat([weights[name] for name in projections])
    return weights | dict(zip(projections, together.chunk(3), strict=True))


def write_bins(folder: Path, weights: dict[str, Tensor], count: int = 3) -> None:
    """Files with an index, written without the code under test."""
    folder.mkdir(exist_ok=True)
    names = list(weights)
    paths = {}
    for number in range(count):
        held = names[number * len(names) // count : (number + 1) * len(names) // count]
        path = f"pytorch_model-{number + 1:05d}-of-{count:05d}.bin"
        torch.save({name: weights[name] for name in held}, folder / path)
        paths |= dict.fromkeys(held, path)
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": paths}))


@pytest.fixture(scope="module", params=[1, 2])
def loaded(models, request, tmp_path_factory) -> Iterator[Any]:
    """What each rank found, by case."""
    world_size, new_folder = request.param, tmp_path_factory.mktemp
    names = [path.name for path in (models / "models").iterdir()]
    cases = [*itertools.product(RUN_ON[world_size], names), *(("step", *step) for step in STEPS)]
    with ranks_by_size("loading_cases", [world_size], cases, new_folder, models) as sizes:
        found = sizes[world_size]
        yield [Lazy(cases, lambda c, r=rank: found[c][r]) for rank in range(world_size)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *OTHER_MODELS, *BINS, *OTHER_FORMS])
def test_a_loaded_model_is_the_one_that_transformers_loads(loaded, name):
    """Parameters, ties, buffers with their dtype, configuration; from fp32 files to each dtype."""
    for rank, layout in itertools.product(loaded, RUN_ON[len(loaded)]):
        found = rank[layout, name]
        assert found["different"] == []
        assert found["parameters"][0] == found["parameters"][1]
        assert found["generation"]
        assert found["config"]
        assert not found["training"]


@pytest.mark.slow
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
        by_parts = (*FAMILIES, *OTHER_MODELS, *BINS)
        assert all(not rank[layout, name]["warnings"] for name in by_parts)


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_zero3_takes_the_step_that_it_takes_after_transformers_load(loaded, case):
    """The engine, with parameters offloaded, and adapters on top that it partitions itself.

    "stay": it makes no copy of the shards and leaves them where the load has put them.
    """
    parts = ("logits", "stay", "moved", "after", "buffers")
    for rank in loaded:
        assert rank["step", *case] == dict.fromkeys(parts, True)


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.slow
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
        assert rank[layout, LARGE_BIN]["held"] == found["held"]
        assert rank[layout, LARGE_BIN]["loading"] <= share + largest + buffers


@pytest.mark.slow
def test_a_rank_holds_its_share_and_what_one_conversion_needs(loaded, models):
    """While experts are fused there are the stack of each projection, and both together."""
    files = list((models / "models" / LARGE_EXPERTS).glob("*.safetensors"))
    model = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    written = max(file.stat().st_size for file in files)
    fused = 2 * EXPERTS["hidden_size"] * EXPERTS["intermediate_size"] * 2  # w1 and w3, of bf16
    fused *= EXPERTS["num_local_experts"]
    buffers = 8192
    assert 4 * fused < model / 2
    for rank, layout in itertools.product(loaded, RUN_ON[len(loaded)]):
        found, share = rank[layout, LARGE_EXPERTS], model / len(loaded) + buffers
        assert found["held"] <= share
        assert found["loading"] <= share + 2 * fused
        assert found["saving"] <= share + written + 2 * fused + CHUNK_BYTES


@pytest.mark.slow
def test_what_is_saved_are_the_files_that_were_loaded(loaded, models):
    start = models / "models" / LARGE
    files = sorted(path.name for path in start.glob("*.safetensors"))
    for layout in RUN_ON[len(loaded)]:
        assert loaded[0][layout, LARGE]
        saved = models / f"saved-{len(loaded)}-{layout}"
        names, expected = (
            json.loads((f / INDEX).read_text())["weight_map"] for f in (saved, start)
        )
        assert names == expected
        assert sorted(path.name for path in saved.glob("*.safetensors")) == files
        assert all((saved / f).read_bytes() == (start / f).read_bytes() for f in files)


# ---- the hub -----------------------------------------------------------------------------------

WEIGHTS_OF = {
    "model.safetensors": lambda m, f: m.save_pretrained(f),
    INDEX: lambda m, f: save_parts(m, f),
    "pytorch_model.bin": lambda m, f: torch.save(m.state_dict(), f / "pytorch_model.bin"),
    BIN_INDEX: lambda m, f: write_bins(f, m.state_dict()),
}
"""Files that a repository may hold, in the order in which they are preferred."""


def save_parts(model: nn.Module, folder: Path) -> None:
    """Several files with names of a publisher's own."""
    model.save_pretrained(folder, max_shard_size="40KB")
    index = json.loads((folder / INDEX).read_text())
    for number, name in enumerate(sorted(set(index["weight_map"].values()))):
        (folder / name).rename(folder / f"part-{number}.safetensors")
        (folder / INDEX).write_text(
            (folder / INDEX).read_text().replace(name, f"part-{number}.safetensors")
        )


def published(folder: Path, kinds: list[str]) -> tuple[nn.Module, Path]:
    """A repository with files of several kinds, and things that nobody needs."""
    model = tiny_model("llama")
    folder.mkdir(parents=True)
    for kind in reversed(kinds):
        WEIGHTS_OF[kind](model, folder)
    tiny_tokenizer().save_pretrained(folder)
    model.config.save_pretrained(folder)
    for other in ("flax_model.msgpack", "tf_model.h5", "pytorch_model.fp16.bin"):
        (folder / other).write_bytes(b"unused")
    return model, folder


def same_weights(source: ModelSource, model: nn.Module) -> bool:
    loaded = source.load(torch.float32).state_dict()
    return all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("first", range(4), ids=WEIGHTS_OF)
def test_of_a_repository_the_preferred_kind_is_downloaded_alone(first, tmp_path, monkeypatch):
    kinds = list(WEIGHTS_OF)[first:]
    model, repository = published(tmp_path / "hub", kinds)
    names = [path.name for path in repository.iterdir()]
    downloaded: list[str] = []

    def download(path: str, revision: str, allow_patterns: list[str]) -> str:
        assert (path, revision) == ("someone/model", "v2")
        for name in names:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                downloaded.append(name)
                shutil.copy(repository / name, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(model_source, "list_repo_files", lambda path, revision: names)
    monkeypatch.setattr(model_source, "snapshot_download", download)
    options = {"revision": "v2", "trust_remote_code": False}
    source = ModelSource("someone/model", "model", model.config, options, None)
    monkeypatch.setattr(ModelSource, "_generation_config", lambda _: None)
    assert same_weights(source, model)
    chosen = kinds[0]
    if "index" in chosen:
        files = set(json.loads((repository / chosen).read_text())["weight_map"].values())
        assert len(files) > 1
        assert set(downloaded) == {chosen, *files}
    else:
        assert downloaded == [chosen]


def in_cache(folder: Path, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Make the hub's cache with someone/model in it; the suite is offline."""
    cached = folder / "models--someone--model"
    model, _ = published(cached / "snapshots" / ("a" * 40), kinds)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return model


@pytest.mark.parametrize("kind", WEIGHTS_OF)
def test_what_was_downloaded_before_is_loaded_offline(kind, tmp_path, monkeypatch):
    model = in_cache(tmp_path, [kind], monkeypatch)
    source = ModelSource.find(ModelArguments(model_name_or_path="someone/model"))
    assert same_weights(source, model)


def test_a_configuration_alone_is_not_enough_offline(tmp_path, monkeypatch):
    in_cache(tmp_path, [], monkeypatch)
    source = ModelSource.find(ModelArguments(model_name_or_path="someone/model"))
    with pytest.raises(UserError, match=r"load the model from someone/model: .*offline mode"):
        source.load(torch.float32)


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


def damage_old_bin(folder: Path) -> str:
    weights = rewrite(folder, lambda weights: weights.pop("model.norm.weight"))
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return "its files lack 1 weights that config.json asks for, such as model.norm.weight"


def damage_bins_missing(folder: Path) -> str:
    rewrite_as_bins(folder, lambda weights: weights.pop("model.norm.weight"))
    return "its files lack 1 weights of the model, such as model.norm.weight"


def damage_bins_cut_short(folder: Path) -> str:
    path = rewrite_as_bins(folder)
    os.truncate(path, path.stat().st_size - 7)
    return f"{path}: the file is damaged"


def damage_bins_file(folder: Path) -> str:
    path = rewrite_as_bins(folder)
    path.unlink()
    return f"{path}: there is no such file, but the index names it"


def damage_bins_code(folder: Path) -> str:
    path = rewrite_as_bins(folder)
    torch.save({"code": os.getcwd}, path)
    return f"{path}: the file is damaged, or holds more than tensors, which could run any code"


def damage_bins_nested(folder: Path) -> str:
    path = rewrite_as_bins(folder)
    torch.save({"state_dict": torch.load(path)}, path)
    return f"{path}: it is no state dict, as its entries are not tensors: 'state_dict' is a dict"


def damage_bins_on_one_rank(folder: Path) -> str:
    return damage_bins_cut_short(
        Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-1")))
    )


def damage_damaged_later(folder: Path) -> str:
    return "Input/output error"


def damage_on_one_rank(folder: Path) -> str:
    return damage_missing(Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-1"))))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def rewrite_as_bins(
    folder: Path, change: Callable[[dict[str, Tensor]], Any] = lambda _: None
) -> Path:
    """Return the path of the second of three files."""
    write_bins(folder, rewrite(folder, change))
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model-00002-of-00003.bin"


DAMAGES = {
    n.removeprefix("damage_").replace("_", "-"): f
    for n, f in list(globals().items())
    if n.startswith("damage_")
}
ON_ONE_RANK = ("damaged-later", "on-one-rank", "bins-on-one-rank")


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[dict[str, str], list[dict[str, dict[str, str]]]]:
    """What ought to be said, and what each of two ranks was told."""
    folder = tmp_path_factory.mktemp("failures")
    expected = {name: damage(write_model(folder / name)) for name, damage in DAMAGES.items()}
    run_ranks("loading_failures", 2, folder, *DAMAGES, timeout=120)
    return expected, [json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
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
