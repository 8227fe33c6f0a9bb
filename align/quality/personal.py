"""Personal data and secrets: found by their form and, where they have one, their check sum, and masked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from align.catalog import Catalog

VERSION = re.compile(r"(?:\b(?:version|release|firmware|build):? ?|\bv\.? ?)$", re.IGNORECASE)
"""Before four numbers that are those of a version."""

Finder = Callable[[re.Match[str]], bool]
patterns: Catalog[Any] = Catalog("kind of personal data")
"""What can be masked: functions that say whether a match is one; their attribute `pattern` finds candidates."""


def personal(pattern: str) -> Callable[[Finder], Finder]:
    """Register a kind of personal data: what looks like it, and the decorated check of each match."""

    def register(check: Finder) -> Finder:
        check.pattern = re.compile(pattern)  # type: ignore[attr-defined]
        return patterns.add(check)

    return register


@personal(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
def email(match: re.Match[str]) -> bool:
    """An address with a domain."""
    return True


@personal(
    r"(?<![\w.])(?:"
    r"(?:\+?1[ .-]?)?\([2-9]\d{2}\)[ .-]?[2-9]\d{2}[ .-]?\d{4}"  # (415) 555-2671, +1 (415) 555-2671
    r"|\+(?:1[2-9]\d{2}[2-9]\d{6}|[2-9]\d{9,14})"  # +14155552671
    r"|\+[2-9]\d{0,2}[ -]\d{1,4}[ -]\d{5,8}"  # +49 170 1234567
    r"|(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]\d{2,4}){2,4}"
    r")(?![\w-]|\.\w)"
)
def phone(match: re.Match[str]) -> bool:
    """9 to 15 digits that are no date: behind an area in brackets or a country code, or in three groups or more.
    Ten digits in one piece are not told from other numbers.
    """
    digits = re.sub(r"\D", "", match[0])
    return 9 <= len(digits) <= 15 and not re.fullmatch(r"\d{4}[.-]\d{2}[.-]\d{2}.*", match[0])


@personal(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?!\d|\.\d)")
def ip(match: re.Match[str]) -> bool:
    """A public address of IPv4: private, local and reserved ones name nobody, and what stands behind "version" is none."""
    from ipaddress import ip_address

    if VERSION.search(match.string[max(0, match.start() - 12) : match.start()]):
        return False
    try:
        return ip_address(match[0]).is_global
    except ValueError:
        return False


@personal(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])")
def credit_card(match: re.Match[str]) -> bool:
    """13 to 19 digits whose Luhn sum is right."""
    digits = [int(digit) for digit in match[0] if digit.isdigit()][::-1]
    return sum(digit if i % 2 == 0 else sum(divmod(2 * digit, 10)) for i, digit in enumerate(digits)) % 10 == 0


@personal(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
def iban(match: re.Match[str]) -> bool:
    """A bank account number whose check digits are right (ISO 7064, mod 97)."""
    plain = match[0].replace(" ", "")
    return int("".join(str(int(letter, 36)) for letter in plain[4:] + plain[:4])) % 97 == 1


@personal(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])")
def ssn(match: re.Match[str]) -> bool:
    """A number of the United States' social security that can have been given out."""
    area, group, serial = match[0].split("-")
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


@personal(
    r"(?<![A-Za-z0-9])(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|hf_[A-Za-z0-9]{30,}|xox[abprs]-[\w-]{10,}"
    r"|sk-(?=[A-Za-z_-]{0,60}\d)[A-Za-z0-9_-]{20,}"  # without a digit it is words: sk-fading-circle-container
    r"|AIza[\w-]{35}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.|\n)*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
def secret(match: re.Match[str]) -> bool:
    """Keys of well-known services, JSON web tokens, private keys."""
    return True


def mask(text: str, kinds: list[str]) -> tuple[str, Counter[str]]:
    """`text` with every finding of `kinds` replaced by its name in brackets, ``[EMAIL]``, and how many there were of each."""
    counts: Counter[str] = Counter()
    for kind in kinds:
        check: Any = patterns[kind]

        def replace(match: re.Match[str], kind: str = kind, check: Any = check) -> str:
            if not check(match):
                return match[0]
            counts[kind] += 1
            return f"[{kind.upper()}]"

        text = check.pattern.sub(replace, text)
    return text, counts


def mask_values(value: Any, kinds: list[str]) -> tuple[Any, Counter[str]]:
    """`mask` on every string inside `value`, but roles."""
    if isinstance(value, str):
        return mask(value, kinds)
    if isinstance(value, dict):
        found = {name: (each, Counter()) if name == "role" else mask_values(each, kinds) for name, each in value.items()}
        return {name: each for name, (each, _) in found.items()}, sum((count for _, count in found.values()), Counter())
    if isinstance(value, list):
        items = [mask_values(each, kinds) for each in value]
        return [each for each, _ in items], sum((count for _, count in items), Counter())
    return value, Counter()
