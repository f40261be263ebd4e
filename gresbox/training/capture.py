"""A training step's second half - decoder, matching, losses, forward and backward - recorded once as CUDA graphs and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gresbox._checks import check_range
from gresbox.structures import GresTarget, PaddedTargets

__all__ = ["CapturedStep", "capture_step"]

Graphed = Callable[..., dict[str, Tensor]]


def capture_step(
    model: nn.Module, criterion: nn.Module, *, most: int, max_tokens: int, autocast: torch.dtype | None = None
) -> CapturedStep:
    """Record what follows a model's features, so that a step costs one launch per pass instead of thousands.

    The model has two halves, ``features(**inputs) -> (memories, pixels, tokens, valid)`` and ``answer(*features)``, as
    :class:`gresbox.models.InstAlign` has. Features are computed as always; ``answer``, matching and losses become two CUDA graphs,
    one per pass, at the first call for each shape of the features. Gradients flow on into the features. Tokens are padded to
    ``max_tokens`` and instances to ``most``, so that shapes do not depend on the expressions; results are those of the plain step.
    The losses are the graphs' own memory: call ``backward``, and copy what is to be kept, before the next call.

    Args:
        model: The model, in training mode on a CUDA device.
        criterion: Called as ``criterion(output, targets, num_instances=...)`` with :class:`~gresbox.structures.PaddedTargets`. It
            and its matcher must not wait for the device.
        most: Places for instances per picture; a picture with more is an error.
        max_tokens: Places for tokens.
        autocast: Dtype of mixed precision, None: off.

    Returns:
        A callable ``(inputs, targets, num_instances) -> losses``.

    Raises:
        TypeError: If the model does not have the two halves.
        ValueError: If a number is below 1, or the model recomputes blocks in its backward pass (``gradient_checkpointing``).
        RuntimeError: At the first call, if the model is not on a CUDA device.

    Example:
        >>> from gresbox import create_model
        >>> model = create_model("instalign_tiny")
        >>> capture_step(model, model.criterion(), most=10, max_tokens=20)
        CapturedStep(most=10, max_tokens=20)
    """
    return CapturedStep(model, criterion, most=most, max_tokens=max_tokens, autocast=autocast)


class CapturedStep:
    """What :func:`capture_step` returns: features as always, the rest from a graph.

    Args:
        model: As there, as the others.
        criterion: Model output and targets to losses.
        most: Places for instances per picture.
        max_tokens: Places for tokens.
        autocast: Dtype of mixed precision, None: off.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module, *, most: int, max_tokens: int, autocast: torch.dtype | None = None
    ) -> None:
        for name in ("features", "answer"):
            if not callable(getattr(model, name, None)):
                raise TypeError(f"capture_step: `model` must have the method {name}, got {type(model).__name__}.")
        # Recomputing reads the random state, which must not be asked for while a graph is captured.
        if any(getattr(part, "checkpoint", False) for part in model.modules()):
            raise ValueError("capture_step: `model` must be one without gradient checkpointing, got one with it.")
        check_range("capture_step", "most", most, 1)
        check_range("capture_step", "max_tokens", max_tokens, 1)
        self.model, self.most, self.max_tokens, self.autocast = model, most, max_tokens, autocast
        self.criterion = criterion
        self.graphs: dict[tuple[Any, ...], Graphed] = {}

    def __call__(
        self, inputs: dict[str, Tensor], targets: Sequence[GresTarget], num_instances: float | Tensor | None = None
    ) -> dict[str, Tensor]:
        """One step's losses; ``backward`` on their sum replays the second graph.

        Args:
            inputs: What the model takes.
            targets: One per picture, all of one size.
            num_instances: As the criterion takes it.
        """
        padded = PaddedTargets.pack(targets, self.most)
        device = padded.masks.device
        kind = torch.float32 if self.autocast is None else self.autocast
        with torch.autocast(device.type, dtype=kind, enabled=self.autocast is not None):
            memories, pixels, tokens, valid = self.model.features(**inputs)  # type: ignore[operator]
        missing = self.max_tokens - tokens.shape[1]
        check_range("capture_step", "max_tokens", self.max_tokens, tokens.shape[1])
        tokens, valid = F.pad(tokens, (0, 0, 0, missing)), F.pad(valid, (0, missing))
        if num_instances is None:
            normaliser = padded.counts.sum().clamp(min=1).float()
        else:
            normaliser = torch.as_tensor(num_instances, dtype=torch.float32).to(device, non_blocking=True)
        fixed = (padded.masks, padded.counts, padded.merged, padded.no_target, normaliser)
        arguments = (*fixed, pixels, tokens, valid, *memories)
        key = (self.model.training, *((value.shape, value.dtype, value.requires_grad) for value in arguments))
        if key not in self.graphs:
            self.graphs[key] = self._record(arguments)
        for parameter in self.model.parameters():
            if parameter.grad is not None:  # of another part of the step: it may be the graph's own memory, which is written anew
                parameter.grad = parameter.grad.clone()
        return self.graphs[key](*arguments)

    def _record(self, arguments: tuple[Tensor, ...]) -> Graphed:
        """Two graphs of the second half for these shapes."""
        device = arguments[0].device
        if device.type != "cuda":
            raise RuntimeError(f"capture_step: CUDA graphs need a CUDA device, got a model on {device}.")
        function, parameters = _with_own_leaves(_SecondHalf(self.model, self.criterion, self.autocast))
        sample = tuple(value.detach().clone().requires_grad_(value.requires_grad) for value in arguments)
        leaves = tuple(parameter.detach().requires_grad_(parameter.requires_grad) for parameter in parameters)
        graphed: Any = torch.cuda.make_graphed_callables(function, sample + leaves, allow_unused_input=True)
        return lambda *given: graphed(*given, *parameters)

    def __repr__(self) -> str:
        return f"CapturedStep(most={self.most}, max_tokens={self.max_tokens})"


def _with_own_leaves(half: nn.Module) -> tuple[Callable[..., dict[str, Tensor]], tuple[nn.Parameter, ...]]:
    """A module as a function of its inputs and, after them, of its parameters; and these.

    A recording must not meet the parameters themselves: while losses of an earlier step are alive, autograd waits in its backward
    pass for the stream that they were computed on, which no capture allows. It is given leaves on the same memory instead.
    """
    named = dict(half.named_parameters())

    def function(*given: Tensor) -> dict[str, Tensor]:
        inputs, leaves = given[: len(given) - len(named)], given[len(given) - len(named) :]
        losses: dict[str, Tensor] = functional_call(half, dict(zip(named, leaves, strict=True)), inputs)
        return losses

    return function, tuple(named.values())


class _SecondHalf(nn.Module):
    """``answer`` and criterion as a function of tensors alone."""

    def __init__(self, model: nn.Module, criterion: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.criterion, self.autocast = model, criterion, autocast

    def forward(
        self,
        masks: Tensor,
        counts: Tensor,
        merged: Tensor,
        no_target: Tensor,
        normaliser: Tensor,
        pixels: Tensor,
        tokens: Tensor,
        valid: Tensor,
        *memories: Tensor,
    ) -> dict[str, Tensor]:
        kind = torch.float32 if self.autocast is None else self.autocast
        # A cast that is cached in one recording would be read in another: the cache is off.
        with torch.autocast(masks.device.type, dtype=kind, enabled=self.autocast is not None, cache_enabled=False):
            output = self.model.answer(list(memories), pixels, tokens, valid)  # type: ignore[operator]
        return self.criterion(output, PaddedTargets(masks, counts, merged, no_target), num_instances=normaliser)
