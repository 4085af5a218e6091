"""The recipe behind ``launch/train.py``: arguments, data, model, train, evaluate, save.

Features: the tasks of the papers; tasks, files and data sets of one's own; any causal language
model of Transformers, also out of a GGUF file; all weights or LoRA adapters; DeepSpeed ZeRO-3 with
parameter offload, FSDP2, or the whole model on each rank; bf16, fp16 or fp32 weights; a search for
the learning rate; resuming, also on another number of ranks; evaluation during training on the dev
rows, and on the test rows once at the end (of the demo and of files before training, too); without
training rows, the model as it is on the test rows.

It writes to ``output_dir``: ``model/`` (a folder for ``from_pretrained``), ``all_results.json``,
``train_results.json``, ``dev_results.json``, ``test_results.json``, ``predictions_test.jsonl``,
``trainer_state.json``, ``training.png``, and what ``--save_strategy`` and ``--report_to`` ask for.

Raises:
    UserError: for every mistake in arguments, configuration or data, before the model is loaded
        wherever it can be known by then.
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from addax_ds.checkpoint import ownership, resume
from addax_ds.checkpoint.weights import local_slices
from addax_ds.cli.data import Data
from addax_ds.cli.outputs import Outputs, output_folder
from addax_ds.cli.prepare import Prepared, check_same_arguments, prepare
from addax_ds.cli.results import (
    dev_metrics,
    metrics_before_training,
    remove_results,
    save_predictions,
    training_costs,
)
from addax_ds.cli.summary import Duration, announce, report
from addax_ds.config.addax_config import AddaxConfig
from addax_ds.config.arguments import DataArguments, ModelArguments, parse_arguments
from addax_ds.distributed.collectives import (
    limit_waiting,
    patient,
    raise_on_all_ranks,
    shutdown,
)
from addax_ds.distributed.nodes import threads_of_rank
from addax_ds.distributed.startup import launched_as_rank_zero
from addax_ds.evaluation.scored_set import ScoredSet
from addax_ds.optim.methods import BASELINES
from addax_ds.training.baseline import BaselineTrainer
from addax_ds.training.hub import reach_hub
from addax_ds.training.steps import StepMixin
from addax_ds.training.trainer import AddaxTrainer
from addax_ds.utils.bf16_matmul import multiply_in_fp32
from addax_ds.utils.command_line import mistakes_end_the_program
from addax_ds.utils.dtypes import weights_dtype
from addax_ds.utils.signals import INTERRUPTED, Interrupts, ignore_sigterm, on_sigterm

logger = logging.getLogger("addax_ds.cli.train")  # also where ``-m`` calls this __main__

TrainerClass = type[BaselineTrainer] | type[AddaxTrainer]


def main(argv: Sequence[str] | None = None, trainer: TrainerClass | None = None) -> None:
    """Run `finetune` as a program: a user's mistake is a sentence and exit status 1.

    Ctrl-C while it trains saves a checkpoint. Whenever it comes, the exit status is 130.
    """
    interrupts = Interrupts()
    with mistakes_end_the_program():  # on every rank: a mistake may be on one machine only
        finetune(argv, interrupts, trainer)
    shutdown()
    ignore_sigterm()  # a launcher may send it again
    if interrupts.received:
        raise SystemExit(INTERRUPTED)


def finetune(
    argv: Sequence[str] | None = None,
    interrupts: Interrupts | None = None,
    trainer: TrainerClass | None = None,
) -> dict[str, float]:
    """Fine-tune as the arguments say; return, on rank 0, what ``all_results.json`` holds.

    ``output_dir`` belongs to this run until it has ended (`addax_ds.checkpoint.ownership`).

    Args:
        argv: see `parse_arguments`.
        interrupts: notes Ctrl-C, for the training to stop; None leaves it to Python.
        trainer: takes the steps in place of the method's own.
    """
    _start_logging()
    model_args, data_args, args = parse_arguments(argv)
    _set_up(args, model_args)
    check_same_arguments(model_args, args)
    # A sweep over learning rates writes nothing, beside another run if need be.
    with nullcontext() if args.find_learning_rate else ownership.held(args):
        return _finetune(model_args, data_args, args, interrupts, trainer)


def _finetune(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: AddaxConfig,
    interrupts: Interrupts | None,
    trainer_class: TrainerClass | None,
) -> dict[str, float]:
    prepared = prepare(model_args, data_args, args)
    data = prepared.data
    with patient(args.ddp_timeout), raise_on_all_ranks():  # rank 0 plans, and others wait
        if args.process_index == 0:
            announce(prepared, args)
    if data.train and args.push_to_hub:
        reach_hub(args)
    trainer = _make_trainer(prepared, model_args, args, trainer_class)
    if isinstance(trainer, AddaxTrainer) and args.find_learning_rate:
        logger.info("%s", trainer.find_learning_rate())
        return {}
    outputs = Outputs()
    if data.train and not _train(trainer, data, prepared.resumed, outputs, interrupts):
        return {}
    if data.test is not None:
        _test(trainer, data.test, outputs, has_trained=bool(data.train))
    with outputs.one("trainer_state.json"):
        trainer.save_state()
    results: dict[str, float] = {}
    with outputs.one("the report"):
        results = report(trainer, f"{prepared.source.label}\n{data.description}", data.metric)
    if data.train and args.push_to_hub:
        with outputs.one("the upload"):
            trainer.push_to_hub(commit_message="Model save", revision=args.hub_revision)
    outputs.require_all()
    return results


def _make_trainer(
    prepared: Prepared,
    model_args: ModelArguments,
    args: AddaxConfig,
    trainer_class: TrainerClass | None,
) -> AddaxTrainer | BaselineTrainer:
    """Load the model and give it to a trainer; every rank has to call it."""
    model = _load_model(prepared, args)
    _thread_the_host(model, model_args, args)
    chosen = trainer_class or (BaselineTrainer if args.method in BASELINES else AddaxTrainer)
    own: dict[str, Any] = {}
    if issubclass(chosen, AddaxTrainer):
        own["planned"] = prepared.planned
    return chosen(
        model,
        args,
        train_dataset=prepared.data.train or None,
        eval_dataset=prepared.data.validation,
        processing_class=prepared.tokenizer,
        template_time=prepared.template_time,
        saves_at_end=True,
        **own,
    )


def _train(
    trainer: StepMixin,
    data: Data,
    resumed: resume.Checkpoint | None,
    outputs: Outputs,
    interrupts: Interrupts | None,
) -> bool:
    """Train and save the model and what it took; return whether training came to its end.

    Raises:
        KeyboardInterrupt: Ctrl-C came when there was no step left to stop after; all is saved.
    """
    trainer.add_callback(Duration(trainer.costs))
    if data.test is not None and data.test_before:
        trainer.add_callback(_TestBeforeTraining(trainer, data.test))
    noted: AbstractContextManager[None] = nullcontext()
    if isinstance(trainer, AddaxTrainer):
        on_sigterm(trainer.request_stop)
        if interrupts is not None:
            noted = interrupts.noted(partial(_stop, trainer))
    folder = output_folder(trainer.args)
    with noted:
        result = trainer.train(resume_from_checkpoint=resumed)
        interrupted = interrupts is not None and interrupts.received
        if trainer.stopped:
            logger.info(
                "Stopped by %s after step %d, with a checkpoint in %s: %s",
                "Ctrl-C" if interrupted else "SIGTERM",
                trainer.state.global_step,
                folder,
                "no run can go on from it, for --save_only_model leaves out what a resume needs"
                if trainer.args.save_only_model
                else "go on with --resume_from_checkpoint True",
            )
            return False
        with outputs.one("the model"):
            trainer.save_complete_model(folder / "model")
    if interrupts is not None and interrupts.received:
        raise KeyboardInterrupt
    metrics = {**result.metrics, **training_costs(trainer)}
    dev = dev_metrics(trainer)
    with outputs.one("the results of the training"):
        remove_results(trainer)
        trainer.save_metrics("train", metrics)
        if dev:
            trainer.save_metrics("dev", dev)
    with outputs.one("trainer_state.json"):
        trainer.save_state()  # again after the test rows, if these end well
    return True


def _stop(trainer: AddaxTrainer) -> None:
    trainer.request_stop()
    logger.info(
        "\nCtrl-C: the run ends after this step, with a checkpoint. Another one ends it at once, "
        "without."
    )


def _test(
    trainer: AddaxTrainer | BaselineTrainer, test: ScoredSet, outputs: Outputs, *, has_trained: bool
) -> None:
    """Evaluate on the test rows, and save metrics and answers."""
    metrics = trainer.evaluate(test, metric_key_prefix="test")
    with outputs.one("the results of the test rows"):
        if not has_trained:
            remove_results(trainer)
        trainer.save_metrics("test", {**metrics_before_training(trainer), **metrics})
    with outputs.one("the answers to the test rows"):
        save_predictions(trainer, test)


# ---- run ---------------------------------------------------------------------------------------


def _start_logging() -> None:
    """Let rank 0 alone speak, except for errors: before the arguments, which may be warned of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("addax_ds")
    package.handlers = [handler]
    package.setLevel(logging.INFO if launched_as_rank_zero() else logging.ERROR)


def _set_up(args: TrainingArguments, model_args: ModelArguments) -> None:
    """Set threads, matrix products, and the collectives' library and time limit."""
    if args.device.type == "cpu":
        torch.set_num_threads(model_args.cpu_threads or 1)
        multiply_in_fp32()
    limit_waiting(args.ddp_timeout)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _load_model(prepared: Prepared, args: TrainingArguments) -> nn.Module:
    return prepared.source.load(
        weights_dtype(args),
        prepared.layout,
        args.device,
        progress=not args.disable_tqdm and args.process_index == 0,
        recomputes=bool(args.activation_checkpointing),
        lora=prepared.lora,
    )


def _thread_the_host(model: nn.Module, model_args: ModelArguments, args: AddaxConfig) -> None:
    """Set the threads that update offloaded weights; every rank has to call it."""
    homes = {each.data.device.type for each in local_slices(model)}
    if args.device.type != "cpu" and "cpu" in homes:
        torch.set_num_threads(model_args.cpu_threads or threads_of_rank(args))


class _TestBeforeTraining(TrainerCallback):
    """Evaluates the untrained model on the test set, once the engine exists."""

    def __init__(self, trainer: StepMixin, test: ScoredSet) -> None:
        self._trainer = trainer
        self._test = test

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._trainer.evaluate(self._test, metric_key_prefix="test_before")


if __name__ == "__main__":
    main()
