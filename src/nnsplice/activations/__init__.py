"""Activations: capture pieces of a run, do algebra on them, write them into another run.

saved_activation        `SavedActivation`, the value
capture                 `save_activations` (inside a trace), `capture` (around one)
writing, write_plan     what `apply` and `add_to` do: the write, and its plan
updates                 walk through sites of a run and change them
patched                 `patched_logits`
access                  the values of a run that contain a list of sites
derived, features       attention patterns and single experts; features of SAEs
packs                   the content of a capture
lookup, tree            the entries of a path; the attribute view
rows, algebra           rows of a capture; its arithmetic
encoding, prompts       prompts in any form as token ids, in batches of one length
messages, named_spans   chat messages as prompts; named spans of tokens
images, image_inputs, sounds, extra_inputs    inputs of a prompt besides its token ids
capture_folder          `capture_to`: captures of many prompts, written into a folder
activation_folder       `ActivationFolder`: the same, read a file at a time
storage, display        files; text and HTML for notebooks
remote                  captures and writes on nnsight's remote service
"""

from nnsplice.activations.capture import capture, save_activations
from nnsplice.activations.capture_folder import capture_to
from nnsplice.activations.messages import chat
from nnsplice.activations.patched import patched_logits
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.activations.updates import updates

__all__ = ["SavedActivation", "capture", "capture_to", "chat", "patched_logits", "save_activations", "updates"]
