from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gresbox.ops import inner_tokens, match_patches, random_projections
from gresbox.testing import assert_matches_reference

BACKENDS = pytest.mark.parametrize("backend", ["eager", "auto"])
CASES = {
    "token_s1": {},
    "token_s20": {"scale": 20.0},
    "token_nonorm": {"normalize": False},
    "token_nomask": {"scale": 20.0},
    "patch_s1": {"over": "patches"},
    "patch_s20": {"over": "patches", "scale": 20.0},
}


@BACKENDS
@pytest.mark.parametrize("case", CASES)
def test_golden_scores(golden, case, backend):
    arrays = {name: torch.from_numpy(array) for name, array in golden("aml_paper_pmme").items()}
    valid = None if case == "token_nomask" else arrays["token_mask"]
    inputs = [arrays[name] for name in ("V", "T", "W_i", "W_t")]
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-6 if case == "token_nonorm" else 1e-6)):
        visual, tokens, left, right = (array.to(dtype) for array in inputs)
        score = match_patches(visual, tokens, valid, left, right, backend=backend, **CASES[case])
        assert (score.double() - arrays[f"{case}_score"]).abs().max() <= limit


def by_loops(visual, tokens, left, right, valid, scale, over):
    """The equation, one patch and one token at a time."""
    rows = []
    for sample, (patches, words) in enumerate(zip(visual, tokens, strict=True)):
        real = [index for index in range(words.shape[0]) if valid[sample, index]]
        unit = [patch / patch.norm() for patch in patches]
        logits = torch.stack(
            [torch.stack([scale * (v @ left) @ (words[i] / words[i].norm() @ right) for i in range(len(words))]) for v in unit]
        )
        if not real:
            rows.append(torch.ones(len(patches), dtype=visual.dtype) + 0 * logits.sum())
            continue
        match = logits[:, real].softmax(1) if over == "tokens" else logits.softmax(0)[:, real]
        rows.append(match.max(1).values)
    return torch.stack(rows)


@BACKENDS
@pytest.mark.parametrize("over", ["tokens", "patches"])
def test_values_and_gradients_are_the_equations(over, backend):
    valid = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    inputs = [torch.randn(3, 5, 8), torch.randn(3, 4, 6), torch.randn(8, 7), torch.randn(6, 7)]
    assert_matches_reference(
        lambda v, t, a, b: match_patches(v, t, valid, a, b, scale=2.0, over=over, backend=backend),
        lambda v, t, a, b: by_loops(v, t, a, b, valid, 2.0, over),
        inputs,
        dtype=torch.float64,
    )


@pytest.mark.parametrize(("patches", "length", "dim"), [(50, 3, 40), (3, 50, 40), (6, 5, 1)], ids=["tokens", "patches", "printed"])
def test_auto_takes_the_cheapest_order_of_the_products(patches, length, dim):
    visual, tokens = torch.randn(2, patches, 16), torch.randn(2, length, 12)
    left, right = torch.randn(16, dim), torch.randn(12, dim)
    counts, results = {}, {}
    for backend in ("eager", "auto"):
        with FlopCounterMode(display=False) as counter:
            results[backend] = match_patches(visual, tokens, None, left, right, backend=backend)
        counts[backend] = counter.get_total_flops()
    torch.testing.assert_close(results["auto"], results["eager"], rtol=1e-5, atol=1e-6)
    assert counts["auto"] == counts["eager"] if dim == 1 else counts["auto"] < 0.5 * counts["eager"]


def test_one_projection_or_none_stands_for_the_identity():
    visual, tokens = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    left, right = torch.randn(8, 7, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    want = match_patches(visual, tokens, None, left, right, scale=2.0)
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(match_patches(visual, tokens, None, None, right @ left.mT, scale=2.0), want)
    torch.testing.assert_close(match_patches(visual, tokens, None, left @ right.mT, None, scale=2.0), want)
    alone = match_patches(visual, visual, None, scale=2.0)
    torch.testing.assert_close(alone, match_patches(visual, visual, None, eye, eye, scale=2.0))


@given(pads=st.integers(0, 4), seed=st.integers(0, 10**6), over=st.sampled_from(["tokens", "patches"]))
def test_padding_changes_nothing_whatever_it_holds(pads, seed, over):
    generator = torch.Generator().manual_seed(seed)
    visual, tokens = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 4, 8, generator=generator)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    want = match_patches(visual, tokens, valid, scale=9.0, over=over)
    other = tokens.clone()
    other[1, 2:] = float("nan")
    more = torch.cat([other, torch.full((2, pads, 8), float("inf"))], dim=1)
    visual.requires_grad_()
    got = match_patches(visual, more, torch.cat([valid, valid.new_zeros(2, pads)], dim=1), scale=9.0, over=over)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert torch.autograd.grad(got.sum(), visual)[0].isfinite().all()
    assert ((want >= 0) & (want <= 1)).all()


@given(seed=st.integers(0, 10**6))
def test_order_of_patches_tokens_and_samples_does_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    visual, tokens = torch.randn(3, 6, 8, generator=generator), torch.randn(3, 4, 8, generator=generator)
    valid = torch.rand(3, 4, generator=generator) < 0.7
    want = match_patches(visual, tokens, valid, scale=5.0)
    p, t, b = (torch.randperm(n, generator=generator) for n in (6, 4, 3))
    got = match_patches(visual[b][:, p], tokens[b][:, t], valid[b][:, t], scale=5.0)
    torch.testing.assert_close(got, want[b][:, p], rtol=1e-5, atol=1e-6)


@BACKENDS
def test_a_vector_of_length_zero_has_no_direction(backend):
    visual, tokens = torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    visual[0, 1], tokens[0, 2] = 0, 0
    visual.requires_grad_()
    similarity = match_patches(visual, tokens, scale=5.0, backend=backend)
    assert similarity[0, 1] == 0.25
    assert torch.autograd.grad(similarity.sum(), visual)[0].isfinite().all()


def test_without_a_real_token_everything_matches():
    visual, tokens = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    similarity = match_patches(visual, tokens, torch.tensor([[0] * 4, [1] * 4]), scale=3.0)
    assert (similarity[0] == 1).all()
    assert (similarity[1] < 1).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(similarity.sum(), (visual, tokens)))
    assert (match_patches(visual, tokens[:, :0]) == 1).all()
    assert match_patches(visual[:, :0], tokens).shape == (2, 0)


def test_a_shared_matrix_preserves_inner_products_and_independent_ones_do_not():
    """Johnson and Lindenstrauss need one matrix for both vectors; with two, what is left is noise of deviation 1 / sqrt(D)."""
    dim, align_dim, pairs = 96, 2048, 400
    generator = torch.Generator().manual_seed(1)
    left = torch.nn.functional.normalize(torch.randn(pairs, dim, generator=generator), dim=-1)
    other = torch.nn.functional.normalize(torch.randn(pairs, dim, generator=generator), dim=-1)
    mix = torch.linspace(0, 1, pairs)[:, None]
    right = torch.nn.functional.normalize(mix * left + (1 - mix) * other, dim=-1)
    true = (left * right).sum(-1)  # cosines from 0 to 1
    error = {}
    for shared in (True, False):
        drawn = [random_projections(dim, dim, align_dim, shared=shared, seed=seed) for seed in range(8)]
        products = torch.stack([((left @ visual) * (right @ text)).sum(-1) for visual, text in drawn])  # (8, pairs)
        error[shared] = (products - true).std().item()
        # The lemma's variance: (1 + cos^2) / D for one matrix, 1 / D, whatever the vectors, for two.
        if shared:
            assert torch.corrcoef(torch.stack([products.mean(0), true]))[0, 1] > 0.995
            assert (products - true).abs().max() < 5 * math.sqrt(2 / align_dim)
        else:
            assert products.mean().abs() < 0.01
            assert products.std() == pytest.approx(align_dim**-0.5, rel=0.1)
            assert abs(torch.corrcoef(torch.stack([products[0], true]))[0, 1]) < 0.6
    assert error[True] < 0.04 < 0.2 < error[False]


@pytest.mark.parametrize("seed", [0, 1])
def test_what_the_scale_selects(seed):
    """The share of weak patches by scale and number of words, words with cosine 0.5: the table that explains the default."""
    generator = torch.Generator().manual_seed(seed)
    left, right = random_projections(64, 48, 2048, seed=seed)
    visual = torch.randn(40, 196, 64, generator=generator)
    root = math.sqrt(2048)

    def weak(length: int, scale: float) -> float:
        common, own = torch.randn(40, 1, 48, generator=generator), torch.randn(40, length, 48, generator=generator)
        return (match_patches(visual, common + own, None, left, right, scale=scale) < 0.4).float().mean().item()

    for length in (3, 6, 10, 20):
        literal = match_patches(visual, torch.randn(40, length, 48, generator=generator), None, left, right)
        assert (literal - 1 / length).abs().max() < 0.06  # scale 1: every patch is 1 / L, the expression plays no part
        assert weak(length, 1.0) == 1.0
        assert weak(length, root * 45) < 0.02  # entries of variance 1: the softmax is saturated
    measured = [weak(length, 100.0) for length in (3, 6, 10, 20)]
    assert measured == pytest.approx([0.03, 0.26, 0.42, 0.75], abs=0.1)
    default = [weak(length, 2 * root) for length in (3, 6, 10, 20)]
    assert default == sorted(default)
    assert default[0] < 0.1 < default[1] < 0.5 < default[3] < 0.95


def test_projections_depend_on_their_arguments_alone():
    state = torch.get_rng_state()
    first = random_projections(6, 4, 300, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first, random_projections(6, 4, 300, seed=5), strict=True))
    assert not torch.equal(first[0], random_projections(6, 4, 300, seed=6)[0])
    assert torch.cat([part.flatten() for part in first]).std() == pytest.approx(300**-0.5, rel=0.05)
    shared = random_projections(4, 4, 8, shared=True)
    assert torch.equal(*shared)


@pytest.mark.parametrize(
    ("valid", "inner"),
    [
        ([1, 1, 1, 1], [0, 1, 1, 0]),
        ([0, 1, 1, 1], [0, 0, 1, 0]),
        ([1, 1, 0, 0], [0] * 4),
        ([1, 0, 0, 0], [0] * 4),
        ([0] * 4, [0] * 4),
    ],
)
def test_inner_tokens(valid, inner):
    assert inner_tokens(torch.tensor([valid])).int().tolist() == [inner]
    assert inner_tokens(torch.tensor([valid]).bool()).int().tolist() == [inner]


V, T = torch.rand(2, 5, 8), torch.rand(2, 3, 6)
BAD = {
    "visual as a map": (
        lambda: match_patches(torch.rand(2, 8, 4, 4), T),
        ValueError,
        "match_patches: `visual` must be (B, P, D), got",
    ),
    "channels without projections": (
        lambda: match_patches(V, T),
        ValueError,
        "match_patches: `tokens` must be (B, L, D) with D=8, got (2, 3, 6).",
    ),
    "texts of another batch": (
        lambda: match_patches(V, T[:1], None, torch.rand(8, 4), torch.rand(6, 4)),
        ValueError,
        "`tokens` must be (B, L, Ct) with B=2",
    ),
    "projection of other channels": (
        lambda: match_patches(V, T, None, torch.rand(7, 4), torch.rand(6, 4)),
        ValueError,
        "`visual_projection` must be (Cv, D) with Cv=8",
    ),
    "projections that do not meet": (
        lambda: match_patches(V, T, None, torch.rand(8, 4), torch.rand(6, 5)),
        ValueError,
        "`text_projection` must be (Ct, D) with D=4",
    ),
    "valid of another length": (
        lambda: match_patches(V, V, torch.ones(2, 4)),
        ValueError,
        "`valid` must be (B, L) with B=2, L=5, got (2, 4).",
    ),
    "a negative scale": (lambda: match_patches(V, V, scale=-1), ValueError, "match_patches: `scale` must be at least 0, got -1."),
    "another axis": (
        lambda: match_patches(V, V, over="rows"),
        ValueError,
        "`over` must be one of 'tokens', 'patches', got 'rows'.",
    ),
    "integers": (lambda: match_patches(V.long(), V), TypeError, "`visual` must be a floating-point tensor"),
    "a kernel": (lambda: match_patches(V, V, backend="triton"), RuntimeError, "backend='triton' is not possible here"),
    "shared over two sizes": (
        lambda: random_projections(3, 4, shared=True),
        ValueError,
        "`text_dim` must be visual_dim=3 for a shared matrix, got 4.",
    ),
    "no channels": (lambda: random_projections(0, 4), ValueError, "random_projections: `visual_dim` must be at least 1, got 0."),
    "half a channel": (
        lambda: random_projections(3, 4, 2.5),
        TypeError,
        "random_projections: `align_dim` must be a whole number, got 2.5.",
    ),
    "probabilities as valid": (
        lambda: inner_tokens(torch.rand(2, 3)),
        TypeError,
        "inner_tokens: `valid` must be bool or 0/1 integers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, expected = BAD[case]
    with pytest.raises(error) as caught:
        call()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
