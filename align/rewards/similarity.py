"""How close a completion's meaning is to a reference's, by sentence embeddings. Needs the extra ``similarity``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from align.errors import AlignError
from align.rewards.protocol import rewards, text_of


@rewards.add
def sentence_similarity(completions: list, answer: list, *, model: str, **columns: Any) -> list[float | None]:
    """The cosine (-1 to 1) between the embeddings of the completion and of the row's `answer`. Abstains where `answer` is None.

    Args:
        model: a folder with a model of sentence-transformers; nothing is downloaded.

    Raises:
        AlignError: no such folder, or sentence-transformers is not installed.
    """
    rows = [i for i, wanted in enumerate(answer) if wanted is not None]
    texts = [text_of(completions[i]) for i in rows] + [
        text_of(answer[i]) if isinstance(answer[i], str | list) else str(answer[i]) for i in rows
    ]
    scores: list[float | None] = [None] * len(completions)
    if rows:
        vectors = _encoder(model).encode(texts, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
        cosines = (vectors[: len(rows)] * vectors[len(rows) :]).sum(1).tolist()
        for i, cosine in zip(rows, cosines, strict=True):
            scores[i] = cosine
    return scores


@functools.lru_cache(maxsize=1)
def _encoder(folder: str) -> Any:
    if not Path(folder).is_dir():
        raise AlignError(f"sentence_similarity: {folder} is no folder; name one with a model of sentence-transformers")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise AlignError("sentence_similarity needs sentence-transformers: pip install 'align[similarity]'") from error
    return SentenceTransformer(folder, local_files_only=True)
