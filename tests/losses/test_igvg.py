from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert, generalized_box_iou_loss

from gresbox.losses import IGVGCriterion, IGVGWeights, MaskLoss
from gresbox.matchers import HungarianInstanceMatcher, PointGuidedMatcher
from gresbox.structures import GresOutput, GresTarget, InstancePrediction, PaddedTargets

SIZE = (16, 24)
LEAVES = ("score_logits", "mask_embeddings", "boxes")
DETECTION, INSTANCE = ("cls", "box", "giou"), ("mask_bce", "mask_dice", "unmatched_bce", "unmatched_dice")
GLOBAL, MINIMAP = ("merged_bce", "merged_dice"), ("minimap_bce", "minimap_dice")
ENTRIES = {*DETECTION, *INSTANCE, *GLOBAL, *MINIMAP, "existence"}


def outputs(batch=2, queries=4, steps=3, dtype=torch.float64, grad=False, points=True):
    """A model's output with all its parts random; pixels and points shared by the layers."""

    def part(*shape):
        return torch.randn(batch, *shape, dtype=dtype).requires_grad_(grad)

    def boxes():
        corner = torch.rand(batch, queries, 2, dtype=dtype) * 0.6 + 0.2
        return torch.cat([corner, torch.rand(batch, queries, 2, dtype=dtype) * 0.3 + 0.05], -1).requires_grad_(grad)

    pixels, places, words = part(3, 8, 12), torch.rand(batch, queries, 2, dtype=dtype), torch.zeros(batch, 5, 3)
    layers = [
        InstancePrediction(part(queries), part(queries, 3), pixels, part(queries, 3).detach(), words, boxes=boxes(), points=places)
        for _ in range(steps)
    ]
    if not points:
        layers = [replace(layer, points=None) for layer in layers]
    minimap = torch.rand(batch, 4, 6, dtype=dtype).requires_grad_(grad)
    extras = {"minimap": minimap, "existence": part(2)}
    return GresOutput(part(8, 12), None, layers[-1], tuple(layers[:-1]), align_corners=True, extras=extras)


def random_targets(counts, size=SIZE):
    """Rectangles, each with another box."""
    targets = []
    for count in counts:
        masks = torch.zeros(count, *size, dtype=torch.bool)
        for j, mask in enumerate(masks):
            y, x = int(torch.randint(size[0] // 2, ())), int(torch.randint(size[1] // 2, ()))
            mask[y : y + size[0] // 2, x : x + 2 + j % (size[1] // 2)] = True
        targets.append(GresTarget(masks))
    return targets


def criterion(**options):
    return IGVGCriterion(PointGuidedMatcher(), **options)


def images(output, start, stop):
    """The same output for some images of the batch only."""

    def cut(step):
        names = (*LEAVES, "pixels", "queries", "tokens", "points")
        return replace(step, **{name: getattr(step, name)[start:stop] for name in names})

    extras = {name: value[start:stop] for name, value in output.extras.items()}
    steps = [cut(step) for step in (*output.aux, output.instances)]
    return replace(output, merged=output.merged[start:stop], instances=steps[-1], aux=tuple(steps[:-1]), extras=extras)


def leaves_of(output):
    named = {"merged": output.merged, "pixels": output.instances.pixels, **output.extras}
    for index, step in enumerate((*output.aux, output.instances)):
        named |= {f"{name} of layer {index}": getattr(step, name) for name in LEAVES}
    return named


def segmentation(logits, truth):
    probs = logits.sigmoid()
    dice = 1 - (2 * (probs * truth).sum() + 1) / (probs.sum() + truth.sum() + 1)
    return torch.stack([F.binary_cross_entropy_with_logits(logits, truth), dice])


def reference(output, targets):
    """Eq. (5) and (6) and DETR's losses query by query; only the matching is taken from the matcher."""
    steps = (*output.aux, output.instances)
    matches = PointGuidedMatcher().match_steps(steps, targets)
    queries, batch = output.instances.score_logits.shape[1], len(targets)
    instances = max(sum(len(t.masks) for t in targets), 1)
    terms = {name: torch.zeros((), dtype=torch.float64) for name in ENTRIES}
    weight_sum = positive = negative = 0.0
    class_sum, masks = [0.0] * len(steps), {"mask": torch.zeros(2).double(), "unmatched": torch.zeros(2).double()}
    for b, target in enumerate(targets):
        for s, step in enumerate(steps):
            query_of = matches[s, b].tolist()
            for i in range(queries):
                found = [j for j, query in enumerate(query_of) if query == i]
                logits = torch.stack([step.score_logits[b, i], torch.zeros(()).double()])
                weight = 1.0 if found else 0.1
                class_sum[s] += weight * F.cross_entropy(logits, torch.tensor(0 if found else 1))
                weight_sum += weight if s == 0 else 0
                if found:
                    box, truth = step.boxes[b, i], target.boxes[found[0]].double()
                    terms["box"] = terms["box"] + 0.1 * 5 * (box - truth).abs().sum() / instances
                    corners = [box_convert(each, "cxcywh", "xyxy") for each in (box, truth)]
                    terms["giou"] = terms["giou"] + 0.1 * 2 * generalized_box_iou_loss(*corners, eps=0.0) / instances
                if s == len(steps) - 1:
                    mask = torch.einsum("c,chw->hw", step.mask_embeddings[b, i], step.pixels[b])
                    mask = F.interpolate(mask[None, None], SIZE, mode="bilinear", align_corners=True)[0, 0]
                    truth = target.masks[found[0]].double() if found else torch.zeros(SIZE).double()
                    kind = "mask" if found else "unmatched"
                    masks[kind] = masks[kind] + segmentation(mask, truth)
                    positive, negative = positive + bool(found), negative + (not found)
        merged = F.interpolate(output.merged[b][None, None], SIZE, mode="bilinear", align_corners=True)[0, 0]
        union = target.masks.any(0).double()
        for prefix, weight, loss in (
            ("merged", 1.0, segmentation(merged, union)),
            ("minimap", 0.1, segmentation(output.extras["minimap"][b], union[::4, ::4])),
        ):
            for name, value in zip(("bce", "dice"), loss, strict=True):
                terms[f"{prefix}_{name}"] = terms[f"{prefix}_{name}"] + weight * value / batch
    label = torch.tensor([int(target.no_target) for target in targets])
    terms["existence"] = 0.2 * F.cross_entropy(output.extras["existence"], label, torch.tensor([0.9, 1.1]).double())
    terms["cls"] = 0.1 * sum(class_sum) / weight_sum
    for kind, weight, count in (("mask", 1.0, positive), ("unmatched", 0.2, negative)):
        for name, value in zip(("bce", "dice"), masks[kind], strict=True):
            terms[f"{kind}_{name}"] = weight * value / max(count, 1)
    return terms


@pytest.mark.parametrize("counts", [[2, 1], [0, 3], [0, 0], [6, 1], [4, 4]])
def test_matches_the_equations_and_their_gradients(counts):
    output, targets = outputs(grad=True), random_targets(counts)
    losses, expected = criterion()(output, targets), reference(output, targets)
    assert set(losses) == {"loss", *ENTRIES}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    total = sum(expected.values())
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    named = leaves_of(output)
    ours = torch.autograd.grad(losses["loss"], list(named.values()), allow_unused=True)
    theirs = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    for name, got, want in zip(named, ours, theirs, strict=True):
        if name in ("mask_embeddings of layer 0", "mask_embeddings of layer 1"):
            assert got is None  # masks are those of the last layer
            continue
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-4, atol=1e-7, msg=name)


def test_a_whole_output_has_the_official_losses(golden):
    at = {name: torch.from_numpy(value) for name, value in golden("igvg_head").items() if value.dtype.kind in "fiu"}
    masks, logits = at["out_pred_mask"], at["out_pred_class"]
    unread = torch.zeros(2, 10, 4)
    step = InstancePrediction.from_masks(logits[..., 0] - logits[..., 1], masks, unread, unread)
    step = replace(step, boxes=at["out_pred_bbox"], points=at["points_xy"])
    extras = {"minimap": at["attn_global"], "existence": at["out_nt_label"]}
    output = GresOutput(at["out_pred_global_mask"][:, 0], instances=step, align_corners=True, extras=extras)
    boxes = box_convert(at["gt_boxes0_xyxy_px"], "xyxy", "cxcywh") / 32
    empty = torch.zeros(0, 32, 32, dtype=torch.bool)
    targets = [GresTarget(at["gt_parts0"] > 0, boxes, merged=at["gt_global"][0] > 0), GresTarget(empty)]
    losses = criterion()(output, targets)
    for names, key in ((INSTANCE, "part_loss"), (GLOBAL, "global_loss"), (MINIMAP, "minimap_loss")):
        assert sum(losses[name] for name in names).item() == pytest.approx(at[key].item(), rel=2e-5), key
    masks_total = sum(losses[name] for name in (*INSTANCE, *GLOBAL, *MINIMAP))
    assert masks_total.item() == pytest.approx(at["total_loss_mask"].item(), rel=2e-5)
    assert losses["existence"].item() == pytest.approx(at["total_loss_label_nt"].item(), rel=2e-5)
    for name, key in zip(DETECTION, ("class", "bbox", "giou"), strict=True):
        # The official overlap has 1e-6 in its denominators.
        assert losses[name].item() == pytest.approx(0.1 * at[f"det_loss_{key}"].item(), rel=1e-3 if name == "giou" else 2e-5), name
    ((queries, instances), (none, _)) = PointGuidedMatcher()(logits, step.boxes, step.points, targets)
    assert queries[instances.argsort()].tolist() == at["match_last_src0"][at["match_last_dst0"].argsort()].tolist()
    assert none.numel() == 0


def test_earlier_layers_have_the_official_or_the_uniform_weights():
    output, targets = outputs(), random_targets([2, 1])
    layers = [criterion()(replace(output, instances=step, aux=()), targets) for step in (*output.aux, output.instances)]
    uniform, official, none = (criterion(aux_layers=name)(output, targets) for name in ("uniform", "official", "none"))
    for name, weight in {"cls": 1, "box": 5, "giou": 2}.items():
        earlier = sum(layer[name].item() for layer in layers[:2])
        last = layers[2][name].item()
        assert uniform[name].item() == pytest.approx(last + earlier, rel=1e-5)
        assert official[name].item() == pytest.approx(last + earlier / weight, rel=1e-5)
        assert none[name].item() == pytest.approx(last, rel=1e-5)
    for name in (*INSTANCE, *GLOBAL, *MINIMAP, "existence"):
        assert uniform[name] == official[name] == none[name] == layers[2][name]


@pytest.mark.parametrize("counts", [[2, 1], [0, 0], [9, 0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_entries_are_float32_and_add_up(counts, dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion()(outputs(dtype=dtype), random_targets(counts))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {loss.shape for loss in losses.values()} == {torch.Size([])}
    assert losses["loss"].item() == pytest.approx(sum(v.item() for k, v in losses.items() if k != "loss"), rel=1e-6)


def test_autocast_does_not_change_the_losses():
    output, targets = outputs(dtype=torch.float32), random_targets([2, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = criterion()(output, targets)
    for name, value in criterion()(output, targets).items():
        assert torch.equal(cast[name], value), name


@pytest.mark.parametrize("counts", [[0, 0], [2, 0], [9, 7]])
@pytest.mark.parametrize("options", [{}, {"aux_layers": "official", "existence": "bce", "full_size": False}])
def test_gradients_reach_every_part_on_every_batch(counts, options):
    output = outputs(dtype=torch.float32, grad=True)
    losses = criterion(**options)(output, random_targets(counts))
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    for name, leaf in leaves_of(output).items():
        if name in ("mask_embeddings of layer 0", "mask_embeddings of layer 1"):
            continue
        assert leaf.grad.isfinite().all(), name
        if not name.startswith("boxes") or any(counts):
            assert leaf.grad.abs().sum() > 0, name
        else:
            assert not leaf.grad.any(), name


@given(st.integers(0, 10_000), st.permutations(range(3)), st.permutations(range(4)))
@settings(max_examples=10)
def test_the_order_of_targets_and_queries_does_not_matter(seed, order, queries):
    torch.manual_seed(seed)
    output, (first, second) = outputs(), random_targets([3, 1])

    def moved(step):
        return replace(step, **{name: getattr(step, name)[:, list(queries)] for name in (*LEAVES, "queries", "points")})

    permuted = replace(output, instances=moved(output.instances), aux=tuple(moved(step) for step in output.aux))
    reordered = [GresTarget(first.masks[list(order)]), second]
    losses = criterion()(permuted, reordered)
    for name, value in criterion()(output, [first, second]).items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10_000), st.lists(st.integers(0, 4), min_size=4, max_size=4), st.booleans())
@settings(max_examples=15)
@pytest.mark.parametrize("options", [{}, {"aux_layers": "official", "existence": "bce"}])
def test_micro_batches_average_to_the_whole_batch(options, seed, counts, as_tensor):
    torch.manual_seed(seed)
    output, targets = outputs(batch=4, grad=True), random_targets(counts)
    total = max(sum(counts), 1)
    share = torch.tensor(total / 2) if as_tensor else total / 2
    whole = criterion(**options)(output, targets, num_instances=total)
    halves = [
        criterion(**options)(images(output, start, start + 2), targets[start : start + 2], num_instances=share) for start in (0, 2)
    ]
    for name, value in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value, rtol=1e-5, atol=1e-6)
    leaves = [output.merged, output.instances.pixels, output.instances.score_logits, output.instances.boxes]
    joint = torch.autograd.grad((halves[0]["loss"] + halves[1]["loss"]) / 2, leaves)
    alone = torch.autograd.grad(whole["loss"], leaves)
    for got, want in zip(joint, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@given(st.integers(0, 10_000), st.lists(st.integers(0, 7), min_size=2, max_size=2).filter(any))
@settings(max_examples=15)
def test_a_whole_step_is_the_batch_alone_but_for_the_existence_weights(seed, counts):
    torch.manual_seed(seed)
    output, targets = outputs(), random_targets(counts)
    alone, step = criterion()(output, targets), criterion()(output, targets, num_instances=sum(counts))
    empty = sum(count == 0 for count in counts)
    for name, value in alone.items():
        scale = (0.9 * (2 - empty) + 1.1 * empty) / 2 if name == "existence" else 1
        if name != "loss":
            assert step[name].item() == pytest.approx(scale * value.item(), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("parts", [[9, 0], [0, 9], [9, 9]])
def test_more_instances_than_queries_in_a_part_stay_finite(parts):
    output, targets = outputs(batch=2, grad=True), random_targets(parts)
    for b, number in ((0, 9.0), (1, torch.tensor(9.0))):
        losses = criterion()(images(output, b, b + 1), targets[b : b + 1], num_instances=number)
        losses["loss"].backward(retain_graph=True)
        assert 0 < losses["loss"].item() < 100


SWITCHES = [
    ("detection", set(DETECTION)),
    ("instance", set(INSTANCE)),
    ("unmatched", {"unmatched_bce", "unmatched_dice"}),
    ("merged", set(GLOBAL)),
    ("minimap", set(MINIMAP)),
    ("existence", {"existence"}),
]


@pytest.mark.parametrize(("name", "gone"), SWITCHES)
def test_a_weight_of_zero_leaves_out_its_entries_and_nothing_else(name, gone):
    output, targets = outputs(grad=True), random_targets([2, 0])
    whole, without = criterion()(output, targets), criterion(weights=IGVGWeights(**{name: 0.0}))(output, targets)
    assert set(whole) - set(without) == gone
    for entry in set(without) - {"loss"}:
        assert without[entry] == whole[entry], entry
    twice = criterion(weights=replace(IGVGWeights(), **{name: 2 * getattr(IGVGWeights(), name)}))(output, targets)
    for entry in set(whole) - {"loss"}:
        assert twice[entry].item() == pytest.approx((2 if entry in gone else 1) * whole[entry].item(), rel=1e-6), entry


@pytest.mark.parametrize(("name", "entry"), [("cls", "cls"), ("box", "box"), ("giou", "giou")])
def test_weights_inside_detection(name, entry):
    output, targets = outputs(), random_targets([2, 0])
    whole, twice = criterion()(output, targets), criterion(weights=replace(IGVGWeights(), **{name: 20.0}))(output, targets)
    assert twice[entry].item() == pytest.approx(20 / getattr(IGVGWeights(), name) * whole[entry].item(), rel=1e-5)


def test_without_instances_the_matcher_is_not_asked():
    output, targets = outputs(), random_targets([2, 0])
    weights = IGVGWeights(detection=0.0, instance=0.0)
    losses = IGVGCriterion(None, weights=weights)(replace(output, instances=None, aux=()), targets)
    assert set(losses) == {"loss", "existence", *GLOBAL, *MINIMAP}


def test_masks_alone_ask_for_the_last_layer_only():
    output, targets = outputs(), random_targets([2, 0])
    asked = []

    class Spy(PointGuidedMatcher):
        def match_steps(self, predictions, targets):
            asked.append(len(predictions))
            return super().match_steps(predictions, targets)

    losses = IGVGCriterion(Spy(), weights=IGVGWeights(detection=0.0))(output, targets)
    whole = IGVGCriterion(Spy())(output, targets)
    IGVGCriterion(Spy(), aux_layers="none")(output, targets)
    assert asked == [1, 3, 1]
    assert all(losses[name] == whole[name] for name in INSTANCE)


def test_what_the_model_does_not_predict_has_no_entry():
    output, targets = outputs(), random_targets([2, 0])
    losses = criterion()(replace(output, extras={}), targets)
    assert set(losses) == {"loss", *DETECTION, *INSTANCE, *GLOBAL}


def test_points_are_an_option_and_other_matchers_fit():
    output, targets = outputs(points=False), random_targets([2, 1])
    assert criterion()(output, targets)["loss"].isfinite()

    class ByMasks(HungarianInstanceMatcher):
        def match_steps(self, predictions, targets):
            return super().match_steps(predictions, targets, first_phrase_step=len(predictions))

    assert IGVGCriterion(ByMasks())(output, targets)["loss"].isfinite()


def test_existence_forms_and_weights():
    output, targets = outputs(), random_targets([2, 0])
    logits, label = output.extras["existence"], torch.tensor([0, 1])
    paper = criterion(existence="bce")(output, targets)["existence"]
    truth = F.one_hot(label, 2).double()
    assert paper.item() == pytest.approx(0.2 * F.binary_cross_entropy_with_logits(logits, truth).item(), rel=1e-6)
    weighted = criterion(weights=IGVGWeights(existence_classes=(1.0, 3.0)))(output, targets)["existence"]
    expected = F.cross_entropy(logits, label, torch.tensor([1.0, 3.0]).double())
    assert weighted.item() == pytest.approx(0.2 * expected.item(), rel=1e-6)
    one = replace(output, extras={"existence": logits[:, :1]})
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], 1 - label.double())
    assert criterion(existence="bce")(one, targets)["existence"].item() == pytest.approx(0.2 * expected.item(), rel=1e-6)


def test_the_merged_mask_may_hold_more_than_the_instances():
    output = outputs(batch=1)
    masks = torch.zeros(0, *SIZE, dtype=torch.bool)
    crowd = GresTarget(masks, merged=torch.ones(SIZE, dtype=torch.bool), no_target=False)
    losses, empty = criterion()(output, [crowd]), criterion()(output, [GresTarget(masks)])
    for name in ENTRIES:
        same = name in (*DETECTION, *INSTANCE)
        assert (losses[name] == empty[name]) == same, name


def test_cheaper_masks():
    output, targets = outputs(), random_targets([2, 1])
    whole = criterion()(output, targets)
    for options in ({"full_size": False}, {"mask_loss": MaskLoss(2000, importance=0.0)}):
        losses = criterion(**options)(output, targets)
        assert losses["unmatched_bce"].item() == pytest.approx(whole["unmatched_bce"].item(), rel=0.3)
        assert all(losses[name] == whole[name] for name in (*DETECTION, *GLOBAL, *MINIMAP))
    assert criterion(minimap_resize="area")(output, targets)["minimap_bce"] != whole["minimap_bce"]


class Waits(TorchDispatchMode):
    """Names of the operations whose result the host has to know before it can go on."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index")) and len(args) > 1 else ()
        selects = isinstance(indices, list | tuple) and any(i is not None and i.dtype == torch.bool for i in indices)
        if selects or name in ("_local_scalar_dense", "nonzero", "masked_select", "assign", "equal", "unique", "_unique2"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("counts", "weights"), [([2, 0, 1], {}), ([6, 1, 0], {"unmatched": 0.0}), ([0, 0, 0], {}), ([9, 9, 9], {"detection": 0.0})]
)
def test_nothing_waits_but_one_assignment(counts, weights):
    output, targets = outputs(batch=3, grad=True), random_targets(counts)
    for number in (None, torch.tensor(2.0)):
        with Waits() as waits:
            criterion(weights=IGVGWeights(**weights))(output, targets, num_instances=number)["loss"].backward()
        assert waits.names == (["assign"] if any(counts) else [])
    with Waits() as waits:  # the watch is awake
        output.merged[output.merged > 0].sum().item()
    assert set(waits.names) >= {"index", "_local_scalar_dense"}


def test_compiles_to_one_graph():
    output, targets = outputs(steps=2, dtype=torch.float32, grad=True), random_targets([2, 0])
    compiled = torch.compile(criterion(), fullgraph=True, backend="eager")
    losses = compiled(output, targets)
    for name, value in criterion()(output, targets).items():
        torch.testing.assert_close(losses[name], value)
    losses["loss"].backward()
    assert output.instances.boxes.grad is not None


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ValueError, lambda o, t: (o, t[:1]), r"IGVGCriterion: `targets` must be one per image with B=2, got 1\."),
        (TypeError, lambda o, t: (o, ["a", "b"]), r"IGVGCriterion: `targets` must be a list of GresTarget, got str\."),
        (TypeError, lambda o, t: (o, PaddedTargets.pack(t, 3)), r"IGVGCriterion: `targets` must be .*, got PaddedTargets\."),
        (
            ValueError,
            lambda o, t: (o, [t[0], *random_targets([1], (9, 9))]),
            r"IGVGCriterion: `targets` must all have one image size in a batch, got \(9, 9\) and \(16, 24\)\.",
        ),
        (
            ValueError,
            lambda o, t: (o, [t[0].to("meta"), t[1]]),
            r"IGVGCriterion: `targets` must be on cpu like the prediction, got meta; move them with target.to\(\)\.",
        ),
        (
            ValueError,
            lambda o, t: (replace(o, instances=None), t),
            r"IGVGCriterion: `output.instances` must be there, unless their weights are 0, got None\.",
        ),
        (
            ValueError,
            lambda o, t: (replace(o, instances=replace(o.instances, boxes=None)), t),
            r"PointGuidedMatcher: `boxes` of step 2 must be there, got None\.",
        ),
        (
            ValueError,
            lambda o, t: (o, [GresTarget(t[0].masks, t[0].boxes * 24), t[1]]),
            r"PointGuidedMatcher: `targets` must have cxcywh boxes in \[0, 1\], got others in image 0; divide boxes in pixels by",
        ),
        (
            ValueError,
            lambda o, t: (replace(o, extras=o.extras | {"minimap": torch.rand(2, 24)}), t),
            r"minimap_loss: `minimap` must be \(B, h, w\), got \(2, 24\)\.",
        ),
        (
            ValueError,
            lambda o, t: (replace(o, extras=o.extras | {"existence": torch.rand(2)}), t),
            r"existence_loss: `logits` must be \(B, 2\), got \(2,\)\.",
        ),
    ],
)
def test_wrong_input_is_one_clear_line(kind, change, message):
    output, targets = change(outputs(), random_targets([2, 1]))
    with pytest.raises(kind, match=f"^{message}"):
        criterion()(output, targets)


@pytest.mark.parametrize("options", [{"aux_layers": "detr"}, {"existence": "focal"}, {"minimap_resize": "cubic"}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=rf"^IGVGCriterion: `{next(iter(options))}` must be one of"):
        criterion(**options)


def test_wrong_weights_are_errors():
    with pytest.raises(ValueError, match=r"^IGVGCriterion: `weights\.box` must be at least 0\.0, got -1\."):
        criterion(weights=IGVGWeights(box=-1.0))
    with pytest.raises(ValueError, match=r"^IGVGCriterion: `weights\.existence_classes` must be at least 0\.0"):
        criterion(weights=IGVGWeights(existence_classes=(1.0, -1.0)))
    with pytest.raises(ValueError, match=r"^IGVGCriterion: `weights` must have a positive weight in the total loss, got none\."):
        criterion(weights=IGVGWeights(0.0, 0.0, 0.0, 0.2, 0.0, 0.0))
    weights = IGVGWeights(detection=0.0, instance=0.0, merged=0.0)
    with pytest.raises(
        ValueError, match=r"^IGVGCriterion: `output.extras` must hold a minimap or existence logits, because nothing"
    ):
        criterion(weights=weights)(replace(outputs(), extras={}), random_targets([1, 0]))


@pytest.mark.parametrize("number", [0, -1.0, float("nan")])
def test_the_normaliser_must_be_positive(number):
    with pytest.raises(ValueError, match=r"^IGVGCriterion: `num_instances` must be"):
        criterion()(outputs(), random_targets([1, 1]), num_instances=number)
