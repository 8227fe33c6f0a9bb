"""Memory of large tensors on a CPU lies in large pages, and is kept for the next ones.

glibc maps every block above 32 MB anew, and gives back to the system what lies free at its end; so each step faults in, page by
page, what the step before had: a fifth of the time of a forest of 8,192 tokens on some virtual machines.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As glibc's malloc.h has them."""


LARGE_PAGES = "glibc.malloc.hugetlb=1"
"""glibc asks Linux for pages of 2 MB, where they are to be had for the asking: fewer faults and fewer misses in the table of pages.
"""


def large_pages() -> dict[str, str]:
    """The environment that a process must be started with for its memory to lie in large pages."""
    name = "GLIBC_TUNABLES"
    return {name: ":".join(filter(None, [os.environ.get(name), LARGE_PAGES]))}


def keep_memory() -> None:
    """Let this process keep what it frees, in blocks of up to 1 GB, where its C library is glibc; it goes back when the process
    ends. Elsewhere this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def moments_first(optimizer: Optimizer) -> None:
    """Give AdamW its moments on a CPU before the first step. Torch makes them in it, in places that the activations have just left;
    those of the next step then lie elsewhere, and gradients as large as a vocabulary's find no place at all.
    """
    import torch  # not for those who only start processes

    if type(optimizer) is not torch.optim.AdamW:
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.is_cpu:
                moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[weight] = {"step": torch.zeros((), dtype=torch.float32), **moments}
