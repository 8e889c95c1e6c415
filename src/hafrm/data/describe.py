"""What is in preference data, in numbers: sizes, lengths, length bias, and what sharing prompts saves."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from hafrm.data.reader import PreferenceData
from hafrm.data.splits import prompt_keys
from hafrm.preferences import Group, TokenizedGroup
from hafrm.results import Table, columns
from hafrm.statistics import Estimate, accuracy_interval

Encode = Callable[[Sequence[Group]], tuple[Sequence[TokenizedGroup], Any]]  # `Encoder.encode`
Lengths = tuple[float, int, int, int]
"""Mean, median, 95th percentile (nearest rank) and maximum; all 0 when there is nothing."""


@dataclass(frozen=True, slots=True)
class Description:
    """Everything that `hafrm data` prints."""

    facts: dict[str, int | str | Estimate]
    """Rows, groups, distinct prompts (ignoring case and white space), responses, comparisons, ..."""
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
    """Counts and lengths of what was read; `encode` (an `Encoder.encode`) adds lengths in tokens."""
    lengths = {f"{name} words": array("q") for name in ("prompt", "response", "chosen", "rejected")}
    lengths = {"user turns": array("q"), **lengths}
    flags, sources = Counter[str](), Counter[str]()
    tags: dict[str, Counter[str]] = {}
    for group in data.groups:  # once: a large set is read from disk
        words = [len(text.split()) for text in group.responses]
        lengths["user turns"].append(sum(m.role == "user" for m in group.prompt))
        lengths["prompt words"].append(sum(len(m.content.split()) for m in group.prompt))
        lengths["response words"].extend(words)
        for pair in group.comparisons:
            sources[group.source] += 1
            is_set = {"tie": pair.tie, "margin": pair.margin != 0, "votes": pair.votes is not None}
            flags.update(name for name, is_true in is_set.items() if is_true)
            if not pair.tie:
                lengths["chosen words"].append(words[pair.chosen])
                lengths["rejected words"].append(words[pair.rejected])
        for tag, value in group.tags.items():
            tags.setdefault(tag, Counter()).update([value] * len(group.comparisons))
    num_comparisons = sources.total()
    differences = np.subtract(lengths["chosen words"], lengths["rejected words"])
    facts: dict[str, int | str | Estimate] = {
        "rows": data.num_rows,
        "bad rows": len(data.bad_rows),
        "groups": len(data.groups),
        "prompts": len(np.unique(prompt_keys(data.groups))),
        "responses": len(lengths["response words"]),
        "comparisons": num_comparisons,
        "ties": flags["tie"],
        "with margin": flags["margin"],
        "with votes": flags["votes"],
        "longer is chosen": accuracy_interval(differences[differences != 0] > 0),
    }
    facts |= {f"left out: {reason}": num for reason, num in data.left_out.items()}
    facts |= {f"from {name}": f"{num} comparisons" for name, num in sources.items()}
    for tag, values in sorted(tags.items()):
        if rest := num_comparisons - values.total():
            values["(none)"] += rest
        facts[f"by {tag}"] = ", ".join(f"{value}: {num}" for value, num in [*values.items()][:8])
    if data.unread_columns:
        facts["columns not read"] = ", ".join(data.unread_columns[:12])
    if encode is not None:
        encoded, report = encode(data.groups)
        of_tokens, saved = count_tokens(encoded)
        lengths |= of_tokens
        facts["shared prompts save"] = f"{100 * saved:.1f} % of all tokens"
        counts = report.counts().items()
        facts |= {f"encoding: {name.replace('_', ' ')}": num for name, num in counts if num}
        if report.refused:
            facts["first refused"] = next(iter(report.refused.values()))
    bad_rows = dict(Counter(row.reason for row in data.bad_rows).most_common())
    return Description(facts, bad_rows, {name: _spread(sizes) for name, sizes in lengths.items()})


def count_tokens(groups: Iterable[TokenizedGroup]) -> "tuple[dict[str, array[int]], float]":
    """Lengths in tokens, and the fraction of tokens that sharing prompts saves.

    It is 1 - sum over groups of (P + sum of R) / sum over comparisons of (2 P + C + R), over groups with
    comparisons. Every response counts in the first sum, whether it is compared or not.
    """
    prompts, responses, sequences = array("q"), array("q"), array("q")
    packed = paired = 0
    for group in groups:
        sizes = [len(ids) for ids in group.response_ids]
        prompts.append(len(group.prompt_ids))
        responses.extend(sizes)
        sequences.extend(prompts[-1] + size for size in sizes)
        packed += group.num_tokens if group.comparisons else 0
        for pair in group.comparisons:
            paired += 2 * prompts[-1] + sizes[pair.chosen] + sizes[pair.rejected]
    names = ("prompt tokens", "response tokens", "sequence tokens")
    lengths = dict(zip(names, (prompts, responses, sequences), strict=True))
    return lengths, 1 - packed / paired if paired else 0.0


def _spread(values: "array[int]") -> Lengths:
    ordered = np.sort(np.array(values))
    if not len(ordered):
        return 0.0, 0, 0, 0
    p50, p95 = (int(ordered[ceil(fraction * len(ordered)) - 1]) for fraction in (0.50, 0.95))
    return int(ordered.sum()) / len(ordered), p50, p95, int(ordered[-1])
