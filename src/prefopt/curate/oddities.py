"""Text that is probably not what its author wrote: broken encodings, stray control characters, mixed alphabets.

Scripts are told by Unicode alone. No language is guessed: French and English are the same script.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

__all__ = ["ODDITIES", "oddities", "script"]

ODDITIES = {
    "mojibake": "UTF-8 read as Windows-1252, such as \u00e2\u20ac\u2122 for an apostrophe",
    "replacement_characters": "U+FFFD: something could not be decoded",
    "control_characters": "controls other than tab and line breaks, byte order marks, directional overrides",
    "mixed_script_words": "Latin and Cyrillic letters in one word",
}

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u202a-\u202e\u2066-\u2069]")
_LATIN, _CYRILLIC = "A-Za-z\u00c0-\u024f", "\u0400-\u052f"
_MIXED = re.compile(f"[{_LATIN}][{_CYRILLIC}]|[{_CYRILLIC}][{_LATIN}]")

# What the bytes 0x80 to 0xBF become in Windows-1252; the five it leaves free stay what they are.
_TAIL = "".join(bytes([n]).decode("cp1252", "ignore") or chr(n) for n in range(0x80, 0xC0))
_TAILS = f"[\x80-\x9f{re.escape(_TAIL)}]"  # Latin-1 leaves all controls what they are
# One sequence is enough where it begins with \u00c2, \u00c3 or as signs above U+2000 do, whose last byte some
# decoders drop; of others two in a row are asked for, since a capital before a closing quote is a sequence, too.
_MOJIBAKE = re.compile(
    f"[\u00c2\u00c3]{_TAILS}|\u00e2[\u20ac\x80]|\u00e2[\u201a\u201e]{_TAILS}|\u00f0[\u0178\x9f]{_TAILS}{{2}}"
    f"|(?:[\u00c4-\u00df]{_TAILS}){{2}}|(?:[\u00e0-\u00ef]{_TAILS}{{2}}){{2}}"
)


def oddities(text: str) -> list[str]:
    """Names of what is odd in a text, among `ODDITIES`."""
    found = []
    if not text.isascii():
        if _MOJIBAKE.search(text):
            found.append("mojibake")
        if "\ufffd" in text:
            found.append("replacement_characters")
        if _MIXED.search(text):
            found.append("mixed_script_words")
    if _CONTROL.search(text):
        found.append("control_characters")
    return found


def script(text: str) -> str:
    """The script of most letters, as Unicode names them ("latin", "cjk", "cyrillic"); "" where there is no letter."""
    if text.isascii():
        return "latin" if any(map(str.isalpha, text)) else ""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        counts[_script_of(character)] += count
    del counts[""]
    return counts.most_common(1)[0][0] if counts else ""


@lru_cache(maxsize=2**16)
def _script_of(character: str) -> str:
    if not character.isalpha():
        return ""
    plain = unicodedata.normalize("NFKC", character)[0]  # a letter in a circle, or of double width, is that letter
    name = unicodedata.name(plain, "").split("-")[0].split(" ")[0].lower()
    return "kana" if name in ("hiragana", "katakana") else name
