"""Rewards that need no code and no model: `sentiment:FILE`, `length:WORDS` and `regex:PATTERN`.

They look at the completion alone.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prefopt.errors import RewardError
from prefopt.records import Content
from prefopt.rewards.reward import Reward

__all__ = ["BUILTINS", "length", "pattern", "sentiment"]

_REACH = 3  # words over which a negation turns a word's sign
_ALPHA = 15.0  # of Hutto and Gilbert's normalisation: about the largest sum they expect
_NEGATIONS = re.compile(
    "aint|arent|cannot|cant|couldnt|darent|despite|didnt|doesnt|dont|hadnt|hasnt|havent|isnt|mightnt|mustnt|neednt"
    "|neither|never|no|none|nope|nor|not|nothing|nowhere|oughtnt|rarely|seldom|shant|shouldnt|uhuh|wasnt|werent"
    "|without|wont|wouldnt|.*n't"
)
# Words, with what joins their parts; and the marks between which a clause stands.
_TOKENS = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[.,;:!?()\"“”…—]")


def sentiment(file: str) -> Reward:
    """Valence of a completion's words, in (-1, 1): s / sqrt(s^2 + 15), with s the sum over its known words.

    Valences and normalisation are VADER's (Hutto and Gilbert 2014); 0 where no word is known. A word's
    sign is turned by each negation among the three words before it in its clause (between marks of
    punctuation); a negation has no valence of its own. Of VADER's further rules none is followed:
    degree words ("very"), capitals, exclamation and question marks, the shift at "but", idioms,
    emoticons and entries of several words, and its factor of 0.74 at a negation.

    Args:
        file: A lexicon in VADER's layout: a word, a tab, its mean valence; what stands behind is left aside.

    Raises:
        RewardError: the file cannot be read, or a line is not of this layout.
    """
    try:
        content = Path(file).read_bytes()
        valences = _lexicon(file, content.decode("utf-8"))
    except OSError as error:
        raise RewardError(
            "The sentiment lexicon cannot be read.",
            where=f"reward sentiment:{file}",
            got=str(error.strerror),
            expected="a text file with a word, a tab and its valence on each line (VADER's lexicon)",
        ) from error
    except UnicodeDecodeError as error:
        raise RewardError("The sentiment lexicon is no UTF-8 text.", where=file, got=str(error)) from error

    def score(prompts: Sequence[Content], completions: Sequence[str]) -> list[float]:
        sums = [_valence(text, valences) for text in completions]
        return [s / math.sqrt(s * s + _ALPHA) for s in sums]

    return Reward(f"sentiment:{file}", hashlib.sha256(b"sentiment\0" + content).hexdigest(), score)


def _lexicon(file: str, text: str) -> dict[str, float]:
    valences: dict[str, float] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        word, *rest = line.split("\t")
        try:
            valences[word.lower()] = float(rest[0])
        except (IndexError, ValueError):
            raise RewardError(
                "A line of the sentiment lexicon cannot be read.",
                where=f"{file}:{number}",
                got=repr(line[:80]),
                expected="a word, a tab and its mean valence",
            ) from None
    if not valences:
        raise RewardError(
            "The sentiment lexicon is empty.", where=file, expected="a word, a tab and its valence a line"
        )
    return valences


def _valence(text: str, valences: Mapping[str, float]) -> float:
    total, clause = 0.0, list[str]()
    for token in _TOKENS.findall(text.lower().replace("’", "'")):
        if not token[0].isalnum():
            clause = []
            continue
        if not _negates(token) and token in valences:
            turns = sum(map(_negates, clause[-_REACH:]))
            total += -valences[token] if turns % 2 else valences[token]
        clause.append(token)
    return total


def _negates(word: str) -> bool:
    return _NEGATIONS.fullmatch(word) is not None


def length(words: str) -> Reward:
    """-|words - N| / N, with the completion's words counted between white space: 0 at N words, -1 at none.

    Raises:
        RewardError: N is not a whole number above 0.
    """
    if not (words.isascii() and words.isdigit() and int(words)):
        raise RewardError(
            "The target length is not right.",
            where=f"reward length:{words}",
            got=words or "nothing",
            expected="a number of words, 1 or more, such as length:50",
        )
    target = int(words)

    def score(prompts: Sequence[Content], completions: Sequence[str]) -> list[float]:
        return [-abs(len(text.split()) - target) / target for text in completions]

    return Reward(f"length:{words}", f"length {target}", score)


def pattern(text: str) -> Reward:
    """1 where the regular expression (Python's `re`) is found in the completion, else 0.

    Raises:
        RewardError: it is none.
    """
    try:
        compiled = re.compile(text)
    except re.error as error:
        raise RewardError(
            "The pattern is no regular expression.",
            where=f"reward regex:{text}",
            got=str(error),
            expected="a pattern of Python's re, such as regex:(?i)thank you",
        ) from error

    def score(prompts: Sequence[Content], completions: Sequence[str]) -> list[float]:
        return [float(compiled.search(completion) is not None) for completion in completions]

    return Reward(f"regex:{text}", f"regex {text}", score)


BUILTINS: dict[str, Callable[[str], Reward]] = {"sentiment": sentiment, "length": length, "regex": pattern}
