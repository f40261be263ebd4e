"""AML's stage 1: who encodes, in which precision, and how padding is told from words."""

from __future__ import annotations

import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from gresbox.training import AlignmentMaskedTraining


@pytest.fixture
def run(program) -> ModuleType:
    return program("masked_run")


def test_what_encodes(run):
    """The model's own way, a callable, a module, and two modules, whose last map and hidden states are taken."""
    inputs, _ = run.batch()
    model = run.ours()

    class Levels(nn.Module):
        def forward(self, images):
            return [images, model.image_encoder(images)]

    class States(nn.Module):
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=model.text_encoder(input_ids))

    class Joint(nn.Module):
        def forward(self, images, input_ids, attention_mask):
            return model.encode(images, input_ids, attention_mask)

    _, want, _ = AlignmentMaskedTraining(model, run.masking(drop=1.0)).mask_images(**inputs)
    for encode in (model.encode, Joint(), lambda *args, **kwargs: model.encode(*args, **kwargs), (Levels(), States())):
        training = AlignmentMaskedTraining(model, run.masking(drop=1.0), encode=encode)
        assert set(training.state_dict()) == {f"model.{name}" for name in model.state_dict()}
        assert sum(p.numel() for p in training.parameters()) == sum(p.numel() for p in model.parameters())
        assert torch.equal(training.mask_images(**inputs)[1], want)
        assert torch.equal(training.mask_images(*inputs.values())[1], want)  # by position: padding is found by its name
    assert want.any()
    assert not want.all()


def test_a_pair_of_encoders_says_when_it_cannot_tell_padding(run):
    inputs, _ = run.batch()
    model = run.ours()

    class Own(nn.Module):
        def forward(self, images, input_ids, pad=None):
            return model(images, input_ids, None)

    class Marked(Own):
        def forward(self, images, input_ids, valid=None):
            return super().forward(images, input_ids)

    images, words = inputs["images"], inputs["input_ids"]
    pair = (model.image_encoder, lambda input_ids, **_: model.text_encoder(input_ids))
    with pytest.warns(UserWarning, match="no argument `attention_mask` or `valid`, so that padding counts as words"):
        AlignmentMaskedTraining(Own(), run.masking(), encode=pair).mask_images(images, words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AlignmentMaskedTraining(Marked(), run.masking(), encode=pair).mask_images(images, words)


@pytest.mark.parametrize("around", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_stage_1_has_a_dtype_of_its_own(dtype, around, run):
    inputs, _ = run.batch()
    model, seen = run.ours(), []

    def encode(*args, **kwargs):
        encoded = model.encode(*args, **kwargs)
        seen.append((encoded[0].dtype, torch.is_autocast_cache_enabled()))
        return encoded

    training = AlignmentMaskedTraining(model, run.masking(drop=1.0), encode=encode, score_dtype=dtype)
    with torch.autocast("cpu", dtype=around or torch.bfloat16, enabled=around is not None):
        answer = training(**inputs)
        assert torch.is_autocast_enabled("cpu") == (around is not None)
        assert torch.is_autocast_cache_enabled()
        _, _, similarity = training.mask_images(**inputs)
    used = dtype or around or torch.float32
    assert seen == [(used, False)] * 2
    assert similarity.dtype == torch.float32
    assert answer.dtype == (around or torch.float32)  # stage 2 is the plain step
    exact = AlignmentMaskedTraining(model, run.masking(drop=1.0)).mask_images(**inputs)[2]
    torch.testing.assert_close(similarity, exact, atol=1e-6 if used == torch.float32 else 0.02, rtol=0)


def test_an_encoder_that_is_no_part_of_the_model(run):
    inputs, _ = run.batch()
    outside = nn.Sequential(nn.Embedding(20, 8), nn.Dropout())

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = outside

        def forward(self, input_ids, attention_mask):
            return self.body(input_ids)

    model = run.ours()
    training = AlignmentMaskedTraining(model, run.masking(drop=1.0), encode=(model.image_encoder, Text()))
    state = torch.get_rng_state()
    first, second = (training.mask_images(**inputs)[2] for _ in range(2))
    assert torch.equal(first, second)
    assert outside[1].training
    assert len(list(training.parameters())) == len(list(model.parameters()))
    assert not torch.equal(torch.get_rng_state(), state)  # the noise, not the dropout
