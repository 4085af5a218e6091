"""Addax for DeepSpeed and FSDP2: full-parameter fine-tuning at the memory of the weights.

Importing this package imports neither torch nor DeepSpeed: a public name is loaded when it is used.
The optimizer type ``"Addax"`` is registered with DeepSpeed as soon as both packages are imported,
in either order.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from addax_ds.integrations.registration import register_with_deepspeed
from addax_ds.utils.extras import naming_extras
from addax_ds.utils.versions import __version__ as __version__

if TYPE_CHECKING:
    from addax_ds.checkpoint.weights import load_weights, save_weights
    from addax_ds.config.addax_config import AddaxConfig
    from addax_ds.config.deepspeed import ds_config
    from addax_ds.kernels.noise import gaussian, parameter_id
    from addax_ds.optim.addax import Addax
    from addax_ds.optim.attach import attach
    from addax_ds.optim.report import NonFiniteError
    from addax_ds.training.mixin import AddaxMixin
    from addax_ds.training.trainer import AddaxTrainer
    from addax_ds.utils.errors import UserError

__all__ = [
    "Addax",
    "AddaxConfig",
    "AddaxMixin",
    "AddaxTrainer",
    "NonFiniteError",
    "UserError",
    "attach",
    "ds_config",
    "gaussian",
    "load_weights",
    "parameter_id",
    "save_weights",
]

_MODULES = {
    "Addax": "optim.addax",
    "AddaxConfig": "config.addax_config",
    "AddaxMixin": "training.mixin",
    "AddaxTrainer": "training.trainer",
    "NonFiniteError": "optim.report",
    "UserError": "utils.errors",
    "attach": "optim.attach",
    "ds_config": "config.deepspeed",
    "gaussian": "kernels.noise",
    "load_weights": "checkpoint.weights",
    "parameter_id": "kernels.noise",
    "save_weights": "checkpoint.weights",
}

register_with_deepspeed()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with naming_extras():
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
