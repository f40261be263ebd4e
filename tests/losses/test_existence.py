import pytest
import torch
from torch.nn import functional as F

from gresbox.losses import ExistenceLoss, NoTargetLoss, existence_loss
from gresbox.testing import assert_matches_reference

FLAGS = torch.tensor([False, True, True, False, False])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["two_class", "bce"])
@pytest.mark.parametrize("reduction", ["weights", "batch"])
def test_matches_its_definition_and_gradients(dtype, form, reduction):
    def reference(logits):
        weight = 0.9 + 0.2 * FLAGS.to(logits.dtype)
        if form == "two_class":
            loss = F.cross_entropy(logits, FLAGS.long(), reduction="none")
        else:
            exists, none = logits.sigmoid().unbind(-1)
            loss = -torch.where(FLAGS, (1 - exists).log() + none.log(), exists.log() + (1 - none).log()) / 2
        return (weight * loss).sum() / (weight.sum() if reduction == "weights" else len(FLAGS))

    def ours(logits):
        return existence_loss(logits, FLAGS, form=form, class_weights=(0.9, 1.1), reduction=reduction)

    assert_matches_reference(ours, reference, [torch.randn(5, 2)], dtype=dtype)


def test_is_the_official_one(golden):
    at = golden("igvg_maskloss")
    logits, label = torch.from_numpy(at["nt_logits"]), torch.from_numpy(at["nt_target"])
    assert ExistenceLoss()(logits, label).item() == pytest.approx(float(at["nt_ce_w09_11"]), rel=1e-6)


def test_one_logit_is_the_papers_binary_cross_entropy():
    logits = torch.randn(5, 1, dtype=torch.float64)
    loss = ExistenceLoss(form="bce")(logits, FLAGS)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits[:, 0], (~FLAGS).double()))
    torch.testing.assert_close(loss, NoTargetLoss()(-logits[:, 0], FLAGS))


def test_unweighted_two_classes_are_one_logit_the_difference():
    logits = torch.randn(5, 2, dtype=torch.float64)
    loss = ExistenceLoss(class_weights=(1.0, 1.0))(logits, FLAGS)
    torch.testing.assert_close(loss, NoTargetLoss()(logits[:, 1] - logits[:, 0], FLAGS))


def test_batches_of_one_kind_and_extreme_logits_are_finite():
    for flags in (torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)):
        for form in ("two_class", "bce"):
            logits = torch.tensor([[1e4, -1e4], [0.0, 0.0], [-1e4, 1e4]], requires_grad=True)
            loss = ExistenceLoss(form=form)(logits, flags)
            loss.backward()
            assert loss.isfinite()
            assert logits.grad.isfinite().all()
            assert logits.grad.abs().sum() > 0


def test_the_mean_of_micro_batches_is_the_batch():
    logits = torch.randn(4, 2)
    whole = existence_loss(logits, FLAGS[:4], class_weights=(0.9, 1.1), reduction="batch")
    parts = [existence_loss(logits[i : i + 2], FLAGS[i : i + 2], class_weights=(0.9, 1.1), reduction="batch") for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (ValueError, lambda: existence_loss(torch.randn(3), FLAGS[:3]), r"existence_loss: `logits` must be \(B, 2\), got \(3,\)"),
        (
            ValueError,
            lambda: existence_loss(torch.randn(3, 1), FLAGS[:3]),
            r"existence_loss: `logits` must be \(B, 2\), got \(3, 1",
        ),
        (ValueError, lambda: existence_loss(torch.randn(3, 2), FLAGS), r"existence_loss: `no_target` must be \(B\) with B=3, got"),
        (
            TypeError,
            lambda: existence_loss(torch.ones(3, 2).long(), FLAGS[:3]),
            "existence_loss: `logits` must be a floating",
        ),
        (ValueError, lambda: existence_loss(torch.randn(3, 2), FLAGS[:3], form="focal"), "existence_loss: `form` must be one of"),
        (ValueError, lambda: ExistenceLoss(form="focal"), "ExistenceLoss: `form` must be one of"),
        (ValueError, lambda: ExistenceLoss(reduction="sum"), "ExistenceLoss: `reduction` must be one of"),
        (ValueError, lambda: ExistenceLoss(class_weights=(-1.0, 1.0)), "ExistenceLoss: `class_weights` must be at least"),
    ],
)
def test_wrong_input_is_one_clear_line(kind, call, message):
    with pytest.raises(kind, match=f"^{message}"):
        call()
