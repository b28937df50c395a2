"""Where families of transformers keep their parts, as rows of names. No logic.

Recognition goes by structure: it looks for modules with these names and checks that their shapes fit together. So the
rows of different families mix, and a decoder that nobody listed is read as long as its parts have known names. The
config's `model_type` decides only where two families with the same names and shapes differ.
"""

from __future__ import annotations

from nnsplice.atlas.layouts import LayoutKind, Role

#: Attributes of modules and configs that recognition may ask for.
FACTS = (
    "num_heads",
    "n_heads",
    "n_head",
    "num_attention_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "num_layers",
    "num_hidden_layers",
    "num_hidden_groups",
    "inner_group_num",
    "use_parallel_residual",
    "parallel_attn",
    "new_decoder_architecture",
    "do_layer_norm_before",
    "residual_multiplier",
    "residual_scale",
    "is_kv_shared_layer",
    "store_full_length_kv",
    "layer_type",
    "v_head_dim",
    "multi_query",
    "model_type",
    "in_features",
    "out_features",
    "num_experts",
    "num_local_experts",
)

#: Where an adapter or a compiler keeps the layer that it wraps.
WRAPPED = ("base_layer", "original_module", "_orig_mod")

# -- attention ---------------------------------------------------------------------------------------------------------

#: Children of an attention module.
Q = (
    "q_proj",
    "q_proj.linear",
    "query",
    "q",
    "q_lin",
    "Wq",
    "wq",
    "project_q",
    "to_q",
    "query_proj",
    "q_b_proj",
    "q_gate_proj",
)
K = ("k_proj", "k_proj.linear", "key", "k", "k_lin", "Wk", "wk", "project_k", "to_k", "key_proj")
V = ("v_proj", "v_proj.linear", "value", "v", "v_lin", "Wv", "wv", "project_v", "to_v", "value_proj")
#: Attention (start of the class name) in which a gate of the slice's width stands behind each query.
GATED = ("Qwen3Next", "Qwen3_5", "Qwen4Exp", "AXK2")
#: Latent attention: one layer makes keys and values of each head from a vector that is common to all of them ...
LATENT = ("kv_b_proj",)
#: ... and these make that vector, the one that queries come from, and the part of the key that all heads share.
LATENTS = ("q_a_proj", "kv_a_proj_with_mqa")
#: The output projection, inside the attention module or beside it (BERT).
O = ("o_proj", "o_proj.linear", "out_proj", "c_proj", "dense", "o", "out_lin", "attention_out", "wo", "Wo", "to_out")
O_BESIDE = ("output.dense", *O)

#: One layer for q, k and v -> how its axis is laid out.
FUSED: dict[str, LayoutKind] = {
    "c_attn": "concat",
    "qkv_proj": "concat",
    "Wqkv": "concat",
    "W_pack": "concat",
    "qkv": "concat",
    "query_key_value": "grouped",
}
#: Where the name alone would be wrong: (class of the attention module starts with, layout).
FUSED_BY_CLASS: dict[str, LayoutKind] = {"CodeGen": "quartered", "MiniMaxLightning": "interleaved"}

#: Parameters of the attention module with one number per head.
PER_HEAD = ("sinks", "gate_bias")
#: Layers of the attention module whose output scales the heads' own: one number for each column, or for each head.
HEAD_GATES = ("gate_proj", "output_gate", "g_proj")
#: Layers of the attention module that give every head an equal share of their output: queries of relative positions.
HEAD_ROWS = ("r_proj",)
#: Layers behind a projection whose rows go to the key/value heads in equal shares -> the role that they belong to.
GROUP_ROWS = {"k_sconv.conv1d": "k", "v_sconv.conv1d": "v"}
#: Norms behind the projections of queries and keys. One that is as wide as all heads of a role is theirs together.
ROLE_NORMS: dict[str, Role] = {"q_norm": "q", "k_norm": "k"}
#: What all heads of a layer have in common, beside norms and parameters of one number; no head owns any of it.
SHARED_BY_HEADS = ("relative_attention_bias", "rel_logits_proj")
#: Attention whose heads are not plain, told by a parameter of its own: the name -> how its heads share what they read.
MIXED_HEADS = {
    "lambda_q1": "attention is differential: a slice subtracts two softmaxes over values that several heads share",
    "dt_proj": "which tokens a head attends to is chosen from the values of all heads",
}
#: The output projection's bias, where the attention module keeps it; it is added outside of that module.
O_BIAS = ("dense_bias",)

#: Modules that keep their projections as parameters (TransformerLens): role -> (name, axis of heads or neurons).
STACKED_ATTENTION: dict[str, tuple[tuple[str, int], ...]] = {
    "q": (("W_Q", 0), ("b_Q", 0)),
    "k": (("W_K", 0), ("_W_K", 0), ("b_K", 0), ("_b_K", 0)),
    "v": (("W_V", 0), ("_W_V", 0), ("b_V", 0), ("_b_V", 0)),
    "o": (("W_O", 0),),
}
STACKED_MLP: dict[str, tuple[tuple[str, int], ...]] = {
    "up": (("W_in", 1), ("b_in", 0)),
    "gate": (("W_gate", 1),),
    "down": (("W_out", 0),),
}
#: What belongs to these modules as a whole.
STACKED_BIASES = ("b_O", "b_out")
#: The matrix of a table or a layer, by the name of its parameter.
MATRICES = ("weight", "W_E", "W_U")

#: Attention that reads another tower; it stands beside the block's own and is not `attn`.
CROSS = frozenset(
    {"encoder_attn", "crossattention", "EncDecAttention", "cross_attn", "inter_attention", "cross_attention"}
)

#: What mixes tokens in a layer without such attention: state spaces, linear attention, convolutions; sought in the
#: layer and in its parts.
MIXERS = (
    "mixer",
    "mamba",
    "linear_attn",
    "conv",
    "short_conv",
    "temporal_block",
    "mlstm_layer",
    "attention",
    "self_attn",
    "self_attention",
)

#: What attention says of itself that reads the keys and values of an earlier layer. That is the last one before it that
#: says the second, of those that say the same third.
READS_KV, STORES_KV, KIND_OF_KV = "is_kv_shared_layer", "store_full_length_kv", "layer_type"

#: Which element of the attention module's output holds the probabilities.
PATTERN_ITEM = {"SelfAttention": 2, "EncDecAttention": 2}
PATTERN_ITEM_DEFAULT = 1

#: Who tells the number of heads: the attention module first, then the config.
N_HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head")
N_HEADS_TOWER = {"encoder": ("encoder_attention_heads",), "decoder": ("decoder_attention_heads",)}

# -- MLP ---------------------------------------------------------------------------------------------------------------

UP = (
    "up_proj",
    "c_fc",
    "fc_in",
    "fc1",
    "dense_h_to_4h",
    "wi_1",
    "wi",
    "intermediate.dense",
    "ffn",
    "lin1",
    "w3",
    "w1",
    "w_in.w_1",
    "0",
)
DOWN = (
    "down_proj",
    "c_proj",
    "fc_out",
    "fc2",
    "dense_4h_to_h",
    "wo",
    "output.dense",
    "ffn_output",
    "lin2",
    "w2",
    "Wo",
    "w_out",
    "2",
)
GATE = ("gate_proj", "wi_0", "w1", "w_in.w_0")
#: Gate and up in one layer, gate first.
GATE_UP = ("gate_up_proj", "Wi")
EXPERTS = ("experts",)
ROUTER = ("gate", "router", "router.gate", "gate.wg")
#: A dense MLP that stands beside the experts and adds to them.
MLP_BESIDE = ("shared_mlp",)
#: Where nothing inside of it is known: the MLP as a whole.
MLP_WHOLE = ("mlp", "ffn", "feed_forward")
#: Parameters of a fused experts module, expert axis first.
EXPERT_PARTS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}

# -- norms -------------------------------------------------------------------------------------------------------------

#: Blocks that normalise what a branch adds: (norm after attention, norm after the MLP). The first pair found wins.
SANDWICH = (
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_attention_layernorm", "post_mlp_layernorm"),
    ("post_operator_norm", "post_ffn_norm"),
)
#: The norm before the MLP, whose input is the stream; names that a sandwich row already used are passed over.
PRE_MLP = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "pre_ff_layernorm",
    "channel_pre_norm",
    "post_attention_layernorm",
    "ln_2",
    "norm_2",
    "layernorm2",
    "norm2",
    "ln2",
    "ffn_norm",
    "feedforward_layernorm",
    "mlp_norm",
    "final_layer_norm",
    "post_attention_norm",
)
#: Blocks that normalise the stream itself after the branch: the norm after attention (its output is `mid`).
POST_ATTENTION = ("encoder_attn_layer_norm", "self_attn_layer_norm", "sa_layer_norm", "ln_1")
#: Same names as the pre-norm families, other order; only the model type tells.
POST_NORM_TYPES = frozenset(
    {"bart", "plbart", "mvp", "marian", "blenderbot-small", "trocr", "openai-gpt", "distilbert"}
)
#: Norms that make a block parallel by being there together.
PARALLEL_NORMS = (("ln_attn", "ln_mlp"),)

#: Blocks (start of the class name) that mix stream and branches in a way of their own, so that no module's output is
#: what is added.
NOT_ADDITIVE = ("MiniMaxDecoder",)

#: Layers (start of the class name) of which no part is what its name would say, and why.
REFUSED = {
    "XLNetLayer": "tokens stand before prompts in it, and two streams run through its layers",
    "ProphetNetDecoderLayer": "the tokens run through its layers several times side by side, once for each token ahead",
    "ReformerLayer": "two streams run through its layers, and neither is what a layer adds to",
    "DoryDecoderLayer": "some of its layers run several times in one pass, which the number of a layer does not tell",
    "LongcatFlashDecoderLayer": "each of its layers has two attentions and two MLPs, with experts across them",
}

#: Numbers that scale a branch in code, where no module's output is what is added.
SCALES = ("residual_multiplier", "residual_scale")

# -- models whose layers are no modules ----------------------------------------------------------------------------

#: The list of attentions -> the lists beside it: MLPs, norms after attention, norms after the MLP (XLM).
SPLIT_STACKS = {"attentions": ("ffns", "layer_norm1", "layer_norm2")}

# -- the model ---------------------------------------------------------------------------------------------------------

#: Who tells the number of layers of the text's tower.
N_LAYERS = ("num_hidden_layers", "num_layers")
#: Relative to the module that holds the list of blocks, or to one of its parents.
EMBED = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embed_in",
    "embeddings.word_embeddings",
    "tokens_embed",
    "embeddings.tok_embeddings",
    "tok_embeddings",
    "embed",
    "embedding",
    "shared",
    "input_embedding",
    "embeddings",
    "w",
)
#: Learned positions, a row for each: a longer prompt cannot run.
POSITIONS = ("wpe", "position_embeddings", "embed_positions", "pos_embed")
FINAL_NORM = (
    "norm",
    "ln_f",
    "embedding_norm",
    "final_layer_norm",
    "final_layernorm",
    "norm_f",
    "layer_norm",
    "ln_final",
    "final_norm",
)
UNEMBED = (
    "lm_head.decoder",
    "lm_head",
    "embed_out",
    "cls.predictions.decoder",
    "predictions.decoder",
    "output_projection",
    "generator_lm_head",
    "pred_layer.proj",
    "proj_out",
    "unembed",
    "head",
)
#: ModelParts of a prefix that mark a tower for something else than text.
NOT_TEXT = frozenset(
    {
        "vision_tower", "vision_model", "visual", "vision_encoder", "video_tower", "image_tower", "image_encoder",
        "audio_tower", "audio_encoder", "speech_encoder", "codec_model",
    }
)  # fmt: skip
#: ModelParts of a prefix that mark a tower for text, among towers without a mark.
TEXT = frozenset({"language_model", "text_model", "text_decoder"})
