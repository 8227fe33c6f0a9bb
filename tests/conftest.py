"""What every test stands on: no network, one thread, a home of its own, and models that are built in code."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: sums come out the same everywhere
os.environ["ALIGN_IN_PROCESS"] = "1"  # tests of the runner's processes take this back

from pathlib import Path

import pytest

WORDS = "the cat sat on a mat and said hello to me. How are you? Fine, thanks! one two three four five six seven eight"


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)  # benchmarks.theirs sets it, and a process started here would inherit it


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """What lives when a file begins is never looked through again: the Trainer collects garbage at its every end, and to look
    through all that was ever imported is much of the time of runs as short as those of the tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 320 tokens with the plain chat template. Tests that change it take a deepcopy."""
    from align.encode import set_chat_template
    from align.tokenizers import train_bpe

    tokenizer = train_bpe([WORDS] * 8, vocab_size=320)
    set_chat_template(tokenizer, "plain")
    return tokenizer


@pytest.fixture
def tiny_llama():
    """Builds Llamas of two layers; see `helpers.llama`."""
    from helpers import llama

    return llama


@pytest.fixture(scope="session")
def real():
    """The folder of real data sets and models."""
    folder = Path(os.environ.get("ALIGN_REAL_DATA", Path(__file__).parents[2] / "shared" / "real"))
    if not folder.is_dir():
        pytest.skip("the real data sets are not here")
    return folder
