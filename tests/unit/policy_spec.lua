local H = require "helper"
local kv = H.kv

-- What a policy reads of a model, without a file.
local toy = { name = "toy", n_layers = 6, n_heads = 9, n_kv_heads = 3, head_dim = 64, n_ctx_train = 4096 }

local function layers_of(n, k, v)
  local out = {}
  for l = 1, n do out[l] = { k = k, v = v } end
  return out
end

describe("a policy", function()
  it("resolves to every layer with every parameter", function()
    local plan = kv.policy.resolve(kv.policy.uniform { k = "q4_0", v = { "int", bits = 3 }, sink = 4, recent = 32 }, toy)
    assert.are.equal(6, #plan.resolved.layers)
    local y = plan.resolved.layers[6]
    assert.are.equal("bits=4,group=32,axis=dim,mode=ggml_0,order=half", y.k.params)
    assert.are.equal("int", y.v.family)
    assert.are.equal(4, y.sink)
    assert.are.equal(32, y.recent)
    H.close(plan.bits_payload.mean, (4.5 + 4) / 2, 1e-9)
    assert.matches("layers 1%-6: k q4_0", plan:describe())
    assert.is_string(kv.json.encode(plan.resolved))
  end)

  it("takes an arm's text or a table as well", function()
    assert.are.equal(4.5, kv.policy.resolve("q4_0", toy).bits_payload.mean)
    assert.are.equal(8.5, kv.policy.resolve({ k = "q8_0", v = "q8_0" }, toy).bits_payload.mean)
  end)

  it("mixes codecs by head", function()
    local p = kv.policy { name = "heads", plan = function(_, m) return layers_of(m.n_layers, { [1] = "q8_0", default = "q4_0" }, "q4_0") end }
    local k = kv.policy.resolve(p, toy).resolved.layers[1].k
    assert.are.equal("q8_0", k[1].codec)
    assert.are.equal("q4_0", k[2].codec)
    assert.are.equal("q4_0", k[3].codec)
  end)

  it("says which layer, head or key is wrong", function()
    local function fails(plan) return H.fails(kv.policy.resolve, kv.policy { name = "x", plan = plan }, toy) end
    assert.are.equal("policy 'x': layer 7 given, model has 6", fails(function() return layers_of(7, "q4_0", "q4_0") end))
    assert.are.equal("policy 'x': layer 6 of 6 is missing", fails(function() return layers_of(5, "q4_0", "q4_0") end))
    assert.are.equal("policy 'x': layer 1, k: head 4 given, model has 3 K/V heads", fails(function() return layers_of(6, { [4] = "q4_0", default = "q4_0" }, "q4_0") end))
    assert.are.equal("policy 'x': layer 1, v: no codec given", fails(function() return layers_of(6, "q4_0") end))
    assert.matches("layer 1: unknown key 'snk'; allowed: exact, k, mean", fails(function()
      local y = layers_of(6, "q4_0", "q4_0")
      y[1].snk = 3
      return y
    end))
    assert.are.equal("policy 'x': plan returned a nil, a table of layers is needed", fails(function() end))
    assert.matches("codec 'q3' is unknown", fails(function() return layers_of(6, "q3", "q4_0") end))
  end)

  it("checks its parameters", function()
    local p = kv.policy { name = "p", params = { edge = { default = 2, min = 0, max = 3, about = "layers" } },
      plan = function(q, m) return layers_of(m.n_layers, { "int", bits = 2 + q.edge }, "q4_0") end }
    assert.matches("bits=4", kv.policy.resolve(p, toy).resolved.layers[1].k.params)
    assert.matches("bits=5", kv.policy.resolve(p { edge = 3 }, toy).resolved.layers[1].k.params)
    assert.are.equal("policy 'p': edge=4 is outside 0..3", H.fails(kv.policy.resolve, p { edge = 4 }, toy))
    assert.are.equal("policy 'p': unknown parameter 'egde'; allowed: edge", H.fails(kv.policy.resolve, p { egde = 1 }, toy))
    assert.are.equal("policy p(edge=3)", tostring(p { edge = 3 }))
  end)

  it("needs calibration where it uses it", function()
    assert.matches("mean=both needs calibration", H.fails(kv.policy.resolve, "q4_0,mean=both", toy))
    local p = kv.policy { name = "s", plan = function(_, _, stats) return stats:rank(1, "k") end }
    assert.matches("policy 's': it reads stats, which need calibration", H.fails(kv.policy.resolve, p, toy))
  end)

  it("gives the seed option to codecs that have a seed and none given", function()
    local function seed(policy, o)
      return kv.policy.resolve(policy, toy, o).resolved.layers[1].k.params:match "seed=(%d+)"
    end
    assert.are.equal("5", seed("turboquant-4", { seed = 5 }))
    assert.are.equal("7", seed("turboquant-4:seed=7", { seed = 5 }))
    assert.are.equal("9", seed "turboquant-4,seed=9")
  end)
end)

describe("kv.fit_budget", function()
  local function all_in(plan, context, sink, recent)
    local sum = 0
    for _, y in ipairs(plan.resolved.layers) do
      for _, side in ipairs { "k", "v" } do
        for h = 1, 3 do
          local e = y[side].codec and y[side] or y[side][h]
          local coded = math.floor((context - sink - recent) / e.granule) * e.granule
          sum = sum + (math.ceil(coded / 64) * 64 * e.bits_payload + (context - coded) * 16) / context
        end
      end
    end
    return sum / (6 * 2 * 3)
  end

  local function edges(budget, context)
    return kv.policy.resolve(kv.policy { name = "edges", plan = function(_, m)
      local y = {}
      for l = 1, m.n_layers do
        y[l] = { k = { "int", bits = (l == 1 or l == 6) and 8 or 4 }, v = { [1] = { "int", bits = 6 }, default = { "int", bits = 3 } }, sink = 4, recent = 32 }
      end
      return kv.fit_budget(y, budget)
    end }, toy, { context = context })
  end

  it("meets the budget from below, and nearly", function()
    for _, budget in ipairs { 3, 3.5, 4.25, 5, 6 } do
      local got = all_in(edges(budget, 2048), 2048, 4, 32)
      assert.is_true(got <= budget + 1e-6 and got > budget - 0.2, ("budget %g, got %g"):format(budget, got))
    end
  end)

  it("keeps what was given more at more", function()
    local y = edges(5, 2048).resolved.layers
    local function bits(e) return tonumber(e.params:match "bits=(%d)") end
    assert.is_true(bits(y[1].k) > bits(y[3].k))
    assert.is_true(bits(y[3].v[1]) >= bits(y[3].v[2]))
  end)

  it("counts the window: the same budget buys fewer bits at a short context", function()
    assert.is_true(edges(5, 512).bits_payload.mean < edges(5, 8192).bits_payload.mean)
  end)

  it("is an error when even the fewest bits are too many", function()
    assert.matches("^kv.fit_budget: 1.5 bits per element cannot be met: the fewest here are 2.%d+ at context 2048", H.fails(edges, 1.5, 2048))
    assert.matches("a model is needed", H.fails(kv.fit_budget, {}, 3))
  end)
end)
