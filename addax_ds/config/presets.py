"""The ready DeepSpeed JSONs of ``ds_configs/``, by name."""

import os
import re
from pathlib import Path

from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import did_you_mean

# Inside an installed package, which wins; beside the package in a checkout (setup.py).
_FOLDERS = [Path(__file__).parents[depth] / "ds_configs" for depth in (1, 2)]


def find_preset(source: str) -> str:
    """Return the path of the JSON that a bare name such as "zero3" stands for.

    Args:
        source: value of ``--deepspeed``. Files win over names; what cannot be a name is returned
            as it is.

    Raises:
        UserError: a bare name that neither a file nor a ready JSON has.
    """
    if not re.fullmatch(r"[\w-]+", source) or os.path.isfile(source):
        return source
    presets = {path.stem: path for folder in reversed(_FOLDERS) for path in folder.glob("*.json")}
    if source not in presets:
        raise UserError(
            f"There is no DeepSpeed config {source} (looked in {Path.cwd()}), nor a ready one of "
            f"this name.{did_you_mean(source, presets)} Ready are: {', '.join(sorted(presets))}."
        )
    return str(presets[source])
