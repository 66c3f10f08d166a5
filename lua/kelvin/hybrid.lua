--- kelvin.hybrid: per layer, K/V head and side the better of TurboAngle and TurboQuant (and their fused forms) at matched
-- stored bits, judged on vectors that the model made or on synthetic ones (kelvin.judge); and policies from a saved choice.
--
--    budget = slot   each slot the least score among candidates of at most `bits`, the dearest of each kind
--    budget = mean   candidates of all rates; the least sum of weight x score whose mean is at most `bits`:
--                    each slot the least of weight x score + lambda x bits (Lagrange), lambda by bisection, and what is
--                    left over to the slots that gain most a bit
--
-- weight is 1, or (weigh = kld) the model's KL divergence with that layer's side alone coded, over its score: what an error
-- there costs at the output.

local codec = require "kelvin.codec"
local check = require "kelvin.check"
local json = require "kelvin.json"
local judge = require "kelvin.judge"
local log = require "kelvin.log"
local policy = require "kelvin.policy"
local doc = require("kelvin.help").doc

local M = {}

M.SYNTHETIC = "judged on synthetic vectors: not a choice for this model, calibrate on its own keys and values (source=captured)"

local SPREAD, STEP = 2, 0.5     -- budget = mean: candidates from so many bits below the budget to as many above, TurboAngle's so far apart

--- The settings to choose among: the dearest of each kind that cost at most bits + tolerance, or, with `rates`, all near
-- the budget; cheaper decoding first, for ties.
local function candidates(bits, tolerance, head_dim, page_tokens, rates)
  local out = {}
  local function cost(c, side) return c:info_for(head_dim, page_tokens, side).bits_payload end
  local function add(kind, list)
    local best, seen = nil, {}
    for _, c in ipairs(list) do
      local b = math.max(cost(c, "k"), cost(c, "v"))
      if rates then
        if not seen[b] and math.abs(b - bits) <= SPREAD then out[#out + 1] = { kind = kind, codec = c, bits = b } end
        seen[b] = true
      elseif b <= bits + tolerance and (not best or b > best.bits) then best = { kind = kind, codec = c, bits = b } end
    end
    if best then out[#out + 1] = best end
  end
  local function each(family, key, values, fixed)
    local list = {}
    for _, v in ipairs(values) do
      local params = { [key] = v }
      for name, value in pairs(fixed) do params[name] = value end
      list[#list + 1] = codec.new(family, params)
    end
    return list
  end
  local all = { 1, 2, 3, 4, 5, 6, 7, 8 }
  for _, norm in ipairs { "matched", "lsq" } do add("turboquant", each("scalar", "bits", all, { norm = norm })) end
  for _, norm in ipairs { "lin", "log", "lloyd" } do
    local list = {}
    local aims = { bits + tolerance, bits, bits - tolerance, bits - 0.1, bits - 0.25 }
    for d = rates and -SPREAD or 1, rates and SPREAD or 0, STEP do aims[#aims + 1] = bits + d end
    for _, aim in ipairs(aims) do
      if aim > 0 then list[#list + 1] = codec.new("polar", { norm = norm }):fit_bits(aim, { head_dim = head_dim }) end
    end
    add(norm == "lloyd" and "turboangle-lloyd" or "turboangle", list)
  end
  add("fused", each("fused", "angles", { 4, 8, 16, 32, 64 }, { form = "residual", norm = "lin", norm_bits = 4 }))
  add("fused", each("fused", "bits", all, { form = "subspace", angles = 64, norm_bits = 4, pairs = math.max(1, math.floor(head_dim / 16)) }))
  check.that(#out > 0, "policy 'hybrid': no codec here fits bits=%g at head_dim %d", bits, head_dim)
  return out
end

--- Scores by candidate and slot: by[i][h]; one slot a layer where heads are not told apart.
local function score_all(list, x, side, p)
  local by = {}
  for i, c in ipairs(list) do
    by[i] = judge.scores(x, c.codec, side, p.judge)
    if p.per == "layer" then
      local sum = 0
      for _, s in ipairs(by[i]) do sum = sum + s end
      by[i] = { sum / #by[i] }
    end
  end
  return by
end

--- weights[l][side]: KL divergence of the model over `ids` with one layer's side coded, over the judge's score of that.
local function sensitivity(model, ids, p, layers)
  local ref = codec.new("scalar", { bits = math.max(1, math.floor(p.bits) - 1) })      -- a bit less: the effect is clear of rounding
  local arms, score = {}, {}
  for l = 1, model.n_layers do
    for _, side in ipairs { "k", "v" } do
      local y = {}
      for i = 1, model.n_layers do y[i] = { k = "f32", v = "f32", exact = "f32", sink = p.sink, recent = p.recent } end
      y[l][side] = ref
      arms[#arms + 1] = policy.new { name = ("layer %d %s"):format(l, side), plan = function() return y end }
      local sum = 0
      for _, s in ipairs(judge.scores(layers[l], ref, side, p.judge)) do sum = sum + s end
      score[#arms] = sum / model.n_kv_heads
    end
  end
  local rows = require("kelvin.eval").run { model = model, tokens = ids, context = #ids, chunks = 1, score = "all", arms = arms, controls = false,
    on_progress = function(share) log.progress(share, "hybrid: what each layer costs") end }
  check.that(not rows.interrupted, "interrupted")
  local out = {}
  for l = 1, model.n_layers do
    out[l] = {}
    for i, side in ipairs { "k", "v" } do
      local at = 2 * (l - 1) + i
      out[l][side] = score[at] > 0 and math.max(0, rows[at].kld.mean) / score[at] or 0
    end
  end
  return out
end

--- For each slot { score = {...}, weight = } the candidate (number) of the least sum with a mean of at most `most` bits.
local function least_sum(list, slots, most)
  local function pick(lambda)
    local bits = 0
    for _, s in ipairs(slots) do
      local least
      for i, c in ipairs(list) do
        local cost = s.weight * s.score[i] + lambda * c.bits
        if not least or cost < least or (cost == least and c.bits < list[s.pick].bits) then least, s.pick = cost, i end
      end
      bits = bits + list[s.pick].bits
    end
    return bits
  end
  local room, hi = most * #slots + 1e-9, 1
  while pick(hi) > room do
    hi = hi * 2
    check.that(hi < 2 ^ 200, "policy 'hybrid': a mean of %g bits is less than the cheapest codec here takes", most)
  end
  local lo = 0
  for _ = 1, 60 do
    local mid = (lo + hi) / 2
    if pick(mid) <= room then hi = mid else lo = mid end
  end
  local bits = pick(hi)
  while true do                                       -- what is left: the most gain a bit that still fits
    local best, to, gain
    for _, s in ipairs(slots) do
      for i, c in ipairs(list) do
        local more, less = c.bits - list[s.pick].bits, s.weight * (s.score[s.pick] - s.score[i])
        if more > 0 and less > 0 and bits + more <= room and (not gain or less / more > gain) then best, to, gain = s, i, less / more end
      end
    end
    if not best then return end
    bits = bits + list[to].bits - list[best.pick].bits
    best.pick = to
  end
end

doc("kv.policy.hybrid", [[
  kv.policy.hybrid { bits = 4.25, source = "captured", judge = "vector", budget = "slot", weigh = "none", per = "head", tokens = 256,
    tolerance = 0.02, text = "", save = "", sink = 0, recent = 0 } -> policy
  Per layer, side and K/V head (or per = "layer") the codec with the least error among TurboAngle, TurboQuant and fused settings.
  source: captured (keys and values of the calibration's first chunk, or of the file `text`) or synthetic (needs nothing; says
  nothing about a model).  judge: vector (errors of keys, values and scores), attention (error of the attention's output) or kl
  (of its weights; values as attention).  budget: slot (each at most bits + tolerance) or mean (bits go where they help most).
  weigh = "kld", with budget = "mean": errors count by what the layer's do to the model's output.  save: a JSON file with every
  choice and what it beat, which kv.policy.saved { file = } reads.
  As arms: policy=hybrid:bits=4.25,sink=4  policy=hybrid:judge=attention:budget=mean:weigh=kld  policy=saved:file=choice.json]])
function M.choose(model, p, ids)
  p = setmetatable({ judge = p.judge or "vector", budget = p.budget or "slot", weigh = p.weigh or "none" }, { __index = p })
  local list = candidates(p.bits, p.tolerance, model.head_dim, codec.PAGE_TOKENS, p.budget == "mean")
  local taps = ids and model:tap { tokens = ids, layer = "all" }
  local layers, slots = {}, {}
  for l = 1, model.n_layers do
    log.progress(l / model.n_layers, ("hybrid: layer %d"):format(l))
    layers[l] = judge.layer(model, l, taps, p)
    for _, side in ipairs { "k", "v" } do
      local by = score_all(list, layers[l], side, p)
      for h = 1, #by[1] do
        local s = { layer = l, side = side, head = p.per == "layer" and 0 or h, weight = 1, score = {}, pick = 1 }
        for i in ipairs(list) do
          s.score[i] = by[i][h]
          if s.score[i] < s.score[s.pick] then s.pick = i end
        end
        slots[#slots + 1] = s
      end
    end
  end
  if p.weigh == "kld" then
    local weights = sensitivity(model, ids, p, layers)
    for _, s in ipairs(slots) do s.weight = weights[s.layer][s.side] end
  end
  if p.budget == "mean" then least_sum(list, slots, p.bits) end
  log.clear()
  local rows, total = {}, 0
  for n, s in ipairs(slots) do
    local c, others = list[s.pick], {}
    for i, other in ipairs(list) do
      if other.bits <= c.bits + p.tolerance then others[other.kind] = math.min(others[other.kind] or math.huge, s.score[i]) end
    end
    local info = c.codec:info_for(model.head_dim, codec.PAGE_TOKENS, s.side)
    rows[n] = { layer = s.layer, side = s.side, head = s.head, kind = c.kind, family = c.codec.family, params = info.params, bits = info.bits_payload,
      score = s.score[s.pick], weight = s.weight, least = others }
    total = total + info.bits_payload
  end
  return { policy = "hybrid", model = model.name, n_layers = model.n_layers, n_kv_heads = model.n_kv_heads, head_dim = model.head_dim, bits = p.bits, mean_bits = total / #rows,
    judge = p.judge, budget = p.budget, weigh = p.weigh, sink = p.sink or 0, recent = p.recent or 0,
    source = ids and "captured" or "synthetic", caveat = not ids and M.SYNTHETIC or nil, tokens = ids and #ids or p.tokens, rows = rows }
end

--- layers[l] of a choice.
local function layers_of(choice, p)
  local out = {}
  for l = 1, choice.n_layers do out[l] = { k = {}, v = {}, sink = p.sink, recent = p.recent, mean = p.mean } end
  for _, r in ipairs(choice.rows) do
    local c = codec.new(r.family, codec._parse_params(r.params))
    if r.head == 0 then out[r.layer][r.side] = c else out[r.layer][r.side][r.head] = c end
  end
  return out
end

local function tokens_of(p, model)
  if p.source == "synthetic" then return nil end
  check.that(p.source == "captured", "policy 'hybrid': source=%s is none of captured, synthetic", p.source)
  local ids
  if p.text ~= "" then
    local f, err = io.open(p.text, "rb")
    check.that(f, "policy 'hybrid': text: %s", err)
    ids = model:tokenize(f:read "*a", { add_special = false })
    f:close()
  else
    local scope = policy._scope()
    ids = check.that(scope and scope.calib and scope.calib.first_chunk, "policy 'hybrid': source=captured needs a text: a calibration (--calib FILE) or text=FILE")
  end
  check.that(#ids >= 32, "policy 'hybrid': %d tokens are too few to judge by, 32 are needed", #ids)
  return { unpack(ids, 1, math.min(#ids, p.tokens)) }
end

local window = { sink = { default = 0, min = 0, about = "exact tokens at the start" }, recent = { default = 0, min = 0, about = "exact tokens at the end" },
  mean = { default = "none", about = "both, k, v, auto, bias or none" } }
local function with_window(params)
  for name, p in pairs(window) do params[name] = p end
  return params
end

M.hybrid = policy.new {
  name = "hybrid", about = "the better of TurboAngle and TurboQuant, per layer, head and side",
  params = with_window {
    bits = { default = 4.25, min = 1, max = 16, about = "stored bits per element of every slot" },
    tolerance = { default = 0.02, min = 0, max = 1, about = "how much more a candidate may cost" },
    source = { default = "captured", about = "captured or synthetic" }, per = { default = "head", about = "head or layer" },
    judge = { default = "vector", about = "vector, attention or kl" }, budget = { default = "slot", about = "slot or mean" },
    weigh = { default = "none", about = "none or kld: what a layer's errors do to the output" },
    tokens = { default = 256, min = 32, max = 4096, about = "to judge by" }, text = { default = "", about = "file to capture from" },
    save = { default = "", about = "file for the choice" },
  },
  plan = function(p, model)
    check.that(p.per == "head" or p.per == "layer", "policy 'hybrid': per=%s is none of head, layer", p.per)
    check.that(judge.judges[p.judge], "policy 'hybrid': judge=%s is none of attention, kl, vector", p.judge)
    check.that(p.budget == "slot" or p.budget == "mean", "policy 'hybrid': budget=%s is none of mean, slot", p.budget)
    check.that(p.weigh == "none" or p.weigh == "kld", "policy 'hybrid': weigh=%s is none of kld, none", p.weigh)
    check.that(p.weigh == "none" or p.budget == "mean" and p.source == "captured", "policy 'hybrid': weigh=kld needs budget=mean and source=captured")
    local choice = M.choose(model, p, tokens_of(p, model))
    if choice.caveat then log.warn("hybrid: %s", choice.caveat) end
    local count, slots = {}, 0
    for _, r in ipairs(choice.rows) do count[r.kind], slots = (count[r.kind] or 0) + 1, slots + 1 end
    log.info("hybrid at %.3g bits (%s, judged by %s), mean %.3f, %d slots: turboquant %d, turboangle %d, turboangle with Lloyd-Max radii %d, fused %d", p.bits, choice.source, p.judge, choice.mean_bits, slots,
      count.turboquant or 0, count.turboangle or 0, count["turboangle-lloyd"] or 0, count.fused or 0)
    if p.save ~= "" then
      local f, err = io.open(p.save, "wb")
      check.that(f, "policy 'hybrid': save: %s", err)
      f:write(json.encode(choice, "  "), "\n")
      f:close()
    end
    return layers_of(choice, p)
  end,
}

M.saved = policy.new {
  name = "saved", about = "a choice that policy hybrid saved",
  params = with_window { file = { default = "", about = "the JSON file" } },
  plan = function(p, model)
    check.that(p.file ~= "", "policy 'saved': file= is needed")
    local choice = check.that(json.read(p.file))
    check.that(type(choice) == "table" and type(choice.rows) == "table", "policy 'saved': '%s' is not a saved choice", p.file)
    for _, key in ipairs { "n_layers", "n_kv_heads", "head_dim" } do
      check.that(choice[key] == model[key], "policy 'saved': '%s' is for %s=%s, model has %s", p.file, key, tostring(choice[key]), tostring(model[key]))
    end
    return layers_of(choice, p)
  end,
}

return M
