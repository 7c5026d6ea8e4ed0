"""A finished run as a Hugging Face model folder: python -m cli.export."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compare.evaluate.load import LoadedRun, environment_variables
from data.atomic import TEMPORARY, sync
from data.tokenizer import END_OF_TEXT, decode, encode
from train.config.keys import FULL
from train.setup.build import build_tuning
from train.setup.huggingface import Family, home_of, their_config, their_weights
from train.setup.weights import load, open_model

TOLERANCE = 1e-4  # between logits with a standard deviation of 1


def export(run: LoadedRun, to: Path) -> str:
    """Write a run as a model folder, completely or not at all; a line on the result and its check.

    Raises ValueError if transformers has no equivalent architecture.
    """
    run = merged(run)
    family = home_of(run.config)
    temporary = to.parent / f"{TEMPORARY}{to.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary, run, family)
        with environment_variables(HF_HUB_OFFLINE="1"):
            checked = check(temporary, run)
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if to.exists():
            to.rmdir()
        temporary.rename(to)
        sync(to.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"{to}: {family.architecture}, {checked}"


def merged(run: LoadedRun) -> LoadedRun:
    """A run with what finetuning added merged into the other weights.

    Raises ValueError for what cannot be merged.
    """
    if not run.model.added:
        return run
    try:
        weights = build_tuning(run.config).merged(run.model)
    except ValueError as error:
        raise ValueError(f"{run.folder}: {error}") from error
    config = run.config | {"tune": FULL}
    model = open_model(run.folder, config, run.tokenizer)
    load(model, weights, str(run.folder))
    return replace(run, config=config, model=model.to(run.device.name).eval())


def fill(folder: Path, run: LoadedRun, family: Family) -> None:
    """Write the files of a model folder."""
    end = run.tokenizer.token_to_id(END_OF_TEXT)
    ends = {"bos_token_id": end, "eos_token_id": end}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": run.model.shape.max_len,
        "split_special_tokens": True,  # text that spells a special token stays text
        "clean_up_tokenization_spaces": False,
        **({} if end is None else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}),
    }
    content = {
        "config.json": their_config(family, run.model, run.config) | ends,
        "generation_config.json": ends,
        "tokenizer_config.json": tokenizer,
    }
    for name, values in content.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    shutil.copy(run.folder / "tokenizer.json", folder)
    weights = their_weights(family, run.model)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def check(folder: Path, run: LoadedRun) -> str:
    """Compare a folder, loaded by transformers, with its run; a line on the result.

    Raises ValueError for different logits or tokens.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        return 'not checked: transformers is not installed (pip install ".[peers]")'
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    size, length = run.tokenizer.get_vocab_size(), run.model.shape.max_len
    tokens = torch.randint(size, (2, length), generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    with torch.no_grad():
        ours, theirs = run.model(tokens), model.eval()(tokens, use_cache=False).logits
    error = (ours - theirs).abs().max().item()
    if not error <= TOLERANCE * max(1.0, ours.std().item()):
        raise ValueError(f"{run.folder}: the exported model's logits differ by {error:.2g}")
    text = decode(run.tokenizer, [*range(size), *tokens.flatten().tolist()])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.encode(text, add_special_tokens=False) != encode(run.tokenizer, text):
        raise ValueError(
            f"{run.folder}: the exported tokenizer encodes {text[:20]!r}... differently"
        )
    return (
        f"checked with transformers {transformers.__version__}: logits of {length} tokens differ by at "
        f"most {error:.1e}, tokens of {len(text):,} characters are equal"
    )
