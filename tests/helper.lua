-- What specs share: the module, a comparator that says where, models if they are here, temporary files.
local M = {}

M.kv = require "kelvin"
local root = require("kelvin.ffi").root
M.root = root

--- close(a, b, tol): numbers, or nested tables of them, within tol (absolute, or relative where values pass 1).
-- NaN must meet NaN.  On failure names the worst place and both values.
function M.close(a, b, tol, where)
  where = where or "value"
  if type(a) == "table" then
    assert(type(b) == "table" and #a == #b, ("%s: %d entries against %s"):format(where, #a, type(b) == "table" and #b or type(b)))
    for i = 1, #a do M.close(a[i], b[i], tol, ("%s[%d]"):format(where, i)) end
    return
  end
  if a ~= a or b ~= b then
    assert(a ~= a and b ~= b, ("%s: %s against %s"):format(where, a, b))
    return
  end
  local d = math.abs(a - b)
  assert(d <= tol * math.max(1, math.abs(b)), ("%s: %.9g against %.9g, off by %.3g, allowed %.3g"):format(where, a, b, d, tol))
end

--- fails(fn, ...): calls fn, which must raise; returns the message without its position.
function M.fails(fn, ...)
  local ok, err = pcall(fn, ...)
  assert(not ok, "no error was raised")
  err = type(err) == "table" and err.message or err
  return (tostring(err):gsub("^[^%s]+:%d+: ", ""))
end

--- model(name): the opened model; without its file the calling spec is skipped with the reason (busted's pending is the spec's own).
local models = {}
function M.model(name)
  if models[name] then return models[name] end
  local path, present = require("kelvin.model").find(name)
  if not present then
    local folder = require("kelvin.model").folder()
    local file = folder .. "/" .. name .. ".gguf"
    local f = io.open(file, "rb")
    if not f then
      getfenv(2).pending(("model '%s' is not in %s: kelvin models get %s"):format(name, folder, name))
      return nil
    end
    f:close()
    path = file
  end
  models[name] = M.kv.model(path)
  return models[name]
end

--- temporary([suffix]): the name of a file that is gone after the tests.
local temporary = {}
function M.temporary(suffix)
  local name = os.tmpname()
  temporary[#temporary + 1] = name
  if suffix then
    name = name .. suffix
    temporary[#temporary + 1] = name
  end
  return name
end
function M.cleanup()
  for _, name in ipairs(temporary) do os.remove(name) end
  temporary = {}
end

--- run(args [, stdin]): the built program's output (stdout and stderr together) and exit status.
function M.run(args, stdin)
  local exe = M.program()
  local input = M.temporary()
  local f = assert(io.open(input, "wb"))
  f:write(stdin or "")
  f:close()
  local p = io.popen(("'%s' %s < '%s' 2>&1; echo \"rc=$?\""):format(exe, args, input))
  local out = p:read "*a"
  p:close()
  local text, rc = out:match "^(.*)rc=(%d+)\n$"
  return text, tonumber(rc)
end


--- program(): the path of bin/kelvin in a build tree or in a relocatable one.
function M.program()
  local folder = require("kelvin.ffi").folder
  local host = package.loaded["kelvin.host"]
  return host and host.exe or folder .. "/bin/kelvin"
end

--- no_device(device): why specs of "cuda" or "emulated" are pending, or nil where that device is.
function M.no_device(device)
  local K = require "kelvin.ffi"
  local info = K.ffi.new "kv_device_info"
  K.C.kv_device_query(device, info)
  if info.available ~= 1 then return device == "cuda" and "no CUDA device" or "no emulated device: make emulated" end
end

--- check_program(name, title, device, argument): a spec that runs tests/cuda/NAME.cu as built for the device; it counts its own checks.
function M.check_program(name, title, device, argument)
  local K, spec = require "kelvin.ffi", getfenv(2)          -- busted gives `it` and `pending` to spec files alone
  local lacks, program = M.no_device(device), nil
  for _, p in ipairs(device == "cuda" and { K.folder .. "/cuda/" .. name, K.folder .. "/../libexec/" .. name } or { K.folder .. "/emulated/" .. name }) do
    program = program or K.exists(p) and p
  end
  if not program then lacks = lacks or ("%s is not built: make %s"):format(name, device == "cuda" and "gpu-test" or "emulated") end
  if lacks then spec.pending(title .. " (" .. lacks .. ")") return end
  spec.it(title, function()
    local pipe = assert(io.popen(("'%s' %s 2>&1; echo rc $?"):format(program, argument)))
    local out = pipe:read "*a"
    pipe:close()
    assert(out:find("rc 0", 1, true) and not out:find("FAIL", 1, true), out)
    assert((tonumber(out:match "(%d+) checks, 0 failed") or 0) > 0, out)
  end)
end

return M
