"""Pictures: right pixels, right sizes, whole files, and no global matplotlib state."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gresbox.structures import GresPrediction, GresSample, GresTarget
from gresbox.viz import COLOURS, _cycle, draw_prediction, overlay, plot_losses, prediction_grid

SIZE = (24, 32)


def picture():
    return torch.full((3, *SIZE), 100, dtype=torch.uint8)


def box_mask(top, left, bottom, right):
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def answer(count=2, text="two red dogs", phrases=True):
    masks = (
        torch.stack([box_mask(2 + 8 * i, 4, 8 + 8 * i, 12) for i in range(count)])
        if count
        else torch.zeros(0, *SIZE, dtype=torch.bool)
    )
    words = [[("two", 0.2), ("red", 0.5), ("dogs", 0.3)]] * count if phrases else None
    return GresPrediction(text, masks.any(0), 0.1, torch.linspace(0.9, 0.6, count), masks, torch.zeros(count, 4), words)


def test_overlay_paints_only_the_masks():
    mask = box_mask(4, 4, 12, 20)
    painted = overlay(picture(), mask, colours=[(200, 0, 50)], opacity=0.25)
    assert painted.dtype == torch.uint8
    assert torch.equal(painted[:, ~mask], picture()[:, ~mask])
    assert painted[:, 8, 10].tolist() == [125, 75, 88]
    assert painted[:, 4, 4].tolist() == [200, 0, 50]  # the border
    assert torch.equal(picture(), torch.full((3, *SIZE), 100, dtype=torch.uint8))


def test_overlay_takes_colours_in_turn_and_later_masks_lie_on_top():
    masks = torch.stack([box_mask(0, 0, 10, 10), box_mask(5, 5, 15, 15)])
    painted = overlay(picture(), masks, opacity=1.0, outline=False)
    assert painted[:, 2, 2].tolist() == list(COLOURS[0])
    assert painted[:, 7, 7].tolist() == list(COLOURS[1])
    many = overlay(picture(), masks[:1].repeat(len(COLOURS) + 1, 1, 1), opacity=1.0)
    assert many[:, 2, 2].tolist() == list(COLOURS[0])


def test_overlay_of_nothing_and_of_a_pil_image():
    assert torch.equal(overlay(picture(), torch.zeros(0, *SIZE, dtype=torch.bool)), picture())
    image = Image.fromarray(picture().permute(1, 2, 0).numpy())
    assert torch.equal(overlay(image.convert("L"), box_mask(0, 0, 4, 4)), overlay(image, box_mask(0, 0, 4, 4)))


@pytest.mark.parametrize(("count", "phrases"), [(0, True), (1, False), (12, True)])
def test_draw_prediction_with_any_number_of_instances(count, phrases):
    masks = torch.zeros(count, *SIZE, dtype=torch.bool)
    words = [[("dog", 1.0)]] * count if phrases else None
    prediction = GresPrediction("dogs", masks.any(0), None, torch.rand(count), masks, torch.zeros(count, 4), words)
    drawn = draw_prediction(picture(), prediction)
    with_truth = draw_prediction(picture(), prediction, GresTarget(box_mask(1, 1, 5, 5)[None]))
    assert with_truth.width > drawn.width
    assert len(np.unique(np.asarray(drawn))) > 10


def test_instances_appear_in_their_colours():
    drawn = np.asarray(draw_prediction(picture(), answer()))
    for colour in COLOURS[:2]:
        assert (drawn == np.array(colour)).all(-1).sum() > 20, colour
    assert not (drawn == np.array(COLOURS[3])).all(-1).any()


def test_points_and_boxes_are_drawn_where_a_model_has_them():
    plain = answer(text="x")
    boxes = torch.tensor([[16.0, 2.0, 28.0, 8.0], [2.0, 16.0, 14.0, 22.0]])
    placed = dataclasses.replace(plain, boxes_xyxy=boxes, points=torch.tensor([[20.0, 5.0], [8.0, 20.0]]))
    before, after = (np.asarray(draw_prediction(picture(), prediction)) for prediction in (plain, placed))
    assert before.shape == after.shape, "the panel keeps its limits"
    changed = (before != after).any(-1)
    assert 100 < changed.sum() < changed.size / 20
    for colour in COLOURS[:2]:
        assert ((after == np.array(colour)).all(-1) & changed).sum() > 20
    assert np.array_equal(before, np.asarray(draw_prediction(picture(), dataclasses.replace(plain, boxes_xyxy=boxes))))


def test_an_expression_with_mathematical_signs_is_drawn_as_text():
    prediction = answer(text=r"the $5 bill \frac{ and 100 % of _it^ $", phrases=True)
    prediction.phrases[0][0] = ("$x^{", 0.2)
    draw_prediction(picture(), prediction)
    draw_prediction(picture(), answer(text="word " * 100))


def test_grid_is_saved_whole_and_alone(tmp_path):
    samples = [GresSample(picture(), "a dog", GresTarget(answer(count).instance_masks)) for count in (0, 1, 2)]
    path = tmp_path / "new" / "grid.png"
    drawn = prediction_grid(samples, [answer(count) for count in (2, 1, 0)], path)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]
    with Image.open(path) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(drawn))
    prediction_grid(samples, [answer(count) for count in (2, 1, 0)], path.with_suffix(".jpg"))


def test_the_same_picture_twice():
    assert np.array_equal(np.asarray(draw_prediction(picture(), answer())), np.asarray(draw_prediction(picture(), answer())))


def test_loss_curve_with_and_without_evaluations(tmp_path):
    history = [{"step": step, "kind": "train", "loss": 10.0 / (step + 1), "loss_mask": 0.0, "lr": 1e-4} for step in range(60)]
    plain = plot_losses(history, tmp_path / "loss.png")
    scored = plot_losses([*history, {"step": 60, "kind": "evaluation", "gIoU": 50.0, "cIoU": float("nan"), "T_acc": None}])
    assert (tmp_path / "loss.png").is_file()
    assert scored.width > plain.width
    plot_losses([{"step": 3, "loss": float("nan")}, {"step": 4, "loss": 1.0}])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: overlay(picture().float(), box_mask(0, 0, 1, 1)), TypeError, "`image` must be uint8, got torch.float32"),
        (lambda: overlay(picture(), box_mask(0, 0, 1, 1).float()), TypeError, "`masks` must be bool, got torch.float32"),
        (lambda: overlay(picture(), box_mask(0, 0, 1, 1)[:, :9]), ValueError, r"`masks` must be \(K, H, W\) with W=32"),
        (lambda: overlay(picture(), box_mask(0, 0, 1, 1), opacity=2), ValueError, r"`opacity` must be in \[0, 1\], got 2"),
        (lambda: draw_prediction(picture()[:, :9], answer()), ValueError, r"draw_prediction: `mask` must be \(H, W\) with H=9"),
        (lambda: draw_prediction(picture(), answer(), path="x.mp3"), ValueError, "`path` must end in one of .png, .*, got 'x.mp3'"),
        (lambda: prediction_grid([], []), ValueError, "`samples` must hold at least one sample, got none"),
        (lambda: prediction_grid([], [answer()]), ValueError, "`predictions` must be as many as `samples`, 0, got 1"),
        (lambda: plot_losses([{"step": 1, "lr": 0.1}]), ValueError, "`history` must hold entries with a step and a loss"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'gresbox\[viz\]'"):
        draw_prediction(picture(), answer())


def test_importing_viz_imports_neither_matplotlib_nor_pil():
    code = "import sys, gresbox.viz; print([n for n in ('matplotlib', 'PIL', 'torchvision') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_no_two_curves_look_alike():
    assert len(set(_cycle(2 * len(COLOURS) + 1))) == 2 * len(COLOURS) + 1
