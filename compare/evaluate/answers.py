"""Answers, to questions or within a text: exact match, how sure the model is, what guessing would give.

Shapes: B questions, T tokens, V vocab_size.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from compare.evaluate.dataset import open_text
from compare.evaluate.load import LoadedRun, RunSelector
from compare.evaluate.publish import publish
from compare.statistics.paired import wilson
from data import tokenizer as tokenizers
from data.objective.answers import Answers, Question
from data.objective.base import IGNORED
from data.objective.probe import Probe
from model.transformer import Transformer
from train.config.schema import Config, at_least
from train.record.terminal import tracked
from train.setup.build import build_objective


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/answers.yaml. Raises ValueError for invalid values."""

    longest: int
    batch_size: int | None
    reference: str | None

    def __post_init__(self) -> None:
        at_least(1, self, "longest", "batch_size")


def evaluate(selector: RunSelector, options: Options) -> int:
    """`python eval.py run=DIR,... eval=answers`."""
    selector.refuse_data("answers")
    reference = None
    if options.reference is not None:
        other = replace(selector, pos=None).load(Path(options.reference))
        reference = items_of(other, answered_by(other), options)
    answers = (
        (folder, measure(selector.load(folder), options, reference)) for folder in selector.runs
    )
    return publish("answers", selector, answers, "answers_differences")


def measure(run: LoadedRun, options: Options, reference: list[Config] | None) -> Config:
    """The answers of a run to what its validation split asks."""
    objective = answered_by(run)
    items = items_of(run, objective, options)
    commonest, _ = Counter(text_of(run, a) for a in objective.train_answers()).most_common(1)[0]
    groups = list(dict.fromkeys(item["group"] for item in items))
    return {
        "step": run.step,
        "dtype": run.device.dtype_name,
        "commonest": commonest,
        "groups": {
            group: described([item for item in items if item["group"] == group], commonest)
            for group in groups
        },
        "reference": reference and {"run": options.reference, **sign_test(items, reference)},
        "items": items,
        **objective.corpus.identity,
    }


def answered_by(run: LoadedRun) -> Answers | Probe:
    """The objective of a run, which has answers. Raises ValueError for another one."""
    text = open_text(run, "val", None, None)
    objective = build_objective(run.config, text.corpus)
    if not isinstance(objective, Answers | Probe):
        raise ValueError(
            f"eval=answers: {run.folder} was trained with objective="
            f"{run.config['choices']['objective']}; it needs objective=answers or probe"
        )
    return objective


def items_of(run: LoadedRun, objective: Answers | Probe, options: Options) -> list[Config]:
    """Each question with the true answer, the model's own, and the log-probability of both."""
    if isinstance(objective, Probe):
        return list(items_within(run, objective, run.batch_size(options.batch_size)))
    return items_after(run, objective, options)


@torch.no_grad()
def items_within(run: LoadedRun, objective: Probe, batch_size: int) -> Iterator[Config]:
    """The answers in rows of text. The model's own has the most likely token at each place, after the
    true ones: it is right where a greedy generation is."""
    starts = range(0, len(objective.val), batch_size)
    for first in tracked(starts, f"{run.folder.name}: {len(objective.val)} rows"):
        rows = objective.val[first : first + batch_size]
        inputs, _ = objective.batch(rows)
        with run.device.autocast():
            logits = run.model(inputs.to(run.device.name))  # (B, T, V)
        for row, before in zip(rows, logits, strict=True):
            for answer in row.answers:
                at = before[answer.start - 1 : answer.end - 1].float().cpu().log_softmax(-1)
                true = row.tokens[answer.place]
                best = at.max(-1)
                yield {
                    "question": text_of(run, row.tokens[: answer.start]),
                    "answer": text_of(run, true),
                    "said": text_of(run, best.indices.tolist()),
                    "correct": best.indices.tolist() == true,
                    "group": text_of(run, answer.group) or "all",
                    "log_p_said": best.values.double().sum().item(),
                    "log_p_true": at.gather(1, torch.tensor(true)[:, None]).double().sum().item(),
                }


def items_after(run: LoadedRun, objective: Answers, options: Options) -> list[Config]:
    """The answers that a model generates greedily after each question."""
    order = sorted(range(len(objective.val)), key=lambda n: len(objective.val[n].prompt))
    batches = list(
        same_length([objective.val[n] for n in order], run.batch_size(options.batch_size))
    )
    items: list[Config] = []
    for questions in tracked(batches, f"{run.folder.name}: {len(order)} questions"):
        with run.device.autocast():
            said, own = greedy(run.model, prompts(questions, run), objective.mark, options.longest)
            true = true_log_p(run.model, objective, questions, run.device.name)
        for question, answer, *log_p in zip(questions, said, own, true, strict=True):
            items.append(
                {
                    "question": text_of(run, question.question),
                    "answer": text_of(run, question.answer),
                    "said": text_of(run, answer),
                    "correct": answer == question.answer,
                    "group": text_of(run, question.group) or "all",
                    "log_p_said": log_p[0],
                    "log_p_true": log_p[1],
                }
            )
    return [item for _, item in sorted(zip(order, items, strict=True), key=lambda pair: pair[0])]


def text_of(run: LoadedRun, tokens: list[int]) -> str:
    return tokenizers.decode(run.tokenizer, tokens).strip()


def same_length(questions: list[Question], most: int) -> Iterator[list[Question]]:
    """Questions sorted by length, in batches of equal length of at most so many."""
    for _, group in groupby(questions, key=lambda question: len(question.prompt)):
        batch = list(group)
        for start in range(0, len(batch), most):
            yield batch[start : start + most]


def prompts(questions: list[Question], run: LoadedRun) -> Tensor:
    """Questions of equal length, each with its mark: (B, T)."""
    return torch.tensor([question.prompt for question in questions], device=run.device.name)


@torch.no_grad()
def greedy(
    model: Transformer, prompts: Tensor, end: int, longest: int
) -> tuple[list[list[int]], list[float]]:
    """The most likely tokens after each prompt (B, T) up to `end`, and their log-probability with it.

    At most so many tokens, and no more than the context holds.
    """
    room = model.shape.max_len - prompts.size(1) + 1
    cache = None if model.has_latents else model.new_cache(model.shape.max_len)
    x = prompts
    said: list[list[int]] = [[] for _ in prompts]
    log_p = torch.zeros(len(prompts), dtype=torch.float64)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(min(longest, room)):
        logits = model(x, cache)[:, -1].float().cpu()  # (B, V)
        best = logits.log_softmax(-1).max(-1)
        log_p += best.values.double().where(~ended, 0)
        ended |= best.indices == end
        for answer, token, done in zip(said, best.indices.tolist(), ended.tolist(), strict=True):
            if not done:
                answer.append(token)
        if ended.all():
            break
        new = best.indices[:, None].to(prompts.device)
        x = torch.cat((x, new), dim=1) if cache is None else new
    return said, log_p.tolist()


@torch.no_grad()
def true_log_p(
    model: Transformer, objective: Answers, questions: list[Question], device: str
) -> list[float]:
    """Log-probability of the true answers and their closing marks, after the mark of the question."""
    inputs, targets = objective.batch(questions)
    for row, question in zip(targets, questions, strict=True):
        row[len(question.question) - 1] = IGNORED  # the mark
    logits = model(inputs.to(device)).float().cpu().flatten(0, 1)
    nats = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
    return (-nats.double().sum(1)).tolist()


def described(items: list[Config], commonest: str) -> Config:
    """The numbers of a group of questions."""
    correct, n = sum(item["correct"] for item in items), len(items)
    guessed = sum(item["answer"] == commonest for item in items)
    confidence = [math.exp(item["log_p_said"]) for item in items]
    return {
        "questions": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": wilson(correct, n),
        "baseline": guessed / n,  # the commonest answer of training, said to every question
        "confidence": sum(confidence) / n,
        "nats_true": -sum(item["log_p_true"] for item in items) / n,
    }


def sign_test(items: list[Config], reference: list[Config]) -> Config:
    """The questions that exactly one of two runs answers, and the exact test that it is chance."""
    if [item["question"] for item in items] != [item["question"] for item in reference]:
        raise ValueError("reference: the two runs are asked different questions")
    pairs = list(zip(items, reference, strict=True))
    mine = sum(one["correct"] and not other["correct"] for one, other in pairs)
    theirs = sum(other["correct"] and not one["correct"] for one, other in pairs)
    p = stats.binomtest(mine, mine + theirs).pvalue if mine + theirs else 1.0
    return {"only_this": mine, "only_the_other": theirs, "p": float(p)}
