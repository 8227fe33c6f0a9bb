"""Metrics over texts. Those of a reference package keep that package's scale: BLEU and chrF run to 100, the others to 1."""

from __future__ import annotations

import functools
import random
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from align.errors import AlignError
from align.metrics.base import Missing, metrics, package, several, texts
from align.quality.texts import marks

Count = Annotated[int, Field(gt=0)]
Words = Literal["13a", "intl", "zh", "char", "none", "ja-mecab", "ko-mecab", "spm", "flores101", "flores200"]
"""How sacrebleu finds words."""


def _streams(references: list[list[str]]) -> list[list[str | None]]:
    """References of each prediction as sacrebleu's streams: the first of each, the second of each (None where there is none) …"""
    return [[own[i] if i < len(own) else None for own in references] for i in range(max(map(len, references)))]


@metrics.add
def bleu(
    predictions: Sequence[str], references: Sequence[Any], *, max_order: Count = 4, lowercase: bool = False, tokenize: Words = "13a"
) -> dict[str, float]:
    """Corpus BLEU by sacrebleu (0 to 100)."""
    module = package("sacrebleu.metrics")
    try:
        maker = module.BLEU(max_ngram_order=max_order, lowercase=lowercase, tokenize=tokenize)
    except (RuntimeError, ImportError, OSError) as error:  # it needs a package or a model of its own
        raise Missing(f"metric 'bleu': tokenize={tokenize!r} cannot be had: {' '.join(str(error).split())}") from error
    score = maker.corpus_score(texts(predictions, "bleu", "predictions"), _streams(several(references, "bleu")))
    return {"bleu": score.score}


@metrics.add
def chrf(predictions: Sequence[str], references: Sequence[Any], *, word_order: Annotated[int, Field(ge=0)] = 0) -> dict[str, float]:
    """Corpus chrF2 by sacrebleu (0 to 100); ``word_order=2`` is chrF++."""
    maker = package("sacrebleu.metrics").CHRF(word_order=word_order)
    score = maker.corpus_score(texts(predictions, "chrf", "predictions"), _streams(several(references, "chrf")))
    return {"chrf": score.score}


@metrics.add
def rouge(predictions: Sequence[str], references: Sequence[Any], *, stemmer: bool = False) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, -2, -L and -Lsum by rouge-score (0 to 1); of several references the best counts."""
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = package("rouge_score.rouge_scorer").RougeScorer(names, use_stemmer=stemmer)
    pairs = zip(texts(predictions, "rouge", "predictions"), several(references, "rouge"), strict=True)
    scores = [scorer.score_multi(own, prediction) for prediction, own in pairs]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


class _NoWordNet:
    """Stands in for WordNet where its data are not installed: no word has a synonym."""

    def synsets(self, word: str) -> list[Any]:
        return []


@functools.cache
def _wordnet() -> Any:
    wordnet = package("nltk.corpus").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return _NoWordNet()
    return wordnet


@metrics.add
def meteor(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
    """Mean METEOR by nltk (0 to 1), over words and punctuation marks.

    Its third stage matches synonyms from WordNet, whose data nltk fetches separately. Where they are absent, the exact and stem
    stages run alone, and ``meteor_synonyms`` is 0 instead of 1.
    """
    module, words = package("nltk.translate.meteor_score"), re.compile(rf"\w+(?:[{marks()}]+\w*)*|[^\w\s]")
    pairs = zip(texts(predictions, "meteor", "predictions"), several(references, "meteor"), strict=True)
    wordnet = _wordnet()
    scores = [
        module.meteor_score([words.findall(text) for text in own], words.findall(prediction), wordnet=wordnet)
        for prediction, own in pairs
    ]
    return {"meteor": sum(scores) / len(scores), "meteor_synonyms": float(not isinstance(wordnet, _NoWordNet))}


# -- short answers -------------------------------------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """SQuAD's normalization: lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016, section 6.1)."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_f1(prediction: str, reference: str) -> float:
    """F1 of the words of two answers after SQuAD's normalization; where one is empty, 1 if both are."""
    ours, theirs = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


@metrics.add
def exact_match(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
    """Share of predictions that equal one of their references after SQuAD's normalization (0 to 1)."""
    pairs = zip(texts(predictions, "exact_match", "predictions"), several(references, "exact_match"), strict=True)
    hits = [any(normalize_answer(prediction) == normalize_answer(one) for one in own) for prediction, own in pairs]
    return {"exact_match": sum(hits) / len(hits)}


@metrics.add
def token_f1(predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
    """Mean F1 of the words of prediction and best reference after SQuAD's normalization (0 to 1)."""
    pairs = zip(texts(predictions, "token_f1", "predictions"), several(references, "token_f1"), strict=True)
    scores = [max(answer_f1(prediction, one) for one in own) for prediction, own in pairs]
    return {"token_f1": sum(scores) / len(scores)}


# -- without references --------------------------------------------------------------------------------------------------------


@metrics.add
def distinct(predictions: Sequence[str], *, n: int = 2) -> dict[str, float]:
    """Distinct n-grams over all n-grams of all predictions, of 1 to `n` words (Li et al. 2016, arXiv:1510.03055)."""
    if n < 1:
        raise AlignError(f"metric 'distinct': n={n}, expected at least 1")
    rows = [text.split() for text in texts(predictions, "distinct", "predictions")]
    result = {}
    for size in range(1, n + 1):
        grams = [tuple(row[i : i + size]) for row in rows for i in range(len(row) - size + 1)]
        result[f"distinct_{size}"] = len(set(grams)) / len(grams) if grams else 0.0
    return result


@metrics.add
def self_bleu(predictions: Sequence[str], *, sample: int = 200, seed: int = 0) -> dict[str, float]:
    """Mean sentence BLEU (sacrebleu, 0 to 100) of each prediction against all others: low is diverse (Zhu et al. 2018,
    arXiv:1802.01886). It takes time with the square of their number, so `sample` of them are drawn.
    """
    rows = texts(predictions, "self_bleu", "predictions")
    if min(len(rows), sample) < 2:
        raise AlignError(f"metric 'self_bleu': {len(rows)} predictions, sample={sample}; expected at least 2 to compare")
    if len(rows) > sample:
        rows = random.Random(seed).sample(rows, sample)
    maker = package("sacrebleu.metrics").BLEU(effective_order=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sacrebleu warns of many references
        scores = [maker.sentence_score(text, rows[:i] + rows[i + 1 :]).score for i, text in enumerate(rows)]
    return {"self_bleu": sum(scores) / len(scores)}


@metrics.add
def length(predictions: Sequence[str]) -> dict[str, float]:
    """Mean words (split at white space) and characters of the predictions."""
    rows = texts(predictions, "length", "predictions")
    return {"mean_words": sum(len(row.split()) for row in rows) / len(rows), "mean_characters": sum(map(len, rows)) / len(rows)}
