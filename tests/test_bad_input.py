"""Mistakes that people make, across the library: one clear line each, with the caller, the argument and what was given."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import hub_mixin
from PIL import Image

from gresbox import GRefCOCO, GRESMetric, SyntheticGRES, create_model, load_model, ops
from gresbox.blocks import AdaptiveInstanceAggregation, MSDeformPixelDecoder, NoTargetHead, PhraseObjectTransformer
from gresbox.losses import InstAlignCriterion
from gresbox.matchers import HungarianInstanceMatcher
from gresbox.models import InstAlign, base
from gresbox.structures import GresOutput, GresTarget, InstancePrediction
from gresbox.viz import overlay

rand = torch.rand
PICTURE = torch.zeros(3, 40, 50, dtype=torch.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("instalign_tiny", image_size=64, dim=32, num_queries=4, num_layers=1, pixel_layers=1).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(str(folder))
    return folder


def step(queries: int = 4) -> InstancePrediction:
    return InstancePrediction(rand(2, queries), rand(2, queries, 8), rand(2, 8, 4, 4), rand(2, queries, 8), rand(2, 5, 8))


def target(count: int = 1, size: int = 16) -> GresTarget:
    return GresTarget(torch.ones(count, size, size, dtype=torch.bool))


def criterion() -> InstAlignCriterion:
    return InstAlignCriterion(HungarianInstanceMatcher())


def merge(**options: object) -> torch.Tensor:
    return ops.aggregate_queries(rand(2, 5, 8), rand(2, 8, 4, 4), rand(2, 5), **{"slope": 0.25, **options})


def price(**options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.query_mask_cost(rand(2, 5, 8), rand(2, 8, 4, 4), rand(2, 3, 4, 4), **options)


def compare(matches: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.matched_mask_losses(rand(1, 2, 5, 8), rand(2, 8, 4, 4), rand(2, 3, 4, 4), matches, **options)


def attend(shapes: object) -> torch.Tensor:
    return ops.deformable_attention(rand(1, 20, 2, 4), shapes, rand(1, 3, 2, 2, 2, 2), rand(1, 3, 2, 2, 2))


PAIRS = "deformable_attention: `spatial_shapes` must be a (height, width) for each level, got "
SHAPES = {
    "levels as one list of numbers": (lambda: attend([4, 4, 2, 2]), PAIRS + "[4, 4, 2, 2]."),
    "levels with channels": (lambda: attend([(4, 4, 8), (2, 2, 8)]), PAIRS + "[(4, 4, 8), (2, 2, 8)]."),
    "levels as a flat tensor": (lambda: attend(torch.tensor([4, 4, 2, 2])), PAIRS + "(4,)."),
    "no levels": (lambda: attend(None), PAIRS + "None."),
    "a match beyond the queries": (
        lambda: compare(torch.full((1, 2, 3), 5)),
        "matched_mask_losses: `matches` must be in [-1, N) with N=5, got 5 to 5.",
    ),
    "a match below -1": (lambda: compare(torch.full((1, 2, 3), -2)), "`matches` must be in [-1, N) with N=5, got -2 to -2."),
    "phrase channels": (lambda: ops.align_phrases(rand(2, 5, 8), rand(2, 3, 6)), "align_phrases: `tokens` must be"),
    "phrase valid": (lambda: ops.align_phrases(rand(2, 5, 8), rand(2, 3, 8), torch.ones(2, 4)), "align_phrases: `valid` must be"),
    "scores of other queries": (
        lambda: ops.aggregate_masks(rand(2, 5, 4, 4), rand(2, 4), torch.tensor(0.25)),
        "aggregate_masks: `scores` must be (B, N) with N=5, got (2, 4).",
    ),
    "pixels of other channels": (
        lambda: ops.aggregate_queries(rand(2, 5, 8), rand(2, 6, 4, 4), rand(2, 5), torch.tensor(0.25)),
        "aggregate_queries: `pixels` must be",
    ),
    "cost targets": (lambda: ops.pairwise_mask_cost(rand(3, 16), rand(2, 15)), "pairwise_mask_cost: `targets` must be"),
    "mask pairs": (lambda: ops.mask_bce(rand(3, 16), rand(2, 16)), "mask_bce: `targets` must be"),
    "points": (lambda: ops.point_sample(rand(2, 3, 8, 8), rand(2, 5, 3)), "point_sample: `points` must be"),
    "attention heads": (
        lambda: ops.masked_attention(rand(1, 2, 3, 4), rand(1, 3, 6, 4), rand(1, 3, 6, 4), rand(1, 3, 6)),
        "masked_attention: `key` must be",
    ),
    "a cost without batch": (lambda: ops.assign(rand(3, 4)), "assign: `cost` must be"),
    "boxes of another number": (lambda: GresTarget(target(2).masks, rand(3, 4)), "GresTarget: `boxes` must be"),
    "memories of another level": (
        lambda: PhraseObjectTransformer(8, num_layers=1, num_heads=2, num_queries=3)(
            [rand(1, 8, 2, 2)], rand(1, 8, 4, 4), rand(1, 3, 8)
        ),
        "PhraseObjectTransformer: `memories` must be",
    ),
    "too few feature maps": (
        lambda: MSDeformPixelDecoder([4, 4, 4, 4], 32, num_layers=1)([rand(1, 4, 8, 8)] * 3),
        "MSDeformPixelDecoder: `features` must be",
    ),
    "tokens of another width": (
        lambda: NoTargetHead(8)(rand(2, 4, 8), rand(2, 4), rand(2, 5, 6)),
        "NoTargetHead: `tokens` must be",
    ),
    "metric sizes": (
        lambda: GRESMetric().update(torch.ones(2, 4, 4, dtype=torch.bool), torch.ones(2, 4, 5, dtype=torch.bool)),
        "GRESMetric.update: `target` must be",
    ),
    "targets of another batch": (
        lambda: criterion()(GresOutput(rand(2, 4, 4), rand(2), step()), [target()]),
        "InstAlignCriterion: `targets` must be",
    ),
    "targets of two sizes": (
        lambda: criterion()(GresOutput(rand(2, 4, 4), rand(2), step()), [target(), target(1, 8)]),
        "InstAlignCriterion: `targets` must all have one image size",
    ),
    "matcher targets": (lambda: HungarianInstanceMatcher()(step(), [target()]), "HungarianInstanceMatcher: `targets` must be"),
}

VALUES = {
    "a cost that is no number": (lambda: ops.assign(torch.full((1, 2, 2), float("nan"))), "assign: `cost` must"),
    "an unknown backend": (
        lambda: ops.align_phrases(rand(1, 2, 4), rand(1, 2, 4), backend="cuda"),
        "align_phrases: `backend` must be one of",
    ),
    "no normaliser": (
        lambda: criterion()(GresOutput(rand(2, 4, 4), rand(2), step()), [target(), target()], num_instances=0),
        "InstAlignCriterion: `num_instances` must be",
    ),
    "a criterion without instances": (
        lambda: criterion()(GresOutput(rand(2, 4, 4), rand(2)), [target(), target()]),
        "InstAlignCriterion: `output.instances` must be there",
    ),
    "an unknown form": (lambda: AdaptiveInstanceAggregation(form="mean"), "`form` must be one of"),
    "an unknown head input": (lambda: NoTargetHead(8, inputs="all"), "`inputs` must be one of"),
    "heads that do not divide": (
        lambda: PhraseObjectTransformer(10, num_heads=4),
        "`dim` must be a multiple of num_heads=4, got 10.",
    ),
    "an unknown model": (
        lambda: create_model("instaling_swin_base"),
        "create_model: no model 'instaling_swin_base'. Did you mean 'instalign_swin_base'? list_models() shows all.",
    ),
    "an unknown option": (
        lambda: create_model("instalign_tiny", num_query=3),
        "create_model: 'instalign_tiny' has no option 'num_query'. Did you mean 'num_queries'?",
    ),
    "an unknown option's value": (lambda: create_model("instalign_tiny", object_text="serial"), "`object_text` must be one of"),
    "an unknown split": (lambda: SyntheticGRES("valid", 3), "SyntheticGRES: `split` must be one of 'train', 'val'"),
    "an unknown level": (lambda: SyntheticGRES("val", 3, level="hard"), "SyntheticGRES: `level` must be one of 'basic', 'full'"),
    "an opacity": (
        lambda: overlay(PICTURE, torch.ones(40, 50, dtype=torch.bool), opacity=2),
        "overlay: `opacity` must be in [0, 1], got 2.",
    ),
}

FLOATING = "`dtype` must be a floating-point dtype such as torch.float32, got "
TYPES = {
    "a fraction of a pixel": (lambda: merge(chunk=1.5), "aggregate_queries: `chunk` must be a whole number, got 1.5."),
    "a fraction of a pixel in costs": (lambda: price(chunk=1.5), "query_mask_cost: `chunk` must be a whole number, got 1.5."),
    "a fraction of a point": (
        lambda: ops.select_points(rand(1, 4, 4), 2.5),  # type: ignore[arg-type]
        "select_points: `num_points` must be a whole number, got 2.5.",
    ),
    "a fraction of a random point": (
        lambda: ops.uncertain_points(rand(1, 4, 4), 2.5),  # type: ignore[arg-type]
        "uncertain_points: `num_points` must be a whole number, got 2.5.",
    ),
    "a number as bias": (lambda: merge(bias=0.5), "aggregate_queries: `bias` must be a tensor or None, got float."),
    "a letter as slope": (lambda: merge(slope="a"), "aggregate_queries: `slope` must be a tensor, a number or None, got str."),
    "costs as whole numbers": (lambda: price(dtype=torch.int32), f"query_mask_cost: {FLOATING}torch.int32."),
    "a dtype by name": (lambda: price(dtype="float32"), f"query_mask_cost: {FLOATING}'float32'."),
    "losses as whole numbers": (
        lambda: compare(torch.zeros(1, 2, 3, dtype=torch.int64), dtype=torch.int64),
        f"matched_mask_losses: {FLOATING}torch.int64.",
    ),
    "matches as fractions": (
        lambda: compare(rand(1, 2, 3)),
        "matched_mask_losses: `matches` must be int64, got torch.float32.",
    ),
    "a word as a number": (
        lambda: overlay(PICTURE, torch.ones(40, 50, dtype=torch.bool), opacity="half"),  # type: ignore[arg-type]
        "overlay: `opacity` must be a number, got 'half'.",
    ),
    "masks without scores": (
        lambda: AdaptiveInstanceAggregation()(rand(2, 4, 8, 8)),
        "AdaptiveInstanceAggregation: `scores` must be",
    ),
    "whole numbers as logits": (
        lambda: ops.aggregate_masks(torch.ones(1, 2, 4, 4, dtype=torch.long), rand(1, 2), torch.tensor(0.25)),
        "aggregate_masks: `masks` must be a floating-point tensor, got torch.int64.",
    ),
    "a list as queries": (
        lambda: ops.align_phrases([[1.0]], rand(1, 1, 1)),
        "align_phrases: `queries` must be a tensor, got list.",
    ),
    "targets as probabilities": (lambda: GresTarget(rand(1, 8, 8)), "GresTarget: `masks` must be bool, got torch.float32."),
    "a dict as target": (
        lambda: criterion()(GresOutput(rand(1, 4, 4), rand(1), step()), [{"masks": rand(1, 8, 8)}]),
        "InstAlignCriterion: `targets` must",
    ),
    "logits for the metric": (
        lambda: GRESMetric().update(rand(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)),
        "GRESMetric.update: `pred` must be bool",
    ),
    "probabilities to paint": (lambda: overlay(PICTURE, rand(40, 50)), "overlay: `masks` must be bool, got torch.float32."),
}


def assert_one_clear_line(error: BaseException, expected: str) -> None:
    message = str(error)
    assert expected in message
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 600
    assert "tensor(" not in message


@pytest.mark.parametrize("case", SHAPES)
def test_a_wrong_shape(case):
    call, expected = SHAPES[case]
    with pytest.raises(ValueError, match="must") as caught:
        call()
    assert_one_clear_line(caught.value, expected)


@pytest.mark.parametrize("case", VALUES)
def test_a_wrong_value(case):
    call, expected = VALUES[case]
    with pytest.raises(ValueError, match=": ") as caught:
        call()
    assert_one_clear_line(caught.value, expected)


@pytest.mark.parametrize("case", TYPES)
def test_a_wrong_type(case):
    call, expected = TYPES[case]
    with pytest.raises(TypeError, match="must") as caught:
        call()
    assert_one_clear_line(caught.value, expected)


def test_a_kernel_that_cannot_run():
    with pytest.raises(RuntimeError, match=r"align_phrases: backend='triton' is not possible here: ") as caught:
        ops.align_phrases(rand(1, 2, 4), rand(1, 2, 4), backend="triton")
    assert_one_clear_line(caught.value, "not possible here")


@pytest.mark.parametrize(
    ("image", "text", "error", "expected"),
    [
        (PICTURE, "", ValueError, "`texts` must not be empty"),
        (PICTURE, "   ", ValueError, "`texts` must not be empty"),
        (PICTURE, 5, TypeError, "`text` must be"),
        (PICTURE, ["a cat", None], TypeError, "`texts` must be strings, got NoneType."),
        (PICTURE, [], ValueError, "predict: `text` must hold at least one item, got an empty list."),
        ([], ["a cat"], ValueError, "predict: `image` must hold at least one item, got an empty list."),
        ([PICTURE, PICTURE], ["a cat"], ValueError, "`text` must be one per image with 2 images, got 1."),
        (PICTURE.float(), "a cat", TypeError, "must be PIL images or uint8 tensors, got a torch.float32 tensor."),
        (PICTURE[:1], "a cat", ValueError, "must be (3, H, W)"),
        (PICTURE[:, :0], "a cat", ValueError, "must be (3, H, W)"),
        ("photo.jpg", "a cat", TypeError, "must be PIL images or uint8 tensors, got str."),
    ],
)
def test_questions_that_cannot_be_answered(model, image, text, error, expected):
    with pytest.raises(error) as caught:
        model.predict(image, text)
    assert_one_clear_line(caught.value, expected)


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"images": rand(2, 1, 64, 64)}, ValueError, "InstAlign: `images` must be (B, 3, H, W), got (2, 1, 64, 64)."),
        (
            {"images": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)},
            TypeError,
            "InstAlign: `images` must be a floating-point tensor",
        ),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, "InstAlign: `attention_mask` must be (B, L) with L=5, got (2, 4)."),
        ({"input_ids": torch.ones(3, 5, dtype=torch.long)}, ValueError, "InstAlign: `input_ids` must be (B, L) with B=2"),
    ],
)
def test_inputs_that_do_not_fit_the_model(model, change, error, expected):
    inputs = {"images": rand(2, 3, 64, 64), "input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5)}
    with pytest.raises(error) as caught:
        model(**{**inputs, **change})
    assert_one_clear_line(caught.value, expected)


def test_a_text_of_only_padding_is_answered_with_numbers(model):
    pictures = [torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8) for _ in range(2)]
    inputs = model.processor(pictures, ["the red circle", "a cat"])
    inputs["attention_mask"][1] = 0
    output = model(**inputs)
    for part in (output.merged, output.no_target, output.instances.score_logits):
        assert part.isfinite().all()
    alone = model(**{name: value[:1] for name, value in inputs.items()})
    assert torch.allclose(output.merged[:1], alone.merged, atol=1e-4)
    losses = model.criterion()(output, [target(1, 64), target(0, 64)])
    losses["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize(
    ("spoil", "error", "expected"),
    [
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "must hold config.json, got a folder without it."),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "must hold model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "config.json must be JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), ValueError, "config.json must be one that gresbox wrote"),
        (lambda folder: cut(folder / "model.safetensors"), ValueError, "must be a safetensors file, got one that cannot be read"),
        (lambda folder: edit(folder, "model_class", "Other"), ValueError, "in config.json must be one of "),
        (lambda folder: edit(folder, "config", {"dim": 64}), ValueError, "model.safetensors must fit the config"),
    ],
)
def test_a_saved_model_that_is_spoilt(saved, tmp_path, spoil, error, expected):
    folder = tmp_path / "model"
    folder.mkdir()
    for item in saved.iterdir():
        (folder / item.name).write_bytes(item.read_bytes())
    spoil(folder)
    with pytest.raises(error) as caught:
        load_model(str(folder))
    assert_one_clear_line(caught.value, expected)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def edit(folder: Path, key: str, value: object) -> None:
    described = json.loads((folder / "config.json").read_text())
    described[key] = {**described[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(described))


def test_no_saved_model_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"load_model: no folder {tmp_path / 'nothing'}")) as caught:
        load_model(str(tmp_path / "nothing"))
    assert_one_clear_line(caught.value, "no folder")


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the Hugging Face hub, which does not answer."""
    asked: list[tuple[str, dict]] = []

    def no_copy(model_id, name, **options):
        asked.append((f"{model_id}/{name}", options))
        raise FileNotFoundError("no copy")

    monkeypatch.setattr(base, "hf_hub_download", no_copy)
    return asked


@pytest.mark.parametrize("load", [load_model, InstAlign.from_pretrained])
@pytest.mark.parametrize("path", ["runs/missing", "missing", "a/b/c", "./missing", "~/missing", "../missing", "missing/"])
def test_a_path_that_does_not_exist_is_an_error_without_network(tmp_path, monkeypatch, hub, path, load):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        load(path)
    assert_one_clear_line(caught.value, f"no folder {path}; the hub is asked for owner/name, if owner is no folder here.")
    assert not hub


@pytest.mark.parametrize("load", [load_model, InstAlign.from_pretrained])
def test_only_an_owner_and_a_name_are_asked_of_the_hub(tmp_path, monkeypatch, hub, load):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load("owner/name", revision="v1", token="t")
    assert_one_clear_line(caught.value, "load_model: no folder owner/name, and the hub gave no config.json for it (no copy).")
    assert hub == [("owner/name/config.json", {"revision": "v1", "token": "t"})]


def test_a_copy_of_the_hubs_files_gives_the_model(saved, tmp_path, monkeypatch, hub, model):
    monkeypatch.chdir(tmp_path)
    for module in (base, hub_mixin):
        monkeypatch.setattr(
            module, "hf_hub_download", lambda *place, **options: str(saved / (place[1:] or [options["filename"]])[0])
        )
    monkeypatch.setattr(base, "_saved_tokenizer", lambda model_id, hub, built: built)
    again = load_model("owner/name")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_offline_mode_is_respected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # tests run offline; without that, no_network would fail this one
    with pytest.raises(FileNotFoundError) as caught:
        load_model("owner/name", cache_dir=str(tmp_path))
    assert_one_clear_line(caught.value, "load_model: no folder owner/name, and the hub gave no config.json for it (")


def test_a_folder_without_the_dataset_shows_the_expected_layout(tmp_path):
    for root in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError) as caught:
            GRefCOCO(root, "val")
        first, *layout = str(caught.value).splitlines()
        assert first == f"GRefCOCO: `root` must hold the gRefCOCO dataset, got {root}."
        assert any("grefcoco/grefs(unc).json" in line for line in layout)
        assert any("images/train2014" in line for line in layout)


def test_a_dataset_with_a_picture_missing_or_spoilt(tmp_path):
    from gresbox.data import synthesize

    root = synthesize(tmp_path / "shapes", sizes={"val": 2})
    with pytest.raises(ValueError, match="split") as caught:
        GRefCOCO(root, "train")
    assert_one_clear_line(caught.value, "'val'")
    pictures = sorted((root / "images" / "train2014").iterdir())
    for picture in pictures:
        picture.write_bytes(b"not a picture")
    with pytest.raises(OSError, match="readable picture") as caught:
        GRefCOCO(root, "val")[0]
    assert_one_clear_line(caught.value, pictures[0].name)
    for picture in pictures:
        picture.unlink()
    with pytest.raises(FileNotFoundError):
        GRefCOCO(root, "val")[0]


def test_an_index_beyond_the_end():
    with pytest.raises(IndexError, match="`index` must be below 3, got 3"):
        SyntheticGRES("val", 3)[3]


def test_pictures_of_any_mode_are_taken(model):
    for mode in ("L", "RGBA", "P", "1", "CMYK", "I;16"):
        assert model.predict(Image.new(mode, (30, 20)), "a cat").mask.shape == (20, 30)
