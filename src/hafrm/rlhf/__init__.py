"""Policies trained against reward models: PPO of our own, RLOO and GRPO on TRL, and their comparison.

Rewards are asked for through text, so policy and reward model may have different tokenizers. Never trains
on a judge or a gold reward: these only choose the step that is exported. Start at `train_policy`.
"""
