"""Train a tiny InstAlign; run by the tests here, in processes that they kill and in processes that work together."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from gresbox.blocks import AlignmentAwareMasking
from gresbox.data import SyntheticGRES
from gresbox.models import create_model
from gresbox.structures import GresSample
from gresbox.training import AlignmentMaskedTraining, EvaluationOptions, TrainOptions, train


class Slow:
    """Samples that take their time, so that a process can be killed in the middle; some draw random numbers."""

    def __init__(self, data: SyntheticGRES, delay: float = 0.0, noise: bool = False) -> None:
        self.data, self.delay, self.noise = data, delay, noise

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> GresSample:
        time.sleep(self.delay)
        sample = self.data[index]
        if self.noise:
            sample.image.add_(torch.randint(0, 3, sample.image.shape, dtype=torch.uint8))
        return sample


def tiny_model(dropout: float = 0.0, **overrides: object):
    torch.manual_seed(0)
    model = create_model(
        "instalign_tiny",
        image_size=64,
        dim=32,
        num_queries=4,
        num_layers=1,
        pixel_layers=1,
        ffn_dim=32,
        pixel_ffn_dim=32,
        **overrides,
    )
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = dropout
    return model


def tiny_training(
    out: Path,
    *,
    delay: float = 0.0,
    random: bool = False,
    resume: bool = False,
    aml: dict[str, object] | None = None,
    **options: object,
) -> dict[str, float]:
    """A short training; ``random``: with dropout and data that draw random numbers; ``aml``: all weak blocks are hidden."""
    numbers = TrainOptions(progress=False, cpu=True, evaluation=EvaluationOptions(batch=2), **options)
    data = Slow(SyntheticGRES("train", 24, image_size=64), delay, random)
    model, wrapper = tiny_model(0.1 if random else 0.0), None
    if aml is not None:
        masking = AlignmentAwareMasking(*model.encode_dims, block=8, threshold=0.3, relative=True, drop=1.0)
        wrapper = AlignmentMaskedTraining(model, masking, **aml)
    return train(model, data, SyntheticGRES("val", 5, image_size=64), out, numbers, resume=resume, aml=wrapper)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", help="a list of the arguments of tiny_training, as JSON")
    torch.set_num_threads(1)
    for run in json.loads(parser.parse_args().runs):
        tiny_training(Path(run.pop("out")), **run)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
