"""Memory of large tensors on a CPU is kept for the next ones.

glibc maps every block above 32 MB anew, and gives back to the system what lies free at its end; so each step faults in, page by
page, what the step before had: a fifth of the time of a forest of 8,192 tokens on some virtual machines.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As glibc's malloc.h has them."""


def keep_memory() -> None:
    """Let this process keep what it frees, in blocks of up to 1 GB, where its C library is glibc; it goes back when the process
    ends. Elsewhere this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
