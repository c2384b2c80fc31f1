"""Completions that begin by declining, found by their wording: suspects to look at, not a judgement."""

import re

__all__ = ["refusal"]

_BEGINNING = 200  # characters: who declines says so at once
_CANNOT = r"(?:cannot|can't|can not|am unable to|'m unable to|am not able to|'m not able to|won't|will not)"
_NOT_MEANT = r"(?:believe|imagine|wait|stress|emphasi[sz]e|recommend|thank|overstate|help but)"
_REFUSAL = re.compile(
    rf"(?:^|[.!?,:]\s+(?:but\s+|so\s+|and\s+)?)i {_CANNOT}\b(?! {_NOT_MEANT})"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\bi(?: a|')m (?:sorry|afraid),?(?: but)?(?: that)? i "
    rf"{_CANNOT}\b"
    r"|\bi(?: a|')m (?:just |only )?an? (?:ai|(?:large )?language model)\b"
    r"|^i(?: must|(?: wi|')ll have to) (?:decline|refuse)\b"
    r"|\bi(?: a|')m not comfortable (?:with|answering|helping|providing|discussing)\b"
)


def refusal(completion: str) -> str:
    """The words by which a completion seems to decline in its first 200 characters; "" if there are none."""
    beginning = " ".join(completion[:_BEGINNING].replace("\u2019", "'").casefold().split())
    found = _REFUSAL.search(beginning)
    return found.group().lstrip(".!?,: ") if found else ""
