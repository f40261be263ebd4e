import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gresbox.data.randomness import Stream, noise, scramble


def test_splitmix_reference_values():
    # the published first outputs of SplitMix64 for the state 1234567
    step, state, outputs = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        state += step
        outputs.append(scramble(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(0, 2**64 - 1), st.integers(1, 40))
def test_noise_is_the_scalar_stream(seed, count):
    step = 0x9E3779B97F4A7C15
    assert noise(seed, (count,)).tolist() == [scramble(seed + place * step) for place in range(1, count + 1)]


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4), st.integers(1, 1000))
def test_stream_depends_on_its_key_alone_and_stays_in_range(key, stop):
    first, second = Stream(*key), Stream(*key)
    draws = [first.below(stop) for _ in range(20)]
    assert draws == [second.below(stop) for _ in range(20)]
    assert all(0 <= draw < stop for draw in draws)
    assert Stream(*key).bits() != Stream(*key, 0).bits()


def test_draws_are_even():
    stream = Stream(5)
    counts = np.bincount([stream.below(6) for _ in range(6000)], minlength=6)
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # chi-square, 5 degrees of freedom, 0.1 %
    heavy = sum(stream.weighted((("a", 3), ("b", 1))) == "a" for _ in range(4000))
    assert abs(heavy - 3000) < 120
    assert {stream.between(-2, 2) for _ in range(200)} == {-2, -1, 0, 1, 2}


def test_weight_zero_is_never_drawn():
    stream = Stream(1)
    assert {stream.weighted((("a", 0), ("b", 1), ("c", 0))) for _ in range(50)} == {"b"}


def test_shuffled_keeps_the_items():
    stream = Stream(2)
    orders = {tuple(stream.shuffled((1, 2, 3))) for _ in range(200)}
    assert len(orders) == 6


def test_noise_fills_any_shape():
    assert noise(1, (3, 4, 3)).shape == (3, 4, 3)
    assert np.unique(noise(1, (1000,))).size == 1000
    with pytest.raises(TypeError):
        noise("seed", (2,))
