"""Merging attention over disjoint sets of keys: ring attention, cached prefixes, split keys."""

import torch
from torch import Tensor


def merge(
    a: tuple[Tensor, Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from the results over each.

    a, b: (o, to, lse, mu) of the same queries, as attention_jvp(..., return_lse=True, return_mu=True) gives
    them: o, to (B, H, N, Dv); lse, mu (B, H, N). With w = exp(lse_part - lse):
    o = sum w o_part, mu = sum w mu_part, to = sum w (to_part + (mu_part - mu) o_part).
    Rows that see no key in either part stay zero with lse = -inf.
    """
    lse = torch.logaddexp(a[2], b[2])
    finite = lse.masked_fill(torch.isneginf(lse), 0.0)
    weights = [torch.exp(part[2] - finite) for part in (a, b)]
    mu = weights[0] * a[3] + weights[1] * b[3]
    o = sum(w.unsqueeze(-1) * part[0] for w, part in zip(weights, (a, b), strict=True))
    to = sum(
        w.unsqueeze(-1) * (part[1] + (part[3] - mu).unsqueeze(-1) * part[0])
        for w, part in zip(weights, (a, b), strict=True)
    )
    return o.to(a[0].dtype), to.to(a[1].dtype), lse, mu
