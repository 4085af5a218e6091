"""Messages of rank 0 about a run: before it, after its first steps, and at its end."""

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback
from typing_extensions import override

from addax_ds.checkpoint.identity import Run
from addax_ds.cli.outputs import output_folder
from addax_ds.cli.prepare import Prepared
from addax_ds.config.addax_config import AddaxConfig
from addax_ds.data.batches import StepSchedule
from addax_ds.data.examples import Example, lengths_of, target_counts_of
from addax_ds.data.partition import Partition
from addax_ds.distributed.startup import launcher_patience
from addax_ds.optim.methods import ZEROTH_ORDER
from addax_ds.planner.memory import StepSpec
from addax_ds.sharding.registry import back_end
from addax_ds.training.costs import CostMeter
from addax_ds.training.memory import describe, free_memory, simpler_way, spec_of_run
from addax_ds.training.mixin import AddaxMixin
from addax_ds.training.steps import StepMixin, total_steps
from addax_ds.utils.errors import UserError
from addax_ds.utils.extras import MissingExtraError, naming_extras

logger = logging.getLogger(__name__)

_STEPS_TO_TIME = 3


def announce(prepared: Prepared, args: AddaxConfig) -> None:
    """Log model, data, method and planned memory, before the model is loaded."""
    run, data = prepared.run, prepared.data
    logger.info("Model: %s, %s", prepared.source.label, run.dtype)
    share = "a part of the model" if back_end(run.sharding).is_sharded else "the whole model"
    logger.info("Ranks: %d, sharding %s: %s on each", run.ranks, run.sharding, share)
    logger.info("Data:  %s, %d training examples", data.description, len(data.train))
    if prepared.steps is None:
        logger.info("Method: none; nothing is trained, and arguments of training have no effect")
    else:
        streams, schedule = prepared.steps
        logger.info("%s", streams.describe(lengths_of(data.train)))
        logger.info("Method: %s", _method(args, run, schedule))
        _announce_memory(prepared, streams, args)
    logger.info("Output: %s", output_folder(args).resolve())


def _announce_memory(prepared: Prepared, streams: Partition, args: AddaxConfig) -> None:
    """Log what a step takes, and whether all rows would fit through backward."""
    try:
        free = free_memory(args.device, prepared.ranks_of_node)[0]
    except UserError:
        free = None
    try:
        spec = _spec_of_streams(prepared, streams, args)
        memory = f"{spec.shape.parameters} parameters, {describe(spec, free)}"
    except UserError as error:
        logger.info("Memory: not planned, %s", error)
        return
    if prepared.lora is not None:  # the planner does not know adapters
        logger.info("Memory: if all weights were trained, %s", memory)
        return
    logger.info("Memory: %s", memory)
    if free is not None and (way := simpler_way(spec, free)):
        logger.info("Simpler: %s (docs/choosing.md)", way)


def _method(args: AddaxConfig, run: Run, schedule: StepSchedule) -> str:
    parts = [run.method]
    if run.method in ZEROTH_ORDER:
        parts += [f"{name} {run.hyperparameters[name]:g}" for name in ("alpha", "zo_eps")]
        if (directions := run.hyperparameters["zo_directions"]) > 1:
            parts.append(f"directions {directions}")
    rate = "to be found" if args.find_learning_rate else format(args.learning_rate, "g")
    parts.append(f"learning rate {rate}")
    batches = (("K0", run.zeroth_order_batch), ("K1", run.first_order_batch))
    parts += [f"{name} {size}" for name, size in batches if size]
    steps = total_steps(args, schedule)
    return ", ".join([*parts, f"ranks {run.ranks}", f"steps {steps}"])


def _spec_of_streams(prepared: Prepared, streams: Partition, args: AddaxConfig) -> StepSpec:
    source, rows = prepared.source, prepared.data.train
    return spec_of_run(
        source.config,
        source.attn_implementation,
        prepared.layout,
        (_extremes(rows, streams.zeroth_order), _extremes(rows, streams.first_order)),
        args,
    )


def _extremes(examples: Sequence[Example], indices: NDArray[np.int32]) -> list[Example]:
    """Return the longest of some examples, and the one with most targets."""
    if not len(indices):
        return []
    sizes = lengths_of(examples)[indices], target_counts_of(examples)[indices]
    return [examples[int(indices[np.argmax(size)])] for size in sizes]


class Duration(TrainerCallback):
    """Logs, after a few steps, how long the rest takes, and what a launcher may not wait for."""

    def __init__(self, costs: CostMeter) -> None:
        self._costs = costs
        self._first: tuple[int, float] | None = None
        self._step: float | None = None
        self._since = 0.0
        self._warned = False

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()
        now = state.global_step, self._costs.costs.train_seconds
        if self._first is None:  # this step was the one that warms up
            self._first = now
        elif now[0] == self._first[0] + _STEPS_TO_TIME:
            self._step = seconds = (now[1] - self._first[1]) / _STEPS_TO_TIME
            left = state.max_steps - now[0]
            logger.info(
                "A step takes %.2f s: %.0f min for the %d that are left, evaluations and "
                "checkpoints not counted",
                seconds,
                seconds * left / 60,
                left,
            )
            self._warn_of_launcher()

    @override
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()

    @override
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._warn_of_launcher(time.monotonic() - self._since)

    def _warn_of_launcher(self, checkpoint: float | None = None) -> None:
        """Warn, once, that a launcher may kill the ranks before they have saved.

        Args:
            checkpoint: seconds that one has taken; None if there was none yet.
        """
        patience = launcher_patience()
        if patience is None or self._step is None or self._warned:
            return
        launcher, limit = patience
        # Without one to go by, a checkpoint may take twice as long as the step before it.
        needed = 3 * self._step if checkpoint is None else self._step + checkpoint
        if needed <= limit:
            return
        self._warned = True
        saved = "" if checkpoint is None else f" and a checkpoint {checkpoint:.1f} s"
        logger.warning(
            "Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint. A step "
            "takes %.1f s%s, and %s kills the ranks %g s after it was told to end: %s",
            self._step,
            saved,
            launcher,
            limit,
            "start torchrun with TORCH_ELASTIC_SHUTDOWN_TIMEOUT set to more seconds"
            if launcher == "torchrun"
            else f"send SIGTERM to one rank instead (kill -TERM {os.getpid()})",
        )


def report(trainer: StepMixin, title: str, metric: str) -> dict[str, float]:
    """Draw the curves, and say how it went and where everything is.

    Args:
        trainer: has trained, or evaluated alone.
        title: of the curves.
        metric: what the data is judged by.

    Returns:
        On rank 0 what ``all_results.json`` holds.
    """
    folder = output_folder(trainer.args)
    if not trainer.is_world_process_zero():
        return {}
    results: dict[str, float] = json.loads((folder / "all_results.json").read_text())
    for name in dict.fromkeys((metric, "accuracy", "exact_match", "f1", "loss")):
        if f"test_{name}" in results:
            before, after = results.get(f"test_{name}_before"), results[f"test_{name}"]
            change = f"{after:.3f}" if before is None else f"{before:.3f} -> {after:.3f}"
            logger.info("Test %s: %s", name, change)
    if trainer.state.global_step and "train_runtime" in results:
        curves = _draw(trainer, folder / "training.png", title, metric)
        logger.info(
            "%s; the most memory of a rank: %.2f GB\nModel:   %s\nCurves:  %s",
            _duration(results, trainer.resumed_step, trainer.costs.before.train_seconds),
            results["peak_memory_bytes"] / 1e9,
            (folder / "model").resolve(),
            curves,
        )
        if (partition := trainer.partition) is not None and (left := len(partition.left_out)):
            logger.info(
                "Left out: %d of the %d training examples, longer than L_T = %d",
                left,
                left + len(partition.first_order),
                partition.threshold,
            )
        if isinstance(trainer, AddaxMixin) and (parts := trainer.worth.describe()):
            logger.info("%s", parts)
    logger.info("Results: %s", (folder / "all_results.json").resolve())
    return results


def _duration(results: dict[str, float], resumed_step: int, seconds_before: float) -> str:
    """Describe the time of the steps and of Trainer's loop, whose clock starts anew on a resume."""
    steps, seconds = results["train_steps"], results["train_seconds"]
    trained = f"Trained {steps} steps on {results['train_tokens']} tokens in {seconds:.0f} s"
    if resumed_step:
        new = steps - resumed_step
        trained += f"; {new} of them since the resume in {seconds - seconds_before:.0f} s"
    return f"{trained}, {results['train_runtime']:.0f} s with evaluations and checkpoints"


def _draw(trainer: StepMixin, path: Path, title: str, metric: str) -> str:
    """Draw the training curves; return where they are, or why there are none."""
    try:
        with naming_extras():
            from addax_ds.cli import plotting
    except MissingExtraError as error:
        return f"not drawn, {error}"
    best = trainer.best_step if trainer.args.load_best_model_at_end else None
    plotting.training_curves(trainer.state.log_history, path, title, metric, best)
    return str(path.resolve())
