"""Runs trials as processes of their own, and goes on where an earlier call was interrupted.

A trial's folder has ``outcome.json`` once it is over; one without it is run again from the start.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from addax_ds.optim.report import NON_FINITE
from addax_ds.utils.errors import UserError
from studies.comparison.outcome import Outcome
from studies.comparison.study import LAUNCHER, Study, Trial
from studies.jobs import LOG, Launcher, environment, free_port, read_json, script
from studies.provenance import collect_provenance

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[2]
_GRACE_S = 60.0
_MERGED = "merged"
TIMED_ROUNDS = 2
TIMED_STEPS = 6


@dataclass(frozen=True)
class Job:
    """One process: a training, or the reading of the test rows with what it has left.

    Attributes:
        trial: what it is for.
        folder: where its files go.
        flags: arguments of the program.
        program: what to run.
    """

    trial: Trial
    folder: Path
    flags: dict[str, str]
    program: str = LAUNCHER

    @property
    def outcome(self) -> Outcome | None:
        """Outcome of the job, or None if it is not over or was run with other flags."""
        found = Outcome.read(self.folder)
        if found is None or _identity(found.flags) != _identity(self.flags):
            return None
        return found


def _identity(flags: dict[str, str]) -> dict[str, str]:
    """Leave out what depends on the machine that asks."""
    return {name: value for name, value in flags.items() if name != "use_cpu"}


class Comparison:
    """The jobs of some studies, in the order in which they are due.

    Args:
        studies: what to compare.
        folder: where the runs are kept.
        common: arguments of ``launch/train.py`` for all jobs.
    """

    def __init__(self, studies: list[Study], folder: Path, common: dict[str, str]) -> None:
        self.studies = studies
        self.folder = folder
        self._common = common

    def training(self, trial: Trial) -> Job:
        """Return the job that trains."""
        assert trial.contender is not None
        flags = {**self._common, **trial.flags}
        return Job(trial, self.folder / trial.name, flags, trial.contender.program)

    def test(self, trial: Trial) -> Job:
        """Return the job that reads the test rows with a trained model, or the model as it is."""
        flags = {**self._common, **trial.study.data_flags, "num_train": "0"}
        if trial.contender is not None:
            # A folder of adapters is no model to be read with.
            name = _MERGED if "lora_r" in trial.contender.flags else "model"
            flags["model_name_or_path"] = str((self.folder / trial.name / name).resolve())
        return Job(trial, self.folder / trial.name / "test", flags)

    def chosen(self, study: Study) -> dict[str, Trial]:
        """Return, for each method whose grid is complete, the trial that is best on dev."""
        found: dict[str, Trial] = {}
        for contender in study.contenders:
            trials = [trial for trial in study.grid if trial.contender == contender]
            outcomes = [self.training(trial).outcome for trial in trials]
            ranked = [
                (outcome.dev_score, trial)
                for trial, outcome in zip(trials, outcomes, strict=True)
                if outcome is not None and outcome.dev_score is not None
            ]
            if ranked and None not in outcomes:
                _, found[contender.name] = max(ranked, key=lambda pair: pair[0])
        return found

    def jobs(self) -> Iterator[Job]:
        """Yield what can be run as far as is known by now; more is known when it has run."""
        for study in self.studies:
            yield self.test(Trial(study))
            yield from map(self.training, study.grid)
            winners = self.chosen(study).values()
            for seed in study.seeds:
                for winner in winners:
                    trial = Trial(study, winner.contender, winner.learning_rate, seed)
                    training = self.training(trial)
                    yield training
                    if training.outcome is not None and training.outcome.exit_code == 0:
                        yield self.test(trial)

    def timings(self) -> Iterator[Job]:
        """Yield short trainings, method after method in rounds, for when nothing else runs."""
        for study in self.studies:
            for seed in range(TIMED_ROUNDS):
                for contender in study.contenders:
                    trial = Trial(study, contender, contender.learning_rates[0], seed)
                    short = {"max_steps": str(TIMED_STEPS), "load_best_model_at_end": "False"}
                    short |= dict.fromkeys(("eval_strategy", "save_strategy"), "no")
                    folder = self.folder / study.name / f"timing-{contender.name}-{seed}"
                    job = self.training(trial)
                    yield replace(job, folder=folder, flags={**job.flags, **short})


def run(next_jobs: Callable[[], Iterator[Job]], workers: int) -> None:
    """Run jobs until none is left; an exception ends those that run.

    Args:
        next_jobs: what to run, finished jobs included; asked again after each one.
        workers: processes at a time.

    Raises:
        UserError: jobs failed otherwise than by diverging; the others have run.
    """
    one_thread = {**environment(), "OMP_NUM_THREADS": "1"}
    launcher = Launcher(_command, _begin, _finish, one_thread, _ROOT, grace=_GRACE_S)
    failed = launcher.run(next_jobs, workers)
    if failed:
        logs = "\n".join(str(job.folder / LOG) for job in sorted(failed, key=lambda j: j.folder))
        raise UserError(f"{len(failed)} job(s) failed, see\n{logs}\nCall again to repeat them")


def _begin(job: Job, command: list[str]) -> None:
    logger.info("%s", job.folder)
    (job.folder / "command.json").write_text(json.dumps(command, indent=1) + "\n")
    model = Path(job.flags.get("model_name_or_path", ""))
    if model.name == _MERGED and not model.is_dir():
        _merge(model.with_name("model"), model)


def _merge(adapters: Path, folder: Path) -> None:
    """Write a model with its adapters added to its weights in fp32, rounded to bf16."""
    from peft import AutoPeftModelForCausalLM

    adapted = AutoPeftModelForCausalLM.from_pretrained(adapters, dtype=torch.float32)
    merged: Any = adapted.merge_and_unload()
    partial = folder.with_name(f".{folder.name}")
    merged.to(torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(adapters).save_pretrained(partial)
    partial.replace(folder)


def _command(job: Job) -> list[str]:
    launcher = [script("deepspeed"), "--num_gpus", "1"]
    program = ["--master_port", str(free_port()), str(_ROOT / job.program)]
    flags = {**job.flags, "output_dir": str(job.folder.resolve())}
    return [*launcher, *program, *(f"--{name}={value}" for name, value in flags.items())]


def _finish(job: Job, command: list[str], exit_code: int | None, seconds: float) -> bool:
    """Write the outcome of a job that has ended by itself or diverged; else say False."""
    assert exit_code is not None, "no job has a time limit"
    diverged = NON_FINITE in (job.folder / LOG).read_text(errors="replace")
    complete = (job.folder / "all_results.json").is_file()
    if not (diverged if exit_code != 0 else complete):
        return False
    state = read_json(job.folder / "trainer_state.json") or {}
    outcome = Outcome(
        exit_code=exit_code,
        seconds=round(seconds, 1),
        flags=job.flags,
        command=command,
        circumstances=collect_provenance(),
        results=read_json(job.folder / "all_results.json") or {},
        log=state.get("log_history", []),
    )
    for checkpoint in job.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    outcome.write(job.folder)
    logger.info("%s: exit %d after %.0f s", job.folder, exit_code, seconds)
    return True
