"""Matchers: which query answers for which target instance."""

from gresbox.matchers.hungarian import HungarianInstanceMatcher
from gresbox.matchers.point_guided import PointGuidedMatcher

__all__ = ["HungarianInstanceMatcher", "PointGuidedMatcher"]
