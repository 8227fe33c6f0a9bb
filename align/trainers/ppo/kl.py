"""The price of divergence from the reference."""

from __future__ import annotations

from align.ops import kl_k1, kl_k2, kl_k3

KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


class KLController:
    """The coefficient of the divergence: as it is, or steered to a target (Ziegler et al., arXiv:1909.08593, section 2.2).

    Args:
        coef: its first value.
        target: nats a completion; None leaves the coefficient as it is.
        horizon: episodes. The paper's K_β = 0.1 for a batch of 512 is a horizon of 5120.
    """

    def __init__(self, coef: float, target: float | None, horizon: int) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """Learn that the last `episodes` diverged by `kl` nats on average."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon
