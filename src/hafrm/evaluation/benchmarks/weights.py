"""How RewardBench and M-RewardBench weigh their subsets: the counts of their released code.

Within a section a subset weighs what its count says, and the sections weigh alike. The counts are those of
the rows, but for math-prm: it has 447, and its 984 (983) make mathematics weigh as much as code.
"""

from collections.abc import Mapping

SECTIONS: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""RewardBench 1. Its code has had the two xstest counts both ways round; these are those of the rows."""

M_SECTIONS: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 79,
        "alpacaeval-length": 79,
        "alpacaeval-hard": 76,
        "mt-bench-easy": 24,
        "mt-bench-med": 38,
    },
    "Chat Hard": {
        "mt-bench-hard": 35,
        "llmbar-natural": 76,
        "llmbar-adver-neighbor": 124,
        "llmbar-adver-GPTInst": 87,
        "llmbar-adver-GPTOut": 42,
        "llmbar-adver-manual": 43,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 247,
        "donotanswer": 135,
    },
    "Reasoning": {
        "math-prm": 983,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 163,
        "hep-rust": 164,
    },
}
"""M-RewardBench, the same for each of its languages."""

LANGUAGES = (
    *(
        "arb_Arab",
        "ces_Latn",
        "deu_Latn",
        "ell_Grek",
        "fra_Latn",
        "heb_Hebr",
        "hin_Deva",
        "ind_Latn",
    ),
    *(
        "ita_Latn",
        "jpn_Jpan",
        "kor_Hang",
        "nld_Latn",
        "pes_Arab",
        "pol_Latn",
        "por_Latn",
        "ron_Latn",
    ),
    *("rus_Cyrl", "spa_Latn", "tur_Latn", "ukr_Cyrl", "vie_Latn", "zho_Hans", "zho_Hant"),
)
"""M-RewardBench's, as its configurations are called."""


def within_section(counts: Mapping[str, int]) -> dict[str, float]:
    """Each subset's share of its section; they sum to 1."""
    total = sum(counts.values())
    return {subset: count / total for subset, count in counts.items()}


def within_language(language: str) -> dict[str, float]:
    """Each subset's share of a language's score, of which every section has the same."""
    return {
        f"{language} {subset}": share / len(M_SECTIONS)
        for counts in M_SECTIONS.values()
        for subset, share in within_section(counts).items()
    }
