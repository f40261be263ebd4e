"""How well each patch of a picture answers to the words of an expression."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gresbox._checks import check_choice, check_count, check_range, check_shape
from gresbox.ops._backend import use_triton
from gresbox.ops._precision import accumulation_dtype, no_autocast, real_tokens

__all__ = ["inner_tokens", "match_patches", "random_projections"]

_ZERO_LENGTH = 1e-24  # squared length under which a vector has no direction


def match_patches(
    visual: Tensor,
    tokens: Tensor,
    valid: Tensor | None = None,
    visual_projection: Tensor | None = None,
    text_projection: Tensor | None = None,
    *,
    scale: float = 1.0,
    normalize: bool = True,
    over: str = "tokens",
    backend: str = "auto",
) -> Tensor:
    r"""Similarity of each patch to the token that it matches best (PatchMax).

    .. math::
        Z = s\, \frac{V}{\|V\|} W_i \Big(\frac{T}{\|T\|} W_t\Big)^{\!\top}, \qquad S_n = \max_l \mathrm{softmax}_l(Z_{nl})

    Paper: "AMLRIS: Alignment-aware Masked Learning for Referring Image Segmentation", arXiv:2602.22740, PMME.
    Differs from the paper: padding takes no part in the softmax and cannot win the maximum; a text without a real token matches
    everything (S = 1). The paper has no scale ``s``; with 1 and projections of variance 1/D, S is 1/L nearly everywhere.
    ``"auto"`` projects the smaller side once, ``V ((T W_t) W_i^t)^t``, where that takes fewer multiplications, and divides by the
    patches' lengths last.

    Args:
        visual: One feature vector per patch.
        tokens: One feature vector per token; what padded places hold does not matter.
        valid: True on real tokens; None: all are real.
        visual_projection: ``W_i``; None: the identity.
        text_projection: ``W_t``; None: the identity.
        scale: ``s``, the inverse of the softmax's temperature.
        normalize: Divide the features by their lengths; False: take them as they are, as the authors' code does.
        over: What the softmax runs over: ``"tokens"`` of a patch, or ``"patches"`` per token (another reading of the paper's
            "column-wise"; its values are about 1/P, so that a threshold of 0.4 calls everything weak).
        backend: ``"eager"`` is the equation as printed, ``"auto"`` the cheapest order of the products.

    Shape:
        - ``visual``: ``(B, P, Cv)``; ``tokens``: ``(B, L, Ct)``; ``valid``: ``(B, L)``; ``visual_projection``: ``(Cv, D)``;
          ``text_projection``: ``(Ct, D)``.
        - returns ``(B, P)`` in [0, 1].

    Raises:
        TypeError: If an input is not floating-point.
        ValueError: If a shape does not fit, or an option is out of range.
        RuntimeError: If ``backend`` is not possible here.

    Example:
        >>> import torch
        >>> patches, tokens = torch.tensor([[[2.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
        >>> match_patches(patches, tokens, scale=10.0)
        tensor([[1.0000, 0.5000]])
    """
    who = "match_patches"
    _check_projections(who, visual, tokens, visual_projection, text_projection)
    check_range(who, "scale", scale, 0)
    check_choice(who, "over", over, ("tokens", "patches"))
    real = real_tokens(who, valid, tokens)
    use_triton(who, backend, visual, tokens)
    matrices = {"visual_projection": visual_projection, "text_projection": text_projection}
    given = {name: matrix for name, matrix in matrices.items() if matrix is not None}
    dtype = accumulation_dtype(who, visual=visual, tokens=tokens, **given)
    if not tokens.shape[1]:
        return visual.new_ones(visual.shape[:2])
    with no_autocast(visual):
        # A where, not a product: padded places may hold anything, NaN included.
        patch, token = visual.to(dtype), torch.where(real[..., None], tokens, 0).to(dtype)
        factor: float | Tensor = scale
        if normalize:
            token = F.normalize(token, dim=-1)
            if backend == "eager":
                patch = F.normalize(patch, dim=-1)
            else:  # the lengths of the patches are divided out of the few products instead of the many channels
                factor = scale * patch.square().sum(-1, keepdim=True).clamp(min=_ZERO_LENGTH).rsqrt()  # (B, P, 1)
        if visual_projection is not None:
            visual_projection = visual_projection.to(dtype)
        if text_projection is not None:
            text_projection = text_projection.to(dtype)
        logits = factor * _inner_products(patch, token, visual_projection, text_projection, backend)  # (B, P, L)
        hidden = ~real[:, None]
        if over == "tokens":
            match = logits.masked_fill(hidden, torch.finfo(dtype).min).softmax(-1)
        else:
            match = logits.softmax(-2)
        best = match.masked_fill(hidden, 0).amax(-1)
        similarity = torch.where(real.any(-1, keepdim=True), best, 1)
    return similarity.to(visual.dtype)


def _check_projections(
    who: str, visual: Tensor, tokens: Tensor, visual_projection: Tensor | None, text_projection: Tensor | None
) -> None:
    """What is left of the channels after both projections must agree."""
    left = "Cv" if visual_projection is not None else "D"
    right = "Ct" if text_projection is not None else "D"
    named = {"visual": (visual, f"B P {left}"), "tokens": (tokens, f"B L {right}")}
    if visual_projection is not None:
        named["visual_projection"] = (visual_projection, "Cv D")
    if text_projection is not None:
        named["text_projection"] = (text_projection, "Ct D")
    check_shape(who, **named)


def _inner_products(
    patch: Tensor, token: Tensor, visual_projection: Tensor | None, text_projection: Tensor | None, backend: str
) -> Tensor:
    """``(V W_i) (T W_t)^t``, ``(B, P, L)``, in the printed order or in the cheapest."""
    batch, patches, visual_dim = patch.shape
    length, text_dim = token.shape[1:]
    if backend != "eager" and visual_projection is not None and text_projection is not None:
        dim = visual_projection.shape[1]
        costs = {
            "printed": batch * (patches * visual_dim * dim + length * text_dim * dim + patches * length * dim),
            "tokens first": batch * (length * (text_dim + visual_dim) * dim + patches * length * visual_dim),
            "patches first": batch * (patches * (text_dim + visual_dim) * dim + patches * length * text_dim),
        }
        cheapest = min(costs, key=costs.__getitem__)
        if cheapest == "tokens first":
            return patch @ (token @ text_projection @ visual_projection.mT).mT
        if cheapest == "patches first":
            return patch @ visual_projection @ text_projection.mT @ token.mT
    if visual_projection is not None:
        patch = patch @ visual_projection
    if text_projection is not None:
        token = token @ text_projection
    return patch @ token.mT


def random_projections(
    visual_dim: int, text_dim: int, align_dim: int = 2048, *, shared: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    r"""The two fixed Gaussian matrices of the paper, entries :math:`\mathcal N(0, 1/D)`, from a seed.

    Paper: "AMLRIS", arXiv:2602.22740, PMME. Differs from the paper: ``shared`` is ours. By the Johnson-Lindenstrauss lemma one
    matrix for both sides preserves inner products up to about :math:`1/\sqrt D`; two independent ones do not: whatever the vectors,
    the projected product has mean 0 and deviation about :math:`1/\sqrt D`.

    The numbers depend on the arguments alone, are drawn on the CPU and leave the global generators untouched.

    Args:
        visual_dim: Channels ``Cv``.
        text_dim: Channels ``Ct``.
        align_dim: Channels ``D`` of the common space.
        shared: The same matrix for both sides; needs ``visual_dim == text_dim``.
        seed: Names the draw.

    Shape:
        - returns ``(Cv, D)`` and ``(Ct, D)`` float32.

    Raises:
        TypeError: If a size is no whole number.
        ValueError: If a size is below 1, or ``shared`` and the sizes differ.

    Example:
        >>> visual, text = random_projections(64, 64, 4096, shared=True)
        >>> torch.allclose(visual @ text.mT, torch.eye(64), atol=0.1)
        True
        >>> visual, text = random_projections(64, 64, 4096)
        >>> torch.allclose(visual @ text.mT, torch.zeros(64, 64), atol=0.1)
        True
    """
    who = "random_projections"
    for name, size in {"visual_dim": visual_dim, "text_dim": text_dim, "align_dim": align_dim}.items():
        check_count(who, name, size)
    if shared and visual_dim != text_dim:
        raise ValueError(f"{who}: `text_dim` must be visual_dim={visual_dim} for a shared matrix, got {text_dim}.")
    generator = torch.Generator().manual_seed(seed)
    # float64, rounded: processors differ in the last bits of a normal draw, the processes of one training must not.
    shapes = [(visual_dim, align_dim)] if shared else [(visual_dim, align_dim), (text_dim, align_dim)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) * align_dim**-0.5 for shape in shapes]
    return drawn[0].float(), drawn[-1].float()


def inner_tokens(valid: Tensor) -> Tensor:
    """``valid`` without the first and the last real token of each text: a tokenizer's start and end marks take no part.

    Args:
        valid: True on real tokens, bool or 0/1 integers.

    Shape:
        - ``valid``: ``(B, L)``; returns ``(B, L)`` bool.

    Raises:
        TypeError: If ``valid`` is floating-point.

    Example:
        >>> import torch
        >>> inner_tokens(torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])).int()
        tensor([[0, 1, 1, 0, 0],
                [0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    check_shape("inner_tokens", valid=(valid, "B L"))
    real = real_tokens("inner_tokens", valid, valid[..., None])
    place = real.cumsum(-1)
    return real & (place > 1) & (place < place[:, -1:])
