/* The loops of the reduction kernels, for one instruction set.

   reduction_kernels.h includes this file once for each instruction set, with VARIANT(name) giving
   the functions their own names. Every loop is one line: the compiler vectorises it.

   The arithmetic is the same in every variant: no fused multiply-add, no reassociation, one NaN.
   So a result depends on the inputs alone, never on the machine that computed it. */

/* dest[i] = VALUE of a = left[i] and b = right[i]. TYPE is PLAIN, of any alignment and aliasing.
   Not even where dest is left or right does one round of the loop need another; INDEPENDENT tells
   the compiler, which would take that case to its scalar loop. */
#define LOOP(NAME, TYPE, PLAIN, VALUE)                                                          \
    static void VARIANT(NAME)(void *dest_, const void *left_, const void *right_, int64_t count) \
    {                                                                                           \
        TYPE *dest = (TYPE *)dest_;                                                             \
        const TYPE *left = (const TYPE *)left_, *right = (const TYPE *)right_;                  \
        INDEPENDENT for (int64_t i = 0; i < count; i++) {                                       \
            PLAIN a = left[i], b = right[i];                                                    \
            dest[i] = (PLAIN)(VALUE);                                                           \
        }                                                                                       \
    }

/* One real array seen as `count` pairs: complex sums. */
#define PAIRS(NAME, REAL_NAME)                                                                  \
    static void VARIANT(NAME)(void *dest, const void *left, const void *right, int64_t count)   \
    {                                                                                           \
        VARIANT(REAL_NAME)(dest, left, right, 2 * count);                                       \
    }

#define COMPLEX_PRODUCT(NAME, TYPE, PLAIN)                                                      \
    static void VARIANT(NAME)(void *dest_, const void *left_, const void *right_, int64_t count) \
    {                                                                                           \
        TYPE *dest = (TYPE *)dest_;                                                             \
        const TYPE *left = (const TYPE *)left_, *right = (const TYPE *)right_;                  \
        INDEPENDENT for (int64_t i = 0; i < count; i++) {                                       \
            PLAIN ar = left[2 * i], ai = left[2 * i + 1];                                       \
            PLAIN br = right[2 * i], bi = right[2 * i + 1];                                     \
            dest[2 * i] = ONE_NAN(ar * br - ai * bi);                                           \
            dest[2 * i + 1] = ONE_NAN(ar * bi + ai * br);                                       \
        }                                                                                       \
    }

#define DIVIDE(NAME, TYPE, PLAIN, REAL, VALUE)                                                  \
    static void VARIANT(NAME)(void *dest_, int64_t count, int64_t divisor)                      \
    {                                                                                           \
        TYPE *dest = (TYPE *)dest_;                                                             \
        REAL n = (REAL)divisor;                                                                 \
        INDEPENDENT for (int64_t i = 0; i < count; i++) {                                       \
            PLAIN a = dest[i];                                                                  \
            dest[i] = (PLAIN)(VALUE);                                                           \
        }                                                                                       \
    }

/* Which of two NaNs goes on, and the sign of a new one, differ between processors and even between
   the vector and the scalar part of a loop. All become the positive quiet NaN without payload. */
#define ONE_NAN(VALUE) ((VALUE) == (VALUE) ? (VALUE) : NAN)

/* float16 and bfloat16 are computed in float32 and rounded to nearest even after every operation.
   The conversions have no branch, so that the loops above vectorise without hardware support
   (after F. Giesen, "half to float done quick" and its reverse). */

static inline float VARIANT(bits_to_float)(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t VARIANT(float_to_bits)(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float VARIANT(from_half)(uint16_t half)
{
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t normal = magnitude + (112u << 23);       /* the exponent's bias goes from 15 to 127 */
    uint32_t special = magnitude | (255u << 23);      /* infinity and NaN */
    float tiny = VARIANT(bits_to_float)(normal + (1u << 23)) - VARIANT(bits_to_float)(113u << 23);
    uint32_t bits = magnitude < (1u << 23) ? VARIANT(float_to_bits)(tiny) : normal;
    bits = magnitude >= (31u << 23) ? special : bits;
    return VARIANT(bits_to_float)(bits | sign);
}

static inline uint16_t VARIANT(to_half)(float value)
{
    uint32_t bits = VARIANT(float_to_bits)(value);
    uint32_t sign = (bits >> 16) & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    uint32_t odd = (magnitude >> 13) & 1;
    uint32_t normal = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
    /* Adding 0.5 leaves the bits of a subnormal half, rounded, at the end of the sum. */
    uint32_t tiny = VARIANT(float_to_bits)(VARIANT(bits_to_float)(magnitude) + 0.5f) - (126u << 23);
    uint32_t half = magnitude < (113u << 23) ? tiny : normal;
    half = (magnitude >= (143u << 23) ? 0x7c00 : half) | sign;
    return (uint16_t)(magnitude > (255u << 23) ? 0x7e00 : half);
}

static inline float VARIANT(from_brain)(uint16_t brain)
{
    return VARIANT(bits_to_float)((uint32_t)brain << 16);
}

static inline uint16_t VARIANT(to_brain)(float value)
{
    uint32_t bits = VARIANT(float_to_bits)(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > (255u << 23) ? 0x7fc0 : rounded);
}

/* A NaN in either operand is the result, the left one of two; of equal operands (zeros) the right
   one is. */
#define SMALLER(A, B) (((A) < (B)) | ((A) != (A)))
#define LARGER(A, B) (((A) > (B)) | ((A) != (A)))

/* Signed integers go through the unsigned kernels where the bits come out alike, so that an
   overflow wraps. WIDE keeps a product of small integers out of int, where it would overflow. */
#define INTEGER(NAME, TYPE, PLAIN, WIDE)                                                        \
    LOOP(NAME##_sum, TYPE, PLAIN, (WIDE)a + (WIDE)b)                                            \
    LOOP(NAME##_prod, TYPE, PLAIN, (WIDE)a * (WIDE)b)                                           \
    LOOP(NAME##_land, TYPE, PLAIN, (a != 0) & (b != 0))                                         \
    LOOP(NAME##_lor, TYPE, PLAIN, (a != 0) | (b != 0))                                          \
    LOOP(NAME##_lxor, TYPE, PLAIN, (a != 0) ^ (b != 0))                                         \
    LOOP(NAME##_band, TYPE, PLAIN, a & b)                                                       \
    LOOP(NAME##_bor, TYPE, PLAIN, a | b)                                                        \
    LOOP(NAME##_bxor, TYPE, PLAIN, a ^ b)

#define ORDER(NAME, TYPE, PLAIN)                                                                \
    LOOP(NAME##_min, TYPE, PLAIN, a < b ? a : b)                                                \
    LOOP(NAME##_max, TYPE, PLAIN, a > b ? a : b)

#define REAL(NAME, TYPE, PLAIN)                                                                 \
    LOOP(NAME##_sum, TYPE, PLAIN, ONE_NAN(a + b))                                               \
    LOOP(NAME##_prod, TYPE, PLAIN, ONE_NAN(a * b))                                              \
    LOOP(NAME##_min, TYPE, PLAIN, SMALLER(a, b) ? a : b)                                        \
    LOOP(NAME##_max, TYPE, PLAIN, LARGER(a, b) ? a : b)                                         \
    LOOP(NAME##_land, TYPE, PLAIN, (a != 0) & (b != 0))                                         \
    LOOP(NAME##_lor, TYPE, PLAIN, (a != 0) | (b != 0))                                          \
    LOOP(NAME##_lxor, TYPE, PLAIN, (a != 0) ^ (b != 0))                                         \
    DIVIDE(NAME##_divide, TYPE, PLAIN, PLAIN, ONE_NAN(a / n))

/* Shifted to the left, a 16-bit float loses its sign: zero for both zeros. */
#define SHORT_REAL(NAME, FROM, TO, ONE)                                                         \
    LOOP(NAME##_sum, any_u16, uint16_t, TO(FROM(a) + FROM(b)))                                  \
    LOOP(NAME##_prod, any_u16, uint16_t, TO(FROM(a) * FROM(b)))                                 \
    LOOP(NAME##_min, any_u16, uint16_t, SMALLER(FROM(a), FROM(b)) ? a : b)                      \
    LOOP(NAME##_max, any_u16, uint16_t, LARGER(FROM(a), FROM(b)) ? a : b)                       \
    LOOP(NAME##_land, any_u16, uint16_t, NONZERO(a) & NONZERO(b) ? ONE : 0)                     \
    LOOP(NAME##_lor, any_u16, uint16_t, NONZERO(a) | NONZERO(b) ? ONE : 0)                      \
    LOOP(NAME##_lxor, any_u16, uint16_t, NONZERO(a) ^ NONZERO(b) ? ONE : 0)                     \
    DIVIDE(NAME##_divide, any_u16, uint16_t, float, TO(FROM(a) / n))
#define NONZERO(A) ((uint16_t)((A) << 1) != 0)

INTEGER(u8, any_u8, uint8_t, uint32_t)
INTEGER(u16, any_u16, uint16_t, uint32_t)
INTEGER(u32, any_u32, uint32_t, uint32_t)
INTEGER(u64, any_u64, uint64_t, uint64_t)
ORDER(i8, any_i8, int8_t)
ORDER(i16, any_i16, int16_t)
ORDER(i32, any_i32, int32_t)
ORDER(i64, any_i64, int64_t)
ORDER(u8, any_u8, uint8_t)
ORDER(u16, any_u16, uint16_t)
ORDER(u32, any_u32, uint32_t)
ORDER(u64, any_u64, uint64_t)
SHORT_REAL(half, VARIANT(from_half), VARIANT(to_half), 0x3c00)
#ifdef HALF_BY_HARDWARE
/* The processor's own conversions are several times as fast and give the same bits. The rest of the
   array (fewer than 8 items) goes the way above. */
#define HALF_LOOP(NAME, REST, COMPUTE)                                                          \
    static void VARIANT(NAME)(void *dest_, const void *left_, const void *right_, int64_t count) \
    {                                                                                           \
        any_u16 *dest = (any_u16 *)dest_;                                                       \
        const any_u16 *left = (const any_u16 *)left_, *right = (const any_u16 *)right_;         \
        int64_t i = 0;                                                                          \
        for (; i + 8 <= count; i += 8) {                                                        \
            __m256 a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(left + i)));           \
            __m256 b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(right + i)));          \
            __m256 value = COMPUTE(a, b), is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);   \
            value = _mm256_blendv_ps(value, _mm256_set1_ps(NAN), is_nan);                       \
            _mm_storeu_si128((__m128i *)(dest + i),                                             \
                             _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));                \
        }                                                                                       \
        VARIANT(REST)(dest + i, left + i, right + i, count - i);                                \
    }
HALF_LOOP(half_fast_sum, half_sum, _mm256_add_ps)
HALF_LOOP(half_fast_prod, half_prod, _mm256_mul_ps)
#undef HALF_LOOP
#define HALF_SUM half_fast_sum
#define HALF_PROD half_fast_prod
#else
#define HALF_SUM half_sum
#define HALF_PROD half_prod
#endif
SHORT_REAL(brain, VARIANT(from_brain), VARIANT(to_brain), 0x3f80)
REAL(f32, any_f32, float)
REAL(f64, any_f64, double)
PAIRS(c64_sum, f32_sum)
PAIRS(c128_sum, f64_sum)
COMPLEX_PRODUCT(c64_prod, any_f32, float)
COMPLEX_PRODUCT(c128_prod, any_f64, double)

#define INTEGER_ROW(BITS, ORDERED)                                                              \
    {VARIANT(BITS##_sum), VARIANT(BITS##_prod), VARIANT(ORDERED##_min), VARIANT(ORDERED##_max), \
     VARIANT(BITS##_land), VARIANT(BITS##_lor), VARIANT(BITS##_lxor),                           \
     VARIANT(BITS##_band), VARIANT(BITS##_bor), VARIANT(BITS##_bxor)}
#define REAL_ROW(NAME) REAL_ROW_OF(NAME, NAME##_sum, NAME##_prod)
#define REAL_ROW_OF(NAME, SUM_NAME, PROD_NAME)                                                  \
    {VARIANT(SUM_NAME), VARIANT(PROD_NAME), VARIANT(NAME##_min), VARIANT(NAME##_max),           \
     VARIANT(NAME##_land), VARIANT(NAME##_lor), VARIANT(NAME##_lxor), NULL, NULL, NULL}
#define COMPLEX_ROW(NAME) {VARIANT(NAME##_sum), VARIANT(NAME##_prod)}
/* bool: a byte, true unless it is zero; SUM and MAX are "or", PROD and MIN are "and". */
#define BOOL_ROW                                                                                \
    {VARIANT(u8_lor), VARIANT(u8_land), VARIANT(u8_land), VARIANT(u8_lor),                      \
     VARIANT(u8_land), VARIANT(u8_lor), VARIANT(u8_lxor),                                       \
     VARIANT(u8_land), VARIANT(u8_lor), VARIANT(u8_lxor)}

/* Rows by dtype code and columns by operation code, as in reduction.pxd. */
static const kernel_table VARIANT(table) = {
    {
        INTEGER_ROW(u8, i8), INTEGER_ROW(u16, i16), INTEGER_ROW(u32, i32), INTEGER_ROW(u64, i64),
        INTEGER_ROW(u8, u8), INTEGER_ROW(u16, u16), INTEGER_ROW(u32, u32), INTEGER_ROW(u64, u64),
        REAL_ROW_OF(half, HALF_SUM, HALF_PROD), REAL_ROW(brain), REAL_ROW(f32), REAL_ROW(f64),
        COMPLEX_ROW(c64), COMPLEX_ROW(c128), BOOL_ROW,
    },
    {
        NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
        VARIANT(half_divide), VARIANT(brain_divide), VARIANT(f32_divide), VARIANT(f64_divide),
        VARIANT(f32_divide), VARIANT(f64_divide), NULL,
    },
};

#undef LOOP
#undef PAIRS
#undef COMPLEX_PRODUCT
#undef DIVIDE
#undef ONE_NAN
#undef NONZERO
#undef SMALLER
#undef LARGER
#undef INTEGER
#undef ORDER
#undef REAL
#undef SHORT_REAL
#undef INTEGER_ROW
#undef REAL_ROW
#undef REAL_ROW_OF
#undef HALF_SUM
#undef HALF_PROD
#undef COMPLEX_ROW
#undef BOOL_ROW
