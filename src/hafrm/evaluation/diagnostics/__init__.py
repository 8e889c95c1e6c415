"""What is behind an accuracy: calibration, bias, slices, label noise, representations, consistency."""
