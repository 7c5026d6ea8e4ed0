"""Damaged files: flipped bits and truncation, in checkpoints and in cached tokens."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kills import Scene, Tally

from data.atomic import verify

Change = Callable[[bytes, random.Random], bytes]


def folders(scene: Scene) -> list[Path]:
    """All folders with a manifest: the undisturbed run's checkpoints and the token cache."""
    found = [path.parent for path in scene.folder.rglob("MANIFEST.json")]
    return [f for f in sorted(found) if "warm" not in f.parts]


@contextmanager
def altered(path: Path, content: bytes) -> Iterator[None]:
    """Context in which a file has other content."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flips(scene: Scene, trials: int, seed: int) -> Tally:
    """Flip a random bit, `times` times: each must be detected and its file named."""

    def flip(content: bytes, draw: random.Random) -> bytes:
        bit = draw.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    return damaged(scene, trials, seed, flip)


def cuts(scene: Scene, trials: int, seed: int) -> Tally:
    """Truncate a random file, `times` times: each must be detected and its file named."""
    return damaged(
        scene, trials, seed, lambda content, draw: content[: draw.randrange(len(content))]
    )


def damaged(scene: Scene, trials: int, seed: int, change: Change) -> Tally:
    """Change random files; each time the folder must be refused with the file named."""
    draw, tally = random.Random(seed), Tally()
    places = folders(scene)
    for _ in range(trials):
        folder = draw.choice(places)
        path = draw.choice([p for p in sorted(folder.iterdir()) if p.stat().st_size])
        with altered(path, change(path.read_bytes(), draw)):
            tally.tried()
            try:
                verify(folder)
            except ValueError as error:
                if folder.name not in str(error):
                    tally.faults.append(f"{path.name}: not named in: {error}")
            else:
                tally.faults.append(f"{path}: damage was not noticed")
    for folder in places:
        verify(folder)
    return tally
