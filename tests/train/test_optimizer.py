"""Optimizers and learning-rate schedules."""

import pytest
import torch
from tiny import build, tokens
from torch.nn import functional as F

from compare.check.properties import composed
from train.optim.muon import StackedMuon
from train.optim.optimizer import Optimizer
from train.optim.schedule import Schedule
from train.setup.build import build_optimizer


def schedule(kind: str, **options: float) -> Schedule:
    defaults = {"lr": 1.0, "warmup": 10, "final_lr": 0.1, "cooldown": 0.2, "steps": 110}
    return Schedule(schedule=kind, **defaults | options)


def optimizer(*overrides: str) -> tuple[torch.nn.Module, Optimizer]:
    model = build("mha", "learned", "model.bias=true", "model.tie_embeddings=false").train()
    config = composed(*overrides)
    return model, build_optimizer(config, model, steps=10)[0]


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_step_changes_nothing_if_told_so(optim: str) -> None:
    """Not even where gradients are not finite, and a later step is as if there had been none."""
    after = []
    for told in (False, True):
        model, made = optimizer(f"optim={optim}")
        F.cross_entropy(model(tokens(2, 16)).flatten(0, 1), tokens(2, 16).flatten()).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        made.step(1e-2, torch.tensor(False))
        if told:
            before = [p.clone() for p in model.parameters()] + [
                x.clone() for x in made.state().values()
            ]
            for p in model.parameters():
                p.grad.fill_(float("nan"))
            made.step(1e-2, torch.tensor(True))
            same = [*model.parameters(), *made.state().values()]
            assert all(torch.equal(a, b) for a, b in zip(before, same, strict=True))
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        made.step(1e-2)
        after.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_every_schedule_warms_up_and_ends_where_it_says(kind: str) -> None:
    rate = schedule(kind)
    assert [rate(step) for step in range(10)] == pytest.approx([(i + 1) / 10 for i in range(10)])
    rates = [rate(step) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert rate(500) == pytest.approx(rates[-1])


def test_the_shapes_are_those_of_their_names() -> None:
    assert schedule("cosine")(59) == pytest.approx(0.55)
    assert schedule("linear")(59) == pytest.approx(0.55)
    assert schedule("linear")(34) == pytest.approx(0.775)
    assert schedule("cosine")(34) > 0.8
    assert schedule("wsd")(89) == pytest.approx(1.0)
    assert schedule("wsd")(99) == pytest.approx(0.55)
    assert schedule("constant", warmup=0)(0) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"final_lr": 2.0}, "final_lr=2.0"),
        ({"cooldown": 0.0}, "cooldown=0.0"),
    ],
)
def test_schedules_that_cannot_be_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule("cosine", **options)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_lowers_the_loss_and_the_state_is_keyed_by_name(kind: str) -> None:
    model, made = optimizer(f"optim={kind}")
    x, y = tokens(4, 16), tokens(4, 16, seed=1)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        made.step(1e-2)
        made.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    names = {key.rsplit("/", 1)[0] for key in made.state()}
    assert names == set(dict(model.named_parameters()))
    assert made.nbytes == sum(v.nbytes for v in made.state().values()) > 0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on_as_if_nothing_happened(kind: str) -> None:
    x, y = tokens(4, 16), tokens(4, 16, seed=1)

    def step(model: torch.nn.Module, made: Optimizer) -> None:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        made.step(1e-2)
        made.zero_grad()

    model, made = optimizer(f"optim={kind}")
    step(model, made)
    other, restored = optimizer(f"optim={kind}")
    other.load_state_dict(model.state_dict())
    restored.load({key: value.clone() for key, value in made.state().items()})
    for _ in range(2):
        step(model, made)
        step(other, restored)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_adamw_is_that_of_torch() -> None:
    model, made = optimizer("optim.weight_decay=0.2", "optim.beta2=0.9")
    other, _ = optimizer()
    (adamw,) = made.optimizers
    name_of = {p: name for name, p in made.parameters.items()}
    theirs = [
        {**group, "params": [other.get_parameter(name_of[p]) for p in group["params"]]}
        for group in adamw.param_groups
    ]
    reference = torch.optim.AdamW(theirs, betas=(0.9, 0.9), eps=1e-8, fused=True)
    for step in range(3):
        x, y = tokens(4, 16, seed=step), tokens(4, 16, seed=step + 9)
        for each in (model, other):
            F.cross_entropy(each(x).flatten(0, 1), y.flatten()).backward()
        for group in reference.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        reference.step()
        reference.zero_grad()
        made.step(1e-2 / (step + 1))
        made.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_muon_is_that_of_torch() -> None:
    shapes = [(16, 16), (16, 48), (16, 16), (48, 16), (16, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    made = StackedMuon(ours, momentum=0.9, weight_decay=0.2)
    options = {"momentum": 0.9, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(theirs, **options)
    for step in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = torch.randn(p.shape) * 1e-3
        made.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.1 / (step + 1)
        made.step()
        reference.step()
    for p, q, before in zip(ours, theirs, start, strict=True):  # torch's iterates in bfloat16
        assert (p - q).norm() < 0.02 * (q - before).norm()
        state = reference.state[q]["momentum_buffer"]
        torch.testing.assert_close(made.state[p]["momentum_buffer"], state)


def decayed(made: Optimizer) -> set[str]:
    names = {p: name for name, p in made.parameters.items()}
    groups = [g for o in made.optimizers for g in o.param_groups if g["weight_decay"] > 0]
    return {names[p] for g in groups for p in g["params"]}


def test_weight_decay_pulls_matrices_or_linear_weights_alone() -> None:
    model, made = optimizer("optim.decayed=matrices")
    assert decayed(made) == {n for n, p in model.named_parameters() if p.dim() == 2}
    _, made = optimizer("optim.decayed=linear")
    tables = {"embed.weight", "position.table.weight"}
    assert decayed(made) == {n for n, p in model.named_parameters() if p.dim() == 2} - tables


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    model, made = optimizer("optim=muon")
    muon, adamw = made.optimizers
    hidden = {p for g in muon.param_groups for p in g["params"]}
    rest = {p for g in adamw.param_groups for p in g["params"]}
    assert hidden == {p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2}
    assert hidden | rest == set(model.parameters())
    assert not hidden & rest
