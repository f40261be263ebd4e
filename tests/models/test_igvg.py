"""IGVG: the composition, its switches, answers, saving and loading, wrong numbers and inputs, and the commands."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from gresbox import cli
from gresbox.blocks import InstancePostprocess
from gresbox.losses import IGVGCriterion, IGVGWeights
from gresbox.metrics import CoverageAccuracy, GRECMetric
from gresbox.models import IGVG, create_model, load_model, preset_config
from gresbox.models.beit3 import BEIT3_TINY
from gresbox.models.igvg import RELEASED
from gresbox.structures import GresOutput, GresTarget, InstancePrediction

TEXTS = ["the red circle", "all squares on the left of the dog", "a dog"]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return create_model("igvg_tiny").eval()


def picture(height=50, width=70):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def targets(counts, size=64):
    made = []
    for count in counts:
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        for index in range(count):
            masks[index, 4 * index : 4 * index + 12, 4 : 4 + 5 * (index + 1)] = True
        made.append(GresTarget(masks))
    return made


def weights(**values):
    return {"loss_weights": dataclasses.replace(preset_config("igvg_tiny").loss_weights, **values)}


SWITCHES = [
    {},
    {"num_queries": 1},
    {"num_layers": 1},
    {"mask_layers": 0},
    {"mask_upsample": 0, "minimap_resize": "nearest"},
    {"unet_norm": "batch"},
    {"existence": "two_class"},
    {"aux_layers": "none"},
    {"minimap": "probs", "dropout": 0.1},
    {
        "encoder": dataclasses.replace(
            BEIT3_TINY, stem="patch", word_fusion=False, patch_size=16, drop_path=0.2, gradient_checkpointing=True
        )
    },
    dict(RELEASED),
    {"text_selection": False, "inject_text": False, "distance_weight": 0.0},  # Table 6, first row
    {"inject_text": False, "distance_weight": 0.0},
    {"inject_text": False},
    {"decoder": "detr"},  # Table 7
    {"decoder": "single_scale"},
    {"decoder": "multi_scale"},
    weights(instance=0.0),  # Table 8
    weights(merged=0.0, unmatched=0.0),
    weights(unmatched=0.0),
    weights(minimap=0.0),
    weights(existence=0.0),
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: ",".join(map(str, switch)) or "preset")
def test_every_parameter_gets_a_gradient_also_without_targets(switch):
    model = create_model("igvg_tiny", **switch)
    for counts in ((2, 0, 12), (0, 0, 0)):  # twelve instances are more than there are queries
        model.zero_grad(set_to_none=True)
        losses = model.criterion()(model(**model.processor([picture()] * 3, TEXTS)), targets(counts))
        losses["loss"].backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        assert {value.dtype for value in losses.values()} == {torch.float32}


def test_output_encode_and_criterion(tiny):
    batch = tiny.processor([picture()] * 3, TEXTS)
    output = tiny(**batch)
    assert output.merged.shape == (3, 16, 16) and output.instances.masks.shape == (3, 10, 16, 16)
    assert output.boxes.shape == (3, 10, 4) and output.points.shape == (3, 10, 2) and len(output.aux) == 1
    assert output.extras["minimap"].shape == (3, 16, 16) and output.extras["existence"].shape == (3, 2)
    torch.testing.assert_close(output.no_target, output.extras["existence"][:, 1] - output.extras["existence"][:, 0])
    visual, tokens, valid = tiny.encode(**batch)
    assert (visual.shape[1], tokens.shape[2]) == tiny.encode_dims == (64, 64)
    assert tokens.shape[:2] == valid.shape == batch["input_ids"].shape and valid.dtype == torch.bool
    criterion = tiny.criterion()
    assert isinstance(criterion, IGVGCriterion) and criterion.weights == tiny.config.loss_weights
    assert tiny.criterion(weights=IGVGWeights(), matcher=criterion.matcher).matcher is criterion.matcher
    assert criterion.instance_loss.mask_loss.upsample == 2 and not output.align_corners
    assert create_model("igvg_tiny", mask_upsample=0).criterion().instance_loss.full_size


@pytest.mark.parametrize(
    ("decoder", "sides"), [("points", [16, 8]), ("multi_scale", [16, 8]), ("single_scale", [16]), ("detr", [16])]
)
def test_a_decoder_of_one_scale_reads_the_patches_own(decoder, sides):
    model, read = create_model("igvg_tiny", decoder=decoder).eval(), []
    model.decoder.register_forward_pre_hook(lambda _, args: read.extend(level.shape[-1] for level in args[2]))
    model(**model.processor([picture()], TEXTS[:1]))
    assert read == sides


def test_a_distance_weight_of_zero_chooses_the_highest_scores():
    model = create_model("igvg_tiny", distance_weight=0.0).eval()
    output = model(**model.processor([picture()], TEXTS[:1]))
    best = output.extras["minimap"].flatten(1).topk(10).indices
    cells = (output.points * 16).long()
    assert set((cells[..., 1] * 16 + cells[..., 0])[0].tolist()) == set(best[0].tolist())


def test_points_lie_in_different_cells_and_boxes_in_the_picture(tiny):
    output = tiny(**tiny.processor([picture(), picture(60, 33)], TEXTS[:2]))
    for points in output.points:
        assert len({tuple(point) for point in points.tolist()}) == 10
    assert ((output.boxes > 0) & (output.boxes < 1)).all()


@torch.no_grad()
def test_an_answer_does_not_depend_on_its_batch(tiny):
    images = [picture(40, 60), picture(30, 20), picture()]
    together = tiny(**tiny.processor(images, TEXTS))
    alone = tiny(**tiny.processor(images[:1], TEXTS[:1]))  # a shorter text: no padding
    for name in ("merged", "boxes", "points"):
        torch.testing.assert_close(getattr(together, name)[:1], getattr(alone, name), atol=1e-5, rtol=1e-4)


def test_what_a_loss_weight_leaves_out_is_not_built():
    model = create_model("igvg_tiny", **weights(merged=0.0, existence=0.0)).eval()
    assert model.global_mask_head is None and model.existence_head is None
    output = model(**model.processor([picture()], TEXTS[:1]))
    assert output.no_target is None and sorted(output.extras) == ["minimap"]
    masks, scores = output.instances.masks, output.instances.score_logits
    expected = ((masks > 0) & (scores > 0)[..., None, None]).any(1)
    assert torch.equal(output.merged > 0, expected), "without a global mask the relevant instances are everything"
    answer = model.predict(picture(), TEXTS[0], score_threshold=0.0)
    assert torch.equal(answer.mask, answer.instance_masks.any(0))
    lone = create_model("igvg_tiny", **weights(instance=0.0)).eval()
    assert isinstance(lone.instance_head.mask_head, nn.Identity)
    answer = lone.predict(picture(), TEXTS[0], score_threshold=0.0)
    merged = lone(**lone.processor([picture()], TEXTS[:1])).resized((50, 70))[0]
    assert torch.equal(answer.mask, merged >= 0), "without instance masks the global one is everything"


def test_predict_gives_points_boxes_and_masks_in_pixels(tiny):
    answer = tiny.predict(picture(50, 70), TEXTS[0], score_threshold=0.0, no_target_threshold=1.0)
    count = len(answer.scores)
    assert count == 10 and answer.mask.shape == (50, 70) and answer.instance_masks.shape == (10, 50, 70)
    assert answer.scores.tolist() == sorted(answer.scores.tolist(), reverse=True)
    assert (answer.boxes_xyxy[:, 2:] > answer.boxes_xyxy[:, :2]).all() and answer.boxes_xyxy[:, 2].max() > 50
    output = tiny(**tiny.processor([picture(50, 70)], TEXTS[:1]))
    expected = {tuple(point) for point in (output.points[0] * torch.tensor([70.0, 50.0])).tolist()}
    assert {tuple(point) for point in answer.points.tolist()} == expected
    assert answer.phrases is None and answer.text == TEXTS[0]


def test_predict_takes_one_or_many(tiny):
    several = tiny.predict(picture(), TEXTS[:2])
    assert [answer.text for answer in several] == TEXTS[:2]
    pairs = tiny.predict([picture(40, 60), picture(30, 20)], TEXTS[:2])
    assert [tuple(answer.mask.shape) for answer in pairs] == [(40, 60), (30, 20)]
    nothing = tiny.predict(picture(), TEXTS[0], no_target_threshold=0.0, score_threshold=0.0)
    assert not nothing.mask.any() and len(nothing.scores) == 0 and nothing.instance_masks.shape == (0, 50, 70)
    with pytest.raises(ValueError, match=r"postprocess: `no_target_threshold` must be in \[0, 1\], got 7"):
        tiny.predict(picture(), TEXTS[0], no_target_threshold=7)


def made_up(scores, existence=20.0, queries=4):
    """An output with given scores; every query has a box and a mask of its own quarter."""
    count = len(scores)
    logits = torch.logit(torch.tensor(scores))
    pixels = torch.full((count, queries, 8, 8), -9.0)
    for index in range(queries):
        pixels[:, index, 4 * (index // 2) : 4 * (index // 2) + 4, 4 * (index % 2) : 4 * (index % 2) + 4] = 9.0
    boxes = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    boxes = torch.cat([boxes, torch.full((4, 2), 0.5)], -1).expand(count, -1, -1)
    step = InstancePrediction.from_masks(logits, pixels, torch.zeros(count, queries, 8), torch.zeros(count, 3, 8))
    step = dataclasses.replace(step, boxes=boxes, points=boxes[..., :2])
    extras = {"existence": torch.tensor([[existence, -existence]]).expand(count, -1)}
    return GresOutput(torch.full((count, 8, 8), -9.0), torch.zeros(count), step, extras=extras)


def test_nothing_is_answered_exactly_where_no_query_is_kept():
    tiny = create_model("igvg_tiny", score_threshold=0.7)  # the paper's
    output = made_up([[0.9, 0.1, 0.8, 0.2], [0.69, 0.6, 0.1, 0.1], [0.71, 0.6, 0.1, 0.1]])
    answers = tiny.postprocess(output, [(16, 16)] * 3, texts=TEXTS)
    official = InstancePostprocess()(output, [(16, 16)] * 3, TEXTS)
    assert [len(answer.scores) for answer in answers] == [len(answer.scores) for answer in official] == [2, 0, 1]
    assert all(torch.equal(answer.mask, other.mask) for answer, other in zip(answers, official, strict=True))
    assert [answer.no_target_prob > 0.5 for answer in answers] == [False, True, False]
    expected = [0.1 / 0.9 * 0.7 / 0.3, 0.31 / 0.69 * 0.7 / 0.3, 0.29 / 0.71 * 0.7 / 0.3]  # odds
    for answer, odds in zip(answers, expected, strict=True):
        assert answer.no_target_prob == pytest.approx(odds / (1 + odds), abs=1e-4)
    bold, shy = (tiny.postprocess(output, [(16, 16)] * 3, no_target_threshold=p) for p in (0.9, 0.3))
    assert [bool(answer.mask.any()) for answer in bold] == [True, False, True], "no query is kept there, and nothing is merged"
    assert [bool(answer.mask.any()) for answer in shy] == [True, False, False]
    loose = tiny.postprocess(output, [(16, 16)] * 3, score_threshold=0.65)
    assert [len(answer.scores) for answer in loose] == [2, 1, 1] and loose[1].no_target_prob < 0.5
    kept = create_model("igvg_tiny", score_threshold=0.5).postprocess(output, [(16, 16)] * 3)
    assert [len(answer.scores) for answer in kept] == [2, 2, 2], "the config's threshold"
    for threshold in (0.0, 1.0):
        probabilities = [a.no_target_prob for a in tiny.postprocess(output, [(16, 16)] * 3, score_threshold=threshold)]
        assert all(math.isfinite(p) for p in probabilities) and all((p > 0.5) == (threshold == 1.0) for p in probabilities)


def test_without_instances_the_answer_is_the_same_mask(tiny):
    output = made_up([[0.9, 0.1, 0.8, 0.2]])
    whole, lean = (tiny.postprocess(output, [(16, 20)], instances=flag)[0] for flag in (True, False))
    assert torch.equal(whole.mask, lean.mask) and lean.scores.shape == (0,) and lean.instance_masks.shape == (0, 16, 20)
    assert lean.points is None and lean.boxes_xyxy.shape == (0, 4)


def test_detections_and_points_are_what_the_metrics_take(tiny):
    output = made_up([[0.9, 0.1, 0.8, 0.2]])
    truth = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 8.0, 8.0, 16.0]])
    metric, coverage = GRECMetric(protocol="instancevg"), CoverageAccuracy()
    found = tiny.detect(output, [(16, 16)])
    assert len(found[0].scores) == 4
    metric.update([item._asdict() for item in found], [truth])
    coverage.update(output.points, [torch.tensor([[0.25, 0.25, 0.5, 0.5]])])
    assert metric.compute()["F1"] == 100 and coverage.compute()["CoverAcc"] == 100
    suppressed = tiny.detect(dataclasses.replace(output, instances=same_boxes(output.instances)), [(16, 16)], nms_iou=0.7)
    assert len(suppressed[0].scores) == 1


def same_boxes(step):
    return dataclasses.replace(step, boxes=step.boxes[:, :1].expand_as(step.boxes))


@pytest.mark.parametrize("switch", [{}, weights(existence=0.0), {"decoder": "detr"}], ids=["preset", "left-out", "detr"])
def test_saving_and_loading_give_the_same_bits(switch, tmp_path):
    model = create_model("igvg_tiny", **switch).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["foreign_parts"] == {}
    again = load_model(str(tmp_path))
    assert isinstance(again, IGVG) and again.config == model.config and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    batch = model.processor([picture()], ["the two dogs"])
    with torch.no_grad():
        one, two = model(**batch), again(**batch)
    for name in ("merged", "boxes", "points"):
        assert torch.equal(getattr(one, name), getattr(two, name))


def test_a_swapped_part_is_named_and_asked_for(tmp_path):
    model = create_model("igvg_tiny")
    model.existence_head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"give them: existence_head=.*Sequential\(\.\.\.\)"):
        load_model(str(tmp_path))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 2))
    again = load_model(str(tmp_path), existence_head=head)
    assert torch.equal(again.existence_head[2].weight, model.existence_head[2].weight)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"encoder": "beit3"}, "`encoder` must be a Beit3Config, got 'beit3'."),
        ({"loss_weights": None}, "`loss_weights` must be a IGVGWeights, got None."),
        ({"vocabulary": "red"}, "`vocabulary` must be a tuple, got 'red'."),
        ({"vocabulary": ("red", 3)}, "`vocabulary` must be words, got others."),
        ({"num_queries": "ten"}, "`num_queries` must be a whole number, got 'ten'."),
        ({"num_queries": 257}, "`num_queries` must be in [1, 256], got 257."),
        ({"num_layers": 0}, "`num_layers` must be at least 1, got 0."),
        ({"mask_upsample": -1}, "`mask_upsample` must be at least 0, got -1."),
        ({"dim": 30, "unet_norm": "batch"}, "`dim` must be a multiple of 4 and of num_heads=4, got 30."),
        ({"dim": 20}, "`dim` must be a multiple of 8 and of num_heads=4, got 20."),
        ({"image_size": 62}, "`image_size` must be a multiple of encoder.patch_size=4, got 62."),
        ({"max_tokens": 65}, "`max_tokens` must be in [3, 64], got 65."),
        ({"max_tokens": 2}, "`max_tokens` must be in [3, 64], got 2."),
        ({"pyramid_scales": (4, 2)}, "`pyramid_scales` must hold 1, the patches' own resolution, got (4, 2)."),
        ({"decoder": "none"}, "`decoder` must be one of 'points', 'multi_scale', 'single_scale', 'detr', got 'none'."),
        ({"existence": "softmax"}, "`existence` must be one of 'two_class', 'bce', got 'softmax'."),
        ({"dropout": 1.5}, "`dropout` must be in [0, 1], got 1.5."),
        ({"score_threshold": 7}, "`score_threshold` must be in [0, 1], got 7."),
        ({"text_selection": False}, "`inject_text` must be False without text_selection"),
        ({"inject_text": False, **weights(minimap=0.0)}, "`loss_weights.minimap` must be above 0 without inject_text"),
        (weights(detection=0.0), "`loss_weights` must be above 0 for detection, its classes and its boxes"),
        (weights(merged=0.0, instance=0.0), "`loss_weights` must be above 0 for merged or instance masks, got 0 for both."),
        ({"encoder": dataclasses.replace(BEIT3_TINY, final_text=False)}, "`encoder.final_text` must be True"),
    ],
)
def test_a_wrong_number_in_a_config_is_one_line(override, message):
    with pytest.raises((TypeError, ValueError), match=r"^IGVGConfig: ") as caught:
        dataclasses.replace(preset_config("igvg_tiny"), **override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_pictures_of_the_papers_models_are_whole_patches_of_16_pixels():
    for name in ("igvg_beit3_base", "igvg_beit3_large"):
        with pytest.raises(ValueError, match=r"^IGVGConfig: `image_size` must be a multiple of encoder.patch_size=16, got 330\.$"):
            create_model(name, image_size=330)
    with torch.device("meta"):
        model = create_model("igvg_beit3_base")
        ids = torch.ones(1, 4, dtype=torch.long)
        with pytest.raises(ValueError, match=r"H and W multiples of 16, got \(1, 3, 320, 328\)\.$"):
            model(torch.zeros(1, 3, 320, 328), ids, ids)


@pytest.mark.parametrize("name", ["text_score", "pooling", "minimap", "reference"])
def test_an_unknown_word_in_a_config_is_refused_by_the_part_that_reads_it(name):
    with pytest.raises(ValueError, match=r"must be one of .* got 'nonsense'\."):
        create_model("igvg_tiny", **{name: "nonsense"})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(1, 3, 62, 64), torch.ones(1, 4).long(), torch.ones(1, 4)), "H and W multiples of 4, got (1, 3, 62, 64)"),
        ((torch.zeros(1, 3, 8, 8), torch.ones(1, 4).long(), torch.ones(1, 4)), "`num_queries` must be in [1, 4], got 10"),
        ((torch.zeros(1, 3, 64, 64), torch.ones(1, 65).long(), torch.ones(1, 65)), "`input_ids` must be at most 64 tokens long"),
        ((torch.zeros(2, 3, 64, 64), torch.ones(1, 4).long(), torch.ones(1, 4)), "`input_ids` must be (B, L) with B=2, got (1, 4)"),
        ((torch.zeros(1, 3, 64, 64), torch.ones(1, 4).long(), torch.ones(1, 5)), "`attention_mask` must be (B, L) with L=4"),
        ((torch.zeros(1, 3, 64, 64).byte(), torch.ones(1, 4).long(), torch.ones(1, 4)), "`images` must be a floating-point tensor"),
    ],
)
def test_inputs_that_do_not_fit(inputs, message, tiny):
    with pytest.raises((TypeError, ValueError)) as caught:
        tiny(*inputs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_targets_that_do_not_fit(tiny):
    output, criterion = tiny(**tiny.processor([picture()], TEXTS[:1])), tiny.criterion()
    masks = targets((1,))[0].masks
    for boxes in (torch.tensor([[10.0, 10.0, 20.0, 20.0]]), torch.tensor([[0.5, 0.5, 1.5, 0.2]])):
        with pytest.raises(ValueError, match=r"`targets` must have cxcywh boxes in \[0, 1\], got others in image 0"):
            criterion(output, [GresTarget(masks, boxes)])
    losses = criterion(output, [GresTarget(masks, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))])
    assert losses["loss"].isfinite(), "a box without area is a point"
    with pytest.raises(ValueError, match="`targets` must"):
        criterion(output, [])


def test_a_text_of_padding_and_a_text_shorter_than_the_queries_are_finite(tiny):
    ids = torch.ones(2, 3, dtype=torch.long)
    output = tiny(torch.randn(2, 3, 64, 64), ids, torch.tensor([[0, 0, 0], [1, 1, 0]]))
    parts = (output.merged, output.boxes, output.points, output.instances.score_logits, *output.extras.values())
    assert all(part.isfinite().all() for part in parts)
    assert len(tiny.postprocess(output, [(64, 64)] * 2)) == 2


def test_pictures_of_another_size_autocast_and_export(tiny):
    ids, valid = torch.randint(4, 50, (1, 6)), torch.ones(1, 6, dtype=torch.long)
    assert tiny(torch.randn(1, 3, 96, 64), ids, valid).merged.shape == (1, 24, 16)
    images = torch.randn(1, 3, 64, 64)
    whole = tiny(images, ids, valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = tiny(images, ids, valid)
    assert low.merged.dtype == low.boxes.dtype == low.extras["existence"].dtype == torch.float32
    assert (low.merged - whole.merged).abs().max() < 0.2
    exported = torch.export.export(tiny, (images, ids, valid)).module()
    torch.testing.assert_close(exported(images, ids, valid).boxes, whole.boxes)


def test_it_trains_on_masked_pictures_too(tiny):
    from gresbox.training import AlignmentMaskedTraining

    model = create_model("igvg_tiny")
    training = AlignmentMaskedTraining(model)
    output = training(**model.processor([picture()] * 2, TEXTS[:2]))
    model.criterion()(output, targets((1, 0)))["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_commands_train_evaluate_and_predict(tmp_path, capsys):
    out = tmp_path / "run"
    sizes = ["--train-size", "64", "--val-size", "8", "--batch", "4", "--pictures", "3", "--quiet"]
    train = ["train", "--model", "igvg_tiny", "--data", "synthetic", "--max-steps", "20", "--out", str(out), *sizes]
    assert cli.main(train) == 0, capsys.readouterr().err
    assert {"config.json", "metrics.json", "model.safetensors", "loss_curve.png", "pictures.png"} <= {p.name for p in out.iterdir()}
    assert cli.main(["evaluate", "--checkpoint", str(out), "--size", "4", "--quiet"]) == 0
    from torchvision.io import write_png

    write_png(picture(), str(tmp_path / "in.png"))
    answer = tmp_path / "answer.png"
    command = ["predict", "--checkpoint", str(out), "--image", str(tmp_path / "in.png"), "--text", TEXTS[0], "--out", str(answer)]
    assert cli.main(command) == 0 and answer.is_file()
    assert "no-target probability" in capsys.readouterr().out
    assert cli.main(["models", "igvg_tiny"]) == 0 and "query_generation" in capsys.readouterr().out
