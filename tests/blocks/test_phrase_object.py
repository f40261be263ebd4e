from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gresbox.blocks import (
    MLP,
    AdaptiveInstanceAggregation,
    GatedObjectText,
    NoTargetHead,
    ParallelObjectText,
    PhraseObjectBlock,
    PhraseObjectTransformer,
    SequentialObjectText,
    SharedObjectText,
    attention_mask_logits,
    downsample_pixels,
)
from gresbox.ops import align_phrases

SIZES = ((2, 2), (3, 4), (6, 7))
FIELDS = ("score_logits", "mask_embeddings", "queries", "tokens", "normed")


def small(**options) -> PhraseObjectTransformer:
    return PhraseObjectTransformer(16, **{"num_layers": 4, "num_heads": 4, "ffn_dim": 32, "num_queries": 5} | options)


def inputs(batch=3, length=4, dtype=torch.float64, levels=3):
    memories = [torch.randn(batch, 16, *size, dtype=dtype) for size in SIZES[:levels]]
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[0, 2:] = False
    return memories, torch.randn(batch, 16, 12, 14, dtype=dtype), torch.randn(batch, length, 16, dtype=dtype), valid


def close(got, want, select=lambda field, value: value):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        for field in FIELDS:
            torch.testing.assert_close(getattr(a, field), select(field, getattr(b, field)), msg=lambda m, f=field: f"{f}: {m}")


def renamed(official):
    """Parameters of the official masked-attention decoder under our names."""
    state = {}
    for key, value in official.items():
        for theirs, ours in (
            ("query_feat.weight", "query_features"),
            ("query_embed.weight", "query_positions"),
            ("level_embed.weight", "level_embedding"),
            ("class_embed", "score_head"),
            ("mask_embed", "mask_head"),
        ):
            key = key.replace(theirs, ours)
        parts = key.split(".")
        kind = {"transformer_self_attention_layers": "self", "transformer_cross_attention_layers": "cross"}.get(parts[0])
        if parts[0] == "transformer_ffn_layers":
            state[".".join(["layers", parts[1], "ffn", *parts[2:]])] = value
        elif kind is None:
            state[key] = value
        elif parts[2] == "norm":
            state[f"layers.{parts[1]}.{kind}_norm.{parts[3]}"] = value
        elif parts[3] == "out_proj":
            state[f"layers.{parts[1]}.{kind}_attention.out_proj.{parts[4]}"] = value
        else:
            end = parts[3].removeprefix("in_proj_")
            for name, part in zip("qkv", value.chunk(3), strict=True):
                state[f"layers.{parts[1]}.{kind}_attention.{name}_proj.{end}"] = part
    return state


@pytest.fixture
def official(golden):
    arrays = {key: torch.from_numpy(value) for key, value in golden("m2f_decoder").items()}
    decoder = PhraseObjectTransformer(
        32, num_layers=4, num_heads=4, ffn_dim=64, num_queries=7, object_text=None, mask_head=MLP(32, 32, 16)
    )
    decoder.score_head = nn.Linear(32, 2)
    decoder.load_state_dict(renamed({key[3:]: value for key, value in arrays.items() if key.startswith("sd/")}))
    return decoder.double(), arrays


def official_steps(decoder, arrays):
    memories = [arrays[f"in/ms{i}"].double() for i in range(3)]
    return decoder(memories, arrays["in/mask_features"].double(), torch.zeros(2, 1, 32, dtype=torch.float64))


def test_without_text_it_is_mask2formers_decoder(official):
    decoder, arrays = official
    steps = official_steps(decoder, arrays)
    assert len(steps) == 5
    for index, step in enumerate(steps):
        masks = torch.einsum("bnc,bchw->bnhw", step.mask_embeddings, step.pixels)
        torch.testing.assert_close(masks, arrays[f"out/masks{index}"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decoder.score_head(step.normed), arrays[f"out/logits{index}"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(step.score_logits, arrays[f"out/logits{index}"][..., 0], atol=1e-5, rtol=1e-5)


def test_attention_masks_are_the_official_ones(official):
    decoder, arrays = official
    for index, step in enumerate(official_steps(decoder, arrays)):
        size = arrays[f"in/ms{index % 3}"].shape[-2:]
        logits = attention_mask_logits(step.mask_embeddings, downsample_pixels(step.pixels, size))
        assert torch.equal(logits < 0, arrays[f"out/attn_mask_raw{index}"])


def test_sub_layers_are_the_official_ones(official):
    decoder, arrays = official
    block: PhraseObjectBlock = decoder.layers[0]
    tgt, memory, pos, query_pos = (arrays[f"layer0/{key}"].transpose(0, 1) for key in ("tgt", "memory", "pos", "query_pos"))
    logits = 0.5 - arrays["layer0/mask"].double()  # two rows are blocked everywhere
    seen = {}
    block.cross_norm.register_forward_hook(lambda *a: seen.update(cross=a[-1]))
    block.self_norm.register_forward_hook(lambda *a: seen.update({"self": a[-1]}))
    tokens = torch.zeros(2, 1, 32, dtype=torch.float64)
    queries, _ = block(tgt, tokens, None, memory + pos, memory, logits, query_pos)
    for got, key in ((seen["cross"], "cross"), (seen["self"], "self"), (queries, "ffn")):
        torch.testing.assert_close(got.transpose(0, 1), arrays[f"layer0/{key}"], atol=1e-6, rtol=1e-6)


def test_order_of_sub_layers():
    block = PhraseObjectBlock(16, 4, 32, ParallelObjectText(16, 4))
    order = []
    for name, module in block.named_children():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    tokens, memory = torch.randn(1, 3, 16), torch.randn(1, 6, 16)
    block(torch.randn(1, 5, 16), tokens, None, memory, memory, torch.zeros(1, 5, 6), torch.zeros(5, 16))
    assert order == ["cross_attention", "cross_norm", "object_text", "self_attention", "self_norm", "ffn"]


def test_levels_go_round_and_tokens_are_carried():
    transformer = small(num_layers=5).double()
    memories, pixels, tokens, _ = inputs()
    seen = []
    for layer in transformer.layers:
        layer.register_forward_hook(lambda _, arguments, output: seen.append((arguments, output)))
    steps = transformer(memories, pixels, tokens)
    assert [arguments[3].shape[1] for arguments, _ in seen] == [4, 12, 42, 4, 12]
    assert torch.equal(seen[0][0][1], tokens)
    for index, (arguments, output) in enumerate(seen):
        assert arguments[0] is steps[index].queries
        assert arguments[1] is steps[index].tokens
        assert output[0] is steps[index + 1].queries
        assert not arguments[5].requires_grad
    assert torch.equal(steps[0].queries[0], transformer.query_features)
    torch.testing.assert_close(steps[2].normed, transformer.decoder_norm(steps[2].queries))


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    full=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_factored_attention_masks_equal_resized_masks(size, full, dtype):
    embeddings, pixels = torch.randn(2, 5, 8, dtype=dtype), torch.randn(2, 8, *full, dtype=dtype)
    masks = torch.einsum("bnc,bchw->bnhw", embeddings, pixels)
    resized = F.interpolate(masks, size=size, mode="bilinear", align_corners=False).flatten(2)
    logits = attention_mask_logits(embeddings, downsample_pixels(pixels, size))
    torch.testing.assert_close(logits, resized)
    tiny = resized.abs() < (1e-5 if dtype is torch.float32 else 1e-13)  # an exact zero may round to either side
    assert torch.equal((logits >= 0)[~tiny], (resized.sigmoid() >= 0.5)[~tiny])
    assert tiny.float().mean() < 0.01


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), down=st.integers(1, 9), across=st.integers(1, 9))
def test_downsampling_is_bilinear(rows, columns, down, across):
    """Even factors take a way of their own."""
    pixels = torch.randn(2, 3, rows * down, columns * across, dtype=torch.float64)
    reference = F.interpolate(pixels, size=(rows, columns), mode="bilinear", align_corners=False)
    torch.testing.assert_close(downsample_pixels(pixels, (rows, columns)), reference)


def test_no_step_stores_all_masks():
    """Every tensor made on the way is smaller than (B, N, H/4, W/4)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            nonlocal largest
            out = function(*arguments, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            largest = max([largest, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
            return out

    transformer = small(num_queries=64).float()
    memories = [torch.randn(1, 16, *size) for size in ((2, 2), (4, 4), (8, 8))]
    pixels = torch.randn(1, 16, 64, 64)
    with Watch():
        steps = transformer(memories, pixels, torch.randn(1, 3, 16))
        sum(step.score_logits.sum() for step in steps).backward()
    assert 0 < largest <= pixels.numel() < 64 * 64 * 64


def instalign_loss(steps, *, instances, aggregation, head):
    """What InstAlign's criterion reads: with instances scores, masks and phrases of all steps, without only scores."""
    loss = aggregation(steps[-1]).sigmoid().mean()
    last = steps[-1]
    loss = loss + F.softplus(head(last.normed, last.score_logits.sigmoid(), last.tokens, last.valid)).mean()
    for index, step in enumerate(steps):
        loss = loss + F.softplus(step.score_logits).sum()
        if instances:
            image, query = torch.tensor([0, 1]), torch.tensor([1, 3])
            loss = loss + F.softplus(step.masks_of(image, query)).mean()
            if index:
                loss = loss + align_phrases(step.queries, step.tokens, step.valid)[0][image, query].sum()
    return loss


def check_gradients(module, parts=(), instances=True):
    zero_by_mathematics = ("k_proj.bias",)  # shifts all logits of a row alike
    for name, parameter in [*module.named_parameters(), *(pair for part in parts for pair in part.named_parameters())]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith(zero_by_mathematics):
            assert parameter.grad.abs().max() > 0, name


FORMS = {
    "parallel": ParallelObjectText,
    "parallel_ffn": functools.partial(ParallelObjectText, text_ffn=24),
    "shared": SharedObjectText,
    "sequential": SequentialObjectText,
    "objects_first": functools.partial(SequentialObjectText, first="objects"),
    "gated": GatedObjectText,
    "none": None,
}


@pytest.mark.parametrize("instances", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_gradient(form, instances):
    transformer = small(object_text=FORMS[form], token_position=form == "gated").double()
    aggregation, head = AdaptiveInstanceAggregation().double(), NoTargetHead(16).double()
    instalign_loss(transformer(*inputs()), instances=instances, aggregation=aggregation, head=head).backward()
    check_gradients(transformer, (aggregation, head))


@pytest.mark.parametrize("options", [{"num_layers": 1}, {"num_layers": 2}, {"mask_head": nn.Identity()}, {"checkpoint": True}])
def test_every_parameter_gets_a_gradient_in_small_setups(options):
    transformer = small(**options).double()
    aggregation, head = AdaptiveInstanceAggregation().double(), NoTargetHead(16).double()
    instalign_loss(transformer(*inputs()), instances=False, aggregation=aggregation, head=head).backward()
    check_gradients(transformer, (aggregation, head))


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_gradient_when_nobody_reads_the_final_text(form):
    transformer = small(object_text=FORMS[form], final_text=False).double()
    aggregation, head = AdaptiveInstanceAggregation().double(), NoTargetHead(16, inputs="global").double()
    steps = transformer(*inputs())
    instalign_loss(steps, instances=False, aggregation=aggregation, head=head).backward()
    check_gradients(transformer, (aggregation, head))


def test_unused_levels_own_no_embedding():
    assert small(num_layers=2).level_embedding.shape == (2, 16)
    assert small(num_layers=4).level_embedding.shape == (3, 16)


def test_literal_equation_4_owns_no_mask_head():
    transformer = small(mask_head=nn.Identity())
    assert not list(transformer.mask_head.parameters())
    step = transformer(*inputs(dtype=torch.float32))[-1]
    torch.testing.assert_close(step.mask_embeddings, step.normed)


@given(order=st.permutations(range(5)))
def test_permuting_queries_permutes_predictions(order):
    transformer = small().double()
    arguments = inputs()
    before = transformer(*arguments)
    transformer.query_features = nn.Parameter(transformer.query_features.detach()[order])
    transformer.query_positions = nn.Parameter(transformer.query_positions.detach()[order])
    close(transformer(*arguments), before, lambda field, value: value if field == "tokens" else value[:, order])


@given(padding=st.integers(1, 3), integer=st.booleans(), form=st.sampled_from(sorted(FORMS)), position=st.booleans())
def test_padding_does_not_matter(padding, integer, form, position):
    transformer = small(object_text=FORMS[form], token_position=position).double()
    memories, pixels, tokens, valid = inputs()
    before = transformer(memories, pixels, tokens, valid)
    junk = torch.full((3, padding, 16), float("nan"), dtype=torch.float64)
    longer_valid = torch.cat([valid, torch.zeros(3, padding, dtype=torch.bool)], 1)
    after = transformer(memories, pixels, torch.cat([tokens, junk], 1), longer_valid.long() if integer else longer_valid)
    assert all(not step.tokens[:, 4:].any() for step in after)
    close(before, after, lambda field, value: value[:, :4] if field == "tokens" else value)


def test_text_of_padding_only_is_finite_and_its_padding_inert():
    transformer = small().double()
    memories, pixels, tokens, valid = inputs()
    before = transformer(memories, pixels, tokens, torch.zeros_like(valid))
    close(transformer(memories, pixels, torch.randn_like(tokens), torch.zeros_like(valid)), before)
    assert all(getattr(step, field).isfinite().all() for step in before for field in FIELDS)


@given(image=st.integers(0, 2))
def test_batch_composition_does_not_matter(image):
    transformer = small().double()
    memories, pixels, tokens, valid = inputs()
    one = slice(image, image + 1)
    alone = transformer([m[one] for m in memories], pixels[one], tokens[one], valid[one])
    close(alone, transformer(memories, pixels, tokens, valid), lambda field, value: value[one])


def test_valid_none_is_all_real():
    transformer = small().double()
    memories, pixels, tokens, valid = inputs()
    close(transformer(memories, pixels, tokens), transformer(memories, pixels, tokens, torch.ones_like(valid)))


def test_checkpointing_changes_nothing():
    plain, saving = small().double(), small(checkpoint=True).double()
    saving.load_state_dict(plain.state_dict())
    arguments = inputs()
    leaves = [*arguments[0], *arguments[1:3]]
    results = []
    for transformer in (plain, saving):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        steps = transformer(*arguments)
        sum((getattr(s, f) ** 2).sum() * (i + 1) for i, s in enumerate(steps) for f in (*FIELDS, "masks")).backward()
        results.append((steps, [leaf.grad.clone() for leaf in leaves], [p.grad for p in transformer.parameters()]))
    close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=0, atol=0)


def test_scores_start_at_their_prior():
    transformer = small(score_prior=0.02)
    torch.testing.assert_close(transformer.score_head.bias.sigmoid(), torch.tensor([0.02]))
    assert transformer(*inputs(dtype=torch.float32))[0].score_logits.sigmoid().mean() < 0.1


def test_parameter_counts_at_paper_size():
    with torch.device("meta"):
        text, plain = PhraseObjectTransformer(), PhraseObjectTransformer(object_text=None)
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in (("text", text), ("plain", plain))}
    mask2former = 14_458_624  # its transformer at 256 channels without the class head
    assert count["plain"] == mask2former + 257
    assert count["text"] - count["plain"] == 9 * (8 * (256 * 256 + 256) + 4 * 256)


@pytest.mark.parametrize("form", ["parallel", "sequential", "none"])
def test_compile_gives_the_same(form):
    transformer = small(object_text=FORMS[form], num_layers=2)
    arguments = inputs(dtype=torch.float32)
    want = transformer(*arguments)
    got = torch.compile(transformer, fullgraph=True, backend="aot_eager")(*arguments)
    close(got, want)
    want_grad, got_grad = (
        torch.autograd.grad(sum(s.masks.sum() + s.score_logits.sum() for s in steps), transformer.query_features)[0]
        for steps in (want, got)
    )
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-4, atol=1e-4)


def test_export_gives_the_same():
    transformer = small(num_layers=2)
    arguments = inputs(dtype=torch.float32)
    exported = torch.export.export(transformer, arguments).module()
    close(exported(*arguments), transformer(*arguments))


def test_autocast():
    transformer = small(num_layers=2)
    arguments = inputs(dtype=torch.float32)
    want = transformer(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = transformer(*arguments)
    assert got[0].masks.dtype == torch.float32
    error = (got[0].mask_embeddings.float() - want[0].mask_embeddings).norm() / want[0].mask_embeddings.norm()
    assert error < 3e-2
    loss = sum(step.masks.mean() + step.score_logits.float().mean() + step.tokens.float().std() for step in got)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in transformer.parameters())


def test_bfloat16_weights():
    transformer = small(num_layers=2).bfloat16()
    steps = transformer(*inputs(dtype=torch.bfloat16))
    assert all(getattr(step, field).dtype == torch.bfloat16 for step in steps for field in FIELDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "`num_layers` must be at least 1, got 0"),
        ({"num_levels": 0}, "`num_levels` must be at least 1, got 0"),
        ({"score_prior": 1.0}, r"`score_prior` must be in \(0, 1\), got 1.0"),
        ({"num_heads": 3}, "multiple of num_heads=3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_inputs():
    transformer = small().double()
    memories, pixels, tokens, valid = inputs()
    with pytest.raises(ValueError, match="`memories` must be 3 maps, lowest resolution first, got 2"):
        transformer(memories[:2], pixels, tokens, valid)
    with pytest.raises(ValueError, match=r"`memories\[1\]` must be \(B, 16, \*, \*\)"):
        transformer([memories[0], memories[1][:, :8], memories[2]], pixels, tokens, valid)
    with pytest.raises(ValueError, match=r"`pixels` must be \(B, \*, \*, \*\) with B=3"):
        transformer(memories, pixels[:2], tokens, valid)
    with pytest.raises(ValueError, match=r"`tokens` must be \(B, L, 16\)"):
        transformer(memories, pixels, tokens[..., :4], valid)
    with pytest.raises(ValueError, match=r"`valid` must be \(B, L\) with L=4"):
        transformer(memories, pixels, tokens, valid[:, :3])


def test_text_queries_let_the_first_prediction_depend_on_the_text():
    memories, pixels = [torch.randn(2, 16, size, size) for size in (2, 4)], torch.randn(2, 16, 8, 8)
    tokens, valid = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    torch.manual_seed(0)
    options = {"num_layers": 2, "num_heads": 4, "ffn_dim": 32, "num_queries": 5, "num_levels": 2}
    plain = PhraseObjectTransformer(16, **options)(memories, pixels, tokens, valid)
    transformer = PhraseObjectTransformer(16, text_queries=True, **options)
    started = transformer(memories, pixels, tokens, valid)
    assert torch.equal(plain[0].score_logits[0], plain[0].score_logits[1])
    assert not torch.allclose(started[0].score_logits[0], started[0].score_logits[1])
    assert (started[0].queries[0] - started[0].queries[1]).std(0).max() < 1e-5, "one shift for all queries of an image"
    padded = transformer(memories, pixels, torch.cat([tokens, torch.randn(2, 3, 16)], 1), torch.nn.functional.pad(valid, (0, 3)))
    torch.testing.assert_close(padded[-1].score_logits, started[-1].score_logits)
