from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gresbox.ops import filter_blocks
from gresbox.ops.block_filter import drop_weak_blocks, weak_pixels

CASES = (
    "pix_bern",
    "pix_exact",
    "blk_bern",
    "blk_exact",
    "blk_exact_min1",
    "odd_size",
    "odd_size_pix",
    "rect_block",
    "rho0",
    "rho1",
    "none_weak",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_golden_masks(golden, case, dtype):
    arrays = {name.removeprefix(f"{case}_"): array for name, array in golden("aml_paper_afm").items()}
    similarity, size = torch.from_numpy(arrays["score"]).to(dtype), arrays["image_u8"].shape[-2:]
    weak = weak_pixels("test", similarity, size, float(arrays["tau"]))
    assert torch.equal(weak, torch.from_numpy(arrays["weak"]))
    removed = filter_blocks(
        similarity,
        size,
        threshold=float(arrays["tau"]),
        drop=float(arrays["rho"]),
        block=tuple(arrays["block"].tolist()),
        unit=str(arrays["unit"]),
        mode=str(arrays["mode"]),
        at_least_one=bool(arrays["at_least_one"]),
        noise=torch.from_numpy(arrays["noise"]),
    )
    assert torch.equal(removed, torch.from_numpy(arrays["pixel_mask"]))


def by_loops(similarity, size, noise, *, threshold, drop, block, unit, mode, at_least_one):
    """One sample, one block and one pixel at a time."""
    height, width = size
    removed = torch.zeros(len(similarity), height, width, dtype=torch.bool)
    smooth = F.interpolate(similarity[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    for sample in range(len(similarity)):
        weak = {(y, x) for y in range(height) for x in range(width) if smooth[sample, y, x] < threshold}
        items = weak if unit == "pixel" else {(y // block[0], x // block[1]) for y, x in weak}
        ranked = sorted(items, key=lambda item: (noise[sample][item].item(), item))
        if mode == "exact":
            chosen = ranked[: max(int(drop * len(ranked)), 1 if at_least_one else 0)]
        else:
            chosen = [item for item in ranked if noise[sample][item] < drop] or (ranked[:1] if at_least_one else [])
        blocks = {(y // block[0], x // block[1]) for y, x in chosen} if unit == "pixel" else set(chosen)
        for row, column in blocks:
            removed[sample, row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]] = True
    return removed


@settings(max_examples=120)
@given(
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    block=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    unit=st.sampled_from(["block", "pixel"]),
    mode=st.sampled_from(["bernoulli", "exact"]),
    at_least_one=st.booleans(),
    threshold=st.sampled_from([0.0, 0.4, 0.7, 1.0]),
    drop=st.sampled_from([0.0, 0.25, 0.6, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_any_size_is_what_loops_make_of_it(size, grid, block, unit, mode, at_least_one, threshold, drop, seed):
    generator = torch.Generator().manual_seed(seed)
    options = {"threshold": threshold, "drop": drop, "block": block, "unit": unit, "mode": mode, "at_least_one": at_least_one}
    similarity = torch.rand(2, *grid, generator=generator)
    shape = size if unit == "pixel" else (math.ceil(size[0] / block[0]), math.ceil(size[1] / block[1]))
    noise = torch.rand(2, *shape, generator=generator).mul(8).floor() / 8  # ties: the first in reading order goes first
    removed = filter_blocks(similarity, size, noise=noise, **options)
    assert torch.equal(removed, by_loops(similarity, size, noise, **options))


@given(seed=st.integers(0, 10**6), unit=st.sampled_from(["block", "pixel"]), mode=st.sampled_from(["bernoulli", "exact"]))
def test_the_ends_of_threshold_and_drop(seed, unit, mode):
    similarity = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    options = {"block": 8, "unit": unit, "mode": mode}
    assert not filter_blocks(similarity, (24, 33), threshold=0.0, drop=1.0, **options).any()
    assert not filter_blocks(similarity, (24, 33), threshold=1.0, drop=0.0, **options).any()
    assert filter_blocks(similarity, (24, 33), threshold=1.0, drop=1.0, **options).all()


@given(seed=st.integers(0, 10**6), mode=st.sampled_from(["bernoulli", "exact"]))
def test_more_drop_hides_more_and_samples_do_not_meet(seed, mode):
    generator = torch.Generator().manual_seed(seed)
    similarity, noise = torch.rand(3, 4, 4, generator=generator), torch.rand(3, 4, 5, generator=generator)
    options = {"block": 8, "mode": mode}
    less, more = (filter_blocks(similarity, (32, 40), drop=drop, noise=noise, **options) for drop in (0.3, 0.8))
    assert (less <= more).all()
    order = torch.randperm(3, generator=generator)
    assert torch.equal(filter_blocks(similarity[order], (32, 40), drop=0.3, noise=noise[order], **options), less[order])
    alone = filter_blocks(similarity[1:2], (32, 40), drop=0.3, noise=noise[1:2], **options)
    assert torch.equal(alone, less[1:2])


def test_exact_takes_the_floor_of_the_share_in_every_picture():
    similarity = torch.zeros(64, 4, 4)
    removed = filter_blocks(similarity, (40, 40), drop=0.3, block=10, mode="exact")
    assert (removed.flatten(1).sum(1) == int(0.3 * 16) * 100).all()
    assert len({tuple(row.tolist()) for row in removed.flatten(1)}) > 50


def test_bernoulli_hides_that_share_on_average():
    removed = filter_blocks(torch.zeros(400, 2, 2), (20, 20), drop=0.25, block=2)
    assert removed.float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_share_drawn_among_pixels_hides_nearly_every_weak_block():
    """A block with k weak pixels stays with probability (1 - drop)^k: the printed rule does not retain, the default does."""
    weak = torch.zeros(4000, 4, 16, dtype=torch.bool)
    for column, count in enumerate((1, 2, 4, 16)):
        for place in range(count):
            weak[:, place // 4, 4 * column + place % 4] = True
    options = {"drop": 0.25, "block": 4, "mode": "bernoulli"}
    hidden, _ = drop_weak_blocks("test", weak, unit="pixel", **options)
    shares = hidden[:, 0, ::4].float().mean(0).tolist()
    assert shares == pytest.approx([1 - 0.75**count for count in (1, 2, 4, 16)], abs=0.03)
    hidden, _ = drop_weak_blocks("test", weak, unit="block", **options)
    assert hidden[:, 0, ::4].float().mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_pixels_that_are_not_there_are_neither_weak_nor_hidden():
    similarity, valid = torch.zeros(1, 2, 2), torch.zeros(1, 16, 16, dtype=torch.bool)
    valid[:, :10, :6] = True
    removed = filter_blocks(similarity, (16, 16), drop=1.0, block=8, valid=valid)
    assert torch.equal(removed, valid)  # the lower left block is touched by real pixels, and only they are filled
    drawn = drop_weak_blocks(
        "test", weak_pixels("test", similarity, (16, 16), 0.4, valid=valid), drop=1.0, block=8, unit="block", mode="exact"
    )
    assert drawn[1].tolist() == [[[True, False], [True, False]]]


@pytest.mark.parametrize("unit", ["block", "pixel"])
def test_protected_pixels_keep_their_whole_block(unit):
    protected = torch.zeros(1, 12, 12, dtype=torch.bool)
    protected[0, 5, 5] = True
    removed = filter_blocks(torch.zeros(1, 1, 1), (12, 12), drop=1.0, block=4, unit=unit, protected=protected)
    want = torch.ones(1, 12, 12, dtype=torch.bool)
    want[0, 4:8, 4:8] = False
    assert torch.equal(removed, want)


def test_a_relative_threshold_is_a_share_of_each_pictures_patches():
    similarity = torch.stack([torch.linspace(0.01, 0.1, 25), torch.linspace(0.8, 0.99, 25)]).view(2, 5, 5)
    options = {"drop": 1.0, "block": 1, "relative": True}
    removed = filter_blocks(similarity, (5, 5), threshold=0.4, **options)  # one pixel per patch: no interpolation
    assert removed.flatten(1).sum(1).tolist() == [10, 10]
    assert not filter_blocks(similarity, (5, 5), threshold=0.0, **options).any()
    assert not filter_blocks(torch.full((1, 5, 5), 0.3), (5, 5), threshold=0.9, **options).any()  # all alike: none is weaker


@given(value=st.floats(0.1, 1.0), grid=st.integers(1, 9), height=st.integers(1, 90), width=st.integers(1, 90))
def test_rounding_puts_no_pixel_below_patches_that_are_all_at_the_limit(value, grid, height, width):
    similarity = torch.full((1, grid, grid), value)
    options = {"drop": 1.0, "block": 4}
    assert not filter_blocks(similarity, (height, width), threshold=similarity[0, 0, 0].item(), **options).any()
    assert not filter_blocks(similarity, (height, width), threshold=0.4, relative=True, **options).any()


def test_noise_comes_from_the_generator_alone_where_one_is_given():
    similarity = torch.zeros(2, 4, 4)
    state = torch.get_rng_state()
    first, second = (filter_blocks(similarity, (64, 64), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(filter_blocks(similarity, (64, 64)), first)
    assert not torch.equal(torch.get_rng_state(), state)


def test_noise_of_exactly_the_share_stays_visible():
    noise = torch.tensor([[[0.0, 0.25, 0.24, 0.5]]])
    for drop, hidden in ((0.0, []), (0.25, [0, 2]), (0.5, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        removed = filter_blocks(torch.zeros(1, 1, 1), (1, 4), drop=drop, block=1, noise=noise)
        assert removed[0, 0].nonzero()[:, 0].tolist() == hidden


def test_nan_is_not_weak():
    similarity = torch.tensor([[[float("nan"), 0.1]]])
    assert filter_blocks(similarity, (2, 8), drop=1.0, block=2)[0, 0].tolist() == [False] * 6 + [True] * 2


@pytest.mark.parametrize("unit", ["block", "pixel"])
@pytest.mark.parametrize("mode", ["bernoulli", "exact"])
def test_compiles_and_exports_as_one_graph(unit, mode):
    similarity = torch.rand(2, 3, 4)
    noise = torch.rand(2, 5, 5) if unit == "block" else torch.rand(2, 18, 20)

    class Filter(torch.nn.Module):
        def forward(self, similarity, noise):
            return filter_blocks(similarity, (18, 20), drop=0.5, block=4, unit=unit, mode=mode, noise=noise, at_least_one=True)

    want = Filter()(similarity, noise)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(Filter(), fullgraph=True, backend="aot_eager")(similarity, noise), want)
    assert torch.equal(torch.export.export(Filter(), (similarity, noise), strict=False).module()(similarity, noise), want)


def test_autocast_and_bf16_do_not_change_the_rule():
    similarity = torch.rand(2, 4, 4)
    noise = torch.rand(2, 4, 4)
    want = filter_blocks(similarity, (32, 32), block=8, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(filter_blocks(similarity, (32, 32), block=8, noise=noise), want)
    rounded = similarity.bfloat16()
    assert torch.equal(
        filter_blocks(rounded, (32, 32), block=8, noise=noise), filter_blocks(rounded.float(), (32, 32), block=8, noise=noise)
    )


S = torch.rand(2, 4, 4)
BAD = {
    "threshold": ({"threshold": 1.5}, ValueError, "filter_blocks: `threshold` must be in [0, 1], got 1.5."),
    "threshold nan": ({"threshold": float("nan")}, ValueError, "filter_blocks: `threshold` must be in [0, 1], got nan."),
    "drop": ({"drop": -0.1}, ValueError, "filter_blocks: `drop` must be in [0, 1], got -0.1."),
    "block": ({"block": 0}, ValueError, "filter_blocks: `block` must be at least 1, got 0."),
    "block of three": (
        {"block": (4, 4, 4)},
        TypeError,
        "filter_blocks: `block` must be a whole number of pixels or a pair of them",
    ),
    "fractions as block": ({"block": 2.5}, TypeError, "filter_blocks: `block` must be a whole number of pixels"),
    "unit": ({"unit": "patch"}, ValueError, "filter_blocks: `unit` must be one of 'block', 'pixel', got 'patch'."),
    "mode": ({"mode": "half"}, ValueError, "filter_blocks: `mode` must be one of 'bernoulli', 'exact', got 'half'."),
    "noise per pixel": ({"noise": torch.rand(2, 32, 32)}, ValueError, "= (2, 4, 4) for unit='block', got (2, 32, 32)."),
    "noise per block": ({"noise": torch.rand(2, 4, 4), "unit": "pixel"}, ValueError, "`noise` must be (B, H, W) = (2, 32, 32)"),
    "a number as noise": ({"noise": 0.5}, TypeError, "filter_blocks: `noise` must be a tensor, got float."),
    "whole noise": ({"noise": torch.ones(2, 4, 4, dtype=torch.long)}, TypeError, "`noise` must be a floating-point tensor"),
    "valid of patches": ({"valid": torch.ones(2, 4, 4, dtype=torch.bool)}, ValueError, "`valid` must be (B, H, W) = (2, 32, 32)"),
    "valid as numbers": ({"valid": torch.ones(2, 32, 32)}, TypeError, "filter_blocks: `valid` must be bool, got torch.float32."),
    "protected as numbers": ({"protected": torch.ones(2, 32, 32)}, TypeError, "filter_blocks: `protected` must be bool"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, error, expected = BAD[case]
    with pytest.raises(error) as caught:
        filter_blocks(S, (32, 32), **{"block": 8, **options})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_similarity():
    with pytest.raises(ValueError, match=r"filter_blocks: `similarity` must be \(B, h, w\), got \(2, 1, 4, 4\)\."):
        filter_blocks(S[:, None], (32, 32))
    with pytest.raises(ValueError, match=r"filter_blocks: `similarity` must be at least 1 by 1, got 0 by 4\."):
        filter_blocks(S[:, :0], (32, 32))
    with pytest.raises(ValueError, match=r"filter_blocks: `image_size` must be at least 1 by 1, got 32 by 0\."):
        filter_blocks(S, (32, 0))
    with pytest.raises(TypeError, match=r"filter_blocks: `image_size` must be height and width, got 32\."):
        filter_blocks(S, 32)
    with pytest.raises(TypeError, match=r"`similarity` must be a floating-point tensor"):
        filter_blocks(S.long(), (32, 32))
