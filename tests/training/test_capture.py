from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from gresbox.losses import InstAlignCriterion, MaskLoss
from gresbox.matchers import HungarianInstanceMatcher
from gresbox.models import create_model
from gresbox.structures import GresOutput, GresTarget, InstancePrediction, PaddedTargets
from gresbox.training import CapturedStep, capture_step
from gresbox.training.capture import _SecondHalf, _with_own_leaves

COUNTS = ([2, 1], [0, 3], [0, 0], [4, 4])


def some_targets(counts, size=(12, 16)):
    return [GresTarget(torch.rand(count, *size) > 0.5) for count in counts]


def random_output(queries=6, steps=3):
    pixels = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    leaves = [pixels]

    def part(*shape):
        leaves.append(torch.randn(2, *shape, dtype=torch.float64, requires_grad=True))
        return leaves[-1]

    made = [InstancePrediction(part(queries), part(queries, 4), pixels, part(queries, 4), part(5, 4)) for _ in range(steps)]
    return GresOutput(part(3, 4), part(), made[-1], tuple(made[:-1])), leaves


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("options", [{}, {"supervision": "vanilla"}, {"score_reduction": "m2f", "merged_on_no_target": False}])
def test_padding_changes_neither_losses_nor_gradients(counts, options):
    output, leaves = random_output()
    targets = some_targets(counts)
    criterion = InstAlignCriterion(HungarianInstanceMatcher(), mask_loss=MaskLoss(upsample=2), **options)
    plain, padded = criterion(output, targets), criterion(output, PaddedTargets.pack(targets, 5))
    assert plain.keys() == padded.keys()
    for name, value in plain.items():
        torch.testing.assert_close(padded[name], value, msg=name)
    wanted, got = (torch.autograd.grad(found["loss"], leaves, allow_unused=True, retain_graph=True) for found in (plain, padded))
    for ours, theirs in zip(got, wanted, strict=True):
        zeros = torch.zeros(()) if ours is None and theirs is None else torch.zeros_like(theirs if ours is None else ours)
        torch.testing.assert_close(zeros if ours is None else ours, zeros if theirs is None else theirs)


@pytest.mark.parametrize("counts", COUNTS)
def test_padded_targets_are_matched_as_a_list_is(counts):
    output, _ = random_output()
    targets, steps = some_targets(counts), (*output.aux, output.instances)
    matcher = HungarianInstanceMatcher()
    plain, padded = matcher.match_steps(steps, targets), matcher.match_steps(steps, PaddedTargets.pack(targets, 7))
    assert padded.shape == (3, 2, 7)
    assert torch.equal(padded[..., : plain.shape[-1]], plain)
    assert (padded[..., plain.shape[-1] :] == -1).all()


def test_what_cannot_be_packed_is_said():
    targets = some_targets([2, 3])
    with pytest.raises(ValueError, match=r"`most` must be at least the instances of each image, got 2 for \[2, 3\]"):
        PaddedTargets.pack(targets, 2)
    with pytest.raises(ValueError, match=r"`targets` must all have one image size, got \(4, 4\) and \(12, 16\)"):
        PaddedTargets.pack([*targets, *some_targets([1], (4, 4))], 9)
    packed = PaddedTargets.pack(targets, 3)
    with pytest.raises(TypeError, match=r"PaddedTargets: `counts` must be torch.int64, got torch.int32"):
        PaddedTargets(packed.masks, packed.counts.int(), packed.merged, packed.no_target)
    with pytest.raises(ValueError, match=r"PaddedTargets: `merged` must be \(B, H, W\)"):
        PaddedTargets(packed.masks, packed.counts, packed.merged[:, 1:], packed.no_target)


def test_packing_keeps_everything():
    targets = some_targets([2, 0])
    packed = PaddedTargets.pack(targets, 4).to("cpu")
    assert len(packed) == 2
    assert packed.counts.tolist() == [2, 0]
    assert packed.no_target.tolist() == [False, True]
    assert torch.equal(packed.masks[0, :2], targets[0].masks)
    assert not packed.masks[0, 2:].any()
    assert torch.equal(packed.merged[0], targets[0].merged)
    assert torch.utils._pytree.tree_map(lambda leaf: leaf, packed).masks.shape == (2, 4, 12, 16)


def recorded_plainly(self, arguments):
    """What a recording stands for, without a graph."""
    function, parameters = _with_own_leaves(_SecondHalf(self.model, self.criterion, self.autocast))
    return lambda *given: function(*given, *parameters)


def leaves_of(value):
    """The nodes at which autograd adds up gradients."""
    found, ahead, seen = set(), [value.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node)
        ahead += [child for child, _ in node.next_functions]
    return found


def test_a_recording_has_leaves_of_its_own_on_the_parameters_memory():
    half = torch.nn.Linear(3, 2)
    function, parameters = _with_own_leaves(half)
    leaves = [parameter.detach().requires_grad_() for parameter in parameters]
    earlier, inputs = half(torch.randn(4, 3)), torch.randn(4, 3)  # its graph lives on
    with torch.no_grad():
        half.weight += 1  # an optimiser's step
    recorded, wanted = function(inputs, *leaves), half(inputs)
    assert torch.equal(recorded, wanted)
    assert leaves_of(wanted) & leaves_of(earlier)
    assert not leaves_of(recorded) & leaves_of(earlier)
    ours, theirs = torch.autograd.grad(recorded.sum(), leaves), torch.autograd.grad(wanted.sum(), parameters)
    assert all(map(torch.equal, ours, theirs))


def tiny_batch(model, size):
    pictures = [torch.randint(0, 255, (3, size, size), dtype=torch.uint8) for _ in range(2)]
    return model.processor(pictures, ["the red circle", "a large blue square left of it"])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_captured_step_is_the_plain_one(tiny, monkeypatch, autocast):
    monkeypatch.setattr(CapturedStep, "_record", recorded_plainly)
    model = tiny.tiny_model()
    criterion, batch, targets = model.criterion(), tiny_batch(model, 64), some_targets([2, 1], (64, 64))
    step = capture_step(model, criterion, most=4, max_tokens=20, autocast=autocast)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(**batch)
    wanted, got = criterion(output, targets), step(batch, targets)
    tolerance = {} if autocast is None else {"rtol": 2e-2, "atol": 2e-2}  # padded products of bfloat16 round differently
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, msg=name, **tolerance)
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(losses["loss"], list(parameters.values()), retain_graph=True) for losses in (got, wanted)]
    for name, ours, theirs in zip(parameters, *gradients, strict=True):
        if autocast is None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    halved = step(batch, targets, num_instances=6.0)
    torch.testing.assert_close(halved["mask_bce"], got["mask_bce"] / 2)
    assert len(step.graphs) == 1


def test_the_two_halves_are_the_model(tiny):
    model = tiny.tiny_model().eval()
    batch = tiny_batch(model, 64)
    whole, parts = model(**batch), model.answer(*model.features(**batch))
    assert torch.equal(whole.merged, parts.merged)
    assert torch.equal(whole.no_target, parts.no_target)


def test_a_training_with_capture_is_the_training_without(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(CapturedStep, "_record", recorded_plainly)
    options = {"max_steps": 3, "batch": 4, "log_every": 1, "pictures": 0, "accumulate": 2}
    tiny.tiny_training(tmp_path / "plain", **options)
    tiny.tiny_training(tmp_path / "captured", capture=10, **options)
    plain, captured = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "captured"))
    for name, value in plain.items():
        torch.testing.assert_close(captured[name], value, rtol=1e-3, atol=2e-4, msg=name)


class Slope(torch.nn.Module):
    """As little as a captured step asks of a model."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def features(self, images):
        return [], images, torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool)

    def answer(self, memories, pixels, tokens, valid):
        raise AssertionError("the recording answers")


def recorded_into_one_place(self, arguments):
    """A recording whose gradient stands, as a graph's does, in the same memory after every replay."""
    place = torch.empty(2)

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, pixels):
            ctx.save_for_backward(pixels.detach().clone())
            return (weight * pixels).sum()

        @staticmethod
        def backward(ctx, grad):
            place.copy_(grad * ctx.saved_tensors[0])
            return place.detach(), None

    return lambda *given: {"loss": Replayed.apply(self.model.weight, given[5])}


def test_parts_of_a_step_add_up_though_a_graph_writes_its_gradients_in_one_place(monkeypatch):
    monkeypatch.setattr(CapturedStep, "_record", recorded_into_one_place)
    model = Slope()
    step = capture_step(model, torch.nn.Identity(), most=1, max_tokens=1)
    parts = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    for _ in range(2):
        for part in parts:
            step({"images": part}, some_targets([1]))["loss"].backward()
        assert torch.equal(model.weight.grad, parts.sum(0))
        model.weight.grad = None


def test_where_there_is_no_cuda_device_it_says_so(tmp_path, tiny):
    with pytest.raises(RuntimeError, match="capture_step: CUDA graphs need a CUDA device, got a model on cpu"):
        tiny.tiny_training(tmp_path / "run", capture=10, max_steps=1, batch=2)


def test_what_cannot_be_captured_is_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match="train: `capture` must be 0 or the training without aml, got 10"):
        tiny.tiny_training(tmp_path / "run", capture=10, max_steps=1, aml={})
    model = create_model("igvg_tiny")
    with pytest.raises(TypeError, match="capture_step: `model` must have the method features, got IGVG"):
        capture_step(model, model.criterion(), most=3, max_tokens=20)
    model = create_model("instalign_tiny", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="capture_step: `model` must be one without gradient checkpointing"):
        capture_step(model, model.criterion(), most=3, max_tokens=20)
    model = tiny.tiny_model()
    with pytest.raises(ValueError, match="capture_step: `most` must be at least 1"):
        capture_step(model, model.criterion(), most=0, max_tokens=20)
    step = capture_step(model, model.criterion(), most=4, max_tokens=3)
    with pytest.raises(ValueError, match="capture_step: `max_tokens` must be at least"):
        step(tiny_batch(model, 64), some_targets([1, 1], (64, 64)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_graph_gives_the_plain_step_on_new_inputs(tiny):
    model = tiny.tiny_model().cuda()
    criterion = model.criterion()
    step = capture_step(model, criterion, most=4, max_tokens=20)
    for counts in ([2, 1], [0, 4], [3, 3]):
        batch = {name: value.cuda() for name, value in tiny_batch(model, 64).items()}
        targets = [target.to("cuda") for target in some_targets(counts, (64, 64))]
        wanted, got = criterion(model(**batch), targets), step(batch, targets)
        parameters = list(model.parameters())
        theirs = torch.autograd.grad(wanted["loss"], parameters)
        ours = torch.autograd.grad(got["loss"], parameters)
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=name)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    assert len(step.graphs) == 1
