"""Whole training steps of the small models: forward, losses, backward, clipping, optimiser, on one batch that is in memory.

The learning rate is 0, so that every step is the same step; 1000 / ms is steps per second. Data loading is not in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Form
from benchmarks.step.instalign_step import as_mask2former
from gresbox.models import create_model
from gresbox.structures import GresTarget
from gresbox.training import AlignmentMaskedTraining, capture_step

CASES = {
    "instalign_tiny, batch 16": {"model": "instalign_tiny", "B": 16},
    "igvg_tiny, batch 8": {"model": "igvg_tiny", "B": 8},
    "instalign_swin_tiny, batch 8": {"model": "instalign_swin_tiny", "B": 8},
}
ON = {
    "cpu": ("instalign_tiny, batch 16", "igvg_tiny, batch 8"),
    "cuda": ("instalign_swin_tiny, batch 8", "instalign_tiny, batch 16"),
}
DTYPES = {"cpu": ("float32",), "cuda": ("float32",)}
DIFFERENTIABLE = ()
TEXTS = ("the red circle", "two squares on the left", "a blue triangle", "all that is green")
MOST = 10


class Training:
    """A model, its criterion and its optimiser."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.criterion = self.model.criterion()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

    def step(self, losses: dict[str, Tensor]) -> Tensor:
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses["loss"].detach()


def make_inputs(case: dict[str, Any], device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(case["model"])
    for part in model.modules():  # the same step each time
        if isinstance(part, nn.Dropout) or type(part).__name__ == "DropPath":
            part.eval()
    size = model.processor.image_size
    numbers = torch.Generator().manual_seed(0)
    pictures = [torch.randint(256, (3, size, size), dtype=torch.uint8, generator=numbers) for _ in range(case["B"])]
    if case["model"] == "instalign_swin_tiny":  # its words come with pretrained weights, which are not needed here
        texts = {
            "input_ids": torch.randint(3, 1000, (case["B"], 20), generator=numbers),
            "attention_mask": torch.ones(case["B"], 20).long(),
        }
        batch = {"images": torch.randn(case["B"], 3, size, size, generator=numbers), **texts}
    else:
        batch = dict(model.processor(pictures, [TEXTS[index % len(TEXTS)] for index in range(case["B"])]))
    targets = []
    for index in range(case["B"]):
        masks = torch.zeros(index % 4, size, size, dtype=torch.bool)
        for place, mask in enumerate(masks):
            mask[place * size // 4 : (place + 1) * size // 4, size // 8 : size // 2] = True
        targets.append(GresTarget(masks).to(device))
    model.to(device)
    return {"training": Training(model), "batch": {name: value.to(device) for name, value in batch.items()}, "targets": targets}


def plain(training: Training, batch: dict[str, Tensor], targets: list[GresTarget]) -> Tensor:
    with torch.enable_grad():
        return training.step(training.criterion(training.model(**batch), targets))


def forms(device: str) -> dict[str, Callable[..., Any] | Form | str]:
    def as_before(training: Training, batch: dict[str, Tensor], targets: list[GresTarget]) -> Tensor:
        with as_mask2former(("attention masks", "aggregation", "phrases")):
            return plain(training, batch, targets)

    def wrapped(training: Training, batch: dict[str, Tensor], targets: list[GresTarget]) -> dict[str, Any]:
        return {"training": training, "batch": batch, "targets": targets, "wrapper": AlignmentMaskedTraining(training.model)}

    def masked(training: Training, batch: dict[str, Tensor], targets: list[GresTarget], wrapper: nn.Module) -> Tensor:
        with torch.enable_grad():
            return training.step(training.criterion(wrapper(**batch), targets))

    def captured(training: Training, batch: dict[str, Tensor], targets: list[GresTarget]) -> dict[str, Any]:
        step = capture_step(training.model, training.criterion, most=MOST, max_tokens=training.model.processor.max_tokens)
        return {"training": training, "batch": batch, "targets": targets, "step": step}

    def replayed(training: Training, batch: dict[str, Tensor], targets: list[GresTarget], step: Any) -> Tensor:
        with torch.enable_grad():
            return training.step(step(batch, targets))

    return {
        "gresbox": plain,
        "gresbox, second half captured": Form(replayed, prepare=captured) if device == "cuda" else "a CUDA graph needs a GPU",
        "gresbox, with AML": Form(masked, prepare=wrapped, differs="parts of the pictures are hidden"),
        "pieces as Mask2Former": as_before,
    }


def reference(training: Training, batch: dict[str, Tensor], targets: list[GresTarget]) -> Tensor:
    model = copy.deepcopy(training.model).double()
    return model.criterion()(model(**batch), targets)["loss"].detach()


TOLERANCES = {"float32": 1e-3}  # masks of masked attention are signs
