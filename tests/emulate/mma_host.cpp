// mma_host.cpp -- the warp-wide products and transposes of mma_host.h.
#include "mma_host.h"

namespace kv_emulate {

template <class A8, class B8> static void complete_product(void *const payload[32], uint32_t members)
{
    if (members != ~0u) fail("a tensor-core product with lanes 0x%08x only", members);
    int16_t a[16][32], b[8][32];
    for (int l = 0; l < 32; l++) {
        const product &p = *(const product *)payload[l];
        const int g = l / 4, t = l % 4;
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < 4; i++) a[g + 8 * (r % 2)][4 * t + i + 16 * (r / 2)] = (A8)(p.a[r] >> 8 * i);
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < 4; i++) b[g][4 * t + i + 16 * r] = (B8)(p.b[r] >> 8 * i);
    }
    for (int l = 0; l < 32; l++) {
        product &p = *(product *)payload[l];
        for (int r = 0; r < 4; r++) {
            const int16_t *x = a[l / 4 + 8 * (r / 2)], *y = b[2 * (l % 4) + r % 2];
            int sum = 0;
            for (int k = 0; k < 32; k++) sum += x[k] * y[k];
            p.d[r] = p.c[r] + (uint32_t)sum;
        }
    }
}
static void complete_movmatrix(void *const payload[32], uint32_t members)
{
    if (members != ~0u) fail("movmatrix with lanes 0x%08x only", members);
    uint16_t x[8][8];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 2; i++) x[l / 4][2 * (l % 4) + i] = (uint16_t)(*(const uint32_t *)payload[l] >> 16 * i);
    for (int l = 0; l < 32; l++) ((uint32_t *)payload[l])[1] = x[2 * (l % 4)][l / 4] | (uint32_t)x[2 * (l % 4) + 1][l / 4] << 16;
}
const collective product_s8s8 = { "mma.m16n8k32 s8 s8", complete_product<int8_t, int8_t> }, product_s8u8 = { "mma.m16n8k32 s8 u8", complete_product<int8_t, uint8_t> },
    product_u8s8 = { "mma.m16n8k32 u8 s8", complete_product<uint8_t, int8_t> },
    movmatrix = { "movmatrix", complete_movmatrix };

static void complete_bf16(void *const payload[32], uint32_t members)
{
    if (members != ~0u) fail("a tensor-core product with lanes 0x%08x only", members);
    float a[16][16], b[8][16];
    for (int l = 0; l < 32; l++) {
        const product_f &p = *(const product_f *)payload[l];
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 2; i++) {
            for (int r = 0; r < 4; r++) a[g + 8 * (r % 2)][2 * t + i + 8 * (r / 2)] = kv_float_of_bf16((unsigned short)(p.a[r] >> 16 * i));
            for (int r = 0; r < 2; r++) b[g][2 * t + i + 8 * r] = kv_float_of_bf16((unsigned short)(p.b[r] >> 16 * i));
        }
    }
    for (int l = 0; l < 32; l++) {
        product_f &p = *(product_f *)payload[l];
        for (int r = 0; r < 4; r++) {
            const float *x = a[l / 4 + 8 * (r / 2)], *y = b[2 * (l % 4) + r % 2];
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += x[k] * y[k];
            p.d[r] += sum;
        }
    }
}
template <bool TRANSPOSED> static void complete_ldmatrix(void *const payload[32], uint32_t members)
{
    if (members != ~0u) fail("ldmatrix with lanes 0x%08x only", members);
    for (int i = 0; i < 4; i++) {
        uint16_t x[8][8];
        for (int r = 0; r < 8; r++) {
            const void *row = ((const matrices *)payload[8 * i + r])->row;
            if ((uintptr_t)row % 16) fail("ldmatrix: row %d of matrix %d is not aligned to 16 bytes", r, i);
            memcpy(x[r], row, 16);
        }
        for (int l = 0; l < 32; l++) {
            const int g = l / 4, c = 2 * (l % 4);
            ((matrices *)payload[l])->r[i] = TRANSPOSED ? x[c][g] | (uint32_t)x[c + 1][g] << 16 : x[g][c] | (uint32_t)x[g][c + 1] << 16;
        }
    }
}
const collective product_bf16 = { "mma.m16n8k16 bf16", complete_bf16 }, ldmatrix = { "ldmatrix", complete_ldmatrix<false> }, ldmatrix_transposed = { "ldmatrix.trans", complete_ldmatrix<true> };

}  // namespace kv_emulate
