"""How the compiled kernels are built, kept and chosen."""

import importlib.util
import logging
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from addax_ds import kernels
from addax_ds.kernels import cpu, reference
from addax_ds.kernels.operation import Draw
from addax_ds.utils.errors import UserError


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty cache, whose path is returned, and nothing loaded or chosen."""
    monkeypatch.setenv("ADDAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADDAX_KERNELS", raising=False)
    for function in (cpu.load, kernels.implementation):
        function.cache_clear()
    yield tmp_path / "cache"
    for function in (cpu.load, kernels.implementation):
        function.cache_clear()


# ---- building and keeping the library ------------------------------------------------------------


def works() -> bool:
    z, expected = torch.empty(1000), torch.empty(1000)
    kernels.gaussian(z, Draw(1, 2, 3), 77)
    reference.gaussian(expected, Draw(1, 2, 3), 77)
    return torch.equal(z, expected)


def take_the_built_one(monkeypatch) -> None:
    """Go back to the cache of all other tests, for those in which nothing is built."""
    monkeypatch.delenv("ADDAX_CACHE")


@pytest.fixture
def counted_compiler(tmp_path, monkeypatch) -> Path:
    """A compiler that notes in the returned file how often it compiled, and hurries."""
    log, compiler = tmp_path / "compiled", tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo once >> "{log}" ;; esac\n'
        'exec g++ "$@" -O0\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    log.touch()
    return log


@pytest.mark.slow
def test_the_library_is_built_once_and_a_damaged_one_again(fresh, counted_compiler):
    for _ in range(2):
        assert works()
        assert kernels.implementation("cpu") is cpu
        cpu.load.cache_clear()
    assert counted_compiler.read_text() == "once\n"
    (library,) = fresh.glob("*.so")
    whole = library.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (b"", whole[:-1]):
        library.unlink()  # to overwrite a file that is mapped would end this process
        library.write_bytes(damaged)
        assert not cpu._is_whole(library)
    for times, damaged in enumerate((whole[:middle], flipped), start=2):
        library.unlink()
        library.write_bytes(damaged)
        cpu.load.cache_clear()
        assert works()
        assert counted_compiler.read_text() == "once\n" * times
        assert cpu._is_whole(library)
    assert {path.suffix for path in fresh.iterdir()} == {".so", ".lock"}


def test_the_name_holds_flags_compiler_and_processor(fresh, monkeypatch):
    names = [cpu._key(cpu._command())]
    names.append(cpu._key([*cpu._command(), "-g"]))
    monkeypatch.setattr(cpu, "_processor_features", lambda: "another")
    names.append(cpu._key(cpu._command()))
    monkeypatch.setattr(cpu, "_run", lambda command: "g++ 99")
    names.append(cpu._key(cpu._command()))
    assert len(set(names)) == 4


def test_two_processes_that_race_build_once(fresh, counted_compiler):
    code = "from addax_ds.kernels import cpu; cpu.load(); print('loaded')"
    racers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert ["loaded" in racer.communicate(timeout=120)[0] for racer in racers] == [True, True]
    assert counted_compiler.read_text() == "once\n"


def test_a_waiting_rank_does_not_build_what_another_has_built(fresh, counted_compiler):
    ranks = [threading.Thread(target=cpu._built) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert counted_compiler.read_text() == "once\n"


def set_no_compiler(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")


def set_failing_compiler(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-include", "no-such-header.h"))


def set_cache_that_is_no_folder(folder: Path, monkeypatch) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("ADDAX_CACHE", str(folder / "file" / "cache"))


def set_full_disk(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-O0"))

    def replace(source: Path, target: Path) -> None:
        raise OSError("No space left")

    monkeypatch.setattr(os, "replace", replace)


def set_fused_multiply_add(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-mfma", "-ffp-contract=fast"))


def set_z_for_the_realised_difference(folder: Path, monkeypatch) -> None:
    take_the_built_one(monkeypatch)
    right = cpu.fused

    def wrong(slices, operation, *more) -> None:
        right(slices, replace(operation, zo_eps=0.0), *more)

    monkeypatch.setattr(cpu, "fused", wrong)


def set_no_report_of_kept_weights(folder: Path, monkeypatch) -> None:
    take_the_built_one(monkeypatch)
    right = cpu.fused

    def wrong(slices, operation, out=None, gradients=None, kept=None) -> None:
        right(slices, operation, out, gradients)

    monkeypatch.setattr(cpu, "fused", wrong)


@pytest.mark.parametrize(
    ("obstruct", "reason"),
    [
        (set_no_compiler, "no-such-compiler"),
        (set_failing_compiler, "no-such-header.h"),
        (set_cache_that_is_no_folder, "Not a directory"),
        (set_full_disk, "No space left"),
        pytest.param(
            *(set_fused_multiply_add, "other bits"),
            marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="-mfma is an x86 flag"),
        ),
        (set_z_for_the_realised_difference, "other bits"),
        (set_no_report_of_kept_weights, "other bits"),
    ],
)
def test_without_a_library_one_warning_and_plain_torch(
    fresh, obstruct, reason, tmp_path, monkeypatch, caplog
):
    obstruct(tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert works()
        assert works()
    assert kernels.implementation("cpu") is reference
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    assert reason == "other bits" or not list(fresh.glob("*.so"))

    kernels.implementation.cache_clear()
    monkeypatch.setenv("ADDAX_KERNELS", "cpp")
    with pytest.raises(UserError, match=re.escape(reason)):
        works()


# ---- the choice ----------------------------------------------------------------------------------


def test_the_choice_is_said_once_and_can_be_forced(fresh, monkeypatch, caplog):
    take_the_built_one(monkeypatch)
    with caplog.at_level(logging.INFO, logger="addax_ds.kernels"):
        for forced, module in ((None, cpu), ("reference", reference), ("cpp", cpu)):
            kernels.implementation.cache_clear()
            if forced:
                monkeypatch.setenv("ADDAX_KERNELS", forced)
            caplog.clear()
            assert works()
            assert works()
            assert kernels.implementation("cpu") is module
            said = [r for r in caplog.records if r.name == "addax_ds.kernels"]
            assert [r.getMessage() for r in said] == [
                f"Kernels for cpu tensors: {'reference' if module is reference else 'cpp'}"
            ]


def test_an_unknown_choice_is_refused(fresh, monkeypatch):
    monkeypatch.setenv("ADDAX_KERNELS", "cuda")
    with pytest.raises(UserError, match=r"'cuda'.*reference, cpp, triton"):
        works()


def test_a_gpu_gets_triton_or_the_reference_and_never_cpp(fresh, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels.implementation("cuda") is reference
    assert "triton is not installed" in caplog.text
    for forced, reason in (("triton", "triton is not installed"), ("cpp", "run on a CPU")):
        kernels.implementation.cache_clear()
        monkeypatch.setenv("ADDAX_KERNELS", forced)
        with pytest.raises(UserError, match=reason):
            kernels.implementation("cuda")
