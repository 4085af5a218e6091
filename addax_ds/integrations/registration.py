"""Makes ``"optimizer": {"type": "Addax"}`` known to `deepspeed.initialize`, once it is there.

DeepSpeed is a large package that users of FSDP2 do without, so it is not imported for this. A
private name of its engine (0.19.8) is replaced: the method that makes its ZeRO optimizer.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from addax_ds.utils.versions import versions

logger = logging.getLogger(__name__)


def register_with_deepspeed() -> None:
    """Teach DeepSpeed the optimizer type "Addax": now if it is imported, else when it is."""
    if sys.modules.get("deepspeed") is not None:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport("deepspeed", _register))


class _AfterImport(MetaPathFinder):
    """Calls a function once a module has been imported; in ``sys.meta_path`` until then.

    Args:
        name: full name of the module.
        act: is called after the module's own code has run.
    """

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self._name, self._act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders find, with a loader that calls the function at its end.

        A look-up need not become an import (`importlib.util.find_spec` asks whether a package is
        installed), so this finder goes only when the module has run.
        """
        if fullname != self._name:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]  # not those before: they may ask us
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            # On the loader itself: others read the module's files through it.
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                vars(loader).pop("exec_module", None)  # a second finder may have
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self._act()

            loader.exec_module = exec_module
        return spec


def _register() -> None:
    import torch

    from addax_ds.optim.addax import Addax

    if getattr(torch.optim, "Addax", None) is Addax:
        return
    try:
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        configure = DeepSpeedEngine._configure_zero_optimizer
    except (ImportError, AttributeError) as error:
        # Raised here it would end `import deepspeed`, which FSDP2 does not need.
        logger.warning(
            "Addax cannot train under DeepSpeed %s (%s): install deepspeed>=0.19.8,<0.20",
            versions().get("deepspeed", "of an unknown version"),
            error,
        )
        return

    def configure_addax(engine: DeepSpeedEngine, optimizer: Any) -> Any:
        if not isinstance(optimizer, Addax):
            return configure(engine, optimizer)
        # Only now: a program may import DeepSpeed, as Accelerate does, and never run it.
        from addax_ds.integrations.deepspeed_engine import make_zero_optimizer

        return make_zero_optimizer(engine, optimizer, configure)

    DeepSpeedEngine._configure_zero_optimizer = configure_addax
    ZERO_SUPPORTED_OPTIMIZERS.append(Addax)
    torch.optim.Addax = Addax  # type: ignore[attr-defined]
