-- Every codec at the same all-in bits, without and with mean removal: which published claims hold on two small models?
--
--   kelvin run experiments/02_all_codecs.lua [--model gemma-3-270m] [--text wiki.test.raw --calib wiki.valid.raw] [--shard 1/8]
--
-- Four sinks are exact in every arm (without them means and bases lose to one outlier token); no recent window, so that every
-- bit is the codec's.  A chunk is the sinks and 38 pages of 64 tokens, or 19 of 128: no page is part empty, and what a
-- sequence holds besides (sinks, page tables) is 0.04 bits.  All of a chunk is scored.  For each method and target the ladder
-- takes the first setting listed that is within 2 %; the order of targets is that of interest, so that a run cut short
-- has the middle of the range.
local kv = require "kelvin"

-- Every combination of lists: each{ "scalar", bits = { 2, 3 }, norm = "raw" }.  The list named last turns slowest.
local function each(spec, ...)
  local out = { spec }
  for _, name in ipairs { ... } do
    local longer = {}
    for _, value in ipairs(spec[name]) do
      for _, s in ipairs(out) do
        local c = {}
        for k, v in pairs(s) do c[k] = v end
        c[name] = value
        longer[#longer + 1] = c
      end
    end
    out = longer
  end
  return out
end

local function join(...)
  local out = {}
  for _, list in ipairs { ... } do
    for _, x in ipairs(list) do out[#out + 1] = x end
  end
  return out
end

local function range(from, to, step)
  local out = {}
  for x = from, to, step do out[#out + 1] = x end
  return out
end

local eight = range(1, 8, 1)

-- TurboQuant's way to fractional bits (section 4.3): some channels with one bit more, apart; a second norm, and the transform's padding, are paid.
local function scalar(params)
  local plain, split = { "scalar", bits = eight }, {}
  for name, value in pairs(params) do plain[name] = value end
  for _, n in ipairs { 2, 4, 8 } do
    for bits = 1, 8 do
      local s = { "scalar", bits = bits, outliers = n, outlier_bits = math.min(8, bits + 1), pick = "calibrated" }
      for name, value in pairs(params) do s[name] = value end
      split[#split + 1] = s
    end
  end
  return join(each(plain, "bits"), split)
end

-- Angles and bits of radii where the two errors are about equal.
local splits = { { 4, 1 }, { 5, 1 }, { 6, 1 }, { 8, 1 }, { 10, 1 }, { 8, 2 }, { 10, 2 }, { 12, 2 }, { 16, 2 }, { 16, 3 }, { 24, 3 }, { 32, 3 }, { 32, 4 }, { 48, 4 }, { 64, 4 }, { 64, 5 },
  { 96, 5 }, { 128, 5 }, { 128, 6 }, { 192, 6 }, { 256, 6 }, { 256, 7 }, { 384, 7 }, { 512, 7 }, { 512, 8 }, { 768, 8 }, { 1024, 8 } }
local function angles(norm, less)
  local out = {}
  for _, s in ipairs(splits) do
    local bits = s[2] - (less or 0)
    if bits >= 0 then out[#out + 1] = { "polar", angles = s[1], norm = norm, norm_bits = bits } end
  end
  return out
end

-- PolarQuant's tree: as many directions in a quarter turn above as below.
local function tree()
  local out = {}
  for _, levels in ipairs { 4, 5, 6 } do
    for _, n in ipairs { 16, 32, 8, 12, 20, 24, 28, 40, 48, 64, 96, 128, 192, 256 } do
      out[#out + 1] = { "polar", levels = levels, angles = n, upper = math.max(2, math.floor(n / 4)), norm = "f16" }
    end
  end
  return out
end

-- Stored bits that need no tables to know: KVTC's budget; KVQuant's codes and, for 16 tokens, the list of outliers.
local function budget(s) return s.bits end
local function levels(s, d) return s.bits + 8 * math.ceil(4 * math.ceil(s.outliers / 100 * 16 * d) / 16) * 16 / (16 * d), 16 end

local methods = {
  { name = "turboquant", family = "scalar", k = scalar { norm = "raw" } },
  { name = "turboquant lsq", family = "scalar", k = scalar { norm = "lsq", search = 17 }, targets = { 2.25, 3.25 } },
  { name = "turboquant-prod", family = "scalar", k = each({ "scalar", bits = range(0, 7, 1), residual = "qjl", norm = "raw", gain = { "expected", "norm" } }, "bits", "gain"),
    targets = { 2.25, 3.25, 4.25 } },
  { name = "ggml", family = "int", k = { { "q4_0" }, { "q5_0" }, { "q8_0" }, { "q4_1" }, { "q5_1" } } },
  { name = "kivi", family = "int", k = each({ "kivi-2", bits = eight, group = { 32, 64, 16 } }, "bits", "group"),
    v = each({ "kivi-2", bits = eight, group = { 32, 64, 16, 128, 256 } }, "bits", "group") },
  { name = "turboangle", family = "polar", k = angles "lin", v = angles "log" },
  { name = "turboangle lloyd", family = "polar", k = angles("lloyd", 1), targets = { 3.25 } },
  { name = "polarquant", family = "polar", k = tree() },
  { name = "mxfp", family = "fp", k = { { "mxfp4" }, { "mxfp4", group = 16 }, { "mxfp8-e4m3" }, { "mxfp8-e4m3", group = 16 } } },
  { name = "nvfp", family = "fp", k = { { "nvfp4" }, { "nvfp4", group = 32 }, { "nvfp4", grid = "e4m3" }, { "nvfp4", grid = "e4m3", group = 32 } } },
  { name = "kvquant", family = "nuq", page_rope = true, stored = { k = levels, v = function(s, d) return levels(s, d) + 32 / d, 16 end },
    k = each({ "nuq", bits = { 2, 3, 4 }, outliers = { 0, 1, 0.5, 1.5, 2, 2.5, 3, 3.5, 4 } }, "bits", "outliers") },
  { name = "wf keys, scalar values", family = "wf", page_rope = true, stored = { k = function(s, d) return s.bits + 8 / d end }, k = each({ "wf", bits = range(0.75, 8, 0.125) }, "bits"),
    v = each({ "scalar", bits = eight, norm = "lsq", search = 17 }, "bits") },
  { name = "kvtc by head", family = "pca", page_rope = true, k = each({ "pca", bits = range(8, 1, -0.125) }, "bits"),
    stored = { k = budget, v = budget } },
  { name = "kvtc by head, paper's blocks", family = "pca", page_rope = true, stored = { k = budget, v = budget },
    k = each({ "pca", types = "paper", scale = "token", bits = { 4.25, 2.25, 4.5, 2.5 } }, "bits"), targets = { 2.25, 4.25 } },
  { name = "fused residual", family = "fused", k = each({ "fused", form = "residual", angles = { 16, 8, 32, 64, 128 }, norm_bits = { 4, 3, 2, 1, 5 } }, "angles", "norm_bits"), targets = { 4.5, 5.5 } },
  { name = "fused subspace", family = "fused", k = each({ "fused", form = "subspace", angles = 64, norm_bits = 4, bits = eight, pairs = { 4, 2, 8 } }, "bits", "pairs"), targets = { 3.25, 5.5 } },
}

-- At their own sizes: what papers name, and one thing changed at a time.
local function own(group, list)
  local out = {}
  for i, x in ipairs(list) do out[i] = { name = x[1], arm = x[2], family = group, method = x[1], mean = x.mean or "no" } end
  return out
end
local published = own("as published", {
  { "f16", "f16" }, { "fp8-e4m3", "fp8-e4m3" }, { "turboangle K8V4-log", "turboangle" }, { "polarquant", "polarquant" }, { "kivi-2 g32", "kivi-2" },
  { "kvquant-3-1pct", "k=kvquant-3-1pct,v=kvquant-3-1pct,page_rope=k" }, { "turboquant-2.5", "turboquant-2.5" }, { "turboquant-3.5", "turboquant-3.5" },
})
local ablations = own("ablation", {
  { "tq3", "turboquant-3" }, { "tq3 keys only", "k=turboquant-3,v=f16" }, { "tq3 values only", "k=f16,v=turboquant-3" },
  { "tq2 keys only", "k=turboquant-2,v=f16" }, { "tq2 values only", "k=f16,v=turboquant-2" },
  { "tq3 no sinks", "k=turboquant-3,v=turboquant-3,sink=0" }, { "tq3 no sinks, means", "k=turboquant-3,v=turboquant-3,sink=0,mean=both,page_rope=k", mean = "yes" },
  { "tq3 mean of keys", "k=turboquant-3,v=turboquant-3,mean=k,page_rope=k", mean = "k" }, { "tq3 mean of values", "k=turboquant-3,v=turboquant-3,mean=v", mean = "v" },
  { "tq3 mean of keys after RoPE", "k=turboquant-3,v=turboquant-3,mean=k", mean = "k" },
  { "tq3 no rotation", "turboquant-3:rotation=none" }, { "tq3 dense rotation", "turboquant-3:rotation=orthogonal" },
  { "turboquant-prod-3", "turboquant-prod-3" }, { "residualquant-3", "residualquant-3" }, { "rabitq-3", "rabitq-3" },
  { "tq3 unbiased", "turboquant-3:norm=unbiased" }, { "tq3 lsq", "turboquant-3:norm=lsq" },
})

local middle, outer = { 3.25, 4.25, 2.25, 4.5, 2.75 }, { 5.5, 8.5 }
local context = 4 + 38 * 64

return kv.experiment {
  name = "all_codecs", title = "Every codec at matched all-in bits",
  about = "Every arm: 4 sinks exact (f16), no recent window, the rest compressed; the reference is an exact f32 cache. −mean: calibrated means of keys and values removed, keys in page-relative RoPE.",
  model = "smollm2-135m", data = "jargon", seed = 1,
  context = context, chunks = 7, score = "all", sink = 4, group = 4,
  calibrate = { context = 512, chunks = 8 },

  arms = function(model)
    local function at(targets) return kv.ladder { model = model, targets = targets, methods = methods, context = context, sink = 4, within = 0.02 } end
    return join(at(middle), ablations, published, at(outer))
  end,

  measure = { "kld", "ppl", "bytes_per_token" },
  report = {
    kv.plot { title = "Without mean removal", x = "bits_allin", y = "kld.mean", series = "family", where = { mean = "no" }, log_x = true, log_y = true, front = true, label = "method", height = 900 },
    kv.plot { title = "With mean removal", x = "bits_allin", y = "kld.mean", series = "family", where = { mean = "yes" }, log_x = true, log_y = true, front = true, label = "method", height = 900 },
    kv.table { title = "Mean KLD without mean removal", rows = "method", cols = "target", cell = "kld.mean", where = { mean = "no" } },
    kv.table { title = "Mean KLD with mean removal", rows = "method", cols = "target", cell = "kld.mean", where = { mean = "yes" } },
    kv.table { title = "p99 of KLD without mean removal", rows = "method", cols = "target", cell = "kld.p99", where = { mean = "no" } },
    kv.table { title = "Bits, as measured", rows = "method", cols = "target", cell = "bits_allin", where = { mean = "no" } },
    kv.table { title = "Settings (keys / values where they differ)", rows = "method", cols = "target", cell = "setting", where = { mean = "no" } },
  },
  smoke = { context = 4 + 2 * 64, chunks = 1, calibrate = { context = 128, chunks = 2 } },
}
