"""Small perceptrons that several blocks are made of, and prediction heads on queries and pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_range, check_shape
from gresbox.structures import InstancePrediction

__all__ = ["MLP", "BoxHead", "ExistenceHead", "FeedForward", "GlobalMaskHead", "InstanceHead", "inverse_sigmoid", "mean_token"]


class MLP(nn.Module):
    r"""Linear layers with a ReLU between each two.

    .. math:: \mathrm{MLP}(x) = W_n\,\mathrm{ReLU}(\dots \mathrm{ReLU}(W_1 x + b_1) \dots) + b_n

    Paper: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", arXiv:2112.01527 (the mask
    embedding head).
    Differs from the paper: nothing.

    Args:
        in_dim: Input channels.
        hidden_dim: Channels between the layers.
        out_dim: Output channels.
        num_layers: Number of linear layers.

    Shape:
        - ``(..., in_dim) -> (..., out_dim)``.

    Raises:
        ValueError: If ``num_layers`` is below 1.

    Example:
        >>> import torch
        >>> MLP(8, 16, 2)(torch.randn(3, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, num_layers: int = 3) -> None:
        super().__init__()
        check_range("MLP", "num_layers", num_layers, 1)
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    r"""The feed-forward sub-layer of a post-norm transformer.

    .. math:: \mathrm{FFN}(x) = \mathrm{LN}(x + W_2\,\mathrm{ReLU}(W_1 x + b_1) + b_2)

    Paper: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, Sec. 3.3, as Mask2Former uses it.
    Differs from the paper: no dropout by default, which Mask2Former switches off.

    Args:
        dim: Channels ``C``.
        hidden_dim: Channels between the two layers.
        dropout: Share of values that training drops after the ReLU and after the second layer.

    Shape:
        - ``(..., C) -> (..., C)``.

    Example:
        >>> import torch
        >>> FeedForward(8, 32)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, hidden_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.linear1(x).relu(), self.dropout, self.training)
        return self.norm(x + F.dropout(self.linear2(hidden), self.dropout, self.training))


def mean_token(tokens: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over real tokens; 0 where there is none, whatever stands in the padding.

    Args:
        tokens: Word features.
        valid: True on real tokens; None: all are real.

    Shape:
        - ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)``; returns ``(B, C)``, float32 (float64 for float64).

    Example:
        >>> import torch
        >>> mean_token(torch.tensor([[[2.0], [4.0]]]), torch.tensor([[1, 0]]))
        tensor([[2.]])
    """
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if valid is None:
        return tokens.mean(1)
    real = valid.bool()[..., None]  # (B, L, 1)
    return tokens.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    r"""Logits of coordinates, finite for those outside the picture.

    .. math:: \log\frac{\max(x, \epsilon)}{\max(1 - x, \epsilon)},\quad x \text{ clamped to } [0, 1]

    Paper: Zhu et al., "Deformable DETR", arXiv:2010.04159, App. A.3.
    Differs from the paper: the bound ``eps``, as in the code of IGVG; there is no gradient where ``x`` is outside [0, 1].

    Args:
        x: Coordinates relative to the picture.
        eps: Smallest numerator and denominator.

    Shape:
        - any shape, kept; returns values in ``[log(eps), -log(eps)]``.

    Example:
        >>> import torch
        >>> inverse_sigmoid(torch.tensor([0.5, 0.75, 2.0]))
        tensor([0.0000, 1.0986, 6.9078])
    """
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


class BoxHead(nn.Module):
    r"""Predict a box per query, its centre relative to the query's reference point.

    .. math:: b = \sigma\big(\mathrm{MLP}(q) + [\sigma^{-1}(r_x),\; \sigma^{-1}(r_y),\; 0,\; 0]\big)

    Paper: Zhu et al., "Deformable DETR", arXiv:2010.04159, App. A.3; IGVG, Sec. 3.1.
    Differs from the paper: nothing; boxes start with a side of ``sigmoid(-2)``, an eighth of the picture.

    Args:
        dim: Channels ``C``.

    Shape:
        - ``queries``: ``(..., C)``; ``reference``: ``(..., 2)`` xy, the picture is [0, 1] but a point may lie outside, broadcast
          over the queries' first axes; None: boxes do not depend on a point, as in DETR.
        - returns ``(..., 4)`` cxcywh in [0, 1], float32 (float64 for float64).

    Example:
        >>> import torch
        >>> BoxHead(8)(torch.randn(2, 5, 8), torch.rand(2, 5, 2)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = MLP(dim, dim, 4)
        nn.init.constant_(self.mlp.layers[-1].bias[2:], -2.0)  # type: ignore[index]

    def forward(self, queries: Tensor, reference: Tensor | None = None) -> Tensor:
        box = self.mlp(queries)
        box = box.to(torch.promote_types(box.dtype, torch.float32))  # bfloat16 places a box to a pixel or two
        if reference is not None:
            box = box + F.pad(inverse_sigmoid(reference.to(box.dtype)), (0, 2))
        return box.sigmoid()


class InstanceHead(nn.Module):
    r"""Predict a class, a box and a mask per query of each decoder layer, with the same weights for all layers.

    .. math:: (c_0, c_1) = W q + b,\quad b = \mathrm{BoxHead}(q, r),\quad Q_s = q \cdot S_{global}

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Sec. 3.1.
    Differs from the paper: nothing; as in the authors' code the query multiplies the pixels without a perceptron or bias between.
    The two class logits, referred to and no object, are given as their difference, of which the sigmoid is their softmax;
    ``torch.stack([score_logits, torch.zeros_like(score_logits)], -1)`` is two logits with the same softmax.

    Args:
        dim: Channels ``C``.
        mask_head: ``(..., C) -> (..., channels of pixels)`` for the mask embeddings; None: the queries themselves.

    Shape:
        - ``steps``: one ``(B, N, C)`` per decoder layer; ``pixels``: ``(B, C, h, w)``, the global features; ``tokens``:
          ``(B, L, C)``; ``valid``: ``(B, L)``; ``points``: ``(B, N, 2)`` prior points, xy in [0, 1], handed on for the matcher;
          ``reference``: ``(B, N, 2)``, what boxes are relative to, or None.
        - returns one :class:`~gresbox.structures.InstancePrediction` per layer: scores, factored masks, boxes, points.

    Raises:
        ValueError: If there is no step, or a shape does not fit.

    Example:
        >>> import torch
        >>> steps, points = [torch.randn(1, 5, 8), torch.randn(1, 5, 8)], torch.rand(1, 5, 2)
        >>> head = InstanceHead(8)
        >>> *aux, last = head(steps, torch.randn(1, 8, 4, 4), torch.randn(1, 3, 8), points=points, reference=points)
        >>> len(aux), last.score_logits.shape, last.boxes.shape, last.masks.shape
        (1, torch.Size([1, 5]), torch.Size([1, 5, 4]), torch.Size([1, 5, 4, 4]))
    """

    def __init__(self, dim: int, *, mask_head: nn.Module | None = None) -> None:
        super().__init__()
        self.class_head = nn.Linear(dim, 2)
        self.box_head = BoxHead(dim)
        self.mask_head = nn.Identity() if mask_head is None else mask_head

    def forward(
        self,
        steps: Sequence[Tensor],
        pixels: Tensor,
        tokens: Tensor,
        valid: Tensor | None = None,
        *,
        points: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> tuple[InstancePrediction, ...]:
        if not len(steps):
            raise ValueError("InstanceHead: `steps` must hold at least one decoder layer, got none.")
        named = {f"steps[{i}]": (step, f"B N {self.class_head.in_features}") for i, step in enumerate(steps)}
        named |= {name: (p, "B N 2") for name, p in (("points", points), ("reference", reference)) if p is not None}
        check_shape("InstanceHead", **named, pixels=(pixels, "B * h w"), tokens=(tokens, "B L *"))
        queries = torch.stack(list(steps))  # (S, B, N, C)
        classes = self.class_head(queries)
        classes = classes.to(torch.promote_types(classes.dtype, torch.float32))
        predicted = (classes[..., 0] - classes[..., 1], self.box_head(queries, reference), self.mask_head(queries))
        return tuple(
            InstancePrediction(score_logits, embeddings, pixels, step, tokens, valid, boxes=boxes, points=points)
            for step, score_logits, boxes, embeddings in zip(steps, *(part.unbind(0) for part in predicted), strict=True)
        )


class GlobalMaskHead(nn.Module):
    r"""One mask of everything that the expression refers to, from pixel features.

    .. math:: M = W_{1 \times 1} * S_{global} + b

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Sec. 3.1, the global branch.
    Differs from the paper: nothing that it states; one layer, as in the authors' code.

    Args:
        dim: Channels ``C``.

    Shape:
        - ``pixels``: ``(B, C, h, w)``; returns ``(B, h, w)`` logits, float32 (float64 for float64).

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> GlobalMaskHead(8)(torch.randn(2, 8, 4, 5)).shape
        torch.Size([2, 4, 5])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.predict = nn.Conv2d(dim, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        check_shape("GlobalMaskHead", pixels=(pixels, f"B {self.predict.in_channels} h w"))
        wide = torch.promote_types(pixels.dtype, torch.float32)
        weight, bias = self.predict.weight.to(wide), self.predict.bias.to(wide)  # type: ignore[union-attr]
        with torch.autocast(pixels.device.type, enabled=False):
            return F.conv2d(pixels.to(wide), weight, bias)[:, 0]


class ExistenceHead(nn.Module):
    r"""Whether the picture holds anything that the expression refers to: a perceptron per pixel, averaged.

    .. math:: e = \frac1{hw} \sum_p \mathrm{MLP}(S_{global}(p))

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Sec. 3.2, the non-target branch.
    Differs from the paper: it prints a binary loss and no formula; the authors' code predicts two classes. The last layer is
    linear, so it is applied once, to the mean of what it would be applied to per pixel.

    Args:
        dim: Channels ``C``.
        num_logits: 2: the code's two classes; 1: one logit for the paper's binary cross-entropy.

    Shape:
        - ``pixels``: ``(B, C, h, w)``; returns ``(B, num_logits)`` float32 (float64 for float64): index 0 = a target exists,
          index 1 = none does. It is what ``GresOutput.extras["existence"]`` holds.

    Raises:
        ValueError: If ``num_logits`` is neither 1 nor 2, or a shape does not fit.

    Example:
        >>> import torch
        >>> existence = ExistenceHead(8)(torch.randn(3, 8, 4, 5))
        >>> existence.shape, ExistenceHead.no_target(existence).shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(self, dim: int, *, num_logits: int = 2) -> None:
        super().__init__()
        check_choice("ExistenceHead", "num_logits", num_logits, (1, 2))
        self.mlp = MLP(dim, dim, num_logits)

    def forward(self, pixels: Tensor) -> Tensor:
        *hidden, last = self.mlp.layers
        check_shape("ExistenceHead", pixels=(pixels, f"B {last.in_features} h w"))
        x = pixels.flatten(2).transpose(1, 2)  # (B, P, C)
        for layer in hidden:
            x = layer(x).relu()
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(pixels.device.type, enabled=False):
            return F.linear(x.to(wide).mean(1), last.weight.to(wide), last.bias.to(wide))  # type: ignore[arg-type]

    @staticmethod
    def no_target(existence: Tensor) -> Tensor:
        """No-target logits ``(B,)``, positive = nothing is referred to, of existence logits ``(B, 2)`` or ``(B, 1)``."""
        none = existence[:, 1] if existence.shape[1] == 2 else 0.0
        return none - existence[:, 0]
