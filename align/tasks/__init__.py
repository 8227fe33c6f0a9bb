"""Tasks on encoders, decoders and encoder-decoders, one file each: what a row becomes, which model class answers, how its answers
are read. Importing this fills the catalog; the training loop is transformers' Trainer.
"""

from align.tasks import classification, cloze, qa, seq2seq, tagging
from align.tasks.base import Task, tasks

__all__ = ["Task", "classification", "cloze", "qa", "seq2seq", "tagging", "tasks"]
