"""Whole models, composed of the library's blocks, and their presets."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from typing import Any

from gresbox.models.base import HUB_OPTIONS, GresModel, read_config
from gresbox.models.beit3 import Beit3Config, Beit3Encoder, beit3_tokenizer
from gresbox.models.caris import CARIS_SWIN_BASE, CARIS_TINY, Caris, CarisConfig, PromptedTextEncoder
from gresbox.models.encoders import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from gresbox.models.igvg import IGVG, IGVG_BEIT3_BASE, IGVG_BEIT3_LARGE, IGVG_TINY, IGVGConfig
from gresbox.models.instalign import INSTALIGN_SWIN_BASE, INSTALIGN_SWIN_TINY, INSTALIGN_TINY, InstAlign, InstAlignConfig
from gresbox.models.processor import GresProcessor, word_tokenizer, words_in

__all__ = [
    "IGVG",
    "Beit3Config",
    "Beit3Encoder",
    "Caris",
    "CarisConfig",
    "GresModel",
    "GresProcessor",
    "IGVGConfig",
    "ImageEncoder",
    "ImageEncoderConfig",
    "InstAlign",
    "InstAlignConfig",
    "PromptedTextEncoder",
    "TextEncoder",
    "TextEncoderConfig",
    "beit3_tokenizer",
    "create_model",
    "list_models",
    "load_model",
    "preset_config",
    "word_tokenizer",
    "words_in",
]

MODELS: dict[str, tuple[type[GresModel], Any]] = {
    "caris_swin_base": (Caris, CARIS_SWIN_BASE),
    "caris_tiny": (Caris, CARIS_TINY),
    "igvg_beit3_base": (IGVG, IGVG_BEIT3_BASE),
    "igvg_beit3_large": (IGVG, IGVG_BEIT3_LARGE),
    "igvg_tiny": (IGVG, IGVG_TINY),
    "instalign_swin_base": (InstAlign, INSTALIGN_SWIN_BASE),
    "instalign_swin_tiny": (InstAlign, INSTALIGN_SWIN_TINY),
    "instalign_tiny": (InstAlign, INSTALIGN_TINY),
}


def create_model(name: str, *, pretrained: bool = False, **overrides: Any) -> Any:
    """Build a model from a preset's numbers, offline.

    Args:
        name: A preset; :func:`list_models` shows all.
        pretrained: Fetch the encoders' weights and the tokenizer; the only thing that uses the network.
        **overrides: Fields of the preset's config to replace, for example ``num_queries=20``.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: If the preset or a field does not exist.

    Example:
        >>> model = create_model("instalign_tiny", num_queries=5)
        >>> model.config.num_queries
        5
    """
    config = preset_config(name)
    model_class = MODELS[name][0]
    known = [field.name for field in dataclasses.fields(config)]
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"create_model: {name!r} has no option {key!r}.{hint} Options: {', '.join(known)}.")
    return model_class(dataclasses.replace(config, **overrides), pretrained=pretrained)


def preset_config(name: str) -> Any:
    """The frozen config of a preset: the numbers that :func:`create_model` builds from.

    Raises:
        ValueError: If the preset does not exist; the message suggests the nearest.

    Example:
        >>> preset_config("instalign_swin_base").num_queries
        100
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"create_model: no model {name!r}.{hint} list_models() shows all.")
    return MODELS[name][1]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the presets that match a shell pattern, sorted.

    Example:
        >>> list_models("instalign_*")
        ['instalign_swin_base', 'instalign_swin_tiny', 'instalign_tiny']
    """
    return sorted(fnmatch.filter(MODELS, pattern))


def load_model(path: str, **options: Any) -> Any:
    """Load a saved model of whatever class its config.json names.

    A path that does not exist is an error at once, without network. Only what reads as a hub id is asked for there: ``owner/name``,
    and no folder ``owner`` here; ``HF_HUB_OFFLINE=1`` is respected.

    Args:
        path: A folder that ``save_pretrained`` wrote, or a Hugging Face hub id ``owner/name``.
        **options: Passed to ``from_pretrained``: parts that were swapped by hand (``decoder=...``), ``map_location``.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such folder or repository.
        ValueError: If a file cannot be read, does not fit, or a swapped part is missing.
    """
    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    wanted = read_config(str(path), **hub)["model_class"]
    classes = {model_class.__name__: model_class for model_class, _ in MODELS.values()}
    if wanted not in classes:
        raise ValueError(f"load_model: `model_class` in config.json must be one of {', '.join(classes)}, got {wanted!r}.")
    return classes[wanted].from_pretrained(str(path), **options)
