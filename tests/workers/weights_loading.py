"""Loads models sharded by FSDP2 and whole, and compares them; measures memory.

``FOLDER/<name>`` holds the models; `LARGE` is the one that is measured.
"""

import gc
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from addax_ds.arguments import ModelArguments
from addax_ds.model_source import ModelSource
from tests.workers.teardown import shut_down

LARGE = "large"
DEVICE = torch.device("cpu")


def load(folder: Path, sharded: bool) -> nn.Module:
    source = ModelSource.find(ModelArguments(model_name_or_path=str(folder)))
    if sharded:
        return source.load_fsdp2(torch.bfloat16, DEVICE)
    return source.load(torch.bfloat16)


def compare(folder: Path) -> dict[str, Any]:
    """Load both ways; say in which names the two models differ, and what was warned of."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: lines.append(entry.getMessage())  # type: ignore[method-assign]
    logging.getLogger("addax_ds").addHandler(handler)
    model, wanted = load(folder, sharded=True), load(folder, sharded=False)
    logging.getLogger("addax_ds").removeHandler(handler)
    tensors = {n: p.full_tensor() for n, p in model.named_parameters(remove_duplicate=False)}
    tensors |= dict(model.named_buffers())
    expected = dict(wanted.named_parameters(remove_duplicate=False)) | dict(wanted.named_buffers())
    assert tensors.keys() == expected.keys()
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return {
            "different": [
                n
                for n, t in tensors.items()
                if t.dtype != expected[n].dtype or not torch.equal(t, expected[n])
            ],
            "logits": torch.equal(model(tokens).logits, wanted(tokens).logits),
            "parameters": [len(list(m.parameters())) for m in (model, wanted)],
            "generation": model.generation_config.to_dict() == wanted.generation_config.to_dict(),
            "config": model.config.to_dict() == wanted.config.to_dict(),
            "training": model.training,
            "warnings": lines,
        }


class Memory:
    """Peak growth of this process's own memory in bytes, mapped files left out."""

    def __enter__(self) -> "Memory":
        gc.collect()
        self._ended = threading.Event()
        self._start = self._peak = _own_memory()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        self.growth = self._peak - self._start

    def _watch(self) -> None:
        while not self._ended.wait(0.0005):
            self._peak = max(self._peak, _own_memory())


def _own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(s.split()[1]) for s in lines if s.startswith(("RssAnon:", "RssShmem:")))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {
        path.name: compare(path)
        for path in sorted(folder.iterdir())
        if path.is_dir() and path.name != LARGE
    }
    for name, sharded in (("sharded", True), ("whole", False)):
        with Memory() as memory:
            model = load(folder / LARGE, sharded)
        found[name] = memory.growth
        del model
    torch.save(found, folder / f"loading-rank{dist.get_rank()}.pt")
    shut_down()


if __name__ == "__main__":
    main()
