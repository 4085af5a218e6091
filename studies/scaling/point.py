"""One point of the study: a model, a method, a length and a number of ranks."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, OPTConfig, PreTrainedConfig

from addax_ds.optim.methods import BASELINES, IN_PLACE, ZEROTH_ORDER, Method
from addax_ds.planner.shapes import OPT_FAMILY, find_shape, opt_shape
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import did_you_mean

SHORTENING = 4
"""So many times shorter than a zeroth-order sequence of addax is one of its first-order ones."""

_CONFIG_NAME = "config.json"
_DIGITS = 8


SMALL_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": opt_shape(128, 3, 2, ffn_dim=256, vocab_size=1003, max_position_embeddings=66),
    "opt-11m": opt_shape(192, 2, 3),
    "opt-34m": opt_shape(384, 8, 6),
}
"""Arguments of `OPTConfig` below the published sizes. All but "tiny" keep OPT's vocabulary of
50272 and its 2048 positions."""

_BUILT_IN = {**SMALL_SHAPES, **OPT_FAMILY}


@dataclass(frozen=True)
class Point:
    """Subject of one launch: a model, a method and a layout.

    Each rank has as many rows whatever the number of ranks is. All sequences of a batch have one
    length, and the methods see the same: zeroth-order batches are of ``length`` tokens, and so are
    first-order ones, except those of addax, which keeps its backward to short sequences: a quarter
    of ``length``, its L_T.

    Attributes:
        model: a built-in shape, or a folder or ``config.json``.
        method: of ``launch/train.py``.
        ranks: processes, one a GPU.
        length: tokens of a sequence.
        sharding: "zero3" or "fsdp2".
        zo_rows: zeroth-order rows of a rank, for the methods that have them.
        fo_rows: first-order rows of a rank, likewise.
        target_tokens: predicted tokens of a sequence.
        activation_checkpointing: whether blocks are recomputed in backward.
    """

    model: str
    method: Method
    ranks: int
    length: int
    sharding: str = "zero3"
    zo_rows: int = 4
    fo_rows: int = 4
    target_tokens: int = 1
    activation_checkpointing: bool = False

    @property
    def first_order_length(self) -> int:
        """Tokens of a first-order sequence."""
        return self.length // SHORTENING if self.method == "addax" else self.length

    @property
    def workload(self) -> str:
        """Names what points over different numbers of ranks have in common."""
        return f"{self._label}-{self.method}-{self.length}"

    @property
    def _label(self) -> str:
        """Names the model; one in a file also by its content, as many have the same file name."""
        path = Path(self.model)
        if not path.exists():
            return self.model.replace("/", "-")
        file = Path(os.path.abspath(path / _CONFIG_NAME if path.is_dir() else path))
        name = file.parent.name if file.name == _CONFIG_NAME else file.stem
        return f"{name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:_DIGITS]}"

    @property
    def name(self) -> str:
        """Folder of the point."""
        return f"{self.workload}-x{self.ranks}"

    def config(self) -> PreTrainedConfig:
        """Return the model's configuration, without dropout where it is built in.

        Raises:
            UserError: if there is no such model.
        """
        if Path(self.model).exists():
            try:
                return AutoConfig.for_model(**json.loads(find_shape(self.model).config))
            except UserError as error:  # which names the planner's flag
                raise UserError(str(error).replace("--model ", "--models ", 1)) from error
        known = self.model.removeprefix("facebook/")
        if known not in _BUILT_IN:
            raise UserError(
                f"--models {self.model}: there is no such folder or config.json, and it is none of "
                f"{', '.join(_BUILT_IN)}.{did_you_mean(known, _BUILT_IN)}"
            )
        return OPTConfig(**_BUILT_IN[known], dropout=0.0)

    def check(self) -> None:
        """Check what would fail only after processes have been started.

        Raises:
            UserError: for a point that cannot be run.
        """
        config: Any = self.config().get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or self.length
        shortest = SHORTENING * (self.target_tokens + 1)
        if not shortest <= self.length <= positions:
            raise UserError(
                f"--lengths {self.length}: {self.model} with {self.target_tokens} predicted tokens "
                f"takes {shortest} to {positions}"
            )
        if self.sharding != "zero3" and self.method in BASELINES:
            raise UserError(
                f"--methods {self.method}: DeepSpeed's optimizers run under --sharding zero3 "
                f"alone; under {self.sharding} there are {', '.join(IN_PLACE)}"
            )

    def as_json(self) -> dict[str, Any]:
        """Return the fields that have an effect, as `Point` takes them."""
        fields = asdict(self)
        if self.method not in ZEROTH_ORDER:
            del fields["zo_rows"]
        if self.method == "mezo":
            del fields["fo_rows"]
        return fields


def sweep(
    models: Iterable[str],
    methods: Iterable[Method],
    ranks: Iterable[int],
    lengths: Iterable[int],
    **common: Any,
) -> list[Point]:
    """Return all combinations, checked, in an order in which methods take turns.

    Raises:
        UserError: see `Point.check`; also for two points of one name, which would share a folder.
    """
    grid = itertools.product(models, ranks, lengths, methods)
    points = [
        Point(model=model, method=method, ranks=number, length=length, **common)
        for model, number, length, method in grid
    ]
    named: dict[str, Point] = {}
    for point in points:
        point.check()
        other = named.setdefault(point.name, point)
        if other is not point:
            models = " ".join(dict.fromkeys((other.model, point.model)))
            raise UserError(
                f"{point.name} would be measured twice, for --models {models}: give each model, "
                "method, number of ranks and length once"
            )
    return points
