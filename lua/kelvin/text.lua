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

local function whole(data)
  local fail = require("kelvin.check").fail
  local path, c = data, nil
  if not data:find "[/%.]" then path, c = require("kelvin.fetch").text(data) end
  local f, message = io.open(path, "rb")
  if not f then fail("text %s", message) end
  local text = f:read "*a"
  f:close()
  if not text or #text == 0 then fail("text '%s' is empty or a folder", data) end
  return text, c and data or data:match "[^/]+$", c
end

--- text.load(name or path [, calib]) → { name, sha256, calibrate, score, calibrate_sha256, score_sha256, split, calib_name }.
-- calib: another name or path, whose whole text calibrates, while all of the first is scored; there is no split then.
function M.load(data, calib)
  local lib = require "kelvin.lib"
  local text, name, c = whole(data)
  local t = { name = name, sha256 = lib.sha256(text) }
  if calib then
    t.score, t.calibrate, t.calib_name = text, whole(calib)
  else
    t.split = c and c.split or SPLIT
    t.calibrate, t.score = part(text, t.split.calibrate[1], t.split.calibrate[2]), part(text, t.split.score[1], t.split.score[2])
  end
  t.calibrate_sha256, t.score_sha256 = lib.sha256(t.calibrate), lib.sha256(t.score)
  if t.calibrate == t.score then require("kelvin.check").fail("text '%s': it is to calibrate and to be scored; give another to calibrate on", name) end
  return t
end

--- For manifests.
function M.describe(t)
  return { name = t.name, sha256 = t.sha256, split = t.split, calibrate_name = t.calib_name, calibrate_sha256 = t.calibrate_sha256, score_sha256 = t.score_sha256 }
end

return M
