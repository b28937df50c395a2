"""Mappers from one kind of checkpoint to another, derived from their parts.

scheme              stored tensors on one side, parts on the other
huggingface         the scheme of a transformers model, and of its files
transformerlens     the scheme of TransformerLens
derive              mapper_between: two schemes joined into a mapper
"""
