"""Activations: capture pieces of a run, do algebra on them, write them into another run.

saved_activation    SavedActivation, the value
capture             save_activations (inside a trace), capture (around one)
writing             what apply and add_to do: the plan of a write, and the write
updates             walk through sites of a run and change them
derived             attention patterns and single experts
patched             patched_logits
access              which values of a run a list of sites needs
packs               what a capture holds
lookup, tree        which entries a path means; the attribute view
prompts             prompts as token ids in batches of one length, spans
messages, offsets   chat messages as prompts, and where each stands; characters as tokens
folders, data_sets  captures of many prompts in a folder: read, written
storage, display    files; what a notebook shows
"""

from nnsplice.activations.capture import capture, save_activations
from nnsplice.activations.data_sets import capture_to
from nnsplice.activations.messages import chat
from nnsplice.activations.patched import patched_logits
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.activations.updates import updates

__all__ = ["SavedActivation", "capture", "capture_to", "chat", "patched_logits", "save_activations", "updates"]
