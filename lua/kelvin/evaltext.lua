--- kelvin.evaltext: evaluation rows as text: a table sorted by all-in bits, JSON lines, or llama-perplexity's block.

local M = {}

local function nice(x)
  if type(x) ~= "number" then return "-" end
  if x ~= x then return "nan" end
  if x == 0 then return "0" end
  if math.abs(x) < 1e-3 or math.abs(x) >= 1e4 then return ("%.2e"):format(x) end
  return ("%.4g"):format(x)
end

local function pad(s, width, left)
  local n = select(2, s:gsub("[^\128-\191]", ""))        -- characters, not bytes
  local fill = (" "):rep(math.max(0, width - n))
  return left and s .. fill or fill .. s
end

--- aligned(rows of strings): columns lined up, the first to the left, the others to the right.
function M.aligned(lines)
  local width = {}
  for _, line in ipairs(lines) do
    for i, cell in ipairs(line) do width[i] = math.max(width[i] or 0, select(2, cell:gsub("[^\128-\191]", ""))) end
  end
  local out = {}
  for r, line in ipairs(lines) do
    local cells = {}
    for i, cell in ipairs(line) do cells[i] = pad(cell, width[i], i == 1) end
    out[r] = table.concat(cells, "  "):gsub("%s+$", "")
  end
  return table.concat(out, "\n")
end

--- The controls of a run in one line.
function M.controls(row)
  local c = row.controls
  if not c or not c.identity then return "controls: left out" end
  return ("controls: identity KLD %s (%s), canary mean KLD %s over %g (%s: %s)"):format(nice(c.identity.max_kld), c.identity.status, nice(c.canary.mean_kld),
    c.canary.must_exceed, c.canary.status, c.canary.status == "ok" and "it fails, as it must" or "it should have failed")
end

--- Rows as a table, sorted by all-in bits.
function M.table(rows)
  if #rows == 0 then return "no rows" end
  local sorted = {}
  for i, r in ipairs(rows) do sorted[i] = r end
  table.sort(sorted, function(a, b)
    local x, y = a.bits_allin or math.huge, b.bits_allin or math.huge
    if x ~= y then return x > y end
    return tostring(a.arm) < tostring(b.arm)
  end)
  local lines = { { "arm", "bits", "shared", "KLD mean", "± s.e.", "median", "p99", "p99.9", "max", "same top", "PPL", "RMS Δp", "pairs", "mutation", "status" } }
  for _, r in ipairs(sorted) do
    local k = r.kld or {}
    lines[#lines + 1] = { r.arm, r.bits_allin and ("%.3f"):format(r.bits_allin) or "-", r.bits_shared and ("%.3f"):format(r.bits_shared) or "-",
      nice(k.mean), k.se == k.se and nice(k.se) or "-", nice(k.median), nice(k.p99), nice(k.p999), nice(k.max),
      r.same_top1 and ("%.2f %%"):format(100 * r.same_top1) or "-", r.ppl and ("%.3f"):format(r.ppl) or "-", r.rms_dp and ("%.2f %%"):format(100 * r.rms_dp) or "-",
      r.compressed_pair_fraction and ("%.3f"):format(r.compressed_pair_fraction) or "-",
      r.controls and r.controls.mutation and r.controls.mutation.status or "-", r.status }
  end
  local r = sorted[1]
  local head = r.ppl_ref and ("%s, context %d, %d chunks, %d positions scored, %s; PPL of the exact cache %.4f"):format(r.model, r.context, r.chunks, r.n_scored, r.semantics, r.ppl_ref) or ""
  local said = {}
  for _, row in ipairs(sorted) do
    for _, words in ipairs(row.warnings or {}) do
      if not said[words] then head = head .. "\nwarning: " .. words end
      said[words] = true
    end
  end
  return table.concat({ head, M.aligned(lines), M.controls(r),
    "bits: all-in, per cached element at the end of a chunk; shared: means and tables that all sequences share, if one had to carry them; "
    .. "KLD in nats; pairs: share of query-key pairs served from compressed storage" }, "\n")
end

--- One row in the words of `llama-perplexity --kl-divergence`, so that existing readers work.
function M.llama(r)
  local out = {}
  local function p(fmt, ...) out[#out + 1] = fmt:format(...) end
  local k, d = r.kld, r.dp
  p("====== Perplexity statistics ======")
  p("Mean PPL(Q)                   : %10.6f ± %10.6f", r.ppl, r.ppl_se)
  p("Mean PPL(base)                : %10.6f ± %10.6f", r.ppl_ref, r.ppl_ref_se)
  p("Cor(ln(PPL(Q)), ln(PPL(base))): %6.2f%%", 100 * r.cor)
  p("Mean ln(PPL(Q)/PPL(base))     : %10.6f ± %10.6f", r.ln_ppl_ratio, r.ln_ppl_ratio_se)
  p("Mean PPL(Q)/PPL(base)         : %10.6f ± %10.6f", r.ppl_ratio, r.ppl_ratio_se)
  -- Var(Q - base) with the correlation of the logarithms, to first order.
  local diff_se = math.sqrt(math.max(0, r.ppl_se ^ 2 + r.ppl_ref_se ^ 2 - 2 * r.cor * r.ppl_se * r.ppl_ref_se))
  p("Mean PPL(Q)-PPL(base)         : %10.6f ± %10.6f", r.ppl - r.ppl_ref, diff_se)
  p("")
  p("====== KL divergence statistics ======")
  p("Mean    KLD: %10.6f ± %10.6f", k.mean, k.se)
  p("Maximum KLD: %10.6f", k.max)
  p("99.9%%   KLD: %10.6f", k.p999)
  p("99.0%%   KLD: %10.6f", k.p99)
  p("95.0%%   KLD: %10.6f", k.p95)
  p("90.0%%   KLD: %10.6f", k.p90)
  p("Median  KLD: %10.6f", k.median)
  p("10.0%%   KLD: %10.6f", k.p10)
  p(" 5.0%%   KLD: %10.6f", k.p05)
  p(" 1.0%%   KLD: %10.6f", k.p01)
  p(" 0.1%%   KLD: %10.6f", k.p001)
  p("Minimum KLD: %10.6f", k.min)
  p("")
  p("====== Token probability statistics ======")
  p("Mean    Δp: %6.3f ± %5.3f %%", 100 * d.mean, 100 * d.mean_se)
  p("Maximum Δp: %6.3f%%", 100 * d.max)
  for _, q in ipairs { { "99.9%  ", "p999" }, { "99.0%  ", "p99" }, { "95.0%  ", "p95" }, { "90.0%  ", "p90" }, { "75.0%  ", "p75" }, { "Median ", "median" }, { "25.0%  ", "p25" },
    { "10.0%  ", "p10" }, { " 5.0%  ", "p05" }, { " 1.0%  ", "p01" }, { " 0.1%  ", "p001" } } do
    p("%s Δp: %6.3f%%", q[1], 100 * d[q[2]])
  end
  p("Minimum Δp: %6.3f%%", 100 * d.min)
  p("RMS Δp    : %6.3f ± %5.3f %%", 100 * r.rms_dp, 100 * r.rms_dp_se)
  p("Same top p: %6.3f ± %5.3f %%", 100 * r.same_top1, 100 * r.same_top1_se)
  return table.concat(out, "\n")
end

M.nice = nice
return M
