"""
Compose blocks
==============

Every block of InstAlign stands alone. Here a segmentation model for phrases is put together from five of them, on features that
could come from any backbone and any text encoder, and trained for a few steps on one batch.
"""

import torch
from torch import nn

from gresbox import (
    AdaptiveInstanceAggregation,
    GresOutput,
    GresTarget,
    HungarianInstanceMatcher,
    InstAlignCriterion,
    MSDeformPixelDecoder,
    NoTargetHead,
    PhraseObjectTransformer,
)

torch.manual_seed(0)

# %%
# Four feature maps (strides 4, 8, 16, 32 of a 128 px picture) and six words per phrase, all random. Phrase 0 refers to two objects,
# phrase 1 to one, phrase 2 to nothing.
features = [torch.randn(3, channels, size, size) for channels, size in ((16, 32), (24, 16), (32, 8), (48, 4))]
words = torch.randn(3, 6, 64)
valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
masks = torch.zeros(3, 128, 128, dtype=torch.bool)
masks[0, 20:50, 20:60] = masks[1, 70:110, 30:60] = masks[2, 30:90, 80:120] = True
targets = [GresTarget(masks[:2]), GresTarget(masks[2:]), GresTarget(masks[:0])]


# %%
# The model: a pixel decoder, phrase-object blocks, the aggregation of instances into one mask, and the no-target head. A decoder
# step hands on its masks in factored form, so the aggregation never holds all of them.
class Composed(nn.Module):
    def __init__(self):
        super().__init__()
        self.pixel_decoder = MSDeformPixelDecoder([16, 24, 32, 48], 64, num_layers=1, num_heads=4, ffn_dim=64)
        self.decoder = PhraseObjectTransformer(64, num_layers=2, num_heads=4, ffn_dim=64, num_queries=8)
        self.aggregation = AdaptiveInstanceAggregation()
        self.no_target_head = NoTargetHead(64)

    def forward(self, features, words, valid):
        pixels, memories = self.pixel_decoder(features)
        *aux, last = self.decoder(memories, pixels, words, valid)
        no_target = self.no_target_head(last.normed, last.score_logits.sigmoid(), last.tokens, valid)
        return GresOutput(self.aggregation(last), no_target, last, tuple(aux))


model = Composed()
criterion = InstAlignCriterion(HungarianInstanceMatcher())

# %%
# The criterion matches queries to objects at every decoder step and returns each term by name.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(40):
    losses = criterion(model(features, words, valid), targets)
    optimizer.zero_grad()
    losses["loss"].backward()
    optimizer.step()
    if step % 13 == 0:
        print(f"step {step:2d}  " + "  ".join(f"{name} {value:.3f}" for name, value in losses.items()))

# %%
# The no-target probabilities move towards 0, 0, 1.
with torch.no_grad():
    output = model(features, words, valid)
print("no-target probability:", [round(p, 2) for p in output.no_target.sigmoid().tolist()])
print("merged mask:", tuple(output.resized((128, 128)).shape))
