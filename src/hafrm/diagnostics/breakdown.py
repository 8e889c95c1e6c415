"""Where a scorer is right, by style features of texts and slices of data; which labels may be wrong.

Features are correlated (a list makes a text longer), so none of these figures shows a cause. For labels,
several seeds or methods vote (arXiv 2401.06080): if they disagree, a comparison is hard; if all contradict
the label, it may be wrong. Annotators' votes, if known, test both.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Num
from numpy.typing import NDArray

from hafrm.evaluation.comparisons import Comparisons, Margins, PromptKeys
from hafrm.preferences import Message, Votes
from hafrm.statistics import Estimate, accuracy_interval, paired_bootstrap

MAX_EXAMPLE_CHARS = 400  # of each text of an example; longer texts are cut and marked
MAX_VALUES = 24
"""Labels of a division; rarer ones are merged. RewardBench's 23 subsets stay separate."""
_OWN_BAND = 5  # up to this many distinct numbers, each has its own band
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
ModelMargins = Float[np.ndarray, "models comparisons"]
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
    """One feature, on the comparisons in which one response has more of it."""

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
    """The bias of one feature, which the chosen response has `more` of than the rejected one."""
    differ = more != 0
    margins, more, prompts = margins[differ], more[differ], prompts[differ]
    # the scorer prefers the side with more if both signs agree, and neither side if scores are equal;
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
    """What divides the comparisons: the tags of their data, and countable properties."""
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
    """Accuracy for each label of each division that has several labels.

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
        # a division with one label says no more than the overall accuracy
        for value in values if len(values) > 1 else ():
            rows = labels == value
            result.append(Slice(tag, value, accuracy_interval(margins[rows] > 0, prompts[rows])))
    return tuple(result)


def bands(values: Num[np.ndarray, " comparisons"], unit: str = "") -> list[str]:
    """A label for each number: itself if there are few distinct numbers, else the range of its quarter."""
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
    """The labels; if there are more than MAX_VALUES, the rare ones get a common name."""
    counts = Counter(labels)
    if len(counts) <= MAX_VALUES:
        return list(labels)
    common = {label for label, _ in counts.most_common(MAX_VALUES - 1)}
    other = f"({len(counts) - len(common)} others)"
    return [label if label in common else other for label in labels]


@dataclass(frozen=True, slots=True)
class NoiseBand:
    """The comparisons of one level of disagreement."""

    disagreement: float
    num: int
    accuracy: Estimate  # of the models' mean margin
    split: Estimate  # fraction of the comparisons with votes on which annotators were split


@dataclass(frozen=True)
class LabelNoise:
    """What models and votes say about the labels."""

    models: tuple[str, ...]
    num_with_votes: int
    by_disagreement: tuple[NoiseBand, ...]  # one for each level that occurs; empty for one model
    against: Estimate  # fraction of comparisons on which every model prefers the rejected response
    split_against: Estimate  # of these, if votes are known: how often annotators were split
    split_others: Estimate  # the same for the other comparisons


@dataclass(frozen=True, slots=True)
class WorstExample:
    """One comparison to read; long texts are cut, prompts at their start."""

    set: str
    prompt: str
    chosen: str
    rejected: str
    margin: float  # the model's own, below zero
    votes: Votes | None
    num_against: int
    """Models that prefer the rejected response; if all of them do, the label may be wrong."""


def audit_labels(
    comparisons: Comparisons, margins: ModelMargins, models: Sequence[str]
) -> LabelNoise | None:
    """The audit by all models; None for a single model on data without votes."""
    votes, prompts = [pair.votes for pair in comparisons.pairs], comparisons.prompts
    voted = np.array([v is not None for v in votes])
    if len(models) == 1 and not voted.any():
        return None
    # split: more than one outcome has votes; a tie is an outcome
    split = np.array([v is not None and sum(num > 0 for num in v) > 1 for v in votes])
    mean, levels = mean_margin(margins), disagreement(margins)

    def fraction_split(rows: NDArray[np.bool_]) -> Estimate:
        rows = rows & voted
        if not rows.any():  # Wilson's [0, 1] would look like a finding
            return Estimate(math.nan, math.nan, math.nan, 0, "wilson")
        return accuracy_interval(split[rows], prompts[rows])

    bands = []
    for level in np.unique(levels).tolist() if len(margins) > 1 else ():
        rows = levels == level
        correct = accuracy_interval(mean[rows] > 0, prompts[rows])
        bands.append(NoiseBand(level, int(rows.sum()), correct, fraction_split(rows)))
    against = np.all(margins < 0, axis=0)
    return LabelNoise(
        models=tuple(models),
        num_with_votes=int(voted.sum()),
        by_disagreement=tuple(bands),
        against=accuracy_interval(against, prompts),
        split_against=fraction_split(against),
        split_others=fraction_split(~against),
    )


def disagreement(margins: ModelMargins) -> Margins:
    """Fraction of the models in the minority, 0 to 0.5; a margin of zero is half a vote for each side."""
    first = np.mean((np.sign(margins) + 1) / 2, axis=0)  # fraction for the chosen response
    # rounded, so that 1/3 of three models is one level whatever the order of the sum
    return np.asarray(np.minimum(first, 1 - first).round(12), np.float64)


def mean_margin(margins: ModelMargins) -> Margins:
    """Mean over models of the margins in units of each model's root mean square."""
    size = np.sqrt(np.mean(margins.astype(np.float64) ** 2, axis=1, keepdims=True))
    # a model whose margins are all zero stays at zero
    return np.asarray((margins / np.where(size > 0, size, 1.0)).mean(axis=0), np.float64)


def worst_errors(
    comparisons: Comparisons, margins: ModelMargins, *, num: int = 10
) -> tuple[WorstExample, ...]:
    """The first model's `num` worst errors: first those that most models make, then by mean margin.

    No two examples share prompt and rejected response: one bad response would otherwise fill the list.
    """
    wrong, num_against = np.flatnonzero(margins[0] < 0), (margins < 0).sum(axis=0)
    order = wrong[np.lexsort((mean_margin(margins)[wrong], -num_against[wrong]))].tolist()
    prompts, rejected = comparisons.prompts, comparisons.rejected_texts
    first: dict[tuple[str, str], int] = {}
    for index in order:
        first.setdefault((str(prompts[index]), rejected[index]), index)
    examples = []
    for index in [*first.values()][:num]:
        group, pair = comparisons.groups[comparisons.owner[index]], comparisons.pairs[index]
        answers = [cut_text(group.responses[i]) for i in (pair.chosen, pair.rejected)]
        texts, margin = (
            (prompt_text(group.prompt), answers[0], answers[1]),
            float(margins[0, index]),
        )
        against = int(num_against[index])
        examples.append(WorstExample(group.source, *texts, margin, pair.votes, against))
    return tuple(examples)


def cut_text(text: str, *, end: bool = False) -> str:
    """The text's first (or last) characters, with the number of characters left out."""
    text, most = text.strip(), MAX_EXAMPLE_CHARS
    note = f"[{len(text) - most} more characters]"
    cut = f"{note} {text[-most:]}" if end else f"{text[:most]} {note}"
    return text if len(text) <= most else cut


def prompt_text(prompt: Sequence[Message]) -> str:
    """The end of a single message, or of a conversation with roles."""
    is_single = len(prompt) == 1 and prompt[0].role == "user"
    lines = [m.content if is_single else f"{m.role}: {m.content}" for m in prompt]
    return cut_text("\n".join(lines), end=True)
