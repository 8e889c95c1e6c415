"""Which labels may be wrong, and which comparisons to read.

Several seeds or methods vote (arXiv 2401.06080): where they disagree a comparison is hard, where all
contradict the label it may be wrong. Annotators' votes, if known, test both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from hafrm.evaluation.comparisons import Comparisons, Margins
from hafrm.preferences import Message, Votes
from hafrm.statistics import Estimate, accuracy_interval

MAX_EXAMPLE_CHARS = 400  # of each text of an example; a longer one is cut, and says so

ModelMargins = Float[np.ndarray, "models comparisons"]


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
    split_others: Estimate  # the same of the other comparisons


@dataclass(frozen=True, slots=True)
class WorstExample:
    """One comparison to read; long texts are cut, the prompt at its start."""

    set: str
    prompt: str
    chosen: str
    rejected: str
    margin: float  # the model's own, below zero
    votes: Votes | None
    num_against: int
    """Models that prefer the rejected response: of all models, they point at a wrong label."""


def audit_labels(
    comparisons: Comparisons, margins: ModelMargins, models: Sequence[str]
) -> LabelNoise | None:
    """The audit by all models; None for a single model on data without votes."""
    votes, prompts = [pair.votes for pair in comparisons.pairs], comparisons.prompts
    voted = np.array([v is not None for v in votes])
    if len(models) == 1 and not voted.any():
        return None
    # more than one outcome has votes; a tie is an outcome
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
    # rounded, so that 1/3 of three models is one level whatever the sum's order
    return np.asarray(np.minimum(first, 1 - first).round(12), np.float64)


def mean_margin(margins: ModelMargins) -> Margins:
    """Mean over models of the margins in units of each model's root mean square."""
    size = np.sqrt(np.mean(margins.astype(np.float64) ** 2, axis=1, keepdims=True))
    # a model whose margins are all zero stays at zero
    return np.asarray((margins / np.where(size > 0, size, 1.0)).mean(axis=0), np.float64)


def worst_errors(
    comparisons: Comparisons, margins: ModelMargins, *, num: int = 10
) -> tuple[WorstExample, ...]:
    """The first model's `num` worst errors: those that most models make first, by their mean margin.

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
    """The text's first (or last) characters, with the number of those that are left out."""
    text, most = text.strip(), MAX_EXAMPLE_CHARS
    note = f"[{len(text) - most} more characters]"
    cut = f"{note} {text[-most:]}" if end else f"{text[:most]} {note}"
    return text if len(text) <= most else cut


def prompt_text(prompt: Sequence[Message]) -> str:
    """The end of a single message, or of a conversation with its roles."""
    is_single = len(prompt) == 1 and prompt[0].role == "user"
    lines = [m.content if is_single else f"{m.role}: {m.content}" for m in prompt]
    return cut_text("\n".join(lines), end=True)
