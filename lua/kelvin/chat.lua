--- kelvin.chat: text over a cache of your choice, streamed, with what it costs: tokens per second and bytes per token.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local log = require "kelvin.log"
local models = require "kelvin.model"
local policies = require "kelvin.policy"

local M = {}

local function stats_line(s, report)
  local m, n = s.model, s.n_tokens
  local b = s:bytes()
  local f16 = m.n_layers * m.n_kv_heads * m.head_dim * 4
  return ("prefill %d tokens at %.0f tokens/s, decode %d tokens at %.1f tokens/s, cache %.0f bytes/token (f16: %d), %.2f bits/elem, %s"):format(
    report.n_prompt, report.prefill_tokens_per_s or 0, report.n_tokens, report.decode_tokens_per_s, b.total / n, f16, b.bits, report.ended)
end

--- One answer: feeds the turn, streams the reply to stdout, and tells its cost on stderr.
local function answer(s, prompt, a, first)
  local m = s.model
  local templated = not a.raw and m.chat_template ~= "none"
  local text = prompt
  if templated then
    local open = m:chat(nil)
    if not first then text = m:chat("assistant", ""):sub(#open + 1) .. m:chat("user", prompt)      -- closes the last answer
    elseif a.system then text = m:chat("system", a.system, "first") .. m:chat("user", prompt, "second")
    else text = m:chat("user", prompt, "first") end
    text = text .. open
  end
  local ids = m:tokenize(text, { add_special = first, parse_special = templated })
  -- A template that writes BOS itself would give two.
  if first and m.add_bos and ids[1] == m.bos and ids[2] == m.bos then table.remove(ids, 1) end
  if s.n_tokens + #ids >= s.max_tokens then
    require("kelvin.check").fail("chat: %d tokens after %d do not fit --context %d", #ids, s.n_tokens, s.max_tokens)
  end
  local _, report = s:generate { prompt = ids, max_tokens = a.max_tokens, temperature = a.temperature, top_k = a.top_k, top_p = a.top_p, seed = a.seed,
    on_text = function(piece)
      io.stdout:write(piece)
      io.stdout:flush()
    end }
  io.stdout:write "\n"
  io.stdout:flush()
  log.info("%s", stats_line(s, report))
end

--- main(options, calibrate): `kelvin chat`.
function M.main(a, calibrate)
  local m = models.open(a.model)
  local policy = a.policy or policies.of(a.arm or "f16")
  local plan = policies.resolve(policy, m, { calib = calibrate(m, { path = a.calib, artifact = a.artifact, arms = { a.arm } }), seed = a.seed, context = a.context })
  local s = m:session { plan = plan, max_tokens = a.context, path = m.device and "bf16" or nil }        -- long prompts by bf16 products
  log.info("%s\n%s", tostring(m), tostring(plan))
  if a.prompt then
    answer(s, a.prompt, a, true)
    return 0
  end
  if C.kv_isatty(0) == 0 then
    local text = io.stdin:read "*a"
    require("kelvin.check").that(text:find "%S", "chat: stdin is empty")
    answer(s, (text:gsub("%s+$", "")), a, true)
    return 0
  end
  log.info("Ctrl-D leaves, Ctrl-C stops an answer")
  local first = true
  while true do
    local got = C.kv_edit_line "you: "
    if got == 0 then break end
    local line = got > 0 and ffi.string(C.kv_edit_text()) or ""
    if line:find "%S" then
      C.kv_edit_history_add(line)
      C.kv_interrupted()
      answer(s, line, a, first)
      first = false
    end
  end
  return 0
end

return M
