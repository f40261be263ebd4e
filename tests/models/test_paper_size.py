"""The paper-size preset on the CPU: forward, backward, every parameter with a gradient, also without targets."""

from __future__ import annotations

import pytest
import torch

from gresbox.models import create_model
from gresbox.structures import GresTarget

KNOWN = {
    "image_encoder": 86_878_584 - 2_048 + 3_840,  # timm's Swin-B without head, its last norm replaced by one norm per stage
    "text_encoder": 124_055_040 + 768 * 256 + 256 + 2 * 256,  # RoBERTa-base without pooler, projection, norm
    "pixel_decoder": 5_544_384,  # Mask2Former's
    "aggregation": 1,
    "no_target_head": 512 * 256 + 256 + 256 + 1,
}


@pytest.mark.slow
def test_instalign_swin_base_trains_every_parameter_at_480_pixels():
    model = create_model("instalign_swin_base")
    assert {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in KNOWN} == KNOWN
    masks = torch.zeros(2, 480, 480, dtype=torch.bool)
    masks[0, 40:200, 60:300] = masks[1, 300:400, 100:180] = True
    ids, valid = torch.randint(4, 50_000, (1, 12)), torch.ones(1, 12, dtype=torch.long)
    images = torch.randn(1, 3, 480, 480)
    criterion = model.criterion()
    for target in (GresTarget(masks), GresTarget(masks[:0])):
        model.zero_grad(set_to_none=True)
        output = model(images, ids, valid)
        assert output.merged.shape == (1, 120, 120) and len(output.aux) == 9
        criterion(output, [target])["loss"].backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert without == []
