"""Exact match and F1 of written answers, as the official scripts of SQuAD and DROP have them."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_scores(answer: str, right: Sequence[str]) -> dict[str, float]:
    """Score an answer as SQuAD's ``evaluate-v1.1.py`` does: the best over the right answers.

    Returns:
        ``exact_match`` and ``f1``, between 0 and 1.
    """
    own = _squad_words(answer)
    others = [_squad_words(text) for text in right]
    return {
        "exact_match": float(own in others),
        "f1": max(_overlap_of_counts(own, other) for other in others),
    }


def drop_scores(answer: str, right: Sequence[str]) -> dict[str, float]:
    """Score an answer to a question of DROP, by the scripts of SQuAD and of DROP.

    Papers on MeZO and Addax report SQuAD's F1 for DROP, with every span as a right answer of its
    own. The official ``drop_eval.py`` treats numbers apart. It also knows answers of several spans,
    which the data set on the hub does not tell from alternative answers: here each span is one.

    Returns:
        ``exact_match`` and ``f1`` of SQuAD; ``drop_exact_match`` and ``drop_f1`` of DROP.
    """
    own = _drop_words(answer)
    others = [_drop_words(text) for text in right]
    return {
        **squad_scores(answer, right),
        "drop_exact_match": float(own in others),
        "drop_f1": max(_overlap_of_sets(set(own), set(other)) for other in others),
    }


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _overlap_of_counts(answer: list[str], right: list[str]) -> float:
    common = sum((Counter(answer) & Counter(right)).values())
    return _f1(common / len(answer), common / len(right)) if common else 0.0


def _drop_words(text: str) -> list[str]:
    words = (_drop_word(word) for word in re.split(" |-", text.lower()))
    return " ".join(words).split()


def _drop_word(word: str) -> str:
    if not _is_number(word):
        word = word.translate(_PUNCTUATION)
    return _ARTICLES.sub(" ", str(float(word)) if _is_number(word) else word)


def _overlap_of_sets(answer: set[str], right: set[str]) -> float:
    numbers = set(filter(_is_number, right))
    if numbers and not numbers & answer:
        return 0.0
    common = len(answer & right)
    precision = common / len(answer) if answer else 1.0
    recall = common / len(right) if right else 1.0
    return round(_f1(precision, recall), 2)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _f1(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0
