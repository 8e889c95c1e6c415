"""Reinforcement learning from reward models: recipes, rewards, PPO of our own, RLOO and GRPO on TRL."""
