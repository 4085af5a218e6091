"""The command line of ``launch/scaling.py``."""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from addax_ds.circumstances import distinct
from addax_ds.data.partition import METHODS
from addax_ds.ds_config import check_ds_config, load_ds_config
from addax_ds.errors import UserError
from addax_ds.rules import raise_problems
from addax_ds.scaling import figures, results
from addax_ds.scaling.point import SMALL_SHAPES, Point, sweep
from addax_ds.scaling.projection import LABEL, Network
from addax_ds.scaling.runner import Hosts, Job, run

logger = logging.getLogger(__name__)

_GB = 1e9
_PLACES = ("folder", "output", "hostfile")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing of the study, and write tables and figures of what there is."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the launch in progress
    try:
        failed = study(arguments)
    except UserError as error:
        sys.exit(f"scaling: {error}")
    if failed:
        names = "\n".join(str(job.folder / "output.log") for job in failed)
        sys.exit(
            f"scaling: {len(failed)} launch(es) failed, see\n{names}\nCall again to repeat them"
        )


def study(arguments: argparse.Namespace) -> list[Job]:
    """Run the jobs, write the results, and return the jobs that failed.

    Raises:
        UserError: for arguments that cannot be used, before anything is started.
    """
    _check(arguments)
    points = sweep(
        arguments.models,
        arguments.methods,
        sorted(set(arguments.ranks)),
        arguments.lengths,
        sharding=arguments.sharding,
        zo_rows=arguments.per_device_zo_batch_size,
        fo_rows=arguments.per_device_train_batch_size,
        target_tokens=arguments.target_tokens,
        activation_checkpointing=arguments.activation_checkpointing,
    )
    links = {number: _link(number, arguments) for number in arguments.ranks if number > 1}
    rounds = [
        [_job(point, number, arguments) for point in points] for number in range(arguments.rounds)
    ]
    # In the opposite order in every other round: a busy spell of the machine meets all methods.
    turns = [jobs[::-1] if number % 2 else jobs for number, jobs in enumerate(rounds)]
    failed: list[Job] = []
    if not arguments.report_only:
        jobs = [*links.values(), *(job for turn in turns for job in turn)]
        hosts = Hosts(arguments.hostfile, arguments.ranks_per_node)
        failed = run(jobs, hosts, arguments.time_limit)
    _write(points, rounds, links, arguments)
    return failed


def _job(point: Point, number: int, arguments: argparse.Namespace) -> Job:
    content = {"point": point.as_json(), "steps": arguments.steps, "deepspeed": arguments.deepspeed}
    folder = arguments.folder / "points" / point.name / f"round-{number}"
    return Job("addax_ds.scaling.measure", point.ranks, folder, content)


def _link(ranks: int, arguments: argparse.Namespace) -> Job:
    return Job(
        "addax_ds.scaling.link", ranks, arguments.folder / "links" / f"x{ranks}", {"ranks": ranks}
    )


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
        arguments.intra_node_gbs * _GB,
        arguments.inter_node_gbs * _GB,
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
    parser = argparse.ArgumentParser(
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
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to compare")
    add("--ranks", nargs="+", type=int, default=[1, 2], help="processes, one a GPU")
    add("--lengths", nargs="+", type=int, default=[256], help="tokens of a sequence")
    add("--sharding", choices=("zero3", "fsdp2"), default="zero3", help="back end")
    add(
        "--deepspeed", help="JSON (default: ds_configs/zero3.json with stage3_max_reuse_distance 0)"
    )
    add("--per_device_train_batch_size", type=int, default=4, help="first-order rows of a rank")
    add("--per_device_zo_batch_size", type=int, default=4, help="zeroth-order rows of a rank")
    add("--target_tokens", type=int, default=1, help="predicted tokens of a sequence")
    add("--activation_checkpointing", action="store_true", help="recompute blocks in backward")
    add("--steps", type=int, default=5, help="timed, and as many watched, after 3 of warm-up")
    add("--rounds", type=int, default=1, help="launches of each point, in turns")
    add("--time_limit", type=float, default=900.0, help="seconds of a launch")
    add("--hostfile", type=Path, help="DeepSpeed's; --folder has to be shared by the hosts")
    add("--ranks_per_node", type=int, default=8, help="of each host of --hostfile")
    add("--folder", type=Path, default=Path("scaling"), help="keeps the launches")
    add("--output", type=Path, help="for tables and figures (default: --folder)")
    add("--report_only", action="store_true", help="write them without measuring")
    add("--project", nargs="+", type=int, default=[8, 64, 512], help="numbers of GPUs")
    add("--gpus_per_node", type=int, default=8, help="of the projection")
    add("--intra_node_gbs", type=float, default=300.0, help="GB/s from a GPU to one of its node")
    add("--inter_node_gbs", type=float, default=50.0, help="GB/s from a node to another one")
    add("--latency_us", type=float, default=10.0, help="microseconds of a hop")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    problems = []
    for name, value in vars(arguments).items():
        for number in value if isinstance(value, list) else [value]:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and number <= 0 and name != "latency_us":
                problems.append(f"--{name} {number}: it must be above 0.")
    if arguments.latency_us < 0:
        problems.append(f"--latency_us {arguments.latency_us}: it must be at least 0.")
    if arguments.deepspeed and arguments.sharding != "zero3":
        problems.append(f"--deepspeed has no effect with --sharding {arguments.sharding}.")
    raise_problems("These arguments cannot be used:", problems)
    if arguments.deepspeed:
        check_ds_config(*load_ds_config(arguments.deepspeed))
