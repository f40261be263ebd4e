"""Cross-attention of queries to the pixels inside their own predicted masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_shape
from gresbox.ops._backend import use_triton
from gresbox.ops._first_order import first_order, refuse_second_of
from gresbox.ops._precision import accumulation_dtype, no_autocast

__all__ = ["masked_attention"]

_FEW, _MANY = 2**19, 2**23  # probabilities: up to which a CPU is faster when it keeps them, without and with gradients


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask_logits: Tensor, *, backend: str = "auto") -> Tensor:
    r"""Attend to the pixels where the query's mask logit is not negative.

    .. math:: \mathrm{softmax}(q k^\top / \sqrt D + \log [m \ge 0])\, v

    Paper: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527, Sec. 3.2.1.
    Differs from the paper: nothing; a query whose mask is empty attends everywhere, as in the authors' code. PyTorch's attention
    with one mask for all heads does the work: a Triton kernel would have to be 1.3 times as fast, and there is none. On a CPU
    the equation as printed is faster for small maps, and with gradients for larger ones too, and runs there.

    Args:
        query: One vector per head and query.
        key: One vector per head and pixel.
        value: One vector per head and pixel.
        mask_logits: One logit per query and pixel, shared by the heads; no gradient flows to it.
        backend: ``"eager"`` is the equation as printed and the only form with a double backward; ``"auto"`` the fastest form.

    Shape:
        - ``query``: ``(B, heads, N, D)``; ``key``, ``value``: ``(B, heads, P, D)``; ``mask_logits``: ``(B, N, P)``.
        - returns ``(B, heads, N, D)``; without pixels zeros.

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit.
        RuntimeError: If ``backend`` is not possible here.

    Example:
        >>> import torch
        >>> query, key, value = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1), torch.tensor([[[[1.0], [3.0]]]])
        >>> masked_attention(query, key, value, torch.tensor([[[-1.0, 1.0], [-1.0, -1.0]]])).flatten()
        tensor([3., 2.])
    """
    who = "masked_attention"
    check_shape(
        who,
        query=(query, "B heads N D"),
        key=(key, "B heads P D"),
        value=(value, "B heads P D"),
        mask_logits=(mask_logits, "B N P"),
    )
    dtype = accumulation_dtype(who, query=query, key=key, value=value, mask_logits=mask_logits)
    use_triton(who, backend, query, key, value)
    inside = mask_logits.detach() >= 0
    allowed = inside | ~inside.any(-1, keepdim=True)  # an empty mask blocks nothing
    with no_autocast(query):
        key, value = key.to(query.dtype), value.to(query.dtype)
        if backend == "eager":
            return _as_printed(query.to(dtype), key.to(dtype), value.to(dtype), ~allowed[:, None])[0].to(query.dtype)
        if _worth_keeping(query, key, value):
            form = _KeptAttention.apply if torch.is_grad_enabled() else _as_printed
            return form(query, key, value, ~allowed[:, None])[0]
        return refuse_second_of(who, F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None]))


def _worth_keeping(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the form that keeps its probabilities is the faster one."""
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.float64) or torch.compiler.is_exporting():
        return False
    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return query.numel() // max(query.shape[-1], 1) * key.shape[2] <= (_MANY if trained else _FEW)


def _as_printed(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the probabilities ``(B, heads, N, P)``."""
    affinity = _scaled(query) @ key.mT
    share = affinity.masked_fill_(blocked, -torch.inf).softmax(-1)
    return share @ value, share


class _KeptAttention(torch.autograd.Function):
    """The equation as printed, with its probabilities kept; their gradient is written over by that of the affinities."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, blocked: Tensor) -> tuple[Tensor, Tensor]:
        return _as_printed(query, key, value, blocked)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        out, share = output
        ctx.save_for_backward(*inputs[:3], share, out)
        ctx.mark_non_differentiable(share)
        ctx.set_materialize_grads(False)  # zeros of the probabilities' shape would be made for nothing

    @staticmethod
    @first_order("masked_attention")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor | None, to_share: None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        if grad is None:
            return None, None, None, None
        query, key, value, share, out = saved
        with no_autocast(query):
            change = grad @ value.mT
            change.sub_((grad * out).sum(-1, keepdim=True)).mul_(share)
            return _scaled(change @ key), change.mT @ _scaled(query), share.mT @ grad, None


def _scaled(query: Tensor) -> Tensor:
    return query * max(query.shape[-1], 1) ** -0.5
