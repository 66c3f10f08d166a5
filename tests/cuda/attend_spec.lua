-- Decode attention on codes against double precision on the host: tests/cuda/attend_check.cu does it, needs the device library alone,
-- and prints a line a shape.  On the GPU (make gpu-test builds it) every shape, on the emulator (make emulated) short ones.
local h = require "helper"

describe("attention on codes", function()
  h.check_program("attend_check", "equals double precision on every shape, twice the same, on the GPU", "cuda", "check")
  h.check_program("attend_check", "equals double precision on short shapes, twice the same, under the emulator", "emulated", "small")
end)
