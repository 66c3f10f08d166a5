local H = require "helper"
local kv = H.kv

local function model(name, n_layers, n_kv_heads, head_dim, arch)
  return { name = name, n_layers = n_layers, n_heads = n_kv_heads, n_kv_heads = n_kv_heads, head_dim = head_dim, arch = arch or "llama", n_ctx_train = 4096 }
end
local function resolve(policy, m, o) return kv.policy.resolve(policy, m, o) end
local function angles(entry) return tonumber(entry.params:match "angles=(%d+)") end

-- Mean angle bits as the paper counts them: log2(n) / 2 over keys, values and layers.
local function angle_bits(plan)
  local sum = 0
  for _, y in ipairs(plan.resolved.layers) do sum = sum + (math.log(angles(y.k)) + math.log(angles(y.v))) / math.log(2) / 4 end
  return sum / #plan.resolved.layers
end

describe("kv.policy.mixedkv", function()
  it("gives every published model the published mean of angle bits", function()
    local recorded = { tinyllama = { 22, 64 }, ["mistral-7b"] = { 32, 128 }, smollm2 = { 24, 64 }, ["phi-1.5"] = { 24, 64 }, ["stablelm-2"] = { 32, 64 },
      starcoder2 = { 40, 128 }, ["olmo-1b"] = { 32, 64 } }
    for name, p in pairs(require("kelvin.mixedkv").presets()) do
      local shape = recorded[name] or recorded["mistral-7b"]
      local plan = resolve(kv.policy.mixedkv { preset = name }, model("x", shape[1], 2, shape[2]))
      H.close(angle_bits(plan), p.published.angle_bits, 6e-4, name)
    end
  end)

  it("finds the preset by the model's name, then by its shape", function()
    local match = require("kelvin.mixedkv").match
    assert.are.equal("smollm2", match(model("SmolLM2 135M Instruct", 30, 3, 64)).name)
    assert.are.equal("mistral-7b", match(model("mistralai/Mistral-7B-Instruct-v0.3", 32, 8, 128)).name)
    assert.are.equal("phi-1.5", match(model("phi-1_5", 24, 32, 64)).name)
    assert.are.equal("tinyllama", match(model("unnamed", 22, 4, 64)).name)
    assert.are.equal("phi-1.5", match(model("unnamed", 24, 32, 64, "phi2")).name)
    assert.is_nil(match(model("unnamed", 6, 3, 64)))
  end)

  it("boosts the preset's layers and no others", function()
    local y = resolve(kv.policy.mixedkv { preset = "phi-1.5", sink = 4 }, model("x", 24, 2, 64)).resolved.layers
    assert.are.same({ 256, 128, 64, 256 }, { angles(y[8].k), angles(y[9].k), angles(y[9].v), angles(y[17].k) })
    assert.are.equal(4, y[9].sink)
    assert.matches("norm=log,norm_bits=4", y[1].v.params)
  end)

  it("takes early boost, ranges and protected ends", function()
    local m = model("x", 12, 2, 64)
    local y = resolve(kv.policy.mixedkv { early = 4, v_angles = 64, edge = 1 }, m).resolved.layers
    assert.are.equal("q8_0", y[1].k.codec)
    assert.are.equal("q8_0", y[12].v.codec)
    assert.are.same({ 256, 64, 128 }, { angles(y[4].k), angles(y[4].v), angles(y[5].k) })
    y = resolve("policy=mixedkv:layers=2-3+7:codec=turboangle-rebalanced:k_angles=512,recent=32", m).resolved.layers
    assert.are.same({ 256, 512, 512, 256, 512 }, { angles(y[1].k), angles(y[2].k), angles(y[3].k), angles(y[4].k), angles(y[7].k) })
    assert.are.equal(32, y[1].recent)
  end)

  it("says what it does not know", function()
    local m = model("x", 6, 3, 64)
    assert.matches("^policy 'mixedkv': no preset fits model 'x' %(6 layers, 3 K/V heads, head_dim 64%); name one of early_boost_mistral_like, mistral", H.fails(resolve, "policy=mixedkv", m))
    assert.matches("preset 'llama' is unknown; known: auto, uniform, early_boost", H.fails(resolve, "policy=mixedkv:preset=llama", m))
    assert.matches("layers='3' ?.*is not ranges", H.fails(resolve, kv.policy.mixedkv { layers = "3-x" }, m):gsub("3%-x", "3"))
    assert.matches("policy 'mixed' is unknown; known: budgets, hybrid, mixedkv, saved", H.fails(resolve, "policy=mixed", m))
    assert.matches("unknown parameter 'boost'", H.fails(resolve, "policy=mixedkv:boost=3", m))
  end)
end)

describe("kv.policy.budgets", function()
  local budgets = require "kelvin.budgets"

  it("finds eigenvalues", function()
    -- A rotated diagonal: H diag(1..8) H with a Hadamard matrix has the values 1..8.
    local n, a = 8, require("ffi").new "double[64]"
    local function sign(i, j)
      local bits, s = require("bit").band(i, j), 1
      while bits > 0 do
        if bits % 2 == 1 then s = -s end
        bits = math.floor(bits / 2)
      end
      return s
    end
    for i = 0, n - 1 do
      for j = 0, n - 1 do
        a[i * n + j] = 0
        for k = 0, n - 1 do a[i * n + j] = a[i * n + j] + sign(i, k) * (k + 1) * sign(k, j) / n end
      end
    end
    local e = budgets.eigenvalues(a, n)
    table.sort(e)
    H.close(e, { 1, 2, 3, 4, 5, 6, 7, 8 }, 1e-9)
  end)

  it("gives layers the bits of the published rules", function()
    local spectra = { { { 4, 4 } }, { { 1, 1 } }, { { 1, 0 } } }
    -- variance: means 4, 1, 0.5 over 11/6; base 4, strength 0.5
    H.close(budgets.rules.variance(spectra, 4, 0.5), { 4 + 24 / 11 - 1, 4 + 6 / 11 - 1, 4 + 3 / 11 - 1 }, 1e-12)
    -- entropy: ln 2, ln 2, 0 over their mean
    H.close(budgets.rules.entropy(spectra, 4, 1), { 6, 6, 0 }, 1e-12)
    -- lagrange: 1/2 log2(value / level): 6 components, level 4^-4.4
    local b = budgets.rules.lagrange(spectra, 4)
    H.close(b, { 5.4, 4.4, 2.2 }, 1e-6)
    assert.are.same({ 6, 4, 2 }, budgets.whole({ 5.45, 4.4, 2.2 }, 4, 1, 8, true))
    assert.are.same({ 5, 4, 2 }, budgets.whole(b, 4, 1, 8, false))
    assert.are.same({ 8, 3, 1 }, budgets.whole({ 20, 3, 0.2 }, 4, 1, 8, true))
  end)

  it("keeps the mean on a model, and says what it needs", function()
    local tiny = kv.model(H.root .. "/tests/golden/tiny/llama.gguf")
    local ids = {}
    for i = 1, 64 do ids[i] = 3 + (i * 37 + i * i) % (tiny.n_vocab - 3) end
    local calib = tiny:calibrate { tokens = ids, context = 64, chunks = 1, what = "moments" }
    for _, rule in ipairs { "variance", "entropy", "lagrange" } do
      local plan = resolve("policy=budgets:k_bits=3:v_bits=5:rule=" .. rule, tiny, { calib = calib })
      assert.are.same({ 3, 5 }, { plan.bits_nominal.k, plan.bits_nominal.v })
    end
    assert.matches("spectra come from a calibration", H.fails(resolve, "policy=budgets", tiny))
    assert.matches("rule=x is none of variance, entropy, lagrange", H.fails(resolve, "policy=budgets:rule=x", tiny, { calib = calib }))
    assert.matches("codec 'turboangle' has no parameter bits", H.fails(resolve, "policy=budgets:codec=turboangle", tiny, { calib = calib }))
  end)
end)

describe("kv.policy.hybrid", function()
  local m = model("toy", 2, 2, 64)

  it("picks for every slot the least error that fits; on Gaussian vectors TurboAngle with its own radii does not", function()
    local choice = require("kelvin.hybrid").choose(m, { bits = 4.25, tolerance = .02, tokens = 64, per = "head" })
    assert.are.equal(8, #choice.rows)
    assert.are.equal("synthetic", choice.source)
    for _, r in ipairs(choice.rows) do
      assert.is_true(r.bits <= 4.27 and r.bits > 3.5)
      assert.is_true(r.kind == "turboquant" or r.kind == "turboangle-lloyd")
      assert.is_true(r.least.turboangle > 1.1 * r.least.turboquant and r.least["turboangle-lloyd"] < 1.25 * r.least.turboquant)
      for _, other in pairs(r.least) do assert.is_true(r.score <= other) end
    end
  end)

  it("saves a choice that another plan reads", function()
    local path = os.tmpname()
    local a = resolve(kv.policy.hybrid { source = "synthetic", bits = 5.25, tokens = 64, per = "layer", save = path, sink = 4 }, m)
    local b = resolve(kv.policy.saved { file = path, sink = 4 }, m)
    assert.are.same(a.bits_payload, b.bits_payload)
    assert.are.equal(a.resolved.layers[2].v.params, b.resolved.layers[2].v.params)
    assert.matches("is for n_layers=2, model has 3", H.fails(resolve, "policy=saved:file=" .. path, model("toy", 3, 2, 64)))
    os.remove(path)
  end)

  it("judges attention's output and weights: 0 for exact codecs and exact tokens, less with more bits", function()
    local judge = require "kelvin.judge"
    local x = judge.layer(m, 1, nil, { tokens = 48 })
    for _, name in ipairs { "vector", "attention", "kl" } do
      for _, side in ipairs { "k", "v" } do
        local before
        for _, bits in ipairs { 2, 4, 6 } do
          local s = judge.scores(x, kv.codec("turboquant", { bits = bits }), side, name)
          assert.are.equal(2, #s)
          assert.is_true(s[1] > 0 and (not before or s[1] < before), name .. side)
          before = s[1]
        end
        H.close(judge.scores(x, kv.codec "f32", side, name)[2], 0, name == "vector" and 1e-9 or 1e-11)
      end
    end
    local kept = judge.layer(m, 1, nil, { tokens = 48, sink = 48 })
    for _, side in ipairs { "k", "v" } do H.close(judge.scores(kept, kv.codec "turboquant-2", side, "attention")[1], 0, 1e-11) end
    assert.matches("judge 'x' is none of attention, kl, vector", H.fails(judge.scores, x, kv.codec "f32", "k", "x"))
  end)

  it("spends a mean of bits where they help most", function()
    local o = { bits = 4.25, tolerance = .02, tokens = 48, per = "head", judge = "attention" }
    local function total(choice)
      local sum = 0
      for _, r in ipairs(choice.rows) do sum = sum + r.score end
      return sum
    end
    local each = require("kelvin.hybrid").choose(m, o)
    o.budget = "mean"
    local mean = require("kelvin.hybrid").choose(m, o)
    assert.is_true(mean.mean_bits <= 4.25 + 1e-9 and mean.mean_bits > 4)
    assert.is_true(total(mean) < total(each))
    assert.matches("a mean of 0.01 bits is less than", H.fails(resolve, kv.policy.hybrid { source = "synthetic", bits = 1, tokens = 32, budget = "mean", tolerance = 0 }, m):gsub("of 1 bits", "of 0.01 bits"))
  end)

  it("judges a model's own keys and values, and what its layers' errors do to the output", function()
    local tiny = H.kv.model(H.root .. "/tests/golden/tiny/llama.gguf")
    local ids = {}
    for i = 1, 80 do ids[i] = 3 + (i * 37 + i * i) % (tiny.n_vocab - 3) end
    local calib = tiny:calibrate { tokens = ids, context = 40, chunks = 1 }
    local path = H.temporary ".json"
    local plan = resolve(kv.policy.hybrid { bits = 4.5, judge = "attention", budget = "mean", weigh = "kld", save = path, sink = 2 }, tiny, { calib = calib })
    local choice = kv.json.decode(io.open(path):read "*a", "choice")
    assert.are.same({ "captured", 40, "attention", "mean", "kld" }, { choice.source, choice.tokens, choice.judge, choice.budget, choice.weigh })
    assert.is_true(choice.rows[1].weight > 0)
    assert.is_true(plan.bits_payload.mean <= 4.5 + 1e-9)
    assert.matches("weigh=kld needs budget=mean and source=captured", H.fails(resolve, "policy=hybrid:weigh=kld", tiny, { calib = calib }))
    assert.matches("judge=x is none of attention, kl, vector", H.fails(resolve, "policy=hybrid:judge=x", tiny, { calib = calib }))
    assert.matches("budget=x is none of mean, slot", H.fails(resolve, "policy=hybrid:budget=x", tiny, { calib = calib }))
  end)

  it("needs a text to judge on captured vectors", function()
    assert.matches("source=captured needs a text", H.fails(resolve, "policy=hybrid", m))
    assert.matches("no codec here fits bits=1 ", H.fails(resolve, "policy=hybrid:bits=1:source=synthetic:tolerance=0", m))
  end)
end)
