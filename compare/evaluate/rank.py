"""Perplexity of a run with tune=dylora at each rank up to its own: one training, every rank."""

from dataclasses import dataclass

from compare.evaluate.dataset import check_split, open_text
from compare.evaluate.load import LoadedRun, RunSelector
from compare.evaluate.publish import publish
from model.loss import perplexity
from model.tuning.lora import DynamicLoRALinear
from train.config.schema import Config, at_least


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/rank.yaml. Raises ValueError for invalid values."""

    split: str | None
    batch_size: int | None

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size")
        check_split(self.split)


def evaluate(selector: RunSelector, options: Options) -> int:
    """`python eval.py run=DIR,... eval=rank`."""
    answers = ((f, measure(selector, selector.load(f), options)) for f in selector.runs)
    return publish("rank", selector, answers)


def measure(selector: RunSelector, run: LoadedRun, options: Options) -> Config:
    """Perplexity at each rank. Raises ValueError for a run without layers of many ranks."""
    layers = [m for m in run.model.modules() if isinstance(m, DynamicLoRALinear)]
    if not layers:
        raise ValueError(f"eval=rank: {run.folder} was not trained with tune=dylora")
    text = open_text(run, options.split, selector.data, selector.data_name)
    rows = []
    for rank in range(1, layers[0].rank + 1):
        for layer in layers:
            layer.rank = rank
        context = run.model.shape.max_len
        nats = run.score(
            text.tokens,
            context=context,
            stride=context,
            batch_size=run.batch_size(options.batch_size),
        )
        loss = nats.double().mean().item()
        rows.append({"rank": rank, "loss": loss, "perplexity": perplexity(loss)})
    return {
        "title": "One training, every rank",
        "rows": rows,
        "figure": {"x": "rank", "y": "perplexity"},
    }
