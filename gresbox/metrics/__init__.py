"""The benchmarks' own metrics: one file per benchmark, each with a class for loops and a function for whole arrays."""

from gresbox.metrics.grefcoco import GRESMetric, gres_metrics

__all__ = ["GRESMetric", "gres_metrics"]
