"""Training: from a recipe to a run folder with checkpoints and verified, exported models.

Losses and methods are pure functions of one comparison; a step is exact over micro-batches and ranks; the
loop can be resumed bit for bit. Nothing here evaluates on a test set, and nothing depends on how sequences
were packed. Start at `loop.run_training`, then read `step.take_step` and `methods.joint_loss`.
"""
