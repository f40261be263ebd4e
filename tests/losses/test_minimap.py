import pytest
import torch
from torch.nn import functional as F

from gresbox.losses import MinimapLoss, minimap_loss
from gresbox.testing import assert_matches_reference


def reference(minimap, merged, step):
    """Nearest resizing is the first pixel of each cell; the map is a logit."""
    truth = merged[:, ::step, ::step].to(minimap.dtype)
    probs = minimap.sigmoid()
    bce = -(truth * probs.log() + (1 - truth) * (1 - probs).log()).mean((1, 2))
    dice = 1 - (2 * (probs * truth).sum((1, 2)) + 1) / (probs.sum((1, 2)) + truth.sum((1, 2)) + 1)
    return bce, dice


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matches_its_definition_and_gradients(dtype):
    merged = torch.rand(3, 20, 25) > 0.5
    merged[2] = False
    assert_matches_reference(
        lambda m: minimap_loss(m, merged), lambda m: reference(m, merged, 5), [torch.rand(3, 4, 5)], dtype=dtype
    )


def test_is_the_official_one(golden):
    at = {name: torch.from_numpy(value) for name, value in golden("igvg_head").items() if value.dtype.kind in "fiu"}
    merged, minimap = at["gt_global"] > 0, at["attn_global"]
    nearest = F.interpolate(merged[:, None].float(), size=minimap.shape[-2:], mode="nearest")
    assert torch.equal(nearest, at["minimap_target"].float())
    assert (0.1 * MinimapLoss()(minimap, merged)).item() == pytest.approx(at["minimap_loss"].item(), rel=1e-5)


def test_the_loss_falls_as_attention_moves_to_the_target():
    merged = torch.zeros(1, 8, 8, dtype=torch.bool)
    merged[0, :4, :4] = True
    on = torch.zeros(1, 2, 2)
    on[0, 0, 0] = 1
    assert MinimapLoss()(on, merged) < MinimapLoss()(torch.full((1, 2, 2), 0.25), merged) < MinimapLoss()(on.flip(1), merged)


def test_area_keeps_small_objects_that_nearest_loses():
    merged = torch.zeros(1, 16, 16, dtype=torch.bool)
    merged[0, 5:8, 5:8] = True  # between the first pixels of the cells
    minimap = torch.rand(1, 2, 2)
    empty = minimap_loss(minimap, torch.zeros_like(merged))
    assert all(torch.equal(a, b) for a, b in zip(minimap_loss(minimap, merged), empty, strict=True))
    bce, _ = minimap_loss(minimap, merged, resize="area")
    truth = torch.tensor([[[9 / 64, 0], [0, 0]]])
    assert bce.item() == pytest.approx(F.binary_cross_entropy_with_logits(minimap, truth).item(), rel=1e-5)


def test_images_are_independent_and_half_precision_is_widened():
    minimap, merged = torch.rand(3, 4, 4), torch.rand(3, 16, 16) > 0.5
    bce, dice = minimap_loss(minimap, merged)
    for b in range(3):
        alone = minimap_loss(minimap[b : b + 1], merged[b : b + 1])
        torch.testing.assert_close(alone, (bce[b : b + 1], dice[b : b + 1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = minimap_loss(minimap.bfloat16(), merged)
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half, minimap_loss(minimap.bfloat16().float(), merged))


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (
            ValueError,
            lambda: minimap_loss(torch.rand(2, 16), torch.ones(2, 4, 4)),
            r"`minimap` must be \(B, h, w\), got \(2, 16\)",
        ),
        (ValueError, lambda: minimap_loss(torch.rand(2, 4, 4), torch.ones(3, 4, 4)), r"`merged` must be \(B, H, W\) with B=2, got"),
        (TypeError, lambda: minimap_loss(torch.ones(2, 4, 4).bool(), torch.ones(2, 4, 4)), r"`minimap` must be a floating-point"),
        (ValueError, lambda: minimap_loss(torch.rand(2, 4, 4), torch.ones(2, 4, 4), resize="cubic"), r"`resize` must be one of"),
    ],
)
def test_wrong_input_is_one_clear_line(kind, call, message):
    with pytest.raises(kind, match=f"^minimap_loss: {message}"):
        call()


def test_wrong_options_are_errors():
    with pytest.raises(ValueError, match=r"^MinimapLoss: `resize` must be one of 'nearest', 'area', got 'cubic'"):
        MinimapLoss(resize="cubic")
