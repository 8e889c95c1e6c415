"""A few steps of TRL's GRPO or RLOO with an exported reward directory; its rewards are compared with ours.

    python examples/consumers/trl_online.py grpo REWARD_DIR POLICY_DIR
    python examples/consumers/trl_online.py rloo REWARD_DIR POLICY_DIR

TRL loads the directory by itself (`reward_funcs="REWARD_DIR"`). A second reward function with weight 0
records the completions. hafrm scores them too, and each step's mean must equal the one that TRL logs.
"""

import argparse
import tempfile
from statistics import mean
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hafrm import RewardModel

TRAINERS: dict[str, tuple[Any, Any]] = {
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
}
PROMPTS = ["Name a tree.", "What is the sea?", "Say something kind.", "How do I bake bread?"]


def run(kind: str, reward: str, policy: str, steps: int = 3) -> list[tuple[float, float]]:
    """(what TRL logged, what hafrm gives) for each step: the mean reward of its completions."""
    heard: list[list[tuple[Any, str]]] = []

    def listen(prompts: Any, completions: Any, **_: Any) -> list[float]:
        heard.append([(p, c[0]["content"]) for p, c in zip(prompts, completions, strict=True)])
        return [0.0] * len(prompts)

    trainer_class, config_class = TRAINERS[kind]
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=24,
            reward_weights=[1.0, 0.0],
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            model_init_kwargs={"dtype": "float32"},
            seed=0,
        )
        trainer = trainer_class(
            model=policy,
            reward_funcs=[reward, listen],
            args=config,
            train_dataset=Dataset.from_dict(
                {"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]}
            ),
        )
        trainer.train()
        name = trainer.reward_func_names[0]
        logged = [
            entry[f"rewards/{name}/mean"]
            for entry in trainer.state.log_history
            if f"rewards/{name}/mean" in entry
        ]
    model = RewardModel.from_pretrained(reward)
    ours = [mean(model.score(p, response) for p, response in step) for step in heard]
    return list(zip(logged, ours, strict=True))


def main() -> None:
    """Print each step's mean reward by TRL and by hafrm, and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainer", choices=sorted(TRAINERS))
    parser.add_argument("reward", help="exported reward directory")
    parser.add_argument("policy", help="causal LM to start from, with a chat template")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    pairs = run(given.trainer, given.reward, given.policy, given.steps)
    for step, (theirs, ours) in enumerate(pairs, start=1):
        print(f"step {step}: TRL {theirs:.6f}, hafrm {ours:.6f}")
    largest = max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)
    print(f"largest difference {largest:.2g} (relative to max(1, |reward|))")


if __name__ == "__main__":
    main()
