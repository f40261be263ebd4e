"""Datasets of generalised referring segmentation, and what prepares their samples."""

from gresbox.data import masks, transforms
from gresbox.data.collation import Batch, collate
from gresbox.data.grammar import vocabulary
from gresbox.data.grefcoco import GRefCOCO
from gresbox.data.layout import synthesize
from gresbox.data.synthetic import SyntheticGRES
from gresbox.data.transforms import Letterbox, Resize

__all__ = [
    "Batch",
    "GRefCOCO",
    "Letterbox",
    "Resize",
    "SyntheticGRES",
    "collate",
    "masks",
    "synthesize",
    "transforms",
    "vocabulary",
]
