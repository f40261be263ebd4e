"""Sampling maps at points and choosing uncertain ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gresbox.ops import point_sample, uncertain_points


def test_golden_point_sample(golden):
    data = {key: torch.from_numpy(x) for key, x in golden("m2f_losses").items()}
    values = point_sample(data["point_sample/input"], data["point_sample/coords"])
    torch.testing.assert_close(values, data["point_sample/out"], rtol=0, atol=1e-14)
    data = {key: torch.from_numpy(x) for key, x in golden("m2f_matcher").items()}
    values = point_sample(data["full/pred_masks"][:1], data["full/points"])
    torch.testing.assert_close(values[0], data["full/pred_sampled"], rtol=0, atol=1e-14)


def test_golden_uncertain_points(golden):
    data = {key.split("/")[1]: torch.from_numpy(x) for key, x in golden("m2f_losses").items() if key.startswith("uncertain/")}
    noise = torch.cat([data["candidates"], data["extra"]], dim=1)
    options = {"oversample": float(data["oversample"]), "importance": float(data["importance"]), "noise": noise}
    masks = data["logits"][:, 0]
    points = uncertain_points(masks, int(data["num_points"]), **options)
    torch.testing.assert_close(points, data["coords"], rtol=0, atol=0)
    sampled = uncertain_points(lambda x: point_sample(masks[:, None], x)[:, 0], int(data["num_points"]), **options)
    torch.testing.assert_close(sampled, points, rtol=0, atol=0)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_pixel_centres_read_the_pixels_and_outside_is_zero(batch, maps, height, width):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    masks = torch.randn(batch, maps, height, width, dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    centres = torch.stack([(x + 0.5) / width, (y + 0.5) / height], dim=-1).flatten(0, 1).expand(batch, -1, -1)
    torch.testing.assert_close(point_sample(masks, centres), masks.flatten(2))
    assert (point_sample(masks, centres + 3) == 0).all()
    weighted = point_sample(masks * 2 + masks.flip(1), centres.flip(1))
    torch.testing.assert_close(weighted, 2 * point_sample(masks, centres.flip(1)) + point_sample(masks.flip(1), centres.flip(1)))


def test_many_maps_are_read_as_few_are():
    masks, points = torch.randn(2, 70, 5, 6, dtype=torch.float64, requires_grad=True), torch.rand(2, 9, 2, dtype=torch.float64)
    few = torch.cat([point_sample(part, points) for part in masks.split(7, 1)], 1)
    many = point_sample(masks, points)
    assert torch.equal(many, few)
    torch.testing.assert_close(point_sample(masks.detach(), points), few.detach())
    outside = points * 3 - 1
    torch.testing.assert_close(point_sample(masks.detach(), outside), point_sample(masks, outside).detach())
    weight = torch.randn(few.shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((values * weight).sum(), masks)[0] for values in (many, few))
    torch.testing.assert_close(ours, theirs)


def test_what_is_not_read_may_be_infinite():
    masks, points = torch.randn(1, 70, 5, 6), torch.tensor([[[0.95, 0.95], [0.5, 1.05]]])  # the second is partly outside
    masks[:, :, 0, 0] = torch.inf
    torch.testing.assert_close(
        point_sample(masks, points), torch.cat([point_sample(part, points) for part in masks.split(7, 1)], 1)
    )


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_point_sample_of_nothing(shape):
    assert point_sample(torch.zeros(shape), torch.rand(shape[0], 5, 2)).shape == (shape[0], shape[1], 5)
    assert point_sample(torch.zeros(2, 3, 4, 4), torch.rand(2, 0, 2)).shape == (2, 3, 0)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))
def test_bool_maps_count_as_zero_and_one(batch, maps, height, width, count):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    masks = torch.rand(batch, maps, height, width) > 0.5
    points = (torch.rand(batch, count, 2, dtype=torch.float64) * 1.6 - 0.3).requires_grad_()  # some outside
    ours, wanted = point_sample(masks, points), point_sample(masks.double(), points)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=1e-6)
    weight = torch.randn(wanted.shape)
    ours, wanted = (torch.autograd.grad((values * weight).sum(), points)[0] for values in (ours, wanted))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    assert torch.equal(point_sample(masks.to(torch.uint8), points), point_sample(masks, points))


@pytest.mark.parametrize("maps", [torch.rand(2, 3, 5, 4) > 0.5, torch.rand(2, 70, 5, 4)])
def test_without_gradients_it_is_one_graph(maps):
    points = torch.rand(2, 7, 2)
    compiled = torch.compile(point_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps, points), point_sample(maps, points))


def test_bool_maps_are_never_floating_point_as_a_whole():
    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                self.values = max(self.values, out.numel())
            return out

    masks, points = torch.rand(2, 3, 60, 60) > 0.5, torch.rand(2, 10, 2)
    with Largest() as largest:
        point_sample(masks, points)
    assert 0 < largest.values <= 2 * 3 * 10 * 4


@given(st.integers(0, 3), st.integers(1, 9), st.sampled_from([1.0, 2.5, 3.0]), st.sampled_from([0.0, 0.5, 0.75, 1.0]))
def test_uncertain_points_come_from_the_noise(count, num_points, oversample, importance):
    torch.manual_seed(0)  # each example on its own, so that a failure repeats
    masks = torch.randn(count, 4, 5, requires_grad=True)
    candidates, chosen = int(num_points * oversample), int(num_points * importance)
    noise = torch.rand(count, candidates + num_points - chosen, 2)
    points = uncertain_points(masks, num_points, oversample=oversample, importance=importance, noise=noise)
    assert points.shape == (count, num_points, 2)
    assert not points.requires_grad
    assert torch.equal(points[:, chosen:], noise[:, candidates:])
    size = point_sample(masks[:, None], noise[:, :candidates])[:, 0].abs().sort(dim=1).values
    torch.testing.assert_close(point_sample(masks[:, None], points[:, :chosen])[:, 0].abs(), size[:, :chosen])


def test_the_generator_decides_the_points():
    masks = torch.randn(2, 8, 8)
    first, second, other = (uncertain_points(masks, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_uncertain_points_compile():
    torch._dynamo.reset()
    masks, noise = torch.randn(2, 8, 8), torch.rand(2, 16 * 3 + 4, 2)
    compiled = torch.compile(lambda m, n: uncertain_points(m, 16, noise=n), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(masks, noise), uncertain_points(masks, 16, noise=noise))
    drawn = torch.compile(lambda m: uncertain_points(m, 16), fullgraph=True, backend="aot_eager")(masks)
    assert ((drawn >= 0) & (drawn <= 1)).all()


def test_errors():
    masks = torch.zeros(2, 4, 4)
    with pytest.raises(ValueError, match=r"^uncertain_points: `noise` must be given with a function as `mask_logits`, got None\.$"):
        uncertain_points(lambda x: x[..., 0])
    with pytest.raises(ValueError, match=r"`noise` must be \(K, 26, 2\), got \(2, 25, 2\)"):
        uncertain_points(masks, 8, noise=torch.rand(2, 25, 2))
    with pytest.raises(ValueError, match=r"`noise` must be \(K, R, 2\) with K=2, got \(3, 26, 2\)"):
        uncertain_points(masks, 8, noise=torch.rand(3, 26, 2))
    with pytest.raises(ValueError, match=r"`importance` must be in \[0, 1\], got 2"):
        uncertain_points(masks, 8, importance=2)
    with pytest.raises(ValueError, match=r"`points` must be \(B, K, 2\) with B=1, got \(2, 3, 2\)"):
        point_sample(torch.zeros(1, 1, 4, 4), torch.zeros(2, 3, 2))
