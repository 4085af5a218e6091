"""Compiled operators lie in a folder of the session: what a killed run leaves blocks no other."""

import os
from pathlib import Path

from tests.support import extensions
from tests.support.ranks import rank_environment


def compile_to(folder: Path, name: str, killed: bool = False) -> None:
    """What torch leaves: a lock until the build is finished."""
    (folder / name).mkdir()
    (folder / name / f"{name}.so").write_text(name)
    if killed:
        (folder / name / "lock").touch()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_lock_of_an_earlier_session_does_not_block(tmp_path):
    store = tmp_path / "store"
    killed = extensions.begin(store)  # it never comes to its end
    compile_to(killed, "operator", killed=True)
    stopped = extensions.begin(store)
    compile_to(stopped, "operator", killed=True)
    compile_to(stopped, "other")
    extensions.end(stopped, store)
    after = extensions.begin(store)
    assert names(after) == {"other/other.so"}
    compile_to(after, "operator")
    extensions.end(after, store)
    last = extensions.begin(store)
    assert names(last) == {"other/other.so", "operator/operator.so"}
    assert names(store) == names(last)
    extensions.end(last, store)
    assert not any(folder.exists() for folder in (stopped, after, last))


def test_sessions_side_by_side_keep_one_build(tmp_path):
    first, second = (extensions.begin(tmp_path) for _ in range(2))
    assert first != second
    for folder in (first, second):
        compile_to(folder, "operator")
        extensions.end(folder, tmp_path)
    assert names(tmp_path) == {"operator/operator.so"}


def test_ranks_compile_where_the_session_does():
    folder = rank_environment(2)["TORCH_EXTENSIONS_DIR"]
    assert folder == os.environ["TORCH_EXTENSIONS_DIR"]
    assert "addax-extensions-" in folder
