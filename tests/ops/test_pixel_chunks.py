"""Pieces of images: they cover every pixel once, and their views are matrices of one product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.ops import _pixel_chunks
from gresbox.ops._pixel_chunks import pieces_of

SIZES = {"batch": st.integers(0, 5), "maps": st.integers(0, 9), "channels": st.integers(0, 9), "pixels": st.integers(0, 70)}


@pytest.mark.usefixtures("pieces")
@given(chunk=st.sampled_from([0, 0, 1, 8, 100]), device=st.sampled_from(["cpu", "cuda"]), **SIZES)
def test_every_pixel_once_and_nothing_too_large(batch, maps, channels, pixels, chunk, device):
    seen = torch.zeros(batch, 1, pixels)
    rows, features = torch.randn(batch, maps, channels), torch.randn(batch, channels, pixels)
    masks, sums = torch.full((batch, maps, pixels), torch.nan), torch.zeros(batch, maps)
    for piece in pieces_of(batch, maps, channels, pixels, chunk, torch.device(device)):
        piece.of(seen).add_(1)
        product = torch.bmm(piece.each(rows), piece.of(features))
        piece.of(masks).copy_(product)
        sums[piece.images] += piece.total(product.sum(-1))
        most = _pixel_chunks._CPU_VALUES if device == "cpu" else _pixel_chunks._DEVICE_VALUES
        assert chunk or maps * piece.of(seen).numel() <= max(most, maps)
    assert (seen == 1).all()
    torch.testing.assert_close(masks, rows @ features)
    torch.testing.assert_close(sums, (rows @ features).sum(-1))


def test_a_large_image_is_cut_for_all_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    parts = [piece.parts for piece in pieces_of(2, 100, 256, 120 * 120, 0, torch.device("cpu"))]
    assert max(parts) > 1
    assert sum(parts[: len(parts) // 2]) == -(-120 * 120 // 384)
