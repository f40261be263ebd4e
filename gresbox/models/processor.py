"""From pictures and strings to a model's inputs: resize, normalise, tokenise. Saved with the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["GresProcessor", "word_tokenizer", "words_in"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class GresProcessor:
    """Prepare pictures and expressions for a model.

    Pictures are resized to a square without keeping the aspect, as the field does (paper Sec. 4.1: 480 x 480), bilinearly with
    antialiasing, and normalised with ImageNet's mean and standard deviation. Texts are cut at ``max_tokens`` with the end token
    kept and padded on the right.

    Args:
        image_size: Side of the square, in pixels.
        tokenizer: A transformers tokenizer, or None until one is given (then texts cannot be processed).
        max_tokens: Longest text, special tokens included.
        mean: Mean of each colour channel, for values in [0, 1].
        std: Standard deviation of each channel.

    Shape:
        - ``images``: PIL images or uint8 tensors ``(3, H, W)``, one per text; returns ``images`` ``(B, 3, S, S)`` float32,
          ``input_ids`` and ``attention_mask`` ``(B, L)`` int64, L = the longest text of the batch.

    Raises:
        RuntimeError: If there is no tokenizer yet.
        TypeError: If a picture or a text has another type.
        ValueError: If there are no pictures, their number differs from the texts', or a text is empty.

    Example:
        >>> import torch
        >>> processor = GresProcessor(32, word_tokenizer(["red", "circle", "the"]))
        >>> batch = processor([torch.zeros(3, 48, 64, dtype=torch.uint8)], ["the red circle"])
        >>> tuple(batch["images"].shape), batch["input_ids"].tolist()
        ((1, 3, 32, 32), [[2, 6, 5, 4, 3]])
    """

    def __init__(
        self,
        image_size: int,
        tokenizer: Any = None,
        *,
        max_tokens: int = 20,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.image_size = image_size
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.mean = tuple(mean)
        self.std = tuple(std)

    def __call__(self, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Tensor]:
        if len(images) != len(texts):
            raise ValueError(f"GresProcessor: `texts` must be one per image with {len(images)} images, got {len(texts)}.")
        return {"images": self.process_images(images), **self.process_texts(texts)}

    def process_images(self, images: Sequence[Any]) -> Tensor:
        """Pictures to ``(B, 3, S, S)`` float32, resized and normalised."""
        if len(images) == 0:
            raise ValueError("GresProcessor: `images` must be at least one image, got an empty list.")
        size = (self.image_size, self.image_size)
        pixels = [to_tensor(image) for image in images]
        if all(picture.shape[-2:] == pixels[0].shape[-2:] for picture in pixels):
            batch = _resized(torch.stack(pixels).float(), size)
        else:
            batch = torch.cat([_resized(picture[None].float(), size) for picture in pixels])
        mean, std = torch.tensor(self.mean)[:, None, None] * 255, torch.tensor(self.std)[:, None, None] * 255
        return (batch - mean) / std

    def process_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts to ``input_ids`` and ``attention_mask``, both ``(B, L)`` int64."""
        tokenizer = self._ready_tokenizer()
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"GresProcessor: `texts` must be strings, got {type(text).__name__}.")
            if not text.strip():
                raise ValueError("GresProcessor: `texts` must not be empty, got a text without a word.")
        encoded = tokenizer(list(texts), padding="longest", truncation=True, max_length=self.max_tokens, return_tensors="pt")
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text with the positions of their tokens; special tokens belong to no word.

        Example:
            >>> GresProcessor(32, word_tokenizer(["red", "circle"])).words("Red circle")
            [('Red', [1]), ('circle', [2])]
        """
        tokenizer = self._ready_tokenizer()
        encoded = tokenizer(text, truncation=True, max_length=self.max_tokens, return_offsets_mapping=True)
        spans: dict[int, tuple[int, int, list[int]]] = {}
        for position, (word, (start, end)) in enumerate(zip(encoded.word_ids(), encoded["offset_mapping"], strict=True)):
            if word is not None:
                first, last, tokens = spans.get(word, (start, end, []))
                spans[word] = (min(first, start), max(last, end), [*tokens, position])
        return [(text[start:end].strip(), tokens) for start, end, tokens in spans.values()]

    def _ready_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise RuntimeError(
                "GresProcessor: `tokenizer` must be set before texts are processed: use pretrained=True, from_pretrained or"
                " processor.tokenizer = a transformers tokenizer, got None."
            )
        return self.tokenizer

    def settings(self) -> dict[str, Any]:
        """The numbers that rebuild this processor, without the tokenizer."""
        return {"image_size": self.image_size, "max_tokens": self.max_tokens, "mean": list(self.mean), "std": list(self.std)}

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files, if there is a tokenizer."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))


def to_tensor(image: Any) -> Tensor:
    """A PIL image or a uint8 tensor as ``(3, H, W)`` uint8, RGB.

    Raises:
        TypeError: If it is neither.
        ValueError: If a tensor's shape is not ``(3, H, W)`` or a side is 0.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8:
            raise TypeError(f"GresProcessor: `images` must be PIL images or uint8 tensors, got a {image.dtype} tensor.")
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"GresProcessor: `images` must be (3, H, W) with H and W at least 1, got {tuple(image.shape)}.")
        return image
    if not hasattr(image, "convert"):
        raise TypeError(f"GresProcessor: `images` must be PIL images or uint8 tensors, got {type(image).__name__}.")
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def words_in(texts: Iterable[str]) -> tuple[str, ...]:
    """All words and punctuation marks of some texts as :func:`word_tokenizer` sees them, sorted.

    Example:
        >>> words_in(["The dog, left", "the cat"])
        (',', 'cat', 'dog', 'left', 'the')
    """
    return tuple(sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())}))


def word_tokenizer(words: Iterable[str]) -> Any:
    """A word-level tokenizer: lower-cased words and punctuation, unknown words share one token.

    Args:
        words: The vocabulary; order does not matter.

    Returns:
        A transformers tokenizer with ``[PAD]`` 0, ``[UNK]`` 1, ``[CLS]`` 2 and ``[SEP]`` 3.

    Example:
        >>> tokenizer = word_tokenizer(["dog", "the"])
        >>> tokenizer("The dog barks").input_ids
        [2, 5, 4, 1, 3]
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocabulary = {word: index for index, word in enumerate([*specials, *sorted({word.lower() for word in words})])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _resized(batch: Tensor, size: tuple[int, int]) -> Tensor:
    if batch.shape[-2:] == size:
        return batch
    return F.interpolate(batch, size=size, mode="bilinear", align_corners=False, antialias=True)
