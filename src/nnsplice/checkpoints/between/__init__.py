"""From one kind of checkpoint to another, derived from where each keeps its parts.

scheme              stored tensors on one side, parts on the other
huggingface         the scheme of a transformers model, and of its files
transformerlens     the scheme of TransformerLens
derive              two schemes joined; what cannot be derived is listed
"""
