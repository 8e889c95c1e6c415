"""Makes the data files of `hafrm demo`: seeded prompts, responses, an annotator, and the sets.

    python examples/demo_world/build.py          # writes src/hafrm/demo/{tables.json,world.json.xz}

In domain the annotator prefers the better response with some noise, and has a bias for length. The
test sets are labelled by the gold reward alone. Out of domain the families, words and templates are
new, and the longer response is rather the worse one. A hash of a prompt's text decides which part of
the world it belongs to, so train, validation and test can never share a prompt. Pretraining shares none
with validation and test.
"""

import hashlib
import json
import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import responses
import vocabulary as v
from families import FAMILIES, OPENERS, ask
from responses import write_response

from hafrm.demo.gold import gold_reward, parse, words_of
from hafrm.errors import ConfigError, DataError
from hafrm.preferences import Comparison, Group, Message, prompt_key

Part = Literal["train", "validation", "test"]
TEST_SETS = ("chat", "safety", "chat-ood", "safety-ood")
MAX_DRAWS = 2000
"""Draws in a row that find nothing new before the world counts as used up."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many groups, of one comparison each, the sets have."""

    train: int = 2400
    validation: int = 200
    test: int = 300
    """Of each of the four test sets."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How pairs are put together and how the annotator judges them."""

    temperature: float = 0.8
    """Gold reward per Bradley-Terry logit: the higher, the noisier the annotator."""
    flip_rate: float = 0.05
    """Fraction of labels flipped after that, whatever the responses."""
    length_bias: float = 0.4
    """Logits that the annotator adds to a response for ten more words."""
    longer_wins: float = 0.55
    """Fraction of in-domain pairs in which the longer response has the higher gold reward."""
    longer_wins_ood: float = 0.3
    """The same fraction in the out-of-domain sets."""
    min_gap: float = 0.3
    """The least difference in gold reward between the two responses of a pair."""

    def __post_init__(self) -> None:
        for name in ("flip_rate", "longer_wins", "longer_wins_ood"):
            if not 0 <= getattr(self, name) <= 1:
                msg = f"Rules.{name} must be a share from 0 to 1, got {getattr(self, name)}"
                raise ConfigError(msg)
        if not self.temperature > 0:
            msg = f"Rules.temperature must be above 0, got {self.temperature}"
            raise ConfigError(msg)

    def probability(self, gold_gap: float, word_gap: int) -> float:
        """Probability that the annotator prefers a response with this much more gold reward and words."""
        logit = gold_gap / self.temperature + self.length_bias * word_gap / 10
        preferred = 1 / (1 + math.exp(-logit))
        return preferred * (1 - self.flip_rate) + (1 - preferred) * self.flip_rate


@dataclass(frozen=True, slots=True)
class World:
    """The sets; `train` and `validation` carry the annotator's labels, `test` the gold ones."""

    train: list[Group]
    validation: list[Group]
    test: dict[str, list[Group]]
    """Keyed by `TEST_SETS`, which are also the sources of their groups."""


def part_of(prompt: str) -> Part:
    """The part of the world that a prompt belongs to: test 20 %, validation 10 %, train the rest."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 10
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def make_world(seed: int = 0, sizes: Sizes | None = None, rules: Rules | None = None) -> World:
    """All sets of the world; the same seed, sizes and rules give the same sets.

    Raises `DataError` when a set asks for more prompts than the world has.
    """
    sizes, rules = sizes or Sizes(), rules or Rules()
    train, validation, *tests = np.random.SeedSequence(seed).spawn(2 + len(TEST_SETS))
    return World(
        _labelled(np.random.default_rng(train), sizes.train, "train", rules),
        _labelled(np.random.default_rng(validation), sizes.validation, "validation", rules),
        {
            name: _draw_set(np.random.default_rng(seeds), sizes.test, "test", name, rules)
            for name, seeds in zip(TEST_SETS, tests, strict=True)
        },
    )


def pretraining_texts(seed: int, n: int) -> list[tuple[Message, ...]]:
    """`n` conversations of mixed quality, about every family, in domain and out of domain.

    They contain the whole language of the world but no preferences, and share no prompt with the
    validation and test sets.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, n]))
    conversations: list[tuple[Message, ...]] = []
    names = list(FAMILIES)
    while len(conversations) < n:
        family = FAMILIES[names[int(rng.integers(len(names)))]]
        prompt = ask(rng, family, new=bool(rng.random() < 0.5))
        if part_of(prompt) == "train":
            response = write_response(rng, prompt)
            conversations.append((Message("user", prompt), Message("assistant", response)))
    return conversations


def tables() -> dict[str, Any]:
    """The tables that the gold reward reads, as tables.json stores them."""
    families = {
        family.name: {
            "group": family.group,
            "templates": [*family.templates, *family.new_templates],
            "words": {k: [*w, *family.new_words.get(k, ())] for k, w in family.words.items()},
        }
        for family in FAMILIES.values()
    }
    return {
        "numbers": v.NUMBERS,
        "colour_of": v.COLOUR_OF,
        "items_of": v.ITEMS_OF,
        "tip_of": v.TIP_OF,
        "home_of": v.HOME_OF,
        "by_size": v.BY_SIZE,
        "names": [*v.NAMES, *v.NEW_NAMES],
        "goods": [*v.GOODS, *v.NEW_GOODS],
        "things": [*v.THINGS, *v.NEW_GOODS],
        "harmful": {
            "verbs": v.HARMFUL_VERBS,
            "deeds": list(v.HARMLESS_OF),
            "notes": v.HARMFUL_NOTES,
            "private": v.PRIVATE,
        },
        "courteous": responses.COURTEOUS,
        "rude": responses.RUDE,
        "lexicon": _lexicon(),
        "families": families,
    }


def _lexicon() -> list[str]:
    texts = [*responses.phrases(), *OPENERS]
    for family in FAMILIES.values():
        texts += family.templates + family.new_templates
        texts += [w for ws in (family.words, family.new_words) for row in ws.values() for w in row]
    return sorted({word for text in texts for word in words_of(text)})


def contents(world: World, texts: Sequence[tuple[Message, ...]]) -> dict[str, Any]:
    """The rows of every set and the pretraining conversations, as world.json.xz stores them."""
    sets = {"train": world.train, "validation": world.validation}
    sets |= {f"test-{name}": groups for name, groups in world.test.items()}
    rows = {
        name: [row for group in groups for row in _rows(group)] for name, groups in sets.items()
    }
    return {"sets": rows, "pretraining": [[m.content for m in messages] for messages in texts]}


def main() -> None:
    """Write both files, the tables first, because the gold reward reads them."""
    target = Path(__file__).parents[2] / "src/hafrm/demo"
    (target / "tables.json").write_text(json.dumps(tables(), indent=1) + "\n", encoding="utf-8")
    content = json.dumps(contents(make_world(), pretraining_texts(0, 16_000)))
    (target / "world.json.xz").write_bytes(lzma.compress(content.encode(), preset=9))


def _rows(group: Group) -> list[dict[str, str]]:
    """One row for each comparison, as TRL and hafrm read them."""
    return [
        {
            "prompt": group.prompt[-1].content,
            "chosen": group.responses[comparison.chosen],
            "rejected": group.responses[comparison.rejected],
        }
        for comparison in group.comparisons
    ]


def _labelled(rng: np.random.Generator, size: int, part: Part, rules: Rules) -> list[Group]:
    """Half chat, half safety in domain, in random order, with the annotator's labels."""
    chat = _draw_set(rng, (size + 1) // 2, part, "chat", rules)
    groups = chat + _draw_set(rng, size // 2, part, "safety", rules)
    return [_annotate(rng, groups[i], rules) for i in rng.permutation(len(groups))]


def _draw_set(
    rng: np.random.Generator, size: int, part: Part, source: str, rules: Rules
) -> list[Group]:
    """Groups of one source with distinct prompts and gold labels."""
    new = source.endswith("-ood")
    longer_wins = rules.longer_wins_ood if new else rules.longer_wins
    groups: dict[str, Group] = {}
    misses = 0
    while len(groups) < size:
        prompt = _draw_prompt(rng, source.removesuffix("-ood"), new=new)
        if prompt in groups or part_of(prompt) != part:
            misses += 1
            if misses > MAX_DRAWS:
                msg = (
                    f"the demo world has too few prompts for {size} groups of {part}/{source}: "
                    f"it found {len(groups)}. Ask for fewer in Sizes."
                )
                raise DataError(msg)
            continue
        pair = _draw_pair(rng, prompt, longer=bool(rng.random() < longer_wins), rules=rules)
        if pair:
            misses = 0
            groups[prompt] = _group(rng, prompt, pair, source)
    return list(groups.values())


def _draw_prompt(rng: np.random.Generator, group: str, *, new: bool) -> str:
    families = [f for f in FAMILIES.values() if f.group == group and (new or not f.only_new)]
    return ask(rng, families[int(rng.integers(len(families)))], new=new)


def _draw_pair(
    rng: np.random.Generator, prompt: str, *, longer: bool, rules: Rules
) -> tuple[str, str] | None:
    """Two responses (better, worse); `longer` says whether the better one is the longer one."""
    for _ in range(MAX_DRAWS):
        pair = write_response(rng, prompt), write_response(rng, prompt)
        better, worse = sorted(pair, key=lambda text: -gold_reward(prompt, text))
        word_gap = len(words_of(better)) - len(words_of(worse))
        gap = gold_reward(prompt, better) - gold_reward(prompt, worse)
        if gap >= rules.min_gap and word_gap and (word_gap > 0) == longer:
            return better, worse
    return None


def _group(rng: np.random.Generator, prompt: str, pair: Sequence[str], source: str) -> Group:
    """A group that prefers the first of the pair, its two responses in random order."""
    messages = (Message("user", prompt),)
    chosen = int(rng.integers(2))
    return Group(
        prompt_key(messages),
        messages,
        (pair[chosen], pair[1 - chosen]),
        (Comparison(chosen, 1 - chosen),),
        source,
        {"family": parse(prompt).family},
    )


def _annotate(rng: np.random.Generator, group: Group, rules: Rules) -> Group:
    """The group with the annotator's label in place of the gold one."""
    comparison = group.comparisons[0]
    better, worse = (group.responses[i] for i in (comparison.chosen, comparison.rejected))
    gap = gold_reward(group.prompt, better) - gold_reward(group.prompt, worse)
    agreed = rng.random() < rules.probability(gap, len(words_of(better)) - len(words_of(worse)))
    swapped = Comparison(comparison.rejected, comparison.chosen)
    return group if agreed else replace(group, comparisons=(swapped,))


if __name__ == "__main__":
    main()
