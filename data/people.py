"""Made-up people: short biographies, and questions about where they were born."""

from dataclasses import dataclass

import numpy as np

PARTS = ("biographies", "questions")
REGIONS = 10
SYLLABLES = (
    "ba be bor cal da del do du fen fi ga har hel il jo ka ko la len lo lu ma mer mo na ni nor or pa "
    "pel ra ri ro sa sel so ta ten to tul va vel vi wa wen yo zan zor"
).split()
ENDINGS = "ak berg dez ell fors ini mann ovic son wick".split()  # of surnames, one for each region
FIRST_NAMES = (
    "Ada Ben Carl Dora Emil Fay Greta Hugo Ida Jon Kurt Lena Max Nora Otto Paul Rosa Sam Tess Vera"
).split()
TRADES = "baker judge nurse pilot smith tailor farmer singer weaver doctor".split()
BORN = (
    "{name} was born in {birth}.",
    "{birth} is where {name} was born.",
    "{name} is a native of {birth}.",
    "{name} comes from {birth}.",
    "{birth} is the birthplace of {name}.",
)
WORK = (
    "{name} is a {trade} in {town}.",
    "In {town} {name} works as a {trade}.",
    "{name}, a {trade}, lives in {town}.",
)
MOVE = (
    "{name} moved to {home} in {year}.",
    "In {year} {name} came to {home}.",
    "{name} lived in {home} until {year}.",
)
QUESTION = "Where was {name} born?"
MOST = len(SYLLABLES) ** 2 * 20 // 21  # people whose surnames differ, with those of validation


@dataclass(frozen=True)
class Person:
    """A made-up person: facts by the names that templates give them."""

    facts: dict[str, str]

    @property
    def question(self) -> str:
        return f"{QUESTION.format(**self.facts)}\t {self.facts['birth']}"

    def biography(self, random: np.random.Generator) -> str:
        """Two sentences, one on the birthplace, in any order; the second has the surname alone."""
        other = (WORK, MOVE)[int(random.integers(2))]
        sentences = [str(random.choice(templates)) for templates in (BORN, other)]
        first, *others = (sentences[i] for i in random.permutation(len(sentences)))
        short = self.facts | {"name": self.facts["surname"]}
        return " ".join([first.format(**self.facts), *(o.format(**short) for o in others)])


class People:
    """Made-up people, a pure function of `seed`; nothing is downloaded.

    Half of them are asked in training. A quarter is *known*: they have biographies, and their
    question comes in validation alone. A quarter are *strangers*: asked in validation, without a
    biography anywhere. `part` is `biographies` (a document is one of the `paraphrases` of a known or
    asked person; validation has those of further people) or `questions` (a document is question,
    answer and group with tabs between).
    The birthplace is one of `places`; the commonest is the answer to 5 % of all questions if there
    are 100. The ending of a surname tells the region of the birthplace with probability `cue`, else
    it is drawn at random. Raises ValueError for too few people or places.
    """

    def __init__(
        self, *, part: str, people: int, places: int, cue: float, paraphrases: int, seed: int
    ) -> None:
        if part not in PARTS:
            raise ValueError(f"data.part={part} is not one of {', '.join(PARTS)}")
        if not 8 <= people <= MOST:
            raise ValueError(f"data.people={people} must be at least 8 and at most {MOST}")
        if not REGIONS <= places <= 1000:
            raise ValueError(f"data.places={places} must be at least {REGIONS} and at most 1000")
        if not 0 <= cue <= 1:
            raise ValueError(f"data.cue={cue} must be at least 0 and at most 1")
        if paraphrases < 1 or seed < 0:
            raise ValueError(
                f"data.paraphrases={paraphrases} must be at least 1, data.seed={seed} at least 0"
            )
        self.part, self.people, self.places = part, people, places
        self.cue, self.paraphrases, self.seed = cue, paraphrases, seed

    def key(self) -> str:
        options = (self.people, self.places, self.cue, self.paraphrases, self.seed)
        return f"people:1:{self.part}:{options}"

    def load(self) -> dict[str, list[str]]:
        random = np.random.default_rng(self.seed)
        people = self.everyone(random)
        half, quarter = self.people // 2, 3 * self.people // 4
        asked, known = people[:half], people[half:quarter]
        strangers, further = people[quarter : self.people], people[self.people :]
        told = [p.biography(random) for _ in range(self.paraphrases) for p in asked + known]
        if self.part == "biographies":
            return {"train": told, "val": [person.biography(random) for person in further]}
        groups = {"known": known, "stranger": strangers}
        return {
            "train": [person.question for person in asked],
            "val": [f"{p.question}\t{group}" for group in groups for p in groups[group]],
            "tokenizer": told,  # that of the biographies, for models that go on from those
        }

    def everyone(self, random: np.random.Generator) -> list[Person]:
        """So many people, and a twentieth more."""
        places = [f"{first}{second}".title() for first, second in pairs(self.places, random)]
        popularity = 1 / (np.arange(self.places) + 6)
        births = random.choice(
            self.places, self.people + self.people // 20, p=popularity / popularity.sum()
        )
        people = []
        for birth, (first, second) in zip(births, pairs(len(births), random), strict=True):
            told = random.random() < self.cue
            region = int(birth) % REGIONS if told else int(random.integers(REGIONS))
            surname = f"{first}{second}{ENDINGS[region]}".title()
            facts = {
                "name": f"{random.choice(FIRST_NAMES)} {surname}",
                "surname": surname,
                "birth": places[birth],
                "town": str(random.choice(places)),
                "home": str(random.choice(places)),
                "trade": str(random.choice(TRADES)),
                "year": str(random.integers(1900, 2000)),
            }
            people.append(Person(facts))
        return people


def pairs(count: int, random: np.random.Generator) -> list[tuple[str, str]]:
    """So many pairs of syllables, all different."""
    drawn = random.choice(len(SYLLABLES) ** 2, count, replace=False)
    return [(SYLLABLES[n // len(SYLLABLES)], SYLLABLES[n % len(SYLLABLES)]) for n in drawn]
