"""Settings that must match when resuming from a checkpoint.

z, the order of the data, and the type of the weights have to be the same: with others the history
of the run would be that of no run at all, and nothing would show it. What a user may want to change
on the way, such as alpha, is said and used. The learning rate and its schedule, the number of
steps, logging, evaluation and saving are free.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from addax_ds.config.addax_config import AddaxConfig, global_batches, order_seed
from addax_ds.optim.hyperparameters import HYPERPARAMETERS, Hyperparameter
from addax_ds.optim.methods import ZEROTH_ORDER
from addax_ds.utils.dtypes import dtype_name
from addax_ds.utils.errors import UserError

# What must not change, and how to give it.
_FIXED_OF_RUN = {
    "method": "--method",
    "data_seed": "--data_seed",
    "drop_last": "--dataloader_drop_last",
}
_BATCHES = {
    "zeroth_order_batch": "--per_device_zo_batch_size",
    "first_order_batch": "--per_device_train_batch_size",
}
# Hyperparameters that a checkpoint notes; those that are fixed must not change either.
_NOTED = tuple(known for known in HYPERPARAMETERS if known.on_resume != "free")


@dataclass(frozen=True)
class Run:
    """Record, in a checkpoint, of the run that wrote it.

    Attributes:
        sharding: back end.
        ranks: number of ranks; with another one or on another back end a run goes on all the same.
        dtype: of the weights, "bf16", "fp16" or "fp32".
        method: one of `Method`.
        data_seed: of the order of the data.
        drop_last: whether an epoch ends before a batch that it cannot fill.
        zeroth_order_batch: global size of the zeroth-order batch, 0 if there is none.
        first_order_batch: global size of the first-order batch, 0 if there is none.
        hyperparameters: those that do not follow a schedule, by name; None for those without
            effect: ``rounding`` of fp32 weights, and those of a zeroth-order part that the method
            does not have.
        length_threshold: L_T in tokens; None if the data is not divided by length.
        data: digest of the training data in its order; None if it has not been read yet.
        template_time: date and time that chat templates read, in ISO 8601, local and without a
            zone: those of the first start, or a template that writes the date would make other data
            of the same rows on another day. None if the rows were encoded elsewhere.
    """

    sharding: str
    ranks: int
    dtype: str
    method: str
    data_seed: int
    drop_last: bool
    zeroth_order_batch: int
    first_order_batch: int
    hyperparameters: dict[str, Any]
    length_threshold: int | None = None
    data: str | None = None
    template_time: str | None = None

    @classmethod
    def of(cls, args: AddaxConfig, sharding: str) -> "Run":
        """Describe the run that has these arguments; `with_data` adds what it trains on."""
        settings, dtype = args.settings, dtype_name(args)
        noted = {known.name: getattr(settings.hyperparameters, known.name) for known in _NOTED}
        if dtype == "fp32":
            noted["rounding"] = None
        if settings.method not in ZEROTH_ORDER:
            noted |= {known.name: None for known in _NOTED if known.zeroth_order}
        zeroth_order_batch, first_order_batch = global_batches(args)
        return cls(
            sharding=sharding,
            ranks=args.world_size,
            dtype=dtype,
            method=settings.method,
            data_seed=order_seed(args),
            drop_last=args.dataloader_drop_last,
            zeroth_order_batch=zeroth_order_batch,
            first_order_batch=first_order_batch,
            hyperparameters=noted,
        )

    def with_data(self, digest: str, length_threshold: int | None) -> "Run":
        """Add the `data_digest` of the training data and the L_T that divides it."""
        return replace(self, data=digest, length_threshold=length_threshold)


@dataclass(frozen=True)
class Progress:
    """Progress of a run's log.

    Attributes:
        loss_sum: of the steps since Trainer last logged a loss, which is a mean over steps.
        loss_total: of all steps.
        last_logged_step: when it last logged one.
        costs: of all steps (`Costs`), as a mapping.
        metric: by which the best checkpoint is chosen; None without one.
        greater_is_better: of that metric.
        eval_data: digest of the rows that the metric is of; None where they are not known.
    """

    loss_sum: float
    loss_total: float
    last_logged_step: int
    costs: dict[str, Any] = field(default_factory=dict)
    metric: str | None = None
    greater_is_better: bool | None = None
    eval_data: str | None = None


def check_same_run(written: Run, now: Run) -> None:
    """Check that ``now`` is the run ``written``, as far as its data is known.

    Raises:
        UserError: names what differs, both values, and what to resume with.
    """
    problem = next(_differences(written, now), None)
    if problem is not None:
        raise UserError(problem)


def changes(written: Run, now: Run) -> Iterator[str]:
    """Yield what a user may change and has changed, in words."""
    for known, before, value in _changed_hyperparameters(written, now):
        if known.on_resume == "announced":
            yield f"--{known.flag} was {before} and is {value} from here on"


def _changed_hyperparameters(written: Run, now: Run) -> Iterator[tuple[Hyperparameter, Any, Any]]:
    """Yield what has changed, with both values; one that is not noted yet had its default.

    Those without effect are left out: they are None, in ``written`` too unless it is older.
    """
    for known in _NOTED:
        before = written.hyperparameters.get(known.name, known.default)
        value = now.hyperparameters[known.name]
        if value is not None and before != value:
            yield known, before, value


def _differences(written: Run, now: Run) -> Iterator[str]:
    if written.dtype != now.dtype:
        how = "without --bf16 and --fp16" if written.dtype == "fp32" else f"with --{written.dtype}"
        yield (
            f"its weights are {written.dtype}, and this run's are {now.dtype}: resume {how}, "
            "or start anew from these weights with --model_name_or_path"
        )
    # The seed comes before the data seed, which follows it where nobody gives one.
    fixed = [
        (known.name, f"--{known.flag}", before, value)
        for known, before, value in _changed_hyperparameters(written, now)
        if known.on_resume == "fixed"
    ]
    fixed += [
        (name, flag, getattr(written, name), getattr(now, name))
        for name, flag in _FIXED_OF_RUN.items()
    ]
    for name, flag, before, value in fixed:
        if before != value:
            yield (
                f"the {name.replace('_', ' ')} was {before}, and is {value} in this run, which "
                f"would be another one from here on: resume with {flag} {before}"
            )
    for name, flag in _BATCHES.items():
        before, value = getattr(written, name), getattr(now, name)
        if before != value:
            yield (
                f"the {name.replace('_', ' ')} was {before} over all ranks, and is {value} in this "
                f"run, which would see other data: resume with {flag} and "
                f"--gradient_accumulation_steps so that it is {before} over {now.ranks} rank(s)"
            )
    if now.data is None:
        return
    if written.data != now.data:
        yield (
            f"the training data had the digest {written.data}, and has {now.data} in this run: "
            "resume with the --train_file or --dataset_name, --columns, tokenizer, --max_length "
            "and --append_eos that it was written with"
        )
    if written.length_threshold != now.length_threshold:
        length = written.length_threshold
        flag = "--length_threshold"
        threshold = f"without {flag}" if length is None else f"with {flag} {length}"
        yield (
            f"L_T was {written.length_threshold} tokens, and is {now.length_threshold} in this "
            f"run, which would divide the data otherwise: resume {threshold}"
        )
