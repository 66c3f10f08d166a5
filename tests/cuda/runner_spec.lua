-- Models on a device against the CPU's: tests/golden/tiny has one of every architecture, with transformers' log p.
local H = require "helper"
local kv, K = H.kv, require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local models = require "kelvin.model"

local FOLDER = H.root .. "/tests/golden/tiny/"
local STEP = 3               -- log p is kept of tokens 1, 4, 7, …
local index = assert(kv.json.read(FOLDER .. "index.json"))

local info = ffi.new "kv_device_info"
local function missing(device)
  C.kv_device_query(device, info)
  if info.available ~= 1 then return device == "cuda" and "no CUDA device" or "no emulated device: make emulated" end
end

local function open(entry, o) return models.open(FOLDER .. entry.name .. ".gguf", o) end
local function entry_of(name) for _, e in ipairs(index.models) do if e.name == name then return e end end end

-- The largest |log p - transformers'| over the rows that are kept.  logits(t): those after token t.
local function worst(entry, logits)
  local f = assert(io.open(FOLDER .. entry.name .. ".logp", "rb"))
  local bytes = f:read "*a"
  f:close()
  local want, v, top = ffi.cast("const float*", bytes), entry.n_vocab, 0
  for row = 0, #bytes / 4 / v - 1 do
    local z = logits(row * STEP)
    if z then
      local max, sum = -math.huge, 0
      for i = 0, v - 1 do max = math.max(max, z[i]) end
      for i = 0, v - 1 do sum = sum + math.exp(z[i] - max) end
      for i = 0, v - 1 do
        local d = math.abs(z[i] - max - math.log(sum) - want[row * v + i])
        if d > top or d ~= d then top = d end
      end
    end
  end
  return top
end

local function greedy(session, prompt, n, more)
  local o = { prompt = prompt, max_tokens = n, stop_at_end = false }
  for k, v in pairs(more or {}) do o[k] = v end
  local _, report = session:generate(o)
  return report.ids
end

for _, device in ipairs { "cuda", "emulated" } do
  local lacks = missing(device)
  local function claim(name, fn)
    it(name, function()
      if lacks then pending(lacks) return end
      fn()
    end)
  end

  describe(device .. ": a random model of family", function()
    for _, entry in ipairs(index.models) do
      claim(entry.name .. " gives transformers' log p to 1e-4, in one pass and step by step, and the CPU's greedy tokens", function()
        local m = open(entry, { device = device })
        local n = #entry.ids
        local s = m:session { max_tokens = n }
        s:feed(entry.ids, { logits = "all" })
        local all = s:logits()
        local d = worst(entry, function(t) return all:_data() + t * entry.n_vocab end)
        assert(d <= 1e-4, ("one pass is off by %.3g"):format(d))
        -- Steps: the last few kept rows over a prefix that was fed at once.
        local from = math.floor((n - 8) / STEP) * STEP
        s = m:session { max_tokens = n }
        s:feed({ unpack(entry.ids, 1, from) }, { logits = "none" })
        local kept = {}
        for t = from + 1, n do
          s:feed(entry.ids[t])
          kept[t - 1] = s:logits()
        end
        d = worst(entry, function(t) return kept[t] and kept[t]:_data() end)
        assert(d <= 1e-4, ("steps are off by %.3g"):format(d))
        local prompt = { unpack(entry.ids, 1, 20) }
        assert.are.same(greedy(open(entry, { device = "cpu" }):session { max_tokens = 40 }, prompt, 8), greedy(m:session { max_tokens = 40 }, prompt, 8))
      end)
    end
  end)

  describe(device .. ": a model", function()
    local entry = entry_of "llama3"
    local here = lacks or open(entry, { device = device })
    local cpu = open(entry, { device = "cpu" })

    -- A product's weights and inputs keep 8 bits: 2^-9 of each term, some 14 products deep in a random model.
    claim("in bf16 has the logits of its stored weights to 1e-3 of their square", function()
      local all = {}
      for i, weights in ipairs { "stored", "bf16" } do
        all[i] = open(entry, { device = device, weights = weights }):session { max_tokens = #entry.ids }:feed(entry.ids, { logits = "all" }):logits()
      end
      local d = kv.compare(all[1], all[2])
      assert(d.rel_mse > 0 and d.rel_mse < 1e-3, ("relative squared error %.3g"):format(d.rel_mse))
    end)

    claim("draws the CPU's tokens: the same numbers decide", function()
      for _, how in ipairs { { temperature = 0.8 }, { temperature = 1.5, top_k = 5 }, { temperature = 1, top_p = 0.6 }, { temperature = 2, top_k = 40, top_p = 0.9 }, { temperature = 1, top_k = 1 } } do
        how.seed = 11
        local prompt = { unpack(entry.ids, 1, 12) }
        local want = greedy(cpu:session { max_tokens = 40 }, prompt, 8, how)
        local b = here:batch { n_seqs = 1, max_tokens = 40 }
        b:feed(prompt)
        local ids = b:generate { first = { want[1] }, n_steps = 7, temperature = how.temperature, top_k = how.top_k, top_p = how.top_p, seed = how.seed }
        assert.are.same({ unpack(want, 2) }, ids[1])
        local s = here:session { max_tokens = 40 }
        assert.are.same(want, greedy(s, prompt, 8, how))
        assert.are.equal(entry.n_vocab, #s:logits():totable())
      end
    end)

    claim("gives a sequence of a batch what it gets alone, at lengths of their own, few and many", function()
      for _, n in ipairs { 3, 10 } do      -- up to 8 rows of a product, and more
        local prompts, b = {}, here:batch { n_seqs = n, max_tokens = 40 }
        for i = 1, n do prompts[i] = { unpack(entry.ids, i, i + 11) } end
        b:feed(prompts)
        local first = {}
        for i = 1, n do first[i] = entry.ids[i + 12] end
        C.kv_batch_truncate(b._b, 1, 7)
        local ids = b:generate { first = first, n_steps = 6 }
        for _, i in ipairs { 1, 2, n } do
          local alone = here:session { max_tokens = 40 }
          alone:feed({ unpack(prompts[i], 1, i == 2 and 7 or 12) }, { logits = "none" })
          assert.are.same(greedy(alone, { first[i] }, 6), ids[i], "sequence " .. i .. " of " .. n)
        end
      end
    end)

    claim("is evaluated like on the CPU: exact arms diverge by 0, others by the CPU's amount", function()
      local text = (index.text .. " "):rep(4)
      for _, mode in ipairs { "visibility", "stream" } do
        local function run(m)
          return kv.eval { model = m, text = text, context = 32, chunks = mode == "stream" and 1 or 2, mode = mode, controls = false,
            arms = { exact = { k = "f32", v = "f32", exact = "f32" }, f16 = "f16", q8_0 = "q8_0", turboquant = "k=turboquant-4,v=turboquant-3,sink=2" } }
        end
        local want, got = run(cpu), run(here)
        for i, row in ipairs(got) do
          local w = want[i]
          assert.are.equal(w.arm, row.arm)
          assert.are.equal(device, row.device)
          if row.arm == "exact" then assert.are.equal(0, row.kld.max) assert.are.equal(0, row.kld.min) end
          assert(math.abs(row.kld.mean - w.kld.mean) <= 2e-6 + 0.1 * w.kld.mean, ("%s: KLD %.3g, on the CPU %.3g"):format(row.arm, row.kld.mean, w.kld.mean))
          -- A row beside a border between two codes may fall on its other side: it moves a coarse arm by some of its own error.
          assert(math.abs(math.log(row.ppl / w.ppl)) <= 1e-4 + 0.02 * math.sqrt(w.kld.mean) and math.abs(math.log(row.ppl_ref / w.ppl_ref)) <= 1e-4)
          assert.are.equal(w.compressed_pair_fraction, row.compressed_pair_fraction)
          assert.are.equal(w.n_scored, row.n_scored)
        end
      end
    end)

    claim("taps the CPU's queries, keys and values", function()
      local ids = { unpack(entry.ids, 1, 21) }
      for _, layer in ipairs { 2, "all" } do
        local a, b = cpu:tap { tokens = ids, layer = layer }, here:tap { tokens = ids, layer = layer }
        for _, what in ipairs { "q", "q_pre", "k", "k_pre", "v" } do
          local d = kv.compare(a[what], b[what])
          assert(d.rel_mse < 1e-8, ("%s of layer %s: relative squared error %.3g"):format(what, layer, d.rel_mse))
        end
      end
    end)

    claim("forks, truncates and reads its sequences", function()
      local ids = { unpack(entry.ids, 1, 24) }
      local a, b = cpu:session { arm = "f16,sink=2,recent=4", max_tokens = 64 }, here:session { arm = "f16,sink=2,recent=4", max_tokens = 64 }
      for _, s in ipairs { a, b } do
        s:feed(ids, { logits = "none" })
        s:truncate(20):feed(ids[21])
      end
      H.close(a:logits():totable(), b:logits():totable(), 2e-3)
      local fork = b:fork()
      b:feed(ids[22])
      assert.are.equal(22, b.n_tokens)
      assert.are.equal(21, fork.n_tokens)
      assert.are.same(b:logits():totable(), fork:feed(ids[22]):logits():totable())
      local d = kv.compare(a:read { layer = 1, head = 2, side = "v", last = 21 }, b:read { layer = 1, head = 2, side = "v", last = 21 })
      assert(d.rel_mse < 1e-6, d.rel_mse)
      assert.are.equal(a:pairs().fraction, cpu:session { max_tokens = 4 }:feed(ids[1]) and a:pairs().fraction)
    end)

    claim("says by name what it does not do there, and goes back to the CPU", function()
      local s = here:session { max_tokens = 8 }:feed(5)
      local message = H.fails(s.save, s, H.temporary ".kv")
      assert(message:find("save needs a session on the cpu; this one is on device '" .. device .. "'", 1, true), message)
      message = H.fails(function() open(entry, { device = device, weights = "q4" }) end)
      assert(message:find("weights 'q4' is none of stored, bf16", 1, true), message)
      message = H.fails(function() cpu:batch { n_seqs = 2 } end)
      assert(message:find("is on the cpu; batches run on a device", 1, true), message)
      message = H.fails(function() s:feed { 5, 100000 } end)
      assert(message:find("token 2 is 100000", 1, true), message)
      message = H.fails(function() s:feed { 1, 2, 3, 4, 5, 6, 7, 8 } end)
      assert(message:find("max_tokens=8", 1, true), message)
      local m = open(entry, { device = device })
      local kept = m:session { max_tokens = 8 }
      m:to "cpu"
      assert.is_nil(m.device)
      kept:feed(7)
      assert.are.equal(1, kept.n_tokens)
      assert.are.equal(m:session { max_tokens = 8 }:feed(7):paths():find(device, 1, true), nil)
    end)

    claim("without memory for another cache says so in a line, and what is there goes on", function()
      local s = here:session { max_tokens = 8 }:feed { 5, 6 }
      local message = H.fails(function() here:batch { n_seqs = 256, max_tokens = 2 ^ 24 } end)
      assert(message:find(device, 1, true) and not message:find "\n", message)
      assert.are.equal(3, s:feed(7).n_tokens)
    end)

    claim("of a shape alone decodes at a depth that nobody computed", function()
      local m = kv.synthetic("small", { n_layers = 2, n_heads = 4, n_kv_heads = 2, head_dim = 32, n_embd = 64, n_ff = 96, n_vocab = 300, rope_base = 1e4 }, device)
      local b = m:batch { n_seqs = 2, arm = "f16", max_tokens = 300 }
      b:skip(200)
      local ids, seconds = b:generate { first = { 1, 2 }, n_steps = 3 }
      assert.are.equal(3, #ids[2])
      assert.are.equal(203, b:n_tokens(1))
      assert(seconds > 0)
      local message = H.fails(function() m:to "cpu" end)
      assert(message:find("has a shape only", 1, true), message)
      message = H.fails(function() kv.synthetic("small", { n_layers = 2, n_heads = 3, n_kv_heads = 2, head_dim = 32, n_embd = 64, n_ff = 96, n_vocab = 300, rope_base = 1e4 }, device) end)
      assert(message:find("n_heads=3", 1, true), message)
    end)
  end)
end
