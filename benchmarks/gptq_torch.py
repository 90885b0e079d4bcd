"""The published GPTQ column loop in PyTorch, transcribed literally: a rival to measure against.

As `fasterquant` in IST-DASLab/gptq `gptq.py`: Cholesky, inverse, Cholesky; blocks of 128 columns;
one Python step per column; static groups on the A1 grid, in natural or (`actorder`) activation
order. Returns codes and dequantized weights.
"""

from __future__ import annotations

import torch


def find_params(w: torch.Tensor, maxq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A1: `[rows, g]` to scale and zero `[rows]`."""
    zero = torch.zeros(w.shape[0])
    low, high = torch.minimum(w.min(1)[0], zero), torch.maximum(w.max(1)[0], zero)
    empty = (low == 0) & (high == 0)
    low[empty], high[empty] = -1, 1
    scale = (high - low) / maxq
    return scale, torch.round(-low / scale)


def group_params(w: torch.Tensor, maxq: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of every weight, `[rows, columns]`."""
    pairs = [find_params(w[:, i : i + group], maxq) for i in range(0, w.shape[1], group)]
    scale, zero = (torch.stack(part, dim=1) for part in zip(*pairs, strict=True))
    return scale.repeat_interleave(group, 1), zero.repeat_interleave(group, 1)


def gptq(
    w: torch.Tensor,
    h: torch.Tensor,
    *,
    bits: int = 4,
    group: int = 64,
    damping: float = 0.01,
    block: int = 128,
    ordered: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8) and values (float32), `[rows, columns]`."""
    w, h, maxq = w.clone(), h.clone(), 2**bits - 1
    columns = w.shape[1]
    codes, values = torch.zeros(w.shape, dtype=torch.uint8), torch.zeros_like(w)

    diagonal = torch.arange(columns)
    dead = torch.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    params = [find_params(w[:, i : i + group], maxq) for i in range(0, columns, group)]
    perm = torch.argsort(torch.diag(h), descending=True) if ordered else diagonal
    w, h, owner = w[:, perm], h[perm][:, perm], (perm // group).tolist()

    h[diagonal, diagonal] += damping * torch.mean(torch.diag(h))
    h = torch.linalg.cholesky(h)
    h = torch.cholesky_inverse(h)
    hinv = torch.linalg.cholesky(h, upper=True)

    for i1 in range(0, columns, block):
        i2 = min(i1 + block, columns)
        w1 = w[:, i1:i2].clone()
        err1 = torch.zeros_like(w1)
        hinv1 = hinv[i1:i2, i1:i2]
        for i in range(i2 - i1):
            scale, zero = params[owner[i1 + i]]
            column, d = w1[:, i], hinv1[i, i]
            code = torch.clamp(torch.round(column / scale) + zero, 0, maxq)
            value = scale * (code - zero)
            codes[:, i1 + i], values[:, i1 + i] = code.to(torch.uint8), value
            err = (column - value) / d
            w1[:, i:] -= err.unsqueeze(1).matmul(hinv1[i, i:].unsqueeze(0))
            err1[:, i] = err
        w[:, i2:] -= err1.matmul(hinv[i1:i2, i2:])
    back = torch.argsort(perm)
    return codes[:, back], values[:, back]
