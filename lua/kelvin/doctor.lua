--- kelvin.doctor: what is here, what is missing and how to get it; for bug reports and first steps.

local K = require "kelvin.ffi"
local lib = require "kelvin.lib"
local doc = require("kelvin.help").doc

local M = {}

doc("kv.doctor", [[
  kv.doctor.report() -> lines, ok
  What `kelvin doctor` prints: library, processor, threads, devices, codecs, models, tools; each line says ok, missing or failed.]])
function M.report()
  local lines, good = {}, true
  local function say(state, what, text)
    if state == "FAILED" then good = false end
    lines[#lines + 1] = ("  %-8s %-12s %s"):format(state, what, text)
  end
  local b = lib.build()
  say("ok", "library", ("libkelvin %s in %s, declarations %s…"):format(b.version, K.folder, K.hash:sub(1, 8)))
  say("ok", "built with", b.flags)
  say("ok", "lua", ("%s on %s, %s"):format(jit.version, jit.arch, jit.status() and "compiling" or "interpreting"))
  say("ok", "processor", ("%s; using %s of %s, products on %s, %d threads"):format(b.cpu, b.simd, b.simd_max, b.products, b.threads))
  for _, name in ipairs { "cpu", "cuda" } do
    local ok, d = pcall(lib.device, name)
    if not ok then say("missing", name, d)
    elseif d.available then
      say("ok", name, d.memory_bytes > 0 and ("%s, %.0f GB, sm_%d, driver for CUDA %d.%d, built with %d.%d"):format(d.name, d.memory_bytes / 1e9, d.sm, math.floor(d.driver / 1000), d.driver % 1000 / 10,
        math.floor(d.runtime / 1000), d.runtime % 1000 / 10) or d.name)
      if name == "cuda" then
        say("ok", "plugin", d.plugin)
        local measured, c = pcall(function() return require("kelvin.bench_gpu").ceilings(name, 2 ^ 28, 9) end)
        say(measured and "ok" or "FAILED", "memory", measured and ("read %.2f TB/s, copy %.2f TB/s (read and written)"):format(c.read_tb_per_s, c.copy_tb_per_s) or tostring(c))
      end
    else say("missing", name, d.reason) end
  end
  local ok, names = pcall(function() return require("kelvin.codec").names() end)
  if ok then say("ok", "codecs", ("%d families and presets"):format(#names)) else say("FAILED", "codecs", names) end
  if ok then
    local t = require("kelvin.tensor").randn { 2, 64, 64, seed = 1 }
    local right, diff = pcall(function()
      return require("kelvin.compare").compare(t, require("kelvin.codec").new("q8_0"):roundtrip(t))
    end)
    if right and diff.rel_err < 0.02 then say("ok", "round trip", "q8_0 on unit normals: " .. tostring(diff))
    else say("FAILED", "round trip", tostring(diff)) end
  end
  local models = require "kelvin.model"
  local listed, rows = pcall(models.list)
  if not listed then say("FAILED", "models", rows)
  else
    for _, r in ipairs(rows) do
      say(r.present and "ok" or "missing", "model", r.present and r.name .. " in " .. r.path or r.name .. ": kelvin models get " .. r.name)
    end
    if #rows == 0 then say("missing", "models", "no files in configs/models") end
  end
  for _, tool in ipairs { { "argparse", "lua-argparse" }, { "busted.core", "lua-busted" } } do
    if pcall(require, tool[1]) then say("ok", "lua module", tool[1]) else say("missing", "lua module", tool[1] .. ": apt-get install " .. tool[2]) end
  end
  return lines, good
end

function M.main()
  local lines, good = M.report()
  print(table.concat(lines, "\n"))
  return good and 0 or 1
end

return M
