"""What the BEiT-3 encoder offers trainings from random weights: a stem of convolutions, words read early, smaller first updates."""

import dataclasses

import torch
from torch.nn import functional as F

from gresbox.models.beit3 import BEIT3_TINY, Beit3Config, Beit3Encoder

SMALL = Beit3Config(dim=24, num_layers=2, num_heads=3, ffn_dim=40, patch_size=4, vocab_size=30, text_positions=12, drop_path=0.0)


def small(**options) -> Beit3Encoder:
    torch.manual_seed(3)
    return Beit3Encoder(dataclasses.replace(SMALL, **options), image_size=16)


def inputs():
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    return images, torch.randint(0, 30, (2, 6)), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()


def test_a_convolutional_stem_gives_one_vector_per_patch_and_sees_beyond_its_borders():
    encoder = small(dim=48, stem="conv", start_std=0.5).double()
    for table in (encoder.text_embedding.weight, encoder.text_position, encoder.visual_position):
        assert 0.4 < table.std() < 0.6
    images, ids, valid = inputs()
    visual, tokens = encoder(images, ids, valid)
    assert visual.shape == (2, 48, 4, 6) and tokens.shape == (2, 6, 48)
    (visual.square().sum() + tokens.square().sum()).backward()
    assert all(p.grad is not None for p in encoder.parameters())
    changed = images.clone()
    changed[:, :, 5, 5] += 1  # a pixel of patch (1, 1)
    moved = (encoder.patch_embedding(changed) - encoder.patch_embedding(images)).abs().amax((0, 1))
    assert moved[1, 1] > moved[0, 1] > 5 * moved[3, 5], "its neighbours too, others through the norms alone"


def test_patches_read_the_words_before_the_first_layer():
    encoder = small(word_fusion=True).double()
    images, ids, valid = inputs()
    read = []
    encoder.layers[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    encoder(images, ids, valid)
    changed = ids.clone()
    changed[0, 1] = 1 + ids[0, 1]
    padded = torch.where(valid.bool(), ids, ids + 1)
    for words in (changed, padded):
        encoder(images, words, valid)
    first, after, same = read
    assert (first[0, 1:] != after[0, 1:]).any(-1).all() and torch.equal(first[:, 0], after[:, 0]), "all patches, but not CLS"
    torch.testing.assert_close(first[1], after[1])
    torch.testing.assert_close(first, same)
    states, tokens = encoder.encode(images, ids, valid)
    (states.square().sum() + tokens.square().sum()).backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_what_layers_add_starts_smaller_by_the_update_scale():
    whole = small()
    scaled = small(update_scale=0.25).state_dict()
    for name, weight in whole.state_dict().items():
        factor = 0.25 if name.endswith(("out_proj.weight", "fc2.weight")) else 1.0
        torch.testing.assert_close(scaled[name], factor * weight)


def test_the_tiny_encoder_learns_to_find_what_the_text_names():
    """Three colours at random places; the word tells which to point at. Chance is one in three."""
    torch.manual_seed(0)
    config = dataclasses.replace(BEIT3_TINY, dim=32, num_layers=2, num_heads=2, ffn_dim=64, vocab_size=4, text_positions=4)
    encoder = Beit3Encoder(config, image_size=16)
    head = torch.nn.Conv2d(32, 1, 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)

    def batch(size=64):
        cells = torch.stack([torch.randperm(16)[:3] for _ in range(size)])  # (B, 3) where each colour is
        colours = torch.zeros(size, 16, 3).scatter_(1, cells[..., None].expand(-1, -1, 3), torch.eye(3).expand(size, -1, -1) * 2)
        images = F.interpolate(colours.transpose(1, 2).unflatten(-1, (4, 4)), scale_factor=4)
        wanted = torch.randint(0, 3, (size,))
        return images, torch.stack([torch.full_like(wanted, 3), wanted], dim=1), cells[torch.arange(size), wanted]

    for _ in range(120):
        images, ids, cell = batch()
        loss = F.cross_entropy(head(encoder(images, ids)[0]).flatten(1), cell)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, ids, cell = batch(200)
    assert (head(encoder(images, ids)[0]).flatten(1).argmax(1) == cell).float().mean() > 0.9
