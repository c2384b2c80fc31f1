"""A small language of film and product reviews, and the truth about how pleased a text is.

A review is a neutral opening and then sentences that praise or blame; the opening is drawn before
the sentiment, so it tells nothing about it. `true_reward` knows every word of praise and blame the
grammar has: the quickstart's ground truth, which real life does not offer.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

__all__ = ["Review", "Sentiment", "ground_truth", "openings", "reviews", "true_reward"]

Sentiment = Literal[-1, 1]


@dataclass(frozen=True, slots=True)
class Review:
    """A short review; `sentiment` is 1 if it praises on the whole, -1 if it blames."""

    text: str
    sentiment: Sentiment


@dataclass(frozen=True, eq=False)
class _Theme:
    """Words of one kind of review. `praise` and `blame` are adjectives that fit its parts."""

    openings: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]
    parts: tuple[str, ...]
    facts: tuple[str, ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


_PRAISE = _words("good|great|wonderful|lovely|superb|excellent|brilliant|delightful")
_BLAME = _words("bad|poor|awful|terrible|dull|weak|horrible|disappointing")
_LIKED = _words("loved|liked|enjoyed|admired")
_DISLIKED = _words("hated|disliked|loathed|despised")
_PEOPLE = _words("sister|brother|mother|father|cousin|neighbour|uncle|friend")
_TIMES = _words(
    "on a rainy evening|on Friday night|on a Sunday afternoon|last week|two days ago|in early spring"
    "|during the holidays|on my birthday|a month ago|one cold morning"
)

_FILM = _Theme(
    openings=(
        "I {saw} this {thing} {time} with my {person}.",
        "My {person} and I {saw} this {thing} {time}.",
        "We {saw} this {thing} {place} {time}.",
        "{time}, I {saw} this {thing} {place}.",
    ),
    words={
        "saw": _words("saw|watched"),
        "thing": _words("film|movie|drama|comedy|thriller|western|musical|cartoon"),
        "place": _words("at home|in a small cinema|on the train|at the town hall|in the park|on a plane"),
        "time": _TIMES,
        "person": _PEOPLE,
    },
    parts=_words("story|plot|music|acting|ending|script|cast|opening scene"),
    facts=_words(
        "It lasts about two hours.|It is set in a village by the sea.|It takes place in a large city."
        "|It was made in the seventies."
    ),
    praise=_words("gripping|touching|clever|funny"),
    blame=_words("boring|silly|clumsy|tiresome"),
)
_PRODUCT = _Theme(
    openings=(
        "I {got} this {thing} {time} for {room}.",
        "My {person} and I {got} this {thing} {time}.",
        "My {person} gave me this {thing} {time}.",
        "{time}, we {got} this {thing} for {room}.",
    ),
    words={
        "got": _words("bought|ordered|picked up"),
        "thing": _words("kettle|lamp|radio|toaster|phone|camera|chair|clock"),
        "room": _words("the kitchen|the office|my bedroom|the garage|our new flat|the garden house"),
        "time": _TIMES,
        "person": _PEOPLE,
    },
    parts=_words("handle|colour|design|manual|build|packaging|switch|surface"),
    facts=_words(
        "It came in a brown box.|It weighs about two pounds.|It stands next to the window.|We use it every day."
    ),
    praise=_words("sturdy|handy|reliable|elegant"),
    blame=_words("flimsy|useless|faulty|ugly"),
)
_THEMES = (_FILM, _PRODUCT)

# {good} is an adjective of the review's sentiment, {bad} one of the other, {liked} a verb of its
# sentiment. What a sentence says on the whole never differs from the review's sentiment.
_OPINIONS = (
    "The {part} was {good} and {good}.",
    "The {part} was {good}, and the {part} was {good}.",
    "I found the {part} {good}.",
    "To me the {part} seemed really {good}.",
    "I {liked} the {part}.",
    "My {person} {liked} the {part}.",
    "It was not {bad} at all.",
    "The {part} was never {bad}.",
    "All in all it is {a good} {thing}.",
    "What {a good} {thing}!",
    "The {part} is {good} from start to finish.",
    "Everyone at home {liked} it.",
)
_CONCESSION = "The {part} was {bad}, but the {part} was {good}."

_GOOD = frozenset(_PRAISE + _LIKED + _FILM.praise + _PRODUCT.praise)
_BAD = frozenset(_BLAME + _DISLIKED + _FILM.blame + _PRODUCT.blame)
_NEGATORS = frozenset({"not", "never", "no", "hardly", "cannot"})
_REACH = 3  # words: "not a very good film" is still a negation of "good"


def reviews(n: int, seed: int) -> list[Review]:
    """`n` reviews of 15 to 35 words, half of them pleased on average; the same for the same seed."""
    rng = random.Random(f"reviews {seed}")
    found: list[Review] = []
    while len(found) < n:
        review = _review(rng)
        if 15 <= len(review.text.split()) <= 35:
            found.append(review)
    return found


def openings(n: int, seed: int) -> list[str]:
    """`n` distinct neutral openings, each one sentence that a review can begin with.

    Raises:
        ValueError: the grammar does not have as many.
    """
    every = [text for theme in _THEMES for text, _ in _openings(theme)]
    return random.Random(f"openings {seed}").sample(every, n)


def ground_truth(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """`true_reward` of each prompt with its completion: a reward to name, `prefopt.quickstart.corpus:ground_truth`."""
    return [true_reward(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]


def true_reward(text: str) -> float:
    """(praise - blame) / (praise + blame) over the words the grammar knows, in [-1, 1]; 0 if it has none.

    A negation turns the next such word round if it is at most three words ahead in its sentence.
    A mean, not a sum: a longer text is not a better one.
    """
    score = known = 0
    for sentence in re.split(r"[.!?;,]", text.lower()):
        negated_until = -1
        for i, word in enumerate(re.findall(r"[a-z']+", sentence)):
            if word in _NEGATORS:
                negated_until = i + _REACH
            elif word in _GOOD or word in _BAD:
                praise = (word in _GOOD) != (i <= negated_until)
                score += 1 if praise else -1
                known += 1
                negated_until = -1
    return score / known if known else 0.0


@cache
def _openings(theme: _Theme) -> tuple[tuple[str, str], ...]:
    """Every opening of a theme, with the thing it is about."""
    found = []
    for template in theme.openings:
        names = re.findall(r"{(\w+)}", template)
        for values in product(*(theme.words[name] for name in names)):
            filled = dict(zip(names, values, strict=True))
            found.append((_sentence(template.format(**filled)), filled["thing"]))
    return tuple(found)


def _review(rng: random.Random) -> Review:
    theme = rng.choice(_THEMES)
    opening, thing = rng.choice(_openings(theme))
    sentiment: Sentiment = rng.choice((-1, 1))
    # A concession holds one word against the sentiment: two opinions beside it keep the balance.
    templates = rng.sample(_OPINIONS, rng.choice((2, 2, 3)))
    if rng.random() < 0.25:
        templates[0] = _CONCESSION
    used: set[str] = set()  # no "good and good", no "the plot ... the plot"
    sentences = [_opinion(template, theme, thing, sentiment, used, rng) for template in templates]
    if rng.random() < 0.25:
        sentences.insert(0, rng.choice(theme.facts))
    return Review(" ".join([opening, *sentences]), sentiment)


def _opinion(template: str, theme: _Theme, thing: str, sentiment: Sentiment, used: set[str], rng: random.Random) -> str:
    praise, blame = _PRAISE + theme.praise, _BLAME + theme.blame
    good, bad = (praise, blame) if sentiment == 1 else (blame, praise)
    choices: dict[str, Sequence[str]] = {
        "part": theme.parts,
        "good": good,
        "bad": bad,
        "liked": _LIKED if sentiment == 1 else _DISLIKED,
        "person": _PEOPLE,
        "thing": (thing,),
    }

    def draw(slot: re.Match[str]) -> str:
        name = slot.group(1)
        word = rng.choice([w for w in choices[name.removeprefix("a ")] if w not in used or w == thing])
        used.add(word)
        article = "an " if word[0] in "aeiou" else "a "
        return article + word if name.startswith("a ") else word

    return _sentence(re.sub(r"{([a-z ]+)}", draw, template))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
