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
    for _, stage in ipairs { "raw", "packed", "zlib", "lzma", "rans", "smallest" } do
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
          local from, to = rows(s, l, h, "v", 5, 4 + x:shape()[3]), want:select(1, l):select(1, h)
          for t = 1, x:shape()[3] do for d = 1, m.head_dim do to:set(t, d, from:get(t, d)) end end
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
    assert.is_true(o:ratio().tokens > 1.4 and o:ratio().tokens < 2.1)       -- of what an f16 cache would still hold
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

  it("undoes RoPE however it is scaled and laid out: bases from keys before RoPE fit rows read from the cache", function()
    -- Pairs side by side in the file with linear scaling, Llama 3's factors, YaRN, and only half of the channels turned.
    local path = os.tmpname()
    local f = assert(io.open(H.root .. "/tests/golden/tiny/mistral.gguf", "rb"))
    local text = f:read "*a"
    f:close()
    local at = select(2, text:find("llama.rope.dimension_count", 1, true))
    assert.are.equal("\4\0\0\0\32\0\0\0", text:sub(at + 1, at + 8))
    f = assert(io.open(path, "wb"))
    f:write(text:sub(1, at + 4), "\16", text:sub(at + 6))
    f:close()
    for _, file in ipairs { H.root .. "/tests/golden/tiny/llama.gguf", H.root .. "/tests/golden/tiny/llama3.gguf", H.root .. "/tests/golden/tiny/yarn.gguf", path } do
      local g = kv.model(file)
      local ids = {}
      for i = 1, 1200 do ids[i] = math.floor(kv.random(5, 0, i) * g.n_vocab) end
      local c = kv.calibrate { model = g, tokens = ids, context = 300, chunks = 3, skip = 4 }
      local long = g:session { max_tokens = 300 }:feed({ unpack(ids, 901, 1200) }, { logits = "none" })
      -- Few components: rows whose RoPE were not undone just so would not lie where the basis is.
      local o = kv.offload { session = long, codec = kv.kvtc { calib = c, ratio = 2, types = "fine", layers = 1 }, sink = 4, window = 16, cadence = 1, block = 300 }
      local x = o:read("k", 1)
      local n = x:shape()[3]
      local whole = kv.compare(long:read { layer = 2, head = 2, side = "k", first = 5, last = 4 + n }, x:select(1, 2):select(1, 2)).rel_mse
      assert.is_true(whole < 2e-3, ("%s: %g"):format(file, whole))
      local few = kv.kvtc { calib = c, ratio = 2, types = "fine", layers = 1, rank = 16 }
      local cached = kv.kvtc { calib = c, ratio = 2, types = "fine", layers = 1, rank = 16, rope = false }
      local function lost(t)
        local y = kv.offload { session = long, codec = t, sink = 4, window = 16, cadence = 1, block = 300 }:read("k", 1)
        return kv.compare(long:read { layer = 2, head = 2, side = "k", first = 5, last = 4 + n }, y:select(1, 2):select(1, 2)).rel_mse
      end
      assert.is_true(lost(few) < 0.9 * lost(cached), ("%s: %g undone, %g as cached"):format(file, lost(few), lost(cached)))
    end
    os.remove(path)
  end)

  it("counts layers and heads equally if asked, and a file keeps it", function()
    local path = os.tmpname()
    local t = kv.kvtc { calib = calib, ratio = 8, types = "fine", equal = true }
    local o = kv.offload { session = s, codec = t, window = 16, block = 200 }
    kv.save(path, o)
    local again = kv.load(path, { model = m })
    assert.are.equal(t.bytes, again.tables.bytes)
    assert.are.equal(0, kv.compare(o:read("v", 1), again:read("v", 1)).max_abs)
    os.remove(path)
    local x = o:read("v", 1)
    assert.is_true(kv.compare(rows(s, 1, 1, "v", 5, 4 + x:shape()[3]), x:select(1, 1):select(1, 1)).rel_mse < 0.2)
  end)

  it("is found among the codecs, with what it is for", function()
    local found
    for _, row in ipairs(kv.codec.list()) do found = found or row.name == "kvtc-16x" and row end
    assert.are.equal("offload", found.kind)
    assert.matches("not for %-%-arm", tostring(kv.codec.describe "kvtc-16x"))
  end)

  describe("in files", function()
    local path = os.tmpname()
    teardown(function() os.remove(path) os.remove(path .. ".tables") end)

    local function read_file()
      local f = assert(io.open(path, "rb"))
      local text = f:read "*a"
      f:close()
      return text
    end

    it("comes back the same, rows, tokens and sizes, with its tables or beside them", function()
      for _, types in ipairs { "paper", "fine", "e4m3" } do
        local t = kv.kvtc { basis = tables, ratio = 6, types = types }
        local o = kv.offload { session = s, codec = t, sink = 3, window = 32, block = 20 }
        kv.save(path, o)
        local again = kv.load(path, { model = m })
        assert.are.equal(t:digest(), again.tables:digest())
        assert.are.equal(tostring(o), tostring(again))
        assert.are.equal(types, again.tables.about.types)
        for _, side in ipairs { "k", "v" } do
          for b = 1, o.n_blocks do assert.are.equal(0, kv.compare(o:read(side, b), again:read(side, b)).max_abs) end
        end
        local r = back(again)
        assert.are.same(s.ids, r.ids)
        assert.are.equal(0, kv.compare(back(o):feed(tokens(4, 3)):logits(), r:feed(tokens(4, 3)):logits()).max_abs)
        kv.save(path .. ".tables", t)
        kv.save(path, o, { tables = false })
        local alone = kv.load(path .. ".tables", { model = m })
        assert.are.equal(t.bytes, alone.bytes)
        again = kv.load(path, { tables = alone })
        assert.are.equal(0, kv.compare(o:read("k", 1), again:read("k", 1)).max_abs)
        assert.is_true(#read_file() < o:bytes().total - t.bytes + 8192, "a file without tables is not small")
      end
    end)

    it("goes on after loading: extend codes what left the window since", function()
      local part = m:session { max_tokens = N + 8 }:feed({ unpack(tokens(N, 2), 1, 90) }, { logits = "none" })
      kv.save(path, kv.offload { session = part, codec = tables, sink = 4, window = 32, cadence = 16, block = 20 })
      local o = kv.load(path, { model = m })
      local r = o:restore(m:session { max_tokens = N + 8 }):feed({ unpack(tokens(N, 2), 91, N) }, { logits = "none" })
      local before = o.n_coded
      assert.is_true(o:extend(r).n_coded > before)
      assert.are.equal(N, o.n_tokens)
    end)

    it("is refused with other tables, another model, or none, naming what is wrong", function()
      local function refused(text, f)
        local ok, err = pcall(f)
        assert.is_false(ok)
        assert.matches(text, tostring(err))
      end
      kv.save(path, kv.offload { session = s, codec = tables, window = 32 }, { tables = false })
      refused("saved without its tables", function() kv.load(path, { model = m }) end)
      refused("was coded with tables %x+, these are %x+", function() kv.load(path, { tables = kv.kvtc { basis = tables, ratio = 9 } }) end)
      kv.save(path, tables)
      refused("has tables of model %x+, this model is %x+", function() kv.load(path, { model = H.root .. "/tests/golden/tiny/llama3.gguf" }) end)
      refused("have their own components only", function() kv.kvtc { basis = kv.load(path, { model = m }), ratio = 8 } end)
    end)

    it("names a damaged block, reads the others, and restores the tokens before it", function()
      local o = kv.offload { session = s, codec = tables, window = 32, block = 20 }
      kv.save(path, o)
      local file = kv.container.open(path)
      local payload = file:page(#file.sections, 2 * 2 * (o.n_blocks > 2 and 1 or 0) + 1):sub(2)       -- of the second or third block
      local text = read_file()
      local at = text:find(payload, 1, true)
      local f = assert(io.open(path, "wb"))
      f:write(text:sub(1, at + 3), string.char((text:byte(at + 4) + 1) % 256), text:sub(at + 5))
      f:close()
      assert.has_error(function() kv.load(path, { model = m }) end)
      local got = kv.load(path, { model = m, salvage = true })
      assert.are.equal(1, #got.damaged)
      local damaged, whole
      for b = 1, got.n_blocks do
        local ok, err = pcall(got.read, got, "k", b)
        if ok then whole = b else damaged = damaged or b assert.matches("block " .. b .. " .* was damaged", tostring(err)) end
      end
      assert.is_true(damaged and whole and damaged > 1)
      local r = back(got)
      assert.are.equal(got:range(damaged) - 1, r.n_tokens)
      r:feed(tokens(2, 3))
    end)

    it("survives any byte changed: refused, or the rest is read", function()
      local o = kv.offload { session = s, codec = tables, window = 32, block = 64 }
      kv.save(path, o)
      local text = read_file()
      for i = 1, 30 do
        local at = 1 + math.floor(kv.random(7, 1, i) * #text)
        local f = assert(io.open(path, "wb"))
        f:write(text:sub(1, at - 1), string.char((text:byte(at) + 1 + math.floor(kv.random(7, 2, i) * 255)) % 256), text:sub(at + 1))
        f:close()
        local ok, got = pcall(kv.load, path, { model = m, salvage = true })
        if ok then pcall(back, got) end
      end
    end)
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
