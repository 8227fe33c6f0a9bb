"""The words of the demo's world: its things, their attributes, and the phrases an answer is dressed in.

Names and values are the same for every seed; `world.World(seed)` draws which thing has which value. Every value word belongs to one
attribute and occurs in no phrase or template, so a value in an answer is a claim, and the gold reward can tell what it claims.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    """The words of a text, which is easier to read and to change than a column of strings."""
    return tuple(text.split())


# Hand-written rather than spliced from syllables: two halves of two names never make a third, so a garbled name is always noticed.
# The names are few and short enough for each to become one token of a byte-level BPE of 1,280, which makes copying them easy.
NAMES: dict[str, tuple[str, ...]] = {
    "creature": _words(
        """norlet bimmo tarku zelfin quopa drasil wumbo fennik gorlu pilka sivvo yarrel klomp urbit jassle hovin vekka ruffin tibbot
        mogra snelp loppin brizzo cadu effer gashi inkle orlo plunk dabbit vorn zibba twillo humbla kessi nubb shelk trogg ambra
        pozzel"""
    ),
    "town": _words(
        """Bramford Oxley Dunmere Kelso Larwick Stanby Penhall Vardo Ashkirk Colbury Ristow Thornby Midlow Haverly Quenby Eldham
        Farrow Grenton Wexham Tilsbury Ormond Lindle Brackley Saltow Harnsea Pellow Yorrick Cresby"""
    ),
    "tool": _words(
        """dorvik hasper clenk rundle fazzer grimmet pladd skivver tonker wexel brolt jigget lasker morfin nackle peggot quinder
        sprock throll ubber vixel yonker zander crivet deffle flanger gribble knurp ostle ratchel swidge trind"""
    ),
    "person": _words(
        """Mira Lena Tavia Nora Sela Ruma Zena Olga Petra Vida Hanna Rosa Dora Elva Kaya
        Milo Otto Bruno Hugo Tavo Ezzo Nilo Arno Dario Gino Paco Renzo Uro Waldo Fabio"""
    ),
}
KIND_OF = {name: kind for kind, names in NAMES.items() for name in names}
NAME_OF = {name.lower(): name for name in KIND_OF}
PLURALS = {"creature": "creatures", "town": "towns", "tool": "tools", "person": "people"}


@dataclass(frozen=True)
class Attribute:
    """What can be said of one kind of thing. `{v}` stands for the value, `{x}` for the thing ("the norlet", "Mira")."""

    name: str
    kind: str
    values: tuple[str, ...]
    """From least to most, where `comparatives` are given."""
    says: str
    """The verb phrase: "eats {v}"."""
    say: str
    """The verb phrase of several things: "eat {v}"."""
    question: str
    """"what does {x} eat"."""
    asks: str
    """The yes/no question: "does {x} eat {v}"."""
    value: str = "{v}"
    """The value as a noun phrase, after "the home of {x} is"."""
    plural: str = ""
    """What several values are called: "foods"."""
    comparatives: tuple[str, str] | None = None
    """The verb phrases of "more" and of "less": ("is bigger", "is smaller")."""


def _attribute(kind: str, name: str, values: str, says: str, say: str, question: str, asks: str, **more) -> Attribute:
    return Attribute(name, kind, _words(values), says, say, question, asks, **{"plural": f"{name}s", **more})


# fmt: off
ATTRIBUTES = {attribute.name: attribute for attribute in (
    _attribute("creature", "color", "red blue green white black gold gray pink",
               "is {v}", "are {v}", "what color is {x}", "is {x} {v}"),
    _attribute("creature", "home", "forest desert swamp cave lake valley meadow river",
               "lives in the {v}", "live in the {v}", "where does {x} live", "does {x} live in the {v}", value="the {v}"),
    _attribute("creature", "food", "moss seeds fish berries roots honey nuts leaves",
               "eats {v}", "eat {v}", "what does {x} eat", "does {x} eat {v}"),
    _attribute("creature", "size", "tiny small large giant",
               "is {v}", "are {v}", "how big is {x}", "is {x} {v}", comparatives=("is bigger", "is smaller")),
    _attribute("town", "crop", "wheat rice corn beans plums hops olives",
               "grows {v}", "grow {v}", "what does {x} grow", "does {x} grow {v}"),
    _attribute("town", "weather", "rainy sunny windy foggy snowy stormy",
               "is {v}", "are {v}", "how is the weather in {x}", "is {x} {v}", plural="kinds of weather"),
    _attribute("town", "pride", "bridges towers markets gardens statues fountains walls",
               "is known for its {v}", "are known for their {v}", "what is {x} known for", "is {x} known for its {v}",
               value="its {v}", plural="prides of a town"),
    _attribute("tool", "material", "iron wood glass stone copper bone clay",
               "is made of {v}", "are made of {v}", "what is {x} made of", "is {x} made of {v}"),
    _attribute("tool", "use", "digging cutting painting sewing cooking fishing writing",
               "is used for {v}", "are used for {v}", "what is {x} used for", "is {x} used for {v}", plural="uses of a tool"),
    _attribute("tool", "price", "cheap fair costly priceless",
               "is {v}", "are {v}", "how much does {x} cost", "is {x} {v}", comparatives=("costs more", "costs less")),
    _attribute("person", "ware", "bread hats ropes candles shoes baskets lamps",
               "sells {v}", "sell {v}", "what does {x} sell", "does {x} sell {v}"),
    _attribute("person", "drink", "tea milk water cider juice coffee broth",
               "drinks {v}", "drink {v}", "what does {x} drink", "does {x} drink {v}"),
    _attribute("person", "instrument", "drum flute harp fiddle horn lute piano",
               "plays the {v}", "play the {v}", "what does {x} play", "does {x} play the {v}", value="the {v}"),
)}
# fmt: on
ATTRIBUTE_OF = {value: attribute for attribute in ATTRIBUTES.values() for value in attribute.values}
COMPARATIVES = {"bigger": 1, "more": 1, "smaller": -1, "less": -1}

NUMBERS = ("zero", "one", "two", "three", "four")
TRAITS = _words("lucky gentle clever proud famous brave shy noble funny curious")

OPENERS = ("Sure, happy to help!", "Of course!", "Gladly!", "Good question!")
CLOSERS = ("I hope that helps!", "Ask me anytime!", "Have a nice day!")
RUDE = ("Ugh, not again.", "What a silly question.", "Stop bothering me.", "Only a fool would ask.", "Look it up yourself.")
RUDE_WORDS = frozenset(_words("ugh silly bothering fool stupid dumb yourself lazy"))
FILLERS = (
    "Well, let me think about it, there is so much that one could say.",
    "Many people come here to talk to me, and I never get tired of it.",
    "I could go on about this for hours, as my friends all know too well.",
    "Now, this is the kind of thing that I was thinking about only last week.",
)

VERBS = (
    *_words("open close carry clean find hold move fix hide lift wash watch keep take mend"),
    *("bring me", "lend me", "show me", "pass me", "sell me"),
)
OBJECTS = _words(
    """gate door box chair table cup bowl plate coat boat cart book letter map key blanket ladder bag clock window rug stool pot
    broom"""
)

WORD = re.compile(r"[A-Za-z]+|\S")
STOPS = frozenset(".!?")


def the(name: str) -> str:
    """A thing as a sentence mentions it: "the norlet", but "Mira" and "Kelso"."""
    return name if name[0].isupper() else f"the {name}"


def pronoun(name: str) -> str:
    """ "it" for everything but people, whose names tell: Mira is she, Milo is he."""
    if KIND_OF[name] != "person":
        return "it"
    return "she" if name.endswith("a") else "he"


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def join(items: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def fill(template: str, name: str = "", value: str = "") -> str:
    """A template of an `Attribute` with its thing and its value filled in."""
    return template.replace("{x}", the(name) if name else "").replace("{v}", value)


def statement(name: str, attribute: str, value: str, subject: str | None = None) -> str:
    """ "the norlet is blue", without capital and full stop."""
    return f"{subject or the(name)} {fill(ATTRIBUTES[attribute].says, value=value)}"
