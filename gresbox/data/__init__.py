"""Datasets of generalised referring segmentation, and what prepares their samples."""

from gresbox.data.grammar import vocabulary
from gresbox.data.synthetic import SyntheticGRES

__all__ = ["SyntheticGRES", "vocabulary"]
