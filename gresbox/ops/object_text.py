"""Attention between object queries and words, in both directions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_shape
from gresbox.ops._precision import accumulation_dtype, no_autocast, real_tokens

__all__ = ["cross_attend_both"]


def cross_attend_both(
    object_query: Tensor,
    token_key: Tensor,
    token_value: Tensor,
    token_query: Tensor,
    object_key: Tensor,
    object_value: Tensor,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Objects attend to words and words attend to objects, both reading the state before the step.

    .. math::
        O = \mathrm{softmax}(q_o k_t^\top / \sqrt D)\, v_t, \qquad T = \mathrm{softmax}(q_t k_o^\top / \sqrt D)\, v_o

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Sec. 3.3.
    Differs from the paper: it does not print the layer; the projections around this core are the caller's. One affinity for both
    directions (as in GLIP) is this core with ``object_query = object_key`` and ``token_query = token_key``.

    Args:
        object_query: Queries of the objects.
        token_key: Keys of the words.
        token_value: Values of the words.
        token_query: Queries of the words.
        object_key: Keys of the objects.
        object_value: Values of the objects.
        valid: True on real tokens; None: all are real. Objects attend to real tokens only; a text of only padding behaves as if its
            first token were real.

    Shape:
        - ``object_*``: ``(B, heads, N, D)``; ``token_*``: ``(B, heads, L, D)``; ``valid``: ``(B, L)``.
        - returns ``(B, heads, N, D)`` and ``(B, heads, L, D)``, padded tokens included; zeros where there is nothing to attend to.

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> objects, tokens = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
        >>> cross_attend_both(objects, tokens, tokens, tokens, objects, objects, torch.tensor([[1, 0]]))[0]
        tensor([[[[1., 3.]]]])
    """
    who = "cross_attend_both"
    check_shape(
        who,
        object_query=(object_query, "B heads N D"),
        token_key=(token_key, "B heads L D"),
        token_value=(token_value, "B heads L D"),
        token_query=(token_query, "B heads L D"),
        object_key=(object_key, "B heads N D"),
        object_value=(object_value, "B heads N D"),
    )
    accumulation_dtype(who, object_query=object_query, token_key=token_key, token_value=token_value)
    accumulation_dtype(who, token_query=token_query, object_key=object_key, object_value=object_value)
    dtype = object_query.dtype
    allowed = None
    if valid is not None:
        real = real_tokens(who, valid, token_key)
        first = torch.arange(real.shape[-1], device=real.device) == 0
        allowed = (real | (first & ~real.any(-1, keepdim=True)))[:, None, None]  # (B, 1, 1, L)
    with no_autocast(object_query):
        token_key, token_value = token_key.to(dtype), token_value.to(dtype)
        token_query, object_key, object_value = token_query.to(dtype), object_key.to(dtype), object_value.to(dtype)
        objects = F.scaled_dot_product_attention(object_query, token_key, token_value, attn_mask=allowed)
        tokens = F.scaled_dot_product_attention(token_query, object_key, object_value)
    return objects, tokens
