"""One backbone, two heads: prompts laid out once, shared-prefix attention, log-probs in chunks, sampling.

Start at `model.HybridModel`: a `layout.Layout` in, rewards and log-probs out. It wraps stock transformers
models without touching their code, and knows nothing of files, recipes or losses.
"""
