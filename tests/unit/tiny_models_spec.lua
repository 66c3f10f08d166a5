-- Random models of every family, held against transformers: tests/golden/make_tiny_models.py made them and what is expected.
local H = require "helper"
local kv, ffi = H.kv, require("kelvin.ffi").ffi

local FOLDER = H.root .. "/tests/golden/tiny/"
local STEP = 3               -- log p is kept of tokens 1, 4, 7, …
local index = assert(kv.json.read(FOLDER .. "index.json"))

local function expected(name)
  local f = assert(io.open(FOLDER .. name .. ".logp", "rb"))
  local bytes = f:read "*a"
  f:close()
  return ffi.cast("const float*", bytes), #bytes / 4, bytes
end

-- The largest |log p - expected| over the rows that are kept.  logits(t): those after token t, n_vocab floats.
local function worst(entry, logits)
  local want, n = expected(entry.name)
  local v = entry.n_vocab
  local top, at = 0, nil
  for row = 0, n / v - 1 do
    local z = logits(row * STEP)
    local max, sum = -math.huge, 0
    for i = 0, v - 1 do max = math.max(max, z[i]) end
    for i = 0, v - 1 do sum = sum + math.exp(z[i] - max) end
    for i = 0, v - 1 do
      local d = math.abs(z[i] - max - math.log(sum) - want[row * v + i])
      if d > top or d ~= d then top, at = d, row * STEP + 1 end
    end
  end
  return top, at
end

describe("a random model of family", function()
  for _, entry in ipairs(index.models) do
    local m = kv.model(FOLDER .. entry.name .. ".gguf")

    it(entry.name .. " makes the ids of the tokenizers package, and the text again", function()
      local ids = m:tokenize(index.text)
      assert.are.same(entry.ids, ids)
      if m.add_bos then table.remove(ids, 1) end
      assert.are.equal(entry.prefix .. index.text, m:detokenize(ids))
    end)

    it(entry.name .. " in one pass gives transformers' log p to 1e-4: " .. entry.about, function()
      local s = m:session { max_tokens = #entry.ids }
      s:feed(entry.ids, { logits = "all" })
      local all = s:logits()
      local d, at = worst(entry, function(t) return all:_data() + t * entry.n_vocab end)
      assert(d <= 1e-4, ("off by %.3g after token %s"):format(d, at))
    end)

    it(entry.name .. " token by token gives it to 2e-3", function()
      local s, kept = m:session { max_tokens = #entry.ids }, {}
      for t, id in ipairs(entry.ids) do
        s:feed(id)
        kept[t - 1] = s:logits()
      end
      local d, at = worst(entry, function(t) return kept[t]:_data() end)
      assert(d <= 2e-3, ("off by %.3g after token %s"):format(d, at))
    end)

    it(entry.name .. " over a compressed cache is the same on codes and on decoded tiles", function()
      local last = {}
      for i, path in ipairs { "fused", "tile" } do
        local s = m:session { arm = "turboquant-4,sink=2,recent=4", max_tokens = #entry.ids, path = path }
        -- One pass, then one step: rounding that differs from step to step would flip codes, which is another matter.
        s:feed({ unpack(entry.ids, 1, #entry.ids - 1) }, { logits = "none" }):feed(entry.ids[#entry.ids])
        assert.is_true(s:pairs().fraction > 0.3)
        last[i] = s:logits():totable()
      end
      H.close(last[1], last[2], 2e-3)
    end)
  end
end)

-- A copy of a model file with one text in place of another of the same length.
local function patched(name, old, new)
  local f = assert(io.open(FOLDER .. name .. ".gguf", "rb"))
  local bytes = f:read "*a"
  f:close()
  local at = assert(bytes:find(old, 1, true))
  assert(#old == #new)
  local path = H.temporary ".gguf"
  f = assert(io.open(path, "wb"))
  f:write(bytes:sub(1, at - 1), new, bytes:sub(at + #old))
  f:close()
  return path
end

describe("a model file that is not what its architecture says", function()
  after_each(H.cleanup)
  for what, case in pairs {
    ["a tensor that nothing reads"] = { "llama", "blk.0.ffn_down.bias", "blk.0.ffn_down.bits", "tensor 'blk.0.ffn_down.bits' is not part of architecture 'llama' as it is known here" },
    ["a bias that is missing"] = { "qwen2", "blk.1.attn_k.bias", "blk.1.attn_x.bias", "tensor 'blk.1.attn_k.bias' is missing" },
    ["a norm that is missing"] = { "qwen3", "blk.0.attn_q_norm.weight", "blk.0.attn_x_norm.weight", "tensor 'blk.0.attn_q_norm.weight' is missing" },
    ["a RoPE scaling of another kind"] = { "gemma3", "linear", "spiral", "rope scaling 'spiral' is not supported (allowed: none, linear, yarn, Llama 3's factors)" },
    ["an architecture of another kind"] = { "qwen2", "qwen2", "qwen9", "architecture 'qwen9' is not supported (allowed: llama, qwen2, qwen3, gemma2, gemma3)" },
  } do
    it("is refused by name: " .. what, function()
      local message = H.fails(kv.model, patched(case[1], case[2], case[3]))
      assert.is_truthy(message:find(case[4], 1, true), message)
    end)
  end

  it("may leave its window unsaid: Gemma 3 then slides nowhere, Gemma 2 by 4096", function()
    local m = kv.model(patched("gemma3", "attention.sliding_window", "attention.sliding_widow_"))
    for l = 1, m.n_layers do assert.are.equal(0, m:layer(l).sliding_window) end
    assert.are.equal(4096, kv.model(patched("gemma2", "attention.sliding_window", "attention.sliding_widow_")):layer(1).sliding_window)
  end)

  it("tells its layers apart", function()
    local m = kv.model(FOLDER .. "gemma3-listed.gguf")
    assert.are.same({ sliding_window = 16, rope_base = 500, rope_scale = 1 }, m:layer(1))
    assert.are.same({ sliding_window = 0, rope_base = 500000, rope_scale = 1 }, m:layer(2))
    assert.are.same({ sliding_window = 0, rope_base = 1e6, rope_scale = 1 / 8 }, kv.model(FOLDER .. "gemma3.gguf"):layer(6))
  end)
end)

describe("a context beyond the model's training", function()
  local text = (index.text .. " "):rep(16)
  -- Runs fn; returns its warnings, a line each, and its result.
  local function warned(fn)
    local log, lines = require "kelvin.log", {}
    local real = log.warn
    log.warn = function(fmt, ...) lines[#lines + 1] = fmt:format(...) end
    local ok, result = pcall(fn)
    log.warn = real
    assert(ok, result)
    return table.concat(lines, "\n"), result
  end
  local BEYOND = "context of 600 tokens is beyond the 512 that model 'qwen3' was trained for"

  it("is told on stderr once, and stands in every row", function()
    local m = kv.model(FOLDER .. "qwen3.gguf")
    local told, rows = warned(function() return kv.eval { model = m, text = text, context = 600, chunks = 1, arms = { "f16", "q8_0" } } end)
    assert.are.equal(BEYOND, told)
    for _, row in ipairs(rows) do assert.are.same({ BEYOND }, row.warnings) end
    assert.is_truthy(tostring(rows):find("\nwarning: " .. BEYOND .. "\n", 1, true))
    assert.are.equal("", (warned(function() m:session { max_tokens = 600 } end)))
    assert.are.equal(BEYOND, (warned(function() kv.model(FOLDER .. "qwen3.gguf"):session { max_tokens = 600 } end)))
  end)

  it("is not told of one that just reaches it", function()
    local told, rows = warned(function() return kv.eval { model = kv.model(FOLDER .. "qwen3.gguf"), text = text, context = 512, chunks = 1, arms = { "q8_0" } } end)
    assert.are.equal("", told)
    assert.is_nil(rows[1].warnings)
  end)
end)

describe("experiments/key_bias.py", function()
  local function biased(more)
    local path = H.temporary ".gguf"
    local ok = os.execute(("python3 '%s/experiments/key_bias.py' '%sllama3.gguf' '%s' %s"):format(H.root, FOLDER, path, more))
    return (ok == 0 or ok == true) and kv.model(path)
  end

  it("adds a bias to the keys and nothing else", function()
    if os.execute "python3 -c pass" ~= 0 then return pending "there is no python3" end
    local entry
    for _, e in ipairs(index.models) do entry = e.name == "llama3" and e or entry end
    local none, much = biased "--norm 0 --pairs 2", biased "--norm 50 --pairs 2"
    assert.is_true(none.has_kv_bias and much.has_kv_bias and not kv.model(FOLDER .. "llama3.gguf").has_kv_bias)
    local function off(m)
      local s = m:session { max_tokens = #entry.ids }
      s:feed(entry.ids, { logits = "all" })
      local all = s:logits()
      return (worst(entry, function(t) return all:_data() + t * entry.n_vocab end))
    end
    assert(off(none) <= 1e-4, "a bias of norm 0 changes the model")
    assert(off(much) > 1e-3, "a bias of norm 50 does not")
  end)
end)
