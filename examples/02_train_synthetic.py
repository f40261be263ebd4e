"""
Train on the synthetic benchmark
================================

The quick start in Python: a small InstAlign learns from drawn scenes what phrases refer to. Here it trains for seconds, enough to
see the loss fall; the command ``gresbox train --model instalign_tiny --data synthetic`` does the same for minutes.
"""

import tempfile
from pathlib import Path

import torch

from gresbox import SyntheticGRES, create_model
from gresbox.training import EvaluationOptions, TrainOptions, train
from gresbox.viz import prediction_grid

torch.manual_seed(0)

# %%
# Scenes are drawn when they are asked for, so a training set is as long as one says. Each sample knows its exact truth.
train_set = SyntheticGRES("train", 2000)
val_set = SyntheticGRES("val", 64)
for index in range(4):
    sample = train_set[index]
    print(f"{sample.kind:5s} {sample.text!r}: {sample.target.masks.shape[0]} objects")

# %%
# The run's folder gets weights, configuration, tokenizer, log and scores; a killed run continues with ``resume=True``.
model = create_model("instalign_tiny")
with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    options = TrainOptions(max_steps=40, log_every=10, progress=False, evaluation=EvaluationOptions(batch=32))
    scores = train(model, train_set, val_set, out, options)
    print("files:", ", ".join(sorted(path.name for path in out.iterdir())))

    # %%
    # The benchmark's own metrics, in percent. Forty steps are few: the full recipe takes minutes and reaches the README's numbers.
    print({name: round(value, 1) for name, value in scores.items() if name in ("gIoU", "cIoU", "N_acc", "T_acc")})

    # %%
    # Pictures of truth and prediction, with the words each instance answered to.
    samples = [val_set[index] for index in range(4)]
    answers = model.predict([sample.image for sample in samples], [sample.text for sample in samples])
    prediction_grid(samples, answers, out / "grid.png")
    print("grid:", (out / "grid.png").stat().st_size > 0)
