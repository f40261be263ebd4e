"""Phrase-object alignment: which words a query answers to, and how far it is from their meaning."""

from __future__ import annotations

import torch
from torch import Tensor

from gresbox._checks import check_shape
from gresbox.ops._backend import use_triton
from gresbox.ops._gram_alignment import (
    align_by_products,
    align_op,
    cosine_of,
    kernel_refusal,
    relevance_of,
    where_spoken,
    without_padding,
)
from gresbox.ops._precision import accumulation_dtype, no_autocast, real_tokens

__all__ = ["align_phrases"]

FEW_VALUES = 2**16  # of queries: fewer are aligned as fast with the phrases formed, unless gradients follow


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
        backend: ``"eager"`` is the equations as printed and the only form with a double backward; ``"auto"`` is the Triton kernel
            on CUDA, the Gram form elsewhere; ``"triton"`` is the kernel.

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
    who = "align_phrases"
    check_shape(who, queries=(queries, "B N C"), tokens=(tokens, "B L C"))
    dtype = accumulation_dtype(who, queries=queries, tokens=tokens)
    real = None if valid is None else real_tokens(who, valid, tokens)
    kernel = use_triton(who, backend, queries, tokens, kernel=kernel_refusal(queries, tokens) or True)
    if detach_tokens:
        tokens = tokens.detach()
    with no_autocast(queries):
        if kernel:
            loss, relevance = align_op(queries, tokens, None if real is None else real.contiguous(), detach_relevance)
            return loss, relevance.detach() if detach_relevance else relevance
        trained = torch.is_grad_enabled() and (queries.requires_grad or tokens.requires_grad)
        few = not (trained or torch.compiler.is_exporting()) and queries.numel() < FEW_VALUES
        form = _as_printed if backend == "eager" or few else align_by_products
        loss, relevance = form(queries.to(dtype), tokens.to(dtype), real, detach_relevance)
    return loss.to(queries.dtype), relevance.to(queries.dtype)


def _as_printed(query: Tensor, token: Tensor, real: Tensor | None, detached: bool) -> tuple[Tensor, Tensor]:
    """Eq. (1)-(3) with the phrases formed."""
    token = without_padding(token, real)
    relevance = relevance_of(query @ token.mT, real, query.shape[-1])
    if detached:
        relevance = relevance.detach()
    phrases = relevance @ token  # (B, N, C)
    distance = 1 - cosine_of((query * phrases).sum(-1), query.square().sum(-1), phrases.square().sum(-1))
    return where_spoken(distance, real, token), relevance
