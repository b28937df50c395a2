"""Messages of Python functions, in the words of a shell."""

from __future__ import annotations

import re

#: A part of a message -> what is written in its place.
IN_A_SHELL: tuple[tuple[str, str], ...] = (
    (r"\n  in: ns\.[\w.]+", ""),
    (r'write: model = ns\.load\("toy"\)', "write: toy"),
    (r'write: align="end".*', "write: --align end of nnsplice trace, which counts tokens from the end"),
    (r"write: Circuit\.top\(result, k\)", "write: --edges N"),
    (r"write: ns\.lens\.direct\(model, prompts, metric, sites\)", "write: nnsplice lens direct"),
    (r"write: ns\.lens\.logit\(model, prompts, sites\)", "write: nnsplice lens logit"),
    (r"write: ns\.lens\.fit\(model, prompts\)", "write: nnsplice lens fit"),
    (r"\b(ablation|by|method|operation|operator|executor)=['\"]([\w*-]+)['\"]", r"--\1 \2"),
    (r"write: max_new_tokens=", "write: --max-new-tokens "),
    (r"\b(answer|wrong)=(?=['\"])", r"--\1 "),
    (r"\bas (answer|wrong)=", r"as --\1"),
    (r"where=['\"]([\w*-]+)['\"]", r"--where \1"),
    (r"'all', 'prompt', 'generated', or ns\.steering.*", "all, prompt, generated, or a token N"),
    (r"\n  write: (lambda logits|circuit\.on\(model\)).*", ""),
)


def in_a_shell(message: str) -> str:
    """The message with options where it has arguments, and without the function that raised it.

    >>> from nnsplice.cli.wording import in_a_shell
    >>> in_a_shell("no such token\\n  write: answer=' Paris'\\n  in: ns.sweep")
    "no such token\\n  write: --answer ' Paris'"
    """
    for part, instead in IN_A_SHELL:
        message = re.sub(part, instead, message)
    return message
