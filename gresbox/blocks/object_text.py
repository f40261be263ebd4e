"""Object-text attention: object queries and text tokens read each other. Four forms with one interface."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_shape
from gresbox.blocks.attention import MultiHeadAttention
from gresbox.blocks.heads import FeedForward
from gresbox.ops import cross_attend_both

__all__ = ["GatedObjectText", "ParallelObjectText", "SequentialObjectText", "SharedObjectText"]


class _ObjectText(nn.Module):
    """What all forms share: residual, norm, the optional text feed-forward, and padded tokens set to zero."""

    def __init__(self, dim: int, *, text_ffn: int = 0, update_text: bool = True) -> None:
        super().__init__()
        self.update_text = update_text
        self.query_norm = nn.LayerNorm(dim)
        self.token_norm = nn.LayerNorm(dim) if update_text else None
        self.text_ffn = FeedForward(dim, text_ffn) if text_ffn and update_text else None

    def _attend(
        self, queries: Tensor, tokens: Tensor, placed: tuple[Tensor, Tensor], valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What is added to the queries and to the tokens (None when the text is not updated); ``placed``: both with positions."""
        raise NotImplementedError

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        valid: Tensor | None = None,
        *,
        query_position: Tensor | None = None,
        token_position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check(queries, tokens, valid)
        placed = _add(queries, query_position), _add(tokens, token_position)
        from_text, from_objects = self._attend(queries, tokens, placed, valid)
        return self.query_norm(queries + from_text), self._renew(tokens, from_objects, valid)

    def _check(self, queries: Tensor, tokens: Tensor, valid: Tensor | None) -> None:
        named = {"queries": (queries, "B N C"), "tokens": (tokens, "B L C")}
        if valid is not None:
            named["valid"] = (valid, "B L")
        check_shape(type(self).__name__, **named)

    def _renew(self, tokens: Tensor, change: Tensor | None, valid: Tensor | None) -> Tensor:
        """The tokens after residual, norm and feed-forward; padded ones are zero."""
        if self.token_norm is not None and change is not None:
            tokens = self.token_norm(tokens + change)
        if self.text_ffn is not None:
            tokens = self.text_ffn(tokens)
        return tokens if valid is None else tokens.masked_fill(~valid.bool()[..., None], 0.0)


class ParallelObjectText(_ObjectText):
    r"""Two independent attentions, objects to text and text to objects, which read the same inputs.

    .. math:: Q' = \mathrm{LN}(Q + \mathrm{MHA}_1(Q + e_Q,\; T + e_T,\; T)),\qquad
              T' = \mathrm{LN}(T + \mathrm{MHA}_2(T + e_T,\; Q + e_Q,\; Q))

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Sec. 3.3.
    Differs from the paper: it names one bidirectional layer and no formula; this is the symmetric post-norm reading.

    Args:
        dim: Channels ``C``.
        num_heads: Heads.
        text_ffn: Width of a feed-forward layer after the text's norm; 0: none, as in the paper.
        update_text: False builds no text side: the tokens come back as they went in. For a last block whose text nobody reads.

    Shape:
        - ``queries``: ``(B, N, C)``; ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)`` True on real tokens; ``query_position``:
          ``(N, C)`` or ``(B, N, C)``; ``token_position``: ``(L, C)`` or ``(B, L, C)``.
        - returns the new queries and tokens, same shapes; padded tokens are zero. A text of padding only is read as its first
          token.

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> queries, tokens = ParallelObjectText(16, 4)(torch.randn(2, 5, 16), torch.randn(2, 3, 16))
        >>> queries.shape, tokens.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 3, 16]))
    """

    def __init__(self, dim: int, num_heads: int = 8, *, text_ffn: int = 0, update_text: bool = True) -> None:
        super().__init__(dim, text_ffn=text_ffn, update_text=update_text)
        self.objects_read = MultiHeadAttention(dim, num_heads)
        self.tokens_read = MultiHeadAttention(dim, num_heads) if update_text else None

    def _attend(
        self, queries: Tensor, tokens: Tensor, placed: tuple[Tensor, Tensor], valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.tokens_read is None:
            return _read_text(self.objects_read, *placed, tokens, valid), None
        objects = self.objects_read.project(*placed, tokens)
        words = self.tokens_read.project(placed[1], placed[0], queries)
        from_text, from_objects = cross_attend_both(*objects, *words, valid)
        return self.objects_read.merge(from_text), self.tokens_read.merge(from_objects)


class GatedObjectText(ParallelObjectText):
    r"""Parallel attention whose results multiply the features they answer to.

    .. math:: Q' = \mathrm{LN}(Q + Q \odot \mathrm{MHA}_1(Q, T, T)),\qquad T' = \mathrm{LN}(T + T \odot \mathrm{MHA}_2(T, Q, Q))

    Paper: Nguyen-Truong et al., "Vision-Aware Text Features in Referring Image Segmentation", arXiv:2404.08590 (its product
    gate), in the place of the object-text layer of arXiv:2411.15087, Sec. 3.3.
    Differs from the paper: the residual and the norm are ours, so that blocks can be stacked; both directions read the same inputs.

    Args and Shape: as :class:`ParallelObjectText`.

    Example:
        >>> import torch
        >>> queries, tokens = GatedObjectText(16, 4)(torch.randn(2, 5, 16), torch.randn(2, 3, 16))
        >>> queries.shape, tokens.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 3, 16]))
    """

    def _attend(
        self, queries: Tensor, tokens: Tensor, placed: tuple[Tensor, Tensor], valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        from_text, from_objects = super()._attend(queries, tokens, placed, valid)
        return queries * from_text, None if from_objects is None else tokens * from_objects


class SharedObjectText(_ObjectText):
    r"""One affinity for both directions: its softmax over tokens serves the objects, its softmax over objects the tokens.

    .. math:: A_h = \frac{W_a Q (W_k T)^T}{\sqrt D},\qquad Q' = \mathrm{LN}(Q + W_q\,[\mathrm{softmax}_T(A_h) V_h^T]_h),\qquad
              T' = \mathrm{LN}(T + W_t\,[\mathrm{softmax}_Q(A_h^T) V_h^Q]_h)

    Paper: Liu et al., "Grounding DINO", arXiv:2303.05499, Sec. 3.2 (its bidirectional attention, after GLIP), in the place of the
    object-text layer of arXiv:2411.15087, Sec. 3.3.
    Differs from the paper: post-norm residual without layer scale, like the other forms here.

    Args:
        dim: Channels ``C``.
        num_heads: Heads; ``C`` must be a multiple.
        text_ffn: Width of a feed-forward layer after the text's norm; 0: none.
        update_text: False builds no text side.

    Shape:
        - as :class:`ParallelObjectText`.

    Raises:
        ValueError: If ``dim`` is not a multiple of ``num_heads``, or a shape does not fit.

    Example:
        >>> import torch
        >>> queries, tokens = SharedObjectText(16, 4)(torch.randn(2, 5, 16), torch.randn(2, 3, 16))
        >>> queries.shape, tokens.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 3, 16]))
    """

    def __init__(self, dim: int, num_heads: int = 8, *, text_ffn: int = 0, update_text: bool = True) -> None:
        super().__init__(dim, text_ffn=text_ffn, update_text=update_text)
        self.objects_read = MultiHeadAttention(dim, num_heads)
        self.object_value = _xavier(dim) if update_text else None
        self.token_output = _xavier(dim) if update_text else None

    def _attend(
        self, queries: Tensor, tokens: Tensor, placed: tuple[Tensor, Tensor], valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.object_value is None or self.token_output is None:
            return _read_text(self.objects_read, *placed, tokens, valid), None
        objects, words, word_values = self.objects_read.project(*placed, tokens)
        object_values = self.object_value(queries).unflatten(-1, (self.objects_read.num_heads, -1)).transpose(1, 2)
        from_text, from_objects = cross_attend_both(objects, words, word_values, words, objects, object_values, valid)
        return self.objects_read.merge(from_text), self.token_output(from_objects.transpose(1, 2).flatten(2))


class SequentialObjectText(_ObjectText):
    r"""One direction after the other; the second reads what the first has renewed.

    .. math:: T' = \mathrm{LN}(T + \mathrm{MHA}_2(T + e_T, Q + e_Q, Q)),\qquad
              Q' = \mathrm{LN}(Q + \mathrm{MHA}_1(Q + e_Q, T' + e_T, T'))

    (``first="text"``; with ``first="objects"`` the roles are swapped.)

    Paper: the order of Nguyen-Truong et al., arXiv:2404.08590, in the place of the object-text layer of arXiv:2411.15087, Sec. 3.3.
    Differs from the paper: post-norm residuals like the other forms here.

    Args:
        dim: Channels ``C``.
        num_heads: Heads; ``C`` must be a multiple.
        first: ``"text"`` or ``"objects"``: the side that is renewed first.
        text_ffn: Width of a feed-forward layer after the text's norm; 0: none.
        update_text: False builds no text side with ``first="objects"``; with ``first="text"`` the objects need it, so it stays.

    Shape:
        - as :class:`ParallelObjectText`.

    Raises:
        ValueError: If ``first`` is neither, ``dim`` is not a multiple of ``num_heads``, or a shape does not fit.

    Example:
        >>> import torch
        >>> queries, tokens = SequentialObjectText(16, 4)(torch.randn(2, 5, 16), torch.randn(2, 3, 16))
        >>> queries.shape, tokens.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 3, 16]))
    """

    def __init__(self, dim: int, num_heads: int = 8, *, first: str = "text", text_ffn: int = 0, update_text: bool = True) -> None:
        check_choice("SequentialObjectText", "first", first, ("text", "objects"))
        update_text = update_text or first == "text"
        super().__init__(dim, text_ffn=text_ffn, update_text=update_text)
        self.first = first
        self.objects_read = MultiHeadAttention(dim, num_heads)
        self.tokens_read = MultiHeadAttention(dim, num_heads) if update_text else None

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        valid: Tensor | None = None,
        *,
        query_position: Tensor | None = None,
        token_position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check(queries, tokens, valid)
        if self.first == "text":
            tokens = self._read_objects(queries, tokens, valid, query_position, token_position)
        change = _read_text(self.objects_read, _add(queries, query_position), _add(tokens, token_position), tokens, valid)
        queries = self.query_norm(queries + change)
        if self.first == "objects":
            tokens = self._read_objects(queries, tokens, valid, query_position, token_position)
        return queries, tokens

    def _read_objects(
        self,
        queries: Tensor,
        tokens: Tensor,
        valid: Tensor | None,
        query_position: Tensor | None,
        token_position: Tensor | None,
    ) -> Tensor:
        change = None
        if self.tokens_read is not None:
            change = self.tokens_read(_add(tokens, token_position), _add(queries, query_position), queries)
        return self._renew(tokens, change, valid)


def _xavier(dim: int) -> nn.Linear:
    layer = nn.Linear(dim, dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _add(x: Tensor, position: Tensor | None) -> Tensor:
    return x if position is None else x + position.to(x.dtype)


def _read_text(attention: MultiHeadAttention, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    """One direction, objects to text; a text of padding only is read as its first token."""
    heads = attention.project(query, key, value)
    allowed = None
    if valid is not None:
        real = valid.bool()
        first = torch.arange(real.shape[1], device=real.device) == 0
        allowed = (real | (first & ~real.any(-1, keepdim=True)))[:, None, None]  # (B, 1, 1, L)
    return attention.merge(F.scaled_dot_product_attention(*heads, attn_mask=allowed))
