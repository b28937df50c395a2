"""The logit lens: at the last layer it is the model, at others what the model's own end makes of the state."""

from __future__ import annotations

PROMPTS = ["w3 w4 w5", "w6 w7"]

#: One of each way in which families end: norms, caps, scales, tied weights, biases, streams normalised at their end.
QUICK = ["gpt2", "llama", "gemma2", "cohere", "granite", "olmo2", "phi", "opt", "mixtral", "bloom", "openai-gpt"]
