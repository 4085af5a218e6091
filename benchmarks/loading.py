"""Memory of a ZeRO-3 rank while it loads a model from files, and while it saves one.

    python benchmarks/loading.py --shape opt-1.3b --output benchmarks/results

Random weights of a shape are written as safetensors or ``.bin`` files, and loaded on two ranks of
the ``deepspeed`` launcher, by this project and by ``from_pretrained`` of Transformers, each on
ranks of its own; both are then saved, the latter as Trainer does: gathered by DeepSpeed, written by
``save_pretrained`` on rank 0. Memory is sampled from ``/proc/self/status`` every 2 ms, above what a
rank holds before: anonymous memory, which is the process's own, and the resident set, which has
mapped files besides. Writes loading-SHAPE-FORMAT.json and prints a table.
"""

import argparse
import gc
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig
from transformers.integrations import HfDeepSpeedConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # the launcher runs this file as a script

from addax_ds.checkpoint.weights import full_shapes, local_slices, save_weights
from addax_ds.config.arguments import ModelArguments
from addax_ds.distributed.collectives import all_gather_object, shutdown
from addax_ds.distributed.startup import init_deepspeed
from addax_ds.models.source import ModelSource
from addax_ds.sharding.layout import Layout
from benchmarks.common import collect_provenance, one_thread_each
from benchmarks.live import MODELS
from studies.jobs import free_port, script

RANKS = 2
FORMATS = {
    "safetensors": ("model{suffix}.safetensors", torch.bfloat16),
    "bin": ("pytorch_model{suffix}.bin", torch.float16),  # as OPT was published
}
WAYS = ("addax_ds", "transformers")
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
}
_INTERVAL_S = 0.002
MIB = 2**20

# ---- files ---------------------------------------------------------------------------------------


def write_model(name: str, form: str, folder: Path, max_file_size: str) -> dict[str, Any]:
    """Write random weights and return what the files hold; one file is in memory at a time."""
    pattern, dtype = FORMATS[form]
    config = OPTConfig(**MODELS[name])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = full_shapes(AutoModelForCausalLM.from_config(config, dtype=dtype))
    plan = split_torch_state_dict_into_shards(
        shapes, filename_pattern=pattern, max_shard_size=max_file_size
    )
    torch.manual_seed(0)
    for file, names in plan.filename_to_tensors.items():
        weights = {n: torch.empty(shapes[n].shape, dtype=dtype).normal_(0, 0.02) for n in names}
        if form == "bin":
            torch.save(weights, folder / file)
        else:
            save_file(weights, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{pattern.format(suffix='')}.index.json").write_text(json.dumps(index))
    sizes = [(folder / file).stat().st_size for file in plan.filename_to_tensors]
    return {"files": len(sizes), "largest_file_bytes": max(sizes), "dtype": str(dtype)}


# ---- one rank ------------------------------------------------------------------------------------


class Growth:
    """Most memory of a process inside of a block, above that at its start.

    Attributes:
        peak: bytes by kind, "anonymous" and "resident".
        seconds: that the block took.
    """

    def __enter__(self) -> "Growth":
        gc.collect()
        self._start = _held()
        self.peak, self.seconds = dict.fromkeys(self._start, 0), 0.0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._began = time.perf_counter()
        self._sampler.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = round(time.perf_counter() - self._began, 2)
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        while True:
            for kind, held in _held().items():
                self.peak[kind] = max(self.peak[kind], held - self._start[kind])
            if self._ended.wait(_INTERVAL_S):
                return


def _held() -> dict[str, int]:
    keys = {"RssAnon": "anonymous", "VmRSS": "resident"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in keys:
            found[keys[key]] = 1024 * int(rest.split()[0])
    return found


def _load(way: str, folder: Path) -> Any:
    if way == "transformers":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    source = ModelSource.find(ModelArguments(model_name_or_path=str(folder)))
    return source.load(torch.bfloat16, Layout("zero3"))


def _saver(way: str, model: nn.Module, folder: Path, max_file_size: str) -> Callable[[], Any]:
    if way == "transformers":
        engine, *_ = deepspeed.initialize(model=model, config=CONFIG)

        def save_as_trainer_does() -> None:
            weights = engine._zero3_consolidated_16bit_state_dict()
            if dist.get_rank() == 0:
                engine.module.save_pretrained(
                    folder, state_dict=weights, max_shard_size=max_file_size
                )

        return save_as_trainer_does
    return lambda: save_weights(model, folder, max_file_size=max_file_size)


def measure(way: str, source: Path, target: Path, max_file_size: str) -> dict[str, Any]:
    """Load and save on the ranks of this process group; what each of them held.

    Args:
        way: one of `WAYS`.
        source: folder of the model.
        target: folder that it is saved to.
        max_file_size: such as "300MB".
    """
    live = HfDeepSpeedConfig(CONFIG)  # both look for it
    all_gather_object(None)  # gloo's first buffers
    with Growth() as loading:
        model = _load(way, source)
    share = sum(part.data.nbytes for part in local_slices(model))
    save = _saver(way, model, target, max_file_size)
    dist.barrier()
    with Growth() as saving:
        save()
    dist.barrier()
    del live
    phases = {"loading": loading, "saving": saving}
    found = {n: {**phase.peak, "seconds": phase.seconds} for n, phase in phases.items()}
    return {"way": way, "by_rank": all_gather_object({"share": share, **found})}


# ---- the table -----------------------------------------------------------------------------------


def launch(way: str, source: Path, max_file_size: str) -> dict[str, Any]:
    """Measure one way on ranks of its own; what they save is thrown away."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        result = Path(folder) / "result.json"
        words = [script("deepspeed"), "--num_gpus", str(RANKS), "--master_port", str(free_port())]
        words += [__file__, "--way", way, "--source", str(source), "--output", str(result)]
        words += ["--max_file_size", max_file_size]
        done = subprocess.run(words, env=one_thread_each(), capture_output=True, text=True)
        if not result.exists():
            raise RuntimeError(f"{shlex.join(words)} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(result.read_text())


def table(results: list[dict[str, Any]]) -> list[str]:
    """Return lines in MiB: least and most over the rounds, each the larger of the ranks."""
    lines = [f"| MiB at the peak | {' | '.join(WAYS)} |", "|---|---|---|"]
    for phase, kind in (
        *(("loading", kind) for kind in ("anonymous", "resident")),
        *(("saving", kind) for kind in ("anonymous", "resident")),
    ):
        cells = []
        for way in WAYS:
            peaks = [
                max(rank[phase][kind] for rank in result["by_rank"]) / MIB
                for result in results
                if result["way"] == way
            ]
            low, high = round(min(peaks)), round(max(peaks))
            cells.append(f"{low}" if low == high else f"{low} to {high}")
        lines.append(f"| {phase}, {kind} memory | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure one way as a rank, or all of them, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, default="opt-350m")
    parser.add_argument("--format", choices=FORMATS, default="safetensors")
    parser.add_argument("--max_file_size", default="300MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="folder; of a rank, a file")
    parser.add_argument("--way", choices=WAYS, help="measure this one as a rank")
    parser.add_argument("--source", type=Path, help="folder of the model, likewise")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_args()
    size = arguments.max_file_size
    if arguments.way:
        torch.set_num_threads(1)
        init_deepspeed()
        target = arguments.output.parent / "saved"
        found = measure(arguments.way, arguments.source, target, size)
        if dist.get_rank() == 0:
            arguments.output.write_text(json.dumps(found))
        shutdown()
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        files = write_model(arguments.shape, arguments.format, source, size)
        for _ in range(arguments.rounds):
            results += [launch(way, source, size) for way in WAYS]
    share = max(rank["share"] for rank in results[0]["by_rank"])
    print(f"{arguments.shape}, {files}, share of a rank {share / MIB:.0f} MiB")
    print("\n".join(table(results)))
    report = {
        "shape": arguments.shape,
        "ranks": RANKS,
        **files,
        "circumstances": collect_provenance(),
    }
    path = arguments.output / f"loading-{arguments.shape}-{arguments.format}.json"
    path.write_text(json.dumps({**report, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
