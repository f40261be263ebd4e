from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gresbox.blocks import GatedObjectText, ParallelObjectText, SequentialObjectText, SharedObjectText

TextFirst = functools.partial(SequentialObjectText, first="text")
ObjectsFirst = functools.partial(SequentialObjectText, first="objects")
FORMS = {
    "parallel": ParallelObjectText,
    "shared": SharedObjectText,
    "gated": GatedObjectText,
    "text": TextFirst,
    "objects": ObjectsFirst,
}


@pytest.fixture
def arrays(golden):
    return {key: torch.from_numpy(value) for key, value in golden("instalign_objtext").items()}


def load(attention, arrays, prefix):
    for ours, theirs in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
        attention.get_submodule(ours).load_state_dict(
            {"weight": arrays[f"{prefix}/w{theirs}"], "bias": arrays[f"{prefix}/b{theirs}"]}
        )


def test_parallel_golden(arrays):
    module = ParallelObjectText(16, 4).double()
    load(module.objects_read, arrays, "parallel/q2t")
    load(module.tokens_read, arrays, "parallel/t2q")
    for norm, key in ((module.query_norm, "parallel/ln_q"), (module.token_norm, "parallel/ln_t")):
        norm.load_state_dict({"weight": arrays[key][0], "bias": arrays[key][1]})
    mask = arrays["mask"]
    queries, tokens = module(arrays["q"], arrays["t"], mask, query_position=arrays["query_pos"])
    torch.testing.assert_close(queries, arrays["parallel/q"])
    torch.testing.assert_close(tokens[mask], arrays["parallel/t"][mask])
    assert not tokens[~mask].any()


def test_shared_golden(arrays):
    module = SharedObjectText(16, 4).double()
    names = {
        "objects_read.q_proj": "a",
        "objects_read.k_proj": "k",
        "objects_read.v_proj": "vt",
        "objects_read.out_proj": "oq",
        "object_value": "vq",
        "token_output": "ot",
    }
    for ours, theirs in names.items():
        module.get_submodule(ours).load_state_dict({"weight": arrays[f"shared/w{theirs}"], "bias": arrays[f"shared/b{theirs}"]})
    for_queries, for_tokens = module._attend(arrays["q"], arrays["t"], (arrays["q"], arrays["t"]), arrays["mask"])
    torch.testing.assert_close(for_queries, arrays["shared/delta_q"])
    torch.testing.assert_close(for_tokens, arrays["shared/delta_t"])


def inputs(length=4, batch=3, dtype=torch.float64):
    queries, tokens = torch.randn(batch, 5, 16, dtype=dtype), torch.randn(batch, length, 16, dtype=dtype)
    places = {"query_position": torch.randn(5, 16, dtype=dtype), "token_position": torch.randn(length, 16, dtype=dtype)}
    return queries, tokens, places


def perturbed(form, **options):
    """A module whose biases are not zero, so that a missing one shows."""
    module = FORMS[form](16, 4, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


@pytest.mark.parametrize("first", ["text", "objects"])
def test_sequential_is_two_torch_attentions(first):
    module = perturbed(first)
    queries, tokens, places = inputs()
    q_place, t_place = places.values()

    def attention(ours, query, key, value):
        theirs = nn.MultiheadAttention(16, 4, batch_first=True).double()
        with torch.no_grad():
            layers = (ours.q_proj, ours.k_proj, ours.v_proj)
            theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
            theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
        return theirs(query, key, value)[0]

    q, t = queries, tokens
    for side in ("text", "objects") if first == "text" else ("objects", "text"):
        if side == "text":
            t = module.token_norm(t + attention(module.tokens_read, t + t_place, q + q_place, q))
        else:
            q = module.query_norm(q + attention(module.objects_read, q + q_place, t + t_place, t))
    torch.testing.assert_close(module(queries, tokens, **places), (q, t))


def test_gated_multiplies_parallels_result():
    gated = perturbed("gated")
    parallel = ParallelObjectText(16, 4).double()
    parallel.load_state_dict(gated.state_dict())
    queries, tokens, places = inputs()
    placed = queries + places["query_position"], tokens + places["token_position"]
    for_queries, for_tokens = parallel._attend(queries, tokens, placed, None)
    out = gated(queries, tokens, **places)
    torch.testing.assert_close(out, (gated.query_norm(queries * (1 + for_queries)), gated.token_norm(tokens * (1 + for_tokens))))


@pytest.mark.parametrize("form", FORMS)
@given(padding=st.integers(1, 3), real=st.integers(1, 4), integer=st.booleans())
def test_padding_batch_and_order_do_not_matter(form, padding, real, integer):
    module = perturbed(form)
    queries, tokens, places = inputs()
    valid = torch.ones(3, 4, dtype=torch.long if integer else torch.bool)
    valid[0, real:] = 0
    out_queries, out_tokens = module(queries, tokens, valid, **places)

    junk = torch.randn(3, padding, 16, dtype=torch.float64) * 100
    longer = torch.cat([tokens, junk], 1), torch.cat([valid, valid.new_zeros(3, padding)], 1)
    longer_place = torch.cat([places["token_position"], junk[0]])
    padded = module(queries, *longer, query_position=places["query_position"], token_position=longer_place)
    torch.testing.assert_close(padded[0], out_queries)
    torch.testing.assert_close(padded[1][:, :4], out_tokens)
    assert not padded[1][:, 4:].any()

    order = torch.randperm(5)
    permuted = module(
        queries[:, order], tokens, valid, query_position=places["query_position"][order], token_position=places["token_position"]
    )
    torch.testing.assert_close(permuted, (out_queries[:, order], out_tokens))
    torch.testing.assert_close(module(queries[1:2], tokens[1:2], valid[1:2], **places), (out_queries[1:2], out_tokens[1:2]))


@pytest.mark.parametrize("form", FORMS)
def test_text_of_padding_only_is_read_as_its_first_token(form):
    module = perturbed(form)
    queries, tokens, _ = inputs()
    nothing, first = torch.zeros(3, 4, dtype=torch.bool), torch.tensor([[True, False, False, False]] * 3)
    out_queries, out_tokens = module(queries, tokens, nothing)
    assert not out_tokens.any()
    if form != "text":  # there the objects read the renewed text, which is zero
        torch.testing.assert_close(out_queries, module(queries, tokens, first)[0])
    assert out_queries.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"text_ffn": 24}, {"update_text": False}, {"update_text": False, "text_ffn": 24}])
def test_every_parameter_gets_a_gradient(form, options):
    module = perturbed(form, **options)
    queries, tokens, places = inputs()
    valid = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    out_queries, out_tokens = module(queries, tokens, valid, **places)
    loss = (out_queries * torch.randn_like(out_queries)).sum()
    if options.get("update_text", True):
        loss = loss + (out_tokens * torch.randn_like(out_tokens)).sum()
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        # a key's bias shifts all logits of a row alike: its gradient is zero by the mathematics
        assert parameter.grad.abs().max() > 1e-12 or name.endswith("k_proj.bias"), name


@pytest.mark.parametrize("form", ["parallel", "shared", "gated", "objects"])
def test_without_a_text_side_the_queries_are_the_same(form):
    full = perturbed(form)
    half = FORMS[form](16, 4, update_text=False).double()
    missing, _ = half.load_state_dict(full.state_dict(), strict=False)
    assert not missing
    queries, tokens, places = inputs()
    valid = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    out_queries, out_tokens = half(queries, tokens, valid, **places)
    torch.testing.assert_close(out_queries, full(queries, tokens, valid, **places)[0])
    assert torch.equal(out_tokens, tokens * valid[..., None])


def test_text_feed_forward_comes_last():
    module, plain = perturbed("parallel", text_ffn=24), ParallelObjectText(16, 4).double()
    plain.load_state_dict(module.state_dict(), strict=False)
    queries, tokens, places = inputs()
    torch.testing.assert_close(module(queries, tokens, **places)[1], module.text_ffn(plain(queries, tokens, **places)[1]))


@pytest.mark.parametrize("form", FORMS)
def test_compile_export_and_autocast(form):
    module = FORMS[form](16, 4)
    queries, tokens, places = inputs(dtype=torch.float32)
    valid = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    out = module(queries, tokens, valid, **places)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(queries, tokens, valid, **places), out)
    exported = torch.export.export(module, (queries, tokens, valid), places).module()
    torch.testing.assert_close(exported(queries, tokens, valid, **places), out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(queries, tokens, valid, **places)
    for a, b in zip(low, out, strict=True):
        assert (a.float() - b).norm() / b.norm() < 3e-2


def test_errors():
    with pytest.raises(ValueError, match="`first` must be one of 'text', 'objects', got 'both'"):
        SequentialObjectText(16, 4, first="both")
    with pytest.raises(ValueError, match="multiple of num_heads=3"):
        SharedObjectText(16, 3)
    queries, tokens, _ = inputs()
    with pytest.raises(ValueError, match=r"GatedObjectText: `tokens` must be \(B, L, C\) with C=16, got"):
        GatedObjectText(16, 4)(queries, tokens[..., :8])
    with pytest.raises(ValueError, match=r"ParallelObjectText: `valid` must be \(B, L\)"):
        ParallelObjectText(16, 4)(queries, tokens, torch.ones(3, 9))
