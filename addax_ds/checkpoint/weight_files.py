"""Reading weights from files by rows: safetensors files, and those of `torch.save` (``.bin``).

Both are mapped into memory: of a file a rank touches the pages of the rows that it reads, and the
system may take these back. Neither kind has a checksum that torch or safetensors would look at.
"""

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from addax_ds.checkpoint.conversion import Conversion
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import shown

MODEL_FILE = "model.safetensors"
UNSAFE_PICKLE = (
    "is damaged, or holds more than tensors, which could run any code; use the model's safetensors "
    "files"
)
"""End of the message about a file that is not unpickled; torch's advises ``weights_only=False``."""

BAR_DELAY_S = 2.0
"""Seconds of reading or writing before a progress bar appears."""


class OtherForm(UserError):
    """Files that do not hold the weights one by one, or cannot be read by parts."""


# ---- the two kinds of file ---------------------------------------------------------------------


class WeightFile(Protocol):
    """An open file of tensors. Each method may raise what reading a damaged file raises."""

    def keys(self) -> set[str]:
        """Return the names of its tensors."""

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return ``tensor[first:last]``, on the CPU, in the dtype of the file; not to be written.

        No other part of the tensor is read, if its rows lie one after the other.
        """

    def whole(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, in the dtype of the file; not to be written."""


class _SafetensorsFile:
    def __init__(self, file: Any) -> None:
        self._file = file

    def keys(self) -> set[str]:
        return set(self._file.keys())

    def shape(self, name: str) -> list[int]:
        return self._file.get_slice(name).get_shape()

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self._file.get_slice(name)[first:last]

    def whole(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _BinFile:
    """A state dict that `torch.save` has written; tensors are views of the mapped file.

    Raises:
        OtherForm: if it is not a zip file, as before torch 1.6, or a compressed one.
        UserError: if it is damaged, or holds other things.
    """

    def __init__(self, path: Path) -> None:
        _check_mappable(path)
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path}: the file {UNSAFE_PICKLE}") from error
        except OSError:
            raise
        except Exception as error:  # damage to the pickle leads anywhere in torch
            raise UserError(
                f"{path}: the file is damaged: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: it holds a {type(content).__name__}, not a state dict")
        self._tensors = {name: t.detach() for name, t in content.items() if _is_dense(t)}
        if content and not self._tensors:
            name, value = next(iter(content.items()))
            raise UserError(
                f"{path}: it is no state dict, as its entries are not tensors: {shown(repr(name))} "
                f"is a {type(value).__name__}. Save the state dict of the model alone"
            )

    def keys(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[name].shape)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self._tensors[name][first:last]

    def whole(self, name: str) -> Tensor:
        return self._tensors[name]

    def close(self) -> None:
        """Give up the mapping, once no tensor is in use."""
        self._tensors.clear()


def _is_dense(value: Any) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _check_mappable(path: Path) -> None:
    """Check that a file of `torch.save` can be mapped.

    Raises:
        OtherForm: if it cannot.
        UserError: if it is damaged, or TorchScript.
    """
    with path.open("rb") as file:
        start = file.read(1)
    if start == b"\x80":  # a pickle without a zip file around it
        raise OtherForm(f"{path} has the format of torch before 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: the file is damaged: {error}") from error
    if any(Path(member.filename).name == "constants.pkl" for member in members):
        raise UserError(f"{path}: the file {UNSAFE_PICKLE}")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise OtherForm(f"{path} is compressed")


@contextmanager
def _opened(path: Path) -> Iterator[WeightFile]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                yield _SafetensorsFile(file)
        else:
            bin_file = _BinFile(path)
            try:
                yield bin_file
            finally:
                bin_file.close()
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file, but the index names it") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: the file is damaged or cannot be read: {error}") from error


# ---- the weights in files ----------------------------------------------------------------------


@dataclass(frozen=True)
class WeightSlice:
    """The part of one weight that this rank holds: of a parameter, frozen or not, or of a buffer.

    Attributes:
        names: what the weight may be called in a file; its name in the model comes first.
        shape: of the whole weight.
        start: flat index of the part's first element in the whole weight.
        data: the part, flat, or the whole weight in its own shape; writing to it writes the weight.
    """

    names: tuple[str, ...]
    shape: torch.Size
    start: int
    data: Tensor


class WeightFiles:
    """The tensors in the files of a folder.

    Args:
        folder: where the files are.
        name: of the file, if it is one; the index of several is called ``<name>.index.json``. Each
            that does not end in ``.safetensors`` is one of `torch.save`.

    Raises:
        OtherForm: if a file cannot be read by parts; this and all methods that read.
        UserError: if there are no such files, or one is damaged.
    """

    def __init__(self, folder: Path, name: str = MODEL_FILE) -> None:
        self.folder = folder
        single, index = folder / name, folder / f"{name}.index.json"
        if single.is_file():
            with _opened(single) as file:
                paths = dict.fromkeys(file.keys(), single)
        elif index.is_file():
            paths = read_index(index)
        else:
            raise UserError(f"{folder}: there is neither {name} nor {index.name} in this folder")
        self._tensors = {name: (path, name) for name, path in paths.items()}
        self._made: dict[str, tuple[Conversion, Tensor]] = {}

    @property
    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._tensors)

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors what the model calls them; messages go on naming them as the files do."""
        self._tensors = {names.get(name, name): place for name, place in self._tensors.items()}

    def convert(self, conversions: Iterable[Conversion]) -> None:
        """Make tensors of the model out of several in the files, when they are read.

        Raises:
            UserError: if what the files hold cannot be put together.
        """
        for conversion in conversions:
            sources = self._read(conversion, "meta")
            try:
                made = conversion.make(sources)
            except (RuntimeError, ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.folder}: {conversion.sources[0]} and the tensors that belong to it "
                    f"cannot be put together: {error}"
                ) from error
            self._made |= {name: (conversion, tensor) for name, tensor in made.items()}

    def check(self, slices: Iterable[WeightSlice]) -> None:
        """Check that the files hold what ``slices`` are parts of.

        Raises:
            UserError: for a tensor that is missing or has another shape, and for a damaged file.
        """
        for _ in self._find(self._divide(slices)[0]):
            pass

    def check_ties(self, slices: Iterable[WeightSlice]) -> None:
        """Check that what the files hold of a tied weight under its other names is the same.

        Raises:
            UserError: if it is not; one of the two would be lost.
        """
        for wanted in slices:
            found = [self._tensors[n] for n in wanted.names if n in self._tensors]
            for other_path, other in dict.fromkeys(found[1:]):
                path, name = found[0]
                with _opened(path) as one, _opened(other_path) as two:
                    same = torch.equal(one.whole(name), two.whole(other))
                if not same:
                    raise UserError(
                        f"{self.folder}: {name} and {other} differ in the files, but config.json "
                        'makes them one weight: write "tie_word_embeddings": false there'
                    )

    def unread(self, slices: Iterable[WeightSlice]) -> set[str]:
        """Return the names of tensors of which nothing is made, and which no slice is part of."""
        sources = {n for conversion, _ in self._made.values() for n in conversion.sources}
        return self.names - sources - {name for wanted in slices for name in wanted.names}

    def fill(self, slices: Iterable[WeightSlice], progress: bool = False) -> None:
        """Read the slices, and nothing else but the rest of the rows that they cut.

        Values are converted to the dtype and moved to the device of each slice.

        Args:
            slices: what to fill.
            progress: whether to show a bar if it takes long.

        Raises:
            UserError: see `check`.
        """
        held, made = self._divide(slices)
        parts = [*held, *(wanted for group in made.values() for _, wanted in group)]
        size = sum(wanted.data.nbytes for wanted in parts)
        with bytes_bar("Reading weights", size, progress) as bar:
            for file, name, wanted in self._find(held):
                _fill(file, name, wanted)
                bar.update(wanted.data.nbytes)
            for conversion, group in made.items():
                self._fill_made(conversion, group)
                bar.update(sum(wanted.data.nbytes for _, wanted in group))

    def _fill_made(self, conversion: Conversion, group: list[tuple[str, WeightSlice]]) -> None:
        tensors = conversion.make(self._read(conversion))
        for name, wanted in group:
            _copy(tensors[name].reshape(-1)[wanted.start :], wanted)

    def _divide(
        self, slices: Iterable[WeightSlice]
    ) -> tuple[list[WeightSlice], dict[Conversion, list[tuple[str, WeightSlice]]]]:
        """Divide into what files hold and what is made, by conversion and with its name.

        Raises:
            UserError: for a tensor that would be made in another shape.
        """
        held: list[WeightSlice] = []
        made: dict[Conversion, list[tuple[str, WeightSlice]]] = {}
        for wanted in slices:
            name = next((n for n in wanted.names if n in self._made), None)
            if name is None or any(n in self._tensors for n in wanted.names):
                held.append(wanted)
                continue
            conversion, tensor = self._made[name]
            if tensor.shape != wanted.shape:
                raise UserError(
                    f"{self.folder}: {conversion.sources[0]} and the tensors that belong to it "
                    f"make a {name} of shape {list(tensor.shape)}, but the model's is "
                    f"{list(wanted.shape)}"
                )
            if wanted.data.numel():
                made.setdefault(conversion, []).append((name, wanted))
        return held, made

    def _read(self, conversion: Conversion, device: str = "cpu") -> dict[str, Tensor]:
        """Return what a conversion needs: whole tensors, or on the meta device their shapes."""
        by_path: dict[Path, list[str]] = {}
        for name in conversion.sources:
            by_path.setdefault(self._tensors[name][0], []).append(name)
        tensors = {}
        for path, names in by_path.items():
            with _opened(path) as file:
                held = file.keys()
                for name in names:
                    known = self._tensors[name][1]
                    _check_held(known, held, path)
                    if device == "meta":
                        tensors[name] = torch.empty(file.shape(known), device="meta")
                    else:
                        tensors[name] = file.whole(known)
        return tensors

    def _find(self, slices: Iterable[WeightSlice]) -> Iterator[tuple[WeightFile, str, WeightSlice]]:
        """Yield the open file and the name of each slice's tensor; one file is open at a time."""
        by_path: dict[Path, list[tuple[str, WeightSlice]]] = {}
        missing = []
        for wanted in slices:
            known = next((n for n in wanted.names if n in self._tensors), None)
            if known is None:
                missing.append(wanted.names[0])
            else:
                path, name = self._tensors[known]
                by_path.setdefault(path, []).append((name, wanted))
        if missing:
            raise UserError(
                f"{self.folder}: its files lack {len(missing)} weights of the model, such as "
                f"{missing[0]}"
            )
        for path, found in by_path.items():
            with _opened(path) as file:
                held = file.keys()
                for name, wanted in found:
                    _check_held(name, held, path)
                    shape = file.shape(name)
                    if shape != list(wanted.shape):
                        raise UserError(
                            f"{path}: {name} has shape {shape}, but the model's is "
                            f"{list(wanted.shape)}"
                        )
                    yield file, name, wanted


def _fill(file: WeightFile, name: str, wanted: WeightSlice) -> None:
    count = wanted.data.numel()
    if count == wanted.shape.numel():
        values = file.whole(name)
    elif count:
        row = wanted.shape[1:].numel()
        first, last = wanted.start // row, -(-(wanted.start + count) // row)
        rows = file.rows(name, first, last).reshape(-1)
        values = rows[wanted.start - first * row :][:count]
    else:
        return
    _copy(values, wanted)


def _copy(values: Tensor, wanted: WeightSlice) -> None:
    """Copy the first values, as many as are wanted."""
    values = values.reshape(-1)[: wanted.data.numel()]
    wanted.data.copy_(values.reshape(wanted.data.shape))


def _check_held(name: str, held: set[str], path: Path) -> None:
    if name not in held:
        raise UserError(f"{path}: {name} is missing, which the index says is here")


def read_index(path: Path) -> dict[str, Path]:
    """Return the file of each tensor, from an index beside the files.

    Raises:
        UserError: if it is no index, or names a file of another folder.
    """
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        outside = next((file for file in files.values() if Path(file).name != file), None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: this is not an index of weights: {error!r}") from error
    if outside is not None:
        raise UserError(f"{path}: it names {outside}, which is not a file of this folder")
    return {name: path.parent / file for name, file in files.items()}


def bytes_bar(what: str, size: int, shown: bool) -> tqdm:
    """Make a bar of ``size`` bytes that appears if it takes long."""
    return tqdm(
        desc=what, total=size, unit="B", unit_scale=True, delay=BAR_DELAY_S, disable=not shown
    )
