"""transformers' text-classification pipeline on an exported reward directory, against its golden scores.

    python examples/consumers/text_classification.py REWARD_DIR

It needs only transformers. The pipeline gets the rendered conversation. With `problem_type: regression` it
applies no sigmoid by default; `function_to_apply="none"` asks for that explicitly.
"""

import json
import sys
from pathlib import Path

from transformers import pipeline


def run(directory: str) -> float:
    """The largest difference to a golden score, relative to max(1, |score|); one by one and batched."""
    lines = (Path(directory) / "golden_scores.jsonl").read_text(encoding="utf-8").splitlines()
    golden = [json.loads(line) for line in lines]
    classify = pipeline("text-classification", directory, dtype="float32")
    texts = [
        classify.tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in golden
    ]
    largest = 0.0
    for options in ({}, {"function_to_apply": "none"}, {"batch_size": 4}):
        found = [answer["score"] for answer in classify(texts, **options)]
        for score, row in zip(found, golden, strict=True):
            expected = row["reward"]
            largest = max(largest, abs(score - expected) / max(1.0, abs(expected)))
    print(f"{len(golden)} golden scores, largest difference {largest:.2g}")
    return largest


if __name__ == "__main__":
    run(sys.argv[1])
