"""Kernels of ``cross_attend_both``: both directions of attention between objects and words in one launch.

A program owns one head of one image, forward and backward, and takes its objects block by block. It reads queries, keys and
values of the objects ``(B, heads, N, D)`` and of the words ``(B, heads, L, D)`` and which words are real ``(B, L)``, and writes
what objects read of words ``(B, heads, N, D)`` and words of objects ``(B, heads, L, D)``; backward the six gradients. Affinities
stay in registers: a block's softmax over words is whole, that over objects goes on from block to block. Where one affinity serves
both directions it is made once: ``token_query`` and ``object_key`` are not read and have no gradient of their own.

Nothing is summed across programs: the same inputs give the same bits. Operands are widened to float32 when they are read; where
they came in 16 bits they are multiplied as TF32, which holds them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gresbox.kernels._dot import dot, dot_precision
from gresbox.kernels._launch import Launch, architecture, for_architecture

__all__ = ["attend", "compilations", "unattend"]

_INPUTS = ("object_query", "token_key", "token_value", "token_query", "object_key", "object_value")


@triton.jit
def _rows(source, stride, row, known, D, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """``(rows, D)`` of one head, 0 where a row is not known."""
    channel = tl.arange(0, BLOCK_D)
    at = source + row[:, None] * stride + channel[None, :]
    return tl.load(at, mask=known[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _put(target, row, exists, values, D, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write ``(rows, D)`` of one head of a contiguous tensor."""
    channel = tl.arange(0, BLOCK_D)
    at = target + row[:, None] * D + channel[None, :]
    tl.store(at, values.to(target.dtype.element_ty), mask=exists[:, None] & (channel < D)[None, :])


@triton.jit
def _allowed_words(valid, word, L, HAS_VALID: tl.constexpr):  # type: ignore[no-untyped-def]
    """Real words; the first one where there is none."""
    allowed = word < L
    if HAS_VALID:
        real = tl.load(valid + word, mask=allowed, other=0).to(tl.int32)
        some = tl.max(real, axis=0)
        allowed = tl.where(some > 0, real, (word == 0).to(tl.int32)) != 0
    return allowed


@triton.jit
def _over_words(affinity, allowed):  # type: ignore[no-untyped-def]
    """Softmax of ``(objects, words)`` over allowed words; 0 where there is none."""
    hidden = tl.where(allowed[None, :], affinity, float("-inf"))
    top = tl.max(hidden, axis=1)
    weight = tl.exp(hidden - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(weight, axis=1)
    return weight / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _over_objects(affinity, exists, top):  # type: ignore[no-untyped-def]
    """Weights of a block of objects under each word's largest logit so far, that logit, and the factor of earlier sums."""
    hidden = tl.where(exists[:, None], affinity, float("-inf"))
    raised = tl.maximum(top, tl.max(hidden, axis=0))
    finite = tl.where(raised == float("-inf"), 0.0, raised)
    return tl.exp(hidden - finite[None, :]), raised, tl.exp(top - finite)


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    object_query,
    token_key,
    token_value,
    token_query,
    object_key,
    object_value,
    valid,
    objects,
    words,
    heads,
    N,
    L,
    D,
    object_query_image,
    object_query_head,
    object_query_row,
    token_key_image,
    token_key_head,
    token_key_row,
    token_value_image,
    token_value_head,
    token_value_row,
    token_query_image,
    token_query_head,
    token_query_row,
    object_key_image,
    object_key_head,
    object_key_row,
    object_value_image,
    object_value_head,
    object_value_row,
    scale,
    SHARED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    image, head = place // heads, place % heads
    object_query += image * object_query_image + head * object_query_head
    token_key += image * token_key_image + head * token_key_head
    token_value += image * token_value_image + head * token_value_head
    token_query += image * token_query_image + head * token_query_head
    object_key += image * object_key_image + head * object_key_head
    object_value += image * object_value_image + head * object_value_head
    objects += place * N * D
    words += place * L * D
    word = tl.arange(0, BLOCK_L)
    spoken = word < L
    allowed = _allowed_words(valid + image * L, word, L, HAS_VALID)
    k_t = _rows(token_key, token_key_row, word, spoken, D, BLOCK_D)
    v_t = _rows(token_value, token_value_row, word, allowed, D, BLOCK_D)
    q_t = k_t
    if not SHARED:
        q_t = _rows(token_query, token_query_row, word, spoken, D, BLOCK_D)
    top = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    to_words = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        exists = row < N
        pairs = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        q_o = _rows(object_query, object_query_row, row, exists, D, BLOCK_D)
        v_o = _rows(object_value, object_value_row, row, exists, D, BLOCK_D)
        # O = softmax(q_o k_t^t / sqrt D) v_t over real words
        affinity = scale * dot(q_o, tl.trans(k_t), pairs, PRECISION)
        read = dot(_over_words(affinity, allowed), v_t, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION)
        _put(objects, row, exists, read, D, BLOCK_D)
        # T = softmax(q_t k_o^t / sqrt D) v_o over objects, its affinity held as (objects, words)
        if not SHARED:
            k_o = _rows(object_key, object_key_row, row, exists, D, BLOCK_D)
            affinity = scale * dot(k_o, tl.trans(q_t), pairs, PRECISION)
        weight, top, shrunk = _over_objects(affinity, exists, top)
        total = total * shrunk + tl.sum(weight, axis=0)
        to_words = dot(tl.trans(weight), v_o, to_words * shrunk[:, None], PRECISION)
    _put(words, word, spoken, to_words / tl.where(total == 0.0, 1.0, total)[:, None], D, BLOCK_D)


@triton.jit
def _from_objects(  # type: ignore[no-untyped-def]
    grad_objects,
    object_query,
    token_key,
    token_value,
    to_object_query,
    to_token_key,
    to_token_value,
    allowed,
    word,
    N,
    L,
    D,
    object_query_row,
    token_key_row,
    token_value_row,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of what objects read of words."""
    spoken = word < L
    k_t = _rows(token_key, token_key_row, word, spoken, D, BLOCK_D)
    v_t = _rows(token_value, token_value_row, word, allowed, D, BLOCK_D)
    to_key = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    to_value = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        exists = row < N
        pairs = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        q_o = _rows(object_query, object_query_row, row, exists, D, BLOCK_D)
        d_o = _rows(grad_objects, D, row, exists, D, BLOCK_D)
        # dv_t = R^t dO;  da = R (dR - sum_l R dR) with dR = dO v_t^t
        weight = _over_words(scale * dot(q_o, tl.trans(k_t), pairs, PRECISION), allowed)
        to_value = dot(tl.trans(weight), d_o, to_value, PRECISION)
        change = dot(d_o, tl.trans(v_t), pairs, PRECISION)
        to_affinity = scale * weight * (change - tl.sum(weight * change, axis=1)[:, None])
        to_query = dot(to_affinity, k_t, tl.zeros([BLOCK_N, BLOCK_D], tl.float32), PRECISION)
        _put(to_object_query, row, exists, to_query, D, BLOCK_D)
        to_key = dot(tl.trans(to_affinity), q_o, to_key, PRECISION)
    _put(to_token_key, word, spoken, to_key, D, BLOCK_D)
    _put(to_token_value, word, spoken, to_value, D, BLOCK_D)


@triton.jit
def _from_words(  # type: ignore[no-untyped-def]
    grad_words,
    token_query,
    object_key,
    object_value,
    to_token_query,
    to_object_key,
    to_object_value,
    word,
    N,
    L,
    D,
    token_query_row,
    object_key_row,
    object_value_row,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of what words read of objects."""
    spoken = word < L
    q_t = _rows(token_query, token_query_row, word, spoken, D, BLOCK_D)
    d_t = _rows(grad_words, D, word, spoken, D, BLOCK_D)
    # the softmax over objects S, and sum_n S dS with dS = v_o dT^t
    top = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    inner = tl.zeros([BLOCK_L], tl.float32)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        exists = row < N
        pairs = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        k_o = _rows(object_key, object_key_row, row, exists, D, BLOCK_D)
        v_o = _rows(object_value, object_value_row, row, exists, D, BLOCK_D)
        weight, top, shrunk = _over_objects(scale * dot(k_o, tl.trans(q_t), pairs, PRECISION), exists, top)
        total = total * shrunk + tl.sum(weight, axis=0)
        inner = inner * shrunk + tl.sum(weight * dot(v_o, tl.trans(d_t), pairs, PRECISION), axis=0)
    over = 1.0 / tl.where(total == 0.0, 1.0, total)
    inner = inner * over
    top = tl.where(top == float("-inf"), 0.0, top)
    to_query = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        exists = row < N
        pairs = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
        rows = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        k_o = _rows(object_key, object_key_row, row, exists, D, BLOCK_D)
        v_o = _rows(object_value, object_value_row, row, exists, D, BLOCK_D)
        # dv_o = S dT;  da = S (dS - sum_n S dS)
        raised = tl.exp(scale * dot(k_o, tl.trans(q_t), pairs, PRECISION) - top[None, :])
        weight = tl.where(exists[:, None], raised, 0.0) * over[None, :]
        _put(to_object_value, row, exists, dot(weight, d_t, rows, PRECISION), D, BLOCK_D)
        to_affinity = scale * weight * (dot(v_o, tl.trans(d_t), pairs, PRECISION) - inner[None, :])
        _put(to_object_key, row, exists, dot(to_affinity, q_t, rows, PRECISION), D, BLOCK_D)
        to_query = dot(tl.trans(to_affinity), k_o, to_query, PRECISION)
    _put(to_token_query, word, spoken, to_query, D, BLOCK_D)


@triton.jit
def _unattend_kernel(  # type: ignore[no-untyped-def]
    grad_objects,
    grad_words,
    object_query,
    token_key,
    token_value,
    token_query,
    object_key,
    object_value,
    valid,
    to_object_query,
    to_token_key,
    to_token_value,
    to_token_query,
    to_object_key,
    to_object_value,
    heads,
    N,
    L,
    D,
    object_query_image,
    object_query_head,
    object_query_row,
    token_key_image,
    token_key_head,
    token_key_row,
    token_value_image,
    token_value_head,
    token_value_row,
    token_query_image,
    token_query_head,
    token_query_row,
    object_key_image,
    object_key_head,
    object_key_row,
    object_value_image,
    object_value_head,
    object_value_row,
    scale,
    HAS_VALID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    image, head = place // heads, place % heads
    word = tl.arange(0, BLOCK_L)
    if tl.program_id(1) == 0:
        _from_objects(
            grad_objects + place * N * D,
            object_query + image * object_query_image + head * object_query_head,
            token_key + image * token_key_image + head * token_key_head,
            token_value + image * token_value_image + head * token_value_head,
            to_object_query + place * N * D,
            to_token_key + place * L * D,
            to_token_value + place * L * D,
            _allowed_words(valid + image * L, word, L, HAS_VALID),
            word,
            N,
            L,
            D,
            object_query_row,
            token_key_row,
            token_value_row,
            scale,
            BLOCK_N,
            BLOCK_L,
            BLOCK_D,
            PRECISION,
        )
    else:
        _from_words(
            grad_words + place * L * D,
            token_query + image * token_query_image + head * token_query_head,
            object_key + image * object_key_image + head * object_key_head,
            object_value + image * object_value_image + head * object_value_head,
            to_token_query + place * L * D,
            to_object_key + place * N * D,
            to_object_value + place * N * D,
            word,
            N,
            L,
            D,
            token_query_row,
            object_key_row,
            object_value_row,
            scale,
            BLOCK_N,
            BLOCK_L,
            BLOCK_D,
            PRECISION,
        )


def _arguments(inputs: Sequence[Tensor], valid: Tensor | None, rows: int) -> dict[str, Any]:
    query, key = inputs[0], inputs[1]
    found: dict[str, Any] = {"valid": query if valid is None else valid, "HAS_VALID": valid is not None}
    for name, given in zip(_INPUTS, inputs, strict=True):
        tensor = given if given.stride(-1) == 1 else given.contiguous()
        found[name] = tensor
        found |= {f"{name}_{axis}": stride for axis, stride in zip(("image", "head", "row"), tensor.stride()[:3], strict=True)}
    _, heads, count, dim = query.shape
    blocks = {"BLOCK_N": rows, "BLOCK_L": _block_of(key.shape[2]), "BLOCK_D": _block_of(dim)}
    precision = "tf32" if query.element_size() == 2 else dot_precision(query.dtype)
    return (
        found
        | {"heads": heads, "N": count, "L": key.shape[2], "D": dim, "scale": max(dim, 1) ** -0.5, "PRECISION": precision}
        | blocks
    )


def _block_of(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


_BLOCKS = {2: {1024: (32, 4), 2048: (16, 8)}, 4: {512: (16, 4), 1024: (16, 8)}}
"""Objects of a block and warps, by bytes per number and by the values of a head's words, at most."""
_TILES = {"sm_80": _BLOCKS, "sm_90": _BLOCKS, "gfx942": {2: {2048: (16, 4)}, 4: _BLOCKS[4]}}


def _tile(arch: str, inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Objects of a block, and warps."""
    values = _block_of(inputs[1].shape[2]) * _block_of(inputs[1].shape[3])
    table = for_architecture(_TILES, arch)[inputs[0].element_size()]
    return table[min(most for most in table if values <= most)]


def _attending(arch: str, inputs: Sequence[Tensor], valid: Tensor | None, shared: bool, objects: Tensor, words: Tensor) -> Launch:
    rows, warps = _tile(arch, inputs)
    arguments = _arguments(inputs, valid, rows) | {"objects": objects, "words": words, "SHARED": shared}
    return Launch(_attend_kernel, (objects.shape[0] * objects.shape[1],), arguments, warps)


def _unattending(
    arch: str, grads: Sequence[Tensor], inputs: Sequence[Tensor], valid: Tensor | None, outs: Sequence[Tensor]
) -> Launch:
    rows, warps = _tile(arch, inputs)
    arguments = _arguments(inputs, valid, rows) | {"grad_objects": grads[0], "grad_words": grads[1]}
    arguments |= {f"to_{name}": out for name, out in zip(_INPUTS, outs, strict=True)}
    return Launch(_unattend_kernel, (grads[0].shape[0] * grads[0].shape[1], 2), arguments, warps)


def attend(inputs: Sequence[Tensor], valid: Tensor | None, shared: bool) -> tuple[Tensor, Tensor]:
    """Objects and words after attention; inputs in the op's order, of one dtype; ``valid`` ``(B, L)`` bool, contiguous."""
    objects, words = inputs[0].new_empty(inputs[0].shape), inputs[0].new_empty(inputs[1].shape)
    _attending(architecture(objects), inputs, valid, shared, objects, words).run()
    return objects, words


def unattend(grads: Sequence[Tensor], inputs: Sequence[Tensor], valid: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of the six inputs, from contiguous ones of objects and words."""
    outs = tuple(tensor.new_empty(tensor.shape) for tensor in inputs)
    _unattending(architecture(outs[0]), grads, inputs, valid, outs).run()
    return outs


def compilations(arch: str) -> dict[str, Launch]:
    """Launches at the paper's size, 8 heads of 32 channels, 100 objects and 20 words, and at the limits."""
    found = {}
    for dtype, count, length, dim, shared in (
        (torch.bfloat16, 100, 20, 32, False),
        (torch.float16, 100, 20, 32, False),
        (torch.float32, 100, 20, 32, False),
        (torch.bfloat16, 100, 20, 32, True),
        (torch.float32, 10, 20, 16, False),
        (torch.bfloat16, 100, 64, 32, False),
        (torch.bfloat16, 100, 20, 64, False),
        (torch.float32, 100, 64, 16, False),
    ):
        objects = torch.empty(32, count, 8, dim, dtype=dtype, device="meta").transpose(1, 2)
        words = torch.empty(32, length, 8, dim, dtype=dtype, device="meta").transpose(1, 2)
        inputs, outs = (objects, words, words, words, objects, objects), (objects.contiguous(), words.contiguous())
        valid = torch.empty(32, length, dtype=torch.bool, device="meta")
        name = f"{str(dtype).removeprefix('torch.')}, {count} objects, {length} words, {dim} channels{', shared' if shared else ''}"
        found[f"attend, {name}"] = _attending(arch, inputs, valid, shared, *outs)
        if not shared:
            found[f"unattend, {name}"] = _unattending(arch, outs, inputs, valid, [tensor.contiguous() for tensor in inputs])
    return found
