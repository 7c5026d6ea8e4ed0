"""Evaluations of finished runs: `python eval.py run=DIR eval=NAME`.

An evaluation is two files: a module compare/evaluate/NAME.py and its defaults, configs/eval/NAME.yaml.
Both may lie in a folder, for eval=FOLDER/NAME. The module offers

    Options     a frozen dataclass with keyword-only fields, the keys of the YAML; it raises ValueError
                for invalid values
    evaluate    a function of a RunSelector (which runs, and how to load them) and the Options, which
                returns an exit code

`publish` writes the answer of each run to RUN/eval/NAME.json, prints a table of all variants, and
adds that table and a figure to the reports of sweeps. For both, an answer holds

    title       a heading
    rows        dictionaries with equal keys; in the table, floats (None: not defined) are means over
                the runs of a variant, and all other values name the row
    figure      optional: the columns of the axes, {"x": ..., "y": ...}; x is not a float

This is a complete evaluation, compare/evaluate/top_k.py:

    '''Top-k accuracy: how often the next token is among the k most likely ones.'''

    from dataclasses import dataclass

    import torch

    from compare.evaluate.dataset import open_text
    from compare.evaluate.load import LoadedRun, RunSelector
    from compare.evaluate.publish import publish
    from train.config.schema import Config


    @dataclass(frozen=True, kw_only=True)
    class Options:
        '''The keys of eval/top_k.yaml.'''

        ks: list[int]


    def evaluate(selector: RunSelector, options: Options) -> int:
        '''`python eval.py run=DIR,... eval=top_k`.'''
        answers = ((run, measure(selector.load(run), options)) for run in selector.runs)
        return publish("top_k", selector, answers)


    @torch.no_grad()
    def measure(run: LoadedRun, options: Options) -> Config:
        '''Accuracies on the first window of the validation text.'''
        text = open_text(run, "val", None, None)
        window = text.tokens[: run.model.shape.max_len + 1].long().to(run.device.name)  # (T + 1,)
        logits, target = run.model(window[None, :-1])[0], window[1:, None]  # (T, V), (T, 1)
        rank = (logits > logits.gather(1, target)).sum(dim=1)
        rows = [{"k": k, "accuracy": (rank < k).float().mean().item()} for k in options.ks]
        return {"title": "Top-k accuracy", "rows": rows, "figure": {"x": "k", "y": "accuracy"}}

and configs/eval/top_k.yaml:

    # @package _global_
    # Top-k accuracy on the validation text.
    ks: [1, 5, 10]   # numbers of guesses
"""
