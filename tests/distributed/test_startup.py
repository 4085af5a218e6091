"""DeepSpeed starts without compiling anything."""

import sys

import deepspeed
import pytest

from addax_ds.distributed.startup import init_deepspeed


@pytest.mark.usefixtures("launched")
def test_nothing_is_compiled(monkeypatch):
    backend = sys.modules["deepspeed.comm.torch"]
    monkeypatch.setattr(backend, "build_shm_op", pytest.fail)
    init_deepspeed()
    assert deepspeed.comm.is_initialized()
    assert deepspeed.comm.comm.cdb.shm_comm_op is None
    assert backend.build_shm_op is pytest.fail  # a user's own DeepSpeed is as it was
