--- What a row needs to be made again: digests of everything that determines it, and of who made it.
--
-- A row's id is the SHA-256 of the canonical JSON of its inputs (model, tokens, calibration, resolved plan, seeds, semantics,
-- code).  Equal ids mean that a replay gives the same numbers, so --resume may skip the point.

local json = require "kelvin.json"
local M = {}

local function lib() return require "kelvin.lib" end

--- One word for the shell, whatever it holds.
function M.quote(s) return "'" .. tostring(s):gsub("'", "'\\''") .. "'" end

--- Output of a command without its last newline, and whether it succeeded.
function M.capture(command)
  local p = io.popen("{ " .. command .. " ; } 2>&1; echo \"exit $?\"", "r")
  if not p then return "", false end
  local out = p:read("*a") or ""         -- nil when a signal cuts the read short
  p:close()
  local text, code = out:match "^(.*)exit (%d+)\n$"
  return ((text or out):gsub("%s+$", "")), code == "0", tonumber(code)
end

--- SHA-256 of a value's canonical JSON.
function M.digest(value) return lib().sha256(json.encode(value)) end

-- An installed tree's: the file that `make install` leaves.
local function installed(root)
  local f = io.open(root .. "/commit", "r")
  local line = f and f:read "*l" or ""
  if f then f:close() end
  local commit = line:match "^%x+"
  return commit and { commit = commit, dirty = line:sub(-5) == "dirty" } or { commit = "none" }
end

--- { commit, dirty } of the source tree, or of that which an installed tree was made from; else { commit = "none" }.
function M.git(root)
  local at = "git -C " .. M.quote(root) .. " "
  local top, inside = M.capture(at .. "rev-parse --show-toplevel")
  local here = M.capture("cd " .. M.quote(root) .. " && pwd -P")
  if not inside or top ~= here then return installed(root) end
  local commit, ok = M.capture(at .. "rev-parse HEAD")
  if not ok then return { commit = "none" } end
  return { commit = commit, dirty = M.capture(at .. "status --porcelain --untracked-files=no") ~= "" }
end

--- The code: version, declarations, and a digest of the library itself, which a dirty tree cannot fake.
function M.code()
  local K = require "kelvin.ffi"
  local b = lib().build()
  return { version = b.version, abi_hash = b.abi_hash, library_sha256 = lib().sha256_file(K.folder .. "/libkelvin.so") }
end

--- The machine, without its name.
function M.host()
  local b = lib().build()
  return { cpu = b.cpu, simd = b.simd, products = b.products, threads = b.threads, flags = b.flags }
end

--- A plan's expansion for a manifest: the digest, and the layers it stands for with equal neighbours folded together.
function M.plan(resolved)
  local folded, last = json.array {}, nil
  for l, layer in ipairs(resolved.layers) do
    local text = json.encode(layer)
    if text == last then folded[#folded].to = l
    else folded[#folded + 1] = { from = l, to = l, layer = layer } end
    last = text
  end
  local expansion = { page_tokens = resolved.page_tokens, layers = folded }
  return M.digest(expansion), expansion
end

return M
