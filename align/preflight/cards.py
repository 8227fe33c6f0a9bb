"""Machines to estimate for: the one at hand, or a named card."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from itertools import pairwise

from align.errors import AlignError, near_miss

GB = 2**30


@dataclass(frozen=True)
class Machine:
    """What an estimate needs to know of a machine."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Floating-point operations a second that training reaches in matrix products, in fp32."""
    flops_bf16: float
    """The same in bfloat16."""
    gpu: bool


CARDS = {  # memory in GB; dense TFLOP/s of fp32 (TF32 off) and bf16, from the makers' data sheets
    "T4": (16, 8.1, 8.1),  # no bf16 units
    "V100": (32, 15.7, 15.7),
    "RTX3090": (24, 35.6, 71),
    "RTX4090": (24, 82.6, 165),
    "RTX5090": (32, 104.8, 209),
    "A10": (24, 31.2, 125),
    "A40": (48, 37.4, 150),
    "L4": (24, 30.3, 121),
    "L40S": (48, 91.6, 362),
    "A100-40GB": (40, 19.5, 312),
    "A100-80GB": (80, 19.5, 312),
    "H100": (80, 66.9, 989),
    "H200": (141, 66.9, 989),
    "B200": (180, 75, 2250),
}
SHARE = 0.35
"""Of a card's peak, what training reaches in practice."""


def card(name: str) -> Machine:
    """The card called `name`.

    Raises:
        AlignError: it is not in the table.
    """
    known = {each.lower().replace("-", "").replace(" ", ""): each for each in CARDS}
    key = name.lower().replace("-", "").replace(" ", "")
    if key not in known:
        raise AlignError(f"unknown card {name!r}{near_miss(name, CARDS)}; known: {', '.join(CARDS)}")
    memory, fp32, bf16 = CARDS[known[key]]
    return Machine(known[key], memory * GB, SHARE * fp32 * 1e12, SHARE * bf16 * 1e12, gpu=True)


def at_hand() -> Machine:
    """This machine: its card if it has one, else its memory and what its cores reach in a short matrix product."""
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        memory = float(found.total_memory)
        if (name := named_in(found.name)) is not None:
            same = card(name)
            return Machine(found.name, memory, same.flops, same.flops_bf16, gpu=True)
        return Machine(found.name, memory, _measured(torch.float32, "cuda"), _measured(torch.bfloat16, "cuda"), gpu=True)
    return Machine("this machine", _free_memory(), _measured(torch.float32), _measured(torch.bfloat16), gpu=False)


def named_in(device: str) -> str | None:
    """Which of `CARDS` a driver's name tells of, such as ``NVIDIA A100-SXM4-80GB``, which is no A10; None for other devices."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    words += ["".join(pair) for pair in pairwise(words)]  # GeForce RTX 4090
    return next((name for name in CARDS if name.partition("-")[0].lower() in words), None)


def _measured(dtype: object, device: str = "cpu") -> float:
    """Half of what a matrix product reaches: the rest of a step is no matrix product."""
    import torch

    n = 4096 if device == "cuda" else 512
    x = torch.ones(n, n, dtype=dtype, device=device)  # type: ignore[call-overload]
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (x @ x).sum().item()
        best = min(best, time.perf_counter() - start)
    return 0.5 * 2 * n**3 / best


def _free_memory() -> float:
    """What a new process may have, in bytes."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return float(found["MemAvailable"])
    except (OSError, KeyError):  # no Linux
        import psutil  # type: ignore[import-untyped]

        return float(psutil.virtual_memory().available)
