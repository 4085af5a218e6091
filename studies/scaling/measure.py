"""Measures one point; runs on each of its ranks.

``python -m studies.scaling.measure FOLDER`` under a launcher. ``FOLDER/point.json`` is the point;
rank 0 writes ``FOLDER/measured.json``.

Steps are taken by the trainers of ``launch/train.py`` in one training: warm-up steps, steps that
are only timed, and steps with instruments, whose total is another where phases do not overlap.
All ranks begin a step together.
"""

import json
import os
import statistics
import sys
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from addax_ds.config.addax_config import AddaxConfig
from addax_ds.data.examples import NO_LOSS, Example
from addax_ds.distributed.collectives import all_gather_object, shutdown
from addax_ds.distributed.startup import init_deepspeed
from addax_ds.optim.methods import BASELINES, ZEROTH_ORDER
from addax_ds.sharding.registry import back_end_of
from addax_ds.training.baseline import BaselineTrainer
from addax_ds.training.costs import peak_memory
from addax_ds.training.steps import StepMixin
from addax_ds.training.trainer import AddaxTrainer
from addax_ds.utils.bf16_matmul import multiply_in_fp32
from studies.collectives import Collectives, Traffic
from studies.provenance import collect_provenance
from studies.scaling.instruments import instrumented
from studies.scaling.model import random_model
from studies.scaling.phases import PhaseTimer
from studies.scaling.point import Point

WARM_UP_STEPS = 3
"""DeepSpeed follows its recorded order of modules from the third step on."""

MEASURED = "measured.json"
_SMALL_LEARNING_RATE = 1e-6  # at 0 the kernels would leave work out


@dataclass
class Steps:
    """Measurements of this rank, a list entry a step.

    Attributes:
        seconds: of the steps that are only timed.
        phases: seconds by phase, of the steps with instruments.
        collectives: of the same steps.
    """

    seconds: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    collectives: list[list[Collectives]] = field(default_factory=list)


class Watch(TrainerCallback):
    """Times ``count`` steps after the warm-up, and watches as many more with instruments."""

    def __init__(self, trainer: StepMixin, count: int) -> None:
        self.steps = Steps()
        self._trainer = trainer
        self._first_timed = WARM_UP_STEPS
        self._first_watched = WARM_UP_STEPS + count
        self._traffic = Traffic()
        self._timer = PhaseTimer(synchronize=self._synchronize)
        self._instruments = ExitStack()
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let all ranks begin together."""
        if state.global_step == self._first_watched:
            instruments = instrumented(self._trainer, self._timer, self._traffic)
            self._instruments.enter_context(instruments)
        self._synchronize()
        dist.barrier()
        self._traffic.take()
        if state.global_step >= self._first_watched:
            self._timer.start()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note what the step took."""
        step = state.global_step - 1
        if step >= self._first_watched:
            self.steps.phases.append(self._timer.stop())
            self.steps.collectives.append(self._traffic.take())
        elif step >= self._first_timed:
            self._synchronize()
            self.steps.seconds.append(time.perf_counter() - self._began)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the instruments away."""
        self._instruments.close()

    def _synchronize(self) -> None:
        if self._trainer.args.device.type != "cpu":
            torch.accelerator.synchronize()


def measure(
    point: Point, steps: int, ds_config: dict[str, Any] | None, folder: Path
) -> dict[str, Any]:
    """Train on the point and return what it took, the same on every rank.

    Args:
        point: what to measure.
        steps: so many steps are timed, and as many watched.
        ds_config: what DeepSpeed's JSON holds; None for another back end.
        folder: for what Trainer wants to write.
    """
    args = _arguments(point, WARM_UP_STEPS + 2 * steps, ds_config, folder)
    before = peak_memory(args.device)
    load_before = os.getloadavg()
    model = random_model(point.config(), point.sharding, torch.bfloat16, args.device)
    trainer = (BaselineTrainer if point.method in BASELINES else AddaxTrainer)(
        model, args, train_dataset=_examples(point)
    )
    shape_of = back_end_of(model).full_shape
    parameters = sum(shape_of(parameter).numel() for parameter in model.parameters())
    watch = Watch(trainer, steps)
    trainer.add_callback(watch)
    trainer.train()
    found = {
        "parameters": parameters,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu",
        "tokens": trainer.tokens(0),
        **summarise(all_gather_object(watch.steps)),
        "peak_memory_bytes": all_gather_object(peak_memory(args.device)),
        "memory_before_model_bytes": all_gather_object(before),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "circumstances": collect_provenance(),
    }
    if trainer.is_deepspeed_enabled:
        engine: Any = trainer.model_wrapped
        engine.destroy()
    return found


def summarise(by_rank: list[Steps]) -> dict[str, Any]:
    """Put the steps of all ranks together.

    Returns:
        ``seconds``: of each timed step, on the rank that took longest. Of the step with instruments
        that is the median on rank 0: ``phase_seconds``, which add up to ``watched_seconds``, and
        rank 0's ``collectives``.
    """
    first = by_rank[0]
    totals = [sum(phases.values()) for phases in first.phases]
    median = totals.index(statistics.median_low(totals))
    return {
        "seconds": [max(step) for step in zip(*(rank.seconds for rank in by_rank), strict=True)],
        "phase_seconds": first.phases[median],
        "watched_seconds": totals[median],
        "collectives": [asdict(c) | {"sent": c.sent} for c in first.collectives[median]],
    }


def _arguments(
    point: Point, max_steps: int, ds_config: dict[str, Any] | None, folder: Path
) -> AddaxConfig:
    return AddaxConfig(
        output_dir=str(folder / "trainer"),
        method=point.method,
        length_threshold=point.first_order_length if point.method == "addax" else None,
        per_device_zo_batch_size=point.zo_rows if point.method in ZEROTH_ORDER else None,
        per_device_train_batch_size=point.zo_rows if point.method == "mezo" else point.fo_rows,
        desync_check_steps=0,
        max_steps=max_steps,
        learning_rate=_SMALL_LEARNING_RATE,
        lr_scheduler_type="constant",
        bf16=True,
        activation_checkpointing=point.activation_checkpointing,
        deepspeed=ds_config,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _examples(point: Point) -> list[Example]:
    """Return random sequences, as many as the global batches of one step need."""
    config: Any = point.config().get_text_config()
    generator = np.random.default_rng(0)

    def example(length: int) -> Example:
        ids = generator.integers(4, config.vocab_size, length, dtype=np.int32)
        labels = np.full(length, NO_LOSS, np.int32)
        labels[-point.target_tokens :] = ids[-point.target_tokens :]
        return Example(ids, labels, "random")

    long, short = point.ranks * point.zo_rows, point.ranks * point.fo_rows
    if point.method != "addax":
        return [example(point.length) for _ in range(max(long, short))]
    lengths = [point.length] * long + [point.first_order_length] * short
    return [example(length) for length in lengths]


def main() -> None:
    """Measure the point of a folder."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "point.json").read_text())
    # With it, DeepSpeed sets up 69 MB of shared memory a rank for inference and never removes it.
    os.environ.pop("LOCAL_SIZE", None)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    multiply_in_fp32()
    init_deepspeed()
    point = Point(**job["point"])
    assert dist.get_world_size() == point.ranks
    found = measure(point, job["steps"], job["deepspeed"], folder)
    if dist.get_rank() == 0:
        (folder / MEASURED).write_text(json.dumps(found, indent=1) + "\n")
    shutdown()


if __name__ == "__main__":
    main()
