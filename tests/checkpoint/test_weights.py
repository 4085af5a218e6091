"""Weights in files: slices of them, and what every back end makes of them."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from addax_ds import UserError
from addax_ds.checkpoint import weight_files, weights
from addax_ds.checkpoint.weight_files import OtherForm, WeightFiles, WeightSlice
from addax_ds.checkpoint.weights import local_slices, save_weights
from tests.support.models import tiny_opt
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model
from tests.workers.weights_cases import MAX_FILE_SIZE, MODELS, TOKENS, pass_on

SHAPES = [(), (1,), (7,), (5, 3), (1, 9), (4, 3, 2), (0, 4), (211, 32)]
INDEX = "model.safetensors.index.json"
CONFIGS = {"config.json", "generation_config.json"}
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {f"weight{i}": torch.randn(shape) for i, shape in enumerate(SHAPES)}


def write_files(folder: Path, files: list[dict[str, Tensor]]) -> Path:
    """Several files with an index, written without the code under test."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for number, content in enumerate(files):
        file = f"part-{number}.safetensors"
        save_file(content, folder / file)
        names |= dict.fromkeys(content, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def write_bins(folder: Path, files: list[dict[str, Tensor]]) -> Path:
    """The same as `torch.save` writes them."""
    names = {}
    for number, content in enumerate(files):
        torch.save(content, folder / f"part-{number}.bin")
        names |= dict.fromkeys(content, f"part-{number}.bin")
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def part(name: str, whole: Tensor, start: int, end: int, **options: Any) -> WeightSlice:
    return WeightSlice((name,), whole.shape, start, torch.empty(end - start, **options))


def partitions(whole: Tensor, ranks: int, rows: bool) -> list[tuple[int, int]]:
    """Equal parts with padding at the end, of rows (FSDP2) or of flat elements (ZeRO-3)."""
    row = whole.shape[1:].numel() if rows and whole.ndim else 1
    share = -(-(whole.numel() // max(row, 1)) // ranks) * row
    return [
        (min(i * share, whole.numel()), min((i + 1) * share, whole.numel())) for i in range(ranks)
    ]


# ---- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model.safetensors", BIN])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_parts_of_all_ranks_are_the_whole(ranks, rows, kind, tmp_path):
    whole = tensors()
    names = list(whole)
    write = write_bins if kind == BIN else write_files
    write(tmp_path, [{n: whole[n]} for n in names[:4]] + [{n: whole[n] for n in names[4:]}])
    files = WeightFiles(tmp_path, kind)
    for name, tensor in whole.items():
        parts = [part(name, tensor, *p) for p in partitions(tensor, ranks, rows)]
        files.fill(parts)
        assert torch.equal(torch.cat([p.data for p in parts]), tensor.flatten())


def test_a_slice_reads_its_rows_alone(tmp_path, monkeypatch):
    """67 elements of 211 rows of 32 lie in rows 6 to 8."""
    whole = tensors()["weight7"]
    save_file({"weight": whole}, tmp_path / "model.safetensors")
    read: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        weight_files, "safe_open", lambda *a, **k: Watched(safe_open(*a, **k), read)
    )
    wanted = part("weight", whole, 200, 267)
    WeightFiles(tmp_path).fill([wanted])
    assert read == [("weight", slice(6, 9))]
    assert torch.equal(wanted.data, whole.flatten()[200:267])


class Watched:
    """An open file that notes which rows are read."""

    def __init__(self, file: Any, read: list[tuple[str, Any]]) -> None:
        self._file, self._read = file, read

    def __enter__(self) -> "Watched":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def keys(self) -> Any:
        return self._file.keys()

    def get_tensor(self, name: str) -> Tensor:
        self._read.append((name, ...))
        return self._file.get_tensor(name)

    def get_slice(self, name: str) -> Any:
        return WatchedSlice(name, self._file.get_slice(name), self._read)


class WatchedSlice:
    def __init__(self, name: str, rows: Any, read: list[tuple[str, Any]]) -> None:
        self._name, self._rows, self._read = name, rows, read

    def get_shape(self) -> list[int]:
        return self._rows.get_shape()

    def __getitem__(self, key: Any) -> Tensor:
        self._read.append((self._name, key))
        return self._rows[key]


def test_values_take_the_dtype_of_the_weights(tmp_path):
    whole = tensors()["weight7"]
    save_file({"weight": whole}, tmp_path / "model.safetensors")
    wanted = part("weight", whole, 100, 300, dtype=torch.bfloat16)
    WeightFiles(tmp_path).fill([wanted])
    assert torch.equal(wanted.data, whole.flatten()[100:300].bfloat16())


@pytest.mark.parametrize(
    "rename",
    [lambda n: n.removeprefix("model."), lambda n: f"model.{n}", lambda n: n],
    ids=["base-model", "prefix", "same"],
)
@pytest.mark.parametrize("tied_name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_names_with_and_without_prefix_and_of_tied_weights(rename, tied_name, tmp_path):
    """A file of the base model, or of one with its head, and either name of a tied weight."""
    model = tiny_model("llama", tie_word_embeddings=True)
    state = model.state_dict()
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    content = {rename(n): state[n].clone() for n in state.keys() - (tied - {tied_name})}
    save_file({**content, "unknown": torch.ones(2)}, tmp_path / "model.safetensors")
    other = tiny_model("llama", tie_word_embeddings=True).apply(zero)
    WeightFiles(tmp_path).fill(local_slices(other))
    assert all(torch.equal(t, state[n]) for n, t in other.state_dict().items())


@torch.no_grad()
def zero(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.zero_()


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_counts_bytes_on_request(shown, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weight_files, "BAR_DELAY_S", 0)
    model = tiny_model("llama", torch.float64)
    save_weights(model, tmp_path, progress=shown)
    WeightFiles(tmp_path).fill(local_slices(model), progress=shown)
    # Parameters of 8 bytes: 2 layers, embeddings in and out, and the last norm.
    size = 8 * (2 * (32 * (2 * 32 + 2 * 16 + 3 * 56) + 2 * 32) + 2 * 211 * 32 + 32)
    said = capsys.readouterr().err
    for what in ("Writing weights: 100%", "Reading weights: 100%"):
        assert (what in said) == shown
    assert said.count(f"{size / 1000:.0f}k/{size / 1000:.0f}kB"[:5]) >= 2 * shown


# ---- files of torch.save -----------------------------------------------------------------------


def test_a_bin_file_is_mapped(tmp_path):
    """What is yielded are views of one mapping, and the mapping ends with the file's use."""
    torch.save(tensors(), tmp_path / BIN)

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path / BIN))

    with weight_files._opened(tmp_path / BIN) as file:
        rows, whole = file.rows("weight7", 6, 9), file.whole("weight7")
        assert rows.data_ptr() == whole[6:].data_ptr()
        assert mappings() == 1
    del rows, whole
    assert mappings() == 0


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    "entry",
    [
        lambda t: t.T.contiguous().T,
        lambda t: torch.stack([t, t], dim=2)[..., 1],
        lambda t: torch.cat([t, t])[5:],
        lambda t: nn.Parameter(t),
    ],
    ids=["by-columns", "strided", "part-of-a-storage", "parameter"],
)
def test_tensors_of_any_layout(entry, start, tmp_path):
    whole = torch.randn(5, 3)
    torch.save({"epoch": 3, "weight": entry(whole), "more": {"other": whole}}, tmp_path / BIN)
    wanted = part("weight", whole, start, 15)
    WeightFiles(tmp_path, BIN).fill([wanted])
    assert torch.equal(wanted.data, whole.flatten()[start:])
    assert not wanted.data.requires_grad


def test_a_bin_file_that_cannot_be_mapped_is_of_another_form(tmp_path):
    content = {"weight": torch.ones(5, 3)}
    torch.save(content, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save(content, tmp_path / "stored.bin")
    with (
        zipfile.ZipFile(tmp_path / "stored.bin") as stored,
        zipfile.ZipFile(tmp_path / "deflated.bin", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    for name, reason in (
        ("old.bin", "has the format of torch before"),
        ("deflated.bin", "is comp"),
    ):
        with pytest.raises(OtherForm, match=rf"{name} {reason}"):
            WeightFiles(tmp_path, name)


BAD_CONTENTS = {
    "list": ([torch.ones(5, 3)], "it holds a list, not a state dict"),
    "tensor": (torch.ones(5, 3), "it holds a Tensor, not a state dict"),
    "nested": ({"model": {"weight": torch.ones(5, 3)}}, "entries are not tensors: 'model' is a d"),
    "sparse": ({"weight": torch.ones(5, 3).to_sparse()}, "entries are not tensors: 'weight' is a"),
    "class": ({"weight": torch.ones(5, 3), "path": Path()}, "holds more than tensors, which could"),
}


@pytest.mark.parametrize("name", [*BAD_CONTENTS, "script"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bin_file_of_other_things_is_refused(name, tmp_path):
    if name == "script":
        message = "holds more than tensors, which could run any"
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / BIN)
    else:
        content, message = BAD_CONTENTS[name]
        torch.save(content, tmp_path / BIN)
    with pytest.raises(UserError, match=message) as error:
        WeightFiles(tmp_path, BIN)
    assert str(error.value).startswith(f"{tmp_path / BIN}: ")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 100, 700, -1])
def test_a_bin_file_that_is_cut_short(size, tmp_path):
    torch.save({"weight": torch.ones(5, 3)}, tmp_path / BIN)
    content = (tmp_path / BIN).read_bytes()
    (tmp_path / BIN).write_bytes(content[:size])
    with pytest.raises(UserError, match=rf"{BIN}: the file is damaged: "):
        WeightFiles(tmp_path, BIN)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bin_file_with_other_bytes_is_read_or_refused(tmp_path):
    """Nothing but a `UserError` comes out; changed numbers of a weight nobody can find."""
    torch.save({"weight": torch.ones(5, 3)}, tmp_path / BIN)
    content = (tmp_path / BIN).read_bytes()
    refused = 0
    for seed in range(60):
        torch.manual_seed(seed)
        damaged = bytearray(content)
        for place in torch.randint(len(content), (5,)).tolist():
            damaged[place] ^= 0x55
        (tmp_path / BIN).write_bytes(damaged)
        try:
            WeightFiles(tmp_path, BIN).fill([part("weight", torch.ones(5, 3), 2, 9)])
        except UserError:
            refused += 1
    assert refused > 10


# ---- files that are wrong ----------------------------------------------------------------------


def damage_missing(folder: Path) -> str:
    save_file({"other": torch.ones(2)}, folder / "model.safetensors")
    return f"{folder}: its files lack 1 weights of the model, such as weight3"


def damage_shape(folder: Path) -> str:
    save_file({"weight3": torch.ones(3, 5)}, folder / "model.safetensors")
    return f"{folder / 'model.safetensors'}: weight3 has shape [3, 5], but the model's is [5, 3]"


def damage_truncated(folder: Path) -> str:
    save_file({"weight3": torch.ones(5, 3)}, folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-7])
    return f"{folder / 'model.safetensors'}: the file is damaged"


def damage_garbage(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    return f"{folder / 'model.safetensors'}: the file is damaged"


def damage_nothing_there(folder: Path) -> str:
    return f"{folder}: there is neither model.safetensors nor {INDEX}"


def damage_index(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": {"weight3": "a.safe')
    return f"{folder / INDEX}: this is not an index"


def damage_index_content(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": ["weight3"]}')
    return f"{folder / INDEX}: this is not an index"


def damage_file_of_index(folder: Path) -> str:
    write_files(folder, [{"weight3": torch.ones(5, 3)}])
    (folder / "part-0.safetensors").unlink()
    return f"{folder / 'part-0.safetensors'}: there is no such file"


def damage_place_of_index(folder: Path) -> str:
    write_files(folder, [{"weight3": torch.ones(5, 3)}, {"other": torch.ones(2)}])
    content = (folder / INDEX).read_text().replace("part-0", "part-1")
    (folder / INDEX).write_text(content)
    return f"{folder / 'part-1.safetensors'}: weight3 is missing"


def damage_path_of_index(folder: Path) -> str:
    content = {"weight_map": {"weight3": "../outside.safetensors"}}
    (folder / INDEX).write_text(json.dumps(content))
    return f"{folder / INDEX}: it names ../outside.safetensors"


DAMAGES = {n.removeprefix("damage_"): f for n, f in list(globals().items()) if "damage_" in n}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_named(damage, tmp_path):
    message = damage(tmp_path)
    with pytest.raises(UserError) as error:
        WeightFiles(tmp_path).fill([part("weight3", torch.empty(5, 3), 2, 9)])
    assert str(error.value).startswith(message)


# ---- writing -----------------------------------------------------------------------------------


def test_a_save_replaces_an_earlier_one(tmp_path):
    model = tiny_model("llama")
    state = model.state_dict()
    (tmp_path / "notes.safetensors").touch()
    for size, files in (("20KB", 5), ("5GB", 1), ("60KB", 2)):
        save_weights(model, tmp_path, max_file_size=size)
        written = set(tmp_path.glob("*.safetensors")) - {tmp_path / "notes.safetensors"}
        assert len(written) >= files
        assert (len(written) == 1) == (files == 1)
        assert (tmp_path / INDEX).exists() == (files > 1)
        assert {n for file in written for n in load_file(file)} == set(state)
        assert sum(t.nbytes for file in written for t in load_file(file).values()) == sum(
            t.nbytes for t in state.values()
        )
    assert (tmp_path / "notes.safetensors").exists()


def test_what_a_save_over_another_leaves_when_it_breaks_off_is_no_model(tmp_path, monkeypatch):
    """Its files have the names of the older ones, with which they would make a model of two."""
    save_weights(tiny_model("llama"), tmp_path, max_file_size="60KB")
    save_file, saved = weights.save_file, []

    def killed(*args: Any, **kwargs: Any) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(save_file(*args, **kwargs))

    monkeypatch.setattr(weights, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_weights(tiny_model("llama"), tmp_path, max_file_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    with pytest.raises(UserError, match="there is neither"):
        WeightFiles(tmp_path)


def test_a_writer_that_fails_still_takes_part_for_the_others(tmp_path, monkeypatch):
    gather, gathered = weights._WholeWeights.gather, []

    def counted(self: Any, names: Any, keep: bool) -> Any:
        gathered.append(names)
        return gather(self, names, keep)

    def fail(*_: Any) -> None:
        raise ValueError("no such conversion")

    monkeypatch.setattr(weights._WholeWeights, "gather", counted)
    save_weights(tiny_model("llama"), tmp_path / "whole")
    expected = list(gathered)
    gathered.clear()
    monkeypatch.setattr(weights, "_made", fail)
    with pytest.raises(ValueError, match="no such conversion"):
        save_weights(tiny_model("llama"), tmp_path / "none")
    assert len(expected) > 1
    assert gathered == expected


def test_of_a_plain_module_the_weights_alone_are_written(tmp_path):
    model = nn.Linear(3, 2)
    save_weights(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_a_generation_config_that_contradicts_itself_is_kept(tmp_path):
    """As models are published, and Trainer has added a special token since it was loaded."""
    model = tiny_model("llama")
    own = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "pad_token_id": 0}
    model.generation_config = GenerationConfig(**own)
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.validate(strict=True)
    save_weights(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert {name: getattr(loaded, name) for name in own} == own


# ---- back ends ---------------------------------------------------------------------------------

CHAIN = [
    ("ZeRO-3 x2", "FSDP2 x2", "unsharded x2", "ZeRO-3 x2, CPU offload"),
    ("unsharded x1",),
    ("FSDP2 x4 (HSDP 2x2)",),
    ("ZeRO-3 x1",),
]
"""Each reads what the one before it wrote; what is in parentheses runs in one group of ranks."""

LAYOUTS = [layout for group in CHAIN for layout in group]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    for name, build in MODELS.items():
        files = [{n: t} for n, t in published(build(), folder / "published").items()]
        write_files(folder / "start" / name, files)
    source = "start"
    for group in CHAIN:
        ranks = 1 if group == ("unsharded x1",) else int(group[0].split("x")[1][0])
        if group == ("unsharded x1",):
            for name in MODELS:
                found = pass_on(name, group[0], folder / source, folder / group[0])
                torch.save(found, folder / f"{group[0]}-{name}-rank0.pt")
        else:
            run_ranks("weights_cases", ranks, folder, str(folder / source), *group)
        source = group[-1]
    return folder


def published(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def unique(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the second name of a tied weight."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        found.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(found.values())


def results(chain: Path, layout: str, name: str) -> list[dict[str, Any]]:
    return [torch.load(p) for p in sorted(chain.glob(f"{layout}-{name}-rank*.pt"))]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_back_end_writes_the_same_files(chain, name, layout, tmp_path):
    wanted = published(MODELS[name](), tmp_path)
    folder = chain / layout / name
    index = json.loads((folder / INDEX).read_text())
    files = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert len(files) >= 3
    assert {p.name for p in folder.iterdir()} == {*files, INDEX, *CONFIGS}
    held = {n: (file, t) for file, content in files.items() for n, t in content.items()}
    assert index["weight_map"] == {n: file for n, (file, _) in held.items()}
    assert held.keys() == wanted.keys()
    for tensor_name, (_, tensor) in held.items():
        assert tensor.dtype == wanted[tensor_name].dtype
        assert torch.equal(tensor, wanted[tensor_name])
    limit = 1000 * int(MAX_FILE_SIZE.removesuffix("KB"))
    for content in files.values():
        assert len(content) == 1 or sum(t.nbytes for t in content.values()) <= limit


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_filled_model_is_the_one_that_was_saved(chain, name, layout):
    """Its logits, also after a save; nothing that was gathered before is stale."""
    model = MODELS[name]().eval()
    with torch.no_grad():
        wanted = model(TOKENS).logits
    found = results(chain, layout, name)
    assert found
    for result in found:
        assert torch.equal(result["logits"], wanted)
        assert torch.equal(result["again"], wanted)
        assert result["gradients"] == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_is_filled_with_its_share(chain, name, layout):
    state = unique(MODELS[name]().state_dict())
    parameters = {n for n, _ in MODELS[name]().named_parameters()}
    elements = sum(state[n].numel() for n in parameters)
    buffers = sum(t.numel() for n, t in state.items() if n not in parameters)
    held = [result["held"] - buffers for result in results(chain, layout, name)]
    copies = {"unsharded x2": 2, "FSDP2 x4 (HSDP 2x2)": 2}.get(layout, 1)
    assert sum(held) == copies * elements
    if "unsharded" not in layout and len(held) > 1:
        assert max(held) < 0.6 * elements


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_was_written(chain, name, layout, tmp_path):
    """The folder as it is, with the configuration that ``save_pretrained`` would write."""
    model, folder = MODELS[name]().eval(), chain / layout / name
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == model.dtype
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    model.save_pretrained(tmp_path)
    for file in CONFIGS:
        assert (folder / file).read_text() == (tmp_path / file).read_text()


@pytest.mark.slow
def test_a_rank_that_cannot_write_stops_all_of_them(tmp_path):
    run_ranks("weights_failure", 2, tmp_path, timeout=60)
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert "cannot be written: [Errno 28] No space left on device" in told[1]
    assert "No space left on device" in told[1]
    assert told[0] == f"stopped, as 1 other rank(s) had an error: {told[1]}"


@pytest.mark.slow
def test_nodes_with_different_numbers_of_ranks_write_the_same_files(tmp_path):
    run_ranks("weights_of_nodes", 3, tmp_path, timeout=60)
    pair, alone = (folder_files(tmp_path / f"node-{number}") for number in range(2))
    assert len(pair) > 5
    assert pair == alone
    save_weights(tiny_opt(), tmp_path / "whole", max_file_size="100KB")
    assert pair == folder_files(tmp_path / "whole")


def folder_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
