-- What needs a model: skipped with the reason when it is not here.
local H = require "helper"
local kv = H.kv

local TEXT = ("The cache holds a key and a value for every token that was read, and attention reads them all again. "):rep(12)

describe("a model by name", function()
  it("is looked for in KELVIN_MODELS, and says how to get it", function()
    assert.matches("^model 'no%-such%-model' is unknown", H.fails(kv.model, "no-such-model"))
    assert.are.equal("model './no-such.gguf': no such file", H.fails(kv.model, "./no-such.gguf"))
    assert.are.equal("kv.model: a number given, a name or path is needed", H.fails(kv.model, 3))
  end)
end)

describe("smollm2-135m", function()
  it("tells its geometry and its file", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    assert.are.same({ 30, 9, 3, 64, 49152 }, { m.n_layers, m.n_heads, m.n_kv_heads, m.head_dim, m.n_vocab })
    assert.matches("^model smollm2%-135m: llama, 30 layers", tostring(m))
    assert.are.equal(0, m:layer(30).sliding_window)
    assert.matches("layer 31 is outside 1..30", H.fails(m.layer, m, 31))
    assert.are.equal("smollm2-135m", m.name)
    assert.is_true(#m:meta() > 10 and #m:tensors() > 200)
    assert.is_nil(m:key_bias(1))
  end)

  it("tokenizes and back", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    local text = "Hello wörld, 12345 — naïve\n\tend"
    assert.are.equal(text, m:detokenize(m:tokenize(text)))
    assert.are.equal("", m:detokenize {})
    assert.matches("token 2 is 49152, outside 0..49151", H.fails(m.detokenize, m, { 1, 49152 }))
  end)

  it("feeds, forks, truncates and reads its cache", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    local ids = m:tokenize(TEXT)
    local s = m:session { arm = "k=q8_0,v=q4_0,sink=2,recent=4", max_tokens = 128 }
    s:feed { unpack(ids, 1, 40) }
    assert.are.equal(40, s.n_tokens)
    local fork = s:fork()
    s:feed(ids[41])
    fork:feed(ids[41])
    assert.are.same(s:logits():totable(), fork:logits():totable())
    fork:truncate(40)
    assert.are.equal(40, fork.n_tokens)
    assert.are.equal(41, s.n_tokens)
    assert.are.same({ 41, 64 }, s:read({ layer = 3, head = 2, side = "v" }):shape())
    local b = s:bytes()
    H.close(b.total, b.codes + b.scales + b.outliers + b.exact + b.padding + b.slack + b.state + b.shared, 1e-9)
    assert.is_true(s:pairs().fraction > 0.3)
    assert.matches("outside 0..41", H.fails(s.truncate, s, 42))
    assert.matches("max_tokens=128", H.fails(s.feed, s, TEXT))
  end)

  it("has no logits before any were asked for", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    local s = m:session { max_tokens = 16 }
    assert.matches("no logits", H.fails(s.logits, s))
    assert.matches("no logits to start from", H.fails(s.generate, s, {}))
    assert.matches("no tokens", H.fails(s.tap, s, { layer = 1 }))
  end)

  it("generates the same text twice, and taps what it read", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    local function go() return m:session({ max_tokens = 64 }):generate { prompt = "Once upon a time", max_tokens = 6, temperature = 0.8, top_k = 40, seed = 5 } end
    local a, report = go()
    assert.are.equal(a, (go()))
    assert.are.equal("length", report.ended)
    assert.are.equal(6, report.n_tokens)
    local s = m:session { max_tokens = 16 }
    s:feed "Once upon a time"
    local k = s:tap { layer = 2, what = "k" }
    assert.are.same({ 3, s.n_tokens, 64 }, k:shape())
    local exact = s:read { layer = 2, head = 1, side = "k" }
    H.close(k:select(1, 1):totable(), exact:totable(), 2e-3)
  end)

  it("calibrates means and ranks layers", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    local c = m:calibrate { text = TEXT, chunks = 2, context = 64, skip = 4 }
    assert.are.equal(120, c.n_tokens)
    assert.are.same({ 64 }, c:mean("k", 1, 1):shape())
    local stats, seen = c:stats(), {}
    for l = 1, 30 do seen[stats:rank(l, "k")] = true end
    for r = 1, 30 do assert.is_true(seen[r]) end
    assert.is_true(stats[1].k.mean_share > 0 and stats[1].k.mean_share < 1)
    local plan = kv.policy.resolve("turboquant-4,mean=both,page_rope=k", m, { calib = c })
    assert.is_true(plan.resolved.layers[1].page_rope)
    assert.matches("tokens, one chunk of context=64 needs as many", H.fails(m.calibrate, m, { text = "short", context = 64 }))
    assert.matches("has no key bias", H.fails(kv.policy.resolve, "q4_0,mean=bias", m))
  end)

  it("evaluates with its controls: identity is exactly 0, canary fails, mutation shows, a covering window is VACUOUS", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    local seen, shares = {}, {}
    local rows = kv.eval { model = m, text = TEXT, context = 64, chunks = 1, arms = { "f32", "q4_0", "q4_0,recent=64,name=window" },
      on_row = function(r) seen[#seen + 1] = r.arm end, on_progress = function(s) shares[#shares + 1] = s end }
    assert.are.same({ "f32", "q4_0", "window" }, seen)
    assert.are.equal(1, shares[#shares])
    local f32, q4, window = rows[1], rows[2], rows[3]
    assert.are.equal(31, q4.n_scored)
    assert.are.equal(0, q4.controls.identity.max_kld)
    assert.is_true(q4.controls.canary.mean_kld > 1)
    assert.are.equal("ok", q4.controls.mutation.status)
    assert.are.equal("ok", q4.status)
    assert.is_true(q4.kld.mean > 0 and q4.kld.max >= q4.kld.p99)
    H.close(q4.compressed_pair_fraction, 1, 1e-9)
    H.close(q4.bits_payload, 4.5, 1e-9)
    assert.is_true(q4.bits_allin >= 4.5 and q4.bits_allin < 6)
    assert.is_true(f32.kld.mean < 1e-5)
    assert.are.equal("VACUOUS", window.status)
    assert.is_false(window.ranked)
    assert.are.equal("not applicable", window.controls.mutation.status)
    assert.matches("VACUOUS", tostring(rows))
    assert.matches("Mean    KLD: +[%d.]+ ± ", require("kelvin.evaltext").llama(q4))
    assert.are.equal(q4.kld.mean, kv.json.decode(kv.json.encode(q4)).kld.mean)
  end)

  it("refuses an evaluation that cannot be", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    assert.matches("context=4096 needs as many", H.fails(kv.eval, { model = m, text = TEXT, context = 4096, arms = { "q4_0" } }))
    assert.matches("arms = ", H.fails(kv.eval, { model = m, text = TEXT }))
    assert.matches("score='half' is none of", H.fails(kv.eval, { model = m, text = TEXT, score = "half", arms = { "q4_0" } }))
    assert.matches("codec 'q3' is unknown", H.fails(kv.eval, { model = m, text = TEXT, arms = { "q3" }, context = 64, chunks = 1 }))
  end)
end)
