"""lm-eval's requests, answered as a plain reading of the model answers them."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import RUN
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from cli.entry import run_command
from cli.evaluate import evaluate
from compare.evaluate.load import LoadedRun, RunSelector
from data.tokenizer import END_OF_TEXT, decode, encode, raw_bytes
from model.generate import Sampler, generate
from model.init import init_weights
from model.loss import token_nll
from train.config.compose import compose
from train.run import run_training

pytest.importorskip("lm_eval", reason="the optional group harness is not installed")

from compare.evaluate.harness import HarnessModel, Options, without_noise

CONTEXT = 16

ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
GENERATED = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: [a], max_gen_toks: 5}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
LONG = "A JSON decoder of objects, arrays, strings, numbers and much else, whose"
QUESTIONS = [
    ("def decode(self, s):", [" return", " yield", " pass"]),
    (LONG, [" end", " a"]),
    ("", ["import", "a continuation that is itself longer than the context of this model"]),
    ("the spaces at its end   ", ["belong", "to what follows"]),
    ("one to", ["ken", ""]),
]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks a dozen commands about the machine, for a part of its results that is not kept."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    places = [f"data.path={text}", f"data.cache={out}/../cache", f"out={out}"]
    kind = ["attn=gqa", "pos=learned", "data.tokenizer=bpe", "data.vocab_size=300"]
    assert run_training(compose([*RUN, *places, *kind, "steps=2", "dtype=float32"])) == 0
    return out


@pytest.fixture(scope="module")
def run(folder: Path) -> LoadedRun:
    """The run, with weights that tell tokens apart."""
    run = opened(folder)
    init_weights(run.model, seed=1)
    for parameter in run.model.parameters():
        parameter.data *= 5 if parameter.dim() > 1 else 1
    return run


def opened(folder: Path) -> LoadedRun:
    selector = RunSelector(
        run=str(folder), checkpoint="latest", device="cpu", dtype=None, threads=1
    )
    return selector.load(folder)


def model_of(run: LoadedRun, **options: Any) -> HarnessModel:
    keys = dict.fromkeys(("limit", "num_fewshot", "batch_size", "context"))
    return HarnessModel(run, Options(tasks="any", **(keys | options)))


def requests(*arguments: tuple[Any, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


def pairs() -> list[SimpleNamespace]:
    return requests(*((q, choice) for q, choices in QUESTIONS for choice in choices))


@torch.no_grad()
def plainly(run: LoadedRun, context: str, continuation: str) -> tuple[float, bool]:
    """log p of a continuation, one token and one forward pass at a time."""
    start = encode(run.tokenizer, context.rstrip()) or [run.tokenizer.token_to_id(END_OF_TEXT)]
    whole = encode(run.tokenizer, context + continuation)
    tokens = start + whole[len(encode(run.tokenizer, context.rstrip())) :]
    done, total, greedy = len(start), 0.0, True
    while done < len(tokens):
        end = min(done + CONTEXT, len(tokens))
        begin = max(0, end - 1 - CONTEXT)
        for place in range(done, end):
            logits = run.model(torch.tensor([tokens[begin:place]]))[0, -1]
            total += logits.double().log_softmax(-1)[tokens[place]].item()
            greedy &= int(logits.argmax()) == tokens[place]
        done = end
    return total, greedy


def task(folder: Path, name: str, what: str, documents: list[dict[str, Any]]) -> Path:
    """A task file of this name, with its data beside it."""
    data, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = f"{{data_files: {{test: {data}}}, cache_dir: {folder}/cache}}"
    lines = [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {source}", "test_split: test"]
    path.write_text("\n".join(lines) + what)
    return path


def questions(folder: Path, name: str, what: str) -> Path:
    rows = [{"question": q, "choices": choices, "gold": 0} for q, choices in QUESTIONS]
    return task(folder, name, what, rows)


def command(folder: Path, tasks: object, *more: str) -> dict[str, Any]:
    """What the command writes."""
    before = set((folder / "eval").glob("*"))
    assert evaluate([f"run={folder}", "eval=harness", f"tasks={tasks}", *more]) == 0
    (path,) = set((folder / "eval").glob("harness_step2_*")) - before
    return json.loads(path.read_text())


@torch.no_grad()
def in_windows_of_lm_eval(run: LoadedRun, document: str) -> float:
    """Nats of a document in the windows that lm-eval itself cuts."""
    from lm_eval.utils import get_rolling_token_windows

    begin, nats = run.tokenizer.token_to_id(END_OF_TEXT), 0.0
    tokens = encode(run.tokenizer, document)
    for inputs, predicted in get_rolling_token_windows(tokens, begin, CONTEXT, context_len=1):
        logits = run.model(torch.tensor([inputs]))[0, -len(predicted) :]
        nats += cross_entropy(logits.double(), torch.tensor(predicted), reduction="sum").item()
    return nats


def test_a_text_costs_what_the_windows_of_lm_eval_say(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = text.read_text()
    documents = [whole[:3000], "short", whole[3000:3100] + "\u00e9"]
    path = task(tmp_path, "mine", ROLLING, [{"text": t} for t in documents])
    before = dict(os.environ)
    result = command(folder, path)
    assert os.environ == before
    ours = opened(folder)
    nats = math.fsum(in_windows_of_lm_eval(ours, document) for document in documents)
    nats_per_byte = nats / sum(len(t.encode()) for t in documents)
    found = {row["metric"]: row["value"] for row in result["results"]}
    assert found["bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2), rel=1e-6)
    assert found["byte_perplexity"] == pytest.approx(math.exp(nats_per_byte), rel=1e-6)
    assert (result["step"], result["context"], result["first_tokens_not_scored"]) == (2, 16, 0)
    said = capsys.readouterr()
    assert said.err == ""
    assert f"{found['bits_per_byte']:.6g}" in said.out
    assert "mine: 3 of 3 examples, 0 shots" in said.out


def test_continuations_cost_what_a_plain_reading_says(run: LoadedRun) -> None:
    found = model_of(run).loglikelihood(pairs())
    expected = [plainly(run, *request.args) for request in pairs()]
    for (log_p, greedy), (wanted, likeliest) in zip(found, expected, strict=True):
        assert log_p == pytest.approx(wanted, rel=1e-5)
        assert greedy == likeliest
    assert found[-1] == (0, True)
    assert {greedy for _, greedy in found[:-1]} == {False}


def test_the_greedy_continuation_is_told_from_others(run: LoadedRun) -> None:
    prompt = encode(run.tokenizer, "def")
    written = generate(run.model, prompt, 3, sampler=Sampler(temperature=0), seed=0)
    ids = [token for (token,) in written if token is not None]
    model = model_of(run)
    (_, greedy), (_, other) = model.score([model.windows(prompt, ids), model.windows([0], ids)])
    assert greedy
    assert not other


@pytest.mark.parametrize("rows", [1, 3])
def test_the_batch_size_changes_nothing(run: LoadedRun, rows: int) -> None:
    texts = requests(*((q + c[0],) for q, c in QUESTIONS))
    few, many = model_of(run, batch_size=rows), model_of(run, batch_size=100)
    for one, other in zip(few.loglikelihood(pairs()), many.loglikelihood(pairs()), strict=True):
        assert one == (pytest.approx(other[0], rel=1e-5), other[1])
    rolling = few.loglikelihood_rolling(texts)
    assert rolling == pytest.approx(many.loglikelihood_rolling(texts), rel=1e-5)
    assert few.contexts_cut == many.contexts_cut > 0


def test_generation_stops(run: LoadedRun) -> None:
    model = model_of(run)

    def write(**wishes: Any) -> str:
        return model.generate_until(requests(("def f(", {"max_gen_toks": 30} | wishes)))[0]

    whole, prompt = write(until=[]), encode(run.tokenizer, "def f(")
    likeliest = generate(run.model, prompt, 30, sampler=Sampler(temperature=0), seed=0)
    ids = [token for (token,) in likeliest if token is not None]
    assert whole == decode(run.tokenizer, ids)
    end = whole[7:9]
    assert write(until=[end, "never there"]) == whole[: whole.index(end)]
    assert whole.startswith(write(max_gen_toks=2))
    assert len({write(do_sample=True, temperature=1.0) for _ in range(2)}) == 1
    assert write(do_sample=True, temperature=1.0) != whole
    long = encode(run.tokenizer, LONG)
    rest = generate(run.model, long[-(CONTEXT - 3) :], 3, sampler=Sampler(temperature=0), seed=0)
    last = decode(run.tokenizer, [token for (token,) in rest if token is not None])
    assert model.generate_until(requests((LONG, {"max_gen_toks": 3}))) == [last]
    model.end = ids[4]
    assert whole.startswith(write(until=[]))
    assert len(write(until=[])) < len(whole)


def test_without_an_end_of_text_the_first_token_is_not_scored(run: LoadedRun) -> None:
    raw = dataclasses.replace(run, tokenizer=raw_bytes())
    model, text = model_of(raw), "Two whole windows of 16, and one."
    (found,) = model.loglikelihood_rolling(requests((text,)))
    tokens, options = torch.tensor(list(text.encode())), {"context": CONTEXT, "device": "cpu"}
    nats = token_nll(run.model, tokens, stride=CONTEXT, batch_size=1, **options)
    assert found == pytest.approx(-nats.sum().item(), rel=1e-6)
    assert len(nats) == len(text) - 1
    assert model.loglikelihood(requests(("", "x")))[0] == (0, True)
    assert model.loglikelihood(requests(("y", "x")))[0][0] < 0
    assert model.first_tokens_not_scored == 2


def test_tasks_are_answered_together(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = questions(tmp_path, "choose", CHOICES)
    second = questions(tmp_path, "complete", GENERATED)
    result = command(folder, f"{first},{second}", "limit=2", "context=8")
    assert [row["metric"] for row in result["results"]] == ["acc", "exact_match"]
    assert result["examples"]["choose"] == {"original": 5, "effective": 2}
    assert result["contexts_cut"] > 0
    assert "longer than 8 tokens" in capsys.readouterr().out
    again = command(folder, f"{first},{second}", "limit=2", "context=8", "dtype=bfloat16")
    assert [row["task"] for row in again["results"]] == ["choose", "complete"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("output_type: generate_until", "Unknown config shape"),
        ("task: t\ndataset_path: no/such", "no/such"),
        ("task: t\ndataset_path: json\ndataset_kwargs: {data_files: none.jsonl}", "none.jsonl"),
    ],
)
def test_a_task_that_cannot_be_had_is_one_line(
    content: str | None,
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "task.yaml"
    if content:
        path.write_text(content)
    assert run_command(evaluate, [f"run={folder}", "eval=harness", f"tasks={path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert str(path) in line


def test_an_unknown_name_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    none = lm_eval.tasks.TaskManager(include_defaults=False)  # to read them all takes 12 seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: none)
    assert run_command(evaluate, [f"run={folder}", "eval=harness", "tasks=wikitexts"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tasks=wikitexts: lm-eval has no task of this name" in line


def test_a_log_gets_warnings_but_no_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    with without_noise():
        print("a task's own chatter")
        list(tqdm(range(3)))
        sys.stderr.write("a warning\n")
    assert capsys.readouterr() == ("", "a warning\n")
