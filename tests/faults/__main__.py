"""Command line of `tests.faults`."""

import argparse
import json
import platform
import shutil
import sys
import time
from importlib.metadata import version
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.kills import TARGETS, Kill, Strike, interrupt
from tests.faults.scenarios import SCENARIOS
from tests.faults.training import BACK_ENDS, Failure, Training, write_data

KILLS_A_RUN = 6
STEPS = 80
PACKAGES = ("addax_ds", "torch", "deepspeed", "transformers", "accelerate")


def main() -> None:
    arguments = _parse()
    folder: Path = arguments.folder
    report = _Report(folder / "report.json", {"seed": arguments.seed, "kills": arguments.kills})
    data = folder / "data"
    if not data.exists():
        write_data(data)
    start = time.monotonic()
    try:
        references = {name: _reference(name, data, folder, report) for name in BACK_ENDS}
        _kill(arguments.kills, arguments.seed, references, folder, report)
        for scenario, (back_ends, _) in SCENARIOS.items():
            for name in back_ends:
                _play(scenario, references[name], folder, report)
    except Failure as failure:
        sys.exit(f"FAILED: {failure}")
    finally:
        report.add_seconds(time.monotonic() - start)
    print(report.summary())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"))
    return parser.parse_args()


class _Report:
    """Everything that has been completed, on disk after each part."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        packages = {name: version(name) for name in PACKAGES}
        about = {**settings, "steps": STEPS, "python": platform.python_version(), **packages}
        self.content: dict[str, Any] = {"about": about, "parts": {}, "seconds": 0.0}
        if path.exists():
            found = json.loads(path.read_text())
            if found["about"] != about:
                sys.exit(f"{path} is of other settings or versions: {found['about']}; remove it")
            self.content = found

    def done(self, part: str) -> bool:
        return part in self.content["parts"]

    def add(self, part: str, result: Any) -> None:
        self.content["parts"][part] = result
        self._write()

    def add_seconds(self, seconds: float) -> None:
        self.content["seconds"] = round(self.content["seconds"] + seconds, 1)
        self._write()

    def strikes(self) -> list[dict[str, Any]]:
        return [s for part in self.content["parts"].values() for s in part.get("strikes", [])]

    def summary(self) -> str:
        strikes = self.strikes()
        lines = [
            f"{len(strikes)} kills, {sum(s['while_saving'] for s in strikes)} of them in a save, "
            f"{self.content['seconds']:.0f} s in all: {self._path}"
        ]
        for name in BACK_ENDS:
            for target in TARGETS:
                seconds = [
                    s["seconds"]
                    for s in strikes
                    if s["back_end"] == name and s["kill"]["target"] == target
                ]
                if seconds:
                    lines.append(
                        f"{name}, {target}: {len(seconds)} kills, all processes gone after "
                        f"{max(seconds):.1f} s at most"
                    )
        for part, result in self.content["parts"].items():
            if "not run" in result:
                lines.append(f"{part}: NOT RUN: {result['not run']}")
        return "\n".join(lines)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.content, indent=1) + "\n")


def _reference(back_end: str, data: Path, folder: Path, report: _Report) -> Training:
    training = Training(back_end, data, folder / f"{back_end}-uninterrupted", STEPS)
    if not report.done(f"{back_end}: uninterrupted"):
        shutil.rmtree(training.output, ignore_errors=True)
        start = time.monotonic()
        training.finish()
        seconds = round(time.monotonic() - start, 1)
        print(f"{back_end}: uninterrupted training of {STEPS} steps, {seconds} s", flush=True)
        report.add(f"{back_end}: uninterrupted", {"seconds": seconds})
    return training


def _kill(
    kills: int, seed: int, references: dict[str, Training], folder: Path, report: _Report
) -> None:
    """Kill trainings, on one back end after the other, until there have been enough kills."""
    for run in count():
        done = len(report.strikes())
        if done >= kills:
            return
        name = list(BACK_ENDS)[run % len(BACK_ENDS)]
        part = f"{name}: run {run}"
        if report.done(part):
            continue
        output = folder / f"{name}-run-{run}"
        shutil.rmtree(output, ignore_errors=True)
        training = Training(name, references[name].data, output, STEPS)
        random = Random(f"{seed} {run}")
        plan = [Kill.draw(random) for _ in range(min(KILLS_A_RUN, kills - done))]
        strikes: list[Strike] = []

        def tell(strike: Strike, strikes: list[Strike] = strikes, done: int = done) -> None:
            strikes.append(strike)
            print(f"[{done + len(strikes):2}/{kills}] {strike}", flush=True)

        interrupt(training, plan, tell)
        training.require_same_result(references[name])
        print(f"        {part}: the same weights and log, {len(strikes)} kills", flush=True)
        report.add(part, {"strikes": [strike.content() for strike in strikes]})
        shutil.rmtree(output)


def _play(scenario: str, reference: Training, folder: Path, report: _Report) -> None:
    part = f"{reference.back_end}: {scenario}"
    if report.done(part):
        return
    own = folder / part.replace(": ", "-").replace(" ", "-")
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    _, play = SCENARIOS[scenario]
    seen = play(reference, own)
    print(f"{part}: {seen}", flush=True)
    report.add(part, seen)
    shutil.rmtree(own)


if __name__ == "__main__":
    main()
