// The emulator: csrc/device.cuh for a CPU. It runs a kernel's own source, one block at a time, every thread of it as a fiber.
//
// A fiber runs until its next barrier or exchange with other lanes; in which order fibers run is a seed's choice, so that a missing
// barrier shows. Shared memory begins as NaN. Threads that wait for one another forever, lanes that meet at different places, operands
// that the card would refuse and accesses outside a tensor (its copy ends at a page that may not be touched) end the launch with a
// reason. It knows nothing of time, of caches, or of the card's rounding inside a product of tiles.

#pragma once
#define LAVENDER_DEVICE

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

using std::max;
using std::min;

#define DEVICE inline
#define KERNEL(threads) extern "C" void
#define SHARED_MEMORY(name) unsigned char* name = emulator::shared
#define __syncthreads() emulator::meet(emulator::BLOCK, __LINE__)
#define __syncthreads_or(found) emulator::any(found, __LINE__)
#define __syncwarp() emulator::meet(emulator::WARP, __LINE__)

typedef unsigned short half_t;

struct alignas(16) Eight {
  unsigned bits[4];
};

struct Dimensions {
  int x, y, z;
};

struct Accumulator {
  float part[8];  // of lane l: elements 8 l, ..., 8 l + 7 of the tile, row after row
};

static Dimensions threadIdx, blockIdx, gridDim;

namespace emulator {

constexpr int NUM_THREADS = 256, STACK_BYTES = 128 * 1024;
enum Place { RUNNING, BLOCK, WARP, DONE };

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started;
  Place place;
  int line;       // where it waits
  void* given;    // what it brought to an exchange
  bool found;
  std::vector<unsigned char> stack;
};

static std::vector<Fiber> fibers(NUM_THREADS);
static int current;
static jmp_buf scheduler;
static sigjmp_buf outside;
static unsigned char* shared;
static std::function<void()> body;
static char reason[256];

[[noreturn]] inline void fail(const char* what, int line) {
  snprintf(reason, sizeof(reason), "%s (thread %d, line %d)", what, current, line);
  siglongjmp(outside, 1);
}

inline void wait() {
  if (!_setjmp(fibers[current].state)) _longjmp(scheduler, 1);
}

// Waits for the rest of the block or of the warp; the last to come does `together` for all of them.
inline void meet(Place place, int line, void* given = nullptr, const std::function<void(int)>& together = nullptr) {
  Fiber& fiber = fibers[current];
  const int first = place == WARP ? current / 32 * 32 : 0, count = place == WARP ? 32 : NUM_THREADS;
  fiber.place = place;
  fiber.line = line;
  fiber.given = given;
  bool last = true;
  for (int t = first; t < first + count; ++t) {
    const Fiber& other = fibers[t];
    if (other.place == DONE) fail("threads wait for one that has ended", line);
    if (other.place != place) last = false;
  }
  if (!last) {
    wait();
    return;
  }
  for (int t = first; t < first + count; ++t)
    if (fibers[t].place == place && fibers[t].line != line) fail("threads meet at different barriers", line);
  if (together) together(first);
  for (int t = first; t < first + count; ++t) fibers[t].place = RUNNING;
}

inline int any(bool found, int line) {
  fibers[current].found = found;
  meet(BLOCK, line, nullptr, [](int) {
    bool all = false;
    for (Fiber& fiber : fibers) all = all || (fiber.place == BLOCK && fiber.found);
    for (Fiber& fiber : fibers) fiber.found = all;
  });
  return fibers[current].found;
}

inline void begin() {
  body();
  fibers[current].place = DONE;
  _longjmp(scheduler, 1);
}

inline void resume(int thread) {
  current = thread;
  threadIdx = {thread, 0, 0};
  if (_setjmp(scheduler)) return;
  Fiber& fiber = fibers[thread];
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void run_block(size_t shared_bytes, std::mt19937& random, bool shuffled) {
  memset(shared, 0xff, shared_bytes);  // NaN, as float32 and as float16
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(STACK_BYTES);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, begin, 0);
    fiber.started = false;
    fiber.place = RUNNING;
    }
  // The first in this order that can run does, as far as it can get: warps are as far apart as the barriers let them.
  std::vector<int> order(NUM_THREADS), warps(NUM_THREADS / 32), lanes(32);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  if (shuffled) {
    std::shuffle(warps.begin(), warps.end(), random);
    std::shuffle(lanes.begin(), lanes.end(), random);
  }
  for (int t = 0; t < NUM_THREADS; ++t) order[t] = warps[t / 32] * 32 + lanes[t % 32];
  const auto can_run = [](int t) { return fibers[t].place == RUNNING; };
  for (auto next = order.begin(); (next = std::find_if(order.begin(), order.end(), can_run)) != order.end();) resume(*next);
  for (int t : order) {
    current = t;
    if (fibers[t].place != DONE) fail("a thread waits for others that never come", fibers[t].line);
  }
}

inline void on_fault(int, siginfo_t* info, void*) {
  snprintf(reason, sizeof(reason), "a stray access at %p (thread %d, block %d %d %d)", info->si_addr, current, blockIdx.x, blockIdx.y, blockIdx.z);
  siglongjmp(outside, 1);
}

// Null, or why the launch failed. `seed` 0 runs threads in their order, another one in any.
inline const char* launch(Dimensions grid, size_t shared_bytes, unsigned seed, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim = grid;
  std::vector<unsigned char> memory(shared_bytes + 128);
  shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
  std::mt19937 random(seed);
  struct sigaction ours = {}, segv, bus;
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &ours, &segv);
  sigaction(SIGBUS, &ours, &bus);
  const bool failed = sigsetjmp(outside, 1);
  if (!failed)
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(shared_bytes, random, seed != 0);
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  return failed ? reason : nullptr;
}

inline const float* half_values() {
  static std::vector<float> values;
  if (values.empty()) {
    for (unsigned bits = 0; bits < 65536; ++bits) {
      const half_t half = half_t(bits);
      _Float16 value;
      memcpy(&value, &half, 2);
      values.push_back(float(value));
    }
  }
  return values.data();
}

struct Operands {
  Accumulator* sum;
  const half_t *a, *b;
  int a_stride, b_stride, depth;
};

}  // namespace emulator

inline half_t to_half(float value) {
  const _Float16 half = _Float16(value);
  half_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

inline float infinity() { return INFINITY; }

#define from_lane(value, distance) emulator_from_lane(value, distance, __LINE__)
inline float emulator_from_lane(float value, int distance, int line) {
  struct Exchange {
    float given, received;
    int distance;
  } mine = {value, 0, distance};
  emulator::meet(emulator::WARP, line, &mine, [](int first) {
    auto of = [&](int lane) { return static_cast<Exchange*>(emulator::fibers[first + lane].given); };
    for (int lane = 0; lane < 32; ++lane) of(lane)->received = of(lane ^ of(lane)->distance)->given;
  });
  return mine.received;
}

template <bool A_TRANSPOSED, bool B_TRANSPOSED>
void multiply(Accumulator& sum, const half_t* a, int a_stride, const half_t* b, int b_stride, int depth) {
  emulator::Operands mine = {&sum, a, b, a_stride, b_stride, depth};
  emulator::meet(emulator::WARP, __LINE__, &mine, [](int first) {
    auto of = [&](int lane) { return static_cast<emulator::Operands*>(emulator::fibers[first + lane].given); };
    const emulator::Operands& all = *of(0);
    for (int lane = 1; lane < 32; ++lane)
      if (of(lane)->a != all.a || of(lane)->b != all.b) emulator::fail("lanes multiply different tiles", __LINE__);
    if (reinterpret_cast<uintptr_t>(all.a) % 32 || reinterpret_cast<uintptr_t>(all.b) % 32 || all.a_stride % 8 || all.b_stride % 8 || all.depth % 16)
      emulator::fail("operands of a product that the card refuses", __LINE__);
    const float* values = emulator::half_values();
    for (int i = 0; i < 16; ++i) {
      float row[16] = {};
      for (int k = 0; k < all.depth; ++k) {
        const float left = values[A_TRANSPOSED ? all.a[k * all.a_stride + i] : all.a[i * all.a_stride + k]];
        for (int j = 0; j < 16; ++j) row[j] += left * values[B_TRANSPOSED ? all.b[j * all.b_stride + k] : all.b[k * all.b_stride + j]];
      }
      for (int j = 0; j < 16; ++j) of((i * 16 + j) / 8)->sum->part[j % 8] += row[j];
    }
  });
}

inline void store(float* target, int stride, const Accumulator& sum) {
  if (reinterpret_cast<uintptr_t>(target) % 32 || stride % 4) emulator::fail("a tile is stored where the card refuses", __LINE__);
  const int lane = threadIdx.x % 32;
  emulator::meet(emulator::WARP, __LINE__);
  for (int j = 0; j < 8; ++j) target[(lane * 8 + j) / 16 * stride + (lane * 8 + j) % 16] = sum.part[j];
}

// A copy of a tensor's bytes before a page that may not be touched; `unguard` copies it back and lets it go.
extern "C" unsigned char* guard(const unsigned char* source, size_t size) {
  const size_t page = sysconf(_SC_PAGESIZE), room = (size + 15) / 16 * 16, whole = (room + page - 1) / page * page + 2 * page;
  auto* start = static_cast<unsigned char*>(mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (start == MAP_FAILED) return nullptr;
  mprotect(start, page, PROT_NONE);
  mprotect(start + whole - page, page, PROT_NONE);
  unsigned char* copy = start + whole - page - room;
  memcpy(copy, source, size);
  return copy;
}

extern "C" void unguard(unsigned char* copy, unsigned char* target, size_t size) {
  const size_t page = sysconf(_SC_PAGESIZE), room = (size + 15) / 16 * 16, whole = (room + page - 1) / page * page + 2 * page;
  memcpy(target, copy, size);
  munmap(copy + room + page - whole, whole);
}
