"""Common mistakes in a path, and what to write instead.

    MISTAKES    one row per mistake; the first row whose pattern matches a wrong text gives the error
    diagnose    wrong text -> error, or None if no row matches

Only texts that the grammar refuses come here, so patterns need not exclude correct paths. To cover a new mistake, add a
row with a sample; a test checks that each sample is matched by its own row first. The rows for portable paths are in
mistakes_portable.py; `Mistake` is in mistake.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from nnsplice.errors import PathError
from nnsplice.paths.mistake import BRACKET, COUNTED, POSITION, TAIL, Mistake
from nnsplice.paths.mistakes_portable import NAMES, ROLES, SHORT

_BRACKETS = (
    Mistake(
        r"(?P<before>.*\[)\s*(?P<at>\()(?P<list>[-\d,\s]*)\)\s*(?P<after>\].*)",
        "a list of numbers stands in the brackets without parentheses",
        "{before}{list}{after}",
        ("layers[5].output[(0,4)]", "layers[(0,1)]"),
    ),
    Mistake(
        rf"(?P<before>(?:.*\.)?(?:{COUNTED}|h))(?P<at>\()(?P<index>[^()]*)\)(?P<after>.*)",
        "indices stand in square brackets",
        "{before}[{index}]{after}",
        ("layers(5).output", "layers[5].heads(3)"),
    ),
    Mistake(
        rf"(?P<path>[^(\[\"']*(?:{BRACKET}[^(\[\"']*)*?)(?P<at>\.[^\W\d]\w*\(.*)",
        "a path names a value and calls nothing",
        "{path}",
        ("model.transformer.h[2].output.save()", "layers[5].output[-1].mean(0)"),
    ),
    Mistake(
        r"(?P<before>.*?)(?P<at>\[\s*(?:\[\s*\]\s*)?\])(?P<after>.*)",
        "empty brackets choose nothing; all of them is [:]",
        "{before}[:]{after}",
        ("layers[]", "layers[5].output[ ]", "model.lm_head.output[]", "layers[[]].output"),
    ),
    Mistake(
        r"(?P<before>.*\[)[^\"']*?(?P<at>-?[0-9]*\.[0-9]+|-?[0-9]+\.)(?P<after>[^\[]*\].*)",
        "indices and positions are whole numbers",
        None,
        ("layers[5].output[1.5]", "model.transformer.h[.5]", "layers[2.]"),
    ),
    Mistake(
        r"[^\"']*?(?P<at>[0-9]{19,}).*",
        "a number of more than 18 digits is no index",
        None,
        ("layers[9999999999999999999]", "l9999999999999999999h3"),
    ),
    Mistake(
        r"(?P<before>.*\[[^\]:]*:[^\]:]*):\s*(?P<at>-?0+)\s*(?P<after>\].*)",
        "the step of a slice cannot be 0",
        "{before}{after}",
        ("layers[::0]", "layers[5].output[1:7:0]"),
    ),
    Mistake(
        r"(?P<before>.*\[)(?P<at>[^\[\]\"':]*:[^\[\]\"':]*,|[^\[\]\"':]*,[^\[\]\"':]*:)[^\]]*\].*",
        "a bracket holds a number, a slice or a list of numbers; a position chooses tokens, and has no other axis",
        None,
        ("layers[5].output[:, -1]", "model.lm_head.output[0, :]", "layers[0:3,7]"),
    ),
    Mistake(
        r"(?P<before>.*\[)\s*(?P<at>all|\*|\.\.\.|None)\s*(?P<after>\].*)",
        "all of them is written [:]",
        "{before}:{after}",
        ("layers[all].output", "layers[*]", "model.lm_head.output[...]"),
    ),
    Mistake(
        r"(?P<before>.*\[)(?P<at>[\"'])\s*(?P=at)(?P<after>\].*)",
        "a span needs a name",
        '{before}"subject"{after}',
        ('layers[5].output[""]', "model.lm_head.output['']"),
    ),
    Mistake(
        rf"(?P<before>(?:.*\.)?(?:{COUNTED})\[)\s*(?P<at>[^\W\d]\w*|\"[^\"]*\"|'[^']*')\s*(?P<after>\].*)",
        "{at} is no number; indices are numbers, slices or lists of numbers",
        "{before}:{after}",
        ("layers[i].output", 'layers["subject"]', "layers[5].heads[j]"),
    ),
    Mistake(
        r"(?P<before>.*\[)\s*(?P<at>[^\W\d]\w*)\s*(?P<after>\].*)",
        "the name of a span stands in quotes",
        '{before}"{at}"{after}',
        ("layers[5].output[subject]", "model.lm_head.output[last]"),
    ),
    Mistake(
        r"(?P<before>.*\[\s*[\"'].*[^\\])(?P<at>\\[^\"'\\nrt])(?P<after>.*)",
        r"a backslash in the name of a span is written \\",
        r"{before}\{at}{after}",
        (r'layers[5].output["a\d"]',),
    ),
    Mistake(
        r"(?P<before>.*\[\s*)(?P<quote>[\"'])(?P<name>[^\"'\]]*)(?P<at>)\]?[^\"']*",
        "the quotes are not closed",
        "{before}{quote}{name}{quote}]",
        ('layers[5].output["subject]', "layers[5].output['subject"),
    ),
    Mistake(
        rf"(?P<first>[^\[\],\"']*(?:{BRACKET}[^\[\],\"']*)*?)(?P<at>,)\s*(?P<second>[^\W\d].*)",
        "a text holds one path; several stand in a list",
        None,
        ("layers[5],layers[6]", "l5, l6", "model.lm_head.output[-1], embed"),
    ),
    Mistake(
        rf"(?P<open>[^\[\]]*(?:{BRACKET}[^\[\]]*)*(?P<at>\[)[^\[\]]*)",
        "a bracket is not closed",
        "{open}]",
        ("model.transformer.h[2", "layers[5].output[-1"),
    ),
    Mistake(
        r"(?P<before>.+?)(?P<at>\.)(?P<after>\[.*)",
        "no dot stands before a bracket",
        "{before}{after}",
        ("layers[5].output.[-1]", "model.transformer.h.[2]"),
    ),
    Mistake(
        r"(?P<before>[^\"']*\])(?P<after>(?P<at>[^\W\d])\w*.*)",
        "a dot stands between a bracket and the next name",
        "{before}.{after}",
        ("layers[5]attn", "model.transformer.h[2]output[-1]"),
    ),
    Mistake(
        r"(?P<before>[^\"']+?)(?P<at>\.\.+)(?P<after>[^.].*)",
        "one dot stands between two names",
        "{before}.{after}",
        ("layers[5]..output", "model..lm_head"),
    ),
    Mistake(
        r"(?P<before>.*[^.])(?P<at>\.+)",
        "a name is missing after the dot",
        "{before}",
        ("layers[5].", "model.transformer.", "l5h3."),
    ),
    Mistake(
        rf"(?!.*hook_)(?P<before>(?:.*\.)?(?P<name>h|layers?|blocks?))\.(?P<at>-?[0-9]+){TAIL}",
        "layers go in brackets: {name}[{at}], not {name}.{at}",
        "{before}[{at}]{after}",
        ("model.h.3.output", "model.transformer.h.11.attn.output[-1]", "layers.5.attn", "blocks.5"),
    ),
    Mistake(
        rf"(?P<before>(?:.*\.)?(?P<name>[^\W\d]\w*))\.(?P<at>-?[0-9]+){TAIL}",
        "numbers go in brackets: {name}[{at}]",
        "{before}[{at}]{after}",
        ("model.classifier.0.output", "layers[5].heads.3"),
    ),
)

_NATIVE = (
    Mistake(
        r"(?P<path>(?:transformer|gpt_neox|bert|roberta|lm_head|wte|backbone)(?:[.\[].*)?)",
        "native paths start with model",
        "model.{path}",
        ("transformer.h[2].output[-1]", "lm_head"),
    ),
    Mistake(
        rf"(?P<at>MODEL|Model|self\.model|self|nn_?model|llm){TAIL}",
        "native paths start with model, whatever the variable's name",
        "model{after}",
        ("Model.lm_head.output", "self.model.lm_head.output", "llm.lm_head.output"),
        flags=re.DOTALL,
    ),
    Mistake(
        rf"(?P<before>.*\.)(?P<at>inputs)(?:\[0\]\[0\])?{POSITION}",
        "inputs is everything a module is called with; the one value that enters it is input",
        "{before}input{after}",
        ("model.transformer.h[2].inputs[-1]", "model.lm_head.inputs", "model.lm_head.inputs[0][0]", "layers[5].inputs"),
    ),
    Mistake(
        r"(?P<place>.*\.(?P<name>weight|bias))\s*(?P<at>\[.*)",
        "parameters have no tokens, so {name} takes no position",
        "{place}",
        ("model.transformer.wte.weight[0]", "layers[5].attn.bias[-1]", "embed.weight[3:5]"),
    ),
    Mistake(
        r"model(?P<at>)",
        "model alone is no site; what it returns is its output, and all its parameters are full",
        "model.output",
        ("model",),
    ),
    Mistake(
        r"model\s*(?P<at>\[\s*-?\d+\s*\])\s*\.(?P<after>.*)",
        "the model itself has no index; give parts of a Sequential names: torch.nn.Sequential(OrderedDict(name=..))",
        "model.name.{after}",
        ("model[0].output", "model[2].weight", "model[-1].inner.output[-1]"),
    ),
    Mistake(
        r"model\s*(?P<at>\[.*)",
        "the model itself has no index; positions come after a value",
        "model.output{at}",
        ("model[-1]", 'model["subject"]'),
    ),
    Mistake(
        r"(?P<before>.*\[\s*(?:\"[^\"]*\"|'[^']*')\s*\])\s*(?P<at>\[)(?!\s*-?\d+\s*\]).*",
        "of a span, one token can be asked for, by its number",
        "{before} or {before}[-1]",
        ('layers[5].output["subject"][1:3]', 'model.lm_head.output["a"]["b"]'),
    ),
    Mistake(
        rf"(?P<value>model\b.*\.(?:output|input){BRACKET}{BRACKET})(?P<at>\[.*)",
        "a value takes two brackets at most, the element of a tuple and the position",
        "{value}",
        ("model.transformer.h[2].output[0][1][2]",),
    ),
    Mistake(
        rf"(?P<value>model\b.*\.(?:output|input))(?P<at>{BRACKET})(?P<position>{BRACKET})",
        "before the position stands the number of one element of a tuple",
        "{value}{position} or {value}[0]{position}",
        ("model.transformer.h[2].output[:][-1]", "model.transformer.h[2].output[0,1][-1]"),
    ),
    Mistake(
        rf"(?P<place>model\b[^\"']*{BRACKET})\s*(?P<at>\[)(?P<rest>[^\[\]]*\]\..*)",
        "a name takes one bracket",
        None,
        ("model.transformer.h[2][0].attn.output",),
    ),
    Mistake(
        rf"(?P<place>model\b[^\"']*?{BRACKET})\s*(?P<at>\[)(?P<position>.*)",
        "positions come after a value: {place}.output[{position}",
        "{place}.output[{position}",
        ("model.transformer.h[2][10]", "model.transformer.h[:][-1]", 'model.transformer.h[2]["subject"]'),
    ),
    Mistake(
        r"(?P<place>model\b[^\"']*)(?P<at>\[)\s*(?P<position>[\"'].*)",
        "a span is a position, and positions come after a value: {place}.output[{position}",
        "{place}.output[{position}",
        ('model.transformer["subject"]',),
    ),
)

MISTAKES: tuple[Mistake, ...] = _BRACKETS + _NATIVE + SHORT + ROLES + NAMES

#: The most mistakes in one text that are corrected.
_REPAIRS = 4
#: Longer texts are not matched, as the time of the patterns grows faster than the text.
_LONGEST = 400


def find(text: str) -> tuple[Mistake, re.Match[str]] | None:
    """The first row that matches a wrong text, with its match; None if no row matches."""
    if len(text) > _LONGEST:
        return None
    return next(((row, match) for row in MISTAKES if (match := row.match(text))), None)


def diagnose(text: str, reads: Callable[[str], bool]) -> PathError | None:
    """The error for a wrong text; None if no row matches.

    `reads` tells whether a text is a path: only corrections that are paths are suggested.

    >>> from nnsplice.paths import mistakes, reads
    >>> print(mistakes.diagnose("model.h.3.output", reads))
    layers go in brackets: h[3], not h.3
        model.h.3.output
                ^
      write: model.h[3].output
    """
    found = find(text)
    if found is None:
        return None
    row, match = found
    column = match.start("at") if "at" in match.re.groupindex and match["at"] is not None else 0
    message = row.message.format_map(match.groupdict(""))
    return row.kind(message, path=text, column=column, write=" or ".join(_repaired(row, match, reads)) or None)


def _repaired(row: Mistake, match: re.Match[str], reads: Callable[[str], bool], left: int = _REPAIRS) -> list[str]:
    # A text may have several mistakes, so a correction goes through the table again until it is a path.
    lines: list[str] = []
    for template in (row.write or "").split(" or "):
        line = template.format_map(match.groupdict(""))
        if reads(line):
            lines.append(line)
        elif left and (found := find(line)):
            lines += _repaired(*found, reads, left - 1)
    return lines
