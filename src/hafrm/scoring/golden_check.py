"""Replay a reward directory's golden scores with plain transformers, in a process of its own.

Run as a script (`python golden_check.py DIR`), it imports nothing of hafrm, so that what it confirms is
what any consumer gets: ids from the exported template, one at a time, and in batches padded on either
side. Prints one JSON line; exits 1 on disagreement.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def replay(directory: Path) -> dict[str, Any]:
    """Largest differences to the golden scores, and what else is wrong with the directory."""
    lines = (directory / "golden_scores.jsonl").read_text(encoding="utf-8").splitlines()
    golden = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    faults = [f"freshly initialised: {name}" for name in loading["missing_keys"]]
    if model.config.num_labels != 1:
        faults.append(f"{model.config.num_labels} labels")
    texts = [str(tokenizer.apply_chat_template(g["messages"], tokenize=False)) for g in golden]
    for text, row in zip(texts, golden, strict=True):
        for special in (True, False):
            ids = tokenizer(text, add_special_tokens=special)["input_ids"]
            if ids != row["input_ids"]:
                faults.append(f"ids differ (add_special_tokens={special}) for {text[-40:]!r}")
    expected = torch.tensor([g["reward"] for g in golden])
    scores = {"alone": torch.cat([_scores(model, tokenizer, [t], "right") for t in texts])}
    for side in ("right", "left"):
        scores[side] = _scores(model, tokenizer, texts, side)
    differences = {
        name: float(((s - expected).abs() / expected.abs().clamp(min=1.0)).max())
        for name, s in scores.items()
    }
    return {"differences": differences, "faults": faults, "num_golden": len(golden)}


@torch.no_grad()
def _scores(model: Any, tokenizer: Any, texts: list[str], side: str) -> torch.Tensor:
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False
    )
    kept = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if side == "left":
        kept["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    scores: torch.Tensor = model(**kept).logits[:, 0]
    return scores


def main() -> None:
    found = replay(Path(sys.argv[1]))
    tolerance = float(sys.argv[2]) if len(sys.argv) > 2 else 1e-4
    found["ok"] = not found["faults"] and max(found["differences"].values()) <= tolerance
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(0 if found["ok"] else 1)


if __name__ == "__main__":
    main()
