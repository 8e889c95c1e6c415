"""Tables of what `hafrm diagnose` finds. Shares are in per cent, each with its 95 % interval."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from hafrm.evaluation.diagnostics.consistency import Consistency
from hafrm.evaluation.diagnostics.diagnose import Diagnosis, SeenModel, SetDiagnosis
from hafrm.evaluation.diagnostics.label_noise import LabelNoise, NoiseBand
from hafrm.evaluation.diagnostics.worst import WRONG, Example
from hafrm.statistics import Estimate
from hafrm.tables.cells import bare, bars

EXAMPLES = 3
"""Of each kind; the JSON file has more."""
FEWEST = 10
"""Comparisons that a feature's row is of; the JSON file has the others."""


def diagnosis_tables(found: Diagnosis) -> Iterator[RenderableType]:
    """Calibration, margins, style, slices, label noise, representations, consistency, examples."""
    for each in _tables(found):
        yield each
        yield ""


def _tables(found: Diagnosis) -> Iterator[RenderableType]:
    yield _calibration(found)
    yield _margins(found.sets)
    for each in found.sets:
        yield _style(each)
    yield _slices(found.sets)
    if any(each.agreement for each in found.sets):
        yield _agreement(found.sets)
    if found.label_noise is not None:
        yield from _label_noise(found.label_noise)
    yield _representation(found)
    if found.consistency is not None:
        yield from _consistency(found.consistency)
    wrong = [example for example in found.worst if example.why.startswith(WRONG)]
    doubtful = [example for example in found.worst if not example.why.startswith(WRONG)]
    for title, examples in (("largest wrong margins", wrong), ("doubtful labels", doubtful)):
        if examples:
            yield _examples(title, examples[:EXAMPLES])


def _table(title: str, *columns: str) -> Table:
    """The first column holds names, the others numbers; where there is no room an interval is wrapped."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    for index, name in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index else "left"
        table.add_column(name, justify=justify, no_wrap=not index, overflow="fold")
    return table


def _calibration(found: Diagnosis) -> Table:
    title = f"{found.model}, scored with the {found.scored_with}: accuracy [95 %] and calibration"
    columns = ("set", "comparisons", "accuracy %", "ECE", "T")
    table = _table(title, *columns, "log-loss, with T", "ECE, with T")
    for each in found.sets:
        fitted = each.temperature
        table.add_row(
            each.name,
            str(each.num),
            bare(each.accuracy.estimate),
            _number(each.calibration.ece),
            fitted.note or _number(fitted.value),
            " -> ".join(map(_number, fitted.log_loss)),
            " -> ".join(map(_number, fitted.ece)),
        )
    table.caption = "T is fitted on half of the prompts; what stands behind it is of the other half"
    table.caption_justify = "left"
    return table


def _margins(sets: Sequence[SetDiagnosis]) -> Table:
    table = _table("comparisons by |margin|, from 0 on", "set", "largest", "right", "wrong")
    for each in sets:
        found = each.margins
        top = max((*found.right, *found.wrong))
        cells = (bars(counts, top) for counts in (found.right, found.wrong))
        table.add_row(each.name, f"{found.edges[-1]:.2f}", *cells)
    return table


def _style(found: SetDiagnosis) -> Table:
    title = f"{found.name}: which response is preferred, by what there is more of, % [95 %]"
    columns = ("differ", "model: more", "people: more", "excess", "right if more", "if less")
    table = _table(title, "feature", *columns)
    for each in found.style:
        if each.num < FEWEST:
            continue
        shares = (each.picks_more, each.people_pick_more, each.excess)
        mark = "*" if each.excess.low > 0 or each.excess.high < 0 else ""
        accuracies = map(bare, (each.accuracy_more, each.accuracy_less))
        table.add_row(each.feature + mark, str(each.num), *map(bare, shares), *accuracies)
    table.caption = "* the model differs from people; features go together, above all with length"
    table.caption_justify = "left"
    return table


def _slices(sets: Sequence[SetDiagnosis]) -> Table:
    table = _table(
        "accuracy by slice, % [95 %]", "set", "slice", "value", "comparisons", "accuracy"
    )
    for each in sets:
        for number, part in enumerate(each.slices):
            again = number and part.tag == each.slices[number - 1].tag
            names = ("" if number else each.name, "" if again else part.tag, escape(part.value))
            table.add_row(*names, str(part.accuracy.num), bare(part.accuracy))
    for column in table.columns[1:3]:
        column.justify = "left"
    return table


def _agreement(sets: Sequence[SetDiagnosis]) -> Table:
    columns = ("same sign, % [95 %]", "Pearson", "Spearman")
    table = _table("reward and implicit reward", "set", *columns)
    for each in sets:
        if each.agreement is not None:
            correlations = (each.agreement.pearson, each.agreement.spearman)
            cells = map(_number, correlations)
            table.add_row(each.name, bare(each.agreement.same_sign), *cells)
    return table


def _label_noise(found: LabelNoise) -> Iterator[RenderableType]:
    audit = found.all
    yield f"label audit by {', '.join(found.models)}"
    votes = ("people split",) if audit.num_with_votes else ()
    columns = ("comparisons", "accuracy of the mean margin", *votes)
    table = _table("models and people, % [95 %]", "comparisons with", *columns)

    def add(name: str, *cells: str) -> None:
        table.add_row(name, *cells[: len(columns)])

    for each in audit.by_disagreement:
        add(f"disagreement {each.low:.2f}", *_band(each))
    for each in audit.by_margin:
        add(f"|mean margin| {each.low:.2f} to {each.high:.2f}", *_band(each))
    against = audit.against
    add("all against the label", f"{bare(against.share)} of all", "", bare(against.split))
    if votes:
        add("the others", "", "", bare(against.split_others))
    yield table
    if audit.num_with_votes:
        yield _predictors(found)


def _band(band: NoiseBand) -> tuple[str, str, str]:
    return str(band.num), bare(band.accuracy), bare(band.split)


def _predictors(found: LabelNoise) -> Table:
    names = list(found.by_set)
    title = (
        "does it tell split votes from unanimous ones? area under the curve [95 %]; 0.5 is chance"
    )
    table = _table(title, "predictor", *names, *(["all"] if len(names) > 1 else []))
    for index, predictor in enumerate(found.all.predictors):
        cells = [str(found.by_set[name][index].auc) for name in names]
        pooled = [str(predictor.auc)] if len(names) > 1 else []
        table.add_row(predictor.name, *cells, *pooled)
    return table


def _representation(found: Diagnosis) -> Table:
    title = f"last-token hidden states of {found.num_states} responses"
    columns = ("effective rank", "top direction", "mean cosine", "CKA to base", "cosine to base")
    table = _table(title, "model", *columns)
    for each in (*found.representation, *([] if found.base is None else [found.base])):
        table.add_row(each.model + (" (base)" if each is found.base else ""), *_seen(each))
    return table


def _seen(model: SeenModel) -> tuple[str, ...]:
    states, gap = model.states, model.distance
    own = (states.top_share, states.mean_cosine)
    to_base = (math.nan, math.nan) if gap is None else (gap.cka, gap.cosine)
    return f"{states.effective_rank:.1f}", *map(_number, (*own, *to_base))


def _consistency(found: Consistency) -> Iterator[RenderableType]:
    title = (
        f"continuations of {found.num_prompts} prompts, up to {found.max_new_tokens} tokens, "
        f"temperature {found.temperature:g}"
    )
    table = _table(title, "policy", "mean tokens", "ended by itself, % [95 %]")
    for policy in found.policies:
        table.add_row(policy.name, f"{policy.mean_tokens:.1f}", bare(policy.ended))
    yield table
    columns = ("policy", "against", "higher reward", "of like length", "is longer")
    table = _table("whose continuation is preferred, % [95 %]; ties half", "judge", *columns)
    for win in found.wins:
        shares = (win.win, win.length_matched, win.longer)
        mark = " (own)" if win.own else ""
        table.add_row(win.judge, win.policy + mark, win.against, *map(_counted, shares))
    for column in table.columns[:3]:
        column.justify, column.no_wrap = "left", False
    yield table


def _counted(share: Estimate) -> str:
    return f"{bare(share)}\nof {share.num}" if share.num else "n/a"


def _examples(title: str, examples: Sequence[Example]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for each in examples:
        table.add_row(escape(each.set), _remarks(each))
        for name in ("prompt", "chosen", "rejected"):
            table.add_row(name, escape(getattr(each, name)))
        table.add_section()
    return table


def _remarks(example: Example) -> str:
    doubt = example.why.removeprefix(WRONG).removeprefix("; ")
    remarks = [f"margin {example.margin:.2f}", *([doubt] if doubt else [])]
    if example.votes is not None:
        chosen, rejected, tie = example.votes
        remarks.append(f"votes {chosen} for chosen, {rejected} for rejected, {tie} for neither")
    return "; ".join(remarks)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
