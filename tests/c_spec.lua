-- The C tests, one case each, and the house rules: so that one closing line counts everything.
local K = require "kelvin.ffi"

local dist = os.getenv "KELVIN_DIST"
local folder = dist and dist .. "/libexec" or K.folder .. "/tests"
local env = dist and ("LD_LIBRARY_PATH='%s/lib' "):format(dist) or ""

-- Exit status and the last lines of a command's output.
local function run(command)
  local p = assert(io.popen(("{ %s; } 2>&1; echo \"status $?\""):format(command)))
  local out = p:read "*a"
  p:close()
  local status = tonumber(out:match "status (%d+)%s*$")
  return status, out:sub(-2000)
end

describe("C tests", function()
  for path in io.popen(("ls '%s'/test_* 2>/dev/null"):format(folder)):lines() do
    local name = path:match "[^/]+$"
    if not name:find(".", 1, true) then
      it(name .. " passes", function()
        local status, out = run(env .. "'" .. path .. "'")
        assert(status == 0, out)
        assert(out:match "%d+ passed, 0 failed", "no closing line: " .. out)
      end)
    end
  end
end)

describe("house rules", function()
  if dist then pending("the tree is not a checkout: tests/lint.sh looks at sources") else
    it("tests/lint.sh finds no breach", function()
      local status, out = run(("sh '%s/tests/lint.sh'"):format(K.root))
      assert(status == 0, out)
    end)
  end
end)
