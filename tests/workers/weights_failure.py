"""Saves weights where one rank cannot write; prints what each rank is told."""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from addax_ds import UserError
from addax_ds.checkpoint import weights
from tests.support.models import tiny_opt
from tests.workers.teardown import shut_down

BAD_RANK = 1


def fail(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    if dist.get_rank() == BAD_RANK:
        weights.save_file = fail
    try:
        weights.save_weights(tiny_opt(), folder / "model", max_file_size="100KB")
    except UserError as error:
        (folder / f"told-{dist.get_rank()}").write_text(str(error))
    shut_down()


if __name__ == "__main__":
    main()
