--- kelvin.lib: the small calls of the library: threads, processor, clock, hashes, random numbers, shared codec stages.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local doc = require("kelvin.help").doc

local M = {}

doc("kv.threads", [[
  kv.threads([n]) -> n
  Threads that C uses for one call.  With n sets it: 1..64, 0 for as many as this process may run on.]])
function M.threads(n)
  if n then check(C.kv_set_threads(n)) end
  return C.kv_threads()
end

local levels = { [0] = "c", "avx2", "avx512", "amx" }

doc("kv.simd", [[
  kv.simd([level]) -> in use, best of this processor
  Instruction set that the core uses: "c", "avx2" or "avx512".  With a level: use at most that one.  "amx", the default, is
  "avx512" with prefill's products on AMX tiles where the processor has them; kv.simd "avx512" leaves these to OpenBLAS.]])
function M.simd(level)
  if level then
    local want
    for i = 0, 3 do if levels[i] == level then want = i end end
    check.that(want, "kv.simd: level '%s' is none of c, avx2, avx512, amx", tostring(level))
    C.kv_cpu_limit(want)
  end
  return levels[C.kv_cpu_simd()], levels[C.kv_cpu_simd_max()]
end

doc("kv.now", [[
  kv.now() -> seconds
  Monotonic clock, for timing.]])
function M.now() return C.kv_now() end

doc("kv.interrupted", [[
  kv.interrupted() -> boolean
  True once after Ctrl-C.  Long Lua loops ask it between steps: compiled loops notice nothing else.]])
function M.interrupted() return C.kv_interrupted() == 1 end

doc("kv.sha256", [[
  kv.sha256(text) -> 64 hex digits]])
function M.sha256(text)
  local hex = ffi.new "char[65]"
  check(C.kv_sha256(text, #text, hex))
  return ffi.string(hex, 64)
end

doc("kv.sha256_file", [[
  kv.sha256_file(path) -> 64 hex digits
  An error when the file cannot be read.]])
function M.sha256_file(path)
  local hex = ffi.new "char[65]"
  check(C.kv_sha256_file(path, hex))
  return ffi.string(hex, 64)
end

doc("kv.random", [[
  kv.random(seed, stream, counter) -> number in (0, 1)
  One draw of the counter-based generator (Philox4x32-10): the same in C, Lua and CUDA.  counter from 0.]])
function M.random(seed, stream, counter)
  local x = ffi.new "float[1]"
  check(C.kv_rng_uniform(seed, stream, counter, 1, x))
  return x[0]
end

doc("kv.lloyd_max", [[
  kv.lloyd_max(bits [, dim]) -> centroids (ascending), distortion
  The scalar quantizer of least mean squared error for N(0,1); with dim for one coordinate of a random unit vector of that
  many dimensions, times sqrt(dim) (exact Beta density).  bits 1..8.]])
function M.lloyd_max(bits, dim)
  check.that(type(bits) == "number" and bits >= 1 and bits <= 8, "kv.lloyd_max: bits=%s is outside 1..8", tostring(bits))
  local n = 2 ^ bits
  local c, d = ffi.new("double[?]", n), ffi.new "double[1]"
  check(C.kv_lloyd_max(bits, dim or 0, c, d))
  local out = {}
  for i = 1, n do out[i] = c[i - 1] end
  return out, d[0]
end

doc("kv.hadamard", [[
  kv.hadamard(t) -> tensor
  Orthonormal fast Walsh-Hadamard transform of every row (last dimension, a power of two 1..4096) of a tensor; a copy.]])
function M.hadamard(t)
  local out = t:clone()
  local shape = out:shape()
  local n = shape[#shape]
  check(C.kv_hadamard(out:_data(), out:n_elements() / n, n))
  return out
end

doc("kv.device", [[
  kv.device([name]) -> table
  What is known of a device: "cpu", "cuda" or "cuda:1".  Fields name, available, reason (why not), n_devices, sm, driver,
  runtime, memory_bytes, plugin.]])
function M.device(name)
  local info = ffi.new "kv_device_info[1]"
  check(C.kv_device_query(name or "cpu", info))
  local i = info[0]
  local function s(p) return p ~= nil and ffi.string(p) or "" end
  return { name = s(i.name), reason = s(i.reason), available = i.available ~= 0, n_devices = i.n_devices, sm = i.sm, abi = i.abi,
    driver = i.driver, runtime = i.runtime, memory_bytes = i.memory_bytes, plugin = s(i.plugin) }
end

doc("kv.build", [[
  kv.build() -> table
  version, abi_hash, flags (compiler and flags), cpu, simd, products (what multiplies in prefill), threads: for manifests.]])
function M.build()
  return { version = ffi.string(C.kv_version()), abi_hash = K.hash, flags = ffi.string(C.kv_build_flags()),
    cpu = ffi.string(C.kv_cpu_name()), simd = levels[C.kv_cpu_simd()], simd_max = levels[C.kv_cpu_simd_max()],
    products = C.kv_cpu_amx() == 1 and "AMX, bf16 pairs" or "OpenBLAS, f32", threads = C.kv_threads() }
end

return M
