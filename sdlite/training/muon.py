"""Muon: makes the momentum of every matrix orthogonal, so that all directions of a layer learn at the same rate.

    gradient --momentum, Nesterov--> M (m, n) --Newton-Schulz--> about U V^T of M = U S V^T --> weight

A convolution's kernel counts as a matrix of (out, in x height x width). AdamW updates the other parameters (biases,
norms, the first and the last layer). Source: Jordan et al. 2024 (github.com/KellerJordan/Muon). The steps are scaled so
that AdamW's rates and decay fit: Liu et al. 2025 (Moonlight), arXiv 2502.16982, section 2.2.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that takes singular values of (0, 1] to about 1 fastest
RMS = 0.2  # of an update's entries, as AdamW's updates have them
ADAMW_SHARE = 0.2  # AdamW's rate over Muon's
BETAS = (0.9, 0.99)  # AdamW; the second below PyTorch's .999, since runs are short


def orthogonalized(matrix: Tensor) -> Tensor:
    """Nearly the orthogonal factor U V^T of a matrix (m, n): singular values between about 0.7 and 1.2.

    Every iteration multiplies X by a polynomial of X X^T, so it is enough to iterate over that small square matrix and
    to multiply the product of the polynomials with X once, at the end.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T  # (s, l), s <= l
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T  # (s, s)
    product = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    for step in range(STEPS):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial @ product
        if step < STEPS - 1:  # nothing reads the last one
            gram = polynomial @ gram @ polynomial
    x = product @ x
    return x if wide else x.T


class Muon(torch.optim.AdamW):
    """Muon for `matrices`, AdamW for `others` at ADAMW_SHARE of the rate.

    The "share" of a group is its learning rate divided by the schedule's.
    """

    def __init__(self, matrices: Iterable[Tensor], others: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "share": 1.0},
            {"params": list(others), "share": ADAMW_SHARE, "lr": lr * ADAMW_SHARE},
        ]
        super().__init__(groups, lr, betas=BETAS, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Muon's step clears the gradients of its parameters, so that AdamW's step skips them."""
        group = self.param_groups[0]
        for weight in group["params"]:
            if weight.grad is not None:
                self._update(weight, group["lr"], group["weight_decay"])
                weight.grad = None
        return super().step(closure)

    def _update(self, weight: Tensor, lr: float, weight_decay: float) -> None:
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # AdamW wants it of every state that it loads
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
        step = weight.grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov; (m, n)
        scale = RMS * max(step.shape) ** 0.5
        weight.mul_(1 - lr * weight_decay)
        weight.add_(orthogonalized(step).reshape(weight.shape), alpha=-lr * scale)
