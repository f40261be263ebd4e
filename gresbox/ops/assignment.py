"""Optimal one-to-one assignment of targets to queries, for a whole batch at once."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from gresbox._checks import check_choice, check_float, check_shape

__all__ = ["assign"]


def assign(cost: Tensor, num_targets: Tensor | None = None, *, nan: str = "error") -> Tensor:
    r"""For each column the row that it is matched to, at the smallest total cost; no row is used twice.

    .. math:: \omega^* = \arg\min_\omega \sum_j \mathrm{cost}[\omega(j), j]

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Eq. (5).
    Differs from the paper: nothing. The costs of the whole batch go to the CPU in one copy and are solved there by SciPy; the op is
    registered as ``gresbox::assign``, so it stays one node under ``torch.compile`` and ``torch.export``.

    Args:
        cost: Cost of each row and column; ``+inf`` marks a pair that is taken only where nothing else is left. No gradient flows.
        num_targets: How many columns of each problem are real; None: all. What the others hold does not matter.
        nan: ``"error"``, or ``"large"``: NaN and ``-inf`` count as ``+inf``, with a warning.

    Shape:
        - ``cost``: ``(B, N, M)``; ``num_targets``: ``(B,)`` integers in [0, M].
        - returns ``(B, M)`` int64 on the device of ``cost``: rows in [0, N), -1 where a column is not real or has no row (M > N).

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape or a number of targets does not fit, or for NaN and ``-inf`` in a real column with ``nan="error"``.

    Example:
        >>> import torch
        >>> assign(torch.tensor([[[1.0, 2.0], [0.0, 9.0], [5.0, 5.0]]]))
        tensor([[1, 0]])
        >>> assign(torch.tensor([[[1.0, 2.0]]]), torch.tensor([1]))
        tensor([[ 0, -1]])
    """
    check_shape("assign", cost=(cost, "B N M"))
    check_float("assign", cost=cost)
    check_choice("assign", "nan", nan, ("error", "large"))
    if num_targets is not None:
        check_shape("assign", cost=(cost, "B N M"), num_targets=(num_targets, "B"))
        if num_targets.is_floating_point() or num_targets.dtype == torch.bool:
            raise TypeError(f"assign: `num_targets` must be integers, got {num_targets.dtype}.")
    return _assign_op(cost.detach(), num_targets, nan == "large")


@torch.library.custom_op(
    "gresbox::assign", mutates_args=(), schema="(Tensor cost, Tensor? num_targets, bool nan_is_large) -> Tensor"
)
def _assign_op(cost: Tensor, num_targets: Tensor | None, nan_is_large: bool) -> Tensor:
    batch, rows, columns = cost.shape
    matched = np.full((batch, columns), -1, dtype=np.int64)
    if matched.size and rows:
        costs, counts = _to_host(cost, num_targets)
        bad: list[int] = []
        for index in range(batch):
            real, unusable = _finite(costs[index, :, : counts[index]])
            if unusable:
                bad.append(index)
                if not nan_is_large:
                    break
            matched[index, : counts[index]] = _solve(real)
        if bad:
            _report(bad, nan_is_large)
    return torch.from_numpy(matched).to(cost.device)


@_assign_op.register_fake
def _assign_fake(cost: Tensor, num_targets: Tensor | None, nan_is_large: bool) -> Tensor:
    return cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int64)


def _to_host(cost: Tensor, num_targets: Tensor | None) -> tuple[np.ndarray, list[int]]:
    """Costs in float64 and the number of real columns; counts on the costs' device travel as one more row of the one copy."""
    batch, _, columns = cost.shape
    cost = cost.float() if cost.dtype in (torch.float16, torch.bfloat16) else cost
    if num_targets is None:
        return cost.cpu().double().numpy(), [columns] * batch
    if num_targets.device == cost.device:
        row = num_targets.to(cost.dtype)[:, None, None].expand(-1, 1, columns)
        packed = torch.cat([cost, row], dim=1).cpu().double().numpy()
        costs, counts = packed[:, :-1], packed[:, -1, 0].astype(np.int64).tolist()
    else:
        costs, counts = cost.cpu().double().numpy(), num_targets.tolist()
    if min(counts) < 0 or max(counts) > columns:
        raise ValueError(f"assign: `num_targets` must be in [0, M] with M={columns}, got {min(counts)} to {max(counts)}.")
    return costs, counts


def _finite(cost: np.ndarray) -> tuple[np.ndarray, bool]:
    """The costs, with more than finite ones can add up to in place of what is not finite; and whether that hid NaN or -inf."""
    usable = np.isfinite(cost)
    if usable.all():
        return cost, False
    unusable = bool((~usable & (cost != np.inf)).any())
    known = cost[usable]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    scale = max(high - low, 1e-300)  # in units of their range the replacement is small: no overflow, little rounding
    return np.where(usable, (np.where(usable, cost, low) - low) / scale, 2.0 * (min(cost.shape) + 1)), unusable


def _solve(cost: np.ndarray) -> np.ndarray:
    """Row of each column of one problem, -1 where there are more columns than rows."""
    from scipy.optimize import linear_sum_assignment

    row_of = np.full(cost.shape[1], -1, dtype=np.int64)
    rows, columns = linear_sum_assignment(cost)
    row_of[columns] = rows
    return row_of


def _report(bad: list[int], nan_is_large: bool) -> None:
    """Raise, or warn, about problems that hold NaN or -inf."""
    if not nan_is_large:
        reason = "nan='large' counts them as +inf"
        raise ValueError(f"assign: `cost` must be free of NaN and -inf ({reason}), got some in problem {bad[0]} of the batch.")
    found = f"NaN or -inf in {len(bad)} of the batch's problems, first {bad[0]}"
    warnings.warn(f"assign: `cost` has {found}; they count as +inf.", RuntimeWarning, stacklevel=2)
