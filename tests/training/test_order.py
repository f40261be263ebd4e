from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gresbox.training.order import StepOrder


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 40),
    share=st.integers(1, 4),
    world=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    start=st.integers(0, 5),
)
def test_a_step_holds_the_same_samples_however_it_is_shared(length, share, world, accumulate, start):
    batch, steps = share * world * accumulate, 6
    whole = list(StepOrder(length, batch, steps, seed=3))
    shares = [
        list(StepOrder(length, batch, steps, accumulate=accumulate, rank=rank, world=world, seed=3, start=start))
        for rank in range(world)
    ]
    for step in range(start, steps):
        micro = range((step - start) * accumulate, (step - start + 1) * accumulate)
        together = list(chain.from_iterable(shares[rank][m] for m in micro for rank in range(world)))
        assert together == whole[step]


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 5))
def test_every_epoch_holds_every_sample_once(length, batch, seed):
    steps = -(-3 * length // batch)
    indices = [index for step in StepOrder(length, batch, steps, seed=seed) for _, index in step]
    for epoch in range(3):
        assert sorted(indices[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_positions_count_and_seeds_differ():
    order = list(StepOrder(50, 10, 10, seed=0))
    assert [position for step in order for position, _ in step] == list(range(100))
    first, second = order[:5], order[5:]
    assert [i for step in first for _, i in step] != [i for step in second for _, i in step]
    assert order != list(StepOrder(50, 10, 10, seed=1))
    assert len(StepOrder(50, 10, 10, accumulate=2, start=7)) == 6


def test_an_uneven_share_is_refused():
    with pytest.raises(ValueError, match=r"`batch` must be a multiple of processes x accumulate = 2 x 3, got 8\."):
        StepOrder(10, 8, 1, accumulate=3, world=2)
    with pytest.raises(ValueError, match="at least one sample"):
        StepOrder(0, 8, 1)
