"""The benchmarks' own metrics: one file per benchmark, each with a class for loops and a function for whole arrays."""

from gresbox.metrics.coverage import CoverageAccuracy, coverage_accuracy
from gresbox.metrics.grec import GRECMetric, grec_metrics
from gresbox.metrics.grefcoco import GRESMetric, gres_metrics
from gresbox.metrics.no_target import no_target_from_logits, no_target_from_scores
from gresbox.metrics.refzom import RefZOMMetric, refzom_metrics
from gresbox.metrics.res import RESMetric, res_metrics
from gresbox.metrics.rrefcoco import RRefCOCOMetric, rrefcoco_metrics
from gresbox.metrics.threshold import ThresholdSweep, sweep_thresholds

__all__ = [
    "CoverageAccuracy",
    "GRECMetric",
    "GRESMetric",
    "RESMetric",
    "RRefCOCOMetric",
    "RefZOMMetric",
    "ThresholdSweep",
    "coverage_accuracy",
    "grec_metrics",
    "gres_metrics",
    "no_target_from_logits",
    "no_target_from_scores",
    "refzom_metrics",
    "res_metrics",
    "rrefcoco_metrics",
    "sweep_thresholds",
]
