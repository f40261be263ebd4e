"""IGVG's blocks together: the official head's outputs, one graph, gradients everywhere."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gresbox.blocks import (
    AttentionGuidedQueryGeneration,
    DeformableDecoder,
    DETRDecoder,
    ExistenceHead,
    GlobalMaskHead,
    InstanceHead,
    LearnedPrior,
    PointPrior,
    ScoreTextSelector,
    SimpleFeaturePyramid,
    UNetDecoder,
)
from gresbox.structures import GresOutput


class Head(nn.Module):
    """From an encoder's patches and words to everything that IGVG predicts."""

    def __init__(self, generation, pyramid, unet, decoder, dim):
        super().__init__()
        self.generation, self.pyramid, self.unet, self.decoder = generation, pyramid, unet, decoder
        self.instances, self.mask, self.existence = InstanceHead(dim), GlobalMaskHead(dim), ExistenceHead(dim)

    def forward(self, features, tokens, valid):
        levels = self.pyramid(features)
        generated = self.generation(tokens, features, valid)
        num_levels = getattr(self.decoder, "num_levels", 1)
        steps, reference = self.decoder(generated.queries, generated.points, levels if num_levels > 1 else levels[2:3])
        pixels = self.unet(levels)
        *aux, last = self.instances(steps, pixels, tokens, valid, points=generated.points, reference=reference)
        existence = self.existence(pixels)
        extras = {"existence": existence, "minimap": generated.minimap}
        return GresOutput(self.mask(pixels), ExistenceHead.no_target(existence), last, tuple(aux), True, extras)


@pytest.fixture(scope="module")
def official(golden, instancevg_weights, load):
    """The official head's weights in our blocks, its inputs, and what it gave."""
    arrays = golden("igvg_head")
    weights = instancevg_weights("head.", arrays)
    generation = AttentionGuidedQueryGeneration(256, text_selector=partial(ScoreTextSelector, score="mean"), pooling="max")
    decoder = DeformableDecoder(256, prior=PointPrior(256, reference="shifted"))
    head = Head(generation, SimpleFeaturePyramid(256, 256), UNetDecoder(256), decoder, 256)
    for name, part in head.named_children():
        load(part, weights["ours"] | weights["existence"] if name == "existence" else weights["ours"])
    numbers = {name: torch.from_numpy(value) for name, value in arrays.items() if value.dtype.kind != "U"}
    features = F.conv2d(numbers["img_feat"], weights["official"]["img_embedding.weight"])
    tokens = F.linear(numbers["text_feat"], weights["official"]["lan_embedding.weight"])
    return head.eval(), (features, tokens, 1 - numbers["pad_mask"]), numbers


@torch.no_grad()
def test_golden_parts(official):
    head, (features, tokens, valid), want = official
    levels = head.pyramid(features)
    for index, level in enumerate(levels):
        assert level.shape == tuple(want[f"neck{index}_shape"])
        torch.testing.assert_close(level.mean(1), want[f"neck{index}_mean_over_channels"], rtol=1e-4, atol=1e-5)
    pixels = head.unet(levels)
    assert pixels.shape == tuple(want["unet_shape"])
    torch.testing.assert_close(pixels[:, :8], want["unet_out_ch0_7"], rtol=1e-4, atol=1e-5)
    generated = head.generation(tokens, features, valid)
    torch.testing.assert_close(generated.queries, want["q_init"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(generated.points, want["points_xy"], rtol=0, atol=1e-6)
    torch.testing.assert_close(generated.minimap, want["attn_global"], rtol=1e-4, atol=1e-6)
    steps, reference = head.decoder(want["q_init"], want["points_xy"], levels)
    torch.testing.assert_close(torch.stack(steps), want["hs"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(reference, want["init_ref"], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_golden_predictions(official):
    head, inputs, want = official
    output = head(*inputs)
    last, size = output.instances, tuple(want["img_hw"].tolist())
    classes = last.score_logits
    torch.testing.assert_close(classes, want["out_pred_class"][..., 0] - want["out_pred_class"][..., 1], rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(last.boxes, want["out_pred_bbox"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(output.extras["existence"], want["out_nt_label"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(output.resized(size)[:, None], want["out_pred_global_mask"], rtol=1e-4, atol=5e-5)
    masks = F.interpolate(last.masks, size=size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(masks, want["out_pred_mask"], rtol=1e-4, atol=1e-4)  # their scale is 12
    assert len(output.aux) == 2
    assert last.mask_embeddings is not None and last.pixels.shape[-2:] == (24, 24)  # factored


def tiny(decoder="points", num_layers=2):
    """64 px in patches of 16: a grid of 4 by 4."""
    sizes = {"num_layers": num_layers, "num_heads": 4, "ffn_dim": 32}
    decoders = {
        "points": lambda: DeformableDecoder(16, **sizes),
        "shifted": lambda: DeformableDecoder(16, prior=PointPrior(16, reference="shifted"), **sizes),
        "no prior": lambda: DeformableDecoder(16, prior=LearnedPrior(16, 5), **sizes),
        "single scale": lambda: DeformableDecoder(16, prior=LearnedPrior(16, 5), num_levels=1, **sizes),
        "DETR": lambda: DETRDecoder(16, 5, **sizes),
    }
    aqg = AttentionGuidedQueryGeneration(16, 5, num_heads=4, ffn_dim=32)
    return Head(aqg, SimpleFeaturePyramid(16, 16), UNetDecoder(16), decoders[decoder](), 16)


def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 16, 4, 4), torch.randn(2, 7, 16), torch.tensor([[1] * 7, [1, 1, 0, 0, 0, 0, 0]])


def everything(output):
    """All that a criterion may read."""
    steps = (*output.aux, output.instances)
    return [
        output.merged,
        *output.extras.values(),
        output.instances.masks,
        *(part for step in steps for part in (step.score_logits, step.boxes)),
    ]


@pytest.mark.parametrize("decoder", ["points", "shifted", "no prior", "single scale", "DETR"])
def test_every_parameter_gets_a_gradient(decoder):
    head = tiny(decoder)
    sum(part.square().sum() for part in everything(head(*inputs()))).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("decoder", ["points", "DETR"])
def test_batch_composition_does_not_matter(decoder):
    head, (features, tokens, valid) = tiny(decoder).eval().double(), inputs()
    features, tokens = features.double(), tokens.double()
    out = everything(head(features, tokens, valid))
    alone = everything(head(features[1:], tokens[1:, :3], valid[1:, :3]))
    for part, other in zip(out, alone, strict=True):
        torch.testing.assert_close(part[1:], other)


def test_one_graph():
    """That each op lowers well is tested with the op, export with the model."""
    head, arguments = tiny(num_layers=1).eval(), inputs()
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(everything(compiled(*arguments)), everything(head(*arguments)))


def test_autocast():
    head, arguments = tiny().eval(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = head(*arguments)
    for part in (low.merged, low.extras["existence"], low.extras["minimap"], low.instances.boxes, low.instances.score_logits):
        assert part.dtype == torch.float32
    assert all(part.isfinite().all() for part in everything(low))


def test_official_size():
    """13.19 million at 768 input channels, of which the official head never uses some; the rest is the same."""
    with torch.device("meta"):
        generation = AttentionGuidedQueryGeneration(256)
        decoder = DeformableDecoder(256, prior=PointPrior(256, reference="shifted"))
        head = Head(generation, SimpleFeaturePyramid(256, 256), UNetDecoder(256), decoder, 256)
    used = sum(p.numel() for p in head.parameters()) + 2 * 768 * 256  # the two projections
    unused = 768 * 256 + 10 * 256 + 4 * 256  # query_embedding, query_embed, level_embeds
    unused += 128 * 256 + 128 + 129 * 256 + 129  # proj_pixel_level_cons
    folded = 4 * 256 * 256 + 4 * 256 + 2 * 256 - 256  # the self-attention over zeros and its norm, here one vector
    assert used + unused + folded == pytest.approx(13.19e6, abs=5e3)
