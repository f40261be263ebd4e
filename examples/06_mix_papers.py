"""
Mix two papers
==============

InstAlign's decoder starts from queries that it has learned by heart, the same for every picture. IGVG lets the words of the
expression choose points in the picture and starts there. Blocks are sorted by kind, not by paper, so one can have both: here
IGVG's point queries run through InstAlign's phrase-object blocks, and the instances are put together by InstAlign's aggregation.
"""

import torch
from torch import nn

from gresbox import (
    AdaptiveInstanceAggregation,
    AttentionGuidedQueryGeneration,
    Beit3Encoder,
    GresOutput,
    IGVGCriterion,
    InstanceHead,
    NoTargetHead,
    PhraseObjectBlock,
    PointGuidedMatcher,
    PointPrior,
    SimpleFeaturePyramid,
    SyntheticGRES,
    create_model,
)
from gresbox.blocks import ParallelObjectText, attention_mask_logits, downsample_pixels, sine_position
from gresbox.metrics import coverage_accuracy

torch.manual_seed(0)
DIM, QUERIES = 64, 8


# %%
# The decoder. A query begins as what IGVG's generation makes of a word and a point, and its place is that point; then each block
# reads the picture where the query's mask is (as in Mask2Former), lets queries and words read each other, and predicts anew.
class PointPhraseDecoder(nn.Module):
    def __init__(self, num_layers=2):
        super().__init__()
        self.generation = AttentionGuidedQueryGeneration(DIM, QUERIES, num_heads=4, ffn_dim=DIM, minimap="logits")
        self.prior = PointPrior(DIM)
        self.blocks = nn.ModuleList(PhraseObjectBlock(DIM, 4, DIM, ParallelObjectText(DIM, 4)) for _ in range(num_layers))
        self.head = InstanceHead(DIM)

    def forward(self, features, pixels, tokens, valid):
        generated = self.generation(tokens, features, valid)
        queries = generated.queries
        place, reference = self.prior(generated.points)
        height, width = features.shape[-2:]
        value = features.flatten(2).transpose(1, 2)
        key = value + sine_position(height, width, DIM).flatten(1).T
        small = downsample_pixels(pixels, (height, width))

        def predict():
            return self.head([queries], pixels, tokens, valid, points=generated.points, reference=reference)[0]

        steps = [predict()]
        for block in self.blocks:
            looks = attention_mask_logits(steps[-1].mask_embeddings, small)
            queries, tokens = block(queries, tokens, valid, key, value, looks, place)
            steps.append(predict())
        return steps, generated.minimap


# %%
# The model: IGVG's joint encoder and pyramid in front, InstAlign's aggregation and no-target head behind. What flows between the
# parts is the same in both papers, an ``InstancePrediction`` per step, so IGVG's criterion can train InstAlign's parts.
class Mixed(nn.Module):
    def __init__(self, encoder: Beit3Encoder):
        super().__init__()
        self.encoder = encoder
        self.image_projection = nn.Conv2d(encoder.width, DIM, 1)
        self.text_projection = nn.Linear(encoder.width, DIM)
        self.pyramid = SimpleFeaturePyramid(DIM, DIM, scales=(2,))
        self.decoder = PointPhraseDecoder()
        self.aggregation = AdaptiveInstanceAggregation()
        self.no_target_head = NoTargetHead(DIM)

    def forward(self, images, input_ids, attention_mask):
        visual, words = self.encoder(images, input_ids, attention_mask)
        features, tokens = self.image_projection(visual), self.text_projection(words)
        (pixels,) = self.pyramid(features)
        (*aux, last), minimap = self.decoder(features, pixels, tokens, attention_mask.bool())
        no_target = self.no_target_head(last.queries, last.score_logits.sigmoid(), last.tokens, attention_mask)
        existence = torch.stack([torch.zeros_like(no_target), no_target], dim=1)  # two classes with this difference
        extras = {"minimap": minimap, "existence": existence}
        return GresOutput(self.aggregation(last), no_target, last, tuple(aux), extras=extras)


# %%
# The encoder and the processor come from a preset. Queries are matched to objects by their points, boxes and scores; the minimap's
# loss tells the words where to look, which is what places the points.
donor = create_model("igvg_tiny")
model = Mixed(donor.encoder)
criterion = IGVGCriterion(PointGuidedMatcher(), minimap_resize="area")
data = SyntheticGRES("train", 640)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(40):
    samples = [data[16 * step + index] for index in range(16)]
    batch = donor.processor([sample.image for sample in samples], [sample.text for sample in samples])
    targets = [sample.target for sample in samples]
    output = model(**batch)
    losses = criterion(output, targets)
    optimizer.zero_grad()
    losses["loss"].backward()
    optimizer.step()
    if step % 13 == 0:
        print(
            f"step {step:2d}: " + "  ".join(f"{name} {losses[name]:.2f}" for name in ("loss", "giou", "mask_dice", "minimap_dice"))
        )

# %%
# Every parameter of both papers' parts is trained.
print("without a gradient:", [name for name, parameter in model.named_parameters() if parameter.grad is None])

# %%
# How many target boxes hold a point; the choice by score and distance is IGVG's.
covered = coverage_accuracy(output.points, [target.boxes for target in targets])
print(f"boxes with a point: {covered['CoverAcc']:.0f} %")
