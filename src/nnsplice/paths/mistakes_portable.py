"""Mistakes in portable paths and their short forms: rows of the table in mistakes.py.

    SHORT       short forms, `l5h3`
    ROLES       a role or a value in the wrong position
    NAMES       other names of a role

The rows are tried in this order.
"""

from __future__ import annotations

from nnsplice.errors import RefusedPlace
from nnsplice.paths.mistake import BRACKET, COUNTED, LAYER, POSITION, TAIL, Mistake

SHORT = (
    Mistake(
        r"(?P<at>full)(?P<after>\s*[.\[].*)|(?:encoder|decoder)\.full\b.*",
        "full is the whole model, both towers and every value; it stands alone",
        "full",
        ("full.output", "full[-1]", "full.weight", "encoder.full"),
    ),
    Mistake(
        rf"(?P<at>l)(?P<n>-[0-9]+){TAIL}",
        "short forms count from 0; negative numbers go in brackets",
        "layers[{n}]{after}",
        ("l-1", "L-1.output[-1]"),
    ),
    Mistake(
        rf"(?P<layer>l[0-9]+)\s*h(?P<at>-)(?P<n>[0-9]+){TAIL}",
        "short forms count from 0, negative heads go in brackets",
        "{layer}.heads[-{n}]{after}",
        ("l5h-1", "l5 h-1.q"),
    ),
    Mistake(
        rf"(?P<at>layers?|blocks?)[\s_]*(?P<n>-?[0-9]+){TAIL}",
        "the number of a layer goes in brackets",
        "layers[{n}]{after}",
        ("layer 5", "layers5.attn", "Layer_5", "block 3"),
    ),
)

ROLES = (
    Mistake(
        r"(?P<tower>(?:(?:encoder|decoder)\.)?)(?P<at>(?P<name>attn|mixer|mlp|heads|groups|experts|neurons)\b.*)",
        "{name} is a part of a layer; layers[:] for every layer",
        "{tower}layers[:].{at}",
        ("attn[-1]", "mlp.output", "heads[3]", "decoder.groups[0].k", "experts"),
    ),
    Mistake(
        rf"(?P<layer>.*)\.attn(?P<at>\.o|\.output|\.o\.output)\.heads?(?P<index>{BRACKET})(?:\.output)?{POSITION}",
        "heads live before the output projection; slicing the projected output mixes them",
        "{layer}.heads{index}.output{after}",
        ("layers[5].attn.o.heads[3]", "layers[5].attn.o.heads[3].output[-1]", "l5.attn.output.heads[3]"),
        RefusedPlace,
    ),
    Mistake(
        rf"(?P<layer>.*)\.attn(?P<at>\.)(?P<name>[qkv])\.heads?(?P<index>{BRACKET})(?:\.output)?{POSITION}",
        "{name} of one head is a value of the head: heads{index}.{name}",
        "{layer}.heads{index}.{name}{after}",
        ("layers[5].attn.q.heads[3]", "layers[5].attn.v.heads[0].output[-1]"),
    ),
    Mistake(
        rf"(?P<layer>.*)(?P<at>\.(?:attn|mlp))\.(?P<name>heads|groups|experts|neurons){TAIL}",
        "{name} stand directly under the layer",
        "{layer}.{name}{after}",
        (
            "layers[5].attn.heads[3]",
            "l5.attn.heads[3].q",
            "layers[5].mlp.neurons[7]",
            "layers[5].mlp.experts[:]",
        ),
    ),
    Mistake(
        rf"(?P<head>(?:.*\.)?(?:heads{BRACKET}|l[0-9]+\s*h[0-9]+))\.(?P<at>o)(?:\.output)?{POSITION}",
        "a head has no o of its own; what it hands to the output projection is its output",
        "{head}.output{after}",
        ("layers[5].heads[3].o", "l5h3.o[-1]"),
        RefusedPlace,
    ),
    Mistake(
        rf"(?P<layer>.*?)(?:\.groups{BRACKET}|(?<=\d)\s*g[0-9]+)\.(?P<at>q|pattern){TAIL}",
        "{at} belongs to heads, of which several share a group; a group has k and v",
        "{layer}.heads[:].{at}{after}",
        ("layers[5].groups[0].q", "layers[5].groups[0].pattern[-1]", "l5g0.q", "l5 g0.pattern[-1]"),
    ),
    Mistake(
        rf"(?P<group>.*(?:\.groups{BRACKET}|l[0-9]+\s*g[0-9]+))(?P<at>)(?:\.(?:output|input|mid))?{POSITION}",
        "a group of key/value heads has k and v, and no output of its own",
        "{group}.k{after} or {group}.v{after}",
        ("layers[5].groups[0].output", "layers[5].groups[0][-1]", "l5g0[-1]", "l5 g0.input"),
    ),
    Mistake(
        rf"{LAYER}\.(?:.*)(?P<at>(?<=\.)mid){TAIL}",
        "mid is the residual stream between attention and MLP, a value of the layer",
        "{layer}.mid{after}",
        ("layers[5].attn.mid", "layers[5].heads[3].mid[-1]"),
    ),
    Mistake(
        rf"{LAYER}\.(?P<at>[qkv]){TAIL}",
        "{at} belongs to attention: the whole projection, or one head's part of it",
        "{layer}.attn.{at}{after} or {layer}.heads[:].{at}{after}",
        ("layers[5].q", "l5.k[-1]", "decoder.layers[5].v"),
    ),
    Mistake(
        rf"{LAYER}\.(?:attn\.)?(?P<at>pattern){TAIL}",
        "attention patterns belong to heads",
        "{layer}.heads[:].pattern{after}",
        ("layers[5].pattern", "layers[5].attn.pattern[-1]", "l5.pattern"),
    ),
    Mistake(
        rf"{LAYER}\.(?P<at>o){TAIL}",
        "o is a projection of attention",
        "{layer}.attn.o{after}",
        ("layers[5].o", "l5.o.weight"),
    ),
    Mistake(
        rf"{LAYER}\.(?P<at>gate|up|down|router){TAIL}",
        "{at} is a part of the MLP",
        "{layer}.mlp.{at}{after}",
        ("layers[5].up", "layers[5].router.output[-1]"),
    ),
    Mistake(
        rf"(?P<before>(?:.*\.)?(?P<name>{COUNTED}))(?P<at>)(?P<after>(?:\..*)?)",
        "which {name}? {name}[:] for all",
        "{before}[:]{after}",
        ("layers", "layers.output[-1]", "layers[5].heads", "layers[5].groups.k", "decoder.layers.attn"),
    ),
    Mistake(
        r"(?P<tower>encoder|decoder)(?P<at>)",
        "a tower alone is no site",
        "{tower}.layers[:]",
        ("encoder", "Decoder"),
    ),
    Mistake(
        rf"(?P<value>(?!model\b).*\.(?:output|input|mid|q|k|v|pattern))(?P<at>{BRACKET})(?P<position>{BRACKET})",
        "a portable value is no tuple, and takes one bracket, the position",
        "{value}{position}",
        ("layers[5].output[0][-1]", "layers[5].attn.output[0][-1]", "l5h3.q[0][-1]", 'embed.output[0]["subject"]'),
    ),
    Mistake(
        rf"(?P<place>(?!model\b).*(?:embed|final_norm|attn|mlp|layers{BRACKET}|heads{BRACKET}))(?P<at>{BRACKET})(?P<position>{BRACKET})",
        "a site takes one position",
        "{place}{position}",
        ("embed[0][-1]", "layers[5][0][-1]", "layers[5].attn[0][-1]"),
    ),
)

#: Other names of a role -> the role; without names that start a native path.
_ALIASES = {
    "layer": "layers",
    "block": "layers",
    "blocks": "layers",
    "head": "heads",
    "group": "groups",
    "kv_heads": "groups",
    "expert": "experts",
    "neuron": "neurons",
    "attention": "attn",
    "self_attn": "attn",
    "self_attention": "attn",
    "mamba": "mixer",
    "linear_attn": "mixer",
    "ffn": "mlp",
    "feed_forward": "mlp",
    "embedding": "embed",
    "embeddings": "embed",
    "embed_tokens": "embed",
    "unembedding": "unembed",
    "logits": "unembed",
    "norm": "final_norm",
    "ln_f": "final_norm",
    "ln_final": "final_norm",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "z": "output",
    "resid_pre": "input",
    "resid_mid": "mid",
    "resid_post": "output",
}

#: For each role, a text with an alias as its only mistake.
_SAMPLES = {
    **dict.fromkeys(("layers",), "{}[0].output"),
    **dict.fromkeys(("heads", "groups", "experts", "neurons"), "layers[5].{}[0]"),
    **dict.fromkeys(("attn", "mixer", "mlp", "mid", "input"), "layers[5].{}"),
    **dict.fromkeys(("embed", "unembed", "final_norm"), "{}.output[-1]"),
    **dict.fromkeys(("q", "k", "v", "o"), "layers[5].attn.{}"),
    **dict.fromkeys(("gate", "up", "down"), "layers[5].mlp.{}"),
    "output": "layers[5].heads[3].{}[-1]",
}

NAMES = tuple(
    Mistake(
        rf"(?P<before>(?!model\b)(?:[^\"']*\.)?)(?P<at>{alias}){TAIL}",
        f"{alias} is called {role} here",
        f"{{before}}{role}{{after}}",
        (_SAMPLES[role].format(alias),),
    )
    for alias, role in _ALIASES.items()
)
