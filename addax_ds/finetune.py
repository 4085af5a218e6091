"""The recipe behind ``launch/train.py``: arguments, data, model, train, evaluate, save.

Features: own JSONL data or the embedded demo task; any causal language model of Transformers;
DeepSpeed ZeRO-3 with parameter offload, FSDP2, or the whole model on each rank; bf16 or fp32
weights; resuming, also on another number of ranks; evaluation during training on the validation
set, and on the test set before and after.

It writes to ``output_dir``: ``model/`` (a folder for ``from_pretrained``), ``all_results.json``,
``test_results.json``, ``train_results.json``, ``trainer_state.json``, ``training.png``, and what
``--save_strategy`` and ``--report_to`` ask for.

Raises:
    UserError: for every mistake in arguments, configuration or data, before the model is loaded
        wherever it can be known by then.
"""

import gc
import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_model_param_count

import addax_ds
from addax_ds import plotting, resume
from addax_ds.agreement import all_ranks_or_none, check_same_everywhere
from addax_ds.arguments import (
    DataArguments,
    ModelArguments,
    configure,
    parse_arguments,
)
from addax_ds.data.encoding import Example, encode
from addax_ds.data.records import Record, prompt_completion, read_jsonl
from addax_ds.errors import UserError
from addax_ds.evaluation import Choice, EvaluationSet
from addax_ds.model_source import ModelSource
from addax_ds.run import Run, data_digest
from addax_ds.settings import weights_dtype
from addax_ds.tasks import SST2_DEMO, ChoiceRow
from addax_ds.termination import on_sigterm
from addax_ds.trainer import AddaxTrainer, plan_steps

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
_OF_ONE_RANK = ("local_rank", "output_dir")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `finetune` as a program: a user's mistake is a sentence and exit status 1."""
    try:
        finetune(argv)
    except UserError as error:
        # Every rank says it: the mistake may be on one machine only.
        print(f"\naddax_ds: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    if dist.is_initialized():
        # Without an orderly end, ranks that exit at different times abort now and then.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def finetune(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Fine-tune as the arguments say; return, on rank 0, what ``all_results.json`` holds."""
    model_args, data_args, addax_args, args = parse_arguments(argv)
    _set_up(args, model_args)
    with all_ranks_or_none():
        settings = configure(args, addax_args)
        sharding = model_args.sharding or ("zero3" if args.deepspeed else "none")
    run = Run.of(args, settings, sharding)
    resumed = resume.find(args.resume_from_checkpoint, args, run)
    with all_ranks_or_none():
        source = ModelSource.find(model_args)
        tokenizer = source.load_tokenizer()
        data = _load_data(data_args, tokenizer, source)
        # The trainer does these, too, but with the model loaded.
        streams, _ = plan_steps(data.train, settings, args)
        if resumed is not None:
            resume.check(resumed, run.with_data(data.train, streams.threshold))
    check_same_everywhere(dict(_identity(args, model_args, addax_args, train=data.train)))
    trainer = AddaxTrainer(
        _load_model(source, args, sharding),
        args,
        settings,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
    )
    _announce(trainer, source.label, data)
    if data.test is not None:
        trainer.add_callback(_TestBeforeTraining(trainer, data.test))

    on_sigterm(trainer.request_stop)
    result = trainer.train(resume_from_checkpoint=resumed)
    if trainer.stopped:
        logger.info(
            "Stopped by SIGTERM after step %d, with a checkpoint in %s: go on with "
            "--resume_from_checkpoint True",
            trainer.state.global_step,
            _folder(args),
        )
        return {}
    trainer.save_complete_model(_folder(args) / "model")
    trainer.save_metrics("train", result.metrics)
    if data.test is not None:
        metrics = trainer.evaluate(data.test, metric_key_prefix="test")
        trainer.save_metrics("test", {**_before(trainer), **metrics})
    trainer.save_state()
    return _report(trainer, f"{source.label}\n{data.description}")


# ---- data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    description: str
    train: list[Example]
    validation: EvaluationSet | None
    test: EvaluationSet | None


def _load_data(
    data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, source: ModelSource
) -> _Data:
    limits = {
        "max_length": data_args.max_length,
        "model_positions": source.positions,
        "vocabulary_size": source.vocabulary_size,
    }
    if data_args.train_file is None:
        rows = SST2_DEMO.rows()
        answers = [prompt_completion(r.prompt, r.answer, r.origin, False) for r in rows["train"]]
        return _Data(
            SST2_DEMO.description,
            encode(answers, tokenizer, **limits),
            _choices(rows["dev"], tokenizer, limits),
            None if data_args.skip_test else _choices(rows["test"], tokenizer, limits),
        )

    def read(path: str) -> list[Example]:
        records = read_jsonl(path, tokenizer, append_eos=data_args.append_eos)
        return encode(records, tokenizer, **limits)

    train = read(data_args.train_file)
    test_file = None if data_args.skip_test else data_args.test_file
    validation, test = (
        None if path is None else EvaluationSet(read(path))
        for path in (data_args.validation_file, test_file)
    )
    return _Data(data_args.train_file, train, validation, test)


def _choices(
    rows: Sequence[ChoiceRow], tokenizer: PreTrainedTokenizerBase, limits: dict[str, int | None]
) -> EvaluationSet:
    records: list[Record] = []
    choices: list[Choice] = []
    for row in rows:
        choices.append(Choice(len(records), len(row.candidates), row.label))
        records += [prompt_completion(row.prompt, c, row.origin, False) for c in row.candidates]
    return EvaluationSet(encode(records, tokenizer, **limits), choices)


# ---- run ---------------------------------------------------------------------------------------


def _set_up(args: TrainingArguments, model_args: ModelArguments) -> None:
    """Set threads and logging; rank 0 alone speaks, except for warnings."""
    if args.device.type == "cpu":
        torch.set_num_threads(model_args.cpu_threads)
    if args.deepspeed:
        # On CPUs Accelerate has set up torch's process group only; from_pretrained asks DeepSpeed's
        # for the number of ranks.
        deepspeed.init_distributed()
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("addax_ds")
    package.handlers = [handler]
    package.setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)


def _load_model(source: ModelSource, args: TrainingArguments, sharding: str) -> nn.Module:
    dtype = weights_dtype(args)
    if sharding == "fsdp2":
        return source.load_fsdp2(dtype, args.device)
    return source.load(dtype)


def _identity(
    args: TrainingArguments, *more: Any, train: Sequence[Example]
) -> Iterator[tuple[str, str]]:
    """Yield what has to be the same on all ranks, by names for a message."""
    yield "version of addax_ds", addax_ds.__version__
    code = sorted((*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.cpp")))
    yield "code of addax_ds", _digest(path.read_bytes() for path in code)
    yield "version of torch", torch.__version__
    for settings in (args.to_dict(), *map(vars, more)):
        for name, value in settings.items():
            if name not in _OF_ONE_RANK:
                yield f"--{name}", str(value)
    deepspeed_config = getattr(args, "hf_deepspeed_config", None)
    if deepspeed_config is not None:
        for key, value in deepspeed_config.config.items():
            yield f"{key} in the DeepSpeed config", str(value)
    yield "training data", data_digest(train)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _announce(trainer: AddaxTrainer, model: str, data: _Data) -> None:
    args, settings = trainer.args, trainer.settings
    assert trainer.partition is not None
    lengths = [example.length for example in data.train]
    k0, k1 = settings.per_device_zo_batch_size, args.per_device_train_batch_size
    logger.info(
        "Model: %s, %s, %d parameters\nData:  %s, %d training examples\n%s\n"
        "Method: %s, alpha %g, zo_eps %g, learning rate %g, K0 %d, K1 %d, ranks %d\nOutput: %s",
        model,
        "bf16" if args.bf16 else "fp32",
        get_model_param_count(trainer.model),
        data.description,
        len(data.train),
        trainer.partition.describe(lengths),
        settings.method,
        settings.alpha,
        settings.zo_eps,
        args.learning_rate,
        k0 * args.world_size,
        k1 * args.world_size,
        args.world_size,
        _folder(args).resolve(),
    )


def _folder(args: TrainingArguments) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir)


class _TestBeforeTraining(TrainerCallback):
    """Evaluates the untrained model on the test set, once the engine exists."""

    def __init__(self, trainer: AddaxTrainer, test: EvaluationSet) -> None:
        self._trainer = trainer
        self._test = test

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._trainer.evaluate(self._test, metric_key_prefix="test_before")


def _before(trainer: AddaxTrainer) -> dict[str, float]:
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


def _report(trainer: AddaxTrainer, title: str) -> dict[str, float]:
    """Draw the curves, and say how it went and where everything is."""
    folder = _folder(trainer.args)
    results: dict[str, float] = {}
    if trainer.is_world_process_zero():
        plotting.training_curves(trainer.state.log_history, folder / "training.png", title)
        results = json.loads((folder / "all_results.json").read_text())
        for name in ("accuracy", "loss"):
            if f"test_{name}" in results:
                before, after = results.get(f"test_{name}_before"), results[f"test_{name}"]
                change = f"{after:.3f}" if before is None else f"{before:.3f} -> {after:.3f}"
                logger.info("Test %s: %s", name, change)
        logger.info(
            "Trained for %.0f s. Model: %s\nResults: %s\nCurves:  %s",
            results["train_runtime"],
            (folder / "model").resolve(),
            (folder / "all_results.json").resolve(),
            (folder / "training.png").resolve(),
        )
    return results
