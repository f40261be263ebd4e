"""Cross-attention of queries to the pixels inside their own predicted masks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_shape
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["masked_attention"]


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor) -> Tensor:
    r"""Attend to the pixels where the query's mask logit is not negative.

    .. math:: \mathrm{softmax}(q k^\top / \sqrt D + \log [m \ge 0])\, v

    Paper: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527, Sec. 3.2.1.
    Differs from the paper: nothing; a query whose mask is empty attends everywhere, as in the authors' code. PyTorch's attention
    with one mask for all heads does the work: a Triton kernel would have to be 1.3 times as fast, and there is none.

    Args:
        query: One vector per head and query.
        key: One vector per head and pixel.
        value: One vector per head and pixel.
        mask_logits: One logit per query and pixel, shared by the heads; no gradient flows to it.

    Shape:
        - ``query``: ``(B, heads, N, D)``; ``key``, ``value``: ``(B, heads, P, D)``; ``mask_logits``: ``(B, N, P)``.
        - returns ``(B, heads, N, D)``; without pixels zeros.

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> query, key, value = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1), torch.tensor([[[[1.0], [3.0]]]])
        >>> masked_attention(query, key, value, torch.tensor([[[-1.0, 1.0], [-1.0, -1.0]]])).flatten()
        tensor([3., 2.])
    """
    check_shape(
        "masked_attention",
        query=(query, "B heads N D"),
        key=(key, "B heads P D"),
        value=(value, "B heads P D"),
        mask_logits=(mask_logits, "B N P"),
    )
    accumulation_dtype("masked_attention", query=query, key=key, value=value, mask_logits=mask_logits)
    inside = mask_logits.detach() >= 0
    allowed = inside | ~inside.any(-1, keepdim=True)  # an empty mask blocks nothing
    with no_autocast(query):
        key, value = key.to(query.dtype), value.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None])
