"""Which points the scaling study measures, when again, and what its command refuses."""

import csv
import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from transformers import OPTConfig

from addax_ds.utils.errors import UserError
from studies.scaling import cli, runner
from studies.scaling.point import SMALL_SHAPES, Point, sweep
from studies.scaling.runner import Hosts, Job
from tests.support.ranks import ROOT
from tests.support.scaling_records import outcome

# ---- points --------------------------------------------------------------------------------------


def test_a_sweep_is_all_combinations_with_names_of_their_own():
    points = sweep(["tiny", "facebook/opt-125m"], ["addax", "adamw"], [1, 2], [16, 32])
    expected = itertools.product(
        ["tiny", "facebook/opt-125m"], ["addax", "adamw"], [1, 2], [16, 32]
    )
    assert {(p.model, p.method, p.ranks, p.length) for p in points} == set(expected)
    assert len({p.name for p in points}) == len(points) == 16
    assert all("/" not in p.name for p in points)


@pytest.fixture
def folders(tmp_path) -> tuple[str, str]:
    """Two models in folders of one name."""
    for place, layers in (("one", 1), ("other", 2)):
        shape = {**SMALL_SHAPES["tiny"], "num_hidden_layers": layers}
        OPTConfig(**shape).save_pretrained(tmp_path / place / "model")
    return str(tmp_path / "one" / "model"), str(tmp_path / "other" / "model")


@pytest.mark.parametrize("file", ["", "/config.json"])
def test_models_in_files_have_names_of_their_own(folders, file):
    one, other = sweep([model + file for model in folders], ["mezo"], [1], [16])
    assert one.name != other.name
    assert one.name.startswith("model-")
    assert other.name.startswith("model-")


def test_another_configuration_in_the_same_file_is_another_model(folders):
    before = Point(folders[0], "mezo", 1, 16).name
    config = Path(folders[0], "config.json")
    config.write_text(Path(folders[1], "config.json").read_text())
    assert Point(folders[0], "mezo", 1, 16).name != before
    # Both folders hold one model now, and would share a folder of measurements.
    with pytest.raises(UserError, match="measured twice"):
        sweep(folders, ["mezo"], [1], [16])


@pytest.mark.parametrize("twice", ["models", "methods", "ranks", "lengths"])
def test_what_is_given_twice_is_refused(twice):
    given = {"models": ["tiny"], "methods": ["mezo"], "ranks": [1], "lengths": [16]}
    given[twice] *= 2
    with pytest.raises(UserError, match="tiny-mezo-16-x1 would be measured twice"):
        sweep(**given)


def test_built_in_shapes_have_no_dropout():
    for model in ("tiny", "opt-125m", "facebook/opt-66b"):
        assert Point(model, "addax", 1, 32).config().dropout == 0.0


@pytest.mark.parametrize(
    ("model", "method", "length", "sharding", "words"),
    [
        ("tiny", "addax", 67, "zero3", "takes 8 to 66"),
        ("tiny", "addax", 7, "zero3", "takes 8 to 66"),
        ("tiny", "adamw", 32, "fsdp2", "--sharding zero3 alone"),
        ("tiny", "adamw", 32, "fsdp2", "there are addax, addax-wa, mezo, ip-sgd$"),
        ("opt-11n", "addax", 32, "zero3", "--models opt-11n: .* tiny, .* mean 'opt-11m'"),
        (str(ROOT / "tests"), "addax", 32, "zero3", "^--models .*tests: .* no config.json"),
    ],
)
def test_points_that_cannot_run(model, method, length, sharding, words):
    with pytest.raises(UserError, match=words):
        sweep([model], [method], [1], [length], sharding=sharding)


# ---- runner --------------------------------------------------------------------------------------

PROGRAM = """
import json, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
job = json.loads((folder / "point.json").read_text())
with Path(job["log"]).open("a") as log:
    log.write(folder.name + "\\n")
if job["how"] == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(job["log"]).parent / "child").write_text(str(child.pid))
    time.sleep(600)
if job["how"] == "fails":
    sys.exit("no luck")
(folder / "measured.json").write_text(json.dumps({"value": job["value"]}))
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(
        runner, "_command", lambda job, hosts: [sys.executable, str(program), str(job.folder)]
    )
    log = tmp_path / "log"

    def make(**how: str) -> list[Job]:
        return [
            Job("none", 1, tmp_path / name, {"how": kind, "log": str(log), "value": 1})
            for name, kind in how.items()
        ]

    make.log = lambda: log.read_text().split()
    return make


def test_what_was_measured_is_not_run_again(jobs):
    failed = runner.run(jobs(a="works", b="fails", c="works"), Hosts(), 60)
    assert [job.folder.name for job in failed] == ["b"]
    assert jobs.log() == ["a", "b", "c"]
    assert [job.outcome["value"] for job in jobs(a="works", c="works")] == [1, 1]
    assert jobs(b="fails")[0].failure["reason"] == "exit status 1"
    assert runner.run(jobs(a="works", b="works", c="works"), Hosts(), 60) == []
    assert jobs.log() == ["a", "b", "c", "b"]
    assert jobs(b="works")[0].failure is None


@pytest.mark.slow
def test_a_job_that_takes_too_long_is_ended_with_its_children(jobs, tmp_path):
    began = time.monotonic()
    failed = runner.run(jobs(slow="hangs", a="works"), Hosts(), 6.0)
    assert [job.folder.name for job in failed] == ["slow"]
    assert failed[0].failure["reason"] == "took more than 6 s"
    assert jobs.log() == ["slow", "a"]
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - began < 300  # the child sleeps for 600 s


def test_a_folder_with_other_settings_is_refused_before_anything_runs(jobs):
    runner.run(jobs(a="works"), Hosts(), 60)
    changed = jobs(b="works", a="works")
    changed[1].content["value"] = 2
    with pytest.raises(UserError, match="value 1 there, 2 here"):
        runner.run(changed, Hosts(), 60)
    assert jobs.log() == ["a"]


def test_ranks_over_a_hostfile(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two of them\nnode-0 slots=8\nnode-1 slots=8\n")
    hosts = Hosts(hostfile, ranks_per_node=8)
    for ranks, nodes, each in ((16, 2, 8), (4, 1, 4), (12, 2, 6)):
        flags = ["--hostfile", hostfile, "--num_nodes", nodes, "--num_gpus", each, "--force_multi"]
        assert hosts.launcher_flags(ranks) == [str(flag) for flag in flags]
        assert hosts.placement(ranks) == {f"node-{node}": each for node in range(nodes)}
    with pytest.raises(UserError, match="2 nodes with different numbers"):
        hosts.launcher_flags(13)
    with pytest.raises(UserError, match=r"3 nodes, and .*hosts names 2"):
        hosts.launcher_flags(24)
    assert Hosts().launcher_flags(2) == ["--num_gpus", "2"]
    assert Hosts().placement(2) == {}


@pytest.mark.parametrize(
    ("text", "words"), [(None, "no such file"), ("node-0 slits=8\n", "node-0 slits=8")]
)
def test_hostfiles_that_cannot_be_used(tmp_path, text, words):
    hostfile = tmp_path / "hosts"
    if text is not None:
        hostfile.write_text(text)
    with pytest.raises(UserError, match=words):
        Hosts(hostfile).placement(2)


# ---- command line --------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The command, with a runner that makes up what it measures."""

    def measure(jobs: list[Job], hosts: Hosts, time_limit: float) -> list[Job]:
        for job in jobs:
            job.check()
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "point.json").write_text(json.dumps(job.content))
            link = {"bandwidth": 1e9, "latency_s": 1e-6}
            made_up = {**outcome([1.0], job.ranks), **link, "circumstances": {}}
            (job.folder / runner.OUTCOME).write_text(json.dumps(made_up))
        return []

    monkeypatch.setattr(cli, "run", measure)
    monkeypatch.setattr(cli, "on_sigterm", lambda _: None)

    def run(*flags: str) -> list[dict[str, str]]:
        """Return the rows of its table."""
        folder = tmp_path / "study"
        cli.main(["--models", "tiny", "--lengths", "16", "--folder", str(folder), *flags])
        return list(csv.DictReader((folder / "scaling.csv").open()))

    return run


@contextmanager
def refused(words: str) -> Iterator[None]:
    """Expect a sentence, and status 1."""
    with pytest.raises(SystemExit) as ended:
        yield
    assert ended.value.code == 1
    assert words in str(ended.value.__cause__)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--steps 0", "--steps 0: it must be above 0."),
        ("--time_limit nan", "--time_limit nan: it must be finite."),
        ("--latency_us inf", "--latency_us inf: it must be finite."),
        ("--latency_us -1", "--latency_us -1.0: it must be at least 0."),
        ("--intra_node_gbs nan", "--intra_node_gbs nan: it must be finite."),
        ("--inter_node_gbs inf", "--inter_node_gbs inf: it must be finite."),
        ("--sharding fsdp2 --deepspeed x.json", "--deepspeed has no effect with --sharding fsdp2"),
        ("--ranks_per_node 4", "--ranks_per_node has no effect without --hostfile"),
        (
            "--methods sgd ip-sgd --per_device_zo_batch_size 2",
            "--per_device_zo_batch_size has no effect with --methods sgd ip-sgd",
        ),
        (
            "--methods mezo --per_device_train_batch_size 2",
            "--per_device_train_batch_size has no effect with --methods mezo",
        ),
        ("--hostfile nowhere", "--hostfile nowhere: there is no such file"),
        ("--deepspeed nowhere.json", "nowhere.json"),
        ("--methods nothing", "Argument --methods: invalid choice"),
        ("--unheard_of", "Unrecognized arguments: --unheard_of"),
    ],
)
def test_mistakes_are_sentences(study, flags, words, capsys):
    with refused(words):
        study(*flags.split())
    assert "usage:" not in capsys.readouterr().err


def test_the_default_methods_are_those_that_run(study):
    rows = study("--sharding", "fsdp2", "--ranks", "1")
    assert [row["method"] for row in rows] == ["addax", "addax-wa", "mezo", "ip-sgd"]


@pytest.mark.parametrize("more", [(), ("--report_only",)])
def test_results_of_this_machine_are_not_those_of_other_hosts(study, tmp_path, more):
    study("--ranks", "2")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-0 slots=1\nnode-1 slots=1\n")
    with refused("hosts.node-0 None there, 1 here; hosts.node-1 None there, 1 here"):
        study("--ranks", "2", "--hostfile", str(hostfile), "--ranks_per_node", "1", *more)


def test_a_deepspeed_json_is_known_by_what_it_holds(study, tmp_path):
    def written(name: str, bucket: int) -> list[str]:
        zero = {"stage": 3, "reduce_bucket_size": bucket}
        (tmp_path / name).write_text(json.dumps({"zero_optimization": zero}))
        return ["--ranks", "1", "--deepspeed", str(tmp_path / name)]

    measured = study(*written("a.json", 1000))
    assert study(*written("b.json", 1000), "--report_only") == measured
    with refused("(deepspeed.zero_optimization.reduce_bucket_size 1000 there, 2000 here)"):
        study(*written("a.json", 2000))


def test_rows_that_a_method_does_not_have_do_not_tell_its_points_apart(study):
    both = ("--per_device_train_batch_size", "3", "--per_device_zo_batch_size", "2")
    study("--ranks", "1", "--methods", "addax", "mezo", "adamw", *both)
    report = ("--ranks", "1", "--report_only", "--methods")
    assert len(study(*report, "mezo", *both[2:])) == 1
    assert len(study(*report, "adamw", *both[:2])) == 1
    with refused("(point.fo_rows 3 there, 4 here)"):
        study(*report, "addax", *both[2:])
