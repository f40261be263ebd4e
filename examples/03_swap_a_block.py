"""
Swap a block
============

A model is a handful of named parts. Put another module with the same call in the place of one, and training, prediction and saving
go on working: here the no-target head is replaced by one of our own, and the aggregation by its noisy-or form.
"""

import tempfile

import torch
from torch import nn

from gresbox import AdaptiveInstanceAggregation, SyntheticGRES, create_model, load_model

torch.manual_seed(0)
model = create_model("instalign_tiny")
print("parts:", ", ".join(model.part_names))


# %%
# A no-target head that asks only how relevant the most relevant query is. Its call is the one of
# :class:`gresbox.blocks.NoTargetHead`; nothing else is needed.
class BestQueryHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.offset = nn.Parameter(torch.tensor(0.5))

    def forward(self, queries, scores, tokens, valid=None):
        return self.scale * (self.offset - scores.amax(dim=1))


model.no_target_head = BestQueryHead()
model.aggregation = AdaptiveInstanceAggregation(form="noisy_or")

# %%
# It trains like the original.
samples = [SyntheticGRES("train", 64)[index] for index in range(8)]
batch = model.processor([sample.image for sample in samples], [sample.text for sample in samples])
targets = [sample.target for sample in samples]
criterion = model.criterion()
optimizer = torch.optim.AdamW(model.parameter_groups(1e-3))
for step in range(6):
    losses = criterion(model(**batch), targets)
    optimizer.zero_grad()
    losses["loss"].backward()
    optimizer.step()
    print(f"step {step}: loss {losses['loss']:.3f}")

# %%
# Saving notes which parts the config does not know; loading asks for them by name.
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    try:
        load_model(folder)
    except ValueError as error:
        print(error)
    again = load_model(folder, no_target_head=BestQueryHead(), aggregation=AdaptiveInstanceAggregation(form="noisy_or"))

answer = again.predict(samples[0].image, samples[0].text)
print(f"{answer.text!r}: {int(answer.mask.sum())} pixels, no-target probability {answer.no_target_prob:.2f}")
