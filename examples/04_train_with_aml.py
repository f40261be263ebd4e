"""
Train with alignment-aware masking
==================================

Alignment-aware masked training hides, in each step, a random part of the blocks of a picture that match the expression weakly; the
model is trained on what is left and asked about whole pictures. It wraps the library's models, and any other.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gresbox import AlignmentAwareMasking, AlignmentMaskedTraining, SyntheticGRES, create_model, list_models
from gresbox.ops import filter_blocks
from gresbox.training import EvaluationOptions, TrainOptions, read_log, train

torch.manual_seed(0)
train_set, val_set = SyntheticGRES("train", 400), SyntheticGRES("val", 16)
samples = [train_set[index] for index in range(8)]

# %%
# Every model of the library has ``encode``, so the wrapper needs nothing but the model. In evaluation mode it is the model itself.
for name in list_models("*_tiny"):
    model = create_model(name)
    if model.processor.tokenizer is None:  # a preset of paper size, without a vocabulary of its own
        continue
    training, criterion = AlignmentMaskedTraining(model), model.criterion()
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3))
    batch = model.processor([sample.image for sample in samples], [sample.text for sample in samples])
    targets = [sample.target for sample in samples]
    for _ in range(3):
        losses = criterion(training(**batch, targets=targets), targets)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    shares = {key: round(value.item(), 3) for key, value in training.shares.items()}
    print(f"{name}: loss {losses['loss']:.2f}, shares {shares}")

# %%
# The training loop takes the wrapper beside the model; what was hidden goes to the log. Here the patches are scored on a finer map
# than ``encode`` gives, the image encoder's stride 8, a picture of 64 px having only 2 x 2 patches at stride 32. The threshold is a
# share: the weakest 15 % of each picture's patches, however few words the expression has.
torch.manual_seed(0)
model = create_model("instalign_tiny")


def encode_finely(images, input_ids, attention_mask):
    return model.image_encoder(images)[1], model.text_encoder.encode(input_ids, attention_mask), attention_mask


masking = AlignmentAwareMasking(model.image_encoder.channels[1], model.text_encoder.width, block=8, threshold=0.15, relative=True)
training = AlignmentMaskedTraining(model, masking, encode=encode_finely)
with tempfile.TemporaryDirectory() as folder:
    options = TrainOptions(max_steps=30, log_every=10, progress=False, pictures=0, evaluation=EvaluationOptions(batch=16))
    scores = train(model, train_set, val_set, Path(folder) / "run", options, aml=training)
    for entry in read_log(Path(folder) / "run" / "log.jsonl"):
        if entry["kind"] == "train":
            print(
                f"step {entry['step']}: loss {entry['loss']:.1f}",
                {k: round(v, 3) for k, v in entry.items() if k.startswith("aml/")},
            )


# %%
# A model of one's own, in thirty lines. It knows nothing of the library; ``(image_encoder, text_encoder)`` says what to score with.
class Words(nn.Module):
    def __init__(self, vocabulary, dim):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.mixer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, batch_first=True)

    def forward(self, input_ids, attention_mask):
        return self.mixer(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)


class Segmenter(nn.Module):
    def __init__(self, vocabulary, dim=32):
        super().__init__()
        self.image_encoder = nn.Sequential(
            nn.Conv2d(3, dim, 4, stride=4),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        self.text_encoder = Words(vocabulary, dim)
        self.head = nn.Conv2d(dim, dim, 1)

    def forward(self, images, input_ids, attention_mask):
        tokens = self.text_encoder(input_ids, attention_mask) * attention_mask[..., None]
        query = tokens.sum(1) / attention_mask.sum(1, keepdim=True)
        logits = torch.einsum("bchw,bc->bhw", self.head(self.image_encoder(images)), query)
        return F.interpolate(logits[:, None], size=images.shape[-2:], mode="bilinear")[:, 0]


own = Segmenter(len(model.processor.tokenizer))
ours = AlignmentMaskedTraining(
    own, AlignmentAwareMasking(32, 32, block=8), encode=(own.image_encoder, own.text_encoder), clean_loss_weight=0.25
)
optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3)
truth = torch.stack([sample.target.merged for sample in samples])
for step in range(21):
    optimizer.zero_grad()
    total = 0.0
    for weight, arguments in ours.passes(
        batch, truth
    ):  # a quarter of the loss is the clean picture's: two calls, one after another
        loss = weight * F.binary_cross_entropy_with_logits(ours(**arguments), truth.float())
        loss.backward()
        total += loss.item()
    optimizer.step()
    if step % 10 == 0:
        print(f"own model, step {step:2d}: loss {total:.3f}")

# %%
# What the masking does to eight pictures: the similarity of the patches, the blocks that are candidates (all that hold a weakly
# matching pixel), and one draw of the masked picture.
shown = [val_set[index] for index in range(8)]
batch = model.processor([sample.image for sample in shown], [sample.text for sample in shown])
training.generator = torch.Generator().manual_seed(0)
masked, removed, similarity = training.mask_images(**batch)
candidates = filter_blocks(similarity, batch["images"].shape[-2:], threshold=0.15, relative=True, block=8, drop=1.0)
print(f"hidden: {removed.float().mean():.3f} of the pixels, {candidates.float().mean():.3f} are candidates")

try:
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit("The pictures need matplotlib: pip install 'gresbox[viz]'.") from None

figure = Figure(figsize=(6.4, 13.4), dpi=80, layout="constrained")
for row, axes in enumerate(figure.subplots(8, 4)):
    picture = shown[row].image.permute(1, 2, 0).float() / 255
    visible = torch.where(removed[row][..., None], 0.0, picture)  # drawn in black; the model sees the mean colour
    panels = {"picture": picture, "similarity": similarity[row], "candidates": picture * 0.35, "masked": visible}
    panels["candidates"] = torch.where(candidates[row][..., None], torch.tensor([0.84, 0.37, 0.0]), picture)
    for ax, (title, panel) in zip(axes, panels.items(), strict=True):
        ax.imshow(panel.numpy(), vmin=0, vmax=1, interpolation="nearest", cmap="viridis")
        ax.set_xticks([])
        ax.set_yticks([])
        if row == 0:
            ax.set_title(title, fontsize=9)
    axes[0].set_xlabel(shown[row].text, fontsize=8, loc="left")
figure.savefig("aml_examples.png")
print("pictures:", Path("aml_examples.png").stat().st_size > 0)
