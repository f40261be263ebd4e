"""Datasets of generalised referring segmentation, and what prepares their samples."""

from gresbox.data import masks, transforms
from gresbox.data.collation import Batch, collate
from gresbox.data.conversion import convert_coco
from gresbox.data.corruptions import CORRUPTIONS, Corrupt, corrupt_image
from gresbox.data.flips import HorizontalFlip, swap_sides
from gresbox.data.grammar import vocabulary
from gresbox.data.grefcoco import GRefCOCO
from gresbox.data.layout import synthesize
from gresbox.data.leakage import held_out_images
from gresbox.data.refcoco import RefCOCO
from gresbox.data.refzom import RefZOM
from gresbox.data.rrefcoco import RRefCOCO
from gresbox.data.synthetic import SyntheticGRES
from gresbox.data.transforms import Letterbox, Resize
from gresbox.data.verification import VerificationReport, verify

__all__ = [
    "CORRUPTIONS",
    "Batch",
    "Corrupt",
    "GRefCOCO",
    "HorizontalFlip",
    "Letterbox",
    "RRefCOCO",
    "RefCOCO",
    "RefZOM",
    "Resize",
    "SyntheticGRES",
    "VerificationReport",
    "collate",
    "convert_coco",
    "corrupt_image",
    "held_out_images",
    "masks",
    "swap_sides",
    "synthesize",
    "transforms",
    "verify",
    "vocabulary",
]
