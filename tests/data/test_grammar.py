import pytest

from gresbox.data import SyntheticGRES, vocabulary
from gresbox.data.grammar import Noun, draw_noun
from gresbox.data.randomness import Stream
from gresbox.data.scenes import LEVELS, draw_scene


@pytest.mark.parametrize("level", list(LEVELS))
def test_vocabulary_is_exactly_the_words_that_occur(level):
    seen = set()
    for split, count in (("train", 1500), ("testB", 500)):
        data = SyntheticGRES(split, count, level=level, seed=3)
        for index in range(count):
            text = data.scene(index)[1].text
            assert text == " ".join(text.split())
            seen |= set(text.split())
    rare = {"five"} if level == "full" else set()  # five of a kind may be missing in so few scenes
    assert seen | rare == set(vocabulary(level))


def test_vocabulary_is_sorted_and_names_levels():
    assert list(vocabulary("full")) == sorted(set(vocabulary("full")))
    with pytest.raises(ValueError, match=r"vocabulary: `level` must be one of 'basic', 'full', got 'hard'\."):
        vocabulary("hard")


def test_nouns_read_as_english():
    noun = Noun("circle", "red", "large", "striped")
    assert noun.text() == "large striped red circle"
    assert noun.text(plural=True) == "large striped red circles"
    assert Noun("cross").text(plural=True) == "crosses"
    assert Noun(colour="blue", generic="object").text() == "blue object"


def test_an_unsaid_attribute_does_not_matter():
    level = LEVELS["full"]
    for index in range(30):
        stream = Stream(index)
        scene = draw_scene(stream, level, "train", 64)
        noun = draw_noun(stream, scene, level)
        assert noun.matches(scene)
        for place, thing in enumerate(scene.objects):
            same = all(getattr(noun, name) in (None, getattr(thing, name)) for name in ("shape", "colour", "size", "pattern"))
            assert (place in noun.matches(scene)) == same
