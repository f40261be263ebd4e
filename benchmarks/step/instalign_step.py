"""InstAlign's training step from the pixel decoder's features on: decoder, matching, losses, forward and backward, piece by piece.

The peers are the same step with one piece as Mask2Former has it, and with all of them; every peer's ratio is what its piece gives.
Gradients are those of features and parameters. Masks of masked attention are signs, and matchings are choices, so that rounding can
change both; hence the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import gresbox.blocks.instance_aggregation as aggregation_block
import gresbox.blocks.phrase_object as decoder_block
import gresbox.losses.poa as phrase_loss
import gresbox.matchers.hungarian as phrase_matcher
from benchmarks.harness import Form, Target, missing
from benchmarks.step import matcher
from benchmarks.step.criterion import by_layers
from gresbox.blocks import AdaptiveInstanceAggregation, NoTargetHead, PhraseObjectTransformer
from gresbox.losses import InstAlignCriterion
from gresbox.matchers import HungarianInstanceMatcher
from gresbox.ops import aggregate_queries, align_phrases
from gresbox.structures import GresOutput, GresTarget, PaddedTargets

SIZES = {"N": 100, "C": 256, "H": 120, "L": 20, "image": 480}
CASES = {
    "1 image, 3 blocks": {"B": 1, "blocks": 3, **SIZES},
    "4 images, 3 blocks": {"B": 4, "blocks": 3, **SIZES},
    "8 images": {"B": 8, "blocks": 9, **SIZES},
    "32 images": {"B": 32, "blocks": 9, **SIZES},
}
ON = {"cpu": ("1 image, 3 blocks", "4 images, 3 blocks"), "cuda": ("32 images", "8 images")}
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}  # of features and autocast; parameters are float32
TOLERANCES = {"float32": 5e-2, "bfloat16": 0.5}
MEMORY_SHARES = (8, 4, 2)  # strides over that of the pixel features, lowest resolution first
FEATURES = ("pixels", "tokens", "memory0", "memory1", "memory2")
MOST = 10


class SecondHalf(nn.Module):
    """What follows the pixel decoder in InstAlign, at the paper's width."""

    def __init__(self, blocks: int, queries: int, dim: int) -> None:
        super().__init__()
        self.decoder = PhraseObjectTransformer(dim, num_layers=blocks, num_queries=queries)
        self.aggregation = AdaptiveInstanceAggregation()
        self.no_target_head = NoTargetHead(dim)

    def forward(self, memories: list[Tensor], pixels: Tensor, tokens: Tensor, valid: Tensor) -> GresOutput:
        *aux, last = self.decoder(memories, pixels, tokens, valid)
        no_target = self.no_target_head(last.normed, last.score_logits.sigmoid(), last.tokens, valid)
        return GresOutput(self.aggregation(last), no_target, last, tuple(aux))


@cache
def half_of(blocks: int, queries: int = SIZES["N"], dim: int = SIZES["C"]) -> SecondHalf:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SecondHalf(blocks, queries, dim)


DIFFERENTIABLE = (*FEATURES, "parameters")


def make_inputs(case: dict[str, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    drawn = partial(torch.randn, generator=generator, device=device)
    sides = [case["H"] // share for share in MEMORY_SHARES]
    targets = matcher.make_inputs({**case, "S": 1}, device, dtype, generator)["targets"]
    lengths = torch.randint(4, case["L"] + 1, (case["B"], 1), generator=generator, device=device)
    return {
        "pixels": drawn(case["B"], case["C"], case["H"], case["H"]).to(dtype),
        "tokens": drawn(case["B"], case["L"], case["C"]).to(dtype),
        **{f"memory{i}": drawn(case["B"], case["C"], side, side).to(dtype) for i, side in enumerate(sides)},
        "valid": torch.arange(case["L"], device=device) < lengths,
        "targets": targets,
        "parameters": {name: value.detach().to(device) for name, value in half_of(case["blocks"]).named_parameters()},
    }


def loss_of(
    parameters: dict[str, Tensor],
    targets: Any,
    valid: Tensor,
    pixels: Tensor,
    tokens: Tensor,
    *,
    pieces: tuple[str, ...] = (),
    **levels: Tensor,
) -> Tensor:
    """The step's loss; ``pieces`` are done as Mask2Former does them."""
    half = half_of(sum(name.endswith("cross_norm.weight") for name in parameters))
    memories = [levels[name] for name in FEATURES if name in levels]
    mixed = pixels.dtype in (torch.bfloat16, torch.float16)
    kind = pixels.dtype if mixed else torch.bfloat16
    with as_mask2former(pieces), torch.autocast(pixels.device.type, dtype=kind, enabled=mixed):
        output = functional_call(half, parameters, (memories, pixels, tokens, valid))
    with as_mask2former(pieces):
        if "matching and losses" in pieces:
            return loss_by_layers(output, targets)
        return criterion()(output, targets)["loss"]


@cache
def criterion() -> InstAlignCriterion:
    return InstAlignCriterion(HungarianInstanceMatcher())


def loss_by_layers(output: GresOutput, targets: list[Tensor]) -> Tensor:
    assert output.instances is not None and output.no_target is not None
    steps = (*output.aux, output.instances)
    stacked = {
        "embeddings": torch.stack([step.mask_embeddings for step in steps]),
        "scores": torch.stack([step.score_logits for step in steps]),
        "queries": torch.stack([step.queries for step in steps]),
        "tokens": torch.stack([step.tokens for step in steps]),
    }
    last = {
        "pixels": output.instances.pixels,
        "valid": output.instances.valid,
        "merged": output.merged,
        "no_target": output.no_target,
    }
    return by_layers(**stacked, **last, targets=targets, num_points=None)


class Unresized(NamedTuple):
    """Pixel features that stay as they are until masks are built, and the size that these get."""

    pixels: Tensor
    size: tuple[int, int]


def full_mask_logits(embeddings: Tensor, level: Unresized) -> Tensor:
    with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False):
        kind = torch.promote_types(embeddings.dtype, torch.float32)
        built = torch.einsum("bnc,bchw->bnhw", embeddings.to(kind), level.pixels.to(kind))
        return F.interpolate(built, size=level.size, mode="bilinear", align_corners=False).flatten(2)


PIECES = ("attention masks", "matching and losses", "aggregation", "phrases")


@contextmanager
def as_mask2former(pieces: tuple[str, ...]) -> Iterator[None]:
    """Put plain forms in the place of some of the library's."""
    swaps: list[tuple[Any, str, Any]] = []
    if "attention masks" in pieces:
        swaps += [(decoder_block, "downsample_pixels", Unresized), (decoder_block, "attention_mask_logits", full_mask_logits)]
    if "aggregation" in pieces:
        swaps.append((aggregation_block, "aggregate_queries", partial(aggregate_queries, backend="eager")))
    if "phrases" in pieces:
        plain = partial(align_phrases, backend="eager")
        swaps += [(place, "align_phrases", plain) for place in (phrase_loss, phrase_matcher)]
    with ExitStack() as stack:
        for place, name, form in swaps:
            stack.enter_context(mock.patch.object(place, name, form))
        yield


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    def ready(targets: list[Tensor], **inputs: Any) -> dict[str, Any]:
        truth: Any = [GresTarget(masks) for masks in targets]
        return {**inputs, "targets": PaddedTargets.pack(truth, MOST) if device == "cuda" else truth}

    found: dict[str, Callable[..., Any] | Form | str] = {"gresbox": Form(loss_of, prepare=ready)}
    for piece in PIECES:
        call = partial(loss_of, pieces=(piece,))
        found[f"{piece} as Mask2Former"] = missing("scipy") or call if piece == "matching and losses" else Form(call, prepare=ready)
    found["all of these"] = missing("scipy") or partial(loss_of, pieces=PIECES)
    return found


def reference(**inputs: Any) -> Tensor:
    return loss_of(**inputs, pieces=PIECES)


TARGETS = [
    Target("gresbox", "all of these", "32 images", "forward+backward", memory_at_most=0.5, device="cuda"),
    Target("gresbox", None, "32 images", "forward+backward", syncs_at_most=0, device="cuda"),
]
