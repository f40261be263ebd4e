from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gresbox.blocks import ConditionalPrompts
from gresbox.models import convert
from gresbox.testing import assert_matches_reference


def test_weights_of_the_released_code_give_its_prompts(golden):
    arrays = {name: torch.from_numpy(value) for name, value in golden("caris_decoder").items()}
    state = {name.removeprefix("sd/"): value for name, value in arrays.items() if name.startswith("sd/backbone.")}
    prompts = ConditionalPrompts(7, 10).double()
    weights = convert.caris(state, strict=False)
    prompts.load_state_dict({name.removeprefix("text_encoder.prompts."): value for name, value in weights.items()})
    torch.testing.assert_close(prompts(arrays["in/feature3"].double()), arrays["out/prompts"], atol=1e-10, rtol=1e-10)


def reference(weights, grids):
    """The equation, one cell at a time."""

    def prompts(visual):
        out, place = [], 0
        for index, grid in enumerate(grids):
            first, second = (
                {part: weights[f"projections.{index}.layers.{n}.{part}"] for part in ("weight", "bias")} for n in (0, 1)
            )
            height, width = visual.shape[-2:]
            for row in range(grid):
                for column in range(grid):
                    y = slice(row * height // grid, -(-(row + 1) * height // grid))
                    x = slice(column * width // grid, -(-(column + 1) * width // grid))
                    hidden = (visual[:, :, y, x].mean((2, 3)) @ first["weight"].T + first["bias"]).clamp(min=0)
                    out.append(weights["prompt_tokens"][place] + hidden @ second["weight"].T + second["bias"])
                    place += 1
        return F.layer_norm(torch.stack(out, 1), (8,), weights["norm.weight"], weights["norm.bias"])

    return prompts


@pytest.mark.parametrize("size", [(7, 7), (5, 3), (1, 1)])
@pytest.mark.parametrize("grids", [(1, 2), (3,)])
def test_outputs_and_gradients(grids, size):
    prompts = ConditionalPrompts(6, 8, grids=grids)
    weights = {name: value.double() for name, value in prompts.state_dict().items()}
    assert_matches_reference(prompts, reference(weights, grids), [torch.randn(2, 6, *size)])


@given(scale=st.floats(0.5, 4.0), batch=st.integers(1, 3))
def test_a_picture_answers_for_itself(scale, batch):
    prompts = ConditionalPrompts(6, 8).double()
    visual = torch.randn(batch, 6, 4, 5, dtype=torch.float64) * scale
    torch.testing.assert_close(prompts(visual)[-1:], prompts(visual[-1:]))


def test_every_parameter_gets_a_gradient_and_starts_as_released():
    prompts = ConditionalPrompts(64, 64)
    (prompts(torch.randn(2, 64, 3, 3)) * torch.randn(5, 64)).sum().backward()
    assert [name for name, parameter in prompts.named_parameters() if parameter.grad is None] == []
    assert 0.018 < prompts.projections[0].layers[0].weight.std() < 0.022
    assert 0.8 < prompts.prompt_tokens.std() < 1.2


def test_paper_size():
    with torch.device("meta"):
        prompts = ConditionalPrompts(1024, 768)
    assert sum(p.numel() for p in prompts.parameters()) == 2 * (1024 * 768 + 768 + 768 * 768 + 768) + 5 * 768 + 2 * 768


def test_compile_and_autocast():
    prompts, visual = ConditionalPrompts(6, 8), torch.randn(2, 6, 4, 5)
    out = prompts(visual)
    torch.testing.assert_close(torch.compile(prompts, fullgraph=True, backend="aot_eager")(visual), out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (prompts(visual).float() - out).abs().max() < 3e-2


def test_errors():
    with pytest.raises(ValueError, match="ConditionalPrompts: `grids` must name at least one grid"):
        ConditionalPrompts(6, 8, grids=())
    with pytest.raises(ValueError, match="ConditionalPrompts: `grids` must be at least 1, got 0"):
        ConditionalPrompts(6, 8, grids=(1, 0))
    with pytest.raises(ValueError, match=r"ConditionalPrompts: `visual` must be \(B, 6, \*, \*\), got \(2, 5, 4, 4\)"):
        ConditionalPrompts(6, 8)(torch.randn(2, 5, 4, 4))
