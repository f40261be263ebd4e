"""Optimal one-to-one assignment of targets to queries, for a whole batch at once."""

from __future__ import annotations

import functools
import sys
import warnings

import numpy as np
import torch
from torch import Tensor

from gresbox._checks import check_choice, check_float, check_shape
from gresbox.ops._backend import use_triton
from gresbox.ops._late_errors import LateError, hand_over, raise_finished
from gresbox.ops._register import Forms, define_op

__all__ = ["assign"]

ADAPTER = "torch_linear_assignment"
MOST_SHORT, MOST_LONG = 128, 1024  # of the kernel: the smaller and the larger of N and M


def assign(cost: Tensor, num_targets: Tensor | None = None, *, nan: str = "error", backend: str = "auto") -> Tensor:
    r"""For each column the row that it is matched to, at the smallest total cost; no row is used twice.

    .. math:: \omega^* = \arg\min_\omega \sum_j \mathrm{cost}[\omega(j), j]

    Paper: Nguyen et al., "Instance-Aware Generalized Referring Expression Segmentation", arXiv:2411.15087, Eq. (5).
    Differs from the paper: nothing. On CUDA a kernel solves the whole batch in one launch and nothing waits for the device.
    Elsewhere, and for more than 128 targets or 1,024 queries, the costs go to the CPU in one copy and SciPy solves them. Both
    compute in float64; they may differ where two assignments cost the same. The op is registered as ``gresbox::assign``, so it
    stays one node under ``torch.compile`` and ``torch.export``.

    Where nothing waits, ``nan="error"`` counts NaN and ``-inf`` as ``+inf`` and raises from a later call, as soon as the news has
    arrived on the host; a warning comes late in the same way, and ``num_targets`` on the device is clamped. A captured CUDA graph
    reports nothing.

    Args:
        cost: Cost of each row and column; ``+inf`` marks a pair that is taken only where nothing else is left. No gradient flows.
        num_targets: How many columns of each problem are real; None: all. What the others hold does not matter.
        nan: ``"error"``, or ``"large"``: NaN and ``-inf`` count as ``+inf``, with a warning.
        backend: ``"eager"`` is SciPy, ``"triton"`` the kernel, ``"auto"`` the kernel on CUDA and SciPy elsewhere;
            ``"torch_linear_assignment"`` is the package of that name, which waits for the device.

    Shape:
        - ``cost``: ``(B, N, M)``; ``num_targets``: ``(B,)`` integers in [0, M].
        - returns ``(B, M)`` int64 on the device of ``cost``: rows in [0, N), -1 where a column is not real or has no row (M > N).

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape or a number of targets does not fit, or for NaN and ``-inf`` in a real column with ``nan="error"``.
        RuntimeError: If ``backend`` is not possible here.
        ImportError: If the package behind ``backend`` is not installed.

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
    refusal = _refusal(cost, None, False) if backend == "triton" else None  # for "auto" the op itself asks, untraced
    kernel = use_triton("assign", backend, cost, kernel=refusal or True, adapter=ADAPTER)
    cost = cost.detach()
    if kernel and num_targets is not None and num_targets.device != cost.device:
        if not torch.compiler.is_compiling() and type(num_targets) is Tensor:  # there are numbers to look at
            _check_counts(num_targets.tolist(), cost.shape[2])
        num_targets = num_targets.to(cost.device, non_blocking=True)
    if backend == ADAPTER:
        return _adapted(cost, num_targets, nan == "large")
    if backend == "eager":
        return _solve_all(cost, num_targets, nan == "large")
    return _assign_op(cost, num_targets, nan == "large")


def _solve_all(cost: Tensor, num_targets: Tensor | None, nan_is_large: bool) -> Tensor:
    """All problems by SciPy."""
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


def _solve_on_device(cost: Tensor, num_targets: Tensor | None, nan_is_large: bool) -> Tensor:
    """All problems by the kernel."""
    from gresbox.kernels.assignment import match

    raise_finished()
    matched, wrong = match(cost, None if num_targets is None else num_targets.contiguous())  # it reads them one after the other
    if wrong.is_cuda:
        hand_over(wrong, functools.partial(_report_flags, nan_is_large=nan_is_large, late=True))
    else:
        _report_flags(wrong, nan_is_large=nan_is_large, late=False)
    return matched


def _refusal(cost: Tensor, num_targets: Tensor | None, nan_is_large: bool) -> str | None:
    """Why the kernel cannot take these inputs."""
    short, long = sorted(cost.shape[1:])
    if 0 in cost.shape:
        return "some axis has no element"
    if short > MOST_SHORT or long > MOST_LONG:
        return f"{cost.shape[1]} x {cost.shape[2]} is more than {MOST_LONG} x {MOST_SHORT}"
    return None


def _fake(cost: Tensor, num_targets: Tensor | None, nan_is_large: bool) -> Tensor:
    return cost.new_empty((cost.shape[0], cost.shape[2]), dtype=torch.int64)


_assign_op = define_op(
    "assign(Tensor cost, Tensor? num_targets, bool nan_is_large) -> Tensor",
    fake=_fake,
    forward=Forms(_solve_all, _solve_on_device, _refusal),
)


def _adapted(cost: Tensor, num_targets: Tensor | None, nan_is_large: bool) -> Tensor:
    """All problems by torch-linear-assignment, which knows neither padding nor costs that are not finite."""
    from torch_linear_assignment import batch_linear_assignment

    batch, rows, columns = cost.shape
    if 0 in cost.shape:
        return cost.new_full((batch, columns), -1, dtype=torch.int64)
    if num_targets is None:
        num_targets = torch.full((batch,), columns)
    real = torch.arange(columns, device=cost.device) < num_targets.to(cost.device)[:, None]  # (B, M)
    usable = cost.isfinite()
    bad = (real[:, None] & ~usable & (cost != torch.inf)).flatten(1).any(1).nonzero()[:, 0].tolist()
    if bad:
        _report(bad, nan_is_large)
    known = usable & real[:, None]
    value = cost.double()
    low = value.masked_fill(~known, torch.inf).amin((1, 2), keepdim=True)
    high = value.masked_fill(~known, -torch.inf).amax((1, 2), keepdim=True)
    size = min(rows, columns) + 1
    value = torch.where(known, (value - low) / (high - low).clamp(min=1e-300), 2.0 * size)
    value = torch.where(real[:, None], value, 4.0 * size**2)  # what is not real is left out first, and costs the same everywhere
    return batch_linear_assignment(value.mT.contiguous()).masked_fill(~real, -1)


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
    _check_counts(counts, columns)
    return costs, counts


def _check_counts(counts: list[int], columns: int) -> None:
    if counts and (min(counts) < 0 or max(counts) > columns):
        raise ValueError(f"assign: `num_targets` must be in [0, M] with M={columns}, got {min(counts)} to {max(counts)}.")


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


def _report_flags(flags: Tensor, *, nan_is_large: bool, late: bool) -> None:
    """What the kernel found, one flag per problem."""
    bad = [index for index, flag in enumerate(flags.tolist()) if flag]
    if bad:
        _report(bad, nan_is_large, late)


def _report(bad: list[int], nan_is_large: bool, late: bool = False) -> None:
    """Raise, or warn, about problems that hold NaN or -inf."""
    when = " of an earlier call" if late else ""
    if not nan_is_large:
        reason = "nan='large' counts them as +inf"
        message = f"assign: `cost` must be free of NaN and -inf ({reason}), got some in problem {bad[0]} of the batch{when}."
        raise LateError(message) if late else ValueError(message)
    found = f"NaN or -inf in {len(bad)} of the batch's problems{when}, first {bad[0]}"
    warnings.warn(f"assign: `cost` has {found}; they count as +inf.", RuntimeWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """Of the warning's frames the first one outside: how many are between depends on the backend, and PyTorch's are among them."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("gresbox", "torch"):
        level, frame = level + 1, frame.f_back
    return level
