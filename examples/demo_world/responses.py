"""Writes responses of the demo world, from excellent to useless, for any task.

A response is a core (right, wrong, muddled, evasive, or astray) in a manner (polite, plain, rude), with
more or less idle talk around it, and sometimes repeated. Faults are drawn independently, so length
alone says nothing about quality. Nothing here judges: see `hafrm.demo.gold`.
"""

import re
from collections.abc import Callable

import numpy as np
from families import FAMILIES, pick
from vocabulary import (
    BY_SIZE,
    COLOUR_OF,
    GOODS,
    HOME_OF,
    ITEMS_OF,
    NAMES,
    NEW_GOODS,
    NEW_NAMES,
    NUMBERS,
    THINGS,
    TIP_OF,
    either,
)

from hafrm.demo.gold import Task, act, harmful, number, parse

FAULTS = {"wrong": 0.5, "muddled": 0.15, "evasive": 0.15, "astray": 0.2}
"""What a core that is not right is instead, and how often."""
COURTEOUS = either("i am glad to help. | thank you for asking. | of course, with pleasure.")
RUDE = either("that is a silly question. | do not bother me. | you should know that.")
IDLE = either(
    "i hope this is useful. | there is more to say. | people often think about it. |"
    "it is good to ask. | i have heard that before. | let me know what you think."
)
EVASIVE = either("i do not know. | it depends. | that is hard to say.")
SAY = {
    "sum": either("{a} plus {b} is {v}. | the answer is {v}."),
    "minus": either("{a} minus {b} is {v}. | the answer is {v}."),
    "colour": either("the {thing} is {v}. | the colour of the {thing} is {v}. | it is {v}."),
    "format": either("{v}. | the {thing} is {v}."),
    "list": either("{n} {kind} are {v}. | here you are: {v}."),
    "summary": either("{who} bought a {item}. | {who} bought a {item} at the {place}."),
    "advice": either("i am sorry about your {trouble}. you could {v}. | you could {v}."),
    "home": either("the {animal} lives in the {v}. | you find it in the {v}."),
    "repeat": either("{one} {two} {three} {four}. | you said: {one} {two} {three} {four}."),
    "bigger": either("the {v} is bigger than the {w}. | the {v} is bigger."),
}
REFUSE = either("sorry, i cannot help you {act}. | i cannot do that.")
REASONS = either("it could hurt people. | it is against the law. | it is not right.")
REDIRECT = either(
    "you could talk to a friend instead. | you could ask the owner instead. |"
    "you could go for a walk instead."
)
DO = {
    "request": either("first {step}, then {act} {how}."),
    "deed": either("first {step}, then {act} {how}."),
    "note": either("dear {last}, i write to {verb} you {how}."),
    "private": either("the {what} of {whom} is {where}."),
}
FILL = {
    "step": either("get the right tools | read a short guide | find some space | wait a little"),
    "how": either("with care | step by step | without haste"),
    "where": either("on the first page | in the top drawer | under the sign"),
}


def phrases() -> tuple[str, ...]:
    """Every text above, for the lexicon of the world."""
    rows = (*SAY.values(), *DO.values(), *FILL.values(), tuple(TIP_OF.values()))
    tables = (*COLOUR_OF.values(), *HOME_OF.values(), *(w for r in ITEMS_OF.values() for w in r))
    plain = (*COURTEOUS, *RUDE, *IDLE, *EVASIVE, *REFUSE, *REASONS, *REDIRECT)
    rest = ("no, your and", *BY_SIZE, *NUMBERS)
    return (*plain, *(text for row in rows for text in row), *tables, *rest)


def _to_you(text: str) -> str:
    return re.sub(r"\b(my|our)\b", "your", text)


def _other(rng: np.random.Generator, values: list[str] | tuple[str, ...], truth: str) -> str:
    return pick(rng, [value for value in values if value != truth])


def _number(rng: np.random.Generator, task: Task, right: bool) -> dict[str, str]:
    truth = number(task)
    near = [n for n in NUMBERS if 0 < abs(NUMBERS.index(n) - NUMBERS.index(truth)) <= 4]
    return {"v": truth if right else pick(rng, near)}


def _colour(rng: np.random.Generator, task: Task, right: bool) -> dict[str, str]:
    truth = COLOUR_OF[task.fields["thing"]]
    return {"v": truth if right else _other(rng, sorted(set(COLOUR_OF.values())), truth)}


def _list(rng: np.random.Generator, task: Task, right: bool) -> dict[str, str]:
    kind, count = task.fields["kind"], NUMBERS.index(task.fields["n"])
    items = [str(item) for item in rng.permutation(ITEMS_OF[kind])]
    if not right:
        match pick(rng, ("count", "foreign", "again")):
            case "count":
                count += 1 if count == 2 or rng.random() < 0.5 else -1
            case "foreign":
                items[0] = pick(rng, ITEMS_OF[_other(rng, list(ITEMS_OF), kind)])
            case _:
                items[1] = items[0]
    return {"v": ", ".join(items[: count - 1]) + " and " + items[count - 1]}


def _summary(rng: np.random.Generator, task: Task, right: bool) -> dict[str, str]:
    who, item = task.fields["who"], task.fields["item"]
    if right:
        return {}
    fault = pick(rng, ("who", "item", "both"))
    return {
        "who": who if fault == "item" else _other(rng, NAMES + NEW_NAMES, who),
        "item": item if fault == "who" else _other(rng, GOODS + NEW_GOODS, item),
    }


def _advice(rng: np.random.Generator, task: Task, right: bool) -> dict[str, str]:
    truth = TIP_OF[task.fields["trouble"]]
    return {"v": truth if right else _other(rng, list(TIP_OF.values()), truth)}


def _repeat(rng: np.random.Generator, task: Task, right: bool) -> dict[str, str]:
    if right:
        return {}
    name = pick(rng, ("one", "two", "three", "four"))
    return {name: _other(rng, THINGS + NEW_GOODS, task.fields[name])}


def _home(rng: np.random.Generator, task: Task, right: bool) -> dict[str, str]:
    truth = HOME_OF[task.fields["animal"]]
    return {"v": truth if right else _other(rng, list(HOME_OF.values()), truth)}


def _bigger(_: np.random.Generator, task: Task, right: bool) -> dict[str, str]:
    pair = sorted((task.fields["a"], task.fields["b"]), key=BY_SIZE.index, reverse=right)
    return {"v": pair[0], "w": pair[1]}


_VALUES: dict[str, Callable[[np.random.Generator, Task, bool], dict[str, str]]] = {
    "sum": _number,
    "minus": _number,
    "colour": _colour,
    "list": _list,
    "summary": _summary,
    "advice": _advice,
    "repeat": _repeat,
    "home": _home,
    "bigger": _bigger,
}


def _say(rng: np.random.Generator, task: Task, *, right: bool) -> str:
    """A right or a wrong answer to a task of the chat group."""
    if task.family == "format":
        return _say_in_form(rng, task, right=right)
    values = {**task.fields, **_VALUES[task.family](rng, task, right)}
    return pick(rng, SAY[task.family]).format(**values)


def _say_in_form(rng: np.random.Generator, task: Task, *, right: bool) -> str:
    """A right answer in the requested form; a wrong one misses either the colour or the form."""
    form, miss_form = task.fields["form"], not right and rng.random() < 0.5
    if miss_form:
        form = _other(rng, FAMILIES["format"].words["form"], form)
    values = {**task.fields, **_colour(rng, task, right or miss_form)}
    text = SAY["format"][0 if form == "in one word" else 1].format(**values)
    return text.upper() if form == "in capitals" else text


def _refuse(rng: np.random.Generator, task: Task) -> str:
    parts = [pick(rng, REFUSE).format(act=act(task))]
    if rng.random() < 0.5:
        parts.append(pick(rng, REASONS))
    if rng.random() < 0.5:
        parts.append(pick(rng, REDIRECT))
    return " ".join(parts)


def _comply(rng: np.random.Generator, task: Task) -> str:
    chosen = {name: pick(rng, values) for name, values in FILL.items()}
    chosen |= {"act": act(task), "last": act(task).split()[-1]}
    text = pick(rng, DO[task.family]).format(**task.fields, **chosen)
    return _to_you(text)


def _core(rng: np.random.Generator, task: Task, *, right: bool) -> str:
    if FAMILIES[task.family].group == "chat":
        return _say(rng, task, right=right)
    return _refuse(rng, task) if harmful(task) == right else _comply(rng, task)


def core(rng: np.random.Generator, task: Task, kind: str) -> str:
    """The part of a response that answers; `kind` is "right" or a key of `FAULTS`."""
    match kind:
        case "evasive":
            return pick(rng, EVASIVE)
        case "astray":
            family = FAMILIES[task.family]
            task = parse(family.ask(rng, new=family.only_new or rng.random() < 0.3))
            return _core(rng, task, right=True)
        case "muddled":
            said = _core(rng, task, right=True), _core(rng, task, right=False)
            first = int(rng.integers(2))
            return f"{said[first]} no, {said[1 - first]}"
    return _core(rng, task, right=kind == "right")


def write_response(
    rng: np.random.Generator, prompt: str, *, skill: float = 0.5, talk: float = 0.5
) -> str:
    """A response to a prompt of the world, with random quality and length.

    `skill` is how often its core is right, `talk` how often there is idle talk about it.
    """
    task = parse(prompt)
    fault = str(rng.choice(list(FAULTS), p=list(FAULTS.values())))
    parts = [core(rng, task, "right" if rng.random() < skill else fault)]
    if rng.random() < 0.1 * talk:
        parts.append(parts[0])
    manner = rng.random()
    if manner < 0.6 * talk:
        parts.insert(0, pick(rng, COURTEOUS if manner < 0.4 * talk else RUDE))
    num_idle = int(rng.integers(1, 4)) if rng.random() < talk else 0
    for sentence in rng.choice(len(IDLE), size=num_idle, replace=False):
        parts.insert(len(parts) if rng.random() < 0.7 else 0, IDLE[sentence])
    return " ".join(parts)
