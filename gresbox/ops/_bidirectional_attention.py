"""The registered op behind ``cross_attend_both``, and its form in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox.ops._first_order import refuse_second_of
from gresbox.ops._register import Forms, define_op

__all__ = ["allowed_tokens", "attend_both", "attend_op", "kernel_refusal"]

MOST_TOKENS = 64  # that the kernel takes
MOST_VALUES = 2048  # tokens times channels of a head, both rounded up to powers of two; in float32 half as many
_NAMES = ("object_query", "token_key", "token_value", "token_query", "object_key", "object_value")


def allowed_tokens(real: Tensor | None) -> Tensor | None:
    """``(B, 1, 1, L)``: real tokens, and the first one of a text of padding only."""
    if real is None:
        return None
    first = torch.arange(real.shape[-1], device=real.device) == 0
    return (real | (first & ~real.any(-1, keepdim=True)))[:, None, None]


def attend_both(
    object_query: Tensor,
    token_key: Tensor,
    token_value: Tensor,
    token_query: Tensor,
    object_key: Tensor,
    object_value: Tensor,
    *,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both directions by PyTorch's attention; zeros where there is nothing to attend to."""
    objects = F.scaled_dot_product_attention(object_query, token_key, token_value, attn_mask=allowed)
    tokens = F.scaled_dot_product_attention(token_query, object_key, object_value)
    return refuse_second_of("cross_attend_both", objects), refuse_second_of("cross_attend_both", tokens)


def kernel_refusal(object_query: Tensor, token_key: Tensor, *rest: Any) -> str | None:
    """Why the kernel cannot take these inputs."""
    length, dim = token_key.shape[2:]
    values = MOST_VALUES if object_query.element_size() == 2 else MOST_VALUES // 2
    if _block(length) > MOST_TOKENS or _block(length) * _block(dim) > values:
        limits = f"up to {MOST_TOKENS} tokens and {values} values of a head's tokens in {object_query.dtype}".replace("torch.", "")
        return f"its kernel takes {limits}, here are {length} of {dim}"
    return None


def _block(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _attend_plain(*args: Any) -> tuple[Tensor, Tensor]:
    objects, tokens = attend_both(*args[:6], allowed=allowed_tokens(args[6]))
    return objects.contiguous(), tokens.contiguous()


def _attend_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    from gresbox.kernels.object_text import attend

    return attend(args[:6], args[6], args[7])


def _unattend_plain(grad_objects: Tensor, grad_tokens: Tensor, *args: Any) -> tuple[Tensor, ...]:
    object_query, token_key, token_value, token_query, object_key, object_value, real = args[:7]
    first = _unattend(grad_objects, object_query, token_key, token_value, allowed_tokens(real))
    second = _unattend(grad_tokens, token_query, object_key, object_value, None)
    return *first, *second


def _unattend(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one direction's query, key and value."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    wide_grad, wide_query, wide_key, wide_value = (tensor.to(dtype) for tensor in (grad, query, key, value))
    scale = query.shape[-1] ** -0.5
    affinity = scale * wide_query @ wide_key.mT
    if allowed is not None:
        affinity = affinity.masked_fill(~allowed, torch.finfo(dtype).min)
    weights = affinity.softmax(-1)
    change = wide_grad @ wide_value.mT
    to_affinity = scale * weights * (change - (weights * change).sum(-1, keepdim=True))
    found = (to_affinity @ wide_key, to_affinity.mT @ wide_query, weights.mT @ wide_grad)
    return found[0].to(query.dtype), found[1].to(query.dtype), found[2].to(query.dtype)


def _unattend_kernel(grad_objects: Tensor, grad_tokens: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from gresbox.kernels.object_text import unattend

    return unattend((grad_objects.contiguous(), grad_tokens.contiguous()), args[:6], args[6])


def _fake(object_query: Tensor, token_key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return object_query.new_empty(object_query.shape), object_query.new_empty(token_key.shape)


attend_op = define_op(
    f"cross_attend_both({', '.join(f'Tensor {name}' for name in _NAMES)}, Tensor? real, bool shared) -> (Tensor, Tensor)",
    fake=_fake,
    forward=Forms(_attend_plain, _attend_kernel, kernel_refusal),
    backward=Forms(_unattend_plain, _unattend_kernel, lambda grad_objects, grad_tokens, *inputs: kernel_refusal(*inputs)),
    differentiable=_NAMES,
)
