-- Nearest vectors from Lua: the numbers count from 1, files come back, refusals name what was given.
local H = require "helper"
local kv = H.kv

local function brute(ix, q, k)
  local ids = {}
  for i = 1, q:shape()[1] do
    local d = {}
    for j = 1, ix:count() do
      local x, sum = ix:decode(j), 0
      for c = 1, ix.dim do sum = sum + (q:get(i, c) - x:get(1, c)) ^ 2 end
      d[j] = { sum, j }
    end
    table.sort(d, function(a, b) return a[1] < b[1] end)
    ids[i] = {}
    for j = 1, k do ids[i][j] = d[j][2] end
  end
  return ids
end

describe("kv.index", function()
  local x, q = kv.tensor.randn { 300, 32, seed = 5 }, kv.tensor.randn { 4, 32, seed = 6 }

  it("finds what brute force over the stored vectors finds", function()
    local ix = kv.index { dim = 32, codec = "q8_0", metric = "l2", train = x, page = 64 }
    assert.are.same({ 1, 300 }, { ix:add(x) })
    local ids, scores = ix:search(q, { k = 5 })
    assert.are.same(brute(ix, q, 5), ids:totable())
    assert.are.equal(300, ix:count())
    assert.is_true(scores:get(1, 1) <= scores:get(1, 5))
    local one = ix:search(q:select(1, 2), { k = 5 })
    assert.are.same(ids:totable()[2], one:totable()[1])
  end)

  it("removes, and keeps every other number", function()
    local ix = kv.index { dim = 32, codec = "f32", metric = "cosine" }
    ix:add(x)
    local best = ix:search(q, { k = 2 })
    assert.are.equal(1, ix:remove(best:get(1, 1)))
    assert.are.equal(0, ix:remove { best:get(1, 1) })
    assert.are.equal(best:get(1, 2), ix:search(q, { k = 2 }):get(1, 1))
    assert.are.equal(299, ix:count())
    assert.are.equal("index:remove: vector 301 is outside 1..300", H.fails(ix.remove, ix, { 301 }))
  end)

  it("re-ranks by the originals", function()
    local ix = kv.index { dim = 32, codec = "turboquant-2", metric = "l2", keep = "f32" }
    local exact = kv.index { dim = 32, codec = "f32", metric = "l2" }
    ix:add(x)
    exact:add(x)
    local truth = exact:search(q)
    assert.are.same(truth:totable(), ix:search(q, { rerank = 30 }):totable())
    local found = kv.index.recall(ix:search(q), truth)
    assert.is_true(found > 0.3 and found < 1, "recall " .. found)
    assert.are.equal(1, (kv.index.recall(truth, truth)))
  end)

  it("is saved with kv.save and comes back mapped, with the same answers", function()
    local path = H.temporary ".kv"
    local ix = kv.index { codec = "turboquant-4", metric = "ip", train = x, keep = "f16" }
    ix:add(x)
    kv.save(path, ix)
    local back = kv.load(path)
    local a, s = ix:search(q, { k = 7 })
    local b, t = back:search(q, { k = 7 })
    assert.are.same(a:totable(), b:totable())
    assert.are.same(s:totable(), t:totable())
    assert.is_true(back.mapped)
    assert.are.equal(301, (back:add(x)))
    assert.matches("index scalar%(.*%)  600 vectors of 32, ip  .* and f16 originals, mean removed, mapped", tostring(back))
    assert.matches("index%.codes", tostring(kv.container.open(path)))
  end)

  it("answers when there is little or nothing in it", function()
    local ix = kv.index { dim = 32 }
    assert.are.equal(0, ix:search(q, { k = 3 }):get(1, 1))
    ix:add(x:slice(1, 1, 2))
    assert.are.equal(0, ix:search(q, { k = 3 }):get(1, 3))
    assert.are.equal(0, kv.index({ dim = 8, codec = "f16" }):count())
  end)

  it("takes calibrated codecs when it has vectors to train on", function()
    assert.are.equal("index: codec 'nuq' has calibrated tables: give vectors to train on", H.fails(kv.index, { dim = 32, codec = "kvquant-4" }))
    local ix = kv.index { codec = "kvquant-4", train = x, metric = "l2" }
    ix:add(x)
    assert.are.equal(ix:search(x:select(1, 9), { k = 1 }):get(1, 1), 9)
  end)

  it("refuses in one line what it cannot take", function()
    assert.are.equal("kv.index: metric 'l1' is none of ip, l2, cosine", H.fails(kv.index, { dim = 32, metric = "l1" }))
    assert.are.equal("kv.index: 'metrics' is unknown; near: metric", H.fails(kv.index, { dim = 32, metrics = "l2" }))
    assert.are.equal("kv.index: dim=nil is not a whole number", H.fails(kv.index, { codec = "f32" }))
    assert.are.equal("kv.index: mean = true needs train = tensor, whose mean it is", H.fails(kv.index, { dim = 32, mean = true }))
    local ix = kv.index { dim = 16 }
    assert.are.equal("index vectors: 32 dimensions given, the index has 16", H.fails(ix.add, ix, x))
    local bad = kv.tensor.zeros { 2, 16 }
    bad:set(2, 3, 0 / 0)
    assert.are.equal("index vectors: row 1, dimension 2 is nan, not a finite number", H.fails(ix.add, ix, bad))
    assert.are.equal("index:search: k=0 is not a whole number in 1..65536", H.fails(ix.search, ix, bad, { k = 0 }))
    local path = H.temporary ".kv"
    kv.save(path, kv.codec("q8_0"):encode(kv.tensor.randn { 1, 8, 32 }))
    assert.matches("section 0 is of kind 'block', which this library does not know here", H.fails(require("kelvin.index")._load, { path = path }))
  end)
end)

describe("kv.index.read", function()
  local t = kv.tensor { { 1, 2.5, -3 }, { 4, 5, 6 } }
  local function file(suffix, text)
    local path = H.temporary(suffix)
    local f = assert(io.open(path, "wb"))
    f:write(text)
    f:close()
    return path
  end

  it("reads fvecs, npy and text", function()
    local path = H.temporary ".fvecs"
    kv.index.write(path, t)
    assert.are.same(t:totable(), kv.index.read(path):totable())
    assert.are.same(t:totable(), kv.index.read(file(".tsv", "0\t1\t2.5\t-3\n1\t4\t5\t6\n")):totable())
    assert.are.same(t:totable(), kv.index.read(file(".csv", "1,2.5,-3\r\n4,5,6\r\n")):totable())
    assert.are.same({ { 1, 2 }, { 3, 4 }, { 5, 7 } }, kv.index.read(file(".tsv", "1\t2\t100001\n3\t4\t100002\n5\t7\t100003\n")):totable())
    local head = "{'descr': '<f2', 'fortran_order': False, 'shape': (2, 3), }"
    head = head .. (" "):rep(117 - #head) .. "\n"
    local npy = "\147NUMPY\1\0" .. string.char(#head, 0) .. head .. "\0\60\0\65\0\194\0\68\0\69\0\70"
    assert.are.same(t:totable(), kv.index.read(file(".npy", npy)):totable())
    assert.matches("is not a 2%-dimensional C%-order array", H.fails(kv.index.read, file(".npy", npy:sub(1, -2))))
  end)

  it("names what it cannot read", function()
    local path = file(".txt", "1 2\n1 x\n")
    assert.are.equal(("vectors '%s': line 2: 'x' is not a number"):format(path), H.fails(kv.index.read, path))
    path = file(".txt", "1 2\n1\n")
    assert.are.equal(("vectors '%s': line 2 has 1 numbers, the first has 2"):format(path), H.fails(kv.index.read, path))
    path = file(".fvecs", ("x"):rep(20))
    assert.matches("are no whole number of vectors", H.fails(kv.index.read, path))
  end)
end)

describe("kv.index.clusters", function()
  it("draws every vector around one of the centres", function()
    local x, q = kv.index.clusters { n = 400, dim = 16, clusters = 5, spread = 0.5, seed = 3, queries = { n = 7 } }
    local centres, noise = kv.tensor.randn { 5, 16, seed = 3, stream = 1 }, kv.tensor.randn { 400, 16, seed = 3, stream = 2 }
    for i = 1, 400 do
      local near = false
      for c = 1, 5 do
        local worst = 0
        for j = 1, 16 do worst = math.max(worst, math.abs(x:get(i, j) - centres:get(c, j) - 0.5 * noise:get(i, j))) end
        near = near or worst < 1e-5
      end
      assert.is_true(near, "vector " .. i)
    end
    assert.are.same({ 7, 16 }, q:shape())
  end)
end)
