/* device.h -- back ends by name.  The CPU's is linked in; others are plugins beside libkelvin.so. */
#ifndef KV_DEVICE_H
#define KV_DEVICE_H
#include "backend.h"
#include "internal.h"
extern const kv_backend kv_backend_cpu;
/* "cpu", "cuda", "cuda:1", "emulated" (for tests) -> the table and the device's number.  The message says what is missing and what to do. */
int kv_device_open(const char *device, const kv_backend **out, int *number);
#endif
