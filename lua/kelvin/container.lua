--- kelvin.container: blocks, sessions and what else can be saved, as files that name their codecs and check their pages.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local json = require "kelvin.json"
local doc = require("kelvin.help").doc

local M, File = {}, {}
File.__index, File.__name = {}, "file"

doc("kv.save", [[
  kv.save(path, thing [, { stage = "raw", level =, tables = true }]) -> path
  A block (codec:encode), a session, kvtc tables or an offload (tables = false: without its tables, which have a file of their
  own) as a file: encoded pages as they are, codecs with every parameter and their calibrated
  tables, a checksum a page.  stage: "raw" (pages can be mapped), "zlib" (level 1..9), "lzma" (level 0..9), "rans" (static
  tables), "smallest" (the best of them for each page).  What does not shrink stays raw.  kv.load(path) gives the thing back.]])
function M.save(path, thing, o)
  o = o or {}
  check.that(type(path) == "string" and #path > 0, "kv.save: path is a %s, a file name is needed", type(path))
  local mt = getmetatable(thing)
  local save = mt and type(mt.__index) ~= "nil" and thing._save
  check.that(save, "kv.save: a %s given; a block, a session, an index, an offload or kvtc tables can be saved", mt and mt.__name or type(thing))
  check.that(o.level == nil or type(o.level) == "number" and o.level % 1 == 0, "kv.save: level=%s is not a whole number", tostring(o.level))
  save(thing, path, o.stage or "raw", o.level or -1, o)
  return path
end

--- Kind of a file's first section -> the module whose _load(file, options) makes the thing of it.
M.loaders = { block = "kelvin.codec", cache = "kelvin.session", index = "kelvin.index", kvtc = "kelvin.kvtc", offload = "kelvin.kvtc" }

doc("kv.load", [[
  kv.load(path [, { model =, max_tokens =, tables =, salvage = false }]) -> thing
  What kv.save wrote.  A session needs the model that it was made with (model: a model, a name or a path; default: the name
  in the file): another one is refused, naming both digests; so are the tables of an offload (tables =).  max_tokens: room for more tokens than it had.  A damaged page is
  an error that names it; with salvage = true a block's damaged pages decode from zeros, a session keeps the tokens before the
  first of them, and thing.damaged lists the messages.]])
function M.load(path, o)
  o = o or {}
  local f = M.open(path)
  check.that(#f.sections > 0, "kv.load: file '%s' has no sections", path)
  local kind = f.sections[1].kind
  local module = M.loaders[kind]
  check.that(module, "kv.load: file '%s' begins with a section of kind '%s', which this version does not know", path, kind)
  local thing = require(module)._load(f, o)
  if o.salvage then thing.damaged = f:verify() end
  return thing
end

doc("kv.container", [[
  kv.container.open(path) -> file
  What is in a file that kv.save wrote, without loading it: f.version, f.bytes, f.sections = { { kind, version, pages, stage,
  level, raw_bytes, stored_bytes, meta } }.  f:verify() -> list of messages, one for each damaged page.  tostring(f) is a table.]])
function M.open(path)
  check.that(type(path) == "string", "kv.container: path is a %s, a file name is needed", type(path))
  local p = K.handle("kv_pack", C.kv_pack_free, function(out) return C.kv_pack_open(out, path) end)
  local version, n, bytes, info = ffi.new "int[1]", ffi.new "int[1]", ffi.new "double[1]", ffi.new "kv_pack_section_info[1]"
  check(C.kv_pack_info(p, version, n, bytes))
  local f = setmetatable({ _p = p, path = path, version = version[0], bytes = bytes[0], sections = {} }, File)
  for i = 1, n[0] do
    check(C.kv_pack_section_at(p, i - 1, info))
    local s = info[0]
    f.sections[i] = { kind = ffi.string(s.kind), text = ffi.string(s.meta), stage = ffi.string(s.stage), version = s.version, optional = s.optional ~= 0,
      level = s.level >= 0 and s.level or nil, pages = s.n_pages, raw_bytes = s.raw_bytes, stored_bytes = s.stored_bytes }
    local meta = json.decode(f.sections[i].text, path)
    f.sections[i].meta = type(meta) == "table" and meta or {}
  end
  return f
end

--- f:section(kind [, from]): the first section of a kind, and its index; nil if there is none.
function File.__index:section(kind, from)
  for i = from or 1, #self.sections do
    if self.sections[i].kind == kind then return self.sections[i], i end
  end
end

--- f:page(section, page): the decoded bytes of a page (both from 1) as a string.
function File.__index:page(section, page)
  local n = ffi.new "double[1]"
  check(C.kv_pack_page_size(self._p, section - 1, page - 1, n))
  local buf = ffi.new("uint8_t[?]", math.max(1, n[0]))
  check(C.kv_pack_copy(self._p, section - 1, page - 1, buf, n[0]))
  return ffi.string(buf, n[0])
end

--- f:verify(): reads every page; a list of one message for each that is damaged, empty when all is well.
function File.__index:verify()
  local damaged = {}
  for i, s in ipairs(self.sections) do
    for page = 0, s.pages - 1 do
      local status = C.kv_pack_check(self._p, i - 1, page)
      if status == C.KV_E_CORRUPT then damaged[#damaged + 1] = ffi.string(C.kv_last_error()) else check(status) end
    end
  end
  return damaged
end

local function size(n) return n < 1e6 and ("%d B"):format(n) or ("%.2f MB"):format(n / 1e6) end

function File:__tostring()
  local out = { ("file %s: container version %d, %s"):format(self.path, self.version, size(self.bytes)) }
  local kinds, order = {}, {}
  for _, s in ipairs(self.sections) do
    local key = s.kind .. "/" .. s.stage
    local k = kinds[key]
    if not k then
      k = { kind = s.kind, stage = s.stage, version = s.version, n = 0, pages = 0, raw = 0, stored = 0 }
      kinds[key], order[#order + 1] = k, k
    end
    k.n, k.pages, k.raw, k.stored = k.n + 1, k.pages + s.pages, k.raw + s.raw_bytes, k.stored + s.stored_bytes
  end
  out[2] = ("  %-14s %8s %8s %9s %12s %12s"):format("section", "count", "pages", "stage", "decoded", "stored")
  for _, k in ipairs(order) do out[#out + 1] = ("  %-14s %8d %8d %9s %12s %12s"):format(k.kind, k.n, k.pages, k.stage, size(k.raw), size(k.stored)) end
  for _, s in ipairs(self.sections) do
    local m = s.meta
    if s.kind == "codec" then
      out[#out + 1] = ("  codec %s: %s(%s) format %s, head_dim %s, pages of %s%s"):format(tostring(m.side), tostring(m.family), tostring(m.params), tostring(m.format), tostring(m.head_dim),
        tostring(m.page_tokens), s.raw_bytes > 0 and (", %d bytes of tables"):format(s.raw_bytes) or "")
    elseif m.about then out[#out + 1] = "  " .. tostring(m.about) end
  end
  for i, line in ipairs(out) do out[i] = line:gsub("%c", "?") end               -- texts are the file's
  return table.concat(out, "\n")
end

return M
