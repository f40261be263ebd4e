import pytest
import torch
from torch.nn import functional as F

from gresbox.losses import NoTargetLoss, no_target_loss


def test_is_the_papers(golden):
    arrays = golden("instalign_nt")
    logits, target = torch.from_numpy(arrays["nt_logit"]), torch.from_numpy(arrays["target"])
    assert no_target_loss(logits, target).item() == pytest.approx(float(arrays["loss"]), abs=1e-12)
    assert no_target_loss(logits, target.bool()).item() == pytest.approx(float(arrays["loss"]), abs=1e-12)


def test_one_means_no_target():
    assert no_target_loss(torch.tensor([9.0]), torch.tensor([True])) < 1e-3
    assert no_target_loss(torch.tensor([9.0]), torch.tensor([False])) > 8


def test_class_weights_and_gradient():
    logits, label = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.rand(7) > 0.5
    loss = NoTargetLoss(class_weights=(0.9, 1.1))(logits, label)
    weight = torch.where(label, 1.1, 0.9).double()
    expected = F.binary_cross_entropy_with_logits(logits, label.double(), weight=weight)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.gradcheck(lambda x: no_target_loss(x, label, class_weights=(0.9, 1.1)), logits)


def test_extreme_logits_stay_finite_and_bfloat16_is_widened():
    logits = torch.tensor([1e4, -1e4], dtype=torch.bfloat16, requires_grad=True)
    loss = no_target_loss(logits, torch.tensor([False, True]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_wrong_shape_dtype_and_weight_are_errors():
    with pytest.raises(ValueError, match=r"no_target_loss: `no_target` must be \(B\) with B=2, got \(3,\)\."):
        no_target_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(TypeError, match="`logits` must be a floating-point tensor"):
        no_target_loss(torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    with pytest.raises(ValueError, match="class_weights"):
        NoTargetLoss(class_weights=(1.0, -1.0))
