import pytest

from tests.support.exhaustive import ALL_NAMES, idle


def test_every_pattern_names_a_test(pytestconfig):
    if ALL_NAMES not in pytestconfig.stash:
        pytest.skip("not all tests were collected")
    patterns = idle(pytestconfig.stash[ALL_NAMES])
    assert not patterns, f"tests/support/exhaustive.py names no test by {patterns}"


def test_a_pattern_of_no_test_is_found():
    assert r"planner/test_measured\.py" in idle(["tests/planner/test_memory.py::test_shards"])
    assert r"planner/test_measured\.py" not in idle(["tests/planner/test_measured.py::test_totals"])
