"""Policies trained against reward models: our own PPO, RLOO and GRPO on TRL, and their comparison.

Reward models get text, so policy and reward model may have different tokenizers. Nothing trains on a judge
or a gold reward: these only choose the step that is exported. Start at `train_policy`.
"""
