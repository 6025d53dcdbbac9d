// What a kernel takes from the card: half precision, products on tensor cores, barriers, exchange between lanes.
//
// The only file with instructions of the card. It needs no header of CUDA's: NVRTC compiles it as it is, for compute capability 7.0
// and newer. The tests put an emulator in its place (tests/kernels/emulator.h), which defines LAVENDER_DEVICE and the same names.

#ifndef LAVENDER_DEVICE
#define LAVENDER_DEVICE

#define DEVICE __device__ __forceinline__
// A kernel under its plain name. One block of it may take all registers of a processor: more blocks would spill.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

typedef unsigned short half_t;  // the bits of a float16

struct alignas(16) Eight {  // eight float16, loaded and stored at once
  unsigned bits[4];
};

DEVICE half_t to_half(float value) {
  half_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

DEVICE float infinity() { return __int_as_float(0x7f800000); }

DEVICE float from_lane(float value, int distance) { return __shfl_xor_sync(0xffffffffu, value, distance); }

// A 16 x 16 tile of float32 sums, spread over a warp's lanes in an order of the card's own.
struct Accumulator {
  float part[8];
};

DEVICE unsigned shared_address(const void* pointer) { return static_cast<unsigned>(__cvta_generic_to_shared(pointer)); }

#define LOAD_FRAGMENT(operand, layout, fragment, pointer, stride)                                                     \
  asm volatile("wmma.load." operand ".sync.aligned." layout                                                           \
               ".m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"                                    \
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]), "=r"(fragment[4]),       \
                 "=r"(fragment[5]), "=r"(fragment[6]), "=r"(fragment[7])                                              \
               : "r"(shared_address(pointer)), "r"(stride)                                                            \
               : "memory")

#define MULTIPLY_FRAGMENTS(layout, sum, a, b)                                                                         \
  asm volatile("wmma.mma.sync.aligned." layout                                                                        \
               ".m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11, %12, %13, %14, %15}, "        \
               "{%16, %17, %18, %19, %20, %21, %22, %23}, {%0, %1, %2, %3, %4, %5, %6, %7};"                          \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]), "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]),    \
                 "+f"(sum[7])                                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]), "r"(b[0]),   \
                 "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(b[4]), "r"(b[5]), "r"(b[6]), "r"(b[7]))

// sum[i][j] += the sum over k < depth of a[i][k] b[k][j], by one warp; a and b lie in shared memory.
//
// An operand's element [x][y] is at x * stride + y, or at y * stride + x where it is TRANSPOSED. Operands begin at a multiple of 32
// bytes, strides are multiples of 8 (`ldm` in CUDA C++), depth of 16.
template <bool A_TRANSPOSED, bool B_TRANSPOSED>
DEVICE void multiply(Accumulator& sum, const half_t* a, int a_stride, const half_t* b, int b_stride, int depth) {
  __syncwarp();  // these instructions must find all lanes together
  for (int k = 0; k < depth; k += 16) {
    unsigned left[8], right[8];
    if (A_TRANSPOSED) {
      LOAD_FRAGMENT("a", "col", left, a + k * a_stride, a_stride);
    } else {
      LOAD_FRAGMENT("a", "row", left, a + k, a_stride);
    }
    if (B_TRANSPOSED) {
      LOAD_FRAGMENT("b", "col", right, b + k, b_stride);
    } else {
      LOAD_FRAGMENT("b", "row", right, b + k * b_stride, b_stride);
    }
    if (A_TRANSPOSED && B_TRANSPOSED) {
      MULTIPLY_FRAGMENTS("col.col", sum.part, left, right);
    } else if (A_TRANSPOSED) {
      MULTIPLY_FRAGMENTS("col.row", sum.part, left, right);
    } else if (B_TRANSPOSED) {
      MULTIPLY_FRAGMENTS("row.col", sum.part, left, right);
    } else {
      MULTIPLY_FRAGMENTS("row.row", sum.part, left, right);
    }
  }
}

// The tile, by one warp, to shared memory at a multiple of 32 bytes: element [i][j] to i * stride + j, stride a multiple of 4.
DEVICE void store(float* target, int stride, const Accumulator& sum) {
  __syncwarp();
  asm volatile(
      "wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8}, %9;" ::"r"(shared_address(target)),
      "f"(sum.part[0]), "f"(sum.part[1]), "f"(sum.part[2]), "f"(sum.part[3]), "f"(sum.part[4]), "f"(sum.part[5]),
      "f"(sum.part[6]), "f"(sum.part[7]), "r"(stride)
      : "memory");
}

#endif
