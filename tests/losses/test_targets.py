import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gresbox.losses.targets import (
    check_one_size,
    count_queries,
    instance_normaliser,
    mean_over,
    merged_targets,
    no_target_flags,
)
from gresbox.structures import GresTarget


def some(*counts, size=(4, 6)):
    return [GresTarget(torch.rand(count, *size) > 0.5) for count in counts]


def test_flags_and_merged_masks_of_a_batch():
    crowd = GresTarget(torch.zeros(0, 4, 6, dtype=torch.bool), merged=torch.ones(4, 6, dtype=torch.bool), no_target=False)
    targets = [*some(2, 0), crowd]
    assert no_target_flags(targets, torch.device("cpu")).tolist() == [False, True, False]
    merged = merged_targets(targets)
    assert merged.shape == (3, 4, 6)
    assert torch.equal(merged[0], targets[0].masks.any(0))
    assert not merged[1].any()
    assert merged[2].all()


def test_one_size():
    check_one_size("f", some(1, 2))
    with pytest.raises(ValueError, match=r"^f: `targets` must all have one image size in a batch, got \(3, 3\) and \(4, 6\)\.$"):
        check_one_size("f", [*some(1), *some(1, size=(3, 3))])


def test_the_normaliser():
    assert instance_normaliser("f", some(2, 3), None) == 5
    assert instance_normaliser("f", some(0, 0), None) == 1
    assert instance_normaliser("f", some(2, 3), 0.5) == 0.5
    number = torch.tensor(2.0)
    assert instance_normaliser("f", some(2, 3), number) is number
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^f: `num_instances` must be at least"):
            instance_normaliser("f", some(1), wrong)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 6))
def test_queries_are_those_that_a_matching_uses(counts, queries):
    matched, unmatched = count_queries(some(*counts), queries)
    assert matched == sum(min(count, queries) for count in counts)
    assert matched + unmatched == len(counts) * queries


@given(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.booleans())
def test_the_numbers_of_equal_parts_are_shares_of_the_whole(counts, as_tensor):
    total = max(sum(counts), 1)
    share = torch.tensor(total / 2) if as_tensor else total / 2
    whole = count_queries(some(*counts), 3, total)
    for part in (counts[:2], counts[2:]):
        halves = count_queries(some(*part), 3, share)
        assert [float(half) for half in halves] == [pytest.approx(number / 2) for number in whole]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("number", [40.0, 8.0])
def test_more_instances_than_queries_stay_in_range(number, as_tensor):
    number = torch.tensor(number) if as_tensor else number
    matched, unmatched = count_queries(some(0, 1), 4, number)
    assert float(matched) == 8
    assert float(unmatched) == 7  # of this batch itself
    crowded = count_queries(some(9, 0), 4, 9.0)
    assert crowded == pytest.approx((4.0, 4.0))


def test_a_mean_over_nothing_is_zero():
    assert mean_over(torch.tensor(0.0), 0.0) == 0
    assert mean_over(torch.tensor(0.0), torch.tensor(0.0)) == 0
    assert mean_over(torch.tensor(3.0), torch.tensor(2.0)) == 1.5
