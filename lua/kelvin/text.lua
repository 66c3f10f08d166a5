--- A text for an experiment: one part calibrates, another is scored, and the digests of both are kept.

local M = {}
local SPLIT = { calibrate = { 0, 0.25 }, score = { 0.25, 1 } }

-- The part between two shares of the text, cut at line ends so that no word or character is broken.
local function part(text, from, to)
  local function at(share)
    if share <= 0 then return 0 elseif share >= 1 then return #text end
    return text:find("\n", math.floor(share * #text), true) or #text
  end
  return text:sub(at(from) + 1, at(to))
end
M.part = part

--- text.load(name or path) → { name, sha256, calibrate, score, calibrate_sha256, score_sha256, split }.
function M.load(data)
  local fail = require("kelvin.check").fail
  local lib = require "kelvin.lib"
  local path, c = data, nil
  if not data:find "[/%.]" then path, c = require("kelvin.fetch").text(data) end
  local f, message = io.open(path, "rb")
  if not f then fail("text %s", message) end
  local text = f:read "*a"
  f:close()
  if not text or #text == 0 then fail("text '%s' is empty or a folder", data) end
  local split = c and c.split or SPLIT
  local t = { name = c and data or data:match "[^/]+$", sha256 = lib.sha256(text), split = split,
    calibrate = part(text, split.calibrate[1], split.calibrate[2]), score = part(text, split.score[1], split.score[2]) }
  t.calibrate_sha256, t.score_sha256 = lib.sha256(t.calibrate), lib.sha256(t.score)
  return t
end

--- For manifests.
function M.describe(t)
  return { name = t.name, sha256 = t.sha256, split = t.split, calibrate_sha256 = t.calibrate_sha256, score_sha256 = t.score_sha256 }
end

return M
