"""Where a scorer is right: by style features of the texts, and by slices of the data.

Features go together (a list makes a text longer), so none of these figures is a cause.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Num

from hafrm.evaluation.comparisons import Comparisons, Margins, PromptKeys
from hafrm.statistics import Estimate, accuracy_interval, paired_bootstrap

MAX_VALUES = 24
"""Labels of a division; rarer ones are put together. RewardBench's 23 subsets stay apart."""
_OWN_BAND = 5  # up to so many distinct numbers, each is a band of its own
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_HEADER = re.compile(r"^ {0,3}#{1,6}[ \t]+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*(?=\S)[^*\n]+\*\*")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_DIGIT = re.compile(r"[0-9]")
REFUSALS = re.compile(
    r"i can't|i cannot|i can not|i won't|i will not|(?:i'm|i am) sorry, but|(?:i'm|i am) not able to"
    r"|(?:i'm|i am) unable to|i'm not comfortable|i must decline|as an ai"
)
"""Phrases of English refusals; compared in lower case with straight apostrophes."""


FEATURES: Mapping[str, Callable[[str], int]] = {
    "length": len,
    "list items": lambda text: len(_LIST_ITEM.findall(text)),
    "headers": lambda text: len(_HEADER.findall(text)),
    "bold spans": lambda text: len(_BOLD.findall(text)),
    # fences come in pairs; a block that is never closed counts
    "code blocks": lambda text: -(-len(_FENCE.findall(text)) // 2),
    "digits": lambda text: len(_DIGIT.findall(text)),
    "questions": lambda text: text.count("?"),
    "exclamations": lambda text: text.count("!"),
    "refusals": lambda text: len(REFUSALS.findall(text.lower().replace("’", "'"))),
}
"""What is counted in a response."""


@dataclass(frozen=True, slots=True)
class StyleBias:
    """One feature, on the comparisons of which one response has more of it."""

    feature: str
    num: int
    picks_more: Estimate  # fraction in which the scorer prefers the response with more of it
    annotators_pick_more: Estimate
    excess: Estimate  # the scorer's fraction minus the annotators'
    accuracy_more: Estimate  # accuracy if the chosen response has more of it
    accuracy_less: Estimate


@dataclass(frozen=True, slots=True)
class Slice:
    """The comparisons with one label."""

    tag: str
    value: str
    accuracy: Estimate


def style_biases(
    margins: Margins, chosen: Sequence[str], rejected: Sequence[str], prompts: PromptKeys
) -> tuple[StyleBias, ...]:
    """The bias of every feature, from the texts of both sides."""
    texts = dict.fromkeys([*chosen, *rejected])  # each text is counted once
    result = []
    for feature, count in FEATURES.items():
        counts = {text: count(text) for text in texts}
        more = np.array([counts[c] - counts[r] for c, r in zip(chosen, rejected, strict=True)], int)
        result.append(style_bias(feature, margins, more, prompts))
    return tuple(result)


def style_bias(
    feature: str, margins: Margins, more: Int[np.ndarray, " comparisons"], prompts: PromptKeys
) -> StyleBias:
    """The bias of one feature, of which the chosen response has `more` than the rejected one."""
    differ = more != 0
    margins, more, prompts = margins[differ], more[differ], prompts[differ]
    # the scorer prefers the side with more if both signs agree, and neither if scores are equal;
    # annotators prefer the chosen one
    picks, annotators, right = margins * more > 0, more > 0, margins > 0
    return StyleBias(
        feature=feature,
        num=len(margins),
        picks_more=accuracy_interval(picks, prompts),
        annotators_pick_more=accuracy_interval(annotators, prompts),
        excess=paired_bootstrap(picks, annotators, prompts),
        accuracy_more=accuracy_interval(right[annotators], prompts[annotators]),
        accuracy_less=accuracy_interval(right[~annotators], prompts[~annotators]),
    )


def divisions_of(comparisons: Comparisons) -> dict[str, list[str]]:
    """What divides the comparisons: the tags of their data, and what can be counted."""
    pairs = comparisons.with_groups()
    tags = sorted({tag for group, _ in pairs for tag in group.tags})
    result = {tag: [group.tags.get(tag, "(none)") for group, _ in pairs] for tag in tags}
    words = [sum(len(message.content.split()) for message in g.prompt) for g, _ in pairs]
    turns = [sum(message.role == "user" for message in g.prompt) for g, _ in pairs]
    result["prompt length"] = bands(np.array(words), " words")
    result["user turns"] = bands(np.array(turns))
    result["annotated margin"] = bands(np.array([pair.margin for _, pair in pairs]))
    result["votes"] = [
        "no votes" if v is None or sum(v) == 0 else f"{100 * v.chosen / sum(v):.0f} % of votes"
        for v in (pair.votes for _, pair in pairs)
    ]
    return result


def slice_accuracies(
    margins: Margins, divisions: Mapping[str, Sequence[str]], prompts: PromptKeys
) -> tuple[Slice, ...]:
    """Accuracy of each label of each division that has several.

    Labels that start with a number come first, by that number; then the others by name.
    """

    def order(label: str) -> tuple[bool, float, str]:
        number = _NUMBER.match(label)
        return number is None, float(number[0]) if number else 0.0, label

    result = []
    for tag, all_labels in divisions.items():
        # dtype object: numpy would pad every label to the longest one
        labels = np.array(_without_rare(all_labels), dtype=object)
        values = sorted(set(labels.tolist()), key=order)
        # a division with one label says no more than the accuracy of all
        for value in values if len(values) > 1 else ():
            rows = labels == value
            result.append(Slice(tag, value, accuracy_interval(margins[rows] > 0, prompts[rows])))
    return tuple(result)


def bands(values: Num[np.ndarray, " comparisons"], unit: str = "") -> list[str]:
    """A label for each number: itself if there are few distinct ones, else the range of its quarter."""
    if len(np.unique(values)) <= _OWN_BAND:
        return [f"{value:g}{unit}" for value in values.tolist()]
    # cut into quarters at numbers that occur, so that equal numbers stay together
    uppers = np.quantile(values, np.arange(1, 5) / 4, method="inverted_cdf")
    which, names = np.searchsorted(np.unique(uppers), values), []
    for k in range(which.max() + 1):
        low, high = values[which == k].min(), values[which == k].max()
        names.append((f"{low:g}" if low == high else f"{low:g} to {high:g}") + unit)
    return [names[k] for k in which]


def _without_rare(labels: Sequence[str]) -> list[str]:
    """The labels; if there are more than MAX_VALUES, the rare ones under one name."""
    counts = Counter(labels)
    if len(counts) <= MAX_VALUES:
        return list(labels)
    common = {label for label, _ in counts.most_common(MAX_VALUES - 1)}
    other = f"({len(counts) - len(common)} others)"
    return [label if label in common else other for label in labels]
