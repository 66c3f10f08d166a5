local H = require "helper"
local kv = H.kv

describe("kv.codec", function()
  it("refuses a wrong name, parameter or value in one line that says what is allowed", function()
    assert.are.equal("codec 'int': bits=9 is outside 1..8", H.fails(kv.codec, "int", { bits = 9 }))
    assert.are.equal("codec 'int': bits=2.5 is not a whole number", H.fails(kv.codec, "int", { bits = 2.5 }))
    assert.are.equal("codec 'int': axis=up is none of dim, token", H.fails(kv.codec, "int", { axis = "up" }))
    assert.matches("^codec 'int': unknown parameter 'bit'; allowed: bits, group, axis", H.fails(kv.codec, "int", { bit = 3 }))
    assert.matches("^codec 'turbquant%-4' is unknown; near: turboquant%-4", H.fails(kv.codec, "turbquant-4"))
    assert.matches("^codec 'xyzzy' is unknown; known: ", H.fails(kv.codec, "xyzzy"))
    assert.are.equal("kv.codec: name is a number, a string is needed", H.fails(kv.codec, 3))
  end)

  it("points at the script's own line", function()
    local f = loadstring("local kv = ...\n\nkv.codec('int', { bits = 9 })", "@script.lua")
    local ok, err = pcall(f, kv)
    assert.is_false(ok)
    assert.are.equal("script.lua:3: codec 'int': bits=9 is outside 1..8", err)
  end)

  it("leaves combinations to C, whose message it passes on", function()
    local c = kv.codec("int", { group = 12 })
    assert.matches("codec 'int': group=12 is not a multiple of 8", H.fails(c.encode, c, kv.tensor.zeros { 1, 8, 64 }))
  end)

  it("knows the presets that the literature names", function()
    local bits = { f32 = 32, f16 = 16, bf16 = 16, q8_0 = 8.5, q5_1 = 6, q5_0 = 5.5, q4_1 = 5, q4_0 = 4.5, ["kivi-2"] = 3, ["kivi-4"] = 5,
      ["turboquant-2"] = 2.25, ["turboquant-3"] = 3.25, ["turboquant-4"] = 4.25,
      ["fp8-e4m3"] = 8, ["fp8-e5m2-token"] = 8.25, ["mxfp8-e4m3"] = 8.25, nvfp4 = 4.5, mxfp4 = 4.25 }
    for name, want in pairs(bits) do
      for _, side in ipairs { "k", "v" } do
        H.close(kv.codec(name):info_for(64, 64, side).bits_payload, want, 1e-9, name .. " " .. side)
      end
    end
  end)

  it("stores the bits that the layouts of the literature store, at head_dim 64, 128 and 256", function()
    local want = { q8_0 = 8.5, q5_1 = 6, q5_0 = 5.5, q4_1 = 5, q4_0 = 4.5, nvfp4 = 4.5, mxfp4 = 4.25, ["mxfp8-e5m2"] = 8.25, ["kivi-2"] = 3, ["kivi-4"] = 5, polarquant = 3.875,
      ["turboquant-4"] = { 4.25, 4.125, 4.0625 }, ["turboquant-3"] = { 3.25, 3.125, 3.0625 }, ["turboquant-2"] = { 2.25, 2.125, 2.0625 }, ["turboquant-prod-3"] = { 3.5, 3.25, 3.125 },
      qjl = { 1.25, 1.125, 1.0625 }, ["rabitq-3"] = { 3.25, 3.125, 3.0625 }, ["turboangle-lloyd-4"] = { 4.25, 4.125, 4.0625 }, ["fp8-e4m3-token"] = { 8.25, 8.125, 8.0625 } }
    for name, bits in pairs(want) do
      for i, dim in ipairs { 64, 128, 256 } do
        for _, side in ipairs { "k", "v" } do H.close(kv.codec(name):info_for(dim, 128, side).bits_payload, type(bits) == "table" and bits[i] or bits, 1e-9, name .. " " .. dim .. side) end
      end
    end
    -- Groups of 128, as KIVI has them too; bytes of one vector; TurboAngle's 6.56 bits are keys' and values' mean over its boosted layers.
    for _, side in ipairs { "k", "v" } do H.close(kv.codec("kivi-2", { group = 128 }):info_for(128, 128, side).bits_payload, 2.25, 1e-9, side) end
    for name, bytes in pairs { ["turboquant-4"] = { 34, 66 }, ["turboquant-3"] = { 26, 50 }, ["turboquant-2"] = { 18, 34 } } do
      for i, dim in ipairs { 64, 128 } do assert.are.equal(bytes[i], kv.codec(name):info_for(dim).page_bytes / 64, name) end
    end
    local function mean(name) return (kv.codec(name):info_for(128, 64, "k").bits_payload + kv.codec(name):info_for(128, 64, "v").bits_payload) / 2 end
    H.close((28 * mean "turboangle" + 4 * mean "turboangle-k256v128") / 32, 6.5625, 1e-9)
    -- 2.5 and 3.5 bits of 128 channels: codes of 32 and 96, two norms, and what the papers leave out, the page's set.
    for name, bits in pairs { ["turboquant-2.5"] = 2.5, ["turboquant-3.5"] = 3.5 } do
      local i = kv.codec(name):info_for(128, 1024)
      H.close(8 * (i.page.codes + i.page.scales) / (128 * 1024), bits, 1e-9, name)
      assert.are.equal(16, i.page.outliers)
    end
  end)

  it("sets up keys and values apart where a preset says so", function()
    local c = kv.codec "kivi-2"
    assert.are.equal(32, c:info_for(64, 64, "k").granule)
    assert.are.equal(1, c:info_for(64, 64, "v").granule)
    assert.matches("axis=token", c:info_for(64, 64, "k").params)
  end)

  it("takes parameters over a preset's", function()
    assert.are.equal(3, kv.codec("turboquant", { bits = 3 }):value "bits")
    assert.are.equal(2, kv.codec("turboquant-4"):with({ bits = 2 }):value "bits")
  end)

  it("gives a head the same bytes in a batch and alone, from every family and preset", function()
    local t = kv.tensor.randn { 3, 64, 64, seed = 14 }
    for _, name in ipairs(require("kelvin.codec").names()) do
      for _, side in ipairs { "k", "v" } do
        local c = kv.codec(name)
        if c.has_tables then c = c:calibrated(t, { side = side }) end
        local all = c:encode(t, { side = side })
        for h = 1, 3 do assert.are.equal(c:encode(t:select(1, h), { side = side }):page(1, 1), all:page(h, 1), name) end
      end
    end
  end)

  it("round-trips every family and preset to a finite tensor of the same shape", function()
    local t = kv.tensor.randn { 2, 64, 64, seed = 11 }
    for _, name in ipairs(require("kelvin.codec").names()) do
      for _, side in ipairs { "k", "v" } do
        local c = kv.codec(name)
        local r = (c.has_tables and c:calibrated(t, { side = side }) or c):roundtrip(t, { side = side })
        assert.are.same({ 2, 64, 64 }, r:shape())
        assert.are.equal(0, r:stats().n_nonfinite, name)
        local stored = r.bits.bits - 8 * r.bits.shared / r.bits.elements              -- tables of one tensor are shared with nobody
        assert.is_true(stored > 0.4 and stored < 33, name)
      end
    end
    assert.are.equal(0, kv.compare(t, kv.codec("f32"):roundtrip(t)).rel_mse)
  end)

  it("takes rows alone as one head", function()
    local t = kv.tensor.randn { 64, 64, seed = 12 }
    assert.are.same({ 64, 64 }, kv.codec("q8_0"):roundtrip(t):shape())
  end)

  it("refuses NaN", function()
    local t = kv.tensor.zeros { 1, 4, 64 }
    t:set(1, 2, 3, 0 / 0)
    H.fails(function() kv.codec("q8_0"):encode(t) end)
  end)

  it("dots and accumulates on codes as decoding would", function()
    local x, q, p = kv.tensor.randn { 2, 128, 64, seed = 1 }, kv.tensor.randn { 2, 3, 64, seed = 2 }, kv.tensor.uniform { 2, 3, 128, seed = 3 }
    for _, name in ipairs { "f16", "q8_0", "q4_0", "kivi-2", "turboquant-3", "fp8-e4m3", "nvfp4" } do
      local b = kv.codec(name):encode(x)
      local scores, y = b:dot(q):totable(), b:decode():totable()
      local want = 0
      for d = 1, 64 do want = want + q:get(2, 3, d) * y[2][77][d] end
      H.close(scores[2][3][77], want, 2e-3, name)
      local v = kv.codec(name):encode(x, { side = "v" })
      local out, z = v:accumulate(p), v:decode():totable()
      local sum = 0
      for t = 1, 128 do sum = sum + p:get(1, 2, t) * z[1][t][9] end
      H.close(out:get(1, 2, 9), sum, 5e-3, name)
    end
  end)

  it("decodes part of a block as that part of the whole", function()
    local b = kv.codec("kivi-2"):encode(kv.tensor.randn { 2, 100, 64, seed = 4 })
    assert.are.same(b:decode():slice(2, 33, 70):totable(), b:decode(33, 70):totable())
    assert.matches("tokens 90..101 are outside 1..100", H.fails(b.decode, b, 90, 101))
  end)

  it("fits bits to a target", function()
    local c = kv.codec("turboquant"):fit_bits(3.3)
    assert.are.equal(3, c:value "bits")
  end)

  it("prints one informative line, and a list", function()
    assert.matches("^codec q4_0: int%(bits=4,.*4.5 bits/elem at d=64", tostring(kv.codec "q4_0"))
    assert.matches("CONTROL", tostring(kv.codec "canary"))
    assert.is_nil(tostring(kv.codec "kivi-2"):find "\n")
    assert.matches("\n  q4_0 +preset +int ", tostring(kv.codecs()))
    assert.matches("source: KIVI", tostring(kv.codecs "kivi-2"))
  end)

  it("describes every family and preset: parameters, a page's bytes at a head_dim, what it can, source", function()
    for _, name in ipairs(require("kelvin.codec").names()) do
      local d = kv.codecs(name, { head_dim = 128, page_tokens = 32 })
      local words = tostring(d)
      for _, part in ipairs { "\n  source: .", "\n  can: keys", "\n  parameters:", "at head_dim 128, pages of 32 tokens", "\n    k +%d+ +%d+", "\n    v +%d+ +%d+", d.family .. "%):\n    ." } do
        assert.matches(part, words, 1, false, name)
      end
      for _, p in ipairs(d.params) do assert.matches("\n    " .. p.name .. " ", words) end
      for _, side in ipairs { "k", "v" } do
        local i = d.page[side]
        assert.are.equal(i.page_bytes, i.page.codes + i.page.scales + i.page.outliers + i.page.exact + i.page.padding, name)
        assert.are.equal(0, i.page_bytes % 64)
      end
    end
    assert.matches("v +1 +1536 +1024 +512 ", tostring(kv.codecs "kivi-2"))
    assert.matches("head_dim=33 is not an even number", H.fails(kv.codecs, "scalar", { head_dim = 33 }))
  end)
end)

describe("kv.codec.parse_arm", function()
  local parse = kv.codec.parse_arm

  it("reads one codec for both sides, with parameters", function()
    local a = parse "turboquant-4:norm=lsq"
    assert.are.same({ "turboquant-4", norm = "lsq" }, a.k)
    assert.are.same(a.k, a.v)
    assert.are.equal("turboquant-4:norm=lsq", a.name)
  end)

  it("reads everything that an arm can say", function()
    local a = parse "k=turboquant-4,v=turboquant-3,mean=both,sink=4,recent=32,page_rope=k,page_tokens=128,exact=f32,seed=7,k.norm=lsq,name=best"
    assert.are.same({ k = { "turboquant-4", norm = "lsq" }, v = { "turboquant-3" }, mean = "both", sink = 4, recent = 32, page_rope = "k", page_tokens = 128, exact = "f32",
      seed = 7, name = "best" }, a)
  end)

  it("names what is wrong and what is allowed", function()
    assert.are.equal("arm 'k=q4_0': no codec for v; write v=CODEC, or one CODEC for both sides", H.fails(parse, "k=q4_0"))
    assert.matches("^arm 'q4_0,snk=4': unknown key 'snk'; allowed: k, v, ", H.fails(parse, "q4_0,snk=4"))
    assert.are.equal("arm 'q4_0,sink=-1': sink=-1 is not a whole number from 0", H.fails(parse, "q4_0,sink=-1"))
    assert.are.equal("arm 'q4_0,mean=all': mean=all is none of both, k, v, auto, bias, none", H.fails(parse, "q4_0,mean=all"))
    assert.matches("codec 'q5' is unknown", H.fails(parse, "q5"))
    assert.matches("bits=12 is outside 1..8", H.fails(parse, "int:bits=12"))
    assert.matches("comes after a codec", H.fails(parse, "q4_0,q8_0"))
  end)

  it("is measured beside memcpy by `kelvin bench codecs`, every preset once", function()
    local bench, seen = require "kelvin.bench_codecs", {}
    for _, name in ipairs(bench.names()) do
      assert.is_nil(seen[name])
      seen[name] = true
    end
    assert.is_true(seen["q4_0"] and seen["turboquant-4"] and seen["turboangle"] and seen["wf-4"] and not seen["canary"] and not seen["turboangle-k8v4log"])
    local rows = bench.run { names = { "q8_0", "turboquant-2" }, dims = { 64 }, repeats = 1 }
    assert.are.equal(2, #rows)
    for _, row in ipairs(rows) do
      for _, what in ipairs { "encode", "decode", "dot", "accumulate", "dot_decoded", "accumulate_decoded" } do
        H.close(row[what .. "_codes_gb_s"] / row[what .. "_gb_s"], row.bits_k / 32, 1e-9, row.codec .. " " .. what)
      end
      assert.is_true(row.memcpy_gb_s > 0 and row.fused)
    end
    assert.matches("| q8_0 | 64 | 8.50 |", tostring(rows), 1, true)
  end)

  it("pca spends its bits on every component, at any head_dim", function()
    for _, d in ipairs { 64, 128, 256 } do
      local x = kv.tensor.randn { shape = { 1024, d }, seed = 3 }
      local p = x:_data()
      for t = 0, 1023 do
        for i = 0, d - 1 do p[t * d + i] = p[t * d + i] * (1 + i) ^ -0.5 end
      end
      local c = kv.codec("pca", { bits = 4 }):calibrated(x)
      assert.are.equal(4, c:info_for(d, 64, "k").bits_payload)
      assert.is_true(kv.compare(x, c:roundtrip(x)).rel_err < 0.1, "head_dim " .. d)
    end
  end)
end)
