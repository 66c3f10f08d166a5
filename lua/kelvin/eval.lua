--- kelvin.eval: the measurement.  Arms run in lockstep with an exact reference over the same tokens, and every run carries
-- its controls: identity (the same cache gives KLD exactly 0), canary (a broken codec must fail), mutation (flipped bits in
-- compressed pages must move the logits) and the share of query-key pairs that compressed storage served.
--
-- Arms go in groups: a small one first, so that rows come early; later groups reuse the stored reference.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local bytes = require "kelvin.bytes"
local codec = require "kelvin.codec"
local policies = require "kelvin.policy"
local plans = require "kelvin.plan"
local models = require "kelvin.model"
local lib = require "kelvin.lib"
local doc = require("kelvin.help").doc

local M = {}

local FIRST_GROUP, GROUP = 3, 6      -- arms that share weight reads; more only adds memory, a third of a chunk is caches
local VACUOUS = 0.5                  -- least share of pairs from compressed storage for a row to be ranked
local CANARY = 1                     -- nats: mean KLD that the broken codec must pass
local CONTROL_TOKENS = 256           -- of the identity and canary chunk
local MUTATION_TOKENS, MUTATION_SHARE = 32, 0.05      -- compressed tokens in which 5 % of the bytes are flipped
local N_BOOT = 1000                  -- block bootstrap resamples (PROTOCOL B.6)
local DEPTHS = { 0, 512, 1024, 2048, 4096, 8192, 16384, 32768 }

local modes = { visibility = C.KV_EVAL_VISIBILITY, stream = C.KV_EVAL_STREAM }

-- ---- arms -----------------------------------------------------------------------------------------------------------

local function arm_label(arm, default)
  local function side(s)
    if type(s) == "string" then return s end
    if codec.is(s) then return s.name end
    if type(s) ~= "table" or type(s[1]) ~= "string" then return "mixed" end
    local names = {}
    for name in pairs(s) do if type(name) == "string" then names[#names + 1] = name end end
    table.sort(names)
    local out = { s[1] }
    for _, name in ipairs(names) do out[#out + 1] = name .. "=" .. tostring(s[name]) end
    return table.concat(out, ":")
  end
  if not arm or not arm.k then return default, default end
  return side(arm.k), side(arm.v)
end

--- Arms as { name, k, v, plan }.  A list of arm texts, tables, policies or plans; or a table of these by name.
local function resolve_arms(model, o)
  local list = {}
  local names = {}
  for key in pairs(o.arms) do if type(key) == "string" then names[#names + 1] = key end end
  table.sort(names)
  local function add(x, name)
    if plans.is(x) then list[#list + 1] = { name = name or x.name, k = x.name, v = x.name, plan = x } return end
    local p = policies.of(x, { sink = o.sink, recent = o.recent, exact = o.exact, page_tokens = o.page_tokens })
    local entry = { name = name or p.name, seed = p.arm and p.arm.seed or o.seed }
    entry.k, entry.v = arm_label(p.arm, p.name)
    if type(x) == "table" and not policies.is(x) and not x.name and not name then entry.name = entry.k == entry.v and entry.k or entry.k .. "/" .. entry.v end
    entry.plan = policies.resolve(p, model, { calib = o.calib, seed = o.seed, context = o.context, params = policies.is(x) and o.params or nil })
    list[#list + 1] = entry
  end
  for _, x in ipairs(o.arms) do add(x) end
  for _, name in ipairs(names) do add(o.arms[name], name) end
  check.that(#list > 0, "kv.eval: no arms")
  return list
end

-- ---- running chunks ---------------------------------------------------------------------------------------------------

local function interrupted() return C.kv_interrupted() == 1 end

--- One chunk through a group.  tick(scored) is called after each slice; false from it stops.
local function run_chunk(e, chunk, buf, n, score_from, tick)
  check(C.kv_eval_begin(e, chunk, buf, n, score_from))
  local more = ffi.new "int[1]"
  repeat
    check(C.kv_eval_step(e, more))
    if tick then tick() end
    if interrupted() then error({ interrupted = true }, 0) end
  until more[0] == 0
end

local function plan_array(group)
  local a = ffi.new("kv_plan*[?]", #group)
  for i, arm in ipairs(group) do a[i - 1] = arm.plan.handle end
  return a
end

local function new_eval(model, mode) return K.handle("kv_eval", C.kv_eval_free, function(out) return C.kv_eval_new(out, model._m, mode) end) end

local function column(e, arm, kind, n)
  local p = C.kv_eval_values(e, arm, kind)
  local out = {}
  if p ~= nil then for i = 0, n - 1 do out[i + 1] = p[i] end end
  return out
end

-- ---- controls -----------------------------------------------------------------------------------------------------------

--- Identity and canary on a short chunk of the same tokens.
local function run_controls(model, mode, chunk_ids, context)
  local n = math.min(context, CONTROL_TOKENS)
  local group = {}
  for _, name in ipairs { "f32", "canary" } do
    group[#group + 1] = { plan = policies.resolve(policies.uniform { name = name, k = name, v = name, exact = "f32" }, model) }
  end
  local e = new_eval(model, mode)
  check(C.kv_eval_arms(e, 2, plan_array(group)))
  run_chunk(e, 0, chunk_ids, n, 0)
  local scored = C.kv_eval_scored(e)
  local worst = 0
  for _, x in ipairs(column(e, 0, 0, scored)) do worst = (x ~= x or worst ~= worst) and 0 / 0 or math.max(worst, math.abs(x)) end
  local sum = 0
  for _, x in ipairs(column(e, 1, 0, scored)) do sum = sum + x end
  local mean = sum / scored
  return { identity = { status = worst == 0 and "ok" or "FAIL", max_kld = worst, n = scored },
    canary = { status = (mean > CANARY or mean ~= mean) and "ok" or "NOT CAUGHT", mean_kld = mean, must_exceed = CANARY, n = scored } }
end

--- Feeds a prefix, forks, flips bits in compressed pages: the next token's logits must differ.  Also tells the path taken.
local function mutation(model, plan, buf, context)
  local n = 1
  for _, y in ipairs(plan.layers) do
    local granule = 1
    for _, side in ipairs { "k", "v" } do
      for _, c in pairs(y[side]) do granule = math.max(granule, c:info_for(model.head_dim, plan.page_tokens, side).granule) end
    end
    n = math.max(n, math.min(context - 1, y.sink + y.recent + math.max(MUTATION_TOKENS, 2 * granule)))
  end
  local ids = {}
  for i = 1, n + 1 do ids[i] = buf[i - 1] end
  local s = model:session { plan = plan, max_tokens = n + 1 }
  s:feed({ unpack(ids, 1, n) }, { logits = "none" })
  local fork = s:fork()
  local flipped = fork:mutate(MUTATION_SHARE, 1)
  s:feed(ids[n + 1])
  local paths = s:paths()
  if flipped == 0 then return { status = "not applicable", flipped = 0 }, paths end
  -- Flipped floats may be NaN or huge; a cache that refuses to go on has read the pages.
  local fed, why = pcall(fork.feed, fork, ids[n + 1])
  if not fed then
    if not tostring(why):find "not finite" then error(why, 0) end
    return { status = "ok", flipped = flipped, max_logit_change = math.huge, tokens = n }, paths
  end
  local a, b = s:logits():_data(), fork:logits():_data()
  local moved = 0
  for i = 0, model.n_vocab - 1 do
    local d = math.abs(a[i] - b[i])
    if d ~= d then moved = math.huge elseif d > moved then moved = d end
  end
  return { status = moved > 0 and "ok" or "FAIL", flipped = flipped, max_logit_change = moved, tokens = n }, paths
end

-- ---- rows -----------------------------------------------------------------------------------------------------------------

local function percentile(sorted, q)
  if #sorted == 0 then return 0 / 0 end
  local at = q * (#sorted - 1) + 1
  local i = math.floor(at)
  local x = sorted[i]
  if i < #sorted then x = x + (at - i) * (sorted[i + 1] - x) end
  return x
end

local function summary(e, arm, lo, hi, seed, n_boot)
  local s = ffi.new "kv_kld_summary"          -- not [1]: what s[0] refers to dies with s
  check(C.kv_eval_summary(e, arm, lo, hi, seed, n_boot, s))
  return s
end

--- Scalars that an exact cache would hold after `context` tokens: a sliding layer keeps its window (PROTOCOL B.5: over what is cached).
local function cached(model, context)
  local rows = 0
  for l = 1, model.n_layers do
    local window = model:layer(l).sliding_window
    rows = rows + (window > 0 and math.min(window, context) or context)
  end
  return rows * model.n_kv_heads * model.head_dim * 2
end
M.cached = cached

local function make_row(run, e, i, arm)
  local model, o = run.model, run.o
  local context = o.context
  local s = summary(e, i - 1, 0, 2 ^ 30, o.boot_seed or 1, N_BOOT)
  local scored = C.kv_eval_scored(e)
  local b, p = ffi.new "kv_bytes[1]", ffi.new "kv_pairs[1]"
  check(C.kv_eval_bytes(e, i - 1, b))
  check(C.kv_eval_pairs(e, i - 1, p))
  local ledger = bytes.new(b[0], cached(model, context))
  local fraction = p[0].total > 0 and p[0].compressed / p[0].total or 0
  local dp = column(e, i - 1, 3, scored)
  table.sort(dp)
  local row = {
    arm = arm.name, k = arm.k, v = arm.v, model = model.name, context = context, n_scored = s.n, chunks = run.chunks, semantics = o.mode, seed = arm.seed,
    bits_nominal = arm.plan.bits_nominal.mean, bits_payload = arm.plan.bits_payload.mean,
    bits_allin = 8 * (ledger.total - ledger.shared) / ledger.elements, bits_shared = 8 * ledger.shared / ledger.elements,
    bits_k = arm.plan.bits_payload.k, bits_v = arm.plan.bits_payload.v, bytes = setmetatable(ledger, nil),
    kld = { mean = s.mean, se = s.se, ci_lo = s.ci_lo, ci_hi = s.ci_hi, median = s.median, p90 = s.p90, p95 = s.p95, p99 = s.p99, p999 = s.p999, max = s.max,
      min = s.min, p10 = s.p10, p05 = s.p05, p01 = s.p01, p001 = s.p001 },
    same_top1 = s.same_top1, same_top1_se = s.same_top1_se, ppl = s.ppl, ppl_se = s.ppl_se, ppl_ref = s.ppl_ref, ppl_ref_se = s.ppl_ref_se,
    ln_ppl_ratio = s.ln_ratio, ln_ppl_ratio_se = s.ln_ratio_se, ppl_ratio = s.ppl_ratio, ppl_ratio_se = s.ppl_ratio_se, cor = s.cor, rms_dp = s.rms_dp, rms_dp_se = s.rms_dp_se,
    dp = { mean = s.mean_dp, mean_se = s.mean_dp_se, max = s.max_dp, min = s.min_dp, p999 = percentile(dp, .999), p99 = percentile(dp, .99), p95 = percentile(dp, .95),
      p90 = percentile(dp, .9), p75 = percentile(dp, .75), median = percentile(dp, .5), p25 = percentile(dp, .25), p10 = percentile(dp, .1), p05 = percentile(dp, .05),
      p01 = percentile(dp, .01), p001 = percentile(dp, .001) },
    compressed_pair_fraction = fraction, controls = {}, path = arm.path, device = model.device or "cpu", device_name = model.device_name, device_weights = model.device_weights,
    status = fraction < VACUOUS and "VACUOUS" or "ok", ranked = fraction >= VACUOUS and not arm.plan.control,
    ppl_inverted = s.ppl < s.ppl_ref or nil,
  }
  if run.warnings or arm.plan.warning then
    row.warnings = {}
    for _, words in ipairs(run.warnings or {}) do row.warnings[1] = words end
    row.warnings[#row.warnings + 1] = arm.plan.warning
  end
  local depth = require("kelvin.json").array {}
  for d = 1, #DEPTHS - 1 do
    local lo, hi = DEPTHS[d], DEPTHS[d + 1]
    if lo < context and hi > run.score_from and context > 512 then
      local x = summary(e, i - 1, lo, hi, 1, 0)
      if x.n > 0 then depth[#depth + 1] = { lo = lo, hi = math.min(hi, context), n = x.n, mean = x.mean, p99 = x.p99 } end
    end
  end
  row.depth = depth
  if run.controls then
    row.controls = { identity = run.controls.identity, canary = run.controls.canary, mutation = arm.mutation }
    for _, c in pairs(row.controls) do
      if c.status ~= "ok" and c.status ~= "not applicable" then row.status, row.ranked = "error", false end
    end
    if row.status == "error" then row.message = "a control did not come out as it must" end
  end
  row.plan = arm.plan.resolved
  row.manifest = run.manifest
  return row
end

local function tokens_hash(buf, n)
  local hex = ffi.new "char[65]"
  check(C.kv_sha256(buf, 4 * n, hex))
  return ffi.string(hex, 64)
end

doc("kv.eval", [[
  kv.eval{ model =, arms = { "q4_0", "k=turboquant-4,v=turboquant-3,mean=both", … }, text = | tokens =, context = 512, chunks = 30,
           score = "second-half", mode = "visibility", sink = 0, recent = 0, calib =, seed =, controls = true,
           on_progress = function(share, text), on_row = function(row) } -> rows
  KL divergence of each arm's next-token distribution from an exact f32 cache, over the same tokens, in lockstep.
  text: tokenized once, cut into chunks of `context` tokens that start from an empty cache (first id replaced by BOS where the
  model wants one, as llama-perplexity does).  score: "second-half" (positions context/2 … context-2) or "all".
  mode: "visibility" (one pass, each query sees what decoding would have) or "stream" (token by token).
  arms: texts, tables for kv.policy.uniform, policies, plans; or a table of these by name.
  A row: arm k v model context n_scored bits_nominal bits_payload bits_allin bits_shared kld.{mean,se,ci_lo,ci_hi,median,p90,p95,p99,p999,max}
  same_top1 ppl ppl_ref ppl_ratio cor rms_dp depth compressed_pair_fraction controls.{identity,canary,mutation} path device device_name status.
  bits_allin: everything that a sequence holds, per scalar that an exact cache would hold; bits_shared: means and calibrated tables, which all sequences of a model share,
  as they would weigh on one sequence of this context.  KLD in nats; ci by block bootstrap over chunks.  status: ok, VACUOUS (under half of the pairs were served compressed) or error.
  warnings: what to know before believing the row, such as a context beyond the model's training or means that do harm; absent when there is nothing.
  tostring(rows) is a table.  Ctrl-C keeps the rows that are complete.]])
function M.run(o)
  local settings = { context = 512, chunks = 30, score = "second-half", mode = "visibility", sink = 0, recent = 0 }
  for key, value in pairs(o) do settings[key] = value end
  o = settings
  check.that(modes[o.mode], "kv.eval: mode='%s' is none of visibility, stream", tostring(o.mode))
  check.that(o.score == "second-half" or o.score == "all", "kv.eval: score='%s' is none of second-half, all", tostring(o.score))
  check.that(type(o.context) == "number" and o.context >= 8 and o.context % 1 == 0, "kv.eval: context=%s is not a whole number from 8", tostring(o.context))
  check.that(type(o.chunks) == "number" and o.chunks >= 1 and o.chunks % 1 == 0, "kv.eval: chunks=%s is not a whole number from 1", tostring(o.chunks))
  check.that(type(o.arms) == "table" and next(o.arms) ~= nil, "kv.eval: arms = { … } is needed: arm texts such as \"q4_0\", policies or plans")
  local model = type(o.model) == "string" and models.open(o.model) or o.model
  check.that(type(model) == "table" and model._m, "kv.eval: model = a name, a path or kv.model(...) is needed")
  local ids = o.tokens or model:tokenize(check.that(o.text, "kv.eval: text = or tokens = is needed"))
  local chunks = math.min(o.chunks, math.floor(#ids / o.context))
  check.that(chunks >= 1, "kv.eval: text %s has %d tokens, one chunk of context=%d needs as many", o.data_name and "'" .. o.data_name .. "'" or "given", #ids, o.context)

  local run = { model = model, o = o, chunks = chunks, score_from = o.score == "all" and 0 or math.floor(o.context / 2) }
  local beyond = model:_beyond(o.context)
  run.warnings = beyond and { beyond } or nil
  local arms = resolve_arms(model, o)
  local n = chunks * o.context
  local buf = ffi.new("int32_t[?]", n)
  for i = 0, n - 1 do buf[i] = ids[i + 1] end
  run.manifest = { schema = "kelvin.row.1", build = lib.build(), model = { name = model.name, path_sha256 = o.model_sha256, bytes = model.file_bytes, arch = model.arch, weights = model.weight_type },
    data = { tokens_sha256 = tokens_hash(buf, n), n_tokens = n, name = o.data_name, text_sha256 = o.text and lib.sha256(o.text) or nil },
    context = o.context, chunks = chunks, score = o.score, semantics = o.mode, seed = o.seed, calibration = o.calib and o.calib:describe() or nil }
  local calibrations = { [o.calib or 0] = o.calib }
  for _, arm in ipairs(arms) do
    if arm.plan.calibration then calibrations[arm.plan.calibration] = arm.plan.calibration end
  end
  for _, c in pairs(calibrations) do c:refuse_overlap(buf, n, "kv.eval") end
  if model.add_bos then
    for c = 0, chunks - 1 do buf[c * o.context] = model.bos end
  end

  local groups = {}
  for i, arm in ipairs(arms) do
    local g = groups[#groups]
    if not g or #g >= (#groups == 1 and (o.first_group or FIRST_GROUP) or (o.group or GROUP)) then
      g = {}
      groups[#groups + 1] = g
    end
    g[#g + 1] = arm
    arm.index = i
  end

  -- Work, in tokens through the model: each chunk once for the reference and once for each arm.
  local work, done = chunks * o.context * (#arms + 1), 0
  local rows = {}
  local t0 = C.kv_now()
  local function progress(what, part)
    if o.on_progress then o.on_progress(math.min(1, (done + (part or 0)) / work), what) end
  end
  local function body()
    local e = new_eval(model, modes[o.mode])
    for g, group in ipairs(groups) do
      check(C.kv_eval_arms(e, #group, plan_array(group)))
      local lanes = #group + (g == 1 and 1 or 0)
      for chunk = 0, chunks - 1 do
        progress(("group %d of %d, chunk %d of %d"):format(g, #groups, chunk + 1, chunks))
        run_chunk(e, chunk, buf + chunk * o.context, o.context, run.score_from)
        done = done + lanes * o.context
      end
      if o.controls ~= false then
        if not run.controls then
          progress "controls: identity and canary"
          run.controls = run_controls(model, modes[o.mode], buf, o.context)
          run.canary_text = ("canary: mean KLD %.3g, must be over %g: %s"):format(run.controls.canary.mean_kld, CANARY, run.controls.canary.status)
        end
        for _, arm in ipairs(group) do
          progress("control: mutation of " .. arm.name)
          arm.mutation, arm.path = mutation(model, arm.plan, buf, o.context)
        end
      end
      for i, arm in ipairs(group) do
        local row = make_row(run, e, i, arm)
        rows[#rows + 1] = row
        if o.on_row then o.on_row(row) end
      end
    end
  end
  local ok, err = xpcall(body, function(x) return type(x) == "table" and x or { message = x, trace = debug.traceback("", 2) } end)
  rows.seconds, rows.tokens = C.kv_now() - t0, done
  if not ok then
    if not err.interrupted then error(err.message, 0) end
    rows.interrupted = true
  end
  progress("done", work)
  return setmetatable(rows, { __tostring = function(t) return require("kelvin.evaltext").table(t) end })
end

return setmetatable(M, { __call = function(_, o) return M.run(o) end })
