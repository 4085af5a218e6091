"""Loads folders that cannot be loaded, on some ranks or all; writes down what each rank is told.

``FOLDER/<case>`` is what every rank loads; ``FOLDER/<case>-<rank>`` comes before it on that rank.
"""

import json
import logging
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from addax_ds import UserError
from addax_ds.checkpoint import weight_files
from tests.workers.loading_cases import RUN_ON, load
from tests.workers.teardown import shut_down

DAMAGED_LATER = "damaged-later"


def told(folder: Path, layout: str) -> str:
    rank, fill = dist.get_rank(), weight_files._fill
    own = folder.with_name(f"{folder.name}-{rank}")

    def unreadable(*_: object) -> None:
        raise OSError(5, "Input/output error")

    if folder.name == DAMAGED_LATER and rank == 1:
        weight_files._fill = unreadable
    try:
        load(own if own.exists() else folder, layout, torch.bfloat16)
    except UserError as error:
        return str(error)
    finally:
        weight_files._fill = fill
    return ""


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    logging.getLogger("addax_ds").setLevel(logging.ERROR)
    deepspeed.init_distributed()
    found = {case: {layout: told(folder / case, layout) for layout in RUN_ON[2]} for case in cases}
    (folder / f"told-{dist.get_rank()}.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
