"""Kernels of ``align_phrases`` in Gram form: phrases are never stored; what is needed of them are inner products.

Forward: a program owns a block of queries of one image. It reads queries ``(B, N, C)``, tokens ``(B, L, C)`` and which are real
``(B, L)``, and writes the distances ``(B, N)`` and the relevance ``(B, N, L)``.

Backward, to the logits: a program owns a block of queries of one image. It makes logits and relevance again and writes the
relevance and the gradients of logits ``(B, N, L)`` and of the squared lengths of phrases and queries ``(B, N)``, all float32.

Backward, to the inputs: a program owns a block of channels of one image and all its queries. It reads these and writes the
gradients of the queries' and the tokens' channels; each sum over queries is made by one program, in order.

All sums run in a fixed order: the same inputs give the same bits. Operands are widened to float32 when they are read; where they
came in 16 bits they are multiplied as TF32, which holds them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gresbox.kernels._dot import dot, dot_precision
from gresbox.kernels._launch import Launch

__all__ = ["align", "compilations", "unalign"]

_ZERO_LENGTH = tl.constexpr(1e-16)  # squared length under which a vector has no direction


@triton.jit
def _compare(  # type: ignore[no-untyped-def]
    queries,
    tokens,
    row,
    exists,
    word,
    real,
    C,
    query_row,
    query_column,
    token_row,
    token_column,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits, relevance, relevance times the Gram matrix, and the cosine's three parts."""
    logits = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
    gram = tl.zeros([BLOCK_L, BLOCK_L], tl.float32)
    squared = tl.zeros([BLOCK_N], tl.float32)
    for channels in range(0, C, BLOCK_C):
        channel = channels + tl.arange(0, BLOCK_C)
        known = (channel < C)[None, :]
        at = queries + row[:, None] * query_row + channel[None, :] * query_column
        query = tl.load(at, mask=exists[:, None] & known, other=0.0).to(tl.float32)
        at = tokens + word[:, None] * token_row + channel[None, :] * token_column
        token = tl.load(at, mask=real[:, None] & known, other=0.0).to(tl.float32)
        logits = dot(query, tl.trans(token), logits, PRECISION)
        gram = dot(token, tl.trans(token), gram, PRECISION)
        squared += tl.sum(query * query, axis=1)
    # R = softmax(Q T^t / sqrt C) over real tokens; all 0 if there is none
    hidden = tl.where(real[None, :], logits * scale, float("-inf"))
    top = tl.max(hidden, axis=1)
    weight = tl.exp(hidden - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(weight, axis=1)
    relevance = weight / tl.where(total == 0.0, 1.0, total)[:, None]
    # Q . P = sum_l R a;  |P|^2 = R G R^t
    along = dot(relevance, gram, tl.zeros([BLOCK_N, BLOCK_L], tl.float32), PRECISION)
    product = tl.sum(relevance * logits, axis=1)
    length = tl.sum(relevance * along, axis=1)
    return logits, relevance, along, product, squared, length


@triton.jit
def _real_words(valid, word, L, HAS_VALID: tl.constexpr):  # type: ignore[no-untyped-def]
    real = word < L
    if HAS_VALID:
        real = real & (tl.load(valid + word, mask=real, other=0).to(tl.int32) != 0)
    return real


@triton.jit
def _align_kernel(  # type: ignore[no-untyped-def]
    queries,
    tokens,
    valid,
    loss,
    relevance_out,
    N,
    L,
    C,
    query_image,
    query_row,
    query_column,
    token_image,
    token_row,
    token_column,
    scale,
    HAS_VALID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < N
    word = tl.arange(0, BLOCK_L)
    real = _real_words(valid + image * L, word, L, HAS_VALID)
    _logits, relevance, _along, product, squared, length = _compare(
        queries + image * query_image,
        tokens + image * token_image,
        row,
        exists,
        word,
        real,
        C,
        query_row,
        query_column,
        token_row,
        token_column,
        scale,
        BLOCK_N,
        BLOCK_L,
        BLOCK_C,
        PRECISION,
    )
    # 1 - cos(Q, P); a zero vector has cosine 0, a text without a real token no loss
    directed = ((squared <= _ZERO_LENGTH) | (length <= _ZERO_LENGTH)) == 0
    cosine = product * tl.rsqrt(tl.where(directed, squared, 1.0)) * tl.rsqrt(tl.where(directed, length, 1.0))
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    distance = 1.0 - tl.where(directed, cosine, 0.0)
    distance = tl.where(tl.max(real.to(tl.int32), axis=0) > 0, distance, 0.0)
    tl.store(loss + image * N + row, distance.to(loss.dtype.element_ty), mask=exists)
    at = relevance_out + (image * N + row[:, None]) * L + word[None, :]
    tl.store(at, relevance.to(relevance_out.dtype.element_ty), mask=exists[:, None] & (word < L)[None, :])


@triton.jit
def _to_logits_kernel(  # type: ignore[no-untyped-def]
    grad_loss,
    grad_relevance,
    queries,
    tokens,
    valid,
    relevance_out,
    to_logits_out,
    to_length_out,
    to_squared_out,
    N,
    L,
    C,
    query_image,
    query_row,
    query_column,
    token_image,
    token_row,
    token_column,
    scale,
    HAS_VALID: tl.constexpr,
    DETACHED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < N
    word = tl.arange(0, BLOCK_L)
    real = _real_words(valid + image * L, word, L, HAS_VALID)
    logits, relevance, along, product, squared, length = _compare(
        queries + image * query_image,
        tokens + image * token_image,
        row,
        exists,
        word,
        real,
        C,
        query_row,
        query_column,
        token_row,
        token_column,
        scale,
        BLOCK_N,
        BLOCK_L,
        BLOCK_C,
        PRECISION,
    )
    gradient = tl.load(grad_loss + image * N + row, mask=exists, other=0.0).to(tl.float32)
    directed = ((squared <= _ZERO_LENGTH) | (length <= _ZERO_LENGTH)) == 0
    by_query = tl.rsqrt(tl.where(directed, squared, 1.0))
    by_phrase = tl.rsqrt(tl.where(directed, length, 1.0))
    # cos = (Q . P) / (|Q| |P|)
    cosine = product * by_query * by_phrase
    gradient = tl.where((tl.abs(cosine) > 1.0) | (tl.max(real.to(tl.int32), axis=0) == 0), 0.0, gradient)
    to_cosine = tl.where(directed, -gradient, 0.0)
    to_product = to_cosine * by_query * by_phrase
    to_length = -0.5 * to_cosine * cosine * by_phrase * by_phrase
    tl.store(to_length_out + image * N + row, to_length, mask=exists)
    tl.store(to_squared_out + image * N + row, -0.5 * to_cosine * cosine * by_query * by_query, mask=exists)
    pair = (image * N + row[:, None]) * L + word[None, :]
    inside = exists[:, None] & (word < L)[None, :]
    tl.store(relevance_out + pair, relevance, mask=inside)
    to_logits = to_product[:, None] * relevance
    if not DETACHED:
        given = tl.load(grad_relevance + pair, mask=inside & real[None, :], other=0.0).to(tl.float32)
        change = given + to_product[:, None] * logits + 2.0 * to_length[:, None] * along
        # the softmax: R (dR - sum R dR)
        to_logits += scale * relevance * (change - tl.sum(relevance * change, axis=1)[:, None])
    tl.store(to_logits_out + pair, to_logits, mask=inside)


@triton.jit
def _to_inputs_kernel(  # type: ignore[no-untyped-def]
    queries,
    tokens,
    valid,
    relevance_in,
    to_logits_in,
    to_length_in,
    to_squared_in,
    grad_queries,
    grad_tokens,
    N,
    L,
    C,
    query_image,
    query_row,
    query_column,
    token_image,
    token_row,
    token_column,
    HAS_VALID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = (channel < C)[None, :]
    word = tl.arange(0, BLOCK_L)
    spoken = word < L
    real = _real_words(valid + image * L, word, L, HAS_VALID)
    at_token = tokens + image * token_image + word[:, None] * token_row + channel[None, :] * token_column
    token = tl.load(at_token, mask=real[:, None] & known, other=0.0).to(tl.float32)
    to_tokens = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        exists = row < N
        pair = (image * N + row[:, None]) * L + word[None, :]
        inside = exists[:, None] & spoken[None, :]
        relevance = tl.load(relevance_in + pair, mask=inside, other=0.0)
        to_logits = tl.load(to_logits_in + pair, mask=inside, other=0.0)
        to_length = tl.load(to_length_in + image * N + row, mask=exists, other=0.0)
        to_squared = tl.load(to_squared_in + image * N + row, mask=exists, other=0.0)
        at_query = queries + image * query_image + row[:, None] * query_row + channel[None, :] * query_column
        query = tl.load(at_query, mask=exists[:, None] & known, other=0.0).to(tl.float32)
        # dQ = da T + 2 d|Q|^2 Q
        to_query = dot(to_logits, token, 2.0 * to_squared[:, None] * query, PRECISION)
        at_query = grad_queries + (image * N + row[:, None]) * C + channel[None, :]
        tl.store(at_query, to_query.to(grad_queries.dtype.element_ty), mask=exists[:, None] & known)
        # dT = da^t Q + R^t 2 d|P|^2 P; of the phrases, only these channels of these queries
        to_tokens = dot(tl.trans(to_logits), query, to_tokens, PRECISION)
        phrase = dot(relevance, token, tl.zeros([BLOCK_N, BLOCK_C], tl.float32), PRECISION)
        to_tokens = dot(tl.trans(relevance), 2.0 * to_length[:, None] * phrase, to_tokens, PRECISION)
    at_token = grad_tokens + (image * L + word[:, None]) * C + channel[None, :]
    tl.store(at_token, to_tokens.to(grad_tokens.dtype.element_ty), mask=spoken[:, None] & known)


@dataclass(frozen=True)
class _Tile:
    queries: int
    channels: int
    warps: int


_COMPARE = {32: _Tile(32, 64, 4), 64: _Tile(32, 32, 8), 128: _Tile(16, 32, 8)}  # by tokens, at most
_TO_INPUTS = {32: _Tile(32, 32, 8), 64: _Tile(16, 32, 8), 128: _Tile(16, 16, 8)}


def _settings(table: dict[int, _Tile], queries: Tensor, tokens: Tensor, valid: Tensor | None) -> tuple[_Tile, dict[str, Any]]:
    (_, count, dim), length = queries.shape, tokens.shape[1]
    tile = table[min(most for most in table if length <= most)]
    names = ("query_image", "query_row", "query_column", "token_image", "token_row", "token_column")
    strides = dict(zip(names, (*queries.stride(), *tokens.stride()), strict=True))
    halves = queries.element_size() == tokens.element_size() == 2
    blocks = {"BLOCK_N": tile.queries, "BLOCK_L": max(16, triton.next_power_of_2(length)), "BLOCK_C": tile.channels}
    precision = "tf32" if halves else dot_precision(queries.dtype, tokens.dtype)
    inputs = {"queries": queries, "tokens": tokens, "valid": queries if valid is None else valid, "HAS_VALID": valid is not None}
    return tile, inputs | {"N": count, "L": length, "C": dim, "PRECISION": precision} | strides | blocks


def _aligning(queries: Tensor, tokens: Tensor, valid: Tensor | None, loss: Tensor, relevance: Tensor) -> Launch:
    tile, arguments = _settings(_COMPARE, queries, tokens, valid)
    arguments |= {"loss": loss, "relevance_out": relevance, "scale": max(queries.shape[2], 1) ** -0.5}
    return Launch(_align_kernel, (queries.shape[0], triton.cdiv(queries.shape[1], tile.queries)), arguments, tile.warps)


def _to_logits(
    grads: tuple[Tensor, Tensor], queries: Tensor, tokens: Tensor, valid: Tensor | None, detached: bool
) -> tuple[Launch, dict[str, Tensor]]:
    """The launch, and what it writes by the names under which :func:`_to_inputs` reads it."""
    tile, arguments = _settings(_COMPARE, queries, tokens, valid)
    pairs, each = (*queries.shape[:2], tokens.shape[1]), queries.shape[:2]
    shapes = {"relevance": pairs, "to_logits": pairs, "to_length": each, "to_squared": each}
    made = {name: queries.new_empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    arguments |= {f"{name}_out": tensor for name, tensor in made.items()}
    arguments |= {
        "grad_loss": grads[0],
        "grad_relevance": grads[1],
        "DETACHED": detached,
        "scale": max(queries.shape[2], 1) ** -0.5,
    }
    grid = (queries.shape[0], triton.cdiv(queries.shape[1], tile.queries))
    return Launch(_to_logits_kernel, grid, arguments, tile.warps), {f"{name}_in": tensor for name, tensor in made.items()}


def _to_inputs(
    made: dict[str, Tensor], queries: Tensor, tokens: Tensor, valid: Tensor | None, outs: tuple[Tensor, Tensor]
) -> Launch:
    tile, arguments = _settings(_TO_INPUTS, queries, tokens, valid)
    arguments |= made | {"grad_queries": outs[0], "grad_tokens": outs[1]}
    return Launch(_to_inputs_kernel, (queries.shape[0], triton.cdiv(queries.shape[2], tile.channels)), arguments, tile.warps)


def align(queries: Tensor, tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distances ``(B, N)`` and relevance ``(B, N, L)`` in the queries' dtype; ``valid`` ``(B, L)`` bool, contiguous."""
    loss = queries.new_empty(queries.shape[:2])
    relevance = queries.new_empty((*queries.shape[:2], tokens.shape[1]))
    _aligning(queries, tokens, valid, loss, relevance).run()
    return loss, relevance


def unalign(
    grad_loss: Tensor, grad_relevance: Tensor, queries: Tensor, tokens: Tensor, valid: Tensor | None, detached: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and tokens from contiguous ones of the outputs; ``detached``: none flows through the relevance."""
    launch, made = _to_logits((grad_loss, grad_relevance), queries, tokens, valid, detached)
    launch.run()
    outs = queries.new_empty(queries.shape), tokens.new_empty(tokens.shape)
    _to_inputs(made, queries, tokens, valid, outs).run()
    return outs


def compilations(arch: str) -> dict[str, Launch]:
    """Launches at the paper's size, nine layers of 32 images with 100 queries and 20 tokens of 256 channels; more tokens."""
    found = {}
    for dtype, length, valid in (
        (torch.bfloat16, 20, True),
        (torch.float16, 20, True),
        (torch.float32, 20, True),
        (torch.bfloat16, 20, False),
        (torch.bfloat16, 64, True),
        (torch.float32, 64, True),
        (torch.float32, 128, True),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, {length} tokens{'' if valid else ', all real'}"
        queries = torch.empty(288, 100, 256, dtype=dtype, device="meta")
        tokens = torch.empty(288, length, 256, dtype=dtype, device="meta")
        real = torch.empty(288, length, dtype=torch.bool, device="meta") if valid else None
        loss, relevance = queries.new_empty(288, 100), queries.new_empty(288, 100, length)
        found[f"align, {name}"] = _aligning(queries, tokens, real, loss, relevance)
        found[f"to logits, {name}"], made = _to_logits((loss, relevance), queries, tokens, real, False)
        found[f"to inputs, {name}"] = _to_inputs(made, queries, tokens, real, (queries, tokens))
        if length == 20 and valid:
            found[f"to logits, {name}, detached"], _ = _to_logits((loss, relevance), queries, tokens, real, True)
    return found
