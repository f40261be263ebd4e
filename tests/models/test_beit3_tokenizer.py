"""BEiT-3's tokenizer: sentencepiece's own ids, InstanceVG's cleaning, transformers' saving and loading."""

from __future__ import annotations

import sys

import pytest

from gresbox.models.beit3 import beit3_tokenizer
from gresbox.models.processor import GresProcessor

TEXTS = (
    "the red circle on the left of two people running",
    "a woman sitting near three big elephants",
    "all of the dogs that are not standing",
    "persons with a blue-grey hat, or the man's bowl",
    "blue squares on top of a table behind the cat",
)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    """Train a small sentencepiece model: ``sentencepiece_file(kind)`` gives its path."""
    trainer = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: pip install 'gresbox[spm]'")
    pytest.importorskip("google.protobuf", reason="protobuf is not installed: pip install 'gresbox[spm]'")

    def train(kind):
        path = tmp_path_factory.mktemp(kind) / "beit3.spm"
        with path.open("wb") as file:
            trainer.SentencePieceTrainer.train(
                sentence_iterator=iter(TEXTS * 20),
                model_writer=file,
                vocab_size=70,
                model_type=kind,
                hard_vocab_limit=False,
                minloglevel=2,
            )
        return path

    return train


def encode_directly(path, text):
    """The ids by sentencepiece itself: pieces moved by one, the unknown one to 3, between <s> 0 and </s> 2."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text)
    return [0, *(piece + 1 if piece else 3 for piece in pieces), 2]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_tokenizer_gives_sentencepieces_own_ids(kind, sentencepiece_file):
    path = sentencepiece_file(kind)
    tokenizer = beit3_tokenizer(path, clean=False)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2, 3)
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    odd = (
        "Q \N{CIRCLED DIGIT ONE} of\u3000the  caf\N{LATIN SMALL LETTER E WITH ACUTE}",
        "\N{LATIN SMALL LIGATURE FI}re hat",
        "runnings",
    )
    for text in (*TEXTS, *odd):
        assert tokenizer(text).input_ids == encode_directly(path, text), text
    assert tokenizer.decode(tokenizer(TEXTS[0]).input_ids, skip_special_tokens=True) == TEXTS[0]


def test_the_tokenizer_is_transformers_own_for_a_unigram_model(sentencepiece_file, tmp_path):
    from transformers import XLMRobertaTokenizer

    path = sentencepiece_file("unigram")
    (tmp_path / "sentencepiece.bpe.model").write_bytes(path.read_bytes())
    theirs, ours = XLMRobertaTokenizer.from_pretrained(str(tmp_path)), beit3_tokenizer(path, clean=False)
    assert len(ours) == len(theirs)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours(text, "the cat").input_ids == theirs(text, "the cat").input_ids


def test_texts_are_cleaned_as_instancevg_does_and_words_keep_their_places(sentencepiece_file, tmp_path):
    from transformers import AutoTokenizer

    path = sentencepiece_file("unigram")
    tokenizer = beit3_tokenizer(path)
    text = "The MAN's blue-grey/red hat, (left)!?#"
    cleaned = "the mans blue grey red hat left"
    assert tokenizer(text).input_ids == encode_directly(path, cleaned)
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again(text).input_ids == tokenizer(text).input_ids
    assert (again.pad_token_id, again.mask_token_id) == (1, tokenizer.mask_token_id)
    processor = GresProcessor(32, again, max_tokens=50)
    batch = processor.process_texts([text, "the cat"])
    assert batch["input_ids"][1, batch["attention_mask"][1] == 0].unique().tolist() == [1]
    assert [word for word, _ in processor.words(text)] == ["The", "MAN's", "blue", "grey", "red", "hat", "left"]
    assert tokenizer("(?!)").input_ids == [0, 2]
    cut = GresProcessor(32, again, max_tokens=5).process_texts([text])["input_ids"][0]
    assert len(cut) == 5 and cut[0] == 0 and cut[-1] == 2, "three pieces between the ends"


def test_files_that_are_no_sentencepiece_model(sentencepiece_file, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    with pytest.raises(
        FileNotFoundError, match=r"beit3_tokenizer: `path` must be a sentencepiece model, got .*, which does not exist"
    ):
        beit3_tokenizer(tmp_path / "none.spm")
    path = tmp_path / "beit3.spm"
    path.write_bytes(b"<!doctype html> not found")
    with pytest.raises(ValueError, match=r"`path` must be a sentencepiece model, got beit3\.spm of another form"):
        beit3_tokenizer(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"`path` must be a model that begins with <unk>, <s>, </s>, got beit3\.spm without"):
        beit3_tokenizer(path)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(sentencepiece_file("unigram").read_bytes())
    proto.trainer_spec.model_type = 3
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=r"`path` must be a unigram or a BPE model, got kind 3"):
        beit3_tokenizer(path)


def test_without_sentencepiece_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "beit3.spm").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install 'gresbox\[spm\]'"):
        beit3_tokenizer(tmp_path / "beit3.spm")
