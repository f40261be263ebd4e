"""Cross-attention of queries to the pixels inside their own predicted masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gresbox._checks import check_shape
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["masked_attention"]

_FEW, _MANY = 2**19, 2**23  # probabilities: up to which a CPU is faster when it keeps them, without and with gradients


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor) -> Tensor:
    r"""Attend to the pixels where the query's mask logit is not negative.

    .. math:: \mathrm{softmax}(q k^\top / \sqrt D + \log [m \ge 0])\, v

    Paper: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527, Sec. 3.2.1.
    Differs from the paper: nothing; a query whose mask is empty attends everywhere, as in the authors' code. PyTorch's attention
    with one mask for all heads does the work: a Triton kernel would have to be 1.3 times as fast, and there is none. On a CPU
    the equation as printed is faster for small maps, and with gradients for larger ones too, and runs there. There is no double
    backward.

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
        if _worth_keeping(query, key, value):
            return _KeptAttention.apply(query, key, value, ~allowed[:, None])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None])


def _worth_keeping(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the form that keeps its probabilities is the faster one."""
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.float64) or torch.compiler.is_exporting():
        return False
    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return query.numel() // max(query.shape[-1], 1) * key.shape[2] <= (_MANY if trained else _FEW)


class _KeptAttention(torch.autograd.Function):
    """The equation as printed, with its probabilities kept; their gradient is written over by that of the affinities."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor) -> Tensor:
        affinity = _scaled(query) @ key.mT
        share = affinity.masked_fill_(blocked, -torch.inf).softmax(-1)
        out = share @ value
        ctx.save_for_backward(query, key, value, share, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, share, out = ctx.saved_tensors
        with no_autocast(query):
            change = grad @ value.mT
            change.sub_((grad * out).sum(-1, keepdim=True)).mul_(share)
            return _scaled(change @ key), change.mT @ _scaled(query), share.mT @ grad, None


def _scaled(query: Tensor) -> Tensor:
    return query * max(query.shape[-1], 1) ** -0.5
