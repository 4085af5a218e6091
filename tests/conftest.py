import gc
import os
import shutil
import signal
import tempfile

# Before torch and DeepSpeed are imported: the suite runs on a CPU, one thread a process.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each program would compile the package anew
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="addax-datasets-")

import logging
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import tests.support.uncompiled  # noqa: F401  (ranks in this process, too, compile nothing)
from addax_ds.utils.bf16_matmul import multiply_in_fp32
from tests.support.cases import CASES, batches, float64_outcome
from tests.support.exhaustive import ALL_NAMES, is_exhaustive
from tests.support.rank_group import Lazy
from tests.support.ranks import free_port, permit


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes longest, as ranks do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if is_exhaustive(item.nodeid):
            item.add_marker(pytest.mark.exhaustive)
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.stash[ALL_NAMES] = [item.nodeid for item in items]


def pytest_collection_finish(session: pytest.Session) -> None:
    # One garbage collection begins each training, and would go through all that is imported.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    permit(item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session", autouse=True)
def _as_the_program_does() -> None:
    torch.set_num_threads(1)
    multiply_in_fp32()


@pytest.fixture(autouse=True)
def _no_live_deepspeed_config() -> Iterator[None]:
    """`TrainingArguments` leaves ZeRO-3 switched on for every model that Transformers makes."""
    yield
    unset_hf_deepspeed_config()


@pytest.fixture(autouse=True)
def _sigterm_ends_the_next_program() -> Iterator[None]:
    """A training in this process ends with it ignored; what starts later would inherit that."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def program_alone(monkeypatch) -> Iterator[None]:
    """No launcher's variables before, and none of the program's settings after a test."""
    logger = logging.getLogger("addax_ds")
    settings = logger.handlers, logger.propagate, logger.level
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    logger.handlers, logger.propagate, logger.level = settings
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a launcher sets for the only rank; the process group is torn down afterwards."""
    variables = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": free_port()}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def float64_results() -> Lazy[str, dict]:
    """Start, end and g0 of the float64 loop, by case; equal cases are computed once."""
    by_content: dict[str, dict] = {}

    def of_case(name: str) -> dict:
        case = CASES[name]
        key = f"{case.model} {case.hyperparameters}"
        if key not in by_content:
            by_content[key] = float64_outcome(case, batches())
        return by_content[key]

    return Lazy(CASES, of_case)
