"""Where QLoRA's adapter can start so that it undoes the error of the 4-bit weights.

With W the weight, Q what its 4 bits stand for and s = α/r, the model starts at Q + s·B·A. Both
functions return (A (r, in), B (out, r)), of which neither is zero.
"""

import torch


def loftq(W, Q, rank, scale):
    """The nearest start to W in weights: the SVD of W − Q, cut to `rank` and divided by `scale`.

    LoftQ (arXiv 2310.08659) with one round, as PEFT's; but PEFT forgets to divide, so that its
    model starts at Q + s·(W − Q)ᵣ. At s = 2 that is as far from W as Q is.
    """
    U, S, V = torch.linalg.svd(W - Q, full_matrices=False)
    roots = (S[:rank] / scale).sqrt()
    return roots[:, None] * V[:rank], U[:, :rank] * roots


def output_aware(W, Q, C, rank, scale, damping=0.01):
    """The nearest start to W in outputs: s·B·A = [(W − Q)·C^½]ᵣ·C^−½.

    It minimizes ‖(W − Q − s·B·A)·X‖ for inputs X (in, tokens) with C = X·Xᵀ/tokens (in, in), as
    CLoQ (arXiv 2501.18475) and QERA (2410.06040) do. To C, `damping` times the mean of its diagonal
    is added, so that directions that no input had stay finite.
    """
    eye = torch.eye(len(C), dtype=torch.float64, device=C.device)
    values, vectors = torch.linalg.eigh(C.double() + damping * C.trace() / len(C) * eye)
    half = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors / values.sqrt()) @ vectors.T
    A, B = loftq(W.double() @ half, Q.double() @ half, rank, scale)
    return (A @ inverse).to(W), B.to(W)
