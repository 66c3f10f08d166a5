/* device_model.h -- a model's weights on a device, and caches there.  Not part of the public header. */
#ifndef KV_DEVICE_MODEL_H
#define KV_DEVICE_MODEL_H
#include <pthread.h>
#include "device.h"
#include "model.h"
#include "run.h"

struct kv_device_model {
    atomic_int         refs;
    const kv_backend  *b;
    int                number, weights;       /* KV_WEIGHTS_* */
    kv_backend_runner *runner;
    pthread_mutex_t    lock;                  /* the runner's working memory, and what a feed leaves in it, belong to who holds it */
    char               device[32];
};
kv_device_model *kv_device_model_ref(kv_device_model *d);
int  kv_device_model_load(kv_model *m, const char *device, int weights);
int  kv_device_model_cache(const kv_device_model *d, const kv_model *m, const kv_plan *p, int n_seqs, int max_tokens, kv_backend_cache **out);
/* The ledger of a device's cache: what it allocated, and the plan's shared tables. */
int  kv_device_bytes(const kv_device_model *d, const kv_backend_cache *c, const kv_plan *p, int layer, int side, kv_bytes *out);
/* Positions held compressed by a sequence that only grew: the mean over layers, heads and sides. */
double kv_device_tokens_compressed(const kv_geometry *g, const kv_plan *p, int n);
int  kv_device_fail(const kv_device_model *d, int status, const char *err);          /* "cuda: err" */
int  kv_device_run_new(kv_run **out, kv_model *m, kv_plan *plan, int max_tokens);

/* One call of the back end: its status and message. */
#define KV_ON_DEVICE(d, fn, ...) kv_device_call_((d), (d)->b->fn(__VA_ARGS__, kv_device_text_, sizeof kv_device_text_), kv_device_text_)
extern _Thread_local char kv_device_text_[512];
static inline int kv_device_call_(const kv_device_model *d, int status, const char *err) { return status < 0 ? kv_device_fail(d, status, err) : KV_OK; }
#endif
