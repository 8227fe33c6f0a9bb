"""Memory that is kept: a large tensor takes the place of the one before it, without asking the system."""

import platform
import resource
import subprocess
import sys

import pytest

from align.pipeline import Run
from align.recipe import Recipe
from align.stages.base import Stage, stage

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")

PAGES = 2**26 // resource.getpagesize()

MAKES = f"""
import resource, torch
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24)  # 64 MB, gone at once
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / {PAGES}
faults(2)
"""


@stage("makes_tensors")
class MakesTensors(Stage):
    """Says how much of ten large tensors had to be faulted in."""

    def run(self, context):
        names = {}
        exec(MAKES, names)
        return {"faulted": names["faults"](10)}


def test_a_stage_keeps_the_memory_of_large_tensors(tmp_path):
    fresh = subprocess.run([sys.executable, "-c", MAKES + "print(faults(10))"], capture_output=True, text=True, check=True)
    made = Run(Recipe("memory", {"makes": MakesTensors()}), tmp_path).execute()["makes"]
    assert float(fresh.stdout) > 9  # else there is nothing to keep
    assert made.metrics["faulted"] < 1
