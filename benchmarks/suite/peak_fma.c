/* What the vector units of one core can do at most: chains of multiply-adds that wait for nothing but themselves.
 *
 * float32(n) and bfloat16(n) run n rounds and return how many floating-point operations those were; 0 where the machine has no
 * such instruction. peak.py compiles this for the machine it runs on.
 */
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
enum { CHAINS = 12 }; /* more than a unit's latency (4) x units (2), fewer than registers (16) */
typedef float Vector __attribute__((vector_size(BYTES)));
static volatile float sink; /* so that no sum is left out */

int64_t float32(int64_t rounds) {
  Vector sums[CHAINS], a, b;
  for (int i = 0; i < BYTES / 4; i++) {
    a[i] = 0.999f, b[i] = 1e-3f;
    for (int c = 0; c < CHAINS; c++) sums[c][i] = (float)c + sink; /* or the compiler makes one chain of all */
  }
  for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; c++) sums[c] = sums[c] * a + b;
  for (int c = 1; c < CHAINS; c++) sums[0] += sums[c];
  sink = sums[0][0];
  return rounds * CHAINS * (BYTES / 4) * 2;
}

int64_t bfloat16(int64_t rounds) {
#if defined(__AVX512BF16__)
  __m512 sums[CHAINS];
  __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f));
  for (int c = 0; c < CHAINS; c++) sums[c] = _mm512_set1_ps((float)c);
  for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; c++) sums[c] = _mm512_dpbf16_ps(sums[c], a, a);
  for (int c = 1; c < CHAINS; c++) sums[0] = _mm512_add_ps(sums[0], sums[c]);
  sink = _mm512_reduce_add_ps(sums[0]);
  return rounds * CHAINS * 32 * 2;
#else
  (void)rounds;
  return 0;
#endif
}
