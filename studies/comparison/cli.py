"""The command line of `launch/compare.py`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from addax_ds.utils.command_line import Parser, mistakes_end_the_program
from addax_ds.utils.errors import UserError
from addax_ds.utils.signals import on_sigterm
from studies.comparison.differences import draw_differences, read_differences
from studies.comparison.report import write_report
from studies.comparison.runner import Comparison, run
from studies.comparison.study import STUDIES


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing of the comparison, and write tables and figures of what there is."""
    parser = Parser(description=__doc__)
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--folder", type=Path, default=Path("comparison"), help="keeps the runs")
    parser.add_argument("--model_name_or_path", help="instead of the demo's model")
    parser.add_argument("--workers", type=_positive, default=1, help="trainings at a time")
    parser.add_argument(
        "--report", type=Path, help="folder to write comparison.json, .md and figures to, and stop"
    )
    parser.add_argument(
        "--differences",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="with --report: draw differences.png from these comparison.json files, and stop",
    )
    with mistakes_end_the_program():
        args = parser.parse_args(argv)
        if args.differences:
            if not args.report:
                raise UserError("--differences needs --report, the folder for differences.png")
            differences = read_differences(args.differences)
            args.report.mkdir(parents=True, exist_ok=True)
            draw_differences(differences, args.report / "differences.png")
            return
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    common = {
        "deepspeed": "ds_configs/zero3.json",
        "bf16": "True",
        "per_device_eval_batch_size": "32",
        "report_to": "none",
        "disable_tqdm": "True",
    }
    if args.model_name_or_path:
        common["model_name_or_path"] = args.model_name_or_path
    if not torch.accelerator.is_available():
        common["use_cpu"] = "True"
    comparison = Comparison([STUDIES[name] for name in args.study], args.folder, common)
    with mistakes_end_the_program():
        if args.report:
            write_report(comparison, args.report)
            return
        on_sigterm(lambda: sys.exit(1))  # which ends the jobs in progress
        # Two at once would clear each other's folders.
        args.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(args.folder / ".lock", timeout=0):
                run(comparison.jobs, args.workers)
                run(comparison.timings, 1)
        except Timeout:
            raise UserError(f"another comparison runs in {args.folder}") from None


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a whole number of at least 1")
    return int(word)
