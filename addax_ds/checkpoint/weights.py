"""A model's weights and the files of them, the same whatever back end holds them.

Files are those of Hugging Face: ``model.safetensors``, or several with an index, with the tensors
that ``save_pretrained`` writes, bit for bit. A rank reads the rows that its shards need and writes
whole files, so neither the number of ranks nor the back end can be told from a folder.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from addax_ds.checkpoint.atomic import writing
from addax_ds.checkpoint.conversion import Conversion, from_files, is_of_transformers, to_files
from addax_ds.checkpoint.weight_files import MODEL_FILE, WeightFiles, WeightSlice, bytes_bar
from addax_ds.distributed.collectives import (
    all_gather_object,
    get_rank,
    get_world_size,
    raise_on_all_ranks,
)
from addax_ds.sharding.base import Sharding
from addax_ds.sharding.modules import canonical_name
from addax_ds.sharding.registry import back_end_of
from addax_ds.utils.errors import UserError

MAX_FILE_SIZE = "5GB"
CHUNK_BYTES = 2**24
"""Most of a weight that travels at once when files are written."""

_INDEX = f"{MODEL_FILE}.index.json"
_NUMBERED = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def load_weights(sharding: Sharding, folder: str | os.PathLike, progress: bool = False) -> None:
    """Fill this rank's shards from a folder with safetensors files; every rank has to call it.

    Args:
        sharding: the back end, `Addax.sharding`.
        folder: as `save_weights` or ``save_pretrained`` writes it.
        progress: whether to show a bar if it takes long.

    Raises:
        UserError: on all ranks, if one cannot; see `WeightFiles`.
    """
    with raise_on_all_ranks():
        fill(sharding.model, Path(folder), progress)
    sharding.weights_changed()


def fill(
    model: nn.Module, folder: Path, progress: bool = False, *, of_same_model: bool = False
) -> None:
    """Fill this rank's shards of a model that may not be attached yet; see `load_weights`.

    Args:
        model: on any back end.
        folder: with the files.
        progress: whether to show a bar if it takes long.
        of_same_model: refuse files that hold more than this model has, as those of another model
            with layers of the same shapes may.
    """
    files, _ = files_of(model, folder)
    slices = list(local_slices(model))
    if of_same_model:
        files.check_ties(slices)
        if more := _of_another_model(model, files.unread(slices)):
            raise UserError(
                f"{folder}: it has weights that this model lacks, such as {more[0]}, which would "
                "be lost: resume with the model that wrote it, whose config.json is there"
            )
    files.fill(slices, progress)


def _of_another_model(model: nn.Module, unread: Iterable[str]) -> list[str]:
    """Return those of some names in files that are weights of another model.

    The others are buffers of this one that its code makes when it runs, or saves no longer: they
    lie in modules that it has, without parameters.
    """
    modules = {canonical_name(name) for name, _ in model.named_modules()}
    owners = {canonical_name(n).rpartition(".")[0] for n, _ in model.named_parameters()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return [
        name
        for name in sorted(unread)
        if name.rpartition(".")[0] not in modules - owners
        and not any(re.search(pattern, name) for pattern in ignored)
    ]


def files_of(
    model: nn.Module, folder: Path, name: str = MODEL_FILE
) -> tuple[WeightFiles, list[Any]]:
    """Open a model's files such that they hold what the model calls its weights.

    Returns:
        The files, and what a model notes as ``_weight_conversions``; see `from_files`.

    Raises:
        UserError: see `WeightFiles`.
    """
    files = WeightFiles(folder, name)
    back_end = back_end_of(model)
    shapes = {n: _shape(tensor, back_end) for tensor, ns in _entries(model).items() for n in ns}
    with back_end.own_classes(model):
        names, conversions, used = from_files(model, shapes, files.names)
    files.rename(names)
    files.convert(conversions)
    return files, used


def local_slices(model: nn.Module) -> Iterator[WeightSlice]:
    """Yield this rank's part of every entry of the state dict, tied ones once.

    Files may call a weight by any of the names that it is tied under, and may have the prefix of
    the base model where the model has none, or the other way round.
    """
    back_end = back_end_of(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for tensor, names in _entries(model).items():
        accepted = [n for name in names for n in (name, name.removeprefix(prefix), prefix + name)]
        start, data = back_end.local_slice(tensor)
        yield WeightSlice(tuple(accepted), back_end.full_shape(tensor), start, data)


def full_shapes(model: nn.Module) -> dict[str, Tensor]:
    """Return the unsharded state dict, tied entries once, as tensors on the meta device."""
    back_end = back_end_of(model)
    return {names[0]: _shape(tensor, back_end) for tensor, names in _entries(model).items()}


def _shape(tensor: Tensor, back_end: type[Sharding]) -> Tensor:
    return torch.empty(back_end.full_shape(tensor), dtype=tensor.dtype, device="meta")


def _entries(model: nn.Module) -> dict[Tensor, list[str]]:
    """Return parameters and persistent buffers with the names that they have.

    Of a tied one the name that ``save_pretrained`` keeps comes first.
    """
    entries: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            entries.setdefault(tensor, []).append(canonical_name(name))
    for names in entries.values():
        if len(names) > 1:
            names.insert(0, names.pop(names.index(_kept_name(model, names))))
    return entries


def _kept_name(model: nn.Module, names: Sequence[str]) -> str:
    tied = [
        f"{name}.{pattern}".removeprefix(".")
        for name, module in model.named_modules()
        for pattern in getattr(module, "_tied_weights_keys", None) or ()
    ]
    others = (name for name in names if not any(re.search(pattern, name) for pattern in tied))
    return next(others, max(names))


def save_weights(
    model: nn.Module,
    folder: str | os.PathLike,
    writers: Sequence[int] | None = None,
    max_file_size: str = MAX_FILE_SIZE,
    progress: bool = False,
) -> None:
    """Write the weights as files for ``from_pretrained``; every rank has to call it.

    With the weights of a Transformers model its ``config.json`` and ``generation_config.json`` are
    written, so that ``from_pretrained`` loads the folder. Of any other module the weights alone.

    A rank holds its shards, `CHUNK_BYTES` of what travels, and, if it writes, one file and the
    weights that its next tensors are made of: one, or those of a layer's fused experts. The files
    of an earlier save are removed first and the index comes last, so no folder holds parts of both.

    Args:
        model: on any back end.
        folder: is made if it does not exist.
        writers: the ranks that write to this rank's file system (default: all), each its files.
        max_file_size: such as "5GB"; a larger weight is a file of its own.
        progress: whether to show a bar if it takes long.
    """
    folder = Path(folder)
    rank = get_rank()
    writers = range(get_world_size()) if writers is None else writers
    made, shapes = _tensors_of_files(model)
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=max_file_size)
    with raise_on_all_ranks(), writing(folder):
        if rank in writers:
            folder.mkdir(parents=True, exist_ok=True)
        if rank == writers[0]:
            save_config(model, folder)
            _remove_weights(folder)
    whole = _WholeWeights(model)
    files = list(plan.filename_to_tensors)
    at_once = min(all_gather_object(len(writers)))  # nodes may have different numbers of ranks
    with bytes_bar("Writing weights", plan.metadata["total_size"], progress) as bar:
        for first in range(0, len(files), at_once):
            # A round in which each writer gets its file, and then all write at once.
            turns = dict(zip(files[first : first + at_once], writers, strict=False))
            kept, problem = _gather_round(
                whole,
                {file: plan.filename_to_tensors[file] for file in turns},
                turns,
                made,
                lambda names: bar.update(sum(shapes[name].nbytes for name in names)),
            )
            with raise_on_all_ranks():
                if problem is not None:
                    raise problem
                while kept:  # taken out, or the next round would come on top
                    file, tensors = kept.popitem()
                    _write(folder / file, partial(save_file, tensors, metadata={"format": "pt"}))
                    del tensors
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + os.linesep
        with raise_on_all_ranks():
            if rank == writers[0]:
                _write(folder / _INDEX, lambda path: path.write_text(text))


def _gather_round(
    whole: "_WholeWeights",
    files: Mapping[str, Sequence[str]],
    writers: Mapping[str, int],
    made: Mapping[str, Conversion],
    on_gathered: Callable[[Iterable[str]], Any],
) -> tuple[dict[str, dict[str, Tensor]], Exception | None]:
    """Gather the tensors of some files, each on its writer; every rank has to call it.

    Args:
        whole: the weights.
        files: names of the tensors of each file.
        writers: ranks that write, by file.
        made: what makes each tensor.
        on_gathered: is told the names of tensors that have been gathered.

    Returns:
        The tensors of this rank's file, if it has one, by file; and the error of making them. The
        other ranks wait for this one to take part, so it is raised afterwards.
    """
    kept: dict[str, dict[str, Tensor]] = {}
    problem: Exception | None = None
    for file, tensors in files.items():
        is_own = get_rank() == writers[file]
        if is_own:
            kept[file] = {}
        wanted: dict[Conversion, list[str]] = {}
        for name in tensors:
            wanted.setdefault(made[name], []).append(name)
        for conversion, names in wanted.items():
            sources = whole.gather(conversion.sources, is_own)
            try:
                if is_own:
                    kept[file] |= _made(conversion, sources, names)
            except Exception as error:
                problem = error
            on_gathered(names)
    return kept, problem


def _tensors_of_files(model: nn.Module) -> tuple[dict[str, Conversion], dict[str, Tensor]]:
    """Return what makes each tensor of the files, and each on the meta device."""
    weights = full_shapes(model)
    made: dict[str, Conversion] = {}
    shapes: dict[str, Tensor] = {}
    with back_end_of(model).own_classes(model):
        conversions = to_files(model, weights)
    for conversion in conversions:
        tensors = conversion.make({name: weights[name] for name in conversion.sources})
        made |= dict.fromkeys(tensors, conversion)
        shapes |= tensors
    return made, shapes


def _made(
    conversion: Conversion, sources: dict[str, Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """Return tensors that each have memory of their own."""
    made = conversion.make(sources)
    return {
        name: tensor.contiguous()
        if (tensor := made[name]).nbytes == tensor.untyped_storage().nbytes()
        else tensor.clone(memory_format=torch.contiguous_format)
        for name in names
    }


def gather_weights(model: nn.Module, names: Iterable[str], keep: bool) -> dict[str, Tensor]:
    """Gather weights one after the other; every rank has to call it.

    Args:
        model: on any back end.
        names: keys of `full_shapes`, in the same order on all ranks.
        keep: whether this rank gets them.

    Returns:
        Copies on the CPU; nothing on ranks that do not keep them.
    """
    return _WholeWeights(model).gather(names, keep)


class _WholeWeights:
    """The weights of a model, put together from the parts that the ranks hold.

    Nothing is gathered by the back end, which would make every rank hold the whole of a weight, and
    gloo twice more. Parts travel in chunks instead, and are put together where they are kept.

    Args:
        model: on any back end; every rank has to make this, and to call it, at the same time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rank = get_rank()
        self._parts = {part.names[0]: part for part in local_slices(model)}
        ends = {n: (p.start, p.start + p.data.numel()) for n, p in self._parts.items()}
        self._ends_by_rank = all_gather_object(ends)
        if get_world_size() > 1:
            self._chunk = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=_traffic_device())

    def gather(self, names: Iterable[str], keep: bool) -> dict[str, Tensor]:
        """See `gather_weights`."""
        kept: dict[str, Tensor] = {}
        for name in names:
            part = self._parts[name]
            if keep:
                kept[name] = torch.empty(part.shape, dtype=part.data.dtype)
            self._collect(name, kept[name].view(-1) if keep else None)
        return kept

    def _collect(self, name: str, whole: Tensor | None) -> None:
        """Fill the flat ``whole``; None on a rank that takes part for others."""
        part = self._parts[name]
        own, size = part.data.reshape(-1), part.data.element_size()
        pieces = list(self._pieces(name, CHUNK_BYTES // size))
        if whole is not None and not pieces:
            whole.copy_(own)
        for start, end, sender in pieces:
            sent = self._chunk[: (end - start) * size]
            if sender == self._rank:
                sent.view(own.dtype).copy_(own[start - part.start : end - part.start])
            dist.broadcast(sent, sender)
            if whole is not None:
                whole[start:end].copy_(sent.view(own.dtype))

    def _pieces(self, name: str, limit: int) -> Iterator[tuple[int, int, int]]:
        """Yield what has to travel of a weight: first element, the one after the last, and whose.

        Nothing, if every rank has it all. Of replicas, one sends.
        """
        held = [ends[name] for ends in self._ends_by_rank]
        at = 0
        while len(set(held)) > 1 and at < self._parts[name].shape.numel():
            sender = max(
                (rank for rank, (start, _) in enumerate(held) if start <= at),
                key=lambda rank: held[rank][1],
            )
            end = min(held[sender][1], at + limit)
            assert end > at, f"no rank holds element {at} of {name}"
            yield at, end, sender
            at = end


def _traffic_device() -> torch.device:
    """Device of tensors to be sent; shards may be offloaded from it."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or dist.get_backend() in ("gloo", "ccl", "mpi"):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file, or leave none."""
    try:
        with writing(path):
            write(path)
    except UserError:
        path.unlink(missing_ok=True)
        raise


def _remove_weights(folder: Path) -> None:
    """Remove what an earlier save left: first the index, without which its files are none."""
    (folder / _INDEX).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name == MODEL_FILE or _NUMBERED.fullmatch(path.name):
            path.unlink()


def save_config(model: Any, folder: Path) -> None:
    """Write what ``save_pretrained`` writes beside the weights, for a Transformers model.

    The generation config goes out as it came in. Transformers loads sampling values that do not fit
    together, which published models have, but refuses to save them once a token has changed.
    """
    if not is_of_transformers(model):
        return
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard's
    if model.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    if model.can_generate():
        from transformers.utils import GENERATION_CONFIG_NAME

        path = folder / GENERATION_CONFIG_NAME
        model.generation_config.to_json_file(path, keys_to_pop=["compile_config"])
