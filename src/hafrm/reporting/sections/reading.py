"""Texts to read: the comparisons a model gets most wrong, picked answers, samples of RLHF."""

from collections.abc import Iterator

from hafrm.reporting.blocks import Block, Passage, Passages, Section
from hafrm.reporting.folders import Folder, Json, Material, parts, source_names
from hafrm.reporting.numbers import decimal, finite

MOST_TEXT = 1600
"""Characters of a text; a page must stay small."""
MOST_PASSAGES = 20
"""Of one kind from one folder."""


def section(material: Material) -> Section | None:
    """Whatever there is to read, closed until it is asked for."""
    blocks: list[Block] = []
    for folder in material.folders:
        blocks += [*_worst(folder), *_picked(folder), *_samples(folder)]
    if not blocks:
        return None
    lead = "Numbers hide what a model has learnt; these texts show it. Text is shown as it is in the data."
    return Section("reading", "To read", lead, tuple(blocks))


def shortened(text: object) -> str:
    """A text, cut in the middle where it is long, saying how much is left out."""
    whole = "" if text is None else str(text)
    if len(whole) <= MOST_TEXT:
        return whole
    head, tail = whole[: MOST_TEXT * 3 // 4], whole[-MOST_TEXT // 4 :]
    left_out = len(whole) - len(head) - len(tail)
    return f"{head}\n[{left_out:,} characters left out]\n{tail}"


def first_line(text: object, most: int = 90) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(str(text or "").split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def _worst(folder: Folder) -> Iterator[Passages]:
    """A comparison that is suspicious in several ways is shown once, with all of them."""
    found: dict[tuple[str, ...], list[Json]] = {}
    for each in parts(folder.results.get("diagnostics", {}), "worst"):
        key = tuple(str(each.get(name)) for name in ("prompt", "chosen", "rejected"))
        found.setdefault(key, []).append(each)
    if found:
        passages = tuple(map(_comparison, list(found.values())[:MOST_PASSAGES]))
        yield Passages(f"{folder.name}: comparisons that look wrong", passages)


def _comparison(found: list[Json]) -> Passage:
    each = found[0]
    told = list(dict.fromkeys(str(one["why"]) for one in found if one.get("why")))
    told.append(f"margin {decimal(each.get('margin'), 2)}")
    votes = each.get("votes")
    if isinstance(votes, list) and votes:
        told.append("votes " + " to ".join(str(v) for v in votes))
    name = str(each.get("set") or "")
    told += [source_names([name])[name]] if name else []
    texts = tuple((key, shortened(each.get(key))) for key in ("prompt", "chosen", "rejected"))
    return Passage(first_line(each.get("prompt")), ", ".join(told), texts)


def _picked(folder: Folder) -> Iterator[Passages]:
    for model in parts(folder.results.get("best_of_n", {}), "models"):
        found = parts(model, "examples")
        if found:
            passages = tuple(
                Passage(
                    first_line(each.get("prompt")),
                    f"reward {decimal(each.get('reward'), 2)}",
                    tuple((key, shortened(each.get(key))) for key in ("prompt", "picked")),
                )
                for each in found[:MOST_PASSAGES]
            )
            yield Passages(f"Best of n by {model.get('name')}", passages)


def _samples(folder: Folder) -> Iterator[Passages]:
    """The first prompts, each with its responses from the first step to the last."""
    by_prompt: dict[str, list[Json]] = {}
    for each in sorted(folder.samples, key=lambda s: finite(s.get("step"))):
        by_prompt.setdefault(str(each.get("prompt")), []).append(each)
    passages = []
    for prompt, found in list(by_prompt.items())[:MOST_PASSAGES]:
        shown = found if len(found) <= 3 else [found[0], found[len(found) // 2], found[-1]]
        texts = [("prompt", shortened(prompt))]
        texts += [(_told(each), shortened(each.get("response"))) for each in shown]
        note = f"{len(found)} samples" if len(found) > 1 else _told(found[0])
        passages.append(Passage(first_line(prompt), note, tuple(texts)))
    if passages:
        yield Passages(f"{folder.name}: samples while it was trained", tuple(passages))


def _told(sample: Json) -> str:
    reward, kl = decimal(sample.get("reward"), 2), decimal(sample.get("kl"), 2)
    return f"step {sample.get('step')}, reward {reward}, KL {kl}"
