"""What style explains: does the scorer like long answers, lists or refusals more than people do?

For each countable feature of a text, only comparisons in which one response has more of it than the other
say anything. The features go together (a list makes a text longer), so none of these figures is a cause.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from hafrm.evaluation.metrics import Result
from hafrm.statistics import Estimate, accuracy_interval, paired_bootstrap

_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_HEADER = re.compile(r"^ {0,3}#{1,6}[ \t]+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*(?=\S)[^*\n]+\*\*")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_DIGIT = re.compile(r"[0-9]")
REFUSALS = (
    "i can't",
    "i cannot",
    "i can not",
    "i won't",
    "i will not",
    "i'm sorry, but",
    "i am sorry, but",
    "i'm not able to",
    "i am not able to",
    "i'm unable to",
    "i am unable to",
    "i'm not comfortable",
    "i must decline",
    "as an ai",
)
"""Phrases that English refusals are made of; compared in lower case with straight apostrophes."""


def num_refusals(text: str) -> int:
    """How often one of `REFUSALS` stands in the text."""
    plain = text.lower().replace("’", "'")
    return sum(plain.count(phrase) for phrase in REFUSALS)


def num_code_blocks(text: str) -> int:
    """Fenced blocks; one that is never closed counts."""
    return -(-len(_FENCE.findall(text)) // 2)


FEATURES: Mapping[str, Callable[[str], int]] = {
    "length": len,
    "list items": lambda text: len(_LIST_ITEM.findall(text)),
    "headers": lambda text: len(_HEADER.findall(text)),
    "bold spans": lambda text: len(_BOLD.findall(text)),
    "code blocks": num_code_blocks,
    "digits": lambda text: len(_DIGIT.findall(text)),
    "questions": lambda text: text.count("?"),
    "exclamations": lambda text: text.count("!"),
    "refusals": num_refusals,
}
"""What is counted in a response; length is in characters."""


@dataclass(frozen=True, slots=True)
class StyleBias(Result):
    """One feature, on the comparisons of which one response has more of it."""

    feature: str
    num: int
    """Those comparisons."""
    picks_more: Estimate
    """Share in which the scorer prefers the response with more of it."""
    people_pick_more: Estimate
    """Share in which people did."""
    excess: Estimate
    """The scorer's share minus people's, on the same comparisons."""
    accuracy_more: Estimate
    """Accuracy where the chosen response has more of it."""
    accuracy_less: Estimate
    """Accuracy where it has less."""


def style_biases(
    margins: Float[np.ndarray, " comparisons"],
    chosen: Sequence[str],
    rejected: Sequence[str],
    prompts: Shaped[np.ndarray, " comparisons"],
) -> tuple[StyleBias, ...]:
    """The bias of every feature, from the texts of both sides."""
    known: dict[str, str] = dict.fromkeys([*chosen, *rejected], "")
    found = []
    for feature, count in FEATURES.items():
        counts = {text: count(text) for text in known}
        more = np.array([counts[c] - counts[r] for c, r in zip(chosen, rejected, strict=True)], int)
        found.append(style_bias(feature, margins, more, prompts))
    return tuple(found)


def style_bias(
    feature: str,
    margins: Float[np.ndarray, " comparisons"],
    more: Int[np.ndarray, " comparisons"],
    prompts: Shaped[np.ndarray, " comparisons"],
) -> StyleBias:
    """The bias of one feature, of which the chosen response has `more` than the rejected one.

    A scorer that scores both alike prefers neither, and so not the one with more.
    """
    differ = more != 0
    margins, more, prompts = margins[differ], more[differ], prompts[differ]
    picks, people = margins * more > 0, more > 0

    def accuracy(rows: Shaped[np.ndarray, " comparisons"]) -> Estimate:
        return accuracy_interval(margins[rows] > 0, prompts[rows])

    return StyleBias(
        feature=feature,
        num=len(margins),
        picks_more=accuracy_interval(picks, prompts),
        people_pick_more=accuracy_interval(people, prompts),
        excess=paired_bootstrap(picks, people, prompts),
        accuracy_more=accuracy(people),
        accuracy_less=accuracy(~people),
    )
