"""Alignment-aware masked training: score the clean picture, hide what matches weakly, train on the rest."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gresbox._checks import check_choice, check_range
from gresbox.blocks import AlignmentAwareMasking
from gresbox.structures import GresTarget

__all__ = ["AlignmentMaskedTraining"]

Encode = Callable[..., Any]


class AlignmentMaskedTraining(nn.Module):
    r"""Any segmentation model, trained on pictures whose weakly matching blocks are hidden (AML).

    Stage 1, without gradient and in evaluation mode: the model's encoders see the whole picture, ``masking`` scores it and hides
    blocks. Stage 2: the model is called as always, on the masked picture. In evaluation mode this is the model itself, bit for bit.

    Paper: "AMLRIS: Alignment-aware Masked Learning for Referring Image Segmentation", arXiv:2602.22740.
    Differs from the paper: nothing; what it leaves open is listed in the documentation's page "AML". The authors' code trains on
    the clean picture too: that is ``clean_loss_weight=0.5``.

    The parameters are the model's, under ``model.``; nothing is added to a checkpoint. It wraps a compiled model, as in
    ``AlignmentMaskedTraining(torch.compile(model))``, and is itself wrapped by ``DistributedDataParallel``. The noise comes from
    the device's global generator, one per process: who restores that gets the same masks again. With a ``generator`` the global
    one is left alone.

    Args:
        model: Called as ``model(images, *args, **kwargs)``.
        masking: ``(images, visual, tokens, valid, targets=..., generator=...)`` to ``(masked, removed, similarity)``; None: an
            :class:`~gresbox.blocks.AlignmentAwareMasking` for ``model.encode_dims``, with blocks of 32 px, or of an eighth of
            ``model.processor.image_size`` where that is less.
        encode: What stage 1 calls with everything that the model is given; returns ``(visual, tokens, valid)``. None:
            ``model.encode``. A pair of modules ``(image_encoder, text_encoder)``: the first gets the images and returns a feature
            map (of several the last is taken), the second gets the rest and returns tokens; ``valid`` is then the model's argument
            ``attention_mask`` or ``valid``, and a model with neither is warned of: padding would count as words.
        clean_loss_weight: Share of the clean picture's loss, in [0, 1); see :meth:`passes`.
        score_mode: ``"eval"``: stage 1 runs without dropout and leaves running statistics alone; ``"train"``: as it is. A model
            with batch norm sees only masked pictures in its statistics with ``"eval"``.
        score_dtype: What stage 1 computes in, by autocast: ``torch.bfloat16`` or ``torch.float16`` make it cheaper where the
            training is in float32, ``torch.float32`` makes it exact under autocast; None: as the training. The match itself is in
            float32.
        generator: Draws the noise.

    Shape:
        - ``images``: ``(B, 3, H, W)``; ``targets``: for the masking alone, the model is not given them.
        - returns what the model returns.

    Raises:
        TypeError: If the model has no ``encode`` and none is given, or ``encode`` returns something else.
        ValueError: If an option is out of range.

    Example:
        >>> import torch
        >>> from gresbox import create_model
        >>> model = create_model("instalign_tiny")
        >>> training = AlignmentMaskedTraining(model)
        >>> batch = model.processor([torch.zeros(3, 64, 64, dtype=torch.uint8)], ["the red circle"])
        >>> tuple(training(**batch).merged.shape), sorted(training.shares)
        ((1, 16, 16), ['candidate', 'masked', 'weak'])
    """

    def __init__(
        self,
        model: nn.Module,
        masking: nn.Module | None = None,
        *,
        encode: Encode | Sequence[nn.Module] | None = None,
        clean_loss_weight: float = 0.0,
        score_mode: str = "eval",
        score_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        check_range(who, "clean_loss_weight", clean_loss_weight, 0)
        if clean_loss_weight >= 1:
            raise ValueError(f"{who}: `clean_loss_weight` must be at least 0 and below 1, got {clean_loss_weight}.")
        check_choice(who, "score_mode", score_mode, ("eval", "train"))
        check_choice(who, "score_dtype", score_dtype, (None, torch.float32, torch.bfloat16, torch.float16))
        if masking is not None and not isinstance(masking, nn.Module):
            raise TypeError(f"{who}: `masking` must be a module, got {masking!r}.")
        self.model = model
        self._given = _checked_encode(model, encode)  # a tuple: modules in it are not registered a second time
        self.masking = _default_masking(model) if masking is None else masking
        self.clean_loss_weight, self.generator = clean_loss_weight, generator
        self.score_mode, self.score_dtype = score_mode, score_dtype
        # What is no part of a checkpoint is the same on every process by its seed: nothing to send around before each step.
        passing = {name for name, _ in self.masking.named_buffers()} - self.masking.state_dict().keys()
        self._ddp_params_and_buffers_to_ignore = [f"masking.{name}" for name in sorted(passing)]

    @property
    def shares(self) -> dict[str, Tensor]:
        """What the last masked step hid, as the masking tells it: scalars on the device."""
        return getattr(self.masking, "shares", {})

    def forward(self, images: Tensor, *args: Any, targets: Any = None, clean: bool = False, **kwargs: Any) -> Any:
        """Train on the masked picture; on the clean one in evaluation mode, or where ``clean`` asks for it."""
        if self.training and not clean:
            images, _, _ = self.mask_images(images, *args, targets=targets, **kwargs)
        return self.model(images, *args, **kwargs)

    @torch.compiler.disable
    def mask_images(self, images: Tensor, *args: Any, targets: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Stage 1 alone, whatever the mode, for pictures and for training loops of one's own.

        Args:
            images: The pictures.
            *args: What else the model is given.
            targets: For the masking: what ``protect_target`` keeps and the shares count.
            **kwargs: What else the model is given.

        Shape:
            - returns the masked images; the filled pixels ``(B, H, W)`` bool; the similarity ``(B, h, w)``.
        """
        visual = tokens = valid = None
        if getattr(self.masking, "reads_features", True):
            with torch.no_grad(), self._scoring(), _autocast(images.device.type, self.score_dtype):
                visual, tokens, valid = self._encode(images, *args, **kwargs)
        return self.masking(images, visual, tokens, valid, targets=targets, generator=self.generator)

    def passes(self, inputs: Mapping[str, Any], targets: Sequence[GresTarget]) -> list[tuple[float, dict[str, Any]]]:
        """The calls of one training step: a loss weight and the keyword arguments of :meth:`forward` for each.

        Their backward passes come one after another, so that two need no more memory than one; with several processes only the
        last may add up gradients (``no_sync`` for those before).

        Args:
            inputs: The model's keyword arguments, ``images`` among them.
            targets: One per image.

        Example:
            >>> training = AlignmentMaskedTraining(nn.Identity(), nn.Identity(), encode=print, clean_loss_weight=0.5)
            >>> training.passes({"images": 0}, [])
            [(0.5, {'images': 0, 'clean': True}), (0.5, {'images': 0, 'targets': []})]
        """
        masked = (1 - self.clean_loss_weight, {**inputs, "targets": targets})
        return [(self.clean_loss_weight, {**inputs, "clean": True}), masked] if self.clean_loss_weight else [masked]

    def settings(self) -> dict[str, Any]:
        """The numbers in words and plain values, for a run's record; a continued run must have the same."""
        masking = f"{type(self.masking).__name__}({self.masking.extra_repr()})"
        dtype = None if self.score_dtype is None else str(self.score_dtype).removeprefix("torch.")
        return {
            "masking": masking,
            "clean_loss_weight": self.clean_loss_weight,
            "score_mode": self.score_mode,
            "score_dtype": dtype,
        }

    def extra_repr(self) -> str:
        return f"clean_loss_weight={self.clean_loss_weight}, score_mode={self.score_mode!r}, score_dtype={self.score_dtype}"

    def _encode(self, images: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        if len(self._given) == 2:
            encoded = _encode_apart(self.model, self._given, images, args, kwargs)
        else:
            encode = self._given[0] if self._given else _bare(self.model).encode
            encoded = encode(images, *args, **kwargs)
        if not isinstance(encoded, (tuple, list)) or len(encoded) not in (2, 3):
            who, got = type(self).__name__, _describe(encoded)
            raise TypeError(f"{who}: `encode` must return (visual, tokens) or (visual, tokens, valid), got {got}.")
        return (*encoded, None)[:3]

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Evaluation mode for whatever encodes; every module gets its own flag back."""
        if self.score_mode == "train":
            yield
            return
        owners = [getattr(part, "__self__", part) for part in self._given]
        roots = [self.model, *(owner for owner in owners if isinstance(owner, nn.Module))]
        training = [module for root in roots for module in root.modules() if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _checked_encode(model: nn.Module, encode: Encode | Sequence[nn.Module] | None) -> tuple[Any, ...]:
    """Nothing for the model's own, one callable, or two modules."""
    who = AlignmentMaskedTraining.__name__
    if encode is None:
        if not callable(getattr(_bare(model), "encode", None)):
            raise TypeError(
                f"{who}: `encode` must be given for a model without `encode`, got {type(model).__name__}; pass a callable that"
                " returns (visual, tokens, valid), or (image_encoder, text_encoder)."
            )
        return ()
    if callable(encode):
        return (encode,)
    if isinstance(encode, (tuple, list)) and len(encode) == 2 and all(callable(part) for part in encode):
        return tuple(encode)
    raise TypeError(f"{who}: `encode` must be a callable or (image_encoder, text_encoder), got {_describe(encode)}.")


def _default_masking(model: nn.Module) -> AlignmentAwareMasking:
    bare = _bare(model)
    dims = getattr(bare, "encode_dims", None)
    if dims is None:
        raise TypeError(
            f"{AlignmentMaskedTraining.__name__}: `masking` must be given for a model without `encode_dims`, got None;"
            " pass AlignmentAwareMasking(visual_dim, text_dim)."
        )
    side = getattr(getattr(bare, "processor", None), "image_size", None)
    return AlignmentAwareMasking(*dims, block=32 if side is None else max(1, min(32, side // 8)))


def _bare(model: Any) -> Any:
    """The model inside a wrapper that hides its methods."""
    return model.module if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else model


def _encode_apart(
    model: nn.Module, encoders: tuple[Any, ...], images: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Stage 1 by two modules; which tokens are real stands among the model's arguments."""
    visual, tokens = encoders[0](images), encoders[1](*args, **kwargs)
    visual = list(visual.values())[-1] if isinstance(visual, dict) else visual[-1] if isinstance(visual, (list, tuple)) else visual
    tokens = getattr(tokens, "last_hidden_state", tokens)
    signature = inspect.signature(getattr(_bare(model), "_orig_mod", _bare(model)).forward)
    named = signature.bind(images, *args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    if not {"attention_mask", "valid"} & {*signature.parameters, *named}:
        warnings.warn(
            f"{AlignmentMaskedTraining.__name__}: the model has no argument `attention_mask` or `valid`, so that padding counts as"
            " words; give `encode` as a callable that returns (visual, tokens, valid).",
            stacklevel=2,
        )
    return visual, tokens, named.get("attention_mask", named.get("valid"))


def _autocast(device: str, dtype: torch.dtype | None) -> torch.autocast:
    """In ``dtype``, or as around; without the cache of cast weights, which stage 1 would fill with copies that have no gradient."""
    enabled = torch.is_autocast_enabled(device) if dtype is None else dtype != torch.float32
    if dtype is None or not enabled:
        dtype = torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _describe(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__
