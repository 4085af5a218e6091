"""Two nodes: two launchers on this machine, each with one rank, against one node of two ranks.

Each has a network namespace of its own, with an address, where the machine allows it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from addax_ds.checkpoint import folders
from addax_ds.checkpoint.atomic import verify
from tests.support.launcher import Outcome, Started, finish, launch, start
from tests.support.rank_group import Lazy
from tests.support.ranks import ROOT, free_port
from tests.support.tiny import rows, write_model, write_rows

TRAIN = "launch/train.py"
STEPS, SAVED_AT = 4, 2
BACK_ENDS = {
    "zero3": ("deepspeed", ["--deepspeed=ds_configs/zero3.json"]),
    "fsdp2": ("torchrun", ["--sharding=fsdp2", "--use_cpu=True"]),
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("program_alone")]


@dataclass(frozen=True)
class Host:
    """How a program is started on a node, and its address."""

    prefix: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    variables: dict[str, str] = field(default_factory=dict)


def separate_hosts(stack: ExitStack) -> list[Host]:
    """Two network namespaces with a slow cable between them; `stack` removes them."""
    names = [f"addax-{os.getpid()}-{number}" for number in range(2)]
    for name in names:
        ip("netns", "add", name)
        stack.callback(ip, "netns", "delete", name)
    first, second = names
    ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "eth0", "netns", second)
    hosts = []
    for number, name in enumerate(names, 1):
        address = f"10.99.0.{number}"
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
        with suppress(OSError, subprocess.CalledProcessError):  # not every kernel can
            limit = ("tbf", "rate", "50mbit", "burst", "32kbit", "latency", "400ms")
            run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *limit)
        prefix = ("ip", "netns", "exec", name)
        hosts.append(Host(prefix, address, {"GLOO_SOCKET_IFNAME": "eth0"}))
    return hosts


def ip(*words: str) -> None:
    run("ip", *words)


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two nodes; on one address, where namespaces are not allowed."""
    with ExitStack() as stack:
        try:
            found = separate_hosts(stack)
        except (OSError, subprocess.CalledProcessError):
            found = [Host(), Host()]
        yield found


def test_nodes_have_a_network_of_their_own(hosts):
    if not hosts[0].prefix:
        pytest.skip("`ip` is not installed, or may make no network namespaces")
    networks = {
        subprocess.check_output([*host.prefix, "readlink", "/proc/self/ns/net"]) for host in hosts
    }
    assert len(networks) == 2
    assert os.readlink("/proc/self/ns/net").encode() not in {name.strip() for name in networks}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    write_model(folder / "model", dtype=torch.bfloat16)
    write_rows(folder / "train.jsonl", rows(7, 9))
    (folder / "hostfile").write_text("node-0 slots=1\nnode-1 slots=1\n")
    return folder


def flags(folder: Path, output: Path, **more: Any) -> list[str]:
    values = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "train.jsonl",
        "output_dir": output,
        "bf16": True,
        "alpha": 0.01,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "length_threshold": 12,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "save_steps": SAVED_AT,
        "logging_steps": 1,
        "seed": 3,
        "report_to": "none",
        **more,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def nodes(
    hosts: list[Host],
    back_end: str,
    folder: Path,
    output: Path,
    own: dict[int, list[str]] | None = None,
    **more: Any,
) -> list[Started]:
    """Start one launcher for each of two nodes, with flags that one of them alone may have."""
    launcher, of_back_end = BACK_ENDS[back_end]
    port, started = free_port(), []
    for node, host in enumerate(hosts):
        meets = [f"--master_addr={hosts[0].address}", f"--master_port={port}"]
        options = [f"--node_rank={node}", *meets]
        if launcher == "deepspeed":
            options += [f"--hostfile={folder / 'hostfile'}", "--no_ssh"]
        else:
            options += ["--nnodes=2", "--nproc_per_node=1"]
        given = [*of_back_end, *flags(folder, output, **more), *(own or {}).get(node, [])]
        command = [*host.prefix, launcher, *options, TRAIN, *given]
        started.append(start(command, port, host.variables))
    return started


def ended(started: list[Started]) -> list[Outcome]:
    return [finish(node) for node in started]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def assert_same_bits(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


@pytest.fixture(scope="module", params=BACK_ENDS)
def trained(request, folder, hosts) -> dict[str, Any]:
    """One node of two ranks; two nodes; two nodes that go on from what the one node saved.

    FSDP2 goes on with the weights in host memory.
    """
    back_end = request.param
    _, of_back_end = BACK_ENDS[back_end]
    outputs = {name: folder / back_end / name for name in ("one", "two", "resumed")}
    whole = launch(TRAIN, *of_back_end, *flags(folder, outputs["one"]), launcher="fork")
    assert whole.status == 0, whole.output
    checkpoint = outputs["one"] / f"checkpoint-{SAVED_AT}"
    resumes = flags(folder, outputs["resumed"], resume_from_checkpoint=checkpoint)
    if back_end == "fsdp2":
        resumes.append("--cpu_offload")

    def of_run(name: str) -> list[Outcome]:
        if name == "two":
            outcomes = ended(nodes(hosts, back_end, folder, outputs["two"]))
        else:
            outcomes = [launch(TRAIN, *of_back_end, *resumes, launcher="fork", nodes=2)]
        for outcome in outcomes:
            assert outcome.status == 0, outcome.output
            assert outcome.left_behind == 0
        return outcomes

    return {"outputs": outputs, "runs": Lazy(("two", "resumed"), of_run)}


@pytest.mark.parametrize("name", ["two", "resumed"])
def test_two_nodes_train_to_the_same_bits_as_one(trained, name):
    outputs, _ = trained["outputs"], trained["runs"][name]
    assert_same_bits(outputs["one"] / "model", outputs[name] / "model")
    before, after = (weights(outputs["one"] / at) for at in (f"checkpoint-{SAVED_AT}", "model"))
    assert not all(torch.equal(before[weight], after[weight]) for weight in after)
    logs = [
        json.loads((outputs[run] / "trainer_state.json").read_text())["log_history"]
        for run in ("one", name)
    ]
    assert [entry["g0"] for entry in logs[0][:STEPS]] == [entry["g0"] for entry in logs[1][:STEPS]]


def test_the_first_node_alone_speaks_and_writes(trained):
    """Although rank 1, too, is the first one of its node."""
    first, second = (outcome.output for outcome in trained["runs"]["two"])
    assert first.count("ranks 2") == 1
    assert "D0 (zeroth-order" in first
    assert "D0 (zeroth-order" not in second
    assert "'loss'" not in second
    output = trained["outputs"]["two"]
    for name in (f"checkpoint-{SAVED_AT}", f"checkpoint-{STEPS}", "model"):
        verify(output / name)
    saved = {path.name for path in (output / f"checkpoint-{STEPS}").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= saved


@pytest.mark.parametrize("trained", ["fsdp2"], indirect=True)
def test_nodes_with_disks_of_their_own_save_and_go_on(trained, folder, tmp_path, hosts):
    """Neither sees the other's files, so `--save_on_each_node` writes whole checkpoints on both."""
    disks = [tmp_path / f"disk-{node}" for node in range(2)]
    own = {1: [f"--output_dir={disks[1]}"]}
    for more in ({"max_steps": SAVED_AT}, {"resume_from_checkpoint": True}):
        started = nodes(hosts, "fsdp2", folder, disks[0], own, save_on_each_node=True, **more)
        for outcome in ended(started):
            assert outcome.status == 0, outcome.output
    for disk in disks:
        verify(disk / f"checkpoint-{STEPS}")
        assert_same_bits(disk / f"checkpoint-{STEPS}", trained["outputs"]["one"] / "model")


@pytest.mark.parametrize(("back_end", "node"), [("zero3", 0), ("fsdp2", 1)])
def test_a_mistake_on_one_node_ends_both(back_end, node, folder, tmp_path, hosts):
    """Found before the ranks have a process group, in which they could tell each other."""
    own = {node: [f"--test_file={tmp_path}/nowhere.jsonl"]}
    outcomes = ended(nodes(hosts, back_end, folder, tmp_path / "output", own))
    sentence = f"--test_file {tmp_path}/nowhere.jsonl: there is no such file"
    for index, outcome in enumerate(outcomes):
        assert outcome.status not in (0, None), outcome.output
        assert sentence in outcome.output
        said = "stopped, as 1 other rank(s) had an error" in outcome.output
        assert said == (index != node)
        assert outcome.left_behind == 0
    assert not (tmp_path / "output").exists()


def wait_for(path: Path, started: list[Started], seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline or any(node.process.poll() is not None for node in started):
            pytest.fail("\n".join(node.output for node in ended(started)))
        time.sleep(0.05)


def test_a_node_that_dies_ends_the_other(folder, tmp_path, hosts):
    output = tmp_path / "output"
    endless = {"max_steps": 100_000, "logging_steps": 1000, "ddp_timeout": 20}
    started = nodes(hosts, "zero3", folder, output, **endless)
    wait_for(output / f"checkpoint-{SAVED_AT}", started)
    for process in started[1].running():
        process.kill()
    survivor, _ = ended(started)
    assert survivor.status not in (0, None), survivor.output
    assert survivor.left_behind == 0
    verify(output / f"checkpoint-{SAVED_AT}")


# ---- Slurm -------------------------------------------------------------------------------------

SBATCH = ROOT / "launch" / "slurm.sbatch"
STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$SLURM_STUB_LOG"; fi',
    "srun": """
        [ "$1 $2" = "--kill-on-bad-exit=1 --cpu-bind=none" ] || exit 9
        shift 2
        SLURM_NODEID=0 "$@" & first=$!
        SLURM_NODEID=1 "$@" & second=$!
        echo $first $second > "$SLURM_STUB_PIDS"
        wait $first; status=$?
        wait $second && exit $status
        """,
    "scancel": 'echo "$@" >> "$SLURM_STUB_LOG"; kill -TERM $(cat "$SLURM_STUB_PIDS")',
}
"""What the script uses of Slurm, with two nodes that are this machine."""


@pytest.fixture
def job(tmp_path) -> dict[str, str]:
    """The environment that Slurm gives a batch script of two nodes."""
    stubs = tmp_path / "slurm"
    stubs.mkdir()
    for name, body in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body}\n")
        (stubs / name).chmod(0o755)
    programs = Path(sys.executable).parent
    port = next(port for port in iter(free_port, None) if port < 40000)  # as the script makes one
    return {
        "PATH": f"{stubs}{os.pathsep}{programs}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(port - 20000),
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_STUB_LOG": str(tmp_path / "log"),
        "SLURM_STUB_PIDS": str(tmp_path / "pids"),
        "RANKS_PER_NODE": "1",
        "OUTPUT_DIR": str(tmp_path / "output"),
    }


def test_a_slurm_job_saves_before_its_time_is_up_and_goes_on(folder, job, tmp_path):
    port, log = 20000 + int(job["SLURM_JOB_ID"]), tmp_path / "log"
    output = Path(job["OUTPUT_DIR"])

    def submit(**more: Any) -> Started:
        given = [flag for flag in flags(folder, output, **more) if "--output_dir" not in flag]
        return start(["bash", str(SBATCH), *BACK_ENDS["zero3"][1], *given], port, job)

    first = submit(max_steps=100_000, logging_steps=1000)
    wait_for(output / f"checkpoint-{SAVED_AT}", [first])
    first.process.send_signal(signal.SIGUSR1)
    stopped = finish(first)
    assert stopped.left_behind == 0
    assert log.read_text().split() == [
        *("--signal=TERM", job["SLURM_JOB_ID"]),
        *("requeue", job["SLURM_JOB_ID"]),
    ]
    assert "Stopped by SIGTERM after step" in stopped.output
    reached = max(folders.steps(output))
    verify(folders.path_of(output, reached))
    assert not (output / "model").exists()

    log.unlink()
    second = finish(submit(max_steps=reached + 1))
    assert second.status == 0, second.output
    assert not log.exists()
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == reached + 1
    verify(output / "model")


SAVES = 'mkdir -p "$OUTPUT_DIR/checkpoint-7"'
FINISHES = 'sleep 0.1; rm -rf "$OUTPUT_DIR/model"; mkdir -p "$OUTPUT_DIR/model"'
"""What ranks leave behind. The model comes noticeably later, as times of files have a grain."""


@pytest.mark.parametrize(
    ("there", "at_sigterm", "again"),
    [
        ([], f"{SAVES}; exit 1", True),
        (["checkpoint-3"], f"{SAVES}; exit 1", True),
        (["checkpoint-3", "model"], f"{SAVES}; exit 1", True),  # of an earlier, shorter run
        (["checkpoint-3"], f"{SAVES}; {FINISHES}; exit 1", False),
        (["checkpoint-7"], f"{FINISHES}; exit 0", False),
        (["checkpoint-3", "model"], f"{FINISHES}; exit 1", False),
        (["checkpoint-3"], "exit 1", False),
        ([], 'mkdir -p "$OUTPUT_DIR/_unfinished/checkpoint-7"; exit 137', False),
    ],
    ids=[
        *("stopped", "stopped again", "stopped beside a model", "finished after a last checkpoint"),
        *("finished", "finished beside a model", "failed", "killed while saving"),
    ],
)
def test_a_slurm_job_is_queued_again_only_if_it_was_stopped(
    job, tmp_path, there, at_sigterm, again
):
    output, log = Path(job["OUTPUT_DIR"]), tmp_path / "log"
    for name in there:
        (output / name).mkdir(parents=True)
    step = f"""#!/bin/bash
        trap '{at_sigterm}' TERM
        echo $$ > "$SLURM_STUB_PIDS.new"; mv "$SLURM_STUB_PIDS.new" "$SLURM_STUB_PIDS"
        while true; do sleep 0.05; done
        """
    (tmp_path / "slurm" / "srun").write_text(step)
    # The step ends while the script still handles the signal: its status must not be lost.
    ended = "while kill -0 $(cat $SLURM_STUB_PIDS) 2> /dev/null; do sleep 0.01; done"
    (tmp_path / "slurm" / "scancel").write_text(f"#!/bin/bash\n{STUBS['scancel']}\n{ended}\n")
    started = start(["bash", str(SBATCH)], free_port(), job)
    wait_for(Path(job["SLURM_STUB_PIDS"]), [started])
    started.process.send_signal(signal.SIGUSR1)
    outcome = finish(started)
    assert outcome.status == int(at_sigterm.split()[-1]), outcome.output
    assert ("requeue" in log.read_text()) == again


def test_a_slurm_job_that_is_stopped_before_its_ranks_start_is_queued_again(job, tmp_path):
    asked, go = tmp_path / "asked", tmp_path / "go"
    wait = f"touch {asked}; while [ ! -e {go} ]; do sleep 0.01; done"
    scontrol = f"""#!/bin/bash
        [ "$1" = show ] && {{ {wait}; }}
        {STUBS["scontrol"]}
        """
    (tmp_path / "slurm" / "scontrol").write_text(scontrol)
    (tmp_path / "slurm" / "scancel").write_text("#!/bin/bash\n")
    (tmp_path / "slurm" / "srun").write_text("#!/bin/bash\necho the ranks have started\n")
    started = start(["bash", str(SBATCH)], free_port(), job)
    wait_for(asked, [started])
    started.process.send_signal(signal.SIGUSR1)
    go.touch()
    outcome = finish(started)
    assert outcome.status == 1, outcome.output
    assert "the ranks have started" not in outcome.output
    assert (tmp_path / "log").read_text().split() == ["requeue", job["SLURM_JOB_ID"]]
