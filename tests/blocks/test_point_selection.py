from __future__ import annotations

import pytest
import torch

from gresbox.blocks import DistScorePointSelector
from gresbox.blocks.point_selection import cell_centres


@pytest.mark.parametrize("case", range(8))
def test_golden(golden, case):
    arrays = golden("igvg_dsps")
    selector = DistScorePointSelector(int(arrays[f"c{case}_num"]), distance_weight=float(arrays[f"c{case}_W"]))
    indices, points = selector(torch.from_numpy(arrays[f"c{case}_map"]))
    assert indices.tolist() == arrays[f"c{case}_idx"].tolist()
    torch.testing.assert_close(points, torch.from_numpy(arrays[f"c{case}_points_xy"]), rtol=0, atol=1e-7)


def test_centres_find_their_cells_again():
    indices = torch.arange(3 * 5)
    points = cell_centres(indices, 3, 5)
    assert points.dtype == torch.float32
    column, row = (points * torch.tensor([5, 3])).floor().long().unbind(-1)
    assert torch.equal(row * 5 + column, indices)


def test_options_reach_the_op():
    score_map = torch.zeros(1, 4, 4)
    score_map[0, 1, 1], score_map[0, 1, 2] = 2.0, 1.0
    assert DistScorePointSelector(2, distance_weight=0.0)(score_map)[0].tolist() == [[5, 6]]
    near = DistScorePointSelector(2, distance_weight=0.1, normalize_distance=True)(score_map)[0].tolist()
    far = DistScorePointSelector(2, distance_weight=0.2, normalize_distance=False)(score_map)[0].tolist()
    assert (near, far) == ([[5, 6]], [[5, 15]])


def test_compile_and_autocast():
    selector, score_map = DistScorePointSelector(4), torch.randn(2, 5, 6)
    indices, points = selector(score_map)
    compiled = torch.compile(selector, fullgraph=True, backend="aot_eager")(score_map)
    assert torch.equal(compiled[0], indices)
    assert torch.equal(compiled[1], points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selector(score_map)[1], points)


def test_errors():
    with pytest.raises(ValueError, match="DistScorePointSelector: `num_points` must be at least 1, got 0"):
        DistScorePointSelector(0)
    with pytest.raises(ValueError, match="DistScorePointSelector: `distance_weight` must be in"):
        DistScorePointSelector(2, distance_weight=-1)
    with pytest.raises(ValueError, match=r"`num_points` must be in \[1, 16\], got 20"):  # a picture of 64 px in patches of 16
        DistScorePointSelector(20)(torch.zeros(1, 4, 4))
