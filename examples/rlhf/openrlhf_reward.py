"""A hafrm reward model for OpenRLHF, as a reward function or behind a URL.

    export HAFRM_REWARD=runs/haf
    python -m openrlhf.cli.train_ppo_ray --reward.remote_url examples/rlhf/openrlhf_reward.py ...
    python examples/rlhf/openrlhf_reward.py --port 5000     # or a server: POST /get_reward

Give the prompt's messages as JSON in the label (--data.label_key), or train the policy with the reward
model's own chat template. The server listens on this machine alone, one request at a time.
"""

import argparse
import json
import os
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch

from hafrm.errors import HafrmError
from hafrm.rlhf.adapters import openrlhf_rewards
from hafrm.rlhf.rewards import load_scorer
from hafrm.scoring.reward_model import Scorer


@cache
def scorer() -> Scorer:
    """The reward model, loaded when it is first asked."""
    return load_scorer(os.environ["HAFRM_REWARD"])


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
    """What OpenRLHF calls when --reward.remote_url names this file."""
    found = openrlhf_rewards(scorer(), queries, prompts, labels)
    rewards = torch.tensor(found["rewards"])
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"hafrm_reward": rewards}}


def answer(body: Any) -> tuple[int, dict[str, Any]]:
    """Status and reply to the JSON body of POST /get_reward."""
    queries = body.get("query") if isinstance(body, dict) else None
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        return 400, {"error": "query must be a list of texts"}
    prompts = body.get("prompts") or [""] * len(queries)
    labels = body.get("labels") or [""] * len(queries)
    try:
        return 200, openrlhf_rewards(scorer(), queries, prompts, [str(label) for label in labels])
    except (HafrmError, ValueError) as error:
        return 422, {"error": str(error)}


class Handler(BaseHTTPRequestHandler):
    """POST /get_reward."""

    def do_POST(self) -> None:
        """Read a body, answer it."""
        status, reply = 404, {"error": "POST /get_reward"}
        if self.path == "/get_reward":
            try:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, reply = answer(body)
            except (KeyError, TypeError, ValueError) as error:
                status, reply = 400, {"error": f"no JSON object: {error}"}
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    args = parser.parse_args()
    scorer()
    HTTPServer((args.host, args.port), Handler).serve_forever()
