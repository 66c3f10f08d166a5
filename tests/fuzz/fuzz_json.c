/* fuzz_json.c -- any bytes are refused in one line or parsed to a tree that can be walked. */
#include <stdlib.h>
#include "internal.h"

static double walk(const kv_json_node *n)
{
    double sum = kv_json_type(n) + kv_json_number(n);
    if (kv_json_string(n)) sum += (double)strlen(kv_json_string(n));
    if (kv_json_key(n)) sum += (double)strlen(kv_json_key(n));
    for (const kv_json_node *c = kv_json_child(n); c; c = kv_json_next(c)) sum += walk(c);
    return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    kv_json *d = NULL;
    if (kv_json_parse(&d, (const char *)data, (double)size, "fuzz") == KV_OK) (void)walk(kv_json_root(d));
    else if (strchr(kv_last_error(), '\n')) abort();
    kv_json_free(d);
    return 0;
}
