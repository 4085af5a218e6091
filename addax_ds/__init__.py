"""Addax for DeepSpeed and FSDP2: full-parameter fine-tuning at the memory of the weights.

Importing this package registers the optimizer type ``"Addax"`` with DeepSpeed.
"""

from typing import TYPE_CHECKING, Any

from addax_ds.checkpoint.weights import load_weights, save_weights
from addax_ds.config.deepspeed import ds_config
from addax_ds.integrations.deepspeed_engine import register as _register
from addax_ds.kernels.noise import gaussian, parameter_id
from addax_ds.optim.addax import Addax
from addax_ds.optim.attach import attach
from addax_ds.optim.report import NonFiniteError
from addax_ds.utils.errors import UserError

if TYPE_CHECKING:
    from addax_ds.config.addax_config import AddaxConfig
    from addax_ds.training.trainer import AddaxTrainer

__version__ = "0.1.0"
__all__ = [
    "Addax",
    "AddaxConfig",
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

_register(Addax)


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes seconds to import; users of the optimizer alone do without it.
    if name == "AddaxConfig":
        from addax_ds.config.addax_config import AddaxConfig

        return AddaxConfig
    if name == "AddaxTrainer":
        from addax_ds.training.trainer import AddaxTrainer

        return AddaxTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
