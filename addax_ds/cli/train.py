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

import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

import addax_ds
from addax_ds.checkpoint import ownership, resume
from addax_ds.checkpoint.adapters import check_adapters
from addax_ds.checkpoint.identity import Run
from addax_ds.checkpoint.weights import local_slices
from addax_ds.cli.data import Data, load_data
from addax_ds.cli.outputs import Outputs, output_folder
from addax_ds.cli.summary import Duration, announce, report
from addax_ds.config.addax_config import AddaxConfig, divide_batches
from addax_ds.config.arguments import DataArguments, ModelArguments, parse_arguments
from addax_ds.data.encoding import data_digest, lengths_of
from addax_ds.distributed.collectives import (
    all_gather_object,
    check_same_on_all_ranks,
    limit_waiting,
    patient,
    raise_on_all_ranks,
    shutdown,
)
from addax_ds.distributed.nodes import nodes, replicas_of, threads_of_rank
from addax_ds.distributed.startup import init_deepspeed, launched_as_rank_zero
from addax_ds.evaluation.scored_set import ScoredSet
from addax_ds.models.adapters import Lora
from addax_ds.models.source import ModelSource
from addax_ds.models.stopping import stop_at
from addax_ds.optim.methods import BASELINES
from addax_ds.sharding.registry import back_end
from addax_ds.training.baseline import BaselineTrainer
from addax_ds.training.hub import reach_hub
from addax_ds.training.length_threshold import AutoThreshold, plan_threshold
from addax_ds.training.likelihood import check_evaluations
from addax_ds.training.steps import StepMixin, plan_steps
from addax_ds.training.trainer import AddaxTrainer
from addax_ds.utils.bf16_matmul import multiply_in_fp32
from addax_ds.utils.command_line import mistakes_end_the_program
from addax_ds.utils.dtypes import weights_dtype
from addax_ds.utils.signals import INTERRUPTED, Interrupts, ignore_sigterm, on_sigterm

logger = logging.getLogger("addax_ds.cli.train")  # also where ``-m`` calls this __main__

_PACKAGE = Path(__file__).parents[1]
_OF_ONE_RANK = ("local_rank", "output_dir")
_PREDICTIONS = "predictions_test.jsonl"
_RESULTS = ("all_results.json", "dev_results.json", "test_results.json", _PREDICTIONS)

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
    # A sweep over learning rates writes nothing, beside another run if need be.
    with nullcontext() if args.find_learning_rate else ownership.held(args):
        return _finetune(model_args, data_args, args, interrupts, trainer)


def _finetune(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: AddaxConfig,
    interrupts: Interrupts | None,
    other: TrainerClass | None,
) -> dict[str, float]:
    sharding = back_end(model_args.sharding, bool(args.deepspeed)).name
    with raise_on_all_ranks():
        replicas = replicas_of(model_args.replicas, [len(node) for node in nodes(args)])
    run = Run.of(args, args.settings, sharding)
    run = replace(run, replicas=replicas, cpu_offload=model_args.cpu_offload)
    resumed = resume.find(args.resume_from_checkpoint, args)
    template_time = _template_time(resumed)
    lora = _lora(model_args, args)
    with patient(args.ddp_timeout), raise_on_all_ranks():
        if resumed is not None:
            resumed.check(run)
            check_adapters(resumed.folder, None if lora is None else lora.settings)
        source = ModelSource.find(model_args)
        tokenizer = source.load_tokenizer()
        now = datetime.fromisoformat(template_time)
        progress = not args.disable_tqdm and args.process_index == 0
        data = load_data(data_args, tokenizer, source, now, progress=progress)
    _warn_of_dtype(source, args)
    digest = data_digest(data.train)
    planned, plan = None, None
    if data.train and args.settings.length_threshold == "auto":
        planned = _plan_threshold(source, run, data, args, resumed)
    with raise_on_all_ranks():  # the trainer does these, too, but with the model loaded
        check_evaluations(args, data.validation)
        if data.train:
            plan = plan_steps(lengths_of(data.train), args.settings, args)
            if resumed is not None:
                resumed.check(run.with_data(digest, plan[0].threshold))
    check_same_on_all_ranks(dict(_identity(args, model_args, data, digest)))
    if data.train and not args.find_learning_rate:
        ownership.claim(args, None if resumed is None else resumed.folder)
    if args.process_index == 0:
        announce(source, data, plan, args, args.settings, run, adapted=lora is not None)
    if data.train and args.push_to_hub:
        reach_hub(args)
    model = _load_model(source, args, run, lora)
    _thread_the_host(model, model_args, args)
    stop_at(model, data.turn_ends, tokenizer)
    chosen = other or (BaselineTrainer if args.method in BASELINES else AddaxTrainer)
    make = partial(chosen, planned=planned) if issubclass(chosen, AddaxTrainer) else chosen
    trainer = make(
        model,
        args,
        train_dataset=data.train or None,
        eval_dataset=data.validation,
        processing_class=tokenizer,
    )
    trainer.template_time, trainer.saves_at_end = template_time, True
    if isinstance(trainer, AddaxTrainer) and args.find_learning_rate:
        logger.info("%s", trainer.find_learning_rate())
        return {}
    outputs = Outputs()
    if data.train and not _train(trainer, data, resumed, outputs, interrupts):
        return {}
    if data.test is not None:
        metrics = trainer.evaluate(data.test, metric_key_prefix="test")
        with outputs.one("the results of the test rows"):
            if not data.train:
                _remove_results(trainer)
            trainer.save_metrics("test", {**_before(trainer), **metrics})
        with outputs.one("the answers to the test rows"):
            _save_predictions(trainer, data.test)
    with outputs.one("trainer_state.json"):
        trainer.save_state()
    results: dict[str, float] = {}
    with outputs.one("the report"):
        results = report(trainer, f"{source.label}\n{data.description}", data.metric)
    if data.train and args.push_to_hub:
        with outputs.one("the upload"):
            trainer.push_to_hub(commit_message="Model save", revision=args.hub_revision)
    outputs.require_all()
    return results


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
    metrics, dev = {**result.metrics, **_costs(trainer)}, _on_dev(trainer)
    with outputs.one("the results of the training"):
        _remove_results(trainer)
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
    if args.deepspeed:
        # On CPUs Accelerate has set up torch's process group only; from_pretrained asks DeepSpeed's
        # for the number of ranks.
        init_deepspeed()
    limit_waiting(args.ddp_timeout)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _template_time(resumed: resume.Checkpoint | None) -> str:
    """Return what chat templates read as date and time; every rank has to call it.

    It is that of the first start, on rank 0: neither another day nor another time zone, on another
    node, makes other data.
    """
    found = None if resumed is None else resumed.written.template_time
    return all_gather_object(found or datetime.now().isoformat())[0]


def _warn_of_dtype(source: ModelSource, args: AddaxConfig) -> None:
    """Warn of weights that nobody has asked to be widened."""
    stored = getattr(source.config, "dtype", None)
    narrow = stored in (torch.bfloat16, torch.float16)
    asked = {"bf16", "fp16"} & args.given_names
    if narrow and not asked and weights_dtype(args) is torch.float32:
        logger.warning(
            "The model's files have weights of %s, and they are trained in fp32, which takes twice "
            "the memory: give --bf16, or --bf16 False if it is meant.",
            str(stored).removeprefix("torch."),
        )


def _lora(model_args: ModelArguments, args: AddaxConfig) -> Lora | None:
    r, targets = model_args.lora_r, model_args.lora_target_modules
    if r is None:
        return None
    return Lora(r, model_args.lora_alpha or 2 * r, tuple(targets) if targets else None, args.seed)


def _load_model(
    source: ModelSource, args: TrainingArguments, run: Run, lora: Lora | None
) -> nn.Module:
    return source.load(
        weights_dtype(args),
        run.sharding,
        args.device,
        replicas=run.replicas,
        cpu_offload=run.cpu_offload,
        progress=not args.disable_tqdm and args.process_index == 0,
        recomputes=bool(args.activation_checkpointing),
        lora=lora,
    )


def _thread_the_host(model: nn.Module, model_args: ModelArguments, args: AddaxConfig) -> None:
    """Set the threads that update offloaded weights; every rank has to call it."""
    homes = {each.data.device.type for each in local_slices(model)}
    if args.device.type != "cpu" and "cpu" in homes:
        torch.set_num_threads(model_args.cpu_threads or threads_of_rank(args))


def _plan_threshold(
    source: ModelSource,
    run: Run,
    data: Data,
    args: AddaxConfig,
    resumed: resume.Checkpoint | None,
) -> AutoThreshold:
    """Plan ``--length_threshold auto``; every rank has to call it.

    The settings of ``args`` get the plan's L_T and its micro-batches.
    """
    fixed = None if resumed is None else resumed.written.length_threshold
    kernel = source.attn_implementation
    plan = plan_threshold(
        source.config,
        kernel,
        run.sharding,
        data.train,
        args,
        args.settings,
        fixed,
        replicas=run.replicas,
        cpu_offload=run.cpu_offload,
    )
    args.settings = replace(args.settings, length_threshold=plan.length)
    if plan.parts > 1:
        divide_batches(args, plan.parts)
        logger.info(
            "More rows would not fit: a step has %d micro-batches, of %d rows first-order and %d "
            "zeroth-order. K0 and K1 are as they were.",
            args.settings.gradient_accumulation_steps,
            args.per_device_train_batch_size,
            args.settings.per_device_zo_batch_size,
        )
    return plan


def _identity(
    args: AddaxConfig, model_args: ModelArguments, data: Data, digest: str
) -> Iterator[tuple[str, str]]:
    """Yield what has to be the same on all ranks, by names for a message."""
    yield "version of addax_ds", addax_ds.__version__
    code = sorted((*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.cpp")))
    yield "code of addax_ds", _digest(path.read_bytes() for path in code)
    yield "version of torch", torch.__version__
    for name, value in {**args.to_dict(), **vars(model_args)}.items():
        if name not in _OF_ONE_RANK:
            yield f"--{name}", str(value)
    deepspeed_config = getattr(args, "hf_deepspeed_config", None)
    if deepspeed_config is not None:
        for key, value in deepspeed_config.config.items():
            yield f"{key} in the DeepSpeed config", str(value)
    yield "training data", digest
    for name, dataset in (("validation data", data.validation), ("test data", data.test)):
        if dataset is not None:
            yield name, data_digest(dataset.examples)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _remove_results(trainer: StepMixin) -> None:
    """Remove results of other weights, if there are any; Trainer would add to them."""
    if trainer.is_world_process_zero():
        for name in _RESULTS:
            (output_folder(trainer.args) / name).unlink(missing_ok=True)


def _costs(trainer: StepMixin) -> dict[str, float]:
    """Return what the training has cost; memory is that of the rank that held most."""
    costs = trainer.costs.report()
    peak = max(all_gather_object(costs["peak_memory_bytes"]))
    return {**costs, "peak_memory_bytes": peak, "train_steps": trainer.state.global_step}


class _TestBeforeTraining(TrainerCallback):
    """Evaluates the untrained model on the test set, once the engine exists."""

    def __init__(self, trainer: StepMixin, test: ScoredSet) -> None:
        self._trainer = trainer
        self._test = test

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._trainer.evaluate(self._test, metric_key_prefix="test_before")


def _on_dev(trainer: StepMixin) -> dict[str, float]:
    """Find the dev metrics of the weights that are saved: the best ones, or those of the end."""
    best = trainer.best_step if trainer.args.load_best_model_at_end else None
    found: dict[str, float] = {}
    for entry in trainer.state.log_history:
        if "eval_loss" in entry and entry["step"] == (best or entry["step"]):
            found = {f"dev_{k.removeprefix('eval_')}": v for k, v in entry.items() if "eval_" in k}
            found["dev_step"] = entry["step"]
    return found


def _before(trainer: StepMixin) -> dict[str, float]:
    """Find the test metrics from before training in the log, which a resumed run has too."""
    for entry in trainer.state.log_history:
        found = {
            f"test_{name}_before": entry[f"test_before_{name}"]
            for name in ("accuracy", "loss")
            if f"test_before_{name}" in entry
        }
        if found:
            return found
    return {}


def _save_predictions(trainer: AddaxTrainer | BaselineTrainer, test: ScoredSet) -> None:
    """Write what the model answered to each test row, if they have answers to choose or write."""
    assert trainer.scores is not None
    rows = list(test.predictions(trainer.scores))
    if rows and trainer.is_world_process_zero():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = output_folder(trainer.args) / _PREDICTIONS
        path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
