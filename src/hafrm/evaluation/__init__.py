"""How good a reward model is: metrics, their uncertainty, and the verb that computes them."""
