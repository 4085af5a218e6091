"""What a run needs before its model is loaded: everything that can be known by then is checked."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from addax_ds.checkpoint import ownership, resume
from addax_ds.checkpoint.adapters import check_adapters
from addax_ds.checkpoint.identity import Run
from addax_ds.cli.data import Data, load_data
from addax_ds.config.addax_config import AddaxConfig, divide_batches
from addax_ds.config.arguments import DataArguments, ModelArguments
from addax_ds.data.batches import StepSchedule
from addax_ds.data.examples import data_digest, lengths_of
from addax_ds.data.partition import Partition
from addax_ds.distributed.collectives import (
    all_gather_object,
    check_same_on_all_ranks,
    patient,
    raise_on_all_ranks,
)
from addax_ds.distributed.nodes import nodes, replicas_of
from addax_ds.models.adapters import Lora
from addax_ds.models.source import ModelSource
from addax_ds.sharding.layout import Layout
from addax_ds.sharding.registry import back_end
from addax_ds.training.length_threshold import AutoThreshold, plan_threshold
from addax_ds.training.likelihood import check_evaluations
from addax_ds.training.steps import plan_steps
from addax_ds.utils.dtypes import weights_dtype
from addax_ds.utils.versions import versions

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
_OF_ONE_RANK = ("local_rank", "output_dir")


@dataclass(frozen=True)
class Prepared:
    """A run before its model is loaded, the same on all ranks.

    Attributes:
        source: of the model.
        tokenizer: of the model.
        data: all rows.
        layout: of the weights.
        ranks_of_node: how many ranks share this machine.
        run: what checkpoints say of it.
        steps: the streams, and the rows of each step; None without training rows.
        lora: adapters to train; None if all weights are trained.
        resumed: checkpoint to go on from.
        template_time: what chat templates read as date and time.
        planned: how ``--length_threshold auto`` was planned.
    """

    source: ModelSource
    tokenizer: Any
    data: Data
    layout: Layout
    ranks_of_node: int
    run: Run
    steps: tuple[Partition, StepSchedule] | None
    lora: Lora | None
    resumed: resume.Checkpoint | None
    template_time: str
    planned: AutoThreshold | None


def prepare(model_args: ModelArguments, data_args: DataArguments, args: AddaxConfig) -> Prepared:
    """Find model and data, and check all that they decide; every rank has to call it.

    ``args.settings`` get the L_T and the micro-batches of ``--length_threshold auto``. A run that
    trains claims its ``output_dir``.

    Raises:
        UserError: on all ranks, for every mistake in arguments, configuration or data.
    """
    sharding = back_end(model_args.sharding, bool(args.deepspeed)).name
    ranks = nodes(args)
    with raise_on_all_ranks():
        replicas = replicas_of(model_args.replicas, [len(node) for node in ranks])
    layout = Layout(sharding, replicas, model_args.cpu_offload)
    run = Run.of(args, sharding)
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
    planned, steps = None, None
    if data.train and args.settings.length_threshold == "auto":
        with patient(args.ddp_timeout):  # rank 0 plans, and others wait
            planned = _plan_threshold(source, layout, data, args, resumed)
    with raise_on_all_ranks():  # the trainer does these, too, but with the model loaded
        check_evaluations(args, data.validation)
        if data.train:
            steps = plan_steps(lengths_of(data.train), args)
            if resumed is not None:
                resumed.check(run.with_data(digest, steps[0].threshold))
    check_same_on_all_ranks(dict(_data_digests(data, digest)))
    if data.train and not args.find_learning_rate:
        ownership.claim(args, None if resumed is None else resumed.folder)
    return Prepared(
        source=source,
        tokenizer=tokenizer,
        data=data,
        layout=layout,
        ranks_of_node=next(len(node) for node in ranks if args.process_index in node),
        run=run,
        steps=steps,
        lora=lora,
        resumed=resumed,
        template_time=template_time,
        planned=planned,
    )


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


def _plan_threshold(
    source: ModelSource,
    layout: Layout,
    data: Data,
    args: AddaxConfig,
    resumed: resume.Checkpoint | None,
) -> AutoThreshold:
    """Plan ``--length_threshold auto``; every rank has to call it.

    The settings of ``args`` get the plan's L_T and its micro-batches.
    """
    fixed = None if resumed is None else resumed.written.length_threshold
    plan = plan_threshold(
        source.config, source.attn_implementation, layout, data.train, args, fixed
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


def check_same_arguments(model_args: ModelArguments, args: AddaxConfig) -> None:
    """Check that all ranks have the same code and arguments, on which later collectives depend.

    Every rank has to call it. Where data lie may differ; `prepare` compares what they are.

    Raises:
        UserError: on all ranks, naming what differs.
    """
    check_same_on_all_ranks(dict(_identity(model_args, args)))


def _identity(model_args: ModelArguments, args: AddaxConfig) -> Iterator[tuple[str, str]]:
    # Metadata of a package need not name the build.
    for name, version in {**versions(), "torch": torch.__version__}.items():
        yield f"version of {name}", version
    code = sorted((*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.cpp")))
    yield "code of addax_ds", _digest(path.read_bytes() for path in code)
    for name, value in {**args.to_dict(), **vars(model_args)}.items():
        if name not in _OF_ONE_RANK:
            yield f"--{name}", str(value)
    deepspeed_config = getattr(args, "hf_deepspeed_config", None)
    if deepspeed_config is not None:
        for key, value in deepspeed_config.config.items():
            yield f"{key} in the DeepSpeed config", str(value)


def _data_digests(data: Data, of_training: str) -> Iterator[tuple[str, str]]:
    yield "training data", of_training
    for name, dataset in (("validation data", data.validation), ("test data", data.test)):
        if dataset is not None:
            yield name, dataset.digest


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
