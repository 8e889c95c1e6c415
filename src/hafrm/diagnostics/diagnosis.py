"""What `hafrm diagnose` finds, and its tables. No model is run here."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hafrm.diagnostics.breakdown import Slice, StyleBias
from hafrm.diagnostics.label_noise import WRONG, LabelNoise, NoiseBand, WorstExample
from hafrm.diagnostics.margins import MarginHistogram, Temperature
from hafrm.diagnostics.own_policy import OwnPolicyPreference
from hafrm.diagnostics.representation import Representation
from hafrm.evaluation.metrics import Accuracy, Agreement, Calibration
from hafrm.table import Cell, Column, Table, columns

NUM_SHOWN_EXAMPLES = 3
"""Shown of each kind; the result has more."""
MIN_COMPARISONS = 10
"""Comparisons that a style feature needs to be shown; the result has all features."""


@dataclass(frozen=True, slots=True)
class SetDiagnosis:
    """One source, or all of them together."""

    name: str
    num: int
    """Comparisons that are no ties."""
    accuracy: Accuracy
    temperature: Temperature
    calibration: Calibration
    """As the model is, without a temperature."""
    margins: MarginHistogram
    style: tuple[StyleBias, ...]
    slices: tuple[Slice, ...]
    agreement: Agreement | None
    """Of reward and implicit reward, if the model has both heads."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that is diagnosed of one model."""

    model: str
    scored_with: str
    """"reward" or "implicit reward"."""
    sets: tuple[SetDiagnosis, ...]
    label_noise: LabelNoise | None
    """None for a single model on data without votes."""
    representations: tuple[Representation, ...]
    """Of the model, then of the others."""
    base: Representation | None
    num_states: int
    """Responses that the representations are of."""
    own_policy: OwnPolicyPreference | None
    worst: tuple[WorstExample, ...]

    def tables(self) -> tuple[Table, ...]:
        """Calibration, margins, style, slices, label noise, representations, policies, examples."""
        return tuple(self._tables())

    def _tables(self) -> Iterator[Table]:
        yield self._calibration()
        yield _margins(self.sets)
        yield from map(_style, self.sets)  # a table each: features are many
        yield _slices(self.sets)
        if any(result.agreement for result in self.sets):
            yield _agreement(self.sets)
        if self.label_noise is not None:
            yield from _label_noise(self.label_noise)
        yield self._representations()
        if self.own_policy is not None:
            yield from self.own_policy.tables()
        wrong = [example for example in self.worst if example.why.startswith(WRONG)]
        doubtful = [example for example in self.worst if not example.why.startswith(WRONG)]
        for title, examples in (("largest wrong margins", wrong), ("doubtful labels", doubtful)):
            if examples:
                yield _examples(title, examples[:NUM_SHOWN_EXAMPLES])

    def _calibration(self) -> Table:
        rows = []
        for result in self.sets:
            fitted = result.temperature
            rows.append(
                (
                    result.name,
                    result.num,
                    result.accuracy,
                    result.calibration.ece,
                    fitted.note or fitted.value,
                    *fitted.log_loss,
                    *fitted.ece,
                )
            )
        heads = columns(
            "set | comparisons: count | accuracy: percent | ECE: decimal | T: decimal | "
            "log-loss: decimal | with T: decimal | ECE: decimal | with T: decimal"
        )
        title = f"{self.model}, scored with the {self.scored_with}: accuracy [95 %] and calibration"
        note = "T is fitted on half of the prompts; the columns after it are of the other half"
        return Table(title, heads, tuple(rows), (note,))

    def _representations(self) -> Table:
        heads = columns(
            "model | effective rank: decimal | top direction: decimal | mean cosine: decimal | "
            "CKA to base: decimal | cosine to base: decimal"
        )
        bases = [] if self.base is None else [self.base]
        rows = tuple(
            (
                r.model + (" (base)" if r is self.base else ""),
                f"{r.effective_rank:.1f}",
                r.top_fraction,
                r.mean_cosine,
                *(None if math.isnan(x) else x for x in (r.cka_to_base, r.cosine_to_base)),
            )
            for r in (*self.representations, *bases)
        )
        return Table(f"last-token hidden states of {self.num_states} responses", heads, rows)


def _margins(sets: Sequence[SetDiagnosis]) -> Table:
    rows = []
    for result in sets:
        histogram = result.margins
        top = max((*histogram.right, *histogram.wrong))
        bars = (_bars(counts, top) for counts in (histogram.right, histogram.wrong))
        rows.append((result.name, f"{histogram.edges[-1]:.2f}", *bars))
    heads = columns("set | largest: decimal | right | wrong")
    return Table("comparisons by |margin|, from 0 on", heads, tuple(rows))


def _bars(counts: Sequence[int], top: int) -> str:
    """A histogram in one line; the highest bar is `top`, and only zero is blank."""
    blocks = " ▁▂▃▄▅▆▇█"  # ceil: a single comparison must be visible
    return "".join(blocks[math.ceil(8 * count / max(top, 1))] for count in counts)


def _style(result: SetDiagnosis) -> Table:
    rows = []
    for bias in result.style:
        if bias.num >= MIN_COMPARISONS:
            # the interval of the difference excludes zero
            mark = "*" if bias.excess.low > 0 or bias.excess.high < 0 else ""
            fractions = (bias.picks_more, bias.annotators_pick_more, bias.excess)
            accuracies = (bias.accuracy_more, bias.accuracy_less)
            rows.append((bias.feature + mark, bias.num, *fractions, *accuracies))
    heads = columns(
        "feature | differ: count | model: more: percent | annotators: more: percent | excess: percent | "
        "right if more: percent | if less: percent"
    )
    title = f"{result.name}: which response is preferred, by what there is more of [95 %]"
    note = "* the model differs from the annotators; features go together, above all with length"
    return Table(title, heads, tuple(rows), (note,))


def _slices(sets: Sequence[SetDiagnosis]) -> Table:
    rows = []
    for result in sets:
        before = ""
        for number, part in enumerate(result.slices):
            # a tag is written once, above its values
            tag = "" if part.tag == before else part.tag
            before = part.tag
            rows.append(
                ("" if number else result.name, tag, part.value, part.accuracy.num, part.accuracy)
            )
    heads = columns("set | slice | value | comparisons: count | accuracy: percent")
    return Table("accuracy by slice [95 %]", heads, tuple(rows))


def _agreement(sets: Sequence[SetDiagnosis]) -> Table:
    rows = tuple(
        (r.name, r.agreement.same_sign, r.agreement.pearson, r.agreement.spearman)
        for r in sets
        if r.agreement is not None
    )
    heads = columns("set | same sign [95 %]: percent | Pearson: decimal | Spearman: decimal")
    return Table("reward and implicit reward", heads, rows)


def _label_noise(noise: LabelNoise) -> Iterator[Table]:
    rows: list[tuple[Cell, ...]] = []

    def add(name: str, band: NoiseBand) -> None:
        rows.append((name, band.num, band.accuracy, band.split))

    for band in noise.by_disagreement:
        add(f"disagreement {band.low:.2f}", band)
    for band in noise.by_margin:
        add(f"|mean margin| {band.low:.2f} to {band.high:.2f}", band)
    against = noise.against
    rows.append((f"all contradict the label: {against.fraction}", None, None, against.split))
    if noise.num_with_votes:
        rows.append(("the others", None, None, against.split_others))
    heads = "comparisons with | comparisons: count | accuracy of the mean margin: percent"
    heads += " | annotators split: percent" * bool(noise.num_with_votes)
    cells = tuple(row[: 4 if noise.num_with_votes else 3] for row in rows)
    note = f"label audit by {', '.join(noise.models)}"
    yield Table("models and annotators [95 %]", columns(heads), cells, (note,))
    if noise.num_with_votes:
        names = list(noise.by_set)
        several = len(names) > 1
        headings = [Column("predictor"), *(Column(name, "decimal") for name in names)]
        headings += [Column("all", "decimal")] * several
        title = (
            "separates split votes from unanimous ones: area under the curve [95 %]; 0.5 is chance"
        )
        areas: tuple[tuple[Cell, ...], ...] = tuple(
            (
                predictor.name,
                *(noise.by_set[name][index].auc for name in names),
                *[predictor.auc] * several,
            )
            for index, predictor in enumerate(noise.predictors)
        )
        yield Table(title, tuple(headings), areas)


def _examples(title: str, examples: Sequence[WorstExample]) -> Table:
    rows = []
    for example in examples:
        doubt = example.why.removeprefix(WRONG).removeprefix("; ")
        remarks = [f"margin {example.margin:.2f}", *([doubt] if doubt else [])]
        if example.votes is not None:
            chosen, rejected, tie = example.votes
            remarks.append(f"votes {chosen} for chosen, {rejected} for rejected, {tie} for neither")
        texts = [(name, getattr(example, name)) for name in ("prompt", "chosen", "rejected")]
        rows += [(example.set, "; ".join(remarks)), *texts, ("", "")]
    return Table(title, (Column(""), Column("")), tuple(rows[:-1]))
