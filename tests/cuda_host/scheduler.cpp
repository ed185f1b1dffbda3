// Runs kernels on the host: the threads of a block are fibres on one OS thread.
//
// A fibre runs until it waits at a barrier or a warp exchange, or ends. The order in which fibres
// get their turn is chosen by FISHERFAST_CUDA_HOST_ORDER or set_order(): "forward", "reverse" (both
// let a warp run as far as it can before the next one), or a number, the seed of a random choice of
// warps and lanes at every turn. A kernel whose result depends on it lacks a barrier.
#include "cuda_host/scheduler.h"

#include <link.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;  // frames are several times larger under ASan
constexpr std::size_t kGuardBytes = 4096;
constexpr unsigned kMostThreads = 1024;  // of a block, as on every card
constexpr int kPoison = 0xff;            // bytes of a NaN

enum class State { kReady, kAtBarrier, kAtExchange, kEnded };

struct Thread {
  ucontext_t context;  // where it starts
  void* place[5];      // where it goes on
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // what the sanitizer keeps of a fibre that does not run
  State state = State::kEnded;
  int line = 0;
  unsigned mask = 0, source = 0, votes = 0;
  bool vote = false;
  unsigned char sent[kLargestValue], received[kLargestValue];
};

// One launch at a time: its state.
std::vector<Thread> threads(kMostThreads);
void* scheduler_place[5];
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
void* scheduler_fake_stack = nullptr;
unsigned current = 0;
const std::function<void()>* body = nullptr;
std::vector<unsigned char>* dynamic_memory = nullptr;

std::string order = "forward";
std::mt19937 random_numbers;

// --- fibres --------------------------------------------------------------------------------------

// The compiler's own setjmp and longjmp: those of the C library, and swapcontext, make system calls
// at every turn. The sanitizer learns of the switch, and must not clear the stack before a jump.
#define SWITCHES_STACKS __attribute__((noinline, no_sanitize_address))

SWITCHES_STACKS void jump(void** place) { __builtin_longjmp(place, 1); }

SWITCHES_STACKS void to_scheduler() {
  Thread& self = threads[current];
  __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_stack, scheduler_stack_bytes);
  if (__builtin_setjmp(self.place) == 0) jump(scheduler_place);
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

// A fibre lives on from block to block: at the end of a thread it waits for the next one.
void fibre() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    (*body)();
    threads[current].state = State::kEnded;
    to_scheduler();
  }
}

void start(Thread& thread) {
  void* pages = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::runtime_error("mmap must give a stack, got MAP_FAILED");
  mprotect(pages, kGuardBytes, PROT_NONE);
  thread.stack = static_cast<unsigned char*>(pages) + kGuardBytes;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, fibre, 0);
}

SWITCHES_STACKS void resume(unsigned index) {
  Thread& thread = threads[index];
  const bool first_time = thread.stack == nullptr;
  if (first_time) start(thread);
  current = index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y,
               index / (blockDim.x * blockDim.y)};
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack, kStackBytes);
  if (__builtin_setjmp(scheduler_place) == 0) {
    if (first_time) setcontext(&thread.context);
    jump(thread.place);
  }
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// --- the order of turns --------------------------------------------------------------------------

bool random_order() { return order != "forward" && order != "reverse"; }

std::vector<unsigned> turns(unsigned count) {
  std::vector<unsigned> indices(count);
  std::iota(indices.begin(), indices.end(), 0u);
  if (order == "reverse") std::reverse(indices.begin(), indices.end());
  if (random_order()) std::shuffle(indices.begin(), indices.end(), random_numbers);
  return indices;
}

// --- one block -----------------------------------------------------------------------------------

class Block {
 public:
  Block(const char* kernel, unsigned count) : kernel_(kernel), count_(count) {
    for (unsigned t = 0; t < count; ++t) threads[t].state = State::kReady;
  }

  void run() {
    for (;;) {
      run_to_barrier();
      if (all_in(State::kEnded)) return;
      if (!all_in(State::kAtBarrier)) fail();
      for (unsigned t = 1; t < count_; ++t) {
        if (threads[t].line != threads[0].line) fail();
      }
      for (unsigned t = 0; t < count_; ++t) threads[t].state = State::kReady;
    }
  }

 private:
  bool all_in(State state) const {
    return std::all_of(threads.begin(), threads.begin() + count_,
                       [&](const Thread& thread) { return thread.state == state; });
  }

  void run_to_barrier() {
    const unsigned warps = (count_ + kWarp - 1) / kWarp;
    for (bool progress = true; progress;) {
      progress = false;
      for (unsigned warp : turns(warps)) {
        while (run_warp(warp)) {
          progress = true;
          if (random_order()) break;  // the next warp may overtake this one
        }
      }
    }
  }

  // One turn for every lane that can run. Returns whether there was one.
  bool run_warp(unsigned warp) {
    const unsigned first = warp * kWarp, lanes = std::min(kWarp, count_ - first);
    bool progress = false;
    for (unsigned l : turns(lanes)) {
      if (threads[first + l].state != State::kReady) continue;
      resume(first + l);
      progress = true;
    }
    for (unsigned l = 0; l < lanes; ++l) progress = try_exchange(first, lanes, l) || progress;
    return progress;
  }

  // Completes the exchange that a lane waits at if all lanes of its mask are there.
  bool try_exchange(unsigned first, unsigned lanes, unsigned lane) {
    const Thread& waiting = threads[first + lane];
    if (waiting.state != State::kAtExchange) return false;
    const unsigned mask = waiting.mask;
    const int line = waiting.line;
    unsigned arrived = 0, votes = 0;
    for (unsigned l = 0; l < lanes; ++l) {
      const Thread& other = threads[first + l];
      if (other.state != State::kAtExchange || other.mask != mask || other.line != line) continue;
      arrived |= 1u << l;
      if (other.vote) votes |= 1u << l;
    }
    if (arrived != mask || !(mask >> lane & 1)) return false;
    for (unsigned l = 0; l < lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      Thread& receiver = threads[first + l];
      if (!(mask >> receiver.source & 1)) fail();
      receiver.votes = votes;
      std::memcpy(receiver.received, threads[first + receiver.source].sent, kLargestValue);
      receiver.state = State::kReady;
    }
    return true;
  }

  // Says where the first thread of each kind waits.
  [[noreturn]] void fail() const {
    std::ostringstream text;
    text << "kernel " << kernel_ << " must bring all threads of block (" << blockIdx.x << ", "
         << blockIdx.y << ", " << blockIdx.z << ") to the same barrier or exchange, got";
    std::map<std::string, unsigned> seen;
    for (unsigned t = 0; t < count_; ++t) seen.emplace(place(threads[t]), t);
    for (const auto& [where, t] : seen) text << " thread " << t << " " << where << ";";
    throw std::runtime_error(text.str());
  }

  static std::string place(const Thread& thread) {
    std::ostringstream text;
    if (thread.state == State::kReady) text << "exchanging at line " << thread.line;
    if (thread.state == State::kEnded) text << "at its end";
    if (thread.state == State::kAtBarrier) text << "at the barrier of line " << thread.line;
    if (thread.state == State::kAtExchange) {
      text << "at the exchange of line " << thread.line << " with mask " << std::hex << thread.mask;
    }
    return text.str();
  }

  const char* kernel_;
  unsigned count_;
};

// --- launches ------------------------------------------------------------------------------------

cudaError_t last_error = cudaSuccess;
std::map<const void*, int> dynamic_limits;
constexpr int kDynamicDefault = 48 << 10;  // bytes without cudaFuncSetAttribute
constexpr int kDynamicOptIn = 227 << 10;   // compute capability 9.0
constexpr int kMultiprocessorBytes = 228 << 10;
constexpr int kMultiprocessors = 132;
int dynamic_opt_in = kDynamicOptIn;

bool can_launch(const void* function, dim3 grid, dim3 block, std::size_t bytes) {
  const auto set = dynamic_limits.find(function);
  const int limit = set == dynamic_limits.end() ? kDynamicDefault : set->second;
  const bool sizes = grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 &&
                     grid.z >= 1 && grid.z <= 65535 && block.x >= 1 && block.y >= 1 &&
                     block.z >= 1 && block.z <= 64 &&
                     std::size_t{block.x} * block.y * block.z <= kMostThreads;
  if (!sizes) last_error = cudaErrorInvalidConfiguration;
  if (bytes > static_cast<std::size_t>(limit)) last_error = cudaErrorInvalidValue;
  return last_error == cudaSuccess;
}

// The thread-local variables of this executable: the static shared memory of all kernels.
void poison_static_shared() {
  const auto fill = [](dl_phdr_info* info, std::size_t, void*) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data != nullptr) {
        std::memset(info->dlpi_tls_data, kPoison, info->dlpi_phdr[i].p_memsz);
      }
    }
    return 1;  // the executable comes first; stop there
  };
  dl_iterate_phdr(fill, nullptr);
}

}  // namespace

void set_order(const std::string& name) {
  order = name;
  if (random_order()) random_numbers.seed(std::stoul(name));
}

void set_dynamic_limit(int bytes) { dynamic_opt_in = bytes; }

unsigned lane() { return current % kWarp; }

unsigned char* dynamic_shared() { return dynamic_memory->data(); }

void barrier(int line) {
  threads[current].state = State::kAtBarrier;
  threads[current].line = line;
  to_scheduler();
}

unsigned exchange(int line, unsigned mask, unsigned source, const void* sent, void* received,
                  std::size_t bytes, bool vote) {
  Thread& self = threads[current];
  self.state = State::kAtExchange;
  self.line = line;
  self.mask = mask;
  self.source = source;
  self.vote = vote;
  if (bytes > 0) std::memcpy(self.sent, sent, bytes);
  to_scheduler();
  if (bytes > 0) std::memcpy(received, self.received, bytes);
  return self.votes;
}

void launch(const char* kernel, const void* function, dim3 grid, dim3 block, std::size_t bytes,
            const std::function<void()>& thread) {
  if (!can_launch(function, grid, block, bytes)) return;
  body = &thread;
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned char> memory(bytes);
  memory.shrink_to_fit();
  dynamic_memory = &memory;
  for (unsigned b : turns(grid.x * grid.y * grid.z)) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    std::fill(memory.begin(), memory.end(), static_cast<unsigned char>(kPoison));
    poison_static_shared();
    Block(kernel, block.x * block.y * block.z).run();
  }
}

}  // namespace cuda_host

cudaError_t cudaGetLastError() { return std::exchange(cuda_host::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "invalid configuration argument";
  }
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_host::dynamic_opt_in;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = cuda_host::kMultiprocessorBytes;
      break;
    default:
      *value = cuda_host::kMultiprocessors;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int byte, std::size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(address, byte, bytes);
  return cudaSuccess;
}

cudaError_t cuda_host_set_attribute(const void* function, cudaFuncAttribute, int value) {
  if (value < 0 || value > cuda_host::dynamic_opt_in) return cudaErrorInvalidValue;
  cuda_host::dynamic_limits[function] = value;
  return cudaSuccess;
}
