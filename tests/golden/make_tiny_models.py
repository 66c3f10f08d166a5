"""Makes tiny/NAME.gguf, tiny/NAME.logp and tiny/index.json: a random model of every family that core/model.c loads, and what
`transformers` computes with it, eagerly, in float64 (its norms, softmax and RoPE angles stay in float32).

A file is written as llama.cpp's converter writes that family: its keys, its tensor names, the Q and K rows of Llama-like
models permuted, 1 added to Gemma's norms, the frequency factors of Llama 3 as a tensor.  Weights go through their file
format before the reference sees them.  They are scaled so that attention is uneven, soft caps bend, every band of a RoPE scaling
turns by an angle that shows, and the text is longer than a sliding window four times over.

NAME.logp holds f32 [tokens / 3, rounded up][n_vocab]: log p of the token after the first, fourth, seventh …  index.json holds
the text and its ids as the `tokenizers` package makes them.

    pip install torch==2.15.0 transformers==5.23.0 gguf==0.19.0 && python3 tests/golden/make_tiny_models.py
"""
import json
import pathlib
import gguf
import numpy as np
import torch
import transformers as hf
from gguf import GGMLQuantizationType as T, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

OUT = pathlib.Path(__file__).parent / "tiny"
TEXT = "The keys of 1024 tokens,\n\n  in 4 bits: naïve? It's 漢字 🙂 they're read again and again."
SAMPLE = [("the cache keeps the keys and the values that the query reads again and again, and it tells them what it is; "
           "there is another reading of the text that they are read in ") * 8]
WINDOW, STEP = 16, 3
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bpe(pattern, special, ignore_merges, pad_to=0):
    """Byte-level BPE: (tokenizer, tokens, types, merges)."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(SAMPLE, trainers.BpeTrainer(vocab_size=256 + 32, initial_alphabet=alphabet, show_progress=False))
    t.model.ignore_merges = ignore_merges
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    spec = json.loads(t.to_str())["model"]
    tokens = [text for text, _ in sorted(t.get_vocab().items(), key=lambda x: x[1])]
    types = [TokenType.CONTROL if s in special else TokenType.NORMAL for s in tokens]
    while len(tokens) < pad_to:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(TokenType.UNUSED)
    return t, tokens, types, [" ".join(m) for m in spec["merges"]]


def spm(control, prefix):
    """SentencePiece BPE with byte tokens: (tokenizer, tokens, types, scores).  A piece's score falls with its merge's rank."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train_from_iterator(SAMPLE, trainers.BpeTrainer(vocab_size=60, initial_alphabet=list("ï漢"), show_progress=False))
    learnt = json.loads(t.to_str())["model"]
    merges = [tuple(m) for m in learnt["merges"]]
    pieces = ["".join(m) for m in merges]
    chars = [c for c in learnt["vocab"] if len(c) == 1]
    names = [f"<0x{b:02X}>" for b in range(256)]
    tokens = control + names + pieces + chars
    types = [TokenType.UNKNOWN if s == "<unk>" else TokenType.CONTROL for s in control] + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * (len(pieces) + len(chars))
    scores = [0.0] * (len(control) + 256) + [-float(i) for i in range(len(pieces) + len(chars))]
    t = Tokenizer(models.BPE({s: i for i, s in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    t.decoder = decoders.ByteFallback()
    return t, tokens, types, scores


COMMON = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, attn_implementation="eager")
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
MISTRAL = ["<unk>", "<s>", "</s>"]

FAMILIES = {
    "qwen2": dict(arch="qwen2", about="bias on Q, K and V; tied head; vocabulary padded",
        config=lambda v: hf.Qwen2Config(**COMMON, vocab_size=v, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
        tokenizer=("bpe", "qwen2", LLAMA3.replace("{1,3}", ""), CHATML, False, 304), bos=None, eos="<|im_end|>"),
    "qwen3": dict(arch="qwen3", about="norms on Q and K; heads wider than the embedding",
        config=lambda v: hf.Qwen3Config(**COMMON, head_dim=32, vocab_size=v, tie_word_embeddings=False, rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
        tokenizer=("bpe", "qwen2", LLAMA3.replace("{1,3}", ""), CHATML, False, 0), bos=None, eos="<|im_end|>"),
    "llama3": dict(arch="llama", about="RoPE scaling of Llama 3, its three bands between wavelengths 16 and 64",
        config=lambda v: hf.LlamaConfig(**COMMON, head_dim=32, vocab_size=v, tie_word_embeddings=False, rms_norm_eps=1e-5, rope_parameters=dict(rope_type="llama3", rope_theta=10000.0,
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
        tokenizer=("bpe", "llama-bpe", LLAMA3, LLAMA, True, 0), bos="<|begin_of_text|>", eos="<|eot_id|>"),
    "llama": dict(arch="llama", about="bias on every product; linear RoPE scaling; one K/V head per query head",
        config=lambda v: hf.LlamaConfig(**{**COMMON, "num_key_value_heads": 4}, vocab_size=v, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
        tokenizer=("bpe", "llama-bpe", LLAMA3, LLAMA, True, 0), bos="<|begin_of_text|>", eos="<|eot_id|>"),
    "mistral": dict(arch="llama", about="heads wider than the embedding; SentencePiece",
        config=lambda v: hf.MistralConfig(**COMMON, head_dim=32, vocab_size=v, tie_word_embeddings=False, sliding_window=None, rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        tokenizer=("spm", MISTRAL, True), bos="<s>", eos="</s>"),
    "gemma2": dict(arch="gemma2", about="soft caps on scores and logits; a sliding and a global layer",
        config=lambda v: hf.Gemma2Config(**COMMON, head_dim=32, query_pre_attn_scalar=32, vocab_size=v, sliding_window=WINDOW, attn_logit_softcapping=2.5, final_logit_softcapping=4.0,
            layer_types=["sliding_attention", "full_attention"], rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        tokenizer=("spm", GEMMA, False), bos="<bos>", eos="<eos>"),
    "gemma3": dict(arch="gemma3", about="norms on Q and K; five sliding layers, then a global one with a RoPE base and a scaling of its own",
        config=lambda v: hf.Gemma3TextConfig(**{**COMMON, "num_hidden_layers": 7, "hidden_size": 32, "num_key_value_heads": 1}, head_dim=32, query_pre_attn_scalar=32, vocab_size=v,
            sliding_window=WINDOW, layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"], rms_norm_eps=1e-6,
            rope_parameters=dict(full_attention=dict(rope_type="linear", rope_theta=1000000.0, factor=8.0), sliding_attention=dict(rope_type="default", rope_theta=10000.0))),
        tokenizer=("spm", GEMMA, False), bos="<bos>", eos="<eos>"),
    "gemma3-listed": dict(arch="gemma3", about="its sliding layers listed, with a RoPE base out of the ordinary", listed=True,
        config=lambda v: hf.Gemma3TextConfig(**{**COMMON, "num_hidden_layers": 3, "hidden_size": 32}, head_dim=16, query_pre_attn_scalar=16, vocab_size=v,
            sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"], rms_norm_eps=1e-6,
            rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=500000.0), sliding_attention=dict(rope_type="default", rope_theta=500.0))),
        tokenizer=("spm", GEMMA, False), bos="<bos>", eos="<eos>"),
    "yarn": dict(arch="qwen2", about="RoPE scaling of YaRN: stays, ramp and interpolation, and its amplitude",
        config=lambda v: hf.Qwen2Config(**COMMON, vocab_size=v, tie_word_embeddings=False, rms_norm_eps=1e-6, rope_parameters=dict(rope_type="yarn", rope_theta=10000.0,
            factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=0.5)),
        tokenizer=("bpe", "qwen2", LLAMA3.replace("{1,3}", ""), CHATML, False, 0), bos=None, eos="<|im_end|>"),
}
# Formats by the last part of a tensor's name; vectors are f32.
FORMAT = dict(attn_q=T.Q8_0, attn_k=T.F16, attn_v=T.BF16, attn_output=T.Q8_0, ffn_gate=T.Q5_1, ffn_up=T.Q4_1, ffn_down=T.Q8_0, token_embd=T.Q8_0, output=T.F16)


def randomize(model, gemma, rng):
    for name, p in model.named_parameters():
        shape = tuple(p.shape)
        if name.endswith("norm.weight"):
            x = (0 if gemma else 1) + 0.3 * rng.standard_normal(shape)
        elif p.dim() == 1:
            x = 0.5 * rng.standard_normal(shape)
        elif "embed_tokens" in name:
            x = 0.4 * rng.standard_normal(shape)
        else:
            gain = 2 if "q_proj" in name or "k_proj" in name or "lm_head" in name else 1
            x = gain / np.sqrt(shape[-1]) * rng.standard_normal(shape)
        p.data = torch.from_numpy(x.astype(np.float32))


def permute(w, heads):
    """Half-split rows of each head to pairs side by side, as in files of architecture llama."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute(w, heads):
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_tensors(out, model, f, config):
    """Writes every tensor and puts back into the model what its format kept."""
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, f["arch"].upper()), config.num_hidden_layers)
    for name, p in model.named_parameters():
        stem, part = name.rsplit(".", 1)
        target = names.get_name(stem)
        x = p.data.numpy().astype(np.float32)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem.rsplit(".", 1)[-1]) if f["arch"] == "llama" else None
        if heads:
            x = permute(x, heads)
        shift = 1 if f["arch"].startswith("gemma") and name.endswith("norm.weight") else 0
        kind = FORMAT[target.rsplit(".", 1)[-1]] if x.ndim == 2 else T.F32
        x = np.ascontiguousarray(x + np.float32(shift))
        blocks = x if kind == T.F32 else x.astype(np.float16) if kind == T.F16 else gguf.quants.quantize(x, kind)
        out.add_tensor(f"{target}.{part}", blocks, raw_dtype=kind)
        kept = x if kind == T.F32 else blocks.astype(np.float32) if kind == T.F16 else gguf.quants.dequantize(blocks, kind).astype(np.float32)
        kept = kept - np.float32(shift)
        p.data = torch.from_numpy(unpermute(kept, heads) if heads else kept)
    if config.rope_parameters.get("rope_type") == "llama3":
        d = config.head_dim
        plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, d, 2) / d)
        out.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))


def write_keys(out, f, c):
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if getattr(c, "head_dim", None):
        out.add_key_length(d)
        out.add_value_length(d)
    if f["arch"] == "llama":
        out.add_vocab_size(c.vocab_size)
        out.add_rope_dimension_count(d)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    if f["arch"] != "gemma2":                       # the converter leaves Gemma 2's base to the default
        out.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in c.rope_parameters:
        out.add_rope_freq_base_swa(c.rope_parameters["sliding_attention"]["rope_theta"])
    if rope["rope_type"] == "linear":
        out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        out.add_rope_scaling_factor(rope["factor"])
        out.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        out.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        out.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if f["arch"].startswith("gemma"):
        out.add_sliding_window(c.sliding_window)
    if f.get("listed"):                             # as later converters write layers without a period
        out.add_sliding_window_pattern([kind == "sliding_attention" for kind in c.layer_types])
    if f["arch"] == "gemma2":
        out.add_attn_logit_softcapping(c.attn_logit_softcapping)
        out.add_final_logit_softcapping(c.final_logit_softcapping)


def write_tokenizer(out, f):
    """Returns the ids of TEXT and the size of the vocabulary."""
    kind, *rest = f["tokenizer"]
    if kind == "bpe":
        t, tokens, types, merges = bpe(*rest[1:])
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre(rest[0])
        out.add_token_merges(merges)
    else:
        t, tokens, types, scores = spm(*rest)
        out.add_tokenizer_model("llama")
        out.add_tokenizer_pre("default")
        out.add_token_scores(scores)
        out.add_add_space_prefix(rest[1])
        out.add_unk_token_id(tokens.index("<unk>"))
        out.add_add_bos_token(True)
        out.add_add_eos_token(False)
    out.add_token_list(tokens)
    out.add_token_types(types)
    out.add_eos_token_id(tokens.index(f["eos"]))
    if f["bos"]:
        out.add_bos_token_id(tokens.index(f["bos"]))
    ids = t.encode(TEXT, add_special_tokens=False).ids
    return ([tokens.index(f["bos"])] if f["bos"] else []) + ids, len(tokens)


def main():
    OUT.mkdir(exist_ok=True)
    index = {"text": TEXT, "models": []}
    for i, (name, f) in enumerate(FAMILIES.items()):
        path = OUT / f"{name}.gguf"
        out = gguf.GGUFWriter(path, f["arch"])
        out.add_name(f"tiny {name}")
        ids, n_vocab = write_tokenizer(out, f)
        config = f["config"](n_vocab)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomize(model, f["arch"].startswith("gemma"), np.random.default_rng(100 + i))
        write_keys(out, f, config)
        write_tensors(out, model, f, config)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        with torch.no_grad():
            logits = model.double()(torch.tensor([ids])).logits[0].double()
        logp = torch.log_softmax(logits, dim=-1).numpy()
        (OUT / f"{name}.logp").write_bytes(logp[::STEP].astype("<f4").tobytes())
        index["models"].append(dict(name=name, about=f["about"], n_vocab=n_vocab, prefix=" " if f["tokenizer"][0] == "spm" and f["tokenizer"][2] else "", ids=ids))
        print(f"{name:13} {path.stat().st_size:7} bytes, {len(ids)} tokens, {n_vocab} in the vocabulary, log p from {logp.min():.2f} to {logp.max():.2f}, entropy {-(np.exp(logp) * logp).sum(1).mean():.2f}")
    (OUT / "index.json").write_text(json.dumps(index, ensure_ascii=False, indent=1).replace("\n    ", "").replace("\n   ]", "]") + "\n")


if __name__ == "__main__":
    main()
