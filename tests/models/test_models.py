"""Presets, prediction, saving and loading, parameter groups: what every model offers."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn

from gresbox.models import MODELS, InstAlign, create_model, list_models, load_model
from gresbox.structures import GresTarget


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return create_model("instalign_tiny").eval()


def picture(height=50, width=70):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def target(size, count):
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    for index in range(count):
        masks[index, 8 * index : 8 * index + 12, 4 : 4 + 9 * (index + 1)] = True
    return GresTarget(masks)


def test_every_preset_is_listed_and_a_typo_gets_a_suggestion():
    assert list_models() == sorted(MODELS)
    assert list_models("instalign*tiny") == ["instalign_swin_tiny", "instalign_tiny"]
    with pytest.raises(ValueError, match=r"create_model: no model 'instaling_swin_base'. Did you mean 'instalign_swin_base'\?"):
        create_model("instaling_swin_base")
    with pytest.raises(ValueError, match=r"no option 'num_query'. Did you mean 'num_queries'\?"):
        create_model("instalign_tiny", num_query=3)


@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0, 0)], ids=["mixed", "all-empty"])
def test_every_parameter_gets_a_gradient(counts):
    model = create_model("instalign_tiny")
    size = model.config.image_size
    batch = model.processor([picture()] * 3, ["the red circle", "all squares", "a dog"])
    losses = model.criterion()(model(**batch), [target(size, count) for count in counts])
    losses["loss"].backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert all(value.dtype == torch.float32 for value in losses.values())


@pytest.mark.parametrize(
    "switch",
    [
        {"object_text": "shared"},
        {"object_text": "sequential"},
        {"object_text": "gated"},
        {"literal_masks": True},
        {"aggregation": "noisy_or"},
        {"aggregation": "select"},
        {"aggregation_prelu": False},
        {"slope_per_query": True},
        {"aggregation_bias": True},
        {"no_target_inputs": "global"},
        {"no_target_inputs": "sentence"},
        {"no_target_inputs": "mean"},
        {"num_layers": 2},
        {"num_layers": 1},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_every_switch_trains_every_parameter_that_it_builds(switch):
    model = create_model("instalign_tiny", **switch)
    batch = model.processor([picture()] * 2, ["the red circle", "all squares"])
    for counts in ((1, 2), (0, 0)):
        model.zero_grad(set_to_none=True)
        model.criterion()(model(**batch), [target(model.config.image_size, count) for count in counts])["loss"].backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("supervision", ["none", "vanilla", "phrase"])
def test_supervision_switches_train_every_parameter(supervision):
    model = create_model("instalign_tiny")
    batch = model.processor([picture()] * 2, ["the red circle", "all squares"])
    criterion = model.criterion(supervision=supervision)
    criterion(model(**batch), [target(model.config.image_size, 1), target(model.config.image_size, 0)])["loss"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_predict_returns_answers_at_the_pictures_own_sizes(tiny):
    tiny.train()
    answer = tiny.predict(picture(50, 70), "the red circle on the left", no_target_threshold=1.0, score_threshold=0.0)
    assert tiny.training, "predict restores the training flag"
    tiny.eval()
    assert answer.mask.shape == (50, 70) and answer.mask.dtype == torch.bool
    assert answer.instance_masks.shape[1:] == (50, 70)
    assert answer.scores.tolist() == sorted(answer.scores.tolist(), reverse=True)
    assert (answer.boxes_xyxy[:, 2:] > answer.boxes_xyxy[:, :2]).all()
    for words in answer.phrases:
        assert [word for word, _ in words] == ["the", "red", "circle", "on", "the", "left"]
        assert sum(weight for _, weight in words) == pytest.approx(1.0)


def test_predict_takes_one_or_many(tiny):
    image = Image.fromarray(picture(40, 60).permute(1, 2, 0).numpy())
    several = tiny.predict(image, ["the dog", "all cats"])
    assert [answer.text for answer in several] == ["the dog", "all cats"]
    pairs = tiny.predict([image, picture(30, 20)], ["the dog", "all cats"])
    assert [tuple(answer.mask.shape) for answer in pairs] == [(40, 60), (30, 20)]
    alone = tiny.predict(image, "the dog")
    assert alone.no_target_prob == pytest.approx(pairs[0].no_target_prob, abs=1e-5)
    assert torch.equal(alone.mask, pairs[0].mask), "an answer does not depend on its batch"


def test_nothing_means_an_empty_mask_and_no_instances(tiny):
    answer = tiny.predict(picture(), "the dog", no_target_threshold=0.0, score_threshold=0.0)
    assert not answer.mask.any() and len(answer.scores) == 0 and answer.instance_masks.shape == (0, 50, 70)


def test_saving_and_loading_give_the_same_bits(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert isinstance(again, InstAlign) and again.config == tiny.config and not again.training
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    batch = tiny.processor([picture()], ["the two dogs"])
    assert torch.equal(batch["input_ids"], again.processor([picture()], ["the two dogs"])["input_ids"])
    with torch.no_grad():
        assert torch.equal(tiny(**batch).merged, again(**batch).merged)
    assert "library_name: gresbox" in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob(".*partial*"))


class OtherHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, queries, scores, tokens, valid=None):
        return self.weight.expand(len(queries))


def test_a_swapped_part_is_named_and_asked_for(tmp_path):
    model = create_model("instalign_tiny")
    model.no_target_head = OtherHead()
    model.save_pretrained(tmp_path)
    assert list(json.loads((tmp_path / "config.json").read_text())["foreign_parts"]) == ["no_target_head"]
    with pytest.raises(ValueError, match=r"saved with parts of its own, give them: no_target_head=.*OtherHead\(\.\.\.\)"):
        load_model(str(tmp_path))
    again = load_model(str(tmp_path), no_target_head=OtherHead())
    batch = again.processor([picture()], ["a dog"])
    assert again(**batch).no_target.item() == 3.0
    with pytest.raises(ValueError, match="`decodr` must be one of"):
        load_model(str(tmp_path), decodr=OtherHead())


def test_parameter_groups_split_by_rate_and_decay():
    model = create_model("instalign_tiny")
    groups = {group["name"]: group for group in model.parameter_groups(1.0, weight_decay=0.1, backbone_lr_scale=0.1)}
    where = {id(parameter): name for name, group in groups.items() for parameter in group["params"]}
    assert sorted(where) == sorted(id(parameter) for parameter in model.parameters()), "each parameter once"
    named = {name: where[id(parameter)] for name, parameter in model.named_parameters()}
    assert named["aggregation.slope"] == "main_no_decay"
    assert named["text_encoder.body.embeddings.word_embeddings.weight"] == "backbone_no_decay"
    assert named["text_encoder.body.embeddings.LayerNorm.weight"] == "backbone_no_decay"
    assert named["text_encoder.projection.weight"] == "main"
    assert named["image_encoder.norms.0.weight"] == "main_no_decay"
    assert named["pixel_decoder.level_embedding"] == "main_no_decay"
    assert groups["backbone"]["lr"] == 0.1 and groups["main_no_decay"]["weight_decay"] == 0.0
    decayed = {id(parameter) for group in groups.values() if group["weight_decay"] for parameter in group["params"]}
    norms = [module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding))]
    assert not any(id(parameter) in decayed for module in norms for parameter in module.parameters())


def test_the_tokenizer_of_a_paper_size_preset_is_asked_for_in_one_line():
    from gresbox.models import GresProcessor

    with pytest.raises(RuntimeError, match="`tokenizer` must be set before texts are processed: use pretrained=True"):
        GresProcessor(480)([picture()], ["a dog"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"image_encoder": "swin"}, "`image_encoder` must be a ImageEncoderConfig, got 'swin'"),
        ({"num_heads": 0}, "`num_heads` must be at least 1, got 0"),
        ({"num_queries": "ten"}, "`num_queries` must be a whole number, got 'ten'"),
        ({"max_tokens": 2}, "`max_tokens` must be at least 3, got 2"),
        ({"vocabulary": "red"}, "`vocabulary` must be words, got str"),
        ({"dim": 30}, "`dim` must be a multiple of 4 and of num_heads=4, got 30"),
        ({"object_text": "both"}, "`object_text` must be one of 'parallel'"),
    ],
)
def test_a_wrong_number_in_a_config_is_one_line(override, message):
    with pytest.raises((TypeError, ValueError), match=r"^InstAlignConfig: ") as caught:
        create_model("instalign_tiny", **override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [{"config": []}, {"processor": None}, {"model_class": ["InstAlign"]}], ids=str)
def test_a_config_file_of_another_form_is_one_line(part, tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, **part}))
    with pytest.raises(ValueError, match=r"config\.json must be one that gresbox wrote"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("threshold", [7.0, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold, tiny):
    with pytest.raises(ValueError, match=r"postprocess: `no_target_threshold` must be in \[0, 1\]"):
        tiny.predict(picture(), "the dog", no_target_threshold=threshold)


def test_the_criterion_takes_a_mask_loss_of_ones_own(tiny):
    from gresbox.losses import MaskLoss

    mine = MaskLoss(50)
    assert tiny.criterion(mask_loss=mine).mask_loss is mine
    assert tiny.criterion(num_points=60).mask_loss.num_points == 60
    assert tiny.criterion().weights == tiny.config.loss_weights
