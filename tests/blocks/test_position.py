from __future__ import annotations

import numpy as np
import pytest
import torch

from gresbox.blocks import sine_position, sine_position_1d


@pytest.mark.parametrize("case", ["norm_c16", "norm_c128", "raw_c8"])
def test_table_is_mask2formers(golden, case):
    arrays = golden("m2f_sine_pe")
    per_axis, normalize, height, width = arrays[f"{case}/args"].tolist()
    table = sine_position(height, width, 2 * per_axis, normalize=bool(normalize))
    for reference in torch.from_numpy(arrays[case]):  # a batch of two equal tables
        torch.testing.assert_close(table, reference, atol=2e-6, rtol=0)


def test_padded_pixels_do_not_count(golden):
    arrays = golden("m2f_sine_pe")
    reference = torch.from_numpy(arrays["masked_c16"])
    table = sine_position(*reference.shape[-2:], 32, valid=~torch.from_numpy(arrays["masked_c16/mask"]))
    torch.testing.assert_close(table, reference, atol=2e-6, rtol=0)


def test_a_full_mask_is_no_mask():
    assert torch.equal(sine_position(4, 3, 8, valid=torch.ones(1, 4, 3, dtype=torch.bool))[0], sine_position(4, 3, 8))


def test_half_precision_is_computed_in_float32():
    exact = sine_position(60, 60, 256, dtype=torch.float64)
    assert (sine_position(60, 60, 256, dtype=torch.bfloat16) - exact).abs().max() < 4e-3  # half a unit in the last place of 1


def test_words_table_is_the_formula():
    table = sine_position_1d(7, 6, dtype=torch.float64).numpy()
    for position in range(7):
        for j in range(3):
            angle = position / 10000 ** (2 * j / 6)
            np.testing.assert_allclose(table[position, 2 * j : 2 * j + 2], [np.sin(angle), np.cos(angle)], atol=1e-12)


def test_padding_words_leaves_the_others():
    assert torch.equal(sine_position_1d(9, 8)[:4], sine_position_1d(4, 8))


@pytest.mark.parametrize(
    ("call", "message"), [(lambda: sine_position(2, 2, 6), "multiple of 4"), (lambda: sine_position_1d(2, 5), "even")]
)
def test_dim_that_cannot_be_divided(call, message):
    with pytest.raises(ValueError, match=message):
        call()
