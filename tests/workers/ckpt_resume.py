"""Finds checkpoints in prepared folders on each rank; ``found-<rank>.json`` has what came of it.

``python -m tests.workers.ckpt_resume FOLDER``: for each folder in it, in its ``rank-<rank>`` or, if
there is none, in itself. The file ``wanted-<rank>`` says what to resume from, else it is True.
"""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from addax_ds import UserError
from addax_ds.checkpoint import resume
from tests.workers.teardown import shut_down


def main() -> None:
    root = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: warnings.append(entry.getMessage())  # type: ignore[method-assign]
    logging.getLogger("addax_ds").addHandler(handler)
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        own = folder / f"rank-{rank}"
        wanted_file = folder / f"wanted-{rank}"
        args = SimpleNamespace(
            process_index=rank,
            local_process_index=0 if own.exists() else rank,
            output_dir=str(own if own.exists() else folder),
            should_save=own.exists() or rank == 0,
            save_on_each_node=own.exists(),
        )
        warnings.clear()
        try:
            wanted = wanted_file.read_text() if wanted_file.exists() else True
            checkpoint = resume.find(wanted, args)
            result = {"found": None if checkpoint is None else str(checkpoint.folder)}
        except UserError as error:
            result = {"error": str(error)}
        found[folder.name] = {**result, "warnings": list(warnings)}
    (root / f"found-{rank}.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
