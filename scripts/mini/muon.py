"""Muon for many small matrices: momentum, orthogonalised by Newton-Schulz, all of one shape at a time.

The kernel of a convolution counts as a matrix of output channels by all the rest.

torch.optim.Muon takes them one by one, in bf16: with 480 matrices of 40 narrow blocks that is
thousands of kernels a step, and slower on a CPU too. Source of the iteration and its constants:
Jordan 2024, kellerjordan.github.io/posts/muon; of the scale: Liu et al. 2025, arXiv:2502.16982,
which makes a step as large as AdamW's.

Letters: G matrices of a group, M N their rows and columns, M <= N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5
MOMENTUM = 0.95
DECAY = 0.01


class Muon:
    """Steps matrices along their orthogonalised Nesterov momentum. `state` and `load` save and resume."""

    def __init__(self, matrices: Sequence[nn.Parameter]) -> None:
        shapes = {_lying(p) for p in matrices}
        self._groups: dict[tuple[int, int], list[Tensor]] = {
            shape: [p for p in matrices if _lying(p) == shape] for shape in sorted(shapes)
        }
        self._momentum = {
            shape: torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, group in self._groups.items():
            grad_GMN = torch.stack([_flat(p.grad) for p in group if p.grad is not None])
            momentum_GMN = self._momentum[shape].lerp_(grad_GMN, 1 - MOMENTUM)
            update_GMN = orthogonal(torch.lerp(grad_GMN, momentum_GMN, MOMENTUM))
            updates = [
                (u if len(p) == shape[0] else u.mT).reshape(p.shape)
                for p, u in zip(group, update_GMN, strict=True)
            ]
            torch._foreach_mul_(group, 1 - lr * DECAY)
            torch._foreach_add_(group, updates, alpha=-lr * 0.2 * shape[1] ** 0.5)

    def state(self) -> list[Tensor]:
        return list(self._momentum.values())

    def load(self, state: Sequence[Tensor]) -> None:
        for momentum_GMN, saved_GMN in zip(self._momentum.values(), state, strict=True):
            momentum_GMN.copy_(saved_GMN)


def orthogonal(x_GMN: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values of about one."""
    x_GMN = x_GMN / x_GMN.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ROUNDS):
        gram_GMM = x_GMN @ x_GMN.mT
        x_GMN = torch.baddbmm(
            x_GMN, torch.baddbmm(gram_GMM, gram_GMM, gram_GMM, beta=B, alpha=C), x_GMN, beta=A
        )
    return x_GMN


def _lying(parameter: Tensor) -> tuple[int, int]:
    """Rows and columns of the matrix laid on its long side."""
    sides = len(parameter), parameter[0].numel()
    return min(sides), max(sides)


def _flat(parameter: Tensor) -> Tensor:
    """The matrix laid on its long side."""
    matrix = parameter.flatten(1)
    return matrix if matrix.shape == _lying(parameter) else matrix.mT
