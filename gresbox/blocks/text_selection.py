"""Choose the words that queries are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gresbox._checks import check_choice, check_range, check_shape

__all__ = ["ScoreTextSelector"]


class ScoreTextSelector(nn.Module):
    r"""Choose the real tokens with the highest scores.

    .. math:: \mathrm{score}(t) = \lVert t \rVert_2 \quad\text{or}\quad \tfrac1C \textstyle\sum_c t_c

    Paper: "Instance-Aware Generalized Multi-Task Visual Grounding" (IGVG), Sec. 3.1.1 (Score Text Selector).
    Differs from the paper: nothing with ``score="l2"``; the authors' code uses the mean. A text with fewer than ``K`` real tokens
    gives them all, in the order of the text, as their code does; the other places are zero and not valid. That also holds for a
    text that is shorter than ``K`` altogether, where their code stops, and padding may stand anywhere.

    Args:
        num_tokens: Tokens ``K`` that are chosen.
        score: ``"l2"``, as in the paper, or ``"mean"`` over the channels, as in its code.

    Shape:
        - ``tokens``: ``(B, L, C)``; ``valid``: ``(B, L)`` True on real tokens, None: all are. Start and end tokens count as real.
        - returns ``selected`` ``(B, K, C)``, ``selected_valid`` ``(B, K)`` bool and ``indices`` ``(B, K)`` int64, positions in the
          text in order of descending score, equal scores in the order of the text; -1 where no token is left.

    Raises:
        ValueError: If ``num_tokens`` is below 1, ``score`` is unknown, or a shape does not fit.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[[1.0], [-3.0], [2.0], [9.0]]])
        >>> selected, selected_valid, indices = ScoreTextSelector(2)(tokens, torch.tensor([[1, 1, 1, 0]]))
        >>> selected[0, :, 0], indices
        (tensor([-3.,  2.]), tensor([[1, 2]]))
        >>> ScoreTextSelector(2)(tokens, torch.tensor([[1, 0, 0, 0]]))[2]
        tensor([[ 0, -1]])
    """

    def __init__(self, num_tokens: int, *, score: str = "l2") -> None:
        super().__init__()
        check_range("ScoreTextSelector", "num_tokens", num_tokens, 1)
        check_choice("ScoreTextSelector", "score", score, ("l2", "mean"))
        self.num_tokens, self.score = num_tokens, score

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        named = {"tokens": (tokens, "B L C")}
        if valid is not None:
            named["valid"] = (valid, "B L")
        length = check_shape("ScoreTextSelector", **named)["L"]
        real = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if valid is None else valid.bool()
        missing = max(self.num_tokens - length, 0)
        indices = self._order(tokens.detach(), real)[:, : self.num_tokens]
        selected = tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[2]))
        selected_valid = real.gather(1, indices)
        selected = selected.masked_fill(~selected_valid[..., None], 0.0)
        indices = indices.masked_fill(~selected_valid, -1)
        return F.pad(selected, (0, 0, 0, missing)), F.pad(selected_valid, (0, missing)), F.pad(indices, (0, missing), value=-1)

    def _order(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Positions, the first choice first, ``(B, L)``."""
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        score = torch.linalg.vector_norm(wide, dim=-1) if self.score == "l2" else wide.mean(-1)
        enough = real.sum(1, keepdim=True) >= self.num_tokens
        score = torch.where(enough, score, 0.0)  # too few: all equal, so in the order of the text
        score = score.nan_to_num(nan=torch.finfo(score.dtype).min).masked_fill(~real, float("-inf"))
        return score.sort(dim=1, descending=True, stable=True).indices

    def extra_repr(self) -> str:
        return f"{self.num_tokens}, score={self.score!r}"
