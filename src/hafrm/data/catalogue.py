"""Well-known preference data by name: where it is published, which of its parts there are, its row form.

The first five sets are those of the paper (HAF-RM, arXiv 2407.04185), filtered and split as its released
code does; `hafrm.data.named` reads them. A new set is one function in `hafrm.data.published`, one entry
here and one row in docs/sets.md.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hafrm.data import published
from hafrm.data.files import stem
from hafrm.data.hub import HubSet
from hafrm.data.published import LeftOut, OurRow, Row
from hafrm.errors import DataError

WHOLE = ""
"""The part of a set that was published in one piece."""


@dataclass(frozen=True)
class NamedSet:
    """A published set of preferences and what of it is used."""

    name: str
    read_row: Callable[[Row], OurRow | LeftOut]
    columns: tuple[str, ...]
    """What every published row has."""
    hub: dict[str, HubSet] = field(default_factory=dict)
    """Where each part lies; a set that is not on the hub must be given as a path."""
    parts: tuple[str, ...] = ("train", "test")
    """What can be asked for, in the order in which prompts are kept apart."""
    test_share: float = 0.0
    """The first share of the rows is the test part, where the set was published in one piece."""
    home: str = ""
    """Where to get a set that is not on the hub."""

    @property
    def in_one_piece(self) -> bool:
        """Whether the parts are told apart by rows, and not by files."""
        return WHOLE in self.hub or not self.hub


def named_set(name: str) -> NamedSet:
    """The set of that name; raises `DataError` with the nearest names for an unknown one."""
    if name not in SETS:
        near = difflib.get_close_matches(name, [*SETS, *GROUPS], 1)
        hint = f"did you mean set:{near[0]}? " if near else ""
        known = f"known are {', '.join(SETS)}; groups of sets are {', '.join(GROUPS)}"
        raise DataError(f"unknown set {name!r}; {hint}{known}")
    return SETS[name]


def members(name: str, path: str | None) -> list[tuple[str, str | None]]:
    """(set, path) of each set that a name stands for: itself, or the members of a group.

    The path of a group is a folder with a file or folder for each member, called by its name.
    """
    if name not in GROUPS:
        return [(name, path)]
    if path is None:
        return [(member, None) for member in GROUPS[name]]
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{path} is no folder; set:{name} needs one with {', '.join(GROUPS[name])}")
    found = {stem(entry): str(entry) for entry in sorted(folder.iterdir())}
    absent = [member for member in GROUPS[name] if member not in found]
    if absent:
        raise DataError(f"{path} has no file or folder called {' or '.join(absent)}")
    return [(member, found[member]) for member in GROUPS[name]]


def _official(name: str, parts: dict[str, str], **more: Any) -> dict[str, HubSet]:
    return {part: HubSet(name, split, **more) for part, split in parts.items()}


_TRAIN_TEST = {"train": "train", "test": "test"}
_TRANSCRIPTS = ("chosen", "rejected")
_ONE_PIECE = ("train",)
_SAFETY = ("is_response_0_safe", "is_response_1_safe", "safer_response_id")
_ANNOTATORS = ("annotator1", "annotator2", "annotator3")

SETS: dict[str, NamedSet] = {
    each.name: each
    for each in (
        NamedSet(
            "hh-harmless",
            published.hh,
            _TRANSCRIPTS,
            _official("Anthropic/hh-rlhf", _TRAIN_TEST, folder="harmless-base"),
        ),
        NamedSet(
            "hh-helpful",
            published.hh,
            _TRANSCRIPTS,
            _official("Anthropic/hh-rlhf", _TRAIN_TEST, folder="helpful-base"),
        ),
        NamedSet(
            "beaver-safe",
            published.beaver_safe,
            ("prompt", *_SAFETY, "response_0", "response_1"),
            _official("PKU-Alignment/PKU-SafeRLHF", _TRAIN_TEST),
        ),
        NamedSet(
            "alpaca-human",
            published.alpaca_human,
            ("instruction", "input", "output_1", "output_2", "preference"),
            {WHOLE: HubSet("tatsu-lab/alpaca_farm", file="alpaca_human_preference.json")},
            test_share=0.10,
        ),
        NamedSet(
            "chatbot-arena",
            published.chatbot_arena,
            ("winner", "conversation_a", "conversation_b"),
            {WHOLE: HubSet("lmsys/chatbot_arena_conversations")},
            test_share=0.05,
        ),
        NamedSet(
            "ultrafeedback",
            published.ultrafeedback,
            ("chosen", "rejected", "score_chosen", "score_rejected"),
            _official(
                "HuggingFaceH4/ultrafeedback_binarized",
                {"train": "train_prefs", "test": "test_prefs"},
            ),
        ),
        NamedSet(
            "helpsteer2",
            published.helpsteer2,
            ("prompt", "response_1", "response_2", "preference_strength", "split"),
            {WHOLE: HubSet("nvidia/HelpSteer2", folder="preference")},
            parts=("train", "validation"),
        ),
        NamedSet(
            "helpsteer3",
            published.helpsteer3,
            ("context", "response1", "response2", "overall_preference", "domain"),
            _official(
                "nvidia/HelpSteer3",
                {"train": "train", "validation": "validation"},
                config="preference",
            ),
            parts=("train", "validation"),
        ),
        NamedSet(
            "skywork-80k",
            published.skywork,
            ("chosen", "rejected", "source"),
            {WHOLE: HubSet("Skywork/Skywork-Reward-Preference-80K-v0.2")},
            parts=_ONE_PIECE,
        ),
        NamedSet(
            "webgpt",
            published.webgpt,
            ("question", "answer_0", "answer_1", "score_0", "score_1"),
            {
                WHOLE: HubSet(
                    "openai/webgpt_comparisons",
                    file="default/train/*.parquet",
                    revision="refs/convert/parquet",
                )
            },
            parts=_ONE_PIECE,
        ),
        NamedSet(
            "shp",
            published.shp,
            ("history", "human_ref_A", "human_ref_B", "labels", "domain"),
            _official(
                "stanfordnlp/SHP",
                {"train": "train", "validation": "validation", "test": "test"},
            ),
            parts=("train", "validation", "test"),
        ),
        NamedSet(
            "pandalm",
            published.pandalm,
            ("instruction", "input", "response1", "response2", *_ANNOTATORS),
            parts=("test",),
            home="github.com/WeOpenML/PandaLM (data/testset-v1.json)",
        ),
    )
}
"""Every named set; the first five are the paper's."""

GROUPS: dict[str, tuple[str, ...]] = {
    "safety": ("beaver-safe", "hh-harmless"),
    "chat": ("alpaca-human", "chatbot-arena", "hh-helpful"),
}
"""The paper's two groups: what is trained on one set of a group is tested on the others."""
