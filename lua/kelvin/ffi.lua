--- kelvin.ffi: declares and loads libkelvin.so.  The only file that knows where things lie.
--
-- Layouts, by the folder that holds lua/kelvin/ffi.lua (`root`; configs/ and experiments/ are beside lua/):
--    build tree    root = the checkout             library in root/build/<flavour>/
--    installed     root = PREFIX/share/kelvin      library in PREFIX/lib/
--    relocatable   root = DIR/share/kelvin or DIR  library in DIR/lib/
-- The host program says which library folder is its own (package.loaded["kelvin.host"]); a plain luajit tries the above.
-- The declarations are the text of kelvin.h that the build cut out, next to the library, with its hash.

local ffi = require "ffi"

local function exists(path)
  local f = io.open(path, "rb")
  if f then f:close() end
  return f ~= nil
end

local here = debug.getinfo(1, "S").source:gsub("^@", "")
local root = here:gsub("/?lua/kelvin/ffi%.lua$", "")
if root == "" then root = here:sub(1, 1) == "/" and "/" or "." end

local host = package.loaded["kelvin.host"]
local folders = host and { host.lib } or {
  root .. "/build/" .. (os.getenv "FLAVOUR" or "release"), root .. "/../../lib", root .. "/lib",
}

local folder
for _, f in ipairs(folders) do
  if exists(f .. "/libkelvin.so") then folder = f break end
end
if not folder then
  error("libkelvin.so is not in " .. table.concat(folders, ", ") .. ": run make", 0)
end
local cdef = folder .. "/kelvin_cdef.lua"
if not exists(cdef) then cdef = root .. "/lua/kelvin_cdef.lua" end
if not exists(cdef) then error("kelvin_cdef.lua is not beside " .. folder .. "/libkelvin.so: run make", 0) end

local text, hash = dofile(cdef)
ffi.cdef(text)

-- OpenMP's workers spin while they wait by default, which collapses when threads outnumber cores.  Read when libgomp loads.
ffi.cdef "int setenv(const char *name, const char *value, int overwrite);"
ffi.C.setenv("OMP_WAIT_POLICY", "passive", 0)

local C = ffi.load(folder .. "/libkelvin.so")
local lib_hash = ffi.string(C.kv_abi_hash())
if lib_hash ~= hash then
  error(("libkelvin.so was built from another kelvin.h (lib %s…, lua %s…): run make"):format(lib_hash:sub(1, 4), hash:sub(1, 4)), 0)
end

local check = require "kelvin.check"
check.bind(C, ffi)

--- A new handle from `make(out)`, a constructor that returns a status; freed by `free` when Lua drops it.
local function handle(ctype, free, make)
  local out = ffi.new(ctype .. "*[1]")
  check(make(out))
  return ffi.gc(out[0], free)
end

return { C = C, ffi = ffi, root = root, folder = folder, hash = hash, handle = handle, exists = exists }
