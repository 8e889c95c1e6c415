"""The `rewardbench` command on an exported reward directory, against its golden scores.

    python -m venv rb && rb/bin/pip install rewardbench==0.1.4 'setuptools<81'
    rb/bin/python examples/consumers/rewardbench_cli.py REWARD_DIR

It runs in an environment of its own, because rewardbench pins transformers 4.51.0, and imports nothing of
hafrm. rewardbench's default pipeline moves every batch to "cuda"; without a GPU this script ignores that.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from rewardbench.rewardbench import main as rewardbench
from transformers import BatchEncoding


def run(directory: Path) -> float:
    """The largest difference to a golden score, relative to max(1, |score|)."""
    lines = (directory / "golden_scores.jsonl").read_text(encoding="utf-8").splitlines()
    golden = [json.loads(line) for line in lines]
    if not torch.cuda.is_available():
        BatchEncoding.to = lambda self, *_, **__: self
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        # a relative name, because rewardbench joins its output folder and the model's name
        Path("reward").symlink_to(directory)
        data = Path("conversations.jsonl")
        data.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in golden))
        sys.argv = ["rewardbench", "--model", "reward", "--dataset", str(data), "--load_json"]
        sys.argv += ["--not_quantized", "--torch_dtype", "float32", "--output_dir", "out"]
        rewardbench()
        out = Path("out/reward_outputs.jsonl").read_text().splitlines()
        found = [json.loads(line)["results"] for line in out]
    differences = [
        abs(score - row["reward"]) / max(1.0, abs(row["reward"]))
        for score, row in zip(found, golden, strict=True)
    ]
    print(
        f"rewardbench with transformers {transformers.__version__}: {len(golden)} golden scores, largest "
        f"difference {max(differences):.2g}"
    )
    return max(differences)


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve())
