"""Matchers: which query answers for which target instance."""

from gresbox.matchers.hungarian import HungarianInstanceMatcher

__all__ = ["HungarianInstanceMatcher"]
