-- KV Cache Transform Coding of sessions, on a small random model: tables, stages, blocks, what comes back, and what is refused.
local H = require "helper"
local kv = H.kv

describe("kv.offload", function()
  local m, calib, s, tables
  local N = 150

  local function tokens(n, seed)
    local ids = {}
    for i = 1, n do ids[i] = math.floor(kv.random(seed, 0, i) * m.n_vocab) end
    return ids
  end

  setup(function()
    m = kv.model(H.root .. "/tests/golden/tiny/llama.gguf")
    calib = kv.calibrate { model = m, tokens = tokens(2048, 1), context = 256, chunks = 8, skip = 4 }
    tables = kv.kvtc { calib = calib, ratio = 4, types = "fine" }
    s = m:session { max_tokens = N + 8 }:feed(tokens(N, 2), { logits = "none" })
  end)

  local function back(o) return o:restore(m:session { max_tokens = N + 8 }) end
  local function rows(session, l, h, side, first, last) return session:read { layer = l, head = h, side = side, first = first, last = last } end

  it("keeps sinks and window to f16, and the rest within the error of its bits", function()
    local o = kv.offload { session = s, codec = tables, sink = 4, window = 32, cadence = 16, block = 20 }
    local r = back(o)
    assert.are.equal(N, r.n_tokens)
    assert.are.equal(0, o.n_coded % 16)
    assert.is_true(N - 4 - o.n_coded >= 17 and N - 4 - o.n_coded <= 32)
    for _, side in ipairs { "k", "v" } do
      for _, range in ipairs { { 1, 4 }, { 4 + o.n_coded + 1, N } } do
        assert.is_true(kv.compare(rows(s, 1, 1, side, range[1], range[2]), rows(r, 1, 1, side, range[1], range[2])).max_abs < 4e-3)
      end
      for l = 1, m.n_layers do
        local d = kv.compare(rows(s, l, 1, side, 5, 4 + o.n_coded), rows(r, l, 1, side, 5, 4 + o.n_coded))
        assert.is_true(d.rel_mse > 0 and d.rel_mse < 0.05, ("%s of layer %d: %g"):format(side, l, d.rel_mse))
      end
    end
    assert.is_true(kv.compare(s:fork():feed(tokens(4, 3)):logits(), r:feed(tokens(4, 3)):logits()).rel_mse < 0.02)
  end)

  it("gives the same rows from every stage, and smallest is the smallest", function()
    local first, least, size = nil, math.huge, nil
    for _, stage in ipairs { "raw", "zlib", "lzma", "rans", "smallest" } do
      local o = kv.offload { session = s, codec = tables, window = 16, stage = stage }
      local x = o:read("k", 1)
      first = first or x
      assert.are.equal(0, kv.compare(first, x).max_abs)
      size = o:bytes().codes
      if stage ~= "smallest" then least = math.min(least, size) end
    end
    assert.is_true(size <= least)
  end)

  it("reads any block alone as the same rows of the whole", function()
    local o = kv.offload { session = s, codec = tables, window = 20, block = 16, sink = 3 }
    local r = back(o)
    for b = o.n_blocks, 1, -1 do
      local x = o:read("v", b)
      local first = 3 + (b - 1) * 16 + 1
      local last = math.min(first + 15, 3 + o.n_coded)
      assert.is_true(kv.compare(rows(r, 2, 1, "v", first, last), x:select(1, 2):select(1, 1)).max_abs < 1e-6)
    end
  end)

  it("counts every byte, tables and index too", function()
    local o = kv.offload { session = s, codec = tables, window = 32 }
    local b, r = o:bytes(), o:ratio()
    assert.are.equal(b.total, b.codes + b.exact + b.state + b.shared)
    assert.are.equal(tables.bytes, b.shared)
    assert.is_true(r.tokens >= 3.5 and r.tokens > r.whole and r.whole > r.with_tables)
  end)

  it("loses less with more bits, and more when components are only cut off", function()
    local function error_of(o)
      o.calib = calib
      local x = kv.offload { session = s, codec = kv.kvtc(o), window = 16, block = 200 }:read("v", 1)
      local want = kv.tensor.zeros(x:shape())
      for l = 1, m.n_layers do
        for h = 1, m.n_kv_heads do
          local from, to, n = rows(s, l, h, "v", 5, 4 + x:shape()[3]):_data(), want:select(1, l):select(1, h):_data(), x:shape()[3] * m.head_dim
          for i = 0, n - 1 do to[i] = from[i] end
        end
      end
      return kv.compare(want, x).rel_mse
    end
    local eight, four = error_of { ratio = 8 }, error_of { ratio = 4 }
    assert.is_true(four < eight)
    assert.is_true(eight < error_of { ratio = 8, types = "truncate" })
  end)

  it("takes up a session that went on, and leaves coded blocks as they are", function()
    local part = m:session { max_tokens = N + 8 }:feed(tokens(90, 2), { logits = "none" })
    local o = kv.offload { session = part, codec = tables, sink = 4, window = 32, cadence = 16, block = 20 }
    local before, first, blocks = o.n_coded, o:read("k", 2), o.n_blocks
    local ids = tokens(N, 2)
    o:extend(part:feed({ unpack(ids, 91, N) }, { logits = "none" }))
    assert.is_true(o.n_coded > before and o.n_coded % 16 == 0 and N - 4 - o.n_coded <= 32 and o.n_blocks > blocks)
    assert.are.equal(0, kv.compare(first, o:read("k", 2)).max_abs)
    local at = 5
    for b = 1, o.n_blocks do
      local from, to = o:range(b)
      assert.are.equal(at, from)
      at = to + 1
    end
    assert.are.equal(4 + o.n_coded + 1, at)
    local r = back(o)
    assert.are.equal(N, r.n_tokens)
    assert.is_true(kv.compare(s:fork():feed(tokens(4, 3)):logits(), r:feed(tokens(4, 3)):logits()).rel_mse < 0.02)
    assert.has_error(function() o:extend(m:session { max_tokens = 8 }:feed { 1, 2 }) end)
  end)

  it("brings back what sliding layers still hold", function()
    local g = kv.model(H.root .. "/tests/golden/tiny/gemma3.gguf")
    local function ids(n, seed)
      local out = {}
      for i = 1, n do out[i] = math.floor(kv.random(seed, 0, i) * g.n_vocab) end
      return out
    end
    local slides
    for l = 1, g.n_layers do slides = slides or g:layer(l).sliding_window > 0 and g:layer(l).sliding_window end
    assert.is_true(slides and slides < 100)
    local c = kv.calibrate { model = g, tokens = ids(2048, 1), context = 256, chunks = 8, skip = 4 }
    local long = g:session { max_tokens = N + 8 }:feed(ids(N, 2), { logits = "none" })
    local o = kv.offload { session = long, codec = kv.kvtc { calib = c, ratio = 2, types = "fine" }, sink = 4, window = 16, cadence = 1, block = 20 }
    local r = o:restore(g:session { max_tokens = N + 8 })
    assert.is_true(kv.compare(long:fork():feed(ids(4, 3)):logits(), r:feed(ids(4, 3)):logits()).rel_mse < 0.01)
    -- Counted against what an f16 cache would hold, so window rows that its layers had let go of are a loss: 16 of 150 in six of seven layers.
    assert.is_true(o:ratio().whole < 1)
  end)

  it("makes a basis per head, of keys as cached, and by randomized SVD", function()
    local function error_of(o)
      o.calib, o.ratio, o.types = calib, 4, "fine"
      local t = kv.kvtc(o)
      local x = kv.offload { session = s, codec = t, window = 16, block = 200 }:read("k", 1)
      local rows_1 = rows(s, 1, 1, "k", 5, 4 + x:shape()[3])
      return kv.compare(rows_1, x:select(1, 1):select(1, 1)).rel_mse, t
    end
    local undone = error_of {}
    assert.is_true(undone < error_of { rope = false })
    assert.is_true(error_of { layers = 1, heads = 1 } < 0.2)
    local gram, tables_gram = error_of { rank = 24 }
    local random, tables_random = error_of { rank = 24, svd = "randomized" }
    assert.are.equal(tables_gram.rank_k, tables_random.rank_k)
    assert.is_true(math.abs(random / gram - 1) < 0.02, ("gram %g, randomized %g"):format(gram, random))
    local shared = kv.kvtc { basis = tables, ratio = 8, types = "fine" }
    local own = kv.kvtc { calib = calib, ratio = 8, types = "fine" }
    assert.are.equal(own.bytes, shared.bytes)
    assert.are.equal(0, kv.compare(kv.offload { session = s, codec = own, window = 16 }:read("v", 1), kv.offload { session = s, codec = shared, window = 16 }:read("v", 1)).max_abs)
  end)

  it("refuses what does not fit, naming it", function()
    local function refused(text, f)
      local ok, err = pcall(f)
      assert.is_false(ok)
      assert.matches(text, tostring(err))
    end
    refused("codec 'kvtc%-9x' is none of", function() kv.offload { session = s, codec = "kvtc-9x", calib = calib } end)
    refused("stage 'gzip' is none of", function() kv.offload { session = s, codec = tables, stage = "gzip" } end)
    refused("needs an empty session", function() kv.offload { session = s, codec = tables }:restore(s:fork()) end)
    refused("none leaves", function() kv.offload { session = s, codec = tables, window = 4096 } end)
    refused("unknown option 'types_k'", function() kv.kvtc { calib = calib, types_k = 1 } end)
    refused("bits=0 is outside 1..8", function() kv.kvtc { calib = calib, types = "uniform" } end)
    refused("heads=9 is outside", function() kv.kvtc { calib = calib, heads = 9 } end)
    refused("level=12 is outside 1..9", function() kv.offload { session = s, codec = tables, stage = "zlib", level = 12 } end)
    refused("types='int3' is none of", function() kv.kvtc { calib = calib, types = "int3" } end)
    refused("ratios 1 and 1 are outside", function() kv.kvtc { calib = calib, ratio = 1 } end)
    refused("layers=99 is outside", function() kv.kvtc { calib = calib, layers = 99 } end)
    local other = kv.model(H.root .. "/tests/golden/tiny/llama3.gguf")
    refused("another model", function() kv.offload { session = other:session { max_tokens = 300 }:feed(tokens(200, 4), { logits = "none" }), codec = tables } end)
  end)
end)
