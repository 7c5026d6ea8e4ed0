"""What a run reaches in tasks of EleutherAI's lm-evaluation-harness, which asks the run itself."""

import contextlib
import difflib
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from compare.evaluate.load import LoadedRun, RunSelector, pos_options
from data.tokenizer import END_OF_TEXT, decode, encode, sha256_of
from model.generate import Draw, generate
from train.config.schema import at_least
from train.record.terminal import columns, tracked

RESAMPLES = 1000  # of a task's examples, for standard errors that have no formula
IGNORED = -100  # a target that costs nothing
Window = tuple[list[int], int]  # tokens, and how many of the last are scored


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/harness.yaml. Raises ValueError for what cannot be asked."""

    tasks: str
    limit: int | None
    num_fewshot: int | None
    batch_size: int | None
    context: int | None

    def __post_init__(self) -> None:
        at_least(1, self, "limit", "batch_size", "context")
        at_least(0, self, "num_fewshot")
        if not all(self.names):
            raise ValueError(f"tasks={self.tasks}: no task is named")

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",")]


class Answers:
    """What a run answers to the three kinds of requests that lm-eval makes; log p are in nats.

    The end-of-text token comes before a text without context. Where a tokenizer has none, the first
    token of such a text is not scored.
    """

    def __init__(self, run: LoadedRun, options: Options) -> None:
        super().__init__()
        self.run, self.codec = run, run.tokenizer
        self.context = options.context or run.model.shape.max_len
        self.rows = options.batch_size or run.config["eval_batch_size"]
        self.end = run.tokenizer.token_to_id(END_OF_TEXT)
        self.begin = [] if self.end is None else [self.end]
        self.first_tokens_not_scored = self.contexts_cut = 0

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """log p of each continuation of a context, and whether it is the likeliest."""
        pairs = [self.split(*request.args) for request in requests]
        self.contexts_cut += sum(len(a + b) - 1 > self.context for a, b in pairs)
        return self.score([self.windows(*pair) for pair in pairs])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of each text, read in windows side by side; the last looks back as far as it may."""
        texts = [encode(self.codec, request.args[0]) for request in requests]
        return [total for total, _ in self.score([self.windows([], text) for text in texts])]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the run writes after each prompt."""
        asked = tracked(list(requests), "writing")
        return [self.write(*request.args, seed=n) for n, request in enumerate(asked)]

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what follows; spaces between count to that, as in lm-eval."""
        before = encode(self.codec, context.rstrip())
        after = encode(self.codec, context + continuation)[len(before) :]
        return before, after or encode(self.codec, continuation)

    def windows(self, context: list[int], continuation: list[int]) -> list[Window]:
        """Windows that score each token of a continuation once, as lm-eval cuts them.

        Each but the first is full: the last looks back on tokens that the one before it scored.
        """
        tokens = (context or self.begin) + continuation
        self.first_tokens_not_scored += 0 < len(tokens) == len(continuation)
        found = []
        for start in range(max(1, len(tokens) - len(continuation)), len(tokens), self.context):
            end = min(start + self.context, len(tokens))
            found.append((tokens[max(0, end - self.context - 1) : end], end - start))
        return found

    def score(self, texts: list[list[Window]]) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of texts given as windows; a batch holds some of about one length."""
        windows = [(n, window) for n, text in enumerate(texts) for window in text]
        windows.sort(key=lambda numbered: -len(numbered[1][0]))
        batches = [windows[n : n + self.rows] for n in range(0, len(windows), self.rows)]
        found = [(0.0, True)] * len(texts)
        for batch in tracked(batches, f"scoring {len(texts):,} texts"):
            scores = self.score_batch([window for _, window in batch])
            for (n, _), (log_p, greedy) in zip(batch, scores, strict=True):
                found[n] = (found[n][0] + log_p, found[n][1] and greedy)
        return found

    @torch.no_grad()
    def score_batch(self, windows: list[Window]) -> list[tuple[float, bool]]:
        """The same, of B windows, padded at the end, where no token looks."""
        wanted = [[IGNORED] * (len(tokens) - 1 - n) + tokens[-n:] for tokens, n in windows]
        targets = pad_sequence(list(map(torch.tensor, wanted)), True, IGNORED)  # (B, T)
        inputs = pad_sequence([torch.tensor(tokens[:-1]) for tokens, _ in windows], True)
        logits = self.run.model(inputs.to(self.run.device.name)).float()  # (B, T, V)
        targets = targets.to(logits.device)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        totals = losses.view_as(targets).cpu().double().sum(dim=1)
        greedy = ((logits.argmax(dim=-1) == targets) | (targets == IGNORED)).all(dim=1)
        return list(zip((-totals).tolist(), greedy.tolist(), strict=True))

    def write(self, prompt: str, wishes: dict[str, Any], *, seed: int) -> str:
        """What follows a prompt, before the first text that ends it, or the end-of-text token.

        A prompt loses its start where the context has no room for it and what may follow.
        """
        n, draw, ends = wishes_of(wishes)
        tokens, room = encode(self.codec, prompt) or self.begin, max(1, self.context // 2)
        room = max(room, self.context - n)
        self.contexts_cut += len(tokens) > room
        tokens, written = tokens[-room:], ""
        said = len(decode(self.codec, tokens))
        for (token,) in generate(
            self.run.model, tokens, n, draw=draw, seed=seed, context=self.context
        ):
            if token is None or token == self.end:
                break
            tokens.append(token)
            written = decode(self.codec, tokens)[said:]
            if found := [written.index(end) for end in ends if end in written]:
                return written[: min(found)]
        return written


def wishes_of(wishes: dict[str, Any]) -> tuple[int, Draw, list[str]]:
    """How many tokens a task wants, how drawn (the likeliest, if it is silent), what ends them."""
    from lm_eval.models.utils import normalize_gen_kwargs

    how = normalize_gen_kwargs(wishes)
    draw = Draw(
        temperature=how.get("temperature", 1.0) if how["do_sample"] else 0,
        top_k=how.get("top_k") or None,
        top_p=how.get("top_p") or None,
        repetition_penalty=how.get("repetition_penalty", 1.0),
    )
    return how["max_gen_toks"], draw, [end for end in how["until"] if end]


def evaluate(selector: RunSelector, options: Options) -> int:
    """`python eval.py run=DIR eval=harness tasks=NAMES`."""
    if selector.data is not None:
        raise ValueError("eval=harness: tasks bring their own texts; data=... is for other kinds")
    set_up()
    run = selector.load(selector.only)
    run.check_context(options.context or run.model.shape.max_len)
    result = ask(run, options)
    return run.write_answer(file_name(run, selector, options), result, told(result))


def set_up() -> None:
    """Import lm-eval: no telemetry, bars on terminals alone. Raises ValueError where it is not."""
    os.environ |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "DISABLE_MULTIPROC": "1"}
    try:
        from lm_eval.api.task import tqdm
    except ImportError as error:
        raise ValueError("eval=harness needs lm-eval: pip install -e '.[harness]'") from error
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=None)
    for library in ("datasets", "huggingface_hub"):  # what they log, the ValueError says
        logging.getLogger(library).setLevel(logging.CRITICAL)


def ask(run: LoadedRun, options: Options) -> dict[str, Any]:
    """What lm-eval finds. Raises ValueError for whatever it, or a task, cannot do."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    manager = manager_of(options.names)
    answers: Any = type("Model", (Answers, LM), {})(run, options)
    try:
        with contextlib.redirect_stdout(io.StringIO()), run.device.autocast():
            found = simple_evaluate(
                answers,
                tasks=options.names,
                task_manager=manager,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
            )
    except Exception as error:  # tasks are code, data and metrics of many hands
        raise ValueError(f"tasks={options.tasks}: {type(error).__name__}: {error}") from error
    return described(answers, options, found)


def manager_of(names: list[str]) -> Any:
    """What finds tasks: files, and those of lm-eval if one is asked for, as that takes 12 seconds.

    Raises ValueError for a task that is not there.
    """
    from lm_eval.tasks import TaskManager

    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    for name in files:
        if not Path(name).expanduser().is_file():
            raise ValueError(f"tasks={name}: no such file")
    manager = TaskManager(include_defaults=len(files) < len(names))
    for name in set(names) - set(files) - set(manager.task_index):
        close = difflib.get_close_matches(name, manager.all_tasks)
        hint = f"did you mean {' or '.join(close)}?" if close else "that of a file ends in .yaml"
        raise ValueError(f"tasks={name}: lm-eval knows no task of this name; {hint}")
    return manager


def described(answers: Answers, options: Options, found: dict[str, Any]) -> dict[str, Any]:
    """All that was asked and found, for JSON."""
    run = answers.run
    return {
        "run": str(run.folder),
        "step": run.step,
        **asdict(options),
        "context": answers.context,
        "dtype": run.device.dtype_name,
        "pos": run.config["choices"]["pos"],
        "pos_options": pos_options(run.config),
        "results": rows_of(found["results"]),
        "examples": found["n-samples"],
        "shots": found["n-shot"],
        "versions": {"lm_eval": found["lm_eval_version"], "tasks": found["versions"]},
        "tokenizer": run.config["data"]["tokenizer"],
        "tokenizer_sha256": run.tokenizer_sha256,
        "first_tokens_not_scored": answers.first_tokens_not_scored,
        "contexts_cut": answers.contexts_cut,
    }


def rows_of(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each metric of each task, and of each group that has its own."""
    rows = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, way = key.partition(",")  # acc,none
            if comma and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{way}", "N/A")
                metric += "" if way == "none" else f" ({way})"
                row = {"task": task, "metric": metric, "value": float(value)}
                rows.append(row | {"stderr": None if error == "N/A" else float(error)})
    return rows


def file_name(run: LoadedRun, selector: RunSelector, options: Options) -> str:
    """Says what was asked, so that no answer overwrites that of another question."""
    tasks = "+".join(Path(name).stem for name in options.names)
    if len(tasks) > 80:
        tasks = f"{len(options.names)}tasks-{sha256_of(tasks)[:8]}"
    keys = ("context", "limit", "num_fewshot")
    words = [f"{key}{getattr(options, key)}" for key in keys if getattr(options, key) is not None]
    if selector.pos is not None:
        words.append(
            "-".join(map(str, (selector.pos_name, *sum(pos_options(run.config).items(), ()))))
        )
    return "_".join([f"harness_step{run.step}", tasks, *words, run.device.dtype_name])


def told(result: dict[str, Any]) -> str:
    """A result for people."""
    rows = [["task", "metric", "value", "stderr"]]
    for row in result["results"]:
        error = "" if row["stderr"] is None else f"{row['stderr']:.3g}"
        rows.append([row["task"], row["metric"], f"{row['value']:.6g}", error])
    lines = [columns(rows), ""]
    for task, n in result["examples"].items():
        shots = result["shots"].get(task, 0)
        lines.append(f"  {task}: {n['effective']:,} of {n['original']:,} examples, {shots} shots")
    if cut := result["contexts_cut"]:
        lines.append(f"  {cut:,} requests beyond {result['context']:,} tokens lost their start")
    if missed := result["first_tokens_not_scored"]:
        lines.append(f"  {missed:,} texts whose first token is not scored: nothing is before it")
    return "\n".join(lines)
