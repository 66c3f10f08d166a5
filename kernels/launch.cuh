// launch.cuh -- KV_LAUNCH and KV_SHARED_DYNAMIC, of the device library.
#pragma once
#include "kelvin/launch.cuh"
