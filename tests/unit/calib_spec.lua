local H = require "helper"
local kv = H.kv

local MODEL = "smollm2-135m"

-- Sentences that differ all the way, so that a part of the text says nothing that another part has said.
local function prose(seed, n)
  local words = { "river", "stone", "morning", "letter", "captain", "garden", "window", "silver", "thought", "market", "winter", "bread", "music", "harbour", "engine", "field" }
  local verbs = { "crossed", "found", "remembered", "sold", "heard", "painted", "lost", "carried" }
  local out = {}
  for i = 1, n do
    local function pick(t, k) return t[math.floor(kv.random(seed, 0, 8 * i + k) * #t) + 1] end
    out[i] = ("The %s %s %s the %s near %d %ss, and the %s %s it."):format(pick(words, 0), pick(words, 1), pick(verbs, 2), pick(words, 3), i + 100 * seed, pick(words, 4), pick(words, 5), pick(verbs, 6))
  end
  return table.concat(out, " ")
end

local cache
local function calibrated()
  local m = H.model(MODEL)
  if m and not cache then cache = m:calibrate { text = prose(1, 30), chunks = 2, context = 96, rows = 100, source = "prose 1" } end
  return m, cache
end

describe("a calibration", function()
  it("keeps moments of keys, values and queries, and rows", function()
    local m, c = calibrated()
    if not m then return end
    assert.are.equal(2 * 92, c.n_tokens)
    assert.are.equal(100, c.n_rows)
    local d = m.head_dim
    for _, side in ipairs { "k", "k_pre", "v", "q", "q_pre" } do
      local mean, rms, second = c:mean(side, 3, 2):totable(), c:rms(side, 3, 2):totable(), c:second(side, 3, 2)
      assert.are.same({ d, d }, second:shape())
      for i = 1, d do
        H.close(second:get(i, i), rms[i] ^ 2, 1e-4 * rms[i] ^ 2)
        assert.is_true(rms[i] >= math.abs(mean[i]) * 0.9999)
      end
    end
    -- Rotations keep the length of a key.
    local function energy(side)
      local sum = 0
      for _, x in ipairs(c:rms(side, 5, 1):totable()) do sum = sum + x * x end
      return sum
    end
    H.close(energy "k", energy "k_pre", 1e-4 * energy "k")
    assert.are.same({ 100, d }, c:rows("v", 1, 1):shape())
    local q = c:quantile("v", 1, 1, { 0, 0.5, 1 })
    for i = 1, d do assert.is_true(q:get(1, i) <= q:get(2, i) and q:get(2, i) <= q:get(3, i)) end
    assert.matches("rows of kind 0 are not kept", H.fails(c.rows, c, "k", 1, 1))
    assert.matches("side 'x' is none of k, k_pre, v, q, q_pre", H.fails(c.mean, c, "x", 1, 1))
    assert.is_true(c:stats()[1].k.rms > 0 and c:stats()[1].k.outlier >= 1)
  end)

  it("keeps the mean of values where without it tokens are longer for their length, or says so", function()
    local model = H.kv.model(H.root .. "/tests/golden/tiny/llama.gguf")
    local ids = {}
    for i = 1, 130 do ids[i] = 3 + (i * 37 + i * i) % (model.n_vocab - 3) end
    local c = model:calibrate { tokens = ids, context = 64, chunks = 2, rows = 50 }
    local function resolve(which, calib) return kv.policy.resolve("kivi-2:bits=3,page_rope=k,mean=" .. which, model, { calib = calib or c }) end
    local rows, mean, sum = c:rows("v", 1, 1):totable(), c:mean("v", 1, 1):totable(), 0
    for _, row in ipairs(rows) do
      local all, less = 0, 0
      for d, x in ipairs(row) do all, less = all + x * x, less + (x - mean[d]) ^ 2 end
      sum = sum + less / all
    end
    H.close(sum / #rows, c:_stretch(1, 1), 1e-6)
    assert.is_nil(resolve("both").warning)
    -- A model none of whose means of values is good, and one all of whose are.
    local function plan(which, stretch)
      c._stretch = function() return stretch end
      local out = resolve(which)
      c._stretch = nil
      return out
    end
    local function rows_of(p) return tostring(model:session { plan = p, max_tokens = 64 }:feed({ unpack(ids, 1, 40) }):read { layer = 2, side = "v" }) end
    assert.are.equal(model.n_kv_heads, plan("auto", 3).resolved.layers[1].v_means_kept)
    assert.are.equal(rows_of(resolve "k"), rows_of(plan("auto", 3)))
    assert.is_nil(plan("auto", .9).resolved.layers[1].v_means_kept)
    assert.are.equal(rows_of(resolve "both"), rows_of(plan("auto", .9)))
    assert.are_not.equal(rows_of(resolve "both"), rows_of(resolve "k"))
    assert.matches("less their mean, values of layer 1 %(3.0%), .* are longer", plan("both", 3).warning)
    assert.matches("warning: policy", plan("v", 3):describe())
    assert.is_nil(plan("k", 3).warning)
    local moments = model:calibrate { tokens = ids, context = 64, chunks = 2, what = "moments" }
    assert.is_nil(resolve("both", moments).warning)
    assert.matches("mean=auto needs the calibration's rows, which were left out", H.fails(resolve, "auto", moments))
  end)

  it("leaves out what was not asked for, and says so", function()
    local model = H.kv.model(H.root .. "/tests/golden/tiny/llama.gguf")
    local ids = {}
    for i = 1, 130 do ids[i] = 3 + (i * 37 + i * i) % (model.n_vocab - 3) end
    local function calibrate(what) return model:calibrate { tokens = ids, context = 64, chunks = 2, rows = 50, what = what } end
    local all, moments, rows = calibrate(), calibrate "moments", calibrate { "covariances", "quantiles" }
    assert.are.same({ "moments", "rows", "queries" }, all:describe().what)
    assert.are.same({ "moments" }, moments:describe().what)
    assert.are.same({ "moments", "rows" }, rows:describe().what)
    assert.matches("; moments alone$", tostring(moments))
    assert.are.same(all:second("k", 2, 1):totable(), moments:second("k", 2, 1):totable())
    assert.are.same(all:rows("v", 2, 1):totable(), rows:rows("v", 2, 1):totable())
    assert.matches("queries were left out of this one", H.fails(rows.mean, rows, "q", 1, 1))
    assert.matches("rows were left out of this one", H.fails(moments.rows, moments, "v", 1, 1))
    assert.matches("what='mean' is none of moments, covariances, outliers, rows, quantiles, queries", H.fails(calibrate, "moments,mean"))
    local function resolve(arm, c) return kv.policy.resolve(arm, model, { calib = c }) end
    assert.is_true(resolve("turboquant-4,mean=both,page_rope=k", moments).bits_payload.mean > 4)
    assert.matches("codec 'nuq' is made from rows, which this calibration left out", H.fails(resolve, "nuq", moments))
    -- Without queries a calibrated basis is another one; with rows or without it is the same.
    local path, sizes = H.temporary ".kvcal", {}
    for i, c in ipairs { all, rows, moments } do
      c:save(path)
      local again = kv.calibrate { model = model, artifact = path }
      assert.are.equal(c:digest(), again:digest())
      assert.are.same(c:describe(), again:describe())
      local f = io.open(path)
      sizes[i] = f:seek "end"
      f:close()
    end
    assert.is_true(sizes[1] > sizes[2] and sizes[2] > sizes[3])
  end)

  it("lists outlying channels", function()
    local model = H.kv.model(H.root .. "/tests/golden/tiny/llama.gguf")
    local ids = {}
    for i = 1, 64 do ids[i] = 3 + (i * 37 + i * i) % (model.n_vocab - 3) end
    local c = model:calibrate { tokens = ids, context = 64, chunks = 1, what = "moments" }
    local all, rms = c:outliers("k", 1, 1, 0.001), c:rms("k", 1, 1):totable()
    assert.are.equal(model.head_dim, #all)
    table.sort(rms, function(a, b) return a > b end)
    for i, o in ipairs(all) do assert.are.equal(rms[i], o.rms) end
    local few = c:outliers("k", 1, 1, all[3].times)
    assert.are.equal(2, #few)
    assert.are.equal(all[1].channel, few[1].channel)
    assert.matches("times=0 is not a number above 0", H.fails(c.outliers, c, "k", 1, 1, 0))
  end)

  it("is the same after a file, which other models refuse", function()
    local m, c = calibrated()
    if not m then return end
    local path = os.tmpname()
    assert.are.equal(c, c:save(path))
    local d = kv.calibrate { model = m, artifact = path }
    assert.are.equal(c:digest(), d:digest())
    assert.are.equal("prose 1", d.source)
    assert.are.same(c:describe(), d:describe())
    assert.are.same(c:mean("k", 7, 3):totable(), d:mean("k", 7, 3):totable())
    local function bits(calib) return kv.policy.resolve("turboquant-4,mean=both,page_rope=k", m, { calib = calib }).bits_payload.mean end
    assert.are.equal(bits(c), bits(d))
    local other = H.model "gemma-3-270m"
    if other then assert.matches("made for 30 layers, 3 K/V heads, 9 heads, head_dim 64; model '.*' has 18, 1, 4, 256", H.fails(kv.calibrate, { model = other, artifact = path })) end
    local f = assert(io.open(path, "r+b"))
    f:seek("set", 5000)
    f:write "x"
    f:close()
    assert.matches("the payload's checksum does not fit", H.fails(kv.calibrate, { model = m, artifact = path }))
    os.remove(path)
    assert.matches("No such file", H.fails(kv.calibrate, { model = m, artifact = path }))
    assert.matches("calibrate: artifact and text, one of them", H.fails(kv.calibrate, { model = m, artifact = path, text = "x" }))
    assert.matches("calibrate: text and weights, one of them", H.fails(kv.calibrate, { model = m, weights = true, text = "x" }))
    assert.matches("weights = true or artifact = is needed", H.fails(kv.calibrate, { model = m }))
  end)

  it("needs no text where weights = true: the same numbers every time, and tables for every codec", function()
    local m = H.model(MODEL)
    if not m then return end
    local a, b = m:calibrate { weights = true, chunks = 1, context = 64, rows = 60 }, m:calibrate { weights = true, chunks = 1, context = 64, rows = 60 }
    assert.are.equal(a:digest(), b:digest())
    assert.are.equal("none: the weights alone", a.source)
    for _, arm in ipairs { "scalar:bits=3:codebook=calibrated", "scalar:bits=3:scale=calibrated", "scalar:bits=2:outliers=16:outlier_bits=3:pick=calibrated", "fp8-e4m3-head,mean=both", "kvquant-3" } do
      assert.is_true(kv.policy.resolve(arm, m, { calib = a }).table_bytes > 0, arm)
    end
    assert.matches("from weights: text = or tokens = of held%-out text is needed", H.fails(a.check, a, "q4_0,mean=k"))
    local path = os.tmpname()
    a:save(path)
    assert.are.equal(a.source, kv.calibrate { model = m, artifact = path }.source)
    os.remove(path)
  end)

  it("may not be scored on its own text, wherever it begins", function()
    local m, c = calibrated()
    if not m then return end
    local function eval(text) return kv.eval { model = m, text = text, context = 64, chunks = 4, controls = false, arms = { "q4_0,mean=k" }, calib = c } end
    assert.matches("kv.eval: %d+ of the calibration's 4 runs of 32 tokens %(prose 1%) are in the scored text: calibrate on another text", H.fails(eval, "Something else before. " .. prose(1, 30)))
    local row = eval(prose(2, 12))[1]
    assert.are.equal("ok", row.status)
    assert.is_true(row.bits_shared > 0)
    assert.are.equal(c:digest(), row.manifest.calibration.sha256)
  end)

  it("is held against a data-oblivious twin, and says when it loses", function()
    local m, c = calibrated()
    if not m then return end
    local x = c:check("k=turboquant-3,v=turboquant-3,mean=k,page_rope=k,sink=4", { chunks = 1, context = 64 })
    assert.is_false(x.lost)
    assert.is_true(x.kld > 0 and x.kld < x.twin_kld)
    assert.matches("beats its data%-oblivious twin on held%-out text: KLD ", tostring(x))
    assert.are.equal(x, c.notes.checks[1])
    x.lost = true
    assert.matches("LOSES to its data%-oblivious twin", tostring(x))
    local path = os.tmpname()
    local log, said = require "kelvin.log", {}
    local warn = log.warn
    log.warn = function(fmt, ...) said[#said + 1] = fmt:format(...) end
    c:save(path)
    local again = kv.calibrate { model = m, artifact = path }
    log.warn = warn
    os.remove(path)
    assert.are.equal(2, #said)
    assert.matches("LOSES to", said[2])
    assert.are.equal(x.kld, again.notes.checks[1].kld)
    for _, notes in ipairs { "5", '"x"', "no JSON", '{"text":{},"checks":7}', '{"checks":[1,{},{"arm":"a"}]}' } do       -- a file's notes may be anything
      local C = require("kelvin.ffi").C
      assert.are.equal(0, C.kv_calib_note(again._c, notes))
      assert.are.equal(0, C.kv_calib_save(again._c, path))
      local odd = kv.calibrate { model = m, artifact = path }
      assert.are.same({}, odd.notes)
      os.remove(path)
    end
    assert.matches("held%-out text is needed", H.fails(again.check, again, "q4_0,mean=k"))
    x.lost = false
  end)
end)
