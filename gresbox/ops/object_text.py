"""Attention between object queries and words, in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from gresbox._checks import check_shape
from gresbox.ops._backend import use_triton
from gresbox.ops._bidirectional_attention import allowed_tokens, attend_both, attend_op, kernel_refusal
from gresbox.ops._precision import accumulation_dtype, no_autocast, real_tokens

__all__ = ["cross_attend_both"]

MANY_AFFINITIES = 2**16  # of all heads in one direction


def cross_attend_both(
    object_query: Tensor,
    token_key: Tensor,
    token_value: Tensor,
    token_query: Tensor,
    object_key: Tensor,
    object_value: Tensor,
    valid: Tensor | None = None,
    *,
    backend: str = "auto",
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
        backend: ``"eager"`` is the equation as printed and the only form with a double backward; ``"auto"`` is the Triton kernel on
            CUDA, elsewhere PyTorch's attention or, for many affinities on a CPU, the equation; ``"triton"`` is the kernel, which
            does both directions in one launch.

    Shape:
        - ``object_*``: ``(B, heads, N, D)``; ``token_*``: ``(B, heads, L, D)``; ``valid``: ``(B, L)``.
        - returns ``(B, heads, N, D)`` and ``(B, heads, L, D)``, padded tokens included; zeros where there is nothing to attend to.

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit.
        RuntimeError: If ``backend`` is not possible here.

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
    real = None if valid is None else real_tokens(who, valid, token_key)
    shared = object_key is object_query and token_query is token_key  # one affinity serves both directions
    inputs = [object_query, token_key, token_value, token_query, object_key, object_value]
    kernel = use_triton(who, backend, *inputs, kernel=kernel_refusal(object_query, token_key) or True)
    with no_autocast(object_query):
        if backend == "eager" or (not kernel and _many_on_cpu(object_query, token_key)):
            return _as_printed(*inputs, allowed=allowed_tokens(real))
        inputs = [tensor.to(object_query.dtype) for tensor in inputs]
        if kernel:
            return attend_op(*inputs, None if real is None else real.contiguous(), shared)
        return attend_both(*inputs, allowed=allowed_tokens(real))


def _many_on_cpu(object_query: Tensor, token_key: Tensor) -> bool:
    """Whether the equation as printed is the faster form: PyTorch's attention is not made for so few words on a CPU."""
    return object_query.device.type == "cpu" and object_query.shape[:3].numel() * token_key.shape[2] >= MANY_AFFINITIES


def _as_printed(
    object_query: Tensor,
    token_key: Tensor,
    token_value: Tensor,
    token_query: Tensor,
    object_key: Tensor,
    object_value: Tensor,
    *,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Two softmaxes of two affinities, ``(B, heads, N, L)`` and ``(B, heads, L, N)``."""
    dtype = torch.promote_types(object_query.dtype, torch.float32)
    scale = max(object_query.shape[-1], 1) ** -0.5
    of_words = scale * object_query.to(dtype) @ token_key.to(dtype).mT
    of_objects = scale * token_query.to(dtype) @ object_key.to(dtype).mT
    if allowed is not None:
        of_words = of_words.masked_fill(~allowed, torch.finfo(dtype).min)
    objects, tokens = of_words.softmax(-1) @ token_value.to(dtype), of_objects.softmax(-1) @ object_value.to(dtype)
    return objects.to(object_query.dtype), tokens.to(object_query.dtype)
