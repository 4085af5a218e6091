"""One point of the study: a model, a method, a length and a number of ranks."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, OPTConfig, PreTrainedConfig

from addax_ds.data.partition import BASELINES, Method
from addax_ds.errors import UserError
from addax_ds.planner.shapes import OPT_FAMILY, find_shape

SHORTENING = 4
"""So many times shorter than a zeroth-order sequence of addax is one of its first-order ones."""


def _opt(hidden: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": hidden // 64,
        "word_embed_proj_dim": hidden,
        **more,
    }


SMALL_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _opt(128, 3, ffn_dim=256, vocab_size=1003, max_position_embeddings=66),
    "opt-11m": _opt(192, 2),
    "opt-34m": _opt(384, 8),
}
"""Arguments of `OPTConfig` below the published sizes. All but "tiny" keep OPT's vocabulary of
50272 and its 2048 positions."""


@dataclass(frozen=True)
class Point:
    """What is measured by one launch.

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
        model = Path(self.model).resolve().name if Path(self.model).exists() else self.model
        model = model.removesuffix(".json").replace("/", "-")
        return f"{model}-{self.method}-{self.length}"

    @property
    def name(self) -> str:
        """Folder of the point."""
        return f"{self.workload}-x{self.ranks}"

    def config(self) -> PreTrainedConfig:
        """Return the model's configuration, without dropout where it is built in.

        Raises:
            UserError: if there is no such model.
        """
        built_in = {**SMALL_SHAPES, **OPT_FAMILY}.get(self.model.removeprefix("facebook/"))
        if built_in is not None and not Path(self.model).exists():
            return OPTConfig(**built_in, dropout=0.0)
        return AutoConfig.for_model(**json.loads(find_shape(self.model).config))

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
                f"--methods {self.method}: DeepSpeed's optimizers run under --sharding zero3 alone"
            )

    def as_json(self) -> dict[str, Any]:
        """Return the fields, as `Point` takes them."""
        return asdict(self)


def sweep(
    models: Iterable[str],
    methods: Iterable[Method],
    ranks: Iterable[int],
    lengths: Iterable[int],
    **common: Any,
) -> list[Point]:
    """Return all combinations, checked, in an order in which methods take turns.

    Raises:
        UserError: see `Point.check`.
    """
    grid = itertools.product(models, ranks, lengths, methods)
    points = [
        Point(model=model, method=method, ranks=number, length=length, **common)
        for model, number, length, method in grid
    ]
    for point in points:
        point.check()
    return points
