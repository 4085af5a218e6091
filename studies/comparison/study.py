"""Plan of a comparison: tasks, methods, learning rates and seeds; a command for each training."""

from dataclasses import dataclass, replace

from addax_ds.optim.methods import Method

# Seen from where the jobs run.
_TASKS_FILE = "studies/comparison/tasks.py"
LAUNCHER = "launch/train.py"
_PEER = "studies/comparison/peers.py"


@dataclass(frozen=True)
class Contender:
    """A method with the settings under which it enters.

    Attributes:
        method: what ``--method`` calls it.
        learning_rates: of which the best on dev is taken.
        steps: of a training.
        evaluations: on dev, evenly over the steps.
        first_order: K1, global first-order batch; 0 if there is none.
        zeroth_order: K0, global zeroth-order batch; 0 if there is none.
        variant: what tells it from the same method with other settings.
        more: further arguments of the program, and their values.
        program: what trains.
    """

    method: Method
    learning_rates: tuple[float, ...]
    steps: int
    evaluations: int
    first_order: int = 0
    zeroth_order: int = 0
    variant: str = ""
    more: tuple[tuple[str, str], ...] = ()
    program: str = LAUNCHER

    @property
    def name(self) -> str:
        """Name in tables and of folders."""
        return f"{self.method}-{self.variant}" if self.variant else self.method

    @property
    def flags(self) -> dict[str, str]:
        """Arguments of ``launch/train.py`` for one rank."""
        flags = {"method": self.method, "max_steps": str(self.steps)}
        flags["per_device_train_batch_size"] = str(self.first_order or self.zeroth_order)
        if self.first_order and self.zeroth_order:
            flags["per_device_zo_batch_size"] = str(self.zeroth_order)
        every = str(self.steps // self.evaluations)
        return {**flags, "eval_steps": every, "save_steps": every, **dict(self.more)}


@dataclass(frozen=True)
class Study:
    """One task and what is compared on it.

    Attributes:
        name: of the study.
        task: the task's name in `studies.comparison.tasks`.
        max_length: longest sequence in tokens; longer prompts lose their beginning.
        contenders: the methods.
        seeds: of z and of the order of the data; learning rates are chosen with the first.
        beside: study in whose figures this one is drawn if both are reported; by default, and
            without the other, it has its own.
        memory_gb: that tensors of a step on the longest row may take by the planner, if contenders
            have it in common.
    """

    name: str
    task: str
    max_length: int
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    beside: str | None = None
    memory_gb: float | None = None

    @property
    def grid(self) -> list["Trial"]:
        """Trainings by which the learning rates are chosen, method by method in turns."""
        most = max(len(contender.learning_rates) for contender in self.contenders)
        return [
            Trial(self, contender, contender.learning_rates[number], self.seeds[0])
            for number in range(most)
            for contender in self.contenders
            if number < len(contender.learning_rates)
        ]

    @property
    def data_flags(self) -> dict[str, str]:
        """Arguments of ``launch/train.py`` that say which rows, and how long."""
        return {"task": f"{_TASKS_FILE}:{self.task}", "max_length": str(self.max_length)}


@dataclass(frozen=True)
class Trial:
    """One training, or (without a contender) the model as it is.

    Attributes:
        study: what it belongs to.
        contender: the method, or None.
        learning_rate: of a training.
        seed: of a training.
    """

    study: Study
    contender: Contender | None = None
    learning_rate: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of its folder."""
        if self.contender is None:
            return f"{self.study.name}/untrained"
        name = self.contender.name
        return f"{self.study.name}/{name}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def flags(self) -> dict[str, str]:
        """Arguments of the program for the training; the test rows stay unread."""
        assert self.contender is not None
        return {
            **self.study.data_flags,
            **self.contender.flags,
            "learning_rate": f"{self.learning_rate:g}",
            "lr_scheduler_type": "constant",
            "seed": str(self.seed),
            "skip_test": "True",
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "save_total_limit": "1",
            "load_best_model_at_end": "True",
            "logging_steps": "1",
        }


# The most plausible first: an unfinished comparison has that of each method.
_SGD_RATES = (1e-3, 5e-4, 2e-3)
_MEZO_RATES = (1e-5, 3e-6, 3e-5)
_ADAMW_RATES = (2e-5, 5e-5, 1e-5)


def _contenders(steps: int, evaluations: int, mezo_steps: int) -> tuple[Contender, ...]:
    """Give each step of each method eight examples."""
    return (
        Contender("addax", _SGD_RATES, steps, evaluations, first_order=4, zeroth_order=4),
        Contender("ip-sgd", _SGD_RATES, steps, evaluations, first_order=8),
        Contender("mezo", _MEZO_RATES, mezo_steps, evaluations, zeroth_order=8),
    )


_BASIC = _contenders(40, 2, 160)
_ADDAX, _IP_SGD, _MEZO = _BASIC
_ADAMW = replace(_IP_SGD, method="adamw", learning_rates=_ADAMW_RATES)
_MULTIEMO = (*_BASIC, replace(_ADDAX, method="addax-wa"), _ADAMW)
# With twenty times Addax's steps, as in the papers, and the rate that did best in 160.
_LONG_MEZO = Contender("mezo", (3e-5,), 800, 5, zeroth_order=8)

# At the rate that did best on the reviews.
_ADDAX_AT_BEST, _IP_SGD_AT_BEST = (replace(c, learning_rates=(2e-3,)) for c in (_ADDAX, _IP_SGD))
# Addax without its zeroth-order part: the same batches of D1 alone, with the L_T of its default.
_SHORT = replace(
    _IP_SGD_AT_BEST,
    variant="short",
    first_order=_ADDAX.first_order,
    more=(("length_threshold", "median"),),
)
_PARTS = (
    *(
        replace(_ADDAX_AT_BEST, variant=f"alpha-{alpha}", more=(("alpha", alpha),))
        for alpha in ("1e-2", "1e-1", "1e-4")
    ),
    replace(_ADDAX_AT_BEST, variant="directions-4", more=(("zo_directions", "4"),)),
)
# Does memory need Addax at all? Recomputed, all rows fit.
_RECOMPUTED = replace(
    _IP_SGD_AT_BEST, variant="checkpointing", more=(("activation_checkpointing", "True"),)
)
_WHOLE = (_ADDAX_AT_BEST, _SHORT, _RECOMPUTED)

# What a user would take instead of Addax to save memory.
_LORA = (("lora_r", "16"), ("lora_target_modules", "all-linear"))
_PEERS = (
    replace(_ADAMW, learning_rates=(2e-4, 1e-4, 5e-4), variant="lora", more=_LORA),
    *(
        replace(_ADAMW, learning_rates=rates, variant=variant, more=more, program=_PEER)
        for variant, rates, more in (
            ("8bit", (1e-4, 5e-5, 2e-4), (("peer", "adamw-8bit"),)),
            ("badam", (1e-4, 3e-5, 3e-4), (("peer", "badam"),)),
        )
    ),
)

_CUT, _UNCUT = 256, 1184  # the longest of MultiEmo


def _equal(
    contender: Contender,
    steps: int,
    rows: int,
    threshold: int | None = None,
    *,
    checkpointing: bool = False,
) -> Contender:
    """Give a method what fits the memory of its study, and steps for the common time.

    Args:
        contender: the method; but for MeZO its rate is chosen of two.
        steps: that took about five minutes of a core by short trainings.
        rows: of a first-order batch; 0 if there is none.
        threshold: L_T in tokens.
        checkpointing: whether backward recomputes.
    """
    more = [("num_dev", "250")]
    if threshold is not None:
        more.append(("length_threshold", str(threshold)))
    if checkpointing:
        more.append(("activation_checkpointing", "True"))
    rates = (2e-3, 1e-3) if rows else contender.learning_rates
    return replace(contender, steps=steps, first_order=rows, learning_rates=rates, more=tuple(more))


# With recomputation 0.5 GB hold two rows of any length, or eight short ones; 1.2 GB hold eight of
# any length. Without it 1.2 GB hold four short ones.
_TIGHT = (
    _equal(_ADDAX, 16, 8, 304, checkpointing=True),
    _equal(_IP_SGD, 84, 2, checkpointing=True),
    _equal(_SHORT, 26, 8, 304, checkpointing=True),
    _equal(replace(_MEZO, learning_rates=(3e-5,)), 28, 0),
)
_ROOMY = (
    _equal(_ADDAX, 24, 4, 288),
    _equal(_IP_SGD, 14, 8, checkpointing=True),
    _equal(_SHORT, 60, 4, 288),
)

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        Study("multiemo", "MULTIEMO", _CUT, _MULTIEMO, (0, 1, 2)),
        Study("sst2", "SST2", _CUT, _contenders(100, 4, 400), (0,)),
        Study("boolq", "BOOLQ", _CUT, _BASIC, (0,)),
        Study("multiemo-controls", "MULTIEMO", _CUT, (_ADDAX_AT_BEST, _SHORT), (0, 1, 2)),
        Study("multiemo-parts", "MULTIEMO", _CUT, _PARTS, (0, 1, 2)),
        Study("multiemo-long", "MULTIEMO", _CUT, (_LONG_MEZO,), (0,), beside="multiemo"),
        Study("multiemo-peers", "MULTIEMO", _CUT, _PEERS, (0, 1, 2), beside="multiemo"),
        Study("multiemo-0.5gb", "MULTIEMO", _UNCUT, _TIGHT, (0, 1, 2), memory_gb=0.5),
        Study("multiemo-1.2gb", "MULTIEMO", _UNCUT, _ROOMY, (0, 1, 2), memory_gb=1.2),
        Study("coqa", "COQA", _UNCUT, _WHOLE, (0, 1, 2)),
        Study("topical-chat", "TOPICAL_CHAT", _UNCUT, _WHOLE, (0, 1, 2)),
    )
}
