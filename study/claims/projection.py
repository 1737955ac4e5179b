"""The best update of rank r for a wanted one: LoRA by SVD, HiRA by alternating least squares."""

import torch

from harness.splits import generator_for
from hira import hira_update


def best_lora(E, rank):
    """The matrix of this rank that is nearest to E (out, in)."""
    U, S, V = torch.linalg.svd(E, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def rows_given(A, B, W0, E, damping):
    """The B (out, r) that minimizes ‖E − W0 ⊙ B·A‖² + damping·‖B − the B before‖², row by row.

    The last term keeps a step finite where it is not determined, and the error still never rises.
    """
    rank = len(A)
    pairs = (A[:, None] * A[None]).flatten(0, 1)  # (r², in)
    gram = (W0.square() @ pairs.T).view(-1, rank, rank)
    right = (W0 * E) @ A.T
    weight = damping * gram.diagonal(dim1=1, dim2=2).mean()
    gram = gram + weight * torch.eye(rank)
    return torch.linalg.solve(gram, right + weight * B)


def best_hira(E, W0, rank, steps=30, starts=2, damping=1e-4):
    """The nearest W0 ⊙ B·A to E that alternating least squares finds: (update, [energy per step]).

    Of several random starts the best one. A local optimum: more may be possible.
    """
    best = None
    for start in range(starts):
        generator = generator_for("alternating least squares", start)
        A = torch.randn(rank, E.shape[1], generator=generator)
        B, path = torch.zeros(len(E), rank), []
        for _ in range(steps):
            B = rows_given(A, B, W0, E, damping)
            A = rows_given(B.T, A.T, W0.T, E.T, damping).T
            update = hira_update(W0, A, B)
            path.append(energy(update, E))
        if best is None or path[-1] > best[1][-1]:
            best = update, path
    return best


def energy(update, E):
    """The share of E's energy that an update captures, 1 − ‖E − update‖² / ‖E‖²."""
    return 1 - ((E - update).square().sum() / E.square().sum()).item()
