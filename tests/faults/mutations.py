"""Mutation tests: remove one safeguard at a time from a copy: python tests/faults/mutations.py [WORD ...]

Words select mutations by name. Exit code 1 if the tests miss one.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAULTS, TRAINER = "tests/faults/test_faults.py", "tests/train/test_trainer.py"


@dataclass(frozen=True)
class Mutation:
    """A piece of a file, its replacement, and the tests of which at least one must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    only: str = ""  # words in the names of those tests


MUTATIONS = (
    Mutation(
        "files are not synced",
        "data/atomic.py",
        "        for path in [*temporary.iterdir(), temporary]:\n            sync(path)\n",
        "",
        FAULTS,
        "on_disk",
    ),
    Mutation(
        "the folder is not synced after the rename",
        "data/atomic.py",
        "        sync(folder.parent)\n",
        "",
        FAULTS,
        "on_disk",
    ),
    Mutation(
        "records are not synced before a save",
        "train/record/run_log.py",
        "            os.fsync(file.fileno())",
        "            pass",
        FAULTS,
        "on_disk",
    ),
    Mutation(
        "copied into place, not renamed",
        "data/atomic.py",
        "temporary.rename(folder)",
        "shutil.copytree(temporary, folder)",
        FAULTS,
        "on_disk",
    ),
    Mutation(
        "deleted in place, not aside",
        "data/atomic.py",
        "        folder.rename(going)\n",
        "        shutil.rmtree(folder)\n",
        FAULTS,
        "on_disk",
    ),
    Mutation(
        "a failed save leaves its temporary folder",
        "data/atomic.py",
        "shutil.rmtree(temporary, ignore_errors=True)",
        "pass",
        FAULTS,
        "does_not_fit",
    ),
    Mutation(
        "the manifest is not compared",
        "data/atomic.py",
        "            if sha256(folder / Path(name).name) != expected:",
        "            if False:",
        FAULTS,
        "flipped",
    ),
    Mutation(
        "the generator is not seeded at each step",
        "train/step.py",
        "            self.device.seed(derive_seed(self.seed, step, i))",
        "            pass",
        TRAINER,
        "resumed_run and dropout",
    ),
    Mutation(
        "the optimizer's state is not restored",
        "train/trainer.py",
        "            self.optimizer.load(saved.optimizer())\n",
        "",
        TRAINER,
        "resumed_run and plain",
    ),
    Mutation(
        "records after the checkpoint stay",
        "train/run.py",
        "    record.cut(trainer.step if saved else -1)\n",
        "",
        TRAINER,
        "resumed_run and plain",
    ),
    Mutation(
        "micro-batches are not weighted by their rows",
        "train/step.py",
        "* (counted(y) / number)",
        "/ self.accumulate",
        TRAINER,
        "accumulating",
    ),
    Mutation(
        "validation batches are not weighted by their tokens",
        "train/trainer.py",
        "        loss, text_bytes = nats / tokens, ",
        "        loss, text_bytes = nats / (tokens + 1), ",
        "tests/train/test_record.py",
        "scoring_a_checkpoint",
    ),
    Mutation(
        "no lock",
        "train/record/run_log.py",
        "            self.lock.acquire(timeout=0)\n",
        "",
        TRAINER,
        "folder_in_use",
    ),
    Mutation(
        "no lock on a token cache",
        "data/corpus.py",
        '    with FileLock(folder.with_suffix(".lock")):',
        "    if True:",
        FAULTS,
        "four_that_build",
    ),
    Mutation(
        "a loss that is not finite is trained on",
        "train/step.py",
        "        if not math.isfinite(result.loss + (result.grad_norm or 0))",
        "        if False",
        TRAINER,
        "not_finite or diverging",
    ),
    Mutation(
        "a measuring pass that fails fails the run",
        "train/summary.py",
        "        except Exception as error:",
        "        except ZeroDivisionError as error:",
        TRAINER,
        "cannot_be_measured",
    ),
    Mutation(
        "a sample or a summary that cannot be written fails the run",
        "train/summary.py",
        "    except Exception as error:  # noqa: BLE001\n",
        "    except ZeroDivisionError as error:\n",
        TRAINER,
        "saved_run",
    ),
    Mutation(
        "a run is not done before it is measured",
        "train/run.py",
        '        record.status("done", trainer.step)\n',
        "",
        TRAINER,
        "status_is_done",
    ),
    Mutation(
        "a run that is interrupted while it is measured counts as done",
        "train/summary.py",
        "        trainer.update(trainer.step)\n        trainer.check_signal(save=False)\n",
        "        trainer.update(trainer.step)\n",
        TRAINER,
        "while_it_is_measured",
    ),
    Mutation(
        "other data may be resumed on",
        "train/trainer.py",
        '            self.job.corpus.check_identity(state, "resume")\n',
        "",
        TRAINER,
        "other_text",
    ),
    Mutation(
        "another config may be resumed with",
        "train/run.py",
        "        refuse_changes(before, spec.config)\n",
        "",
        TRAINER,
        "another_config",
    ),
    Mutation(
        "classes that were imported count as ours",
        "train/setup/build.py",
        "isinstance(found, type) and found.__module__ == match[1]",
        "isinstance(found, type)",
        "tests/train/test_config.py",
        "",
    ),
    Mutation(
        "any name of code counts as ours",
        "train/setup/build.py",
        'rf"({module})\\.([A-Za-z0-9]+)"',
        'r"([\\w.]+)\\.(\\w+)"',
        "tests/train/test_config.py",
        "",
    ),
    Mutation(
        "sizes have no bounds",
        "model/shape.py",
        "            if (getattr(self, name) or 0) > largest:",
        "            if False:",
        FAULTS,
        "hostile_config and (context or vocabulary)",
    ),
    Mutation(
        "control characters reach the terminal",
        "train/record/terminal.py",
        '    return "".join(',
        '    return text or "".join(',
        "tests/train/test_record.py",
        "one_line_and_exit_code_2",
    ),
    Mutation(
        "a second interrupt waits, too",
        "train/trainer.py",
        "            signal.signal(signal.SIGINT, signal.SIG_DFL)\n",
        "",
        FAULTS,
        "second_interrupt",
    ),
)


def main(words: list[str]) -> int:
    """Try all mutations, or those with one of these words; exit code 1 if one is missed."""
    asked = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    unnoticed = []
    for mutation in asked:
        start = time.monotonic()
        if not red(mutation):
            unnoticed.append(mutation.name)
        said = "NOT NOTICED" if mutation.name in unnoticed else "noticed"
        print(f"{mutation.name}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(asked) - len(unnoticed)} of {len(asked)} noticed")
    return 1 if unnoticed else 0


def red(mutation: Mutation) -> bool:
    """True if a test fails under a mutation. Raises RuntimeError if no test ran."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        copy = Path(name)
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for file in listed.stdout.splitlines():
            if (ROOT / file).is_file():
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                (copy / file).write_bytes((ROOT / file).read_bytes())
        text = (copy / mutation.file).read_text(encoding="utf-8")
        if mutation.old not in text:
            raise RuntimeError(f"{mutation.name}: {mutation.file} has changed")
        (copy / mutation.file).write_text(
            text.replace(mutation.old, mutation.new), encoding="utf-8"
        )
        only = ["-k", mutation.only] if mutation.only else []
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", mutation.tests, *only]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}"
        )
    return done.returncode == 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
