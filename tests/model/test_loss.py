"""The loss, whole and in pieces, and blocks that are computed again."""

from functools import partial

import pytest
import torch
from tiny import VOCAB, build, tokens
from torch import Tensor
from torch.fx import GraphModule

from model import loss as losses
from model.loss import next_token_loss, row_losses
from model.transformer import Transformer
from train.measure.memory import allocation_peak


def trained(
    model: Transformer, dtype: torch.dtype = torch.float32, rows: int = 3
) -> tuple[Tensor, list[Tensor]]:
    """A step's loss and gradients."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    text = tokens(rows, 17)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = next_token_loss(model, text[:, :-1], text[:, 1:])
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_pieces_make_the_same_loss_and_gradients(
    dtype: torch.dtype, rtol: float, tied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("mha", "rope", f"model.tie_embeddings={tied}")
    whole, gradients = trained(model, dtype)
    monkeypatch.setattr(losses, "LOGITS", 5 * VOCAB)  # 48 rows in pieces of 5, the last of 3
    pieces, of_pieces = trained(model, dtype)
    torch.testing.assert_close(pieces, whole, rtol=rtol / 10, atol=0)
    for ours, theirs in zip(of_pieces, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * theirs.abs().max().item())


@pytest.mark.parametrize("chunk", [losses.LOGITS, 5 * VOCAB], ids=["whole", "pieces"])
@pytest.mark.parametrize("memory", ["full", "lean"])
def test_a_compiled_model_and_its_loss_are_one_program(
    chunk: int, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: object) -> GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(losses, "LOGITS", chunk)
    model = build("mha", "rope", f"memory={memory}")
    expected, gradients = trained(model)
    model.compile(backend=backend, fullgraph=True)
    loss, compiled = trained(model)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(compiled, gradients)
    (graph,) = graphs
    (result,) = graph.graph.output_node().args[0]
    of_pieces = (
        3,
        16,
        model.shape.dim,
    )  # what `hidden` gives them; the loop over them is no program
    assert result.meta["example_value"].shape == (() if chunk > 5 * VOCAB else of_pieces)
    with torch.no_grad():
        row_losses(model, tokens(3, 16), tokens(3, 16))
    model(tokens(3, 16))  # the whole, which holds `hidden`, is one graph as well
    assert len(graphs) == 3
    torch.compiler.reset()


def test_pieces_hold_less_memory_than_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mha", "rope", "model.vocab_size=4000")
    whole = allocation_peak(lambda: trained(model))
    monkeypatch.setattr(losses, "LOGITS", 4 * 4000)
    assert allocation_peak(lambda: trained(model)) < whole / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attn", ["gqa", "mla", "sliding", "pattern", "value_residual"])
def test_blocks_computed_again_train_the_same_bit_for_bit(attn: str, dtype: torch.dtype) -> None:
    model = build(attn, "rope", "model.dropout=0.2")
    loss, gradients = trained(model, dtype)
    again = build(attn, "rope", "model.dropout=0.2", "memory=lean")
    assert again.activation_checkpointing
    assert not model.activation_checkpointing
    again_loss, again_gradients = trained(again, dtype)
    assert torch.equal(loss, again_loss)
    assert all(map(torch.equal, gradients, again_gradients))


def test_blocks_computed_again_hold_less_memory() -> None:
    full, lean = (
        allocation_peak(partial(trained, build("mha", "rope", f"memory={m}"), rows=256))
        for m in ("full", "lean")
    )
    assert lean < 0.6 * full


def test_blocks_computed_again_compile_to_one_graph() -> None:
    torch.compiler.reset()
    lean = build("gqa", "rope", "memory=lean").train()
    compiled = torch.compile(lean, fullgraph=True, backend="aot_eager")
    text = tokens(2, 17)
    compiled(text[:, :-1]).sum().backward()
    gradients = [p.grad.clone() for p in lean.parameters()]
    lean.zero_grad()
    lean(text[:, :-1]).sum().backward()
    for ours, theirs in zip(gradients, lean.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("chunk", [losses.LOGITS, 5 * VOCAB])
def test_targets_that_do_not_count_change_neither_loss_nor_gradients(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean is over those that count, in one piece or in several."""
    monkeypatch.setattr(losses, "LOGITS", chunk)
    model = build("mha", "rope").train()
    text = tokens(3, 17)
    inputs, targets = text[:, :-1], text[:, 1:].clone()
    targets[0, :5] = targets[1, 7:] = targets[2, :] = -100
    log_p = model(inputs).float().log_softmax(-1)
    nats = [
        -log_p[row, place, target]
        for row, line in enumerate(targets.tolist())
        for place, target in enumerate(line)
        if target != -100
    ]
    expected = torch.stack(nats).mean()
    expected.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = next_token_loss(model, inputs, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
