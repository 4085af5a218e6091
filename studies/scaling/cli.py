"""The command line of ``launch/scaling.py``."""

import argparse
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from addax_ds.config.deepspeed import check_ds_config, load_ds_config
from addax_ds.optim.methods import IN_PLACE, METHODS, ZEROTH_ORDER
from addax_ds.planner.constants import GB
from addax_ds.utils.command_line import Parser, mistakes_end_the_program
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import raise_problems
from addax_ds.utils.signals import on_sigterm
from studies.provenance import distinct
from studies.scaling import figures, results
from studies.scaling.point import SMALL_SHAPES, Point, sweep
from studies.scaling.projection import LABEL, Network
from studies.scaling.runner import Hosts, Job, run

logger = logging.getLogger(__name__)

_PLACES = ("folder", "output", "hostfile")
_DEFAULTS = {"per_device_train_batch_size": 4, "per_device_zo_batch_size": 4, "ranks_per_node": 8}
"""Of the arguments that may not be given where they have no effect."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing of the study, and write tables and figures of what there is."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    on_sigterm(lambda: sys.exit(1))  # which ends the launch in progress
    with mistakes_end_the_program():
        failed = study(_parser().parse_args(argv))
        if failed:
            names = "\n".join(str(job.folder / "output.log") for job in failed)
            raise UserError(
                f"{len(failed)} launch(es) failed, see\n{names}\nCall again to repeat them"
            )


def study(arguments: argparse.Namespace) -> list[Job]:
    """Run the jobs, write the results, and return the jobs that failed.

    Raises:
        UserError: for arguments that cannot be used, before anything is started.
    """
    _fill_in(arguments)
    hosts = Hosts(arguments.hostfile, arguments.ranks_per_node)
    ds_config = _ds_config(arguments)
    points = sweep(
        arguments.models,
        arguments.methods,
        sorted(arguments.ranks),
        arguments.lengths,
        sharding=arguments.sharding,
        zo_rows=arguments.per_device_zo_batch_size,
        fo_rows=arguments.per_device_train_batch_size,
        target_tokens=arguments.target_tokens,
        activation_checkpointing=arguments.activation_checkpointing,
    )
    links = {n: _link(n, hosts, arguments.folder) for n in arguments.ranks if n > 1}
    rounds = [
        [_job(point, number, hosts, ds_config, arguments) for point in points]
        for number in range(arguments.rounds)
    ]
    # In the opposite order in every other round: a busy spell of the machine meets all methods.
    turns = [jobs[::-1] if number % 2 else jobs for number, jobs in enumerate(rounds)]
    jobs = [*links.values(), *(job for turn in turns for job in turn)]
    failed: list[Job] = []
    if arguments.report_only:
        for job in jobs:
            job.check()
    else:
        failed = run(jobs, hosts, arguments.time_limit)
    _write(points, rounds, links, arguments)
    return failed


def _job(
    point: Point,
    number: int,
    hosts: Hosts,
    ds_config: dict[str, Any] | None,
    arguments: argparse.Namespace,
) -> Job:
    content = {
        "point": point.as_json(),
        "steps": arguments.steps,
        "deepspeed": ds_config,
        "hosts": hosts.placement(point.ranks),
    }
    folder = arguments.folder / "points" / point.name / f"round-{number}"
    return Job("studies.scaling.measure", point.ranks, folder, content)


def _link(ranks: int, hosts: Hosts, folder: Path) -> Job:
    content = {"ranks": ranks, "hosts": hosts.placement(ranks)}
    return Job("studies.scaling.link", ranks, folder / "links" / f"x{ranks}", content)


def _ds_config(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return DeepSpeed's JSON, by which points are told apart; None for another back end.

    Raises:
        UserError: if it cannot be used.
    """
    if arguments.sharding != "zero3":
        return None
    config, where = load_ds_config(arguments.deepspeed or "zero3")
    check_ds_config(config, where)
    if not arguments.deepspeed:
        # Else a small model would stay gathered from forward to backward; a large one does not.
        config["zero_optimization"]["stage3_max_reuse_distance"] = 0
    return config


def _write(
    points: list[Point],
    rounds: list[list[Job]],
    links: dict[int, Job],
    arguments: argparse.Namespace,
) -> None:
    measured = [
        results.Measured(
            point,
            [job.outcome for job in jobs if job.outcome],
            [job.failure["reason"] for job in jobs if job.failure],
        )
        for point, jobs in zip(points, zip(*rounds, strict=True), strict=True)
    ]
    network = Network(
        arguments.gpus_per_node,
        arguments.intra_node_gbs * GB,
        arguments.inter_node_gbs * GB,
        arguments.latency_us * 1e-6,
    )
    tried = [m for m in measured if m.outcomes or m.failures]
    folder = arguments.output or arguments.folder
    about: dict[str, Any] = {
        "configuration": {
            name: value for name, value in vars(arguments).items() if name not in _PLACES
        },
        "circumstances": distinct(o["circumstances"] for m in tried for o in m.outcomes),
    }
    found = {number: job.outcome for number, job in links.items() if job.outcome}
    rows, projected = results.write(folder, tried, found, arguments.project, network, about)
    if any(row["status"] == "measured" for row in rows):
        figures.draw_points(rows, folder / "scaling.png")
    if projected:
        figures.draw_projection(projected, folder / "projection.png")
    else:
        logger.info("Nothing to project from: it takes a point on 2 ranks or more")
    logger.info("Results: %s (projections are a %s)", folder.resolve(), LABEL)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Measure steps over ranks, model sizes, lengths and methods; interrupted, go "
        "on where it stopped.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=["opt-11m"],
        help=f"{', '.join(SMALL_SHAPES)}, facebook/opt-125m and its like, folders or config.json "
        "files; weights are random",
    )
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        help="what to compare (default: all that run under --sharding)",
    )
    add("--ranks", nargs="+", type=int, default=[1, 2], help="processes, one a GPU")
    add("--lengths", nargs="+", type=int, default=[256], help="tokens of a sequence")
    add("--sharding", choices=("zero3", "fsdp2"), default="zero3", help="back end")
    add(
        "--deepspeed", help="JSON (default: ds_configs/zero3.json with stage3_max_reuse_distance 0)"
    )
    add("--per_device_train_batch_size", type=int, help="first-order rows of a rank (default: 4)")
    add("--per_device_zo_batch_size", type=int, help="zeroth-order rows of a rank (default: 4)")
    add("--target_tokens", type=int, default=1, help="predicted tokens of a sequence")
    add("--activation_checkpointing", action="store_true", help="recompute blocks in backward")
    add("--steps", type=int, default=5, help="timed, and as many watched, after 3 of warm-up")
    add("--rounds", type=int, default=1, help="launches of each point, in turns")
    add("--time_limit", type=float, default=900.0, help="seconds of a launch")
    add("--hostfile", type=Path, help="DeepSpeed's; --folder has to be shared by the hosts")
    add("--ranks_per_node", type=int, help="of each host of --hostfile (default: 8)")
    add("--folder", type=Path, default=Path("scaling"), help="keeps the launches")
    add("--output", type=Path, help="for tables and figures (default: --folder)")
    add("--report_only", action="store_true", help="write them without measuring")
    add("--project", nargs="+", type=int, default=[8, 64, 512], help="numbers of GPUs")
    add("--gpus_per_node", type=int, default=8, help="of the projection")
    add("--intra_node_gbs", type=float, default=300.0, help="GB/s from a GPU to one of its node")
    add("--inter_node_gbs", type=float, default=50.0, help="GB/s from a node to another one")
    add("--latency_us", type=float, default=10.0, help="microseconds of a hop")
    return parser


def _fill_in(arguments: argparse.Namespace) -> None:
    """Check the arguments, and give those that are missing their values.

    Raises:
        UserError: lists all that cannot be used.
    """
    if arguments.methods is None:
        arguments.methods = list(METHODS if arguments.sharding == "zero3" else IN_PLACE)
    problems = [*_wrong_numbers(arguments), *_without_effect(arguments)]
    raise_problems("These arguments cannot be used:", problems)
    for name, value in _DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def _wrong_numbers(arguments: argparse.Namespace) -> Iterator[str]:
    for name, value in vars(arguments).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                yield f"--{name} {number}: it must be finite."
            elif number < 0 and name == "latency_us":
                yield f"--{name} {number}: it must be at least 0."
            elif number <= 0 and name != "latency_us":
                yield f"--{name} {number}: it must be above 0."


def _without_effect(arguments: argparse.Namespace) -> Iterator[str]:
    methods = f"with --methods {' '.join(arguments.methods)}"
    reasons = {
        "deepspeed": (arguments.sharding != "zero3", f"with --sharding {arguments.sharding}"),
        "ranks_per_node": (arguments.hostfile is None, "without --hostfile"),
        "per_device_zo_batch_size": (set(ZEROTH_ORDER).isdisjoint(arguments.methods), methods),
        "per_device_train_batch_size": (set(arguments.methods) == {"mezo"}, methods),
    }
    for name, (holds, reason) in reasons.items():
        if holds and getattr(arguments, name) is not None:
            yield f"--{name} has no effect {reason}; remove it."
