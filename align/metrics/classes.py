"""Metrics over labels: scikit-learn's, and seqeval's for entities."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from align.errors import AlignError
from align.metrics.base import metrics, package
from align.schema import label_name


def _labels(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Both sides as labels of one type: 1, 1.0, True and a file's "1" are the same label. (Of words alone, "True" is True.) Of
    tagged sentences, lists on both sides, they are the tags of all words.

    Raises:
        AlignError: one is no label: NaN, or a list of several, which no prediction would equal; or there is no tag for each word.
    """
    if all(isinstance(tags, list | tuple) for tags in (*predictions, *references)):
        _check_sentences(predictions, references)
        predictions, references = ([*chain.from_iterable(column)] for column in (predictions, references))
    for column, labels in (("predictions", predictions), ("references", references)):
        for i, label in enumerate(labels):
            if label != label or isinstance(label, list | tuple | dict):
                raise AlignError(
                    f"{column}[{i}] is {type(label).__name__} {label!r:.40}, expected a label; exact_match takes several"
                )
    types = {type(label) for label in (*predictions, *references)}
    if types <= {str} or types <= {int} or types <= {bool}:  # scikit-learn takes 0.5 for a measured value
        return list(predictions), list(references)
    name = str if types == {bool, str} else label_name
    return list(map(name, predictions)), list(map(name, references))


def _check_sentences(predictions: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]]) -> None:
    for i, (ours, theirs) in enumerate(zip(predictions, references, strict=True)):
        if len(ours) != len(theirs):
            raise AlignError(f"sentence {i} has {len(ours)} predicted tags and {len(theirs)} reference tags")


@metrics.add
def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Share of predictions that equal their reference (0 to 1); of tagged sentences, that of words."""
    ours, theirs = _labels(predictions, references)
    return {"accuracy": package("sklearn.metrics").accuracy_score(theirs, ours)}


def _averages(name: str, predictions: Sequence[Any], references: Sequence[Any], positive: Any) -> dict[str, float]:
    score = getattr(package("sklearn.metrics"), f"{name}_score")
    ours, theirs = _labels(predictions, references)
    result = {f"{name}_{average}": score(theirs, ours, average=average, zero_division=0) for average in ("micro", "macro")}
    if positive is not None:
        named = [label for label in (*ours, *theirs) if label_name(label) in (label_name(positive), str(positive))]
        if not named:
            raise AlignError(f"metric {name!r}: the positive label {positive!r} is none of {sorted({*ours, *theirs}, key=str)}")
        result[name] = score(theirs, ours, labels=named[:1], average="macro", zero_division=0)
    return result


@metrics.add
def precision(predictions: Sequence[Any], references: Sequence[Any], *, positive: Any = None) -> dict[str, float]:
    """Precision, micro and macro; with `positive` also that of this one label. A label that is never predicted counts 0."""
    return _averages("precision", predictions, references, positive)


@metrics.add
def recall(predictions: Sequence[Any], references: Sequence[Any], *, positive: Any = None) -> dict[str, float]:
    """Recall, micro and macro; with `positive` also that of this one label."""
    return _averages("recall", predictions, references, positive)


@metrics.add
def f1(predictions: Sequence[Any], references: Sequence[Any], *, positive: Any = None) -> dict[str, float]:
    """F1, micro and macro; with `positive` also that of this one label."""
    return _averages("f1", predictions, references, positive)


@metrics.add
def matthews(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Matthews correlation (-1 to 1); 0 where there is one label alone, as that tells nothing apart."""
    correlation = package("sklearn.metrics").matthews_corrcoef
    ours, theirs = _labels(predictions, references)
    if len({*ours, *theirs}) < 2:  # scikit-learn gives 0, too, with a warning
        return {"matthews": 0.0}
    return {"matthews": correlation(theirs, ours)}


def of_entities(tag: str) -> bool:
    """Whether `tag` is one of BIO or IOBES, of which seqeval makes entities."""
    return tag in ("O", "B", "I", "E", "S") or tag.startswith(("B-", "I-", "E-", "S-"))


@metrics.add
def seqeval(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], *, strict: bool = False) -> dict[str, float]:
    """Precision, recall and F1 of whole entities in BIO tags (as conlleval counts them; `strict` is seqeval's IOB2 mode)."""
    scores = package("seqeval.metrics")  # first: `refuse_missing` tries with values that are no tags
    for i, (ours, theirs) in enumerate(zip(predictions, references, strict=True)):
        for column, tags in (("predictions", ours), ("references", theirs)):
            if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) and tag for tag in tags):
                raise AlignError(f"metric 'seqeval': {column}[{i}] is {tags!r:.40}, expected a list of tags")
            if strict and (other := next((tag for tag in tags if not tag.startswith(("B", "I", "O"))), None)) is not None:
                raise AlignError(f"metric 'seqeval': {column}[{i}] has the tag {other!r}, which is none of IOB2; leave strict out")
            if (other := next((tag for tag in tags if not of_entities(tag)), None)) is not None:
                raise AlignError(
                    f"metric 'seqeval': sentence {i} has the tag {other!r}, expected tags of entities (O, B-, I-; E-, S-): mend "
                    "it, or take f1 and accuracy, which measure words"
                )
    _check_sentences(predictions, references)
    mode = {"mode": "strict", "scheme": package("seqeval.scheme").IOB2} if strict else {}
    rows = {"y_true": [list(tags) for tags in references], "y_pred": [list(tags) for tags in predictions]}
    return {
        f"entity_{name}": getattr(scores, f"{name}_score")(**rows, zero_division=0, **mode)
        for name in ("precision", "recall", "f1")
    }
