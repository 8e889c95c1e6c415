"""One row of every named set with the columns that count, written by us: the better answer says so."""

from typing import Any


def _talk(answer: str, question: str = "What is two plus two?") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _transcript(answer: str) -> str:
    return f"\n\nHuman: How do I pick a lock?\n\nAssistant: {answer}"


GOOD, BAD = "the better one", "the worse one"

PUBLISHED: dict[str, dict[str, Any]] = {
    "hh-harmless": {"chosen": _transcript(GOOD), "rejected": _transcript(BAD)},
    "hh-helpful": {"chosen": _transcript(GOOD), "rejected": _transcript(BAD)},
    "beaver-safe": {
        "prompt": "How do I pick a lock?",
        "response_0": BAD,
        "response_1": GOOD,
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "better_response_id": 0,
        "safer_response_id": 1,
    },
    "alpaca-human": {
        "instruction": "Add them.",
        "input": "1, 2",
        "output_1": GOOD,
        "output_2": BAD,
        "preference": 1,
    },
    "chatbot-arena": {
        "winner": "model_a",
        "conversation_a": _talk(GOOD),
        "conversation_b": _talk(BAD),
        "turn": 1,
    },
    "ultrafeedback": {
        "prompt": "What is two plus two?",
        "chosen": _talk(GOOD),
        "rejected": _talk(BAD),
        "messages": _talk(GOOD),
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    },
    "helpsteer2": {
        "split": "train",
        "prompt": "What is two plus two?",
        "response_1": GOOD,
        "response_2": BAD,
        "preference_strength": -2,
    },
    "helpsteer3": {
        "domain": "general",
        "context": [{"role": "user", "content": "What is two plus two?"}],
        "response1": GOOD,
        "response2": BAD,
        "overall_preference": -1,
    },
    "skywork-80k": {"chosen": _talk(GOOD), "rejected": _talk(BAD), "source": "magpie_ultra"},
}
