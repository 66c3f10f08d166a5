-- make_gguf_seeds.lua -- tiny GGUF files for the fuzzer to start from: every value type, every tensor type, both versions.
--
--     luajit tests/fuzz/make_gguf_seeds.lua FOLDER
local ffi = require "ffi"
local folder = assert(arg[1], "usage: luajit make_gguf_seeds.lua FOLDER")

local function raw(ctype, v) return ffi.string(ffi.new(ctype .. "[1]", v), ffi.sizeof(ctype)) end
local function u32(v) return raw("uint32_t", v) end
local function u64(v) return raw("uint64_t", v) end
local function str(s) return u64(#s) .. s end

local ctypes = { [0] = "uint8_t", "int8_t", "uint16_t", "int16_t", "uint32_t", "int32_t", "float", "uint8_t", nil, nil, "uint64_t", "int64_t", "double" }
local function key(name, type, v) return str(name) .. u32(type) .. (type == 8 and str(v) or raw(ctypes[type], v)) end
local function array(name, type, list)
  local out = {}
  for i, v in ipairs(list) do out[i] = type == 8 and str(v) or raw(ctypes[type], v) end
  return str(name) .. u32(9) .. u32(type) .. u64(#list) .. table.concat(out)
end

-- { name, dims, type, bytes of data }
local function file(version, keys, tensors, align)
  align = align or 32
  local infos, data = {}, ""
  for i, t in ipairs(tensors) do
    data = data .. ("\0"):rep(-#data % align)
    local dims = {}
    for d, v in ipairs(t[2]) do dims[d] = u64(v) end
    infos[i] = str(t[1]) .. u32(#dims) .. table.concat(dims) .. u32(t[3]) .. u64(#data)
    data = data .. ("\1"):rep(t[4])
  end
  local head = "GGUF" .. u32(version) .. u64(#tensors) .. u64(#keys) .. table.concat(keys) .. table.concat(infos)
  return head .. ("\0"):rep(-#head % align) .. data
end

local all_numbers = {}
for type = 0, 12 do if ctypes[type] then all_numbers[#all_numbers + 1] = key("n." .. type, type, 1) end end
local blocks = { { 0, 1, 4 }, { 1, 1, 2 }, { 30, 1, 2 }, { 2, 32, 18 }, { 3, 32, 20 }, { 6, 32, 22 }, { 7, 32, 24 }, { 8, 32, 34 }, { 10, 256, 84 }, { 11, 256, 110 },
  { 12, 256, 144 }, { 13, 256, 176 }, { 14, 256, 210 }, { 99, 32, 16 } }
local tensors = {}
for i, b in ipairs(blocks) do tensors[i] = { "t" .. b[1], { b[2], 2 }, b[1], 2 * b[3] } end

local seeds = {
  empty = file(3, {}, {}),
  numbers = file(3, all_numbers, {}),
  strings = file(2, { key("general.architecture", 8, "llama"), key("tokenizer.chat_template", 8, "{{ a }}\n\t\1") }, {}),
  arrays = file(3, { array("a.u8", 0, { 1, 2, 3 }), array("a.f32", 6, { 1, 2, 3, 4, 5, 6, 7, 8, 9 }), array("a.str", 8, { "x", "", "\195\169" }), array("a.none", 5, {}) }, {}),
  tensors = file(3, { key("general.alignment", 4, 64) }, tensors, 64),
  dims = file(3, {}, { { "d1", { 8 }, 0, 32 }, { "d2", { 4, 2 }, 0, 32 }, { "d3", { 2, 2, 2 }, 1, 16 }, { "d4", { 1, 2, 2, 2 }, 1, 16 } }),
}
for name, bytes in pairs(seeds) do
  local f = assert(io.open(folder .. "/" .. name .. ".gguf", "wb"))
  f:write(bytes)
  f:close()
end
