"""Optional packages, and the extras of this package that install them."""

from collections.abc import Iterator
from contextlib import contextmanager

from addax_ds.utils.errors import UserError

_TRAIN = ("accelerate", "datasets", "huggingface_hub", "numpy", "safetensors", "tqdm")
_EXTRAS = {
    "deepspeed": ("deepspeed", "pydantic"),
    "train": (*_TRAIN, "transformers", "yaml"),
    "plots": ("matplotlib",),
    "lora": ("peft",),
}


class MissingExtraError(UserError, ImportError):
    """A package is missing that an extra of this package installs."""


@contextmanager
def naming_extras() -> Iterator[None]:
    """Name the extra that installs a package which the body fails to import.

    Raises:
        MissingExtraError: in place of `ModuleNotFoundError`, for packages of an extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, packages in _EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        raise MissingExtraError(
            f"{package} is not installed: pip install 'addax_ds[{extra}]'"
        ) from error
