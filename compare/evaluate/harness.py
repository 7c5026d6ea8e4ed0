"""Tasks of EleutherAI's lm-evaluation-harness, answered by a run.

Shapes: B windows, T tokens of the longest, V vocab_size.
"""

import contextlib
import difflib
import io
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from compare.evaluate.load import LoadedRun, RunSelector, environment_variables
from data.tokenizer import END_OF_TEXT, decode, encode, sha256_of
from model.generate import Sampler, generate
from train.config.schema import at_least
from train.record.terminal import columns, tracked

try:
    with environment_variables():  # lm-eval sets some of its own
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows
except ImportError as error:
    raise ValueError("eval=harness needs lm-eval: pip install -e '.[harness]'") from error

RESAMPLES = 1000  # of a task's examples, for standard errors without a formula
IGNORED = -100  # a target that is not scored
Window = tuple[list[int], list[int]]  # input tokens, and the targets of the last of them


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/harness.yaml. Raises ValueError for invalid values."""

    tasks: str
    limit: int | None
    num_fewshot: int | None
    batch_size: int | None
    context: int | None

    def __post_init__(self) -> None:
        at_least(1, self, "limit", "batch_size", "context")
        at_least(0, self, "num_fewshot")
        if not all(self.names):
            raise ValueError(f"tasks={self.tasks}: empty name between commas")

    @property
    def names(self) -> list[str]:
        """The tasks, separated by commas in `tasks`."""
        return [name.strip() for name in self.tasks.split(",")]


class HarnessModel(TemplateLM):
    """A run behind lm-eval's model interface; log-likelihoods are in nats.

    A text without context is scored after an end-of-text token. If the tokenizer has none, the first
    token of such a text is not scored.
    """

    def __init__(self, run: LoadedRun, options: Options) -> None:
        super().__init__()
        if run.model.shape.latents is not None:
            raise ValueError(
                f"{run.folder}: a model with latents predicts the end of its input alone"
            )
        self.run = run
        self.context = run.context(options.context)
        self.rows = run.batch_size(options.batch_size)
        self.end = run.tokenizer.token_to_id(END_OF_TEXT)
        self.begin = [] if self.end is None else [self.end]
        self.first_tokens_not_scored = self.contexts_cut = 0

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-text token; None if the tokenizer has none."""
        return self.end

    def tok_encode(self, string: str, *_: object, **__: object) -> list[int]:
        """Token ids of a text; no special tokens are added."""
        return encode(self.run.tokenizer, string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """log p of each continuation of a context, and whether it is the greedy one."""
        texts = []
        for (_context, text), before, tokens in requests:
            context = self.begin if before in ([], [None]) else before
            # Where all of a continuation merges into tokens of the context, score it on its own.
            texts.append(self.windows(context, tokens or self.tok_encode(text)))
            self.contexts_cut += len(context) + len(tokens) - 1 > self.context
        return self.score(texts)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: object) -> list[float]:
        """log p of each text, read in adjacent windows; the last looks back as far as it may."""
        texts = [self.windows(self.begin, self.tok_encode(request.args[0])) for request in requests]
        return [log_p for log_p, _ in self.score(texts)]

    def generate_until(self, requests: Sequence[Any], **_: object) -> list[str]:
        """The text that the run generates after each prompt."""
        prompts = tracked(list(requests), "generating")
        return [self.generate(*request.args, seed=n) for n, request in enumerate(prompts)]

    def windows(self, context: list[int], continuation: list[int]) -> list[Window]:
        """lm-eval's windows over a continuation, each with as many tokens before it as fit.

        Every token is scored once; without a context, all but the first.
        """
        if not context:
            context, continuation = continuation[:1], continuation[1:]
            self.first_tokens_not_scored += len(context)
        if not continuation:
            return []
        pairs = get_rolling_token_windows(continuation, context[-1], self.context, context_len=1)
        return [((context[:-1] + inputs)[-self.context :], targets) for inputs, targets in pairs]

    def score(self, texts: list[list[Window]]) -> list[tuple[float, bool]]:
        """log p of each text, given as windows, and whether all of its tokens are greedy."""
        windows = [(n, window) for n, text in enumerate(texts) for window in text]
        windows.sort(key=lambda numbered: -len(numbered[1][0]))  # a batch has similar lengths
        batches = [windows[n : n + self.rows] for n in range(0, len(windows), self.rows)]
        scores = [(0.0, True)] * len(texts)
        for batch in tracked(batches, f"scoring {len(texts):,} texts"):
            found = self.score_batch([window for _, window in batch])
            for (n, _), (log_p, greedy) in zip(batch, found, strict=True):
                scores[n] = (scores[n][0] + log_p, scores[n][1] and greedy)
        return scores

    @torch.no_grad()
    def score_batch(self, windows: list[Window]) -> list[tuple[float, bool]]:
        """The same for B windows, padded at the end, where no token attends."""
        padded = [[IGNORED] * (len(ids) - len(wanted)) + wanted for ids, wanted in windows]
        targets = pad_sequence(list(map(torch.tensor, padded)), True, IGNORED)  # (B, T)
        inputs = pad_sequence([torch.tensor(ids) for ids, _ in windows], True)
        logits = self.run.model(inputs.to(self.run.device.name)).float()  # (B, T, V)
        targets = targets.to(logits.device)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        totals = losses.view_as(targets).cpu().double().sum(dim=1)
        greedy = ((logits.argmax(dim=-1) == targets) | (targets == IGNORED)).all(dim=1)
        return list(zip((-totals).tolist(), greedy.tolist(), strict=True))

    def generate(self, prompt: str, gen_kwargs: dict[str, Any], *, seed: int) -> str:
        """The continuation of a prompt, up to the first stop sequence or end-of-text token.

        A prompt that leaves no space in the context for its continuation is cut at the start, to
        half of the context at most.
        """
        new_tokens, sampler, stops = sampling_of(gen_kwargs)
        tokens = self.tok_encode(prompt) or self.begin
        kept = max(1, self.context // 2, self.context - new_tokens)
        self.contexts_cut += len(tokens) > kept
        tokens, text = tokens[-kept:], ""
        start = len(decode(self.run.tokenizer, tokens))
        for (token,) in generate(
            self.run.model,
            tokens,
            new_tokens,
            sampler=sampler,
            seed=seed,
            context_length=self.context,
        ):
            if token is None or token == self.end:
                break
            tokens.append(token)
            text = decode(self.run.tokenizer, tokens)[start:]
            if places := [text.index(stop) for stop in stops if stop in text]:
                return text[: min(places)]
        return text


def sampling_of(gen_kwargs: dict[str, Any]) -> tuple[int, Sampler, list[str]]:
    """The number of new tokens of a task, its sampling (greedy by default), its stop sequences."""
    from lm_eval.models.utils import normalize_gen_kwargs

    settings = normalize_gen_kwargs(gen_kwargs)
    sampler = Sampler(
        temperature=settings.get("temperature", 1.0) if settings["do_sample"] else 0,
        top_k=settings.get("top_k") or None,
        top_p=settings.get("top_p") or None,
        repetition_penalty=settings.get("repetition_penalty", 1.0),
    )
    return settings["max_gen_toks"], sampler, [stop for stop in settings["until"] if stop]


def evaluate(selector: RunSelector, options: Options) -> int:
    """`python eval.py run=DIR eval=harness tasks=NAMES`."""
    selector.refuse_data("harness")
    for library in ("datasets", "huggingface_hub"):  # what they log, the ValueError says
        logging.getLogger(library).setLevel(logging.CRITICAL)
    run = selector.load(selector.only)
    with environment_variables(HF_UPDATE_DOWNLOAD_COUNTS="0", DISABLE_MULTIPROC="1"):
        answer = run_tasks(run, options)
    return run.write_answer(file_name(run, selector, options), answer, to_text(answer))


def run_tasks(run: LoadedRun, options: Options) -> dict[str, Any]:
    """The results of lm-eval, for JSON. Raises ValueError for any failure of lm-eval or a task."""
    from lm_eval import simple_evaluate

    model, manager = HarnessModel(run, options), task_manager(options.names)
    try:
        with without_noise(), run.device.autocast():
            results = simple_evaluate(
                model,
                tasks=options.names,
                task_manager=manager,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
            )
    except Exception as error:  # tasks are code, data and metrics of many authors
        raise ValueError(f"tasks={options.tasks}: {type(error).__name__}: {error}") from error
    return {
        **asdict(options),
        **run.described,
        "context": model.context,
        "results": rows_of(results["results"]),
        "examples": results["n-samples"],
        "shots": results["n-shot"],
        "versions": {"lm_eval": results["lm_eval_version"], "tasks": results["versions"]},
        "tokenizer": run.config["data"]["tokenizer"],
        "tokenizer_sha256": run.tokenizer_sha256,
        "first_tokens_not_scored": model.first_tokens_not_scored,
        "contexts_cut": model.contexts_cut,
    }


def task_manager(names: list[str]) -> Any:
    """lm-eval's task manager. It reads lm-eval's own tasks, which takes 12 seconds, only for a name
    that is not a file.

    Raises ValueError for a task that does not exist.
    """
    from lm_eval.tasks import TaskManager

    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    for name in files:
        if not Path(name).expanduser().is_file():
            raise ValueError(f"tasks={name}: no such file")
    manager = TaskManager(include_defaults=len(files) < len(names))
    for name in set(names) - set(files) - set(manager.task_index):
        close = difflib.get_close_matches(name, manager.all_tasks)
        hint = f"did you mean {' or '.join(close)}?" if close else "task files end in .yaml"
        raise ValueError(f"tasks={name}: lm-eval has no task of this name; {hint}")
    return manager


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Hide what lm-eval prints and, except on a terminal, its progress bars; warnings come last."""
    with contextlib.redirect_stdout(io.StringIO()):
        if sys.stderr.isatty():
            yield
            return
        try:
            with contextlib.redirect_stderr(io.StringIO()) as captured:
                yield
        finally:  # a bar is a line that starts with a carriage return
            sys.stderr.write(re.sub(r"\r[^\n]*\n?", "", captured.getvalue()))


def rows_of(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per metric of each task, and of each group that has its own."""
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
    """The settings, so that no answer overwrites that of other settings."""
    tasks = "+".join(Path(name).stem for name in options.names)
    if len(tasks) > 80:
        tasks = f"{len(options.names)}tasks-{sha256_of(tasks)[:8]}"
    keys = ("context", "limit", "num_fewshot")
    words = [f"{key}{getattr(options, key)}" for key in keys if getattr(options, key) is not None]
    words += [run.pos_label] if selector.pos is not None else []
    return "_".join([f"harness_step{run.step}", tasks, *words, run.device.dtype_name])


def to_text(answer: dict[str, Any]) -> str:
    """An answer for the terminal."""
    rows = [["task", "metric", "value", "stderr"]]
    for row in answer["results"]:
        error = "" if row["stderr"] is None else f"{row['stderr']:.3g}"
        rows.append([row["task"], row["metric"], f"{row['value']:.6g}", error])
    lines = [columns(rows), ""]
    for task, n in answer["examples"].items():
        shots = answer["shots"].get(task, 0)
        lines.append(f"  {task}: {n['effective']:,} of {n['original']:,} examples, {shots} shots")
    if cut := answer["contexts_cut"]:
        lines.append(f"  {cut:,} requests longer than {answer['context']:,} tokens: start cut off")
    if missed := answer["first_tokens_not_scored"]:
        lines.append(f"  {missed:,} texts whose first token is not scored: it has no context")
    return "\n".join(lines)
