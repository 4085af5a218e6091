"""The command line of `launch/train.py`: typed arguments, their defaults and their checks.

`parse_arguments` refuses what can be refused before anything slow happens: before a process group
exists and before a model is loaded.
"""

import argparse
import logging
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from transformers import HfArgumentParser

from addax_ds.config.addax_config import AddaxConfig
from addax_ds.config.former_flags import FORMER_FLAGS
from addax_ds.config.presets import find_preset
from addax_ds.config.values import read_argument_file, type_problems
from addax_ds.distributed.nodes import replicas_problem
from addax_ds.distributed.startup import raise_on_all_ranks_at_start
from addax_ds.reading.shapes import parse_columns
from addax_ds.reading.sources import find_files
from addax_ds.sharding.base import Sharding
from addax_ds.sharding.registry import BACK_ENDS, back_end
from addax_ds.tasks import TASKS, find_task
from addax_ds.utils.command_line import Parser, flag
from addax_ds.utils.errors import UserError
from addax_ds.utils.files import expand_home
from addax_ds.utils.messages import did_you_mean, raise_problems

logger = logging.getLogger(__name__)

# What is trained on without --task and --train_file.
DEMO_TASK = "sst2-demo"

# K0 = K1 of the demo, over all ranks.
DEMO_GLOBAL_BATCH_SIZE = 8

# What the command without model and data runs; any flag overrides it. The
# batch sizes per device follow from DEMO_GLOBAL_BATCH_SIZE, alpha and zo_eps are the defaults.
DEMO_PRESET: dict[str, Any] = {
    "max_steps": 50,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "bf16": True,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 25,
    "per_device_eval_batch_size": 32,
    "save_strategy": "no",
    "seed": 0,
}

# Any of these says that a launcher has started this process.
_LAUNCHER_VARIABLES = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
_WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")

# Arguments that only a task heeds.
_OF_TASKS = ("task", "task_data", "num_train", "num_dev", "num_test", "task_seed")

_FILES = ("train_file", "validation_file", "test_file")
_PATHS = (
    *_FILES,
    *("model_name_or_path", "task", "task_data", "dataset_name"),
    *("deepspeed", "resume_from_checkpoint"),
)
_OF_DATASETS = ("dataset_config", "train_split", "validation_split", "test_split")
_SCORED = ("validation", "test")
_LONGEST_ARGUMENTS = 1 << 20  # bytes; longer files of JSON are data


@dataclass
class ModelArguments:
    """Arguments of the model."""

    model_name_or_path: str | None = flag(
        None,
        "Folder, hub name or .gguf file of a causal language model (default: the demo's). A "
        ".gguf file is dequantised to bf16 once, into $ADDAX_CACHE.",
    )
    model_revision: str | None = flag(None, "Branch, tag or commit of the model on the hub.")
    trust_remote_code: bool = flag(False, "Run model code that comes with the checkpoint.")
    attn_implementation: str | None = flag(
        None, "Attention kernel: eager, sdpa, flash_attention_2, ..."
    )
    lora_r: int | None = flag(
        None, "Train LoRA adapters of this rank instead of the weights; needs PEFT."
    )
    lora_alpha: int | None = flag(
        None, "Their product is scaled by lora_alpha / lora_r (default: twice lora_r)."
    )
    lora_target_modules: list[str] | None = flag(
        None,
        "Names of the linear layers that get adapters, or all-linear: all but the head (default: "
        "those that PEFT has for the architecture, or all-linear).",
    )
    sharding: str | None = flag(
        None,
        "Where the weights live: zero3 (needs, and is the default with, --deepspeed), "
        "fsdp2, or none: whole on each rank (default without --deepspeed).",
        choices=tuple(BACK_ENDS),
    )
    replicas: str = flag(
        "1",
        "Copies of the weights, each sharded over its part of the ranks: a number, or node for one "
        "copy a node, so that weights do not travel between nodes. For --sharding fsdp2.",
    )
    cpu_offload: bool = flag(
        False,
        "Keep the weights in host memory, pinned beside a GPU (docs/nodes.md#offload). For "
        "--sharding fsdp2; ZeRO-3 has offload_param in its JSON.",
    )
    cpu_threads: int | None = flag(
        None,
        "Threads of one rank on a CPU (default: 1; beside a GPU, for weights in host memory, its "
        "share of the cores). Ranks that contend for cores are many times slower: ranks times "
        "threads should not exceed the cores.",
    )


@dataclass
class DataArguments:
    """Arguments of the data and their encoding."""

    task: str | None = flag(
        None,
        f"One of {', '.join(TASKS)}, or file.py:NAME for one of your own "
        "(docs/tasks.md). Without it and --train_file: sst2-demo.",
    )
    task_data: str | None = flag(
        None,
        "Folder that save_to_disk wrote, folder with train.jsonl and validation.jsonl, "
        "or JSONL file, instead of the task's own source.",
    )
    num_train: int | None = flag(
        None,
        "Training rows of the task (default: its own number, mostly 1000). 0: "
        "no training, the model as it is on the test rows.",
    )
    num_dev: int | None = flag(
        None, "Dev rows of the task, out of its train split (default: mostly 500)."
    )
    num_test: int | None = flag(None, "Test rows of the task (default: mostly 1000).")
    task_seed: int = flag(0, "Seed by which the rows of the task are drawn.")
    train_file: list[str] | None = flag(
        None,
        "Files of rows (JSON Lines, JSON, CSV, Parquet, Arrow), patterns or folders of them, "
        "instead of a task (docs/data.md).",
    )
    validation_file: list[str] | None = flag(None, "The same, for --eval_strategy.")
    test_file: list[str] | None = flag(None, "The same, evaluated before and after training.")
    dataset_name: str | None = flag(
        None, "Data set of the hub, or a folder of one, instead of --train_file."
    )
    dataset_config: str | None = flag(None, "Configuration of the data set.")
    train_split: str = flag("train", "Split of the data set, maybe a slice: train[:1000].")
    validation_split: str | None = flag(None, "The same, for --eval_strategy.")
    test_split: str | None = flag(None, "The same, evaluated before and after training.")
    columns: list[str] | None = flag(
        None,
        "Columns by the names that they get, as prompt=question completion=answer. Of rows that "
        "fit several shapes it chooses one: messages=messages.",
    )
    skip_test: bool = flag(False, "Leave the test set unread, as for choosing settings.")
    max_length: int | None = flag(
        None,
        "Longest sequence in tokens (default: the model's limit, for a task 2048 at "
        "most). Rows of text are split; others lose tokens on the left, or are refused without it "
        "unless they are a task's.",
    )
    append_eos: bool = flag(
        True,
        "End every completion of a file with the end-of-sequence token; answers of "
        "tasks never are.",
    )
    dataset_num_proc: int | None = flag(
        None,
        "Processes that tokenise files, once for a machine (default: as many as the cores that a "
        "rank may use).",
    )


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, AddaxConfig]:
    """Parse a command line, an argument file, or an argument file with overriding flags.

    One `.yaml`, `.yml` or `.json` file may stand among the flags; its keys are the names of the
    flags, and flags win over it. With neither a model nor a training file the demo runs, with
    `DEMO_PRESET` below what the user gives. With only one of the two the other is the demo's, and
    the preset is not used: it was tuned for that model on that data.

    Args:
        argv: the arguments (default: `sys.argv[1:]`).

    Raises:
        UserError: any argument, file or DeepSpeed JSON that can be refused at this point, and
            whatever `TrainingArguments` itself rejects.
    """
    types: Any = (ModelArguments, DataArguments, AddaxConfig)
    parser = _Parser(
        types,
        allow_abbrev=False,
        description="Fine-tune a causal language model with Addax.",
    )
    try:
        given = parser.given(list(sys.argv[1:] if argv is None else argv))
        given |= {name: expand_home(given[name]) for name in _PATHS if name in given}
        values = _values(given)
    except UserError:
        with raise_on_all_ranks_at_start():  # where the other ranks are, in `AddaxConfig`
            raise
    model, data, training = (
        {item.name: values[item.name] for item in fields(kind) if item.name in values}
        for kind in types
    )
    return (
        ModelArguments(**model),
        DataArguments(**data),
        AddaxConfig(**training, given=given.keys()),
    )


def _values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete what was given, and check what `AddaxConfig` does not know of."""
    is_demo = not {"model_name_or_path", "train_file", "dataset_name", "task"} & given.keys()
    values = {**(_demo_preset(given) if is_demo else {}), **given}
    problems = [*_model_problems(values), *_data_problems(values)]
    raise_problems("These arguments cannot be used:", problems)
    if values.get("eval_strategy", "no") == "no" and not values.get("eval_on_start"):
        for name in ("validation_file", "validation_split"):
            if values.get(name) is not None:
                logger.warning("--%s has no effect: it needs --eval_strategy.", name)
    if str(values.get("resume_from_checkpoint")).lower() == "false":  # of an argument file
        del values["resume_from_checkpoint"]
    if isinstance(values.get("deepspeed"), str):
        values["deepspeed"] = find_preset(values["deepspeed"])
    chosen = _check_launcher(values.get("sharding"), bool(values.get("deepspeed")))
    _check_layout(chosen, values)
    if values.get("num_train") == 0:
        values.setdefault("learning_rate", 0.0)  # nothing is trained
    if values.get("train_file") is None and values.get("dataset_name") is None:
        task = find_task(values.get("task") or DEMO_TASK, values.get("task_data"))
        if values.get("load_best_model_at_end") or values.get("save_strategy") == "best":
            values.setdefault("metric_for_best_model", task.metric)
    return values


class _Parser(Parser, HfArgumentParser):
    """`HfArgumentParser` that tells what was given from what was not, and raises `UserError`."""

    def given(self, argv: list[str]) -> dict[str, Any]:
        """Return only what `argv`, and the argument file that it may name, says."""
        known, files = self._parse(argv)
        for name in known.keys() & self._lists():  # a flag of many values takes that file, too
            files += filter(self._is_argument_file, known[name])
            known[name] = [word for word in known[name] if word not in files]
        if not files:
            return known
        if len(files) > 1 or Path(files[0]).suffix not in (".yaml", ".yml", ".json"):
            raise UserError(f"Not a flag, nor one .yaml or .json argument file: {' '.join(files)}.")
        return {**self._read(Path(files[0])), **known}

    def _parse(self, argv: list[str]) -> tuple[dict[str, Any], list[str]]:
        """Parse flags; return what was given and the words that are not flags."""
        missing = object()
        names = self._names()
        # argparse leaves alone what the namespace already holds.
        start = argparse.Namespace(**dict.fromkeys(names, missing))
        for name in self._lists():  # the last one would win
            if [word.partition("=")[0].replace("-", "_") for word in argv].count(f"__{name}") > 1:
                raise UserError(f"--{name} is given twice: give all its values after one --{name}.")
        namespace, rest = self.parse_known_args(argv, namespace=start)
        for word in rest:
            if word.startswith("--"):
                name = word[2:].partition("=")[0].replace("-", "_")
                raise UserError(f"Unknown flag --{name}.{_instead(name, names)} See --help.")
        return {k: v for k, v in vars(namespace).items() if v is not missing}, rest

    def _names(self) -> list[str]:
        return [f.name for dtype in self.dataclass_types for f in fields(dtype) if f.init]

    def _lists(self) -> set[str]:
        """Return the flags of several values."""
        return {action.dest for action in self._actions if action.nargs in ("+", "*")}

    def _is_argument_file(self, word: str) -> bool:
        """Return whether a file is one of arguments: YAML, or an object of their names."""
        path = Path(word)
        if path.suffix != ".json" or not path.is_file() or path.stat().st_size > _LONGEST_ARGUMENTS:
            return path.suffix in (".yaml", ".yml")
        try:
            return read_argument_file(path).keys() <= set(self._names())
        except UserError:
            return False

    def _read(self, path: Path) -> dict[str, Any]:
        """Read an argument file; scalars go through the types of the flags (YAML's 1e-3 too)."""
        content = read_argument_file(path)
        names = self._names()
        unknown = [
            f"{key}: no such argument.{_instead(str(key), names)}"
            for key in content
            if key not in names
        ]
        raise_problems(f"{path}:", unknown)
        types = {k: v for t in self.dataclass_types for k, v in get_type_hints(t).items()}
        raise_problems(f"{path}:", list(type_problems(content, types)))
        compound = {k: v for k, v in content.items() if isinstance(v, list | dict)}
        scalars = {k: v for k, v in content.items() if v is not None and k not in compound}
        parsed, _ = self._parse([f"--{name}={value}" for name, value in scalars.items()])
        return {**parsed, **compound}


def _instead(name: str, names: Collection[str]) -> str:
    """Return what to give instead of a name that is none, or an empty string."""
    former = FORMER_FLAGS.get(name)
    return did_you_mean(name, names) if former is None else f" {former}"


def _demo_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the demo's defaults, with the global batch divided over the ranks."""
    ranks = _ranks()
    if "per_device_train_batch_size" in given:
        return dict(DEMO_PRESET)
    if DEMO_GLOBAL_BATCH_SIZE % ranks:
        raise UserError(
            f"The demo's batch of {DEMO_GLOBAL_BATCH_SIZE} does not divide over {ranks} ranks: "
            f"start 1, 2, 4 or 8 ranks (--num_gpus), or give --per_device_train_batch_size."
        )
    return {**DEMO_PRESET, "per_device_train_batch_size": DEMO_GLOBAL_BATCH_SIZE // ranks}


def _check_launcher(sharding: str | None, deepspeed: bool) -> type[Sharding]:
    """Return the back end; raise `UserError` if it does not fit the launcher or --deepspeed."""
    launched = any(name in os.environ for name in _LAUNCHER_VARIABLES)
    chosen = back_end(sharding, deepspeed)
    if deepspeed and not chosen.uses_deepspeed:
        raise UserError(
            f"--sharding {sharding} contradicts --deepspeed, which is --sharding zero3: remove one."
        )
    if chosen.uses_deepspeed and not deepspeed:
        raise UserError(f"--sharding {sharding} needs --deepspeed zero3.")
    if chosen.launch_command is not None and not launched:
        flag = "--deepspeed" if deepspeed else f"--sharding {sharding}"
        raise UserError(
            f"{flag} needs a launcher, which tells each process its rank: start with "
            f"{chosen.launch_command}."
        )
    if not chosen.is_sharded and sharding is None and _ranks() > 1:
        logger.warning(
            "Each of the %d ranks holds the whole model: a launcher alone shards nothing. Give "
            "--deepspeed zero3 or --sharding fsdp2; or --sharding none, if it is meant.",
            _ranks(),
        )
    return chosen


def _check_layout(chosen: type[Sharding], values: Mapping[str, Any]) -> None:
    """Raise `UserError` if the back end serves no replicas, or no offload, and one is asked for."""
    replicas = values.get("replicas", "1")
    if values.get("cpu_offload") and chosen.why_no_cpu_offload is not None:
        raise UserError(
            f"--cpu_offload cannot be used with --sharding {chosen.name}: "
            f"{chosen.why_no_cpu_offload}."
        )
    if replicas != "1" and chosen.why_no_replicas is not None:
        raise UserError(
            f"--replicas {replicas} cannot be used with --sharding {chosen.name}: "
            f"{chosen.why_no_replicas}."
        )


def _model_problems(values: Mapping[str, Any]) -> Iterator[str]:
    path = values.get("model_name_or_path")
    for name in ("model_revision", "trust_remote_code"):
        if values.get(name) and path is None:
            yield f"--{name} has no effect without --model_name_or_path."
        elif values.get(name) and str(path).endswith(".gguf"):
            yield f"--{name} has no effect with a .gguf file; remove it."
    if problem := replicas_problem(values.get("replicas", "1")):
        yield problem
    if values.get("cpu_threads") is not None and values["cpu_threads"] < 1:
        yield "--cpu_threads must be at least 1."
    for name in ("lora_r", "lora_alpha"):
        if values.get(name) is not None and values[name] < 1:
            yield f"--{name} {values[name]}: it must be at least 1."
    modules = values.get("lora_target_modules")
    if modules is not None and not (modules and all(isinstance(m, str) and m for m in modules)):
        yield "--lora_target_modules: it must be names of modules, or all-linear."
    for name in ("lora_alpha", "lora_target_modules"):
        if values.get(name) is not None and values.get("lora_r") is None:
            yield f"--{name} has no effect without --lora_r."


def _data_problems(values: Mapping[str, Any]) -> Iterator[str]:
    given = {name for name, value in values.items() if value is not None}
    sources = [name for name in ("train_file", "dataset_name") if name in given]
    for name in (*_FILES, "columns"):
        if name in given:
            yield from _list_problems(name, values[name])
    if values.get("max_length") is not None and values["max_length"] < 2:
        yield "--max_length must be at least 2 tokens."
    if values.get("dataset_num_proc") is not None:
        if values["dataset_num_proc"] < 1:
            yield "--dataset_num_proc must be at least 1."
        if not sources:
            yield "--dataset_num_proc has no effect on a task, whose few rows need no processes."
    for name in _OF_DATASETS:
        if name in given and "dataset_name" not in given:
            yield f"--{name} needs --dataset_name."
    if not sources:
        for name in ("validation_file", "test_file"):
            if name in given:
                yield f"--{name} needs --train_file: a task has its own dev and test rows."
        if "columns" in given:
            yield "--columns needs --train_file or --dataset_name: a task knows its own."
        yield from _task_problems(values)
        return
    pairs = [("train_file", "dataset_name"), *((f"{s}_file", f"{s}_split") for s in _SCORED)]
    for one, other in pairs:
        if {one, other} <= given:
            yield f"--{one} and --{other} are two sources of the same; remove one of them."
    is_evaluated = values.get("eval_strategy", "no") != "no"
    if is_evaluated and not given & {"validation_file", "validation_split"}:
        split = " or --validation_split" if "dataset_name" in given else ""
        yield f"--eval_strategy needs --validation_file{split}."
    for name in _OF_TASKS:
        if name in given:
            yield f"--{name} has no effect with --{sources[0]}; remove one of them."


def _list_problems(name: str, words: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the values of a flag that takes several."""
    if not words:
        yield f"--{name}: it names nothing."
        return
    try:
        parse_columns(words) if name == "columns" else find_files(words)
    except UserError as error:
        yield f"--{name} {error}."


def _task_problems(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("task") is None:
        for name in _OF_TASKS:
            if values.get(name) is not None:
                yield f"--{name} needs --task."
    for name in ("num_train", "num_dev", "num_test", "task_seed"):
        if (values.get(name) or 0) < 0:
            yield f"--{name} {values[name]}: it must not be below 0."
    if (values.get("task_seed") or 0) >= 2**32:
        yield f"--task_seed {values['task_seed']}: it must be below 2**32."
    for name in ("num_train", "num_dev"):
        if values.get(name) == 0 and values.get("eval_strategy", "no") != "no":
            yield f"--eval_strategy needs dev rows, and there are none with --{name} 0."
    if values.get("num_train") == 0 and (values.get("skip_test") or values.get("num_test") == 0):
        yield "--num_train 0 leaves only the test rows, and they are not to be read."
    for name in ("push_to_hub", "find_learning_rate"):
        if values.get("num_train") == 0 and values.get(name):
            yield f"--{name} needs training rows, and there are none with --num_train 0."


def _ranks() -> int:
    return int(next((os.environ[name] for name in _WORLD_SIZE_VARIABLES if name in os.environ), 1))
