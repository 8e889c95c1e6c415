"""What is in preference data, in numbers: sizes, lengths, length bias, and what sharing prompts saves."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from hafrm.data.reader import PreferenceData
from hafrm.data.splits import normalised_key
from hafrm.preferences import Group, TokenizedGroup
from hafrm.results import Table, columns
from hafrm.statistics import Estimate, accuracy_interval

Encode = Callable[[Sequence[Group]], tuple[Sequence[TokenizedGroup], Any]]  # `Encoder.encode`
Lengths = tuple[float, int, int, int]
"""Mean, median, 95th percentile (nearest rank) and maximum; all 0 when there is nothing."""


@dataclass(frozen=True, slots=True)
class Description:
    """Everything that `hafrm data` shows."""

    facts: dict[str, int | str | Estimate]
    """Rows, groups, prompts (distinct but for case and white space), responses, comparisons, ..."""
    bad_rows: dict[str, int]  # by reason
    lengths: dict[str, Lengths]
    """Of each group's prompt, each distinct response, and the sides of each comparison without ties."""

    def tables(self) -> tuple[Table, ...]:
        """What is in the data, what is wrong with it, and its lengths."""
        bad = Table("bad rows", columns("reason | rows: count"), tuple(self.bad_rows.items()))
        head = columns("of | mean: general | p50: count | p95: count | max: count")
        lengths = tuple((name, *numbers) for name, numbers in self.lengths.items())
        facts = Table("what is in it", columns("what | value"), tuple(self.facts.items()))
        return (facts, *([bad] if self.bad_rows else []), Table("lengths", head, lengths))


def describe_data(data: PreferenceData, encode: Encode | None = None) -> Description:
    """Counts and lengths of what was read; `encode` (an `Encoder.encode`) adds those of tokens."""
    groups = data.groups
    pairs = [(group, pair) for group in groups for pair in group.comparisons]
    decided = [(group.responses, pair) for group, pair in pairs if not pair.tie]
    sides = [(_words(texts[c.chosen]), _words(texts[c.rejected])) for texts, c in decided]
    lengths = {
        "user turns": _lengths(sum(m.role == "user" for m in group.prompt) for group in groups),
        "prompt words": _lengths(sum(_words(m.content) for m in g.prompt) for g in groups),
        "response words": _lengths(_words(text) for group in groups for text in group.responses),
        "chosen words": _lengths(chosen for chosen, _ in sides),
        "rejected words": _lengths(rejected for _, rejected in sides),
    }
    facts: dict[str, int | str | Estimate] = {
        "rows": data.num_rows,
        "bad rows": len(data.bad_rows),
        "groups": len(groups),
        "prompts": len({normalised_key(group.prompt) for group in groups}),
        "responses": sum(len(group.responses) for group in groups),
        "comparisons": len(pairs),
        "ties": sum(pair.tie for _, pair in pairs),
        "with margin": sum(pair.margin != 0 for _, pair in pairs),
        "with votes": sum(pair.votes is not None for _, pair in pairs),
        "longer is chosen": accuracy_interval(np.array([c > r for c, r in sides], bool)),
    }
    facts |= {f"left out: {reason}": num for reason, num in data.left_out.items()}
    sources = Counter(group.source for group, _ in pairs)
    facts |= {f"from {name}": f"{num} comparisons" for name, num in sources.items()}
    for tag in sorted({tag for group in groups for tag in group.tags}):
        values = Counter(group.tags.get(tag, "(none)") for group, _ in pairs)
        facts[f"by {tag}"] = ", ".join(f"{value}: {num}" for value, num in [*values.items()][:8])
    if data.unread_columns:
        facts["columns not read"] = ", ".join(data.unread_columns[:12])
    if encode is not None:
        encoded, report = encode(groups)
        sizes = [(len(g.prompt_ids), len(ids)) for g in encoded for ids in g.response_ids]
        lengths |= {
            "prompt tokens": _lengths(len(group.prompt_ids) for group in encoded),
            "response tokens": _lengths(response for _, response in sizes),
            "sequence tokens": _lengths(map(sum, sizes)),
        }
        saved = fraction_saved_by_sharing(encoded)
        facts["shared prompts save"] = f"{100 * saved:.1f} % of all tokens"
        counts = report.counts().items()
        facts |= {f"encoding: {name.replace('_', ' ')}": num for name, num in counts if num}
        if report.refused:
            facts["first refused"] = next(iter(report.refused.values()))
    bad_rows = dict(Counter(row.reason for row in data.bad_rows).most_common())
    return Description(facts, bad_rows, lengths)


def fraction_saved_by_sharing(groups: Iterable[TokenizedGroup]) -> float:
    """1 - sum over groups of (P + sum of R) / sum over comparisons of (2 P + C + R), in tokens.

    Of groups with comparisons; every response counts in the first sum, compared or not.
    """
    packed = paired = 0
    for group in groups:
        packed += group.num_tokens if group.comparisons else 0
        for pair in group.comparisons:
            sides = group.response_ids[pair.chosen], group.response_ids[pair.rejected]
            paired += sum(len(group.prompt_ids) + len(ids) for ids in sides)
    return 1 - packed / paired if paired else 0.0


def _words(text: str) -> int:
    return len(text.split())


def _lengths(values: Iterable[int]) -> Lengths:
    ordered = sorted(values)
    if not ordered:
        return 0.0, 0, 0, 0
    p50, p95 = (ordered[ceil(fraction * len(ordered)) - 1] for fraction in (0.50, 0.95))
    return sum(ordered) / len(ordered), p50, p95, ordered[-1]
