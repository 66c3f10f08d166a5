--- kelvin.plan: a policy's result, resolved: which codec for K and for V of every layer and head, as C holds it.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local codec = require "kelvin.codec"
local doc = require("kelvin.help").doc

local M, Plan = {}, {}
Plan.__index, Plan.__name = {}, "plan"

local exact_code = { f16 = C.KV_EXACT_F16, f32 = C.KV_EXACT_F32, bf16 = C.KV_EXACT_BF16 }

local STRETCH = 2            -- of calib:_stretch(): from here on a mean of values is said to do harm

local function codec_entry(c, handle)
  local i = codec._info(handle)
  return { codec = c.name, family = i.family, params = i.params, format = i.format, granule = i.granule, fused = i.fused,
    bits_nominal = i.bits_nominal, bits_payload = i.bits_payload, table_bytes = i.table_bytes > 0 and i.table_bytes or nil }
end

-- Tables of heads may differ in size, and with them bits.
local function same(heads)
  for h = 2, #heads do
    if heads[h].bits_payload ~= heads[1].bits_payload or heads[h].table_bytes ~= heads[1].table_bytes then return false end
  end
  return true
end

doc("kv.plan", [[
  A plan is what kv.policy.resolve(policy, model) returns and model:session{ plan = } takes.
  plan.resolved: { name, params, page_tokens, layers = { { k, v, sink, recent, mean, page_rope, exact } } } with every parameter of
  every codec, by head where heads differ.  plan:describe() prints it, plan.bits_nominal and plan.bits_payload are its means,
  plan.table_bytes is what calibrated tables of all slots take.]])
function M.new(model, layers, o)
  local page_tokens, head_dim = o.page_tokens, model.head_dim
  local handle = K.handle("kv_plan", C.kv_plan_free, function(out) return C.kv_plan_new(out, model.n_layers, model.n_kv_heads, head_dim, page_tokens) end)
  local plan = setmetatable({ name = o.name, handle = handle, model_name = model.name, page_tokens = page_tokens }, Plan)
  local resolved = { name = o.name, params = o.params, page_tokens = page_tokens, layers = {} }
  local mean = ffi.new("float[?]", head_dim)
  local nominal, payload, control, tables, harmful = { k = 0, v = 0 }, { k = 0, v = 0 }, false, 0, {}
  for l, y in ipairs(layers) do
    check(C.kv_plan_window(handle, l - 1, y.sink, y.recent, exact_code[y.exact]))
    local r = { sink = y.sink, recent = y.recent, mean = y.mean, page_rope = y.page_rope, exact = y.exact }
    for side, code in pairs { k = C.KV_SIDE_K, v = C.KV_SIDE_V } do
      local heads = {}
      for h = 1, model.n_kv_heads do
        local c = y[side][0] or y[side][h]
        local has = y.mean == side or y.mean == "both" or y.mean == "auto" or y.mean == "bias" and side == "k"
        if has then
          if y.mean == "bias" then
            check.that(model.has_kv_bias, "policy '%s': mean=bias, but model '%s' has no key bias", o.name, model.name)
            check(C.kv_model_bias_mean(model._m, l - 1, h - 1, y.page_rope and page_tokens or model.n_ctx_train, mean))
          else
            check.that(o.calib, "policy '%s': mean=%s needs calibration: pass calib = kv.calibrate{...} (--calib FILE or --artifact FILE)", o.name, y.mean)
            o.calib:_mean(side, l, h, y.page_rope and page_tokens, mean)
          end
        end
        if has and side == "v" then
          local stretch = o.calib:_stretch(l, h)
          if y.mean == "auto" then
            check.that(stretch, "policy '%s': mean=auto needs the calibration's rows, which were left out of this one", o.name)
            has = stretch <= 1
            if not has then r.v_means_kept = (r.v_means_kept or 0) + 1 end
          elseif stretch and stretch > STRETCH then harmful[#harmful + 1] = ("%d (%.1f)"):format(l, stretch) end
        end
        if has then check(C.kv_plan_mean(handle, l - 1, h - 1, code, mean)) end
        local made
        if c.has_tables and o.calib then made = c:_calibrated(o.calib, l, h, side, page_tokens, y.page_rope, has and mean or nil)
        else made = c:_instance(head_dim, page_tokens, side) end
        check(C.kv_plan_set(handle, l - 1, h - 1, code, made))
        heads[h] = codec_entry(c, made)
        nominal[side], payload[side] = nominal[side] + heads[h].bits_nominal, payload[side] + heads[h].bits_payload
        tables = tables + (heads[h].table_bytes or 0)
        control = control or c.control
        if side == "k" and y.page_rope then check(C.kv_plan_page_rope(handle, l - 1, h - 1, 1)) end
      end
      r[side] = y[side][0] and same(heads) and heads[1] or heads
    end
    resolved.layers[l] = r
  end
  check(C.kv_plan_check(handle))
  local n = model.n_layers * model.n_kv_heads
  if #harmful > 0 then
    plan.warning = ("policy '%s': less their mean, values of layer %s are longer than with it, by the tokens' mean of the squared ratio; "
      .. "tokens of little value that draw attention lose most (mean=k or auto keeps it)"):format(
      o.name, table.concat(harmful, ", "))
  end
  plan.resolved, plan.layers, plan.control, plan.table_bytes = resolved, layers, control, tables
  plan.calibration = o.calib
  plan.bits_nominal = { k = nominal.k / n, v = nominal.v / n, mean = (nominal.k + nominal.v) / (2 * n) }
  plan.bits_payload = { k = payload.k / n, v = payload.v / n, mean = (payload.k + payload.v) / (2 * n) }
  return plan
end

local kept = { "name", "resolved", "page_tokens", "model_name", "control", "table_bytes", "calib", "bits_nominal", "bits_payload" }

--- For kelvin.session: what a file says of a plan, and a plan from that.  What made it (policy, codec objects) is not kept.
function M._describe(plan)
  local out = {}
  for _, key in ipairs(kept) do out[key] = plan[key] end
  return out
end
function M._loaded(handle, described)
  local plan = setmetatable({ handle = handle }, Plan)
  for _, key in ipairs(type(described) == "table" and kept or {}) do plan[key] = described[key] end
  check.that(pcall(plan.describe, plan), "kv.load: the file's description of its plan is not one that kv.save writes")
  return plan
end

function M.is(p) return getmetatable(p) == Plan end

local function side_text(s)
  if s.codec then return s.codec .. "(" .. s.params .. ")" end
  local out = {}
  for h, c in ipairs(s) do out[h] = ("%d:%s(%s)"):format(h, c.codec, c.params) end
  return table.concat(out, " ")
end

--- plan:describe(): a line for every run of equal layers.
function Plan.__index:describe()
  local out, first, last_text = {}, nil, nil
  local layers = self.resolved.layers
  local function flush(to)
    if first then out[#out + 1] = ("  layers %d-%d: %s"):format(first, to, last_text) end
  end
  for l, y in ipairs(layers) do
    local t = ("k %s  v %s  sink %d  recent %d  mean %s%s  exact %s"):format(side_text(y.k), side_text(y.v), y.sink, y.recent, y.mean, y.page_rope and "  page_rope" or "", y.exact)
    if t ~= last_text then
      flush(l - 1)
      first, last_text = l, t
    end
  end
  flush(#layers)
  return tostring(self) .. "\n" .. table.concat(out, "\n") .. (self.warning and "\nwarning: " .. self.warning or "")
end

function Plan:__tostring()
  return ("plan %s: %d layers, bits/elem k %.3f, v %.3f (payload), pages of %d tokens"):format(self.name, #self.resolved.layers,
    self.bits_payload.k, self.bits_payload.v, self.page_tokens)
end

return M
