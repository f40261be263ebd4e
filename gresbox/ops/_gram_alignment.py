"""Phrase-object alignment by inner products alone: with ``G = T T^t``, ``|P|^2 = R G R^t`` and ``Q . P`` is the sum of ``R a``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gresbox.ops._first_order import first_order
from gresbox.ops._precision import no_autocast
from gresbox.ops._register import Forms, define_op

__all__ = ["align_by_products", "align_op", "cosine_of", "kernel_refusal", "relevance_of", "where_spoken", "without_padding"]

MOST_TOKENS = 128  # that the kernel takes
ZERO_LENGTH = 1e-16  # squared length under which a vector has no direction


def without_padding(tokens: Tensor, real: Tensor | None) -> Tensor:
    """A where, not a product: padded places may hold anything, NaN included."""
    return tokens if real is None else torch.where(real[..., None], tokens, 0)


def relevance_of(logits: Tensor, real: Tensor | None, dim: int) -> Tensor:
    """Softmax of ``(B, N, L)`` logits over ``sqrt(dim)``, over real tokens; 0 where there is none."""
    scaled = logits * max(dim, 1) ** -0.5
    if real is None:
        return scaled.softmax(-1)
    return scaled.masked_fill(~real[:, None], torch.finfo(scaled.dtype).min).softmax(-1) * real[:, None]


def where_spoken(values: Tensor, real: Tensor | None, tokens: Tensor) -> Tensor:
    """``(B, N)`` values, 0 where a text has no real token."""
    if real is None:
        return values if tokens.shape[1] else torch.zeros_like(values)
    return torch.where(real.any(-1, keepdim=True), values, 0)


def cosine_of(product: Tensor, squared_a: Tensor, squared_b: Tensor) -> Tensor:
    """Cosine from an inner product and two squared lengths, in [-1, 1]; 0 without gradient where a length is zero."""
    directed, by_a, by_b = _directions(squared_a, squared_b)
    return torch.where(directed, product * by_a * by_b, 0).clamp(-1, 1)


def _directions(squared_a: Tensor, squared_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where both have a direction, and one over their lengths. NaN has a "direction", so that it is not hidden as 0."""
    directed = ~((squared_a <= ZERO_LENGTH) | (squared_b <= ZERO_LENGTH))
    return directed, torch.where(directed, squared_a, 1).rsqrt(), torch.where(directed, squared_b, 1).rsqrt()


def _cosine_gradients(grad: Tensor, product: Tensor, squared_a: Tensor, squared_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the three arguments of :func:`cosine_of`."""
    directed, by_a, by_b = _directions(squared_a, squared_b)
    cosine = product * by_a * by_b
    grad = torch.where(directed & ~(cosine.abs() > 1), grad, 0)
    half = -0.5 * grad * cosine
    return grad * by_a * by_b, half * by_a.square(), half * by_b.square()


@dataclass(frozen=True)
class _Gram:
    """What the form computes on its way, and its gradients; words come before queries, which is the faster product on a CPU."""

    query: Tensor
    token: Tensor  # padded places may hold anything
    logits: Tensor  # (B, L, N), not divided by sqrt C; 0 where padded, as the next two
    relevance: Tensor
    along: Tensor  # the tokens' Gram matrix times relevance
    product: Tensor  # (B, N)
    squared_query: Tensor
    squared_phrase: Tensor

    @classmethod
    def of(cls, query: Tensor, token: Tensor, real: Tensor | None) -> _Gram:
        logits, gram = token @ query.mT, token @ token.mT
        scaled = logits * max(query.shape[-1], 1) ** -0.5
        if real is not None:  # what is filled are products: a padded token may be NaN
            padded = ~real[..., None]
            logits.masked_fill_(padded, 0), gram.masked_fill_(padded | padded.mT, 0)
            scaled.masked_fill_(padded, torch.finfo(scaled.dtype).min)
        relevance = scaled.softmax(1)
        if real is not None:
            relevance *= real[..., None]
        along = gram @ relevance
        squared_query = torch.linalg.vector_norm(query, dim=-1).square()  # one pass: no tensor of the queries' size is made
        return cls(query, token, logits, relevance, along, (relevance * logits).sum(1), squared_query, (along * relevance).sum(1))

    def loss(self, real: Tensor | None) -> Tensor:
        cosine = cosine_of(self.product, self.squared_query, self.squared_phrase)
        return where_spoken(1 - cosine, real, self.token)

    def by_query(self) -> Tensor:
        """The relevance ``(B, N, L)``."""
        return self.relevance.mT.clone(memory_format=torch.contiguous_format)  # never a view of what is saved

    def gradients(
        self, grad_loss: Tensor, grad_relevance: Tensor | None, real: Tensor | None, detached: bool
    ) -> tuple[Tensor, Tensor]:
        """Of queries and tokens."""
        lengths = (self.product, self.squared_query, self.squared_phrase)
        of_cosine = _cosine_gradients(where_spoken(-grad_loss, real, self.token), *lengths)
        to_product, to_squared, to_length = (part[:, None] for part in of_cosine)
        token = without_padding(self.token, real)
        to_logits = to_product * self.relevance
        if not detached:
            change = to_product * self.logits + 2 * to_length * self.along
            change = change if grad_relevance is None else change + grad_relevance.mT
            inner = (self.relevance * change).sum(1, keepdim=True)
            to_logits = to_logits + self.relevance * (change - inner) * max(self.query.shape[-1], 1) ** -0.5
        grad_query = torch.bmm(to_logits.mT, token).addcmul_(2 * to_squared.mT, self.query)
        to_gram = (2 * to_length * self.relevance) @ self.relevance.mT  # symmetric
        return grad_query, (to_gram @ token).baddbmm_(to_logits, self.query)


class _GramAlignment(torch.autograd.Function):
    """Distances and relevance; the gradient makes one tensor of the queries' size where autograd's would make four."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, token: Tensor, real: Tensor | None, detached: bool) -> tuple[Tensor, ...]:
        """The two results, and what the gradient reads."""
        found = _Gram.of(query, token, real)
        kept = (found.logits, found.relevance, found.along, found.product, found.squared_query, found.squared_phrase)
        return found.loss(real), found.by_query(), *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, token, real, ctx.detached = inputs
        _, relevance, *kept = output
        ctx.save_for_backward(query, token, real, *kept)
        ctx.mark_non_differentiable(*kept, *([relevance] if ctx.detached else []))
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_order("align_phrases")
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_loss: Tensor | None, grad_relevance: Tensor | None, *others: None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of queries and tokens from those of loss and relevance."""
        query, token, real, *kept = saved
        found = _Gram(query, token, *kept)
        if grad_loss is None:
            grad_loss = torch.zeros_like(found.product)
        with no_autocast(query):
            return *found.gradients(grad_loss, grad_relevance, real, ctx.detached), None, None


def align_by_products(query: Tensor, token: Tensor, real: Tensor | None, detached: bool) -> tuple[Tensor, Tensor]:
    """Distances ``(B, N)`` and relevance ``(B, N, L)``; all tensors have one dtype, float32 or float64."""
    return _GramAlignment.apply(query, token, real, detached)[:2]


def kernel_refusal(queries: Tensor, tokens: Tensor, *rest: Any) -> str | None:
    """Why the kernel cannot take these inputs."""
    if tokens.shape[1] > MOST_TOKENS:
        return f"its kernel takes up to {MOST_TOKENS} tokens, here are {tokens.shape[1]}"
    return None


def _wide(queries: Tensor, tokens: Tensor, real: Tensor | None) -> _Gram:
    dtype = torch.promote_types(torch.promote_types(queries.dtype, tokens.dtype), torch.float32)
    return _Gram.of(queries.to(dtype), tokens.to(dtype), real)


def _align_plain(queries: Tensor, tokens: Tensor, real: Tensor | None, detached: bool) -> tuple[Tensor, Tensor]:
    found = _wide(queries, tokens, real)
    return found.loss(real).to(queries.dtype), found.by_query().to(queries.dtype)


def _align_kernel(queries: Tensor, tokens: Tensor, real: Tensor | None, detached: bool) -> tuple[Tensor, Tensor]:
    from gresbox.kernels.phrase_alignment import align

    return align(queries, tokens, real)


def _unalign_plain(
    grad_loss: Tensor,
    grad_relevance: Tensor,
    queries: Tensor,
    tokens: Tensor,
    real: Tensor | None,
    detached: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    found = _wide(queries, tokens, real)
    dtype = found.query.dtype
    grad_query, grad_token = found.gradients(grad_loss.to(dtype), grad_relevance.to(dtype), real, detached)
    return grad_query.to(queries.dtype), grad_token.to(tokens.dtype)


def _unalign_kernel(
    grad_loss: Tensor,
    grad_relevance: Tensor,
    queries: Tensor,
    tokens: Tensor,
    real: Tensor | None,
    detached: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    from gresbox.kernels.phrase_alignment import unalign

    return unalign(grad_loss.contiguous(), grad_relevance.contiguous(), queries, tokens, real, detached)


def _fake(queries: Tensor, tokens: Tensor, real: Tensor | None, detached: bool) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape[:2]), queries.new_empty((*queries.shape[:2], tokens.shape[1]))


align_op = define_op(
    "align_phrases(Tensor queries, Tensor tokens, Tensor? real, bool detached) -> (Tensor, Tensor)",
    fake=_fake,
    forward=Forms(_align_plain, _align_kernel, kernel_refusal),
    backward=Forms(_unalign_plain, _unalign_kernel, lambda grad_loss, grad_relevance, *inputs: kernel_refusal(*inputs)),
    differentiable=("queries", "tokens"),
)
