"""Training and evaluation of the library's models: one process or several, killed or not."""

from gresbox.training.aml import AlignmentMaskedTraining
from gresbox.training.capture import CapturedStep, capture_step
from gresbox.training.evaluation import EvaluationOptions, evaluate
from gresbox.training.loop import Trainer, train
from gresbox.training.options import TrainOptions
from gresbox.training.predictions import Answer, PredictionFile, PredictionWriter
from gresbox.training.records import read_log
from gresbox.training.schedule import learning_rate_factor
from gresbox.training.scoring import Scorer, default_metric, make_metric, score_predictions

__all__ = [
    "AlignmentMaskedTraining",
    "Answer",
    "CapturedStep",
    "EvaluationOptions",
    "PredictionFile",
    "PredictionWriter",
    "Scorer",
    "TrainOptions",
    "Trainer",
    "capture_step",
    "default_metric",
    "evaluate",
    "learning_rate_factor",
    "make_metric",
    "read_log",
    "score_predictions",
    "train",
]
