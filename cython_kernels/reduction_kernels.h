/* Reduction kernels: dest = left op right over arrays of one dtype, chosen by code.

   The loops (reduction_loops.h) are compiled for the baseline of the target and, on x86-64, once
   more for AVX2; the table that fits the processor is chosen at run time. So one build runs on
   every machine of a cluster, with the same results. */
#ifndef HOPCOLL_REDUCTION_KERNELS_H
#define HOPCOLL_REDUCTION_KERNELS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#ifdef __FAST_MATH__
#error "the reduction kernels need IEEE arithmetic: build without -ffast-math"
#endif

#define KERNEL_DTYPES 15
#define KERNEL_OPS 10

typedef void (*reduce_kernel)(void *, const void *, const void *, int64_t);
typedef void (*divide_kernel)(void *, int64_t, int64_t);
typedef struct {
    reduce_kernel reduce[KERNEL_DTYPES][KERNEL_OPS];
    divide_kernel divide[KERNEL_DTYPES];
} kernel_table;

/* User memory: of any alignment, and of any type as far as the aliasing rules go. */
#define ANY __attribute__((aligned(1), may_alias))
typedef uint8_t ANY any_u8;
typedef uint16_t ANY any_u16;
typedef uint32_t ANY any_u32;
typedef uint64_t ANY any_u64;
typedef int8_t ANY any_i8;
typedef int16_t ANY any_i16;
typedef int32_t ANY any_i32;
typedef int64_t ANY any_i64;
typedef float ANY any_f32;
typedef double ANY any_f64;

#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#pragma STDC FP_CONTRACT OFF
#else
#define INDEPENDENT _Pragma("GCC ivdep")
/* No program reads the floating-point exception flags of these loops; were they kept exact, the
   selects of the float16 conversions would stay branches. */
#pragma GCC push_options
#pragma GCC optimize("O3", "fp-contract=off", "no-trapping-math")
#endif

#define VARIANT(name) name##_baseline
#include "reduction_loops.h"
#undef VARIANT

#if defined(__x86_64__)
#define KERNEL_VARIANTS 2
#define VARIANT(name) name##_avx2
#define HALF_BY_HARDWARE
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#include "reduction_loops.h"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#include "reduction_loops.h"
#pragma GCC pop_options
#endif
#undef HALF_BY_HARDWARE
#undef VARIANT
#else
#define KERNEL_VARIANTS 1
#endif

#if !defined(__clang__)
#pragma GCC pop_options
#endif

/* The best variant that this processor runs: 0 is the baseline, 1 is AVX2 (with F16C, which comes
   with it in hardware but can be masked by a hypervisor). */
static int kernel_variant_best(void)
{
#if KERNEL_VARIANTS > 1
    unsigned int eax, ebx, ecx = 0, edx;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx))
        return 0;
    return ecx & bit_F16C ? 1 : 0;
#else
    return 0;
#endif
}

static const kernel_table *kernel_table_of(int variant)
{
#if KERNEL_VARIANTS > 1
    if (variant == 1)
        return &table_avx2;
#endif
    (void)variant;
    return &table_baseline;
}

/* NULL: the pair is not supported. */
static reduce_kernel reduce_kernel_of(const kernel_table *table, int dtype, int op)
{
    if (dtype < 0 || dtype >= KERNEL_DTYPES || op < 0 || op >= KERNEL_OPS)
        return NULL;
    return table->reduce[dtype][op];
}

static divide_kernel divide_kernel_of(const kernel_table *table, int dtype)
{
    if (dtype < 0 || dtype >= KERNEL_DTYPES)
        return NULL;
    return table->divide[dtype];
}

#endif
