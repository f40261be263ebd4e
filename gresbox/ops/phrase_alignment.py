"""Phrase-object alignment: which words a query answers to, and how far it is from their meaning."""

from __future__ import annotations

import torch
from torch import Tensor

from gresbox._checks import check_shape
from gresbox.ops._backend import use_triton
from gresbox.ops._precision import accumulation_dtype, no_autocast, real_tokens

__all__ = ["align_phrases"]

_ZERO_LENGTH = 1e-16  # squared length under which a vector has no direction


def align_phrases(
    queries: Tensor,
    tokens: Tensor,
    valid: Tensor | None = None,
    *,
    detach_relevance: bool = False,
    detach_tokens: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Distance of each query to the phrase it attends to, and its relevance over the words.

    .. math::
        R = \mathrm{softmax}(Q T^\top / \sqrt C), \quad P = R\,T, \quad \mathcal L^i = 1 - \cos(P^i, Q^i)

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Sec. 3.3.1, Eq. (1)-(3).
    Differs from the paper: padding takes no part in the softmax; a query or phrase of length zero has cosine 0.
    ``"auto"`` never forms the phrases: with ``G = T T^t``, ``|P|^2 = R G R^t`` and ``Q . P`` is the sum of ``R`` times the logits.

    Args:
        queries: One feature vector per query.
        tokens: One feature vector per word piece; what padded places hold does not matter.
        valid: True on real tokens; None: all are real.
        detach_relevance: No gradient through the relevance.
        detach_tokens: No gradient to the tokens.
        backend: ``"eager"`` is the equations as printed, ``"auto"`` the fastest form.

    Shape:
        - ``queries``: ``(B, N, C)``; ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)``.
        - returns ``(B, N)`` in [0, 2] and ``(B, N, L)``, rows summing to 1 over real tokens. Without a real token both are 0.

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit.
        RuntimeError: If ``backend`` is not possible here.

    Example:
        >>> import torch
        >>> query, tokens = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [9.0, 9.0]]])
        >>> align_phrases(query, tokens, torch.tensor([[1, 0]]))
        (tensor([[0.]]), tensor([[[1., 0.]]]))
    """
    sizes = check_shape("align_phrases", queries=(queries, "B N C"), tokens=(tokens, "B L C"))
    dtype = accumulation_dtype("align_phrases", queries=queries, tokens=tokens)
    real = real_tokens("align_phrases", valid, tokens)
    use_triton("align_phrases", backend, queries, tokens)
    with no_autocast(queries):
        query = queries.to(dtype)
        # A where, not a product: padded places may hold anything, NaN included.
        token = torch.where(real[..., None], tokens.detach() if detach_tokens else tokens, 0).to(dtype)
        logits = query @ token.mT  # (B, N, L)
        hidden = (logits * max(sizes["C"], 1) ** -0.5).masked_fill(~real[:, None], torch.finfo(dtype).min)
        relevance = hidden.softmax(-1) * real[:, None]
        if detach_relevance:
            relevance = relevance.detach()
        if backend == "eager":
            phrases = relevance @ token  # (B, N, C)
            product, length = (query * phrases).sum(-1), phrases.square().sum(-1)
        else:
            product = (relevance * logits).sum(-1)
            length = (relevance @ (token @ token.mT) * relevance).sum(-1)
        distance = 1 - _cosine(product, query.square().sum(-1), length)
        loss = torch.where(real.any(-1, keepdim=True), distance, 0)
    return loss.to(queries.dtype), relevance.to(queries.dtype)


def _cosine(product: Tensor, squared_a: Tensor, squared_b: Tensor) -> Tensor:
    """Cosine from an inner product and two squared lengths, in [-1, 1]; 0 without gradient where a length is zero."""
    directed = ~((squared_a <= _ZERO_LENGTH) | (squared_b <= _ZERO_LENGTH))  # NaN has a "direction", so that it is not hidden as 0
    scale = torch.where(directed, squared_a, 1).rsqrt() * torch.where(directed, squared_b, 1).rsqrt()
    return torch.where(directed, product * scale, 0).clamp(-1, 1)
