"""Dist-Score point selection against Algorithm 1 written out in float64, and what it must be in the limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gresbox.ops import point_selection, select_points


def sums(scores, chosen, weight, diagonal):
    """The sums among which Algorithm 1 chooses next, by cell; a chosen cell has none."""
    height, width = scores.shape
    out = {}
    for cell in range(height * width):
        if cell not in chosen:
            away = [math.hypot(cell // width - c // width, cell % width - c % width) for c in chosen]
            out[cell] = float(scores[cell // width, cell % width]) + (weight * min(away) / diagonal if away else 0.0)
    return out


def algorithm_1(scores, count, weight, diagonal):
    chosen = []
    for _ in range(count):
        options = sums(scores, chosen, weight, diagonal)
        chosen.append(max(options, key=lambda cell: (options[cell], -cell)))
    return chosen


maps = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(0, 10**6))


def random_map(shape, dtype=torch.float64):
    *size, seed = shape
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden(golden, case, dtype):
    arrays = golden("igvg_dsps")
    score_map = torch.from_numpy(arrays[f"c{case}_map"]).to(dtype)
    indices = select_points(score_map, int(arrays[f"c{case}_num"]), distance_weight=float(arrays[f"c{case}_W"]))
    assert indices.tolist() == arrays[f"c{case}_idx"].tolist()


@given(maps, st.sampled_from([0.0, 0.003, 0.3, 4.0]), st.booleans(), st.booleans())
def test_equals_algorithm_1(shape, weight, normalized, squashed):
    score_map = random_map(shape)
    _, height, width = score_map.shape
    count = min(height * width, 7)
    options = {"distance_weight": weight, "normalize_distance": normalized, "apply_sigmoid": squashed}
    scores = score_map.sigmoid() if squashed else score_map
    diagonal = math.hypot(height, width) if normalized else 1.0
    want = [algorithm_1(image, count, weight, diagonal) for image in scores]
    assert select_points(score_map, count, **options).tolist() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_choice_is_best_up_to_rounding(dtype):
    """In low precision scores tie and distances round, so the choice is checked, not the index."""
    score_map = random_map((4, 16, 20, 0), dtype)
    indices = select_points(score_map, 12, distance_weight=0.2)
    for scores, chosen in zip(score_map.double().sigmoid(), indices.tolist(), strict=True):
        for step, cell in enumerate(chosen):
            options = sums(scores, chosen[:step], 0.2, math.hypot(16, 20))
            assert options[cell] >= max(options.values()) - 1e-6


@given(maps, st.sampled_from([0.0, 0.003, 1e30]))
def test_points_are_distinct_and_cover_the_map_in_the_end(shape, weight):
    score_map = random_map(shape, torch.float32)
    cells = score_map[0].numel()
    indices = select_points(score_map, cells, distance_weight=weight)
    assert all(sorted(row) == list(range(cells)) for row in indices.tolist())


@given(maps)
def test_images_do_not_see_each_other(shape):
    score_map = random_map(shape, torch.float32)
    count = min(5, score_map[0].numel())
    indices = select_points(score_map, count)
    order = torch.randperm(len(score_map))
    assert torch.equal(select_points(score_map[order], count), indices[order])
    assert torch.equal(select_points(score_map[:1], count), indices[:1])


@given(maps)
def test_without_distance_it_is_top_k(shape):
    score_map = random_map(shape)
    count = min(9, score_map[0].numel())
    indices = select_points(score_map, count, distance_weight=0.0)
    assert torch.equal(indices, score_map.flatten(1).topk(count).indices)


def farthest_points(score_map, count):
    """Farthest-point sampling from the highest score on; of cells equally far the one with the higher score."""
    _, width = score_map.shape
    scores = score_map.flatten().tolist()
    chosen = [max(range(len(scores)), key=lambda cell: scores[cell])]
    while len(chosen) < count:
        squares = [
            min((cell // width - c // width) ** 2 + (cell % width - c % width) ** 2 for c in chosen) for cell in range(len(scores))
        ]
        chosen.append(max(range(len(scores)), key=lambda cell: (squares[cell], scores[cell])))
    return chosen


@given(maps)
def test_a_huge_weight_is_farthest_point_sampling(shape):
    score_map = random_map(shape)
    count = min(8, score_map[0].numel())
    indices = select_points(score_map, count, distance_weight=1e6)
    scores = score_map.sigmoid()
    assert indices.tolist() == [farthest_points(image, count) for image in scores]


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_ties_go_to_the_lowest_index(weight):
    indices = select_points(torch.zeros(2, 3, 3), 5, distance_weight=weight)
    assert indices.tolist() == [[0, 1, 2, 3, 4] if weight == 0 else [0, 8, 2, 6, 4]] * 2


def test_exactly_equal_distances_tie_in_float32():
    """(3, 4) and (5, 0) are both 5 away from the corner: the lower index wins, whatever the weight."""
    scores = torch.full((1, 6, 6), -3.0)
    scores[0, 0, 0] = 9.0
    scores[0, 3, 4] = scores[0, 4, 3] = scores[0, 5, 0] = scores[0, 0, 5] = 3.0
    for weight in torch.linspace(0.001, 0.05, 50).tolist():
        assert select_points(scores, 2, distance_weight=weight).tolist() == [[0, 5]]


@pytest.mark.parametrize("squashed", [True, False])
def test_what_is_no_number_comes_last(squashed):
    inf, nan = math.inf, math.nan
    score_map = torch.tensor([[[nan, 1.0, -inf], [inf, nan, 0.5]]])
    indices = select_points(score_map, 6, distance_weight=0.0, apply_sigmoid=squashed)
    assert sorted(indices[0].tolist()) == list(range(6))
    assert indices[0, :3].tolist() == [3, 1, 5]
    assert select_points(torch.tensor([[[nan, -2.0]]]), 1, apply_sigmoid=False).tolist() == [[1]]


def test_no_gradient_and_no_written_input():
    score_map = torch.randn(2, 4, 4, requires_grad=True)
    before = score_map.detach().clone()
    indices = select_points(score_map, 16, apply_sigmoid=False)
    assert not indices.requires_grad and indices.dtype == torch.int64
    assert torch.equal(score_map, before)


def test_an_empty_batch():
    for backend in ("auto", "eager"):
        assert select_points(torch.zeros(0, 3, 3), 2, backend=backend).shape == (0, 2)


@given(maps, st.sampled_from([0.0, 0.003, 0.3, 1e30]), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_table_and_running_minimum_choose_the_same_cells(shape, weight, few_values, dtype):
    """Also where most sums tie."""
    score_map = random_map(shape, dtype)
    options = {"distance_weight": weight, "apply_sigmoid": not few_values}
    score_map = score_map.round() if few_values else score_map
    count = min(score_map[0].numel(), 20)
    by_table = select_points(score_map, count, **options)
    assert torch.equal(by_table, select_points(score_map, count, backend="eager", **options))


@pytest.mark.parametrize(("height", "width"), [(20, 20), (7, 33), (33, 7), (1, 50), (50, 1)])
def test_the_table_holds_the_distances(height, width):
    bonuses, starts = point_selection._table(height, width, 0.5, torch.float32, torch.device("cpu"))
    cells = torch.arange(height * width)
    down, across = cells[:, None] // width - cells // width, cells[:, None] % width - cells % width
    expected = (down**2 + across**2).float().sqrt() * 0.5
    assert torch.equal(bonuses[starts], expected.fill_diagonal_(-math.inf))
    assert bonuses.untyped_storage().nbytes() == 4 * width**2 * (2 * height - 1)


def test_a_large_map_has_no_table():
    size = (110, 100)
    assert size[1] ** 2 * (2 * size[0] - 1) > point_selection._TABLE_VALUES
    point_selection._table.cache_clear()
    score_map = torch.randn(1, *size)
    indices = select_points(score_map, 4, distance_weight=0.1)
    assert point_selection._table.cache_info().currsize == 0
    assert torch.equal(indices, select_points(score_map, 4, distance_weight=0.1, backend="eager"))


def test_the_table_serves_every_later_call():
    """Made in inference mode or under another default device, it is read outside."""
    point_selection._table.cache_clear()
    score_map = torch.randn(2, 5, 6)
    with torch.inference_mode(), torch.device("meta"):
        first = select_points(score_map, 4)
    assert point_selection._table.cache_info().currsize == 1
    assert torch.equal(select_points(score_map.requires_grad_(), 4), first)
    assert torch.equal(select_points(score_map.detach(), 4, backend="eager"), first)


def test_tensors_without_data_make_no_table():
    point_selection._table.cache_clear()
    with FakeTensorMode() as mode:
        assert select_points(mode.from_tensor(torch.zeros(2, 5, 6)), 4).shape == (2, 4)
    assert point_selection._table.cache_info().currsize == 0


def test_the_registered_op_passes_pytorchs_own_checks():
    torch.library.opcheck(torch.ops.gresbox.select_points.default, (torch.rand(2, 5, 6), 4, 0.1))
    torch.library.opcheck(torch.ops.gresbox.select_points.default, (torch.rand(2, 6, 5).mT, 1, 0.0))


def test_compile_export_autocast_and_strides():
    score_map = torch.randn(3, 8, 9)
    indices = select_points(score_map, 6)
    compiled = torch.compile(lambda scores: select_points(scores, 6), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(score_map), indices)

    class Selection(torch.nn.Module):
        def forward(self, scores):
            return select_points(scores, 6)

    assert torch.equal(torch.export.export(Selection(), (score_map,)).module()(score_map), indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(select_points(score_map, 6), indices)
    assert torch.equal(select_points(score_map.mT.contiguous().mT, 6), indices)


def test_errors():
    score_map = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"^select_points: `num_points` must be in \[1, 12\], got 13\.$"):
        select_points(score_map, 13)
    with pytest.raises(ValueError, match=r"`num_points` must be in \[1, 12\], got 0"):
        select_points(score_map, 0)
    with pytest.raises(ValueError, match=r"`distance_weight` must be in \[0, 1e\+30\], got -0\.1"):
        select_points(score_map, 2, distance_weight=-0.1)
    with pytest.raises(ValueError, match=r"`distance_weight` must be in \[0, 1e\+30\], got nan"):
        select_points(score_map, 2, distance_weight=math.nan)
    with pytest.raises(ValueError, match=r"`score_map` must be \(B, H, W\), got \(3, 4\)"):
        select_points(score_map[0], 2)
    with pytest.raises(ValueError, match=r"^select_points: `backend` must be one of 'auto', 'eager', 'triton', got 'cuda'\.$"):
        select_points(score_map, 2, backend="cuda")
    with pytest.raises(RuntimeError, match=r"^select_points: backend='triton' is not possible here: "):
        select_points(score_map, 2, backend="triton")
    with pytest.raises(TypeError, match=r"`score_map` must be a floating-point tensor, got torch\.int64"):
        select_points(score_map.long(), 2)
