"""From what people preferred to token ids; no model code."""
