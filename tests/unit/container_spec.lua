-- Files of blocks and sessions: what is saved comes back and goes on alike; damage and strangers are named.
local H = require "helper"
local kv = H.kv

local TEXT = ("The cache holds a key and a value for every token that was read, and attention reads them all again. "):rep(6)

local function rows(heads, tokens, dim)
  local t = kv.tensor.zeros { heads, tokens, dim }
  local p = t:_data()
  for i = 0, heads * tokens * dim - 1 do p[i] = math.sin(i * 0.7) + math.cos(i * 0.013) end
  return t
end

local function flip(path, at)
  local f = assert(io.open(path, "r+b"))
  f:seek("set", at)
  local b = f:read(1):byte()
  f:seek("set", at)
  f:write(string.char(bit.bxor(b, 64)))
  f:close()
end

describe("kv.save and kv.load of a block", function()
  it("give the same pages and rows in every stage, K and V", function()
    local t = rows(2, 150, 64)
    for _, name in ipairs { "int", "turboquant-3", "kivi-2", "f16" } do
      for _, side in ipairs { "k", "v" } do
        for _, stage in ipairs { "raw", "zlib", "lzma", "rans", "smallest" } do
          local path = H.temporary ".kv"
          local b = kv.codec(name):encode(t, { side = side })
          kv.save(path, b, { stage = stage })
          local c = kv.load(path)
          assert.are.same(b:shape(), c:shape())
          assert.are.equal(b:page(2, 2), c:page(2, 2))
          assert.are.equal(0, kv.compare(b:decode(), c:decode()).max_abs)
          assert.are.equal(b:bytes().total, c:bytes().total)
          assert.are.equal(name, c.codec.name)
          assert.are.equal(b.codec:info_for(64, 64, side).params, c.codec:info_for(64, 64, side).params)
        end
      end
    end
  end)

  it("bring back every codec there is, tables too, at a head_dim that fills no power of two", function()
    local t = kv.tensor.randn { 2, 75, 96, seed = 5 }
    for _, name in ipairs(require("kelvin.codec").names()) do
      for _, side in ipairs { "k", "v" } do
        local c = kv.codec(name)
        local path = H.temporary ".kv"
        local b = (c.has_tables and c:calibrated(t, { side = side }) or c):encode(t, { side = side })
        kv.save(path, b)
        local d = kv.load(path)
        for h = 1, 2 do assert.are.equal(b:page(h, 1), d:page(h, 1), name) end
        assert.are.equal(0, kv.compare(b:decode(), d:decode()).max_abs, name)
        assert.are.equal(b:bytes().total, d:bytes().total, name)
        local was, is = b.codec:info_for(96, 64, side), d.codec:info_for(96, 64, side)
        assert.are.equal(was.table_bytes, is.table_bytes, name)
        assert.are.equal(was.params, is.params, name)
        os.remove(path)
      end
    end
  end)

  it("names a damaged page, and reads the others when asked to", function()
    local path = H.temporary ".kv"
    local b = kv.codec("int", { bits = 4 }):encode(rows(1, 256, 64))
    kv.save(path, b)
    local f = kv.container.open(path)
    local _, pages = f:section "block.pages"
    assert.are.same({}, f:verify())
    local data = assert(io.open(path, "rb")):read "*a"
    flip(path, data:find(b:page(1, 3), 1, true) + 99)
    local message = ("file '%s': page 2 of section %d ('block.pages') is damaged"):format(path, pages - 1)
    assert.are.equal(message, H.fails(kv.load, path))
    local c = kv.load(path, { salvage = true })
    assert.are.same({ message }, c.damaged)
    assert.are.equal(b:page(1, 2), c:page(1, 2))
    assert.are.equal(0, kv.compare(b:decode(193, 256), c:decode(193, 256)).max_abs)
  end)

  it("refuse what they do not know, in one line", function()
    assert.are.equal("kv.save: a number given; a block, a session, an index, an offload or kvtc tables can be saved", H.fails(kv.save, "x", 3))
    assert.matches("^stage 'zip' is none of raw, zlib, lzma, rans, smallest", H.fails(kv.save, H.temporary(), kv.codec("int"):encode(rows(1, 8, 64)), { stage = "zip" }))
    assert.matches("^stage 'zlib': level=10 is outside 1..9", H.fails(kv.save, H.temporary(), kv.codec("int"):encode(rows(1, 8, 64)), { stage = "zlib", level = 10 }))
    assert.matches("No such file", H.fails(kv.load, "/no/such/file.kv"))
    local path = H.temporary ".kv"
    local f = assert(io.open(path, "wb"))
    f:write(("GGUF"):rep(40))
    f:close()
    assert.matches("is not a container of Kelvin's", H.fails(kv.load, path))
  end)
end)

describe("a session in a file", function()
  it("goes on with the same logits, and tells damage and strangers", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    local ids = m:tokenize(TEXT)
    for _, arm in ipairs { "k=turboquant-4,v=turboquant-3,sink=4,recent=16", false } do
      local s = m:session { arm = arm or nil, max_tokens = 256 }:feed(ids)
      local path = H.temporary ".kv"
      s:save(path, { stage = arm and "smallest" or "raw" })
      local r = kv.load(path, { model = m })
      assert.are.same(s.ids, r.ids)
      assert.are.equal(s:bytes().total, r:bytes().total)
      assert.are.equal(0, kv.compare(s:logits(), r:logits()).max_abs)
      assert.are.equal(0, kv.compare(s:read { layer = 7, head = 2, side = "v" }, r:read { layer = 7, head = 2, side = "v" }).max_abs)
      for step = 1, 4 do
        s:feed(ids[step])
        r:feed(ids[step])
        assert.are.equal(0, kv.compare(s:logits(), r:logits()).max_abs)
      end
      assert.are.equal(s.plan and s.plan.name, r.plan and r.plan.name)
      assert.are.equal(s.plan and s.plan:describe(), r.plan and r.plan:describe())
      local again = H.temporary ".kv"
      r:save(again, { stage = arm and "smallest" or "raw" })
      s:save(path, { stage = arm and "smallest" or "raw" })
      assert.are.equal(kv.sha256_file(path), kv.sha256_file(again))
      assert.matches("cache of smollm2%-135m", tostring(kv.container.open(path)))
    end
  end)

  it("keeps what lies before a damaged page", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    local s = m:session { arm = "int", max_tokens = 200 }:feed(m:tokenize(TEXT))
    local path = H.temporary ".kv"
    s:save(path)
    local f = kv.container.open(path)
    local _, part = f:section "cache.v"
    local data = assert(io.open(path, "rb")):read "*a"
    local first = f:page(part, 3)                                  -- head 1: sinks, tail, page 1, page 2
    flip(path, data:find(first, 1, true) + #first + 10)
    assert.matches("page 3 of section %d+ %('cache.v'%) is damaged", H.fails(kv.load, path, { model = m }))
    local r = kv.load(path, { model = m, salvage = true })
    assert.are.equal(64, r.n_tokens)
    assert.are.equal(64, #r.ids)
    assert.are.equal(1, #r.damaged)
    assert.are.equal(0, kv.compare(s:read { layer = 30, head = 3, side = "k", first = 1, last = 64 }, r:read { layer = 30, head = 3, side = "k" }).max_abs)
  end)

  it("is refused by another model, with both digests", function()
    local m, other = H.model "smollm2-135m", H.model "gemma-3-270m"
    if not m or not other then return end
    local path = H.temporary ".kv"
    m:session({ max_tokens = 64 }):feed("Once"):save(path)
    assert.matches("is the cache of model %x+, this model is %x+", H.fails(kv.load, path, { model = other }))
  end)
end)

describe("what a file says of itself", function()
  local C = require("kelvin.ffi").C

  it("may be anything for a block", function()
    local b, path = kv.codec("int"):encode(rows(1, 64, 64)), H.temporary ".kv"
    for _, about in ipairs { "5", "null", "true", '"x"', "[1,2]", "no JSON", "", '{"codec":{"a":1},"about":"a\\u001b[2Jb","rows_only":[]}', '{"codec":"../../x"}' } do
      assert.are.equal(0, C.kv_block_save(b._b, path, about, "raw", -1))
      assert.are.equal(b:page(1, 1), kv.load(path):page(1, 1))
      assert.is_nil(tostring(kv.container.open(path)):gsub("\n", ""):find "%c")
    end
  end)

  it("begins with what it is a file of: another section's pages are not taken for its tokens", function()
    local bit, ffi = require "bit", require "ffi"
    local function crc32c(s)
      local c = -1
      for i = 1, #s do
        c = bit.bxor(c, s:byte(i))
        for _ = 1, 8 do c = bit.bxor(bit.rshift(c, 1), bit.band(0x82f63b78, -bit.band(c, 1))) end
      end
      return ffi.string(ffi.new("uint32_t[1]", bit.bnot(c) % 2^32), 4)
    end
    local m, path = kv.model(H.root .. "/tests/golden/tiny/llama.gguf"), H.temporary ".kv"
    m:session({ arm = "k=f16,v=f16", max_tokens = 16 }):feed("the cache"):save(path)
    local f = io.open(path, "rb")
    local x = f:read "*a"
    f:close()
    local n, at = x:byte(13), tonumber(ffi.cast("const uint64_t*", x)[2])
    local directory = x:sub(at + 1)
    assert.are.equal(n * 80, #directory)
    assert.are.equal(crc32c(directory), x:sub(33, 36))
    directory = directory:sub(-80) .. directory:sub(81, -81) .. directory:sub(1, 80)
    local head = x:sub(1, 32) .. crc32c(directory) .. x:sub(37, 60)
    f = io.open(path, "wb")
    f:write(head, crc32c(head), x:sub(65, at), directory)
    f:close()
    assert.are.equal("cache.v", kv.container.open(path).sections[1].kind)
    assert.matches("begins with a section of kind 'cache.v', which this version does not know", H.fails(kv.load, path, { model = m }))
  end)

  it("may be anything for a session: it loads with the model given, or is refused in a line", function()
    local m, path = kv.model(H.root .. "/tests/golden/tiny/llama.gguf"), H.temporary ".kv"
    local s = m:session({ arm = "k=f16,v=f16", max_tokens = 16 }):feed "the cache"
    local ids = require("ffi").new("int32_t[16]", s.ids)
    for _, about in ipairs { "5", "null", '{"model":null}', '{"model":7}', '{"model":{"name":[],"path":{}}}', '{"plan":5}', '{"plan":{"resolved":{"layers":[1]}}}', '{"plan":{"name":{}}}' } do
      assert.are.equal(0, C.kv_session_save(s._s, path, ids, about, "raw", -1))
      if about:find "plan" then assert.matches("^kv.load: the file's description of its plan is not one", H.fails(kv.load, path, { model = m }))
      else
        assert.are.equal(#s.ids, kv.load(path, { model = m }).n_tokens)
        assert.matches("does not say which model it belongs to", H.fails(kv.load, path))
      end
    end
  end)
end)
