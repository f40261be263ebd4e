"""The index of the refer APIs: every record under every id it can be looked up by, each list rebuilt whenever it grows.

Of henghuiding/ReLA, ``gres_model/data/datasets/grefer.py``, ``G_REFER.__init__`` and ``createIndex`` (lines 36-161), for gRefCOCO,
and ``gres_model/data/datasets/refer.py``, ``REFER.__init__`` and ``createIndex`` (lines 42-139), which is lichengunc/refer for
Python 3, for RefCOCO. As there the files are read with the standard library and a list in an index is replaced by a longer copy per
record; what they print is left out.
"""

# ruff: noqa: RUF005 - the copies are what is compared

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

Table = dict[Any, Any]


class GRefIndex:
    """gRefCOCO's: annotations and categories of a reference are lists."""

    def __init__(self, folder: Path, file_name: str) -> None:
        with (folder / file_name).open("rb") as file:
            references = pickle.load(file, fix_imports=True) if file_name.endswith(".p") else json.load(file)
        with (folder / "instances.json").open() as file:
            instances = json.load(file)
        self.references = references
        self.splits: list[str] = []
        self.index_instances(instances)
        self.index_references(references)

    def index_instances(self, instances: dict[str, Any]) -> None:
        annotations: Table = {-1: None}
        annotations_of_image: Table = {}
        for annotation in instances["annotations"]:
            annotations[annotation["id"]] = annotation
            annotations_of_image[annotation["image_id"]] = annotations_of_image.get(annotation["image_id"], []) + [annotation]
        self.images = {image["id"]: image for image in instances["images"]}
        self.categories = {category["id"]: category["name"] for category in instances["categories"]}
        self.annotations, self.annotations_of_image = annotations, annotations_of_image

    def index_references(self, references: list[dict[str, Any]]) -> None:
        by_id: Table = {}
        of_image: Table = {}
        of_category: Table = {}
        of_annotation: Table = {}
        annotations_of: Table = {}
        sentences: Table = {}
        of_sentence: Table = {}
        tokens: Table = {}
        for reference in references:
            number, image, category = reference["ref_id"], reference["image_id"], reference["category_id"]
            if reference["split"] not in self.splits:
                self.splits.append(reference["split"])
            by_id[number] = reference
            of_image[image] = of_image.get(image, []) + [reference]
            met = []
            for one in category if isinstance(category, list) else [category]:
                if one not in met:
                    met.append(one)
                    of_category[one] = of_category.get(one, []) + [reference]
            annotation = reference["ann_id"] if isinstance(reference["ann_id"], list) else [reference["ann_id"]]
            annotations_of[number] = [self.annotations[one] for one in annotation]
            for one in annotation:
                of_annotation[one] = of_annotation.get(one, []) + [reference]
            for sentence in reference["sentences"]:
                sentences[sentence["sent_id"]] = sentence
                of_sentence[sentence["sent_id"]] = reference
                tokens[sentence["sent_id"]] = sentence["tokens"]
        self.by_id, self.of_image, self.of_category, self.of_annotation = by_id, of_image, of_category, of_annotation
        self.annotations_of, self.sentences, self.of_sentence, self.tokens = annotations_of, sentences, of_sentence, tokens

    def texts(self, split: str) -> list[str]:
        """All sentences of a split, in order."""
        return [said["raw"] for reference in self.references if reference["split"] == split for said in reference["sentences"]]


class ReferIndex(GRefIndex):
    """RefCOCO's: annotation and category of a reference are numbers."""

    def index_references(self, references: list[dict[str, Any]]) -> None:
        by_id: Table = {}
        of_image: Table = {}
        of_category: Table = {}
        of_annotation: Table = {}
        annotation_of: Table = {}
        sentences: Table = {}
        of_sentence: Table = {}
        tokens: Table = {}
        for reference in references:
            number, annotation = reference["ref_id"], reference["ann_id"]
            image, category = reference["image_id"], reference["category_id"]
            by_id[number] = reference
            of_image[image] = of_image.get(image, []) + [reference]
            of_category[category] = of_category.get(category, []) + [reference]
            annotation_of[number] = self.annotations[annotation]
            of_annotation[annotation] = reference
            for sentence in reference["sentences"]:
                sentences[sentence["sent_id"]] = sentence
                of_sentence[sentence["sent_id"]] = reference
                tokens[sentence["sent_id"]] = sentence["tokens"]
        self.by_id, self.of_image, self.of_category, self.of_annotation = by_id, of_image, of_category, of_annotation
        self.annotations_of, self.sentences, self.of_sentence, self.tokens = annotation_of, sentences, of_sentence, tokens
