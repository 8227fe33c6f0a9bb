"""Memory that is kept: a large tensor takes the place of the one before it, without asking the system."""

import platform
import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")

PAGES = 2**26 // resource.getpagesize()

MAKES = f"""
import resource, torch
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24)  # 64 MB, gone at once
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / {PAGES}
faults(30)  # until small tensors have found their places between the large ones
"""


STAGE = f"""
from align.runner.worker import attempt
from align.stages.base import Stage, stage
from pathlib import Path

@stage("makes_tensors")
class MakesTensors(Stage):
    def run(self, context):
        names = {{}}
        exec(MAKES, names)
        return names["faults"](10)

MAKES = {MAKES!r}
print(attempt(MakesTensors(), "makes", Path.cwd()))
"""


def said(code, folder):
    """The number that a fresh process prints; this one's memory has had a life."""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder).stdout)


def test_a_stage_keeps_the_memory_of_large_tensors(tmp_path):
    """Of ten tensors made one after the other, how many had to be faulted in."""
    assert said(MAKES + "print(faults(10))", tmp_path) > 9  # else there is nothing to keep
    assert said(STAGE, tmp_path) < 1
