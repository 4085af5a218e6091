"""The command line of ``launch/plan.py``."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from addax_ds.data.partition import METHODS, ZEROTH_ORDER, Method
from addax_ds.ds_config import check_ds_config, load_ds_config
from addax_ds.errors import UserError
from addax_ds.planner.memory import Inputs
from addax_ds.planner.report import GB, GRAIN, RESERVE, Request, as_json, as_table, make_plan
from addax_ds.planner.shapes import DTYPES, OPT_FAMILY, ModelShape, find_shape
from addax_ds.planner.zero3 import Zero3Settings, automatic_sizes
from addax_ds.rules import raise_problems

_ONLY_FOR: dict[str, set[Method]] = {
    "length_threshold": {"addax"},
    "per_device_zo_batch_size": set(ZEROTH_ORDER),
}
"""Methods outside of which a flag has no effect."""

_DEFAULT_LENGTH = 2048
_DEFAULT_ROWS = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, and write the result to standard output: a mistake is a sentence and exit status 1."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        sys.stdout.write(plan(argv) + "\n")
    except UserError as error:
        sys.stderr.write(f"addax_ds: error: {error}\n")
        sys.exit(1)


def plan(argv: Sequence[str] | None = None) -> str:
    """Return what the command prints.

    Raises:
        UserError: an argument, a model or a DeepSpeed JSON that cannot be planned with.
    """
    arguments = _parser().parse_args(argv)
    request = request_of(arguments)
    plans = [make_plan(request, method) for method in arguments.methods]
    made = [plan for plan in plans if plan is not None]
    if not made:
        raise UserError(
            f"--methods {' '.join(arguments.methods)} run with --sharding zero3 alone, and it is "
            f"{arguments.sharding}"
        )
    if arguments.json:
        return json.dumps(as_json(request, made), indent=2)
    return as_table(request, made)


def request_of(arguments: argparse.Namespace) -> Request:
    """Check the arguments and make of them what the planner asks for.

    Raises:
        UserError: see `plan`.
    """
    _check(arguments)
    shape = find_shape(arguments.model, arguments.dtype)
    length = arguments.length or min(shape.positions or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
    _check_length(arguments, shape, length)
    train_rows = arguments.per_device_train_batch_size or _DEFAULT_ROWS
    inputs = Inputs(
        shape=shape,
        method="addax",
        sharding=arguments.sharding,
        ranks=arguments.gpus * arguments.nodes,
        zeroth_order=None,
        first_order=None,
        checkpointing=arguments.activation_checkpointing,
        attention=arguments.attn_implementation,
        zero3=_zero3(arguments, shape),
        accumulation=arguments.gradient_accumulation_steps,
    )
    return Request(
        inputs=inputs,
        zo_rows=arguments.per_device_zo_batch_size or train_rows,
        train_rows=train_rows,
        length=length,
        length_threshold=arguments.length_threshold,
        targets=arguments.target_tokens,
        gpu_memory=int(arguments.gpu_memory * GB),
        reserve=int(arguments.reserve * GB),
        gpus_per_node=arguments.gpus,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message[:1].upper()}{message[1:]}. See --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
    add("--gpu_memory", type=float, default=80.0, help="of a GPU, in GB (1e9 bytes)")
    add(
        "--reserve",
        type=float,
        default=RESERVE / GB,
        help="GB of a GPU that tensors do not get: CUDA context, NCCL, fragmentation",
    )
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
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches of a step")
    add("--length", type=int, help="tokens of the longest sequence (default: 2048 at most)")
    add(
        "--length_threshold",
        type=int,
        help="L_T, the longest first-order sequence of addax (default: the longest that fits)",
    )
    add("--target_tokens", type=int, help="predicted tokens of a sequence (default: all)")
    add("--deepspeed", help="DeepSpeed JSON (default: bucket sizes of ds_configs/zero3.json)")
    add("--sharding", choices=("zero3", "fsdp2", "none"), default="zero3", help="back end")
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
    add("--json", action="store_true", help="write JSON, in bytes, instead of a table")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    problems = [
        f"--{name} {value}: it must be at least 1."
        for name in (
            "gpus",
            "nodes",
            "per_device_train_batch_size",
            "per_device_zo_batch_size",
            "gradient_accumulation_steps",
            "length_threshold",
            "target_tokens",
        )
        if (value := getattr(arguments, name)) is not None and value < 1
    ]
    if not 0 <= arguments.reserve < arguments.gpu_memory:
        problems.append(
            f"--reserve {arguments.reserve:g} of --gpu_memory {arguments.gpu_memory:g}: it must be "
            "at least 0 and leave something."
        )
    if arguments.deepspeed and arguments.sharding != "zero3":
        problems.append(f"--deepspeed has no effect with --sharding {arguments.sharding}.")
    problems += [
        f"--{name} has no effect with --methods {' '.join(arguments.methods)}; remove it."
        for name, methods in _ONLY_FOR.items()
        if getattr(arguments, name) is not None and methods.isdisjoint(arguments.methods)
    ]
    both = arguments.per_device_train_batch_size, arguments.per_device_zo_batch_size
    if set(arguments.methods) == {"mezo"} and None not in both:
        problems.append(
            "--per_device_train_batch_size has no effect with --methods mezo beside "
            "--per_device_zo_batch_size; remove it."
        )
    raise_problems("These arguments cannot be planned with:", problems)


def _check_length(arguments: argparse.Namespace, shape: ModelShape, length: int) -> None:
    if length < 2 or length > (shape.positions or length):
        raise UserError(f"--length {length}: {shape.name} takes 2 to {shape.positions} tokens")
    if "addax" not in arguments.methods:
        return
    threshold = arguments.length_threshold
    if threshold is None and length <= GRAIN:
        raise UserError(
            f"--length {length}: L_T is looked for in multiples of {GRAIN} tokens, and none leaves "
            "a longer sequence that would be zeroth-order: give a --length_threshold below "
            "--length, or --methods without addax"
        )
    if threshold is not None and threshold >= length:
        raise UserError(
            f"--length_threshold {threshold} is not below --length {length}: no sequence would be "
            "zeroth-order"
        )


def _zero3(arguments: argparse.Namespace, shape: ModelShape) -> Zero3Settings:
    if not arguments.deepspeed:
        return Zero3Settings.from_json(automatic_sizes(shape.hidden), shape.hidden)
    config, where = load_ds_config(arguments.deepspeed)
    check_ds_config(config, where)
    return Zero3Settings.from_json(config["zero_optimization"], shape.hidden)
