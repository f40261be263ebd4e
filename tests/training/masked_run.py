"""A small segmentation model of a user's own and what two processes do with it; run by the tests here, also as a program."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gresbox.blocks import AlignmentAwareMasking
from gresbox.training import AlignmentMaskedTraining


class Ours(nn.Module):
    """No part of the library: a convolution, an embedding, their product."""

    def __init__(self, norm: type[nn.Module] = nn.Identity, dropout: float = 0.0) -> None:
        super().__init__()
        self.image_encoder = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), norm(8) if norm is not nn.Identity else norm(), nn.ReLU())
        self.text_encoder = nn.Embedding(20, 8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(8, 8, 1)

    def encode(self, images, input_ids, attention_mask):
        return self.image_encoder(images), self.dropout(self.text_encoder(input_ids)), attention_mask

    def forward(self, images, input_ids, attention_mask):
        visual, tokens, valid = self.encode(images, input_ids, attention_mask)
        query = (tokens * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("bchw,bc->bhw", self.head(visual), query)


def ours(norm: type[nn.Module] = nn.Identity, dropout: float = 0.0) -> Ours:
    torch.manual_seed(0)
    return Ours(norm, dropout)


def masking(**options) -> AlignmentAwareMasking:
    return AlignmentAwareMasking(8, 8, align_dim=64, **{"block": 4, "threshold": 0.5, **options})


def batch(size: int = 4, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (size, 5), generator=generator)
    valid = torch.arange(5) < torch.randint(2, 6, (size, 1), generator=generator)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    truth = (torch.rand(size, 8, 8, generator=generator) > 0.5).float()
    return {"images": images, "input_ids": ids, "attention_mask": valid.long()}, truth


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def step(training: AlignmentMaskedTraining, wrapped: nn.Module, inputs: dict[str, torch.Tensor], truth: torch.Tensor) -> None:
    """One training step as the loop does it: the passes one after another, no synchronisation before the last."""
    passes = training.passes(inputs, truth.repeat_interleave(4, 1).repeat_interleave(4, 2) > 0)
    for turn, (weight, arguments) in enumerate(passes, 1):
        waits = turn < len(passes) and hasattr(wrapped, "no_sync")
        with wrapped.no_sync() if waits else nullcontext():
            (weight * F.binary_cross_entropy_with_logits(wrapped(**arguments), truth)).backward()


def main() -> None:
    """A training with the loop, then steps on this process's half of a batch; gradients and what was hidden go to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("options", help="arguments of tiny_training, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from tiny_run import tiny_training  # beside this program

    tiny_training(arguments.out / "two", **json.loads(arguments.options))  # also starts the processes' group
    rank = torch.distributed.get_rank()
    results = {}
    for weight in (0.0, 0.5):
        training = AlignmentMaskedTraining(ours(), masking(drop=1.0), clean_loss_weight=weight)
        wrapped = nn.parallel.DistributedDataParallel(training)
        for seed in range(2):
            training.zero_grad()
            inputs, truth = batch(seed=seed)
            part = slice(2 * rank, 2 * rank + 2)
            step(training, wrapped, {name: value[part] for name, value in inputs.items()}, truth[part])
            results[f"{weight}/{seed}"] = gradients(training.model)
    results["bridge"] = training.masking.text_to_visual
    results["sent"] = [name for name, _ in training.named_buffers() if name not in wrapped.parameters_to_ignore]
    other = AlignmentMaskedTraining(ours(), masking())
    torch.manual_seed(rank)
    results["removed"] = other.mask_images(**batch()[0])[1]
    torch.save(results, arguments.out / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
