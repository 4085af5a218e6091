"""The command line of ``launch/plan.py``."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from addax_ds.config.deepspeed import automatic_sizes, check_ds_config, load_ds_config
from addax_ds.config.deepspeed_values import AUTO
from addax_ds.data.examples import lengths_of, target_counts_of
from addax_ds.distributed.nodes import replicas_of
from addax_ds.optim.methods import BASELINES, FIRST_ORDER, METHODS, ZEROTH_ORDER, Method
from addax_ds.planner import recommend
from addax_ds.planner.constants import GB, GRAIN, RESERVE
from addax_ds.planner.memory import StepSpec
from addax_ds.planner.report import Request, as_json, as_table, make_plans
from addax_ds.planner.rules import RULES, rules_of
from addax_ds.planner.shapes import OPT_FAMILY, ModelShape, find_shape
from addax_ds.planner.zero3 import Zero3Settings
from addax_ds.utils.command_line import Parser, mistakes_end_the_program
from addax_ds.utils.dtypes import DTYPES
from addax_ds.utils.errors import UserError
from addax_ds.utils.files import expand_home
from addax_ds.utils.messages import raise_problems

_LEAST = {
    "gpus": 1,
    "nodes": 1,
    "per_device_train_batch_size": 1,
    "per_device_zo_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "length": 2,
    "length_threshold": 2,
    "target_tokens": 1,
}
"""The least values of counts; a sequence has a token and one to predict."""
_ONLY_FOR: dict[str, set[Method]] = {
    "length_threshold": {"addax"},
    "per_device_zo_batch_size": set(ZEROTH_ORDER),
    # DeepSpeed's optimizers have room for sums in any case.
    "gradient_accumulation_steps": set(FIRST_ORDER) - set(BASELINES),
    "activation_checkpointing": set(FIRST_ORDER),
}
"""Methods outside of which a flag has no effect on memory."""

_DEFAULT_LENGTH = 2048
_DEFAULT_ROWS = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, and write the result to standard output: a mistake is a sentence and exit status 1."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with mistakes_end_the_program():
        sys.stdout.write(plan(argv) + "\n")


def plan(argv: Sequence[str] | None = None) -> str:
    """Return what the command prints.

    Raises:
        UserError: an argument, a model or a DeepSpeed JSON that cannot be planned with.
    """
    arguments = _parser().parse_args(argv)
    for name in ("model", "train_file", "deepspeed"):
        setattr(arguments, name, expand_home(getattr(arguments, name)))
    with redirect_stdout(sys.stderr):
        request = request_of(arguments)
        if arguments.recommend:
            ways = recommend.options(request)
            if arguments.json:
                return json.dumps(recommend.as_json(request, ways), indent=2)
            return recommend.as_text(request, ways)
        plans = make_plans(request)
    if arguments.json:
        return json.dumps(as_json(request, plans), indent=2)
    return as_table(request, plans)


def request_of(arguments: argparse.Namespace) -> Request:
    """Check the arguments and make of them what the planner asks for.

    Raises:
        UserError: see `plan`.
    """
    _check(arguments)
    shape = find_shape(arguments.model, arguments.dtype)
    zero3 = _zero3(arguments, shape)
    replicas = _replicas(arguments)
    length = arguments.length or min(shape.positions or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
    targets, row_lengths, named = arguments.target_tokens, None, f"--length {length}"
    if arguments.train_file:  # last, as it may take minutes
        row_lengths, targets = _rows_of(arguments)
        length = int(row_lengths.max())
        named = f"the longest row of --train_file, {length} tokens"
    _check_length(arguments, shape, length, named)
    train_rows = arguments.per_device_train_batch_size or _DEFAULT_ROWS
    spec = StepSpec(
        shape=shape,
        method="addax",
        sharding=arguments.sharding,
        ranks=arguments.gpus * arguments.nodes,
        replicas=replicas,
        cpu_offload=arguments.cpu_offload,
        zeroth_order=None,
        first_order=None,
        checkpointing=arguments.activation_checkpointing,
        attention=arguments.attn_implementation,
        zero3=zero3,
        accumulation=arguments.gradient_accumulation_steps or 1,
    )
    host_memory = arguments.host_memory
    rules = rules_of(spec.sharding)
    may_offload = arguments.recommend and rules.offload_flag is not None
    if host_memory is not None and not (rules.is_offloaded(spec) or may_offload):
        raise UserError(
            "--host_memory has no effect without weights in host memory, as with --deepspeed "
            "zero3_offload, or --sharding fsdp2 --cpu_offload; remove it."
        )
    return Request(
        spec=spec,
        methods=tuple(dict.fromkeys(arguments.methods)),
        zo_rows=arguments.per_device_zo_batch_size or train_rows,
        train_rows=train_rows,
        length=length,
        length_threshold=arguments.length_threshold,
        targets=targets,
        gpu_memory=int(arguments.gpu_memory * GB),
        reserve=int(arguments.reserve * GB),
        host_memory=None if host_memory is None else int(host_memory * GB),
        gpus_per_node=arguments.gpus,
        row_lengths=row_lengths,
    )


def _rows_of(arguments: argparse.Namespace) -> tuple[NDArray[np.int32], int]:
    """Return the tokens of each row of a training file, and the most that any predicts.

    Read and tokenised as ``launch/train.py`` does it, into the same cache.
    """
    if not Path(arguments.model).is_dir():
        raise UserError(
            f"--train_file needs the model's tokenizer: --model {arguments.model} is no folder"
        )
    # They import what trains, which a plan from numbers does without.
    from addax_ds.cli.data import load_data
    from addax_ds.config.arguments import DataArguments, ModelArguments
    from addax_ds.models.source import ModelSource

    source = ModelSource.find(ModelArguments(model_name_or_path=arguments.model))
    files = DataArguments(
        train_file=arguments.train_file, columns=arguments.columns, max_length=arguments.length
    )
    try:
        rows = load_data(files, source.load_tokenizer(), source).train
    except UserError as error:  # which has the name of a training's flag
        raise UserError(str(error).replace("--max_length", "--length")) from error
    return lengths_of(rows), int(target_counts_of(rows).max())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Say what fine-tuning a model needs in GPU memory, without its weights.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help=f"facebook/ and one of {', '.join(OPT_FAMILY)}; or a folder, or a config.json",
    )
    add("--gpus", type=int, default=8, help="GPUs of a node")
    add("--nodes", type=int, default=1, help="nodes")
    add(
        "--replicas",
        default="1",
        help="copies of the weights, each sharded over its part of the GPUs: a number, or node",
    )
    add("--cpu_offload", action="store_true", help="weights in host memory, with fsdp2")
    add("--gpu_memory", type=float, default=80.0, help="of a GPU, in GB (1e9 bytes)")
    add(
        "--reserve",
        type=float,
        default=RESERVE / GB,
        help="GB of a GPU that tensors do not get: CUDA context, NCCL, fragmentation",
    )
    add("--host_memory", type=float, help="of a node, in GB (default: not compared)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to plan")
    add(
        "--per_device_train_batch_size",
        type=int,
        help=f"rows of a first-order batch (default: {_DEFAULT_ROWS})",
    )
    add(
        "--per_device_zo_batch_size",
        type=int,
        help="rows of a zeroth-order batch (default: as many)",
    )
    add("--gradient_accumulation_steps", type=int, help="micro-batches of a step (default: 1)")
    add("--length", type=int, help="tokens of the longest sequence (default: 2048 at most)")
    add(
        "--length_threshold",
        type=int,
        help="L_T, the longest first-order sequence of addax (default: the longest that fits)",
    )
    add("--target_tokens", type=int, help="predicted tokens of a sequence (default: all)")
    add(
        "--train_file",
        nargs="+",
        help="files of rows as launch/train.py takes them, for lengths and predicted tokens; "
        "--model is a folder with a tokenizer, and --length cuts",
    )
    add("--columns", nargs="+", help="names of the columns of --train_file, as in training")
    add("--deepspeed", help="DeepSpeed JSON (default: bucket sizes of zero3)")
    add("--sharding", choices=tuple(RULES), default="zero3", help="back end")
    add("--dtype", choices=tuple(DTYPES), default="bf16", help="type of the weights")
    add(
        "--attn_implementation",
        choices=("eager", "sdpa", "flash_attention_2", "flash_attention_3"),
        help="attention kernel (default: the model's own choice)",
    )
    add(
        "--activation_checkpointing",
        "--gradient_checkpointing",
        action="store_true",
        help="recompute blocks in backward",
    )
    add(
        "--recommend",
        action="store_true",
        help="say which method serves, of all that fit: the plain one where it does",
    )
    add("--json", action="store_true", help="write JSON, in bytes, instead of a table")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    problems = [*_out_of_range(arguments), *_without_effect(arguments)]
    kernel, dtype = arguments.attn_implementation, arguments.dtype
    if dtype == "fp32" and (kernel or "").startswith("flash"):
        problems.append(f"--attn_implementation {kernel} has kernels for bf16 and fp16, not fp32.")
    raise_problems("These arguments cannot be planned with:", problems)


def _out_of_range(arguments: argparse.Namespace) -> Iterator[str]:
    for name, least in _LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            yield f"--{name} {value}: it must be at least {least}."
    for name in ("gpu_memory", "host_memory"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < GB:  # nor is it infinite or NaN
            yield f"--{name} {value:g}: it must be a number of GB above 0 and below 1e9."
            return
    if not 0 <= arguments.reserve < arguments.gpu_memory:
        yield (
            f"--reserve {arguments.reserve:g} of --gpu_memory {arguments.gpu_memory:g}: it must be "
            "at least 0 and leave something."
        )


def _without_effect(arguments: argparse.Namespace) -> Iterator[str]:
    given, sharding = dict.fromkeys(arguments.methods), arguments.sharding
    if arguments.columns and not arguments.train_file:
        yield "--columns has no effect without --train_file; remove it."
    if arguments.train_file and arguments.target_tokens is not None:
        yield "--target_tokens has no effect with --train_file, which says it; remove it."
    if arguments.recommend:
        if list(given) != list(METHODS):
            yield "--methods has no effect with --recommend, which compares all; remove it."
        if arguments.activation_checkpointing:
            yield (
                "--activation_checkpointing has no effect with --recommend, which plans with and "
                "without it; remove it."
            )
    rules = rules_of(sharding)
    methods = [method for method in given if rules.runs(method)]
    named = " ".join(methods)
    if not methods:
        yield f"--methods {' '.join(given)} run with --sharding zero3 alone, and it is {sharding}."
        return
    if arguments.deepspeed and not rules.uses_deepspeed:
        yield f"--deepspeed has no effect with --sharding {sharding}."
    if arguments.cpu_offload and rules.offload_flag != "--cpu_offload":
        yield (
            f"--cpu_offload has no effect with --sharding {sharding}: use fsdp2, or --deepspeed "
            "zero3_offload."
        )
    for name, effective in _ONLY_FOR.items():
        if getattr(arguments, name) not in (None, False) and effective.isdisjoint(methods):
            yield f"--{name} has no effect with --methods {named}; remove it."
    both = arguments.per_device_train_batch_size, arguments.per_device_zo_batch_size
    if methods == ["mezo"] and None not in both:
        yield (
            "--per_device_train_batch_size has no effect with --methods mezo beside "
            "--per_device_zo_batch_size; remove it."
        )


def _check_length(
    arguments: argparse.Namespace, shape: ModelShape, length: int, named: str
) -> None:
    if length < 2 or length > (shape.positions or length):
        raise UserError(f"{named}: {shape.name} takes 2 to {shape.positions} tokens")
    if "addax" not in arguments.methods:
        return
    threshold = arguments.length_threshold
    if threshold is None and length <= GRAIN and not arguments.recommend:
        raise UserError(
            f"{named}: L_T is looked for in multiples of {GRAIN} tokens, and none leaves "
            "a longer sequence that would be zeroth-order: give a --length_threshold below that "
            "length, or --methods without addax"
        )
    if threshold is not None and threshold >= length:
        raise UserError(
            f"--length_threshold {threshold} is not below {named}: no sequence would be "
            "zeroth-order"
        )


def _replicas(arguments: argparse.Namespace) -> int:
    """Return the copies of the weights; a GPU is a rank."""
    asked, sharding = arguments.replicas, arguments.sharding
    if asked != "1" and not rules_of(sharding).has_replicas:
        raise UserError(
            f"--replicas {asked} cannot be planned with --sharding {sharding}: use fsdp2"
        )
    return replicas_of(asked, [arguments.gpus] * arguments.nodes)


def _zero3(arguments: argparse.Namespace, shape: ModelShape) -> Zero3Settings:
    if not arguments.deepspeed:
        return Zero3Settings.from_json(automatic_sizes(shape.hidden), shape.hidden)
    config, where = load_ds_config(arguments.deepspeed)
    check_ds_config(config, where)
    _check_dtype(config, where, arguments.dtype)
    return Zero3Settings.from_json(config["zero_optimization"], shape.hidden)


def _check_dtype(config: Mapping[str, Any], where: str, dtype: str) -> None:
    """Raise `UserError` where `AddaxConfig` would refuse a training with these weights."""
    for name in ("bf16", "fp16"):
        block = config.get(name, {})
        if block.get("enabled", False) not in (AUTO, dtype == name):
            found = json.dumps(block["enabled"]) if "enabled" in block else "not at all"
            raise UserError(
                f"--dtype is {dtype}, but {where} has {name}.enabled {found}: write "
                f'"{name}": {{"enabled": "auto"}} there, or give another --dtype'
            )


if __name__ == "__main__":
    main()
