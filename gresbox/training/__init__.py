"""Training and evaluation of the library's models: one process or several, killed or not."""

from gresbox.training.aml import AlignmentMaskedTraining
from gresbox.training.evaluation import EvaluationOptions, evaluate
from gresbox.training.loop import Trainer, train
from gresbox.training.options import TrainOptions
from gresbox.training.records import read_log
from gresbox.training.schedule import learning_rate_factor

__all__ = [
    "AlignmentMaskedTraining",
    "EvaluationOptions",
    "TrainOptions",
    "Trainer",
    "evaluate",
    "learning_rate_factor",
    "read_log",
    "train",
]
