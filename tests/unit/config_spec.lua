local H = require "helper"
local config = require "kelvin.config"

describe("a config file", function()
  it("is checked: every file that is here passes", function()
    for _, kind in ipairs { "codecs", "models" } do
      for _, name in ipairs(config.list(kind)) do
        assert.is_table(config.load(kind, name), kind .. "/" .. name)
      end
    end
    assert.is_true(#config.list "codecs" >= 4)
    assert.is_nil(config.load("codecs", "no-such-file"))
  end)

  it("names the key that is wrong, and what is allowed", function()
    local function fails(v) return H.fails(config.check, v, "codecs", "x.json") end
    assert.are.equal("x.json: unknown key 'famly'; near: family", fails { famly = "int", about = "a", source = "s" })
    assert.matches("^x.json: key 'about' is missing: ", fails { family = "int", source = "s" })
    assert.are.equal("x.json: 'family' is a number, a string is needed", fails { family = 3, about = "a", source = "s" })
    assert.matches("^x.json: unknown key 'variants.a.bits'; ", fails { family = "int", about = "a", source = "s", variants = { a = { bits = 3 } } })
  end)
end)

describe("log", function()
  it("refuses a level that is not there", function()
    assert.are.equal("log: level 'loud' is none of error, warn, info, debug", H.fails(require("kelvin.log").set, "loud"))
  end)
end)
