from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

from gresbox.blocks import AlignmentAwareMasking, RandomBlockMasking
from gresbox.ops import filter_blocks, inner_tokens, match_patches, random_projections
from gresbox.structures import GresTarget

IMAGES, VISUAL, TOKENS = torch.randn(2, 3, 48, 64), torch.randn(2, 8, 6, 8), torch.randn(2, 5, 6)


def masking(**options) -> AlignmentAwareMasking:
    return AlignmentAwareMasking(8, 6, **{"align_dim": 256, "block": 8, **options})


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("unit", ["block", "pixel"])
def test_golden_from_features_to_masked_picture(golden, unit):
    arrays = {name: torch.from_numpy(array) for name, array in golden("aml_paper_end2end").items()}
    block = AlignmentAwareMasking(
        24,
        18,
        projection=(arrays["W_i"], arrays["W_t"]),
        scale=float(arrays["scale"]),
        threshold=float(arrays["tau"]),
        drop=float(arrays["rho"]),
        block=tuple(arrays["block"].tolist()),
        unit=unit,
    )
    rows, columns = arrays["grid"].tolist()
    visual = arrays["V"].float().mT.unflatten(2, (rows, columns))
    images = arrays["image_u8"].float() / 255
    noise = arrays[f"noise_{unit}"].float()
    masked, removed, similarity = block(images, visual, arrays["T"].float(), arrays["token_mask"], noise=noise)
    wanted = arrays[f"block_mask_{unit}"].repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(removed, wanted)
    assert torch.equal(masked, torch.where(wanted[:, None], 0, images))
    assert (similarity.flatten(1).double() - arrays["score"]).abs().max() <= 1e-6
    assert block.shares["masked"].item() == pytest.approx(wanted.float().mean().item())


def test_it_is_the_two_operations_together():
    block = masking(scale=40.0, threshold=0.5, seed=4)
    masked, removed, similarity = block(IMAGES, VISUAL, TOKENS, generator=seeded())
    want = match_patches(VISUAL.flatten(2).mT, TOKENS, None, *random_projections(8, 6, 256, seed=4), scale=40.0)
    torch.testing.assert_close(similarity.flatten(1), want, rtol=1e-4, atol=1e-6)
    assert torch.equal(removed, filter_blocks(similarity, (48, 64), threshold=0.5, block=8, generator=seeded()))
    assert torch.equal(masked, IMAGES * ~removed[:, None])
    assert removed.any()
    assert block.scale != masking().scale == 2 * math.sqrt(256)


def test_the_projections_are_no_part_of_a_checkpoint_and_the_same_by_their_seed():
    torch.manual_seed(1)
    first = masking(seed=2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other = masking(seed=2), masking(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.state_dict()
    assert not list(first.parameters())
    assert torch.equal(first.text_to_visual, second.text_to_visual)
    assert not torch.equal(first.text_to_visual, other.text_to_visual)
    second.redraw(3)
    assert torch.equal(second.text_to_visual, other.text_to_visual)
    twin = copy.deepcopy(other)
    twin(IMAGES, VISUAL, TOKENS)
    assert "weak" in twin.shares
    assert not other.shares


def test_kinds_of_projection():
    visual, tokens = torch.randn(2, 6, 4, 4), torch.randn(2, 5, 6)
    images = torch.randn(2, 3, 16, 16)

    def similarity(**options):
        return AlignmentAwareMasking(6, 6, block=4, **options)(images, visual, tokens)[2]

    true = match_patches(visual.flatten(2).mT, tokens, scale=20.0).view(2, 4, 4)
    torch.testing.assert_close(similarity(projection="none", scale=20.0), true)
    shared = similarity(projection="shared", scale=20.0, align_dim=2**15)
    assert (shared - true).abs().max() < 0.1  # a shared matrix preserves the match
    assert (similarity(projection="independent", scale=20.0) - true).abs().mean() > 0.1
    left, right = torch.randn(6, 3), torch.randn(6, 3)
    given = AlignmentAwareMasking(6, 6, projection=(left, right))
    assert given.align_dim == 3
    assert given.scale == 2 * math.sqrt(3)
    none = AlignmentAwareMasking(6, 6, projection="none")
    assert none.align_dim == 6  # the common space is the features' own
    assert none.scale == 2 * math.sqrt(6)


def test_no_gradient_to_features_and_none_to_what_is_hidden():
    images, visual, tokens = (part.clone().requires_grad_() for part in (IMAGES, VISUAL, TOKENS))
    masked, removed, similarity = masking(threshold=0.6, drop=0.5)(images, visual, tokens)
    assert not similarity.requires_grad
    grads = torch.autograd.grad(masked.sum(), (images, visual, tokens), allow_unused=True)
    assert grads[1:] == (None, None)
    assert torch.equal(grads[0], (~removed[:, None]).expand_as(images).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_any_dtype_are_matched_in_float32(dtype):
    visual, tokens = VISUAL.to(dtype), TOKENS.to(dtype)
    want = masking()(IMAGES, visual.float(), tokens.float(), generator=seeded())
    got = masking()(IMAGES.to(dtype), visual, tokens, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = masking()(IMAGES, visual, tokens, generator=seeded())
    for result in (got, under):
        assert torch.equal(result[2], want[2])
        assert result[2].dtype == torch.float32
        assert torch.equal(result[1], want[1])
    assert got[0].dtype == dtype


def test_special_tokens_can_be_left_out():
    valid = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    _, _, similarity = masking(special_tokens=False)(IMAGES, VISUAL, TOKENS, valid)
    torch.testing.assert_close(similarity, masking()(IMAGES, VISUAL, TOKENS, inner_tokens(valid))[2])
    assert (similarity[1] == 1).all()  # nothing but marks: nothing to match, nothing hidden
    every = masking(special_tokens=False)(IMAGES, VISUAL, TOKENS)[2]
    torch.testing.assert_close(every, masking()(IMAGES, VISUAL, TOKENS[:, 1:-1])[2])


def target(*corners: tuple[int, int], size: tuple[int, int] = (48, 64)) -> GresTarget:
    masks = torch.zeros(len(corners), *size, dtype=torch.bool)
    for mask, (row, column) in zip(masks, corners, strict=True):
        mask[row : row + 4, column : column + 4] = True
    return GresTarget(masks)


def test_targets_are_counted_and_can_be_protected():
    targets = [target((0, 0), (24, 30)), target()]
    everything = {"threshold": 1.0, "drop": 1.0}
    block = masking(**everything)
    _, removed, _ = block(IMAGES, VISUAL, TOKENS, targets=targets)
    assert removed.all()
    assert block.shares["target_hidden"] == 1
    guarded = masking(protect_target=True, **everything)
    masked, removed, _ = guarded(IMAGES, VISUAL, TOKENS, targets=targets)
    assert guarded.shares["target_hidden"] == 0
    assert (~removed[0]).sum() == 3 * 64  # one block in the corner, two that the second instance touches
    assert removed[1].all()
    assert torch.equal(masked[0][:, ~removed[0]], IMAGES[0][:, ~removed[0]])
    pixels = torch.stack([item.merged for item in targets])
    assert torch.equal(guarded(IMAGES, VISUAL, TOKENS, targets=pixels)[1], removed)
    small = [target((0, 0), (12, 15), size=(24, 32)), target(size=(24, 32))]  # truth at half the size: every pixel counts
    _, removed, _ = guarded(IMAGES, VISUAL, TOKENS, targets=small)
    assert not removed[0, :8, :8].any()
    assert not removed[0, 24:32, 30:38].any()
    nothing = masking(**everything)
    nothing(IMAGES, VISUAL, TOKENS, targets=[target(), target()])
    assert nothing.shares["target_hidden"] == 0


def test_shares():
    block = masking(threshold=0.5, drop=1.0)
    _, removed, similarity = block(IMAGES, VISUAL, TOKENS)
    weak = torch.nn.functional.interpolate(similarity[:, None], (48, 64), mode="bilinear")[:, 0] < 0.5
    assert block.shares["weak"].item() == pytest.approx(weak.float().mean().item())
    assert block.shares["candidate"].item() == pytest.approx(removed.float().mean().item())  # everything weak was dropped
    assert "target_hidden" not in block.shares


@pytest.mark.parametrize(("threshold", "what"), [(0.0, "nothing"), (1.0, "everything")])
def test_it_warns_once_when_the_threshold_separates_nothing(threshold, what):
    block = masking(threshold=threshold)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            block(IMAGES, VISUAL, TOKENS)
    with pytest.warns(
        UserWarning, match=f"AlignmentAwareMasking: {what} was weak for 100 steps at scale 32 and threshold {threshold}"
    ):
        block(IMAGES, VISUAL, TOKENS)
    for _ in range(200):
        block(IMAGES, VISUAL, TOKENS)


def test_it_does_not_warn_where_some_pictures_are_weak():
    block = masking(threshold=0.5)
    for index in range(250):
        block.threshold = 0.5 if index % 90 == 0 else 1.0
        block(IMAGES, VISUAL, TOKENS)


def test_fill():
    everything = {"threshold": 1.0, "drop": 1.0}
    assert (masking(fill=0.5, **everything)(IMAGES, VISUAL, TOKENS)[0] == 0.5).all()
    masked = masking(fill=(1.0, 2.0, 3.0), **everything)(IMAGES, VISUAL, TOKENS)[0]
    assert masked[1, :, 5, 5].tolist() == [1.0, 2.0, 3.0]


def test_the_line_about_it_names_everything_that_decides_what_is_hidden():
    lines = {masking().extra_repr(), RandomBlockMasking().extra_repr()}
    assert not any("seed" in line or "fill" in line for line in lines)
    for options in ({"seed": 3}, {"special_tokens": False}, {"protect_target": True}, {"fill": 0.5}, {"fill": (1.0, 2.0, 3.0)}):
        ((name, value),) = options.items()
        assert f"{name}={value}" in masking(**options).extra_repr()
        if name in ("protect_target", "fill"):
            assert f"{name}={value}" in RandomBlockMasking(**options).extra_repr()


def test_relative_threshold_and_exact_share():
    block = masking(threshold=0.5, relative=True, drop=0.5, mode="exact")
    _, removed, _ = block(IMAGES, VISUAL, TOKENS)
    assert 0.3 < block.shares["weak"] < 0.7
    twice = masking(threshold=1.0, drop=0.5, mode="exact")(IMAGES, VISUAL, TOKENS)[1]
    assert (twice.flatten(1).sum(1) == 24 * 64).all()
    assert removed.any()


def test_random_blocks_are_the_same_choice_with_everything_weak():
    block = RandomBlockMasking(block=8, drop=0.3)
    masked, removed, _ = block(IMAGES, generator=seeded())
    assert torch.equal(removed, masking(threshold=1.0, drop=0.3)(IMAGES, VISUAL, TOKENS, generator=seeded())[1])
    assert torch.equal(masked, IMAGES * ~removed[:, None])
    assert block.shares["weak"] == 1
    guarded = RandomBlockMasking(block=8, drop=1.0, protect_target=True)
    guarded(IMAGES, targets=[target((0, 0)), target()])
    assert guarded.shares["target_hidden"] == 0


def test_compiles_as_one_graph():
    block = masking(threshold=0.5)
    noise = torch.rand(2, 6, 8)
    want = block(IMAGES, VISUAL, TOKENS, torch.ones(2, 5, dtype=torch.long), noise=noise)
    torch._dynamo.reset()
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(
        IMAGES, VISUAL, TOKENS, torch.ones(2, 5, dtype=torch.long), noise=noise
    )
    torch.testing.assert_close(got, want)


BAD = {
    "threshold": (lambda: masking(threshold=1.2), ValueError, "AlignmentAwareMasking: `threshold` must be in [0, 1], got 1.2."),
    "drop": (lambda: masking(drop=-1), ValueError, "AlignmentAwareMasking: `drop` must be in [0, 1], got -1."),
    "block": (lambda: masking(block=-4), ValueError, "AlignmentAwareMasking: `block` must be at least 1, got -4."),
    "unit": (lambda: masking(unit="row"), ValueError, "AlignmentAwareMasking: `unit` must be one of 'block', 'pixel'"),
    "mode": (lambda: masking(mode="top"), ValueError, "AlignmentAwareMasking: `mode` must be one of 'bernoulli', 'exact'"),
    "scale": (lambda: masking(scale=-2.0), ValueError, "AlignmentAwareMasking: `scale` must be at least 0, got -2.0."),
    "projection": (lambda: masking(projection="learned"), ValueError, "AlignmentAwareMasking: `projection` must be one of"),
    "shared over two sizes": (lambda: masking(projection="shared"), ValueError, "`text_dim` must be visual_dim=8 for a shared"),
    "none over two sizes": (lambda: masking(projection="none"), ValueError, "`text_dim` must be visual_dim=8 without a projection"),
    "matrices of other channels": (
        lambda: masking(projection=(torch.rand(8, 4), torch.rand(5, 4))),
        ValueError,
        "AlignmentAwareMasking: `projection[1]` must be (6, D), got (5, 4).",
    ),
    "matrices that do not meet": (
        lambda: masking(projection=(torch.rand(8, 4), torch.rand(6, 5))),
        ValueError,
        "`projection[1]` must be (6, D) with D=4, got (6, 5).",
    ),
    "one matrix": (
        lambda: masking(projection=torch.rand(8, 4)),
        TypeError,
        "AlignmentAwareMasking: `projection` must be a name or two matrices, got Tensor.",
    ),
    "no matrices": (lambda: masking(projection=None), TypeError, "`projection` must be a name or two matrices, got NoneType."),
    "a word as scale": (lambda: masking(scale="auto"), TypeError, "AlignmentAwareMasking: `scale` must be a number, got 'auto'."),
    "a colour's name": (
        lambda: masking(fill="black"),
        TypeError,
        "AlignmentAwareMasking: `fill` must be a number or one per channel, got 'black'.",
    ),
    "no colour": (lambda: RandomBlockMasking(fill=None), TypeError, "RandomBlockMasking: `fill` must be a number or one per"),
    "redrawn matrices": (
        lambda: masking(projection=(torch.rand(8, 4), torch.rand(6, 4))).redraw(1),
        ValueError,
        "AlignmentAwareMasking: `projection` must be one of 'independent', 'shared', 'none', got 'given'.",
    ),
    "images of another batch": (
        lambda: masking()(IMAGES[:1], VISUAL, TOKENS),
        ValueError,
        "AlignmentAwareMasking: `visual` must be (B, 8, h, w) with B=1, got (2, 8, 6, 8).",
    ),
    "other channels": (
        lambda: masking()(IMAGES, torch.rand(2, 9, 6, 8), TOKENS),
        ValueError,
        "AlignmentAwareMasking: `visual` must be (B, 8, h, w), got (2, 9, 6, 8).",
    ),
    "other tokens": (lambda: masking()(IMAGES, VISUAL, VISUAL[0]), ValueError, "AlignmentAwareMasking: `tokens` must be (B, L, 6)"),
    "valid of another length": (
        lambda: masking()(IMAGES, VISUAL, TOKENS, torch.ones(2, 4, dtype=torch.long)),
        ValueError,
        "AlignmentAwareMasking: `valid` must be (B, L) with L=5, got (2, 4).",
    ),
    "bytes": (lambda: masking()(IMAGES.byte(), VISUAL, TOKENS), TypeError, "`images` must be a floating-point tensor"),
    "noise of pixels": (
        lambda: masking()(IMAGES, VISUAL, TOKENS, noise=torch.rand(2, 48, 64)),
        ValueError,
        "AlignmentAwareMasking: `noise` must be (B, ceil(H / block), ceil(W / block)) = (2, 6, 8) for unit='block'",
    ),
    "targets missing": (
        lambda: masking(protect_target=True)(IMAGES, VISUAL, TOKENS),
        ValueError,
        "AlignmentAwareMasking: `targets` must be given with protect_target=True, got None.",
    ),
    "targets as dicts": (
        lambda: masking()(IMAGES, VISUAL, TOKENS, targets=[{}, {}]),
        TypeError,
        "AlignmentAwareMasking: `targets` must be a list of GresTarget, got dict.",
    ),
    "two colours": (
        lambda: masking(fill=(1.0, 2.0))(IMAGES, VISUAL, TOKENS),
        ValueError,
        "AlignmentAwareMasking: `fill` must be one number per channel of the images, 3, got 2.",
    ),
    "random drop": (lambda: RandomBlockMasking(drop=2), ValueError, "RandomBlockMasking: `drop` must be in [0, 1], got 2."),
    "random bytes": (
        lambda: RandomBlockMasking()(IMAGES.byte()),
        TypeError,
        "RandomBlockMasking: `images` must be a floating-point",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, expected = BAD[case]
    with pytest.raises(error) as caught:
        call()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"relative": True}], ids=["absolute", "relative"])
@pytest.mark.parametrize("grid", [(6, 8), (7, 7)], ids=str)
def test_a_text_of_only_padding_hides_nothing(grid, options):
    block = masking(drop=1.0, **options)
    masked, removed, similarity = block(IMAGES, torch.randn(2, 8, *grid), TOKENS, torch.zeros(2, 5, dtype=torch.long))
    assert (similarity == 1).all()
    assert not removed.any()
    assert torch.equal(masked, IMAGES)
