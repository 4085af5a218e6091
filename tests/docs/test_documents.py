"""README and docs: their files, names and links exist, and lines are short."""

import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks/README.md"]
ROOMS = "addax_ds|benchmarks|docs|ds_configs|launch|studies|tests"
PATH = re.compile(rf"(?<![\w/.:-])(?:{ROOMS})/[\w./-]*\.(?:cpp|csv|json|md|png|py|sbatch|yaml)\b")
NAME = re.compile(r"(?<![\w/.-])(?:addax_ds|benchmarks|studies|tests)(?:\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
MAX_COLUMNS = 100

documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 220


@documents
def test_lines_are_wrapped(document: Path) -> None:
    """Tables, code and lines with a URL may be longer."""
    prose = CODE.sub("", document.read_text())
    long = [
        line
        for line in prose.splitlines()
        if len(line) > MAX_COLUMNS and not re.match(r"(> )?\||    ", line) and "://" not in line
    ]
    assert long == []


@documents
def test_files_exist(document: Path) -> None:
    mentioned = set(PATH.findall(document.read_text()))
    assert [path for path in sorted(mentioned) if not (ROOT / path).exists()] == []


@documents
def test_names_exist(document: Path) -> None:
    mentioned = {name for name in NAME.findall(document.read_text()) if not is_a_file(name)}
    assert [name for name in sorted(mentioned) if not resolves(name)] == []


@documents
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for target in LINK.findall(CODE.sub("", document.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def is_a_file(name: str) -> bool:
    return name.endswith((".py", ".md"))


def resolves(name: str) -> bool:
    """Follow a dotted name through packages and modules, and from there through attributes."""
    module, attributes = name, list[str]()
    while not is_module(module):
        module, _, attribute = module.rpartition(".")
        attributes.insert(0, attribute)
    found = importlib.import_module(module) if attributes else None
    for attribute in attributes:
        if not hasattr(found, attribute):
            return False
        found = getattr(found, attribute)
    return True


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what should be its package is a module, or is not there
        return False


@cache
def anchors(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
