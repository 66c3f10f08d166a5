local H = require "helper"
local kv = H.kv

describe("a tensor", function()
  it("keeps what was put into it, by index from 1", function()
    local t = kv.tensor { { 1, 2, 3 }, { 4, 5, 6 } }
    assert.are.same({ 2, 3 }, t:shape())
    assert.are.equal(6, t:get(2, 3))
    t:set(2, 3, 7.5)
    assert.are.same({ { 1, 2, 3 }, { 4, 5, 7.5 } }, t:totable())
  end)

  it("shares memory with its slices, selections and views", function()
    local t = kv.tensor.zeros { 2, 4, 3 }
    t:slice(2, 2, 3):set(1, 1, 1, 5)
    assert.are.equal(5, t:get(1, 2, 1))
    t:select(1, 2):set(4, 3, 6)
    assert.are.equal(6, t:get(2, 4, 3))
    t:view { 24 }:set(1, 9)
    assert.are.equal(9, t:get(1, 1, 1))
    assert.are.equal(0, t:clone():set(1, 1, 1, 0):get(1, 1, 1))
    assert.are.equal(9, t:get(1, 1, 1))
  end)

  it("refuses an index, a slice or a shape that is not there", function()
    local t = kv.tensor.zeros { 2, 4, 3 }
    assert.are.equal("tensor: index 3 is 4, outside 1..3", H.fails(t.get, t, 1, 1, 4))
    assert.are.equal("tensor: 2 indices given, 3 needed", H.fails(t.get, t, 1, 1))
    assert.are.equal("tensor: slice 3..5 is outside 1..4", H.fails(t.slice, t, 2, 3, 5))
    assert.are.equal("tensor: a view of 5 elements over 24", H.fails(t.view, t, { 5 }))
    assert.matches("dimension 1 is 0", H.fails(kv.tensor.zeros, { 0, 2 }))
    assert.matches("6 dimensions given, 1..5 allowed", H.fails(kv.tensor.zeros, { 1, 1, 1, 1, 1, 1 }))
    assert.matches("2 values given, the shape 3 holds 3", H.fails(kv.tensor, { 1, 2 }, { 3 }))
  end)

  it("draws the same unit normals for a seed", function()
    local a, b, c = kv.tensor.randn { 4, 1000, seed = 7 }, kv.tensor.randn { shape = { 4, 1000 }, seed = 7 }, kv.tensor.randn { 4, 1000, seed = 8 }
    assert.are.same(a:totable(), b:totable())
    assert.are_not.same(a:totable(), c:totable())
    local s = a:stats()
    H.close(s.rms, 1, 0.05)
    H.close(s.mean, 0, 0.05)
    assert.are.equal(4000, s.n)
  end)

  it("converts to f16 and bf16 and reads them back", function()
    local t = kv.tensor { 1, -2.5, 0.333251953125 }
    assert.are.same(t:totable(), t:to("f16"):totable())
    assert.are.equal(-2.5, t:to("f16"):get(2))
    H.close(t:to("bf16"):totable(), t:totable(), 4e-3)
  end)

  it("prints its shape with words, its range and a corner", function()
    local text = tostring(kv.tensor.randn { 3, 8, 64, seed = 2 })
    assert.matches("^tensor f32 %[3 heads, 8 tokens, 64 dim%]  min %-%d.*  max %d.*  rms [%d.]+\n", text)
    assert.matches("1 not finite", tostring(kv.tensor { 1, 1 / 0 }))
  end)
end)

describe("kv.compare", function()
  it("is zero for equal tensors and knows a scale", function()
    local a = kv.tensor.randn { 2, 5, 16, seed = 3 }
    local same = kv.compare(a, a:clone())
    assert.are.equal(0, same.rel_mse)
    H.close(same.cosine, 1, 1e-7)
    local b = a:clone()
    local x = b:_data()
    for i = 0, b:n_elements() - 1 do x[i] = 1.5 * x[i] end
    local d = kv.compare(a, b)
    H.close(d.rel_err, 0.5, 1e-6)
    H.close(d.cosine, 1, 1e-6)
  end)

  it("shows the bits of a round trip", function()
    local a = kv.tensor.randn { 2, 64, 64, seed = 3 }
    local d = kv.compare(a, kv.codec("int", { bits = 4 }):roundtrip(a))
    assert.are.equal(5, d.bits)
    assert.matches("rel_err [%d.]+ +cosine 0.99.* bits/elem 5.000 %(codes 4, scales 1%)", tostring(d))
  end)

  it("refuses another shape", function()
    H.fails(kv.compare, kv.tensor.zeros { 2, 3 }, kv.tensor.zeros { 3, 2 })
    assert.are.equal("kv.compare: two tensors are needed", H.fails(kv.compare, 1, 2))
  end)
end)

describe("the library's small calls", function()
  it("hash and draw as they should", function()
    assert.are.equal("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", kv.sha256 "abc")
    assert.is_true(kv.random(1, 0, 0) > 0 and kv.random(1, 0, 0) < 1)
    assert.are.equal(kv.random(1, 0, 5), kv.random(1, 0, 5))
    assert.are_not.equal(kv.random(1, 0, 5), kv.random(2, 0, 5))
  end)

  it("give Lloyd-Max levels of N(0,1)", function()
    local c, d = kv.lloyd_max(2)
    H.close(c, { -1.510418, -0.452780, 0.452780, 1.510418 }, 1e-5)
    H.close(d, 0.117482, 1e-5)
    assert.matches("bits=9 is outside 1..8", H.fails(kv.lloyd_max, 9))
  end)

  it("transform by Hadamard without changing lengths", function()
    local t = kv.tensor.randn { 3, 64, seed = 5 }
    local u = kv.hadamard(t)
    H.close(u:stats().rms, t:stats().rms, 1e-6)
    H.close(kv.hadamard(u):totable(), t:totable(), 1e-5)
  end)

  it("limit the instruction set and the threads", function()
    local _, best = kv.simd()
    assert.are.equal("c", (kv.simd "c"))
    kv.simd(best)
    assert.are.equal(best, (kv.simd()))
    assert.matches("level 'mmx' is none of", H.fails(kv.simd, "mmx"))
    local n = kv.threads()
    assert.are.equal(1, kv.threads(1))
    kv.threads(n)
    H.fails(kv.threads, 1000)
  end)
end)
