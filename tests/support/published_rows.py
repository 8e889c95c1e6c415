"""One row of every named set in its published form, written by us: the better answer says so."""

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
        "prompt_source": "BeaverTails",
        "response_0_source": "Alpaca-7B",
        "response_1_source": "Alpaca2-7B",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "response_0_severity_level": 2,
        "response_1_severity_level": 0,
        "better_response_id": 0,
        "safer_response_id": 1,
    },
    "alpaca-human": {
        "instruction": "Add them.",
        "input": "1, 2",
        "output_1": GOOD,
        "output_2": BAD,
        "preference": 1,
        "raw_preference": 2,
    },
    "chatbot-arena": {
        "question_id": "58210e39b3fd4441a2bd4a518bb44c2d",
        "model_a": "vicuna-13b",
        "model_b": "koala-13b",
        "winner": "model_a",
        "judge": "arena_user_973",
        "conversation_a": _talk(GOOD),
        "conversation_b": _talk(BAD),
        "turn": 1,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.1322,
    },
    "ultrafeedback": {
        "prompt": "What is two plus two?",
        "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
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
        "preference_statement": "@Response 1 is better than @Response 2.",
        "preference_elaboration": "It is right.",
        "three_most_similar_preferences": [],
        "all_preferences_unprocessed": [],
    },
    "helpsteer3": {
        "domain": "general",
        "language": "english",
        "context": [{"role": "user", "content": "What is two plus two?"}],
        "response1": GOOD,
        "response2": BAD,
        "overall_preference": -1,
        "individual_preference": [{"score": -1, "reasoning": "It is right."}],
    },
    "skywork-80k": {"chosen": _talk(GOOD), "rejected": _talk(BAD), "source": "magpie_ultra"},
}
