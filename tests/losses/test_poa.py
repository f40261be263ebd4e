import pytest
import torch

from gresbox.losses import POALoss, poa_loss

CASES = ["full", "padded", "single_token", "first_token_excluded", "large", "identical_tokens"]


def tensors(arrays, case):
    return {key.split("/")[1]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith(f"{case}/")}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("detach", "suffix"), [(False, ""), (True, "_detachR")])
def test_loss_and_gradients_are_the_papers(golden, case, detach, suffix):
    at = tensors(golden("instalign_poa"), case)
    queries, tokens = at["q"].requires_grad_(), at["t"].requires_grad_()
    loss = POALoss(detach_relevance=detach)(queries, tokens, at["mask"])
    loss.backward(at["grad_loss"])
    torch.testing.assert_close(loss, at["loss"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(queries.grad, at[f"grad_q{suffix}"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(tokens.grad, at[f"grad_t{suffix}"], rtol=1e-6, atol=1e-8)


def test_an_image_without_tokens_has_no_loss(golden):
    at = tensors(golden("instalign_poa"), "no_token_in_sample1")
    loss = poa_loss(at["q"], at["t"], at["mask"])
    torch.testing.assert_close(loss, at["loss"], rtol=1e-7, atol=1e-9)
    assert loss[1].eq(0).all()


def test_detached_tokens_get_no_gradient():
    queries, tokens = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    POALoss(detach_tokens=True)(queries, tokens).sum().backward()
    assert queries.grad.abs().sum() > 0
    assert tokens.grad is None


def test_autocast_does_not_change_it():
    queries, tokens = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = POALoss()(queries, tokens)
    assert torch.equal(loss, poa_loss(queries, tokens))


def test_compiles_to_one_graph():
    queries, tokens, valid = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    loss = torch.compile(POALoss(), fullgraph=True, backend="aot_eager")(queries, tokens, valid)
    torch.testing.assert_close(loss, poa_loss(queries, tokens, valid))
