"""What is behind a reward model's accuracy: calibration, style bias, slices, label noise, representations.

Also whether a model's two heads agree, and which comparisons to read. Nothing here trains or selects, and
ties are left out everywhere. Start with `model_runs.diagnose`; `diagnosis` holds its result, without torch.
"""
