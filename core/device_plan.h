/* device_plan.h -- a plan and a model's geometry as a back end takes them. */
#ifndef KV_DEVICE_PLAN_H
#define KV_DEVICE_PLAN_H
#include "backend.h"
#include "cache.h"

typedef struct kv_device_plan {
    kv_backend_plan   plan;            /* points into what follows, into g and into p: those outlive it */
    kv_backend_codec *codec;           /* one for each codec of the plan */
    kv_backend_slot  *slot;
    const double    **freq;
    int               n_codecs;
} kv_device_plan;

/* A codec that b has no form for is KV_E_UNSUPPORTED; the text names the slot and which codecs have one. */
int  kv_device_plan_new(kv_device_plan **out, const kv_backend *b, const kv_geometry *g, const kv_plan *p);
void kv_device_plan_free(kv_device_plan *d);
#endif
