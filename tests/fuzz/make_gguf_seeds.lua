-- make_gguf_seeds.lua -- tiny GGUF files for the targets to start from: every value type, every tensor type, both versions;
-- vocabularies with a text; models of one layer.
--
--     luajit tests/fuzz/make_gguf_seeds.lua FOLDER      writes FOLDER/fuzz_gguf, fuzz_tokenizer and fuzz_model
local ffi = require "ffi"
local folder = assert(arg[1], "usage: luajit make_gguf_seeds.lua FOLDER")

local function raw(ctype, v) return ffi.string(ffi.new(ctype .. "[1]", v), ffi.sizeof(ctype)) end
local function u32(v) return raw("uint32_t", v) end
local function u64(v) return raw("uint64_t", v) end
local function str(s) return u64(#s) .. s end

local ctypes = { [0] = "uint8_t", "int8_t", "uint16_t", "int16_t", "uint32_t", "int32_t", "float", "uint8_t", nil, nil, "uint64_t", "int64_t", "double" }
local function key(name, type, v) return str(name) .. u32(type) .. (type == 8 and str(v) or raw(ctypes[type], v)) end
local function array(name, type, list)
  local out = {}
  for i, v in ipairs(list) do out[i] = type == 8 and str(v) or raw(ctypes[type], v) end
  return str(name) .. u32(9) .. u32(type) .. u64(#list) .. table.concat(out)
end

-- { name, dims, type, bytes of data: how many, or which }
local function file(version, keys, tensors, align)
  align = align or 32
  local infos, data = {}, ""
  for i, t in ipairs(tensors) do
    data = data .. ("\0"):rep(-#data % align)
    local dims = {}
    for d, v in ipairs(t[2]) do dims[d] = u64(v) end
    infos[i] = str(t[1]) .. u32(#dims) .. table.concat(dims) .. u32(t[3]) .. u64(#data)
    data = data .. (type(t[4]) == "string" and t[4] or ("\1"):rep(t[4]))
  end
  local head = "GGUF" .. u32(version) .. u64(#tensors) .. u64(#keys) .. table.concat(keys) .. table.concat(infos)
  return head .. ("\0"):rep(-#head % align) .. data
end

local all_numbers = {}
for type = 0, 12 do if ctypes[type] then all_numbers[#all_numbers + 1] = key("n." .. type, type, 1) end end
local blocks = { { 0, 1, 4 }, { 1, 1, 2 }, { 30, 1, 2 }, { 2, 32, 18 }, { 3, 32, 20 }, { 6, 32, 22 }, { 7, 32, 24 }, { 8, 32, 34 }, { 10, 256, 84 }, { 11, 256, 110 },
  { 12, 256, 144 }, { 13, 256, 176 }, { 14, 256, 210 }, { 99, 32, 16 } }
local tensors = {}
for i, b in ipairs(blocks) do tensors[i] = { "t" .. b[1], { b[2], 2 }, b[1], 2 * b[3] } end

local seeds = {
  empty = file(3, {}, {}),
  numbers = file(3, all_numbers, {}),
  strings = file(2, { key("general.architecture", 8, "llama"), key("tokenizer.chat_template", 8, "{{ a }}\n\t\1") }, {}),
  arrays = file(3, { array("a.u8", 0, { 1, 2, 3 }), array("a.f32", 6, { 1, 2, 3, 4, 5, 6, 7, 8, 9 }), array("a.str", 8, { "x", "", "\195\169" }), array("a.none", 5, {}) }, {}),
  tensors = file(3, { key("general.alignment", 4, 64) }, tensors, 64),
  dims = file(3, {}, { { "d1", { 8 }, 0, 32 }, { "d2", { 4, 2 }, 0, 32 }, { "d3", { 2, 2, 2 }, 1, 16 }, { "d4", { 1, 2, 2, 2 }, 1, 16 } }),
}

-- ---- vocabularies: bytes and a few pieces; { keys, a text }
local pieces = { "<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA4>", "\226\150\129", "a", "b", "\226\150\129a", "ab", "<|im_start|>" }
local spm = { key("tokenizer.ggml.model", 8, "llama"), array("tokenizer.ggml.tokens", 8, pieces), array("tokenizer.ggml.scores", 6, { 0, 0, 0, 0, 0, 0, -1, -2, -3, -4, -5, 0 }),
  array("tokenizer.ggml.token_type", 5, { 2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 4 }), key("tokenizer.ggml.bos_token_id", 4, 1), key("tokenizer.ggml.eos_token_id", 4, 2) }
local words = { "a", "b", "ab", "\196\160", "\196\160a", "<|im_end|>", "<|im_start|>", "1", "\196\138" }
local function bpe(pre, template)
  return { key("tokenizer.ggml.model", 8, "gpt2"), key("tokenizer.ggml.pre", 8, pre), array("tokenizer.ggml.tokens", 8, words),
    array("tokenizer.ggml.merges", 8, { "a b", "\196\160 a" }), array("tokenizer.ggml.token_type", 5, { 1, 1, 1, 1, 1, 3, 3, 1, 1 }), key("tokenizer.chat_template", 8, template) }
end
local vocabularies = { spm = { spm, "<s> a ab\195\164\n<|im_start|>\255" } }
for pre, template in pairs { ["llama-bpe"] = "<|start_header_id|>", smollm = "<|im_start|>system\nx<|im_end|>", qwen2 = "[INST] <<SYS>>", default = "<start_of_turn>" } do
  vocabularies[pre] = { bpe(pre, template), "a ab  a1\n\n<|im_end|>it's 12345" }
end

-- ---- models of one layer and 32 channels
local function numbers(n) return ("\0\0\128\62\0\0\128\190"):rep(n):sub(1, 4 * n) end          -- 0.25, -0.25
local function model(arch, vocabulary, n_vocab, heads, more)
  local W = 32
  local keys = { key("general.architecture", 8, arch), key("general.name", 8, "tiny") }
  local n = { context_length = 64, embedding_length = W, block_count = 1, feed_forward_length = W, ["attention.head_count"] = heads, ["attention.head_count_kv"] = heads / 2 }
  for k, v in pairs(n) do keys[#keys + 1] = key(arch .. "." .. k, 4, v) end
  keys[#keys + 1] = key(arch .. ".attention.layer_norm_rms_epsilon", 6, 1e-5)
  keys[#keys + 1] = key(arch .. ".attention.sliding_window", 4, 4)
  for _, k in ipairs(vocabulary) do keys[#keys + 1] = k end
  local t = { { "token_embd.weight", { W, n_vocab }, 0, numbers(W * n_vocab) }, { "output_norm.weight", { W }, 0, numbers(W) } }
  local function add(name, dims, quantized)
    local count = dims[1] * (dims[2] or 1)
    t[#t + 1] = { "blk.0." .. name, dims, quantized and 8 or 0, quantized and ("\0\60" .. ("\1\255"):rep(16)):rep(count / 32) or numbers(count) }
  end
  add("attn_q.weight", { W, W }, true)
  add("attn_k.weight", { W, W / 2 })
  add("attn_v.weight", { W, W / 2 })
  add("attn_output.weight", { W, W }, true)
  for _, name in ipairs { "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight" } do add(name, { W, W }, true) end
  for _, name in ipairs { "attn_norm.weight", "ffn_norm.weight" } do add(name, { W }) end
  for name, width in pairs(more) do add(name, { width }) end
  return file(3, keys, t)
end
local D = 8                                                                                        -- four heads
local qk_norm = { ["attn_q_norm.weight"] = D, ["attn_k_norm.weight"] = D }
local post_norm = { ["post_attention_norm.weight"] = 32, ["post_ffw_norm.weight"] = 32 }
local all = { ["attn_q_norm.weight"] = D, ["attn_k_norm.weight"] = D, ["post_attention_norm.weight"] = 32, ["post_ffw_norm.weight"] = 32 }
local models = {
  llama = model("llama", spm, #pieces, 4, {}),
  qwen2 = model("qwen2", bpe("qwen2", ""), #words, 4, { ["attn_q.bias"] = 32, ["attn_k.bias"] = 16, ["attn_v.bias"] = 16 }),
  qwen3 = model("qwen3", bpe("qwen2", ""), #words, 4, qk_norm),
  gemma2 = model("gemma2", spm, #pieces, 4, post_norm),
  gemma3 = model("gemma3", spm, #pieces, 4, all),
}

local function put(target, name, bytes)
  os.execute(("mkdir -p '%s/%s'"):format(folder, target))
  local f = assert(io.open(("%s/%s/%s"):format(folder, target, name), "wb"))
  f:write(bytes)
  f:close()
end
for name, bytes in pairs(seeds) do put("fuzz_gguf", name .. ".gguf", bytes) end
for name, v in pairs(vocabularies) do
  local bytes = file(3, v[1], {})
  put("fuzz_tokenizer", name, raw("uint16_t", #bytes) .. bytes .. v[2])
end
for name, bytes in pairs(models) do put("fuzz_model", name .. ".gguf", bytes) end
