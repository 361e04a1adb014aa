"""Accuracy of short answers by the VQA rule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {word: str(n) for n, word in enumerate(_WORDS)}
_DROPPED = re.compile(r"['’]|[.](?!\d)|(?<=\d),(?=\d)")
_SPACED = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!“”，。？！；：、（）]")


def _normalise(answer: str) -> str:
    text = _SPACED.sub(" ", _DROPPED.sub("", answer.lower()))
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def vqa_scores(predictions: Iterable[str], references: Iterable[str | Sequence[str]]) -> np.ndarray:
    """Score of each answer in [0, 1] (Antol et al. 2015, https://visualqa.org/evaluation.html).

    Against several human answers: `min(1, n / 3)` where n others gave the prediction, averaged over leaving out each
    human in turn, which fewer than four humans can't bring to 1. Against one answer: 1 if equal, else 0. Compared in
    lower case without articles, punctuation and apostrophes, small numbers as digits.
    """
    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        answers = [reference] if isinstance(reference, str) else list(reference)
        if not answers:
            raise ValueError(f"The prediction {prediction!r} has no reference answer.")
        same = [_normalise(prediction) == _normalise(answer) for answer in answers]
        if len(same) == 1:
            scores.append(float(same[0]))
        else:
            scores.append(sum(min(1.0, (sum(same) - left_out) / 3) for left_out in same) / len(same))
    return np.array(scores)


def vqa_accuracy(predictions: Iterable[str], references: Iterable[str | Sequence[str]]) -> float:
    """Mean of `vqa_scores` in percent.

    Args:
        predictions: One answer per question.
        references: The right answer, or a list of human answers (ten in VQAv2), per question.

    Raises:
        ValueError: The lengths differ, there is no question, or one has no answer.
    """
    scores = vqa_scores(predictions, references)
    if not scores.size:
        raise ValueError("There are no predictions.")
    return 100 * float(scores.mean())
