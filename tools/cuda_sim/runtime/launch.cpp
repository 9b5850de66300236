// Kernel launches, the thread scheduler, and barriers of blocks and grids. A process runs one launch at a
// time, because the state of the simulated machine is global.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "execution_state.h"
#include "fault_handler.h"
#include "sanitizers.h"
#include "scheduler.h"
#include "simulator.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fused_res::cuda::sim {

Thread* current = nullptr;

namespace {

// Limits of the H200 (compute capability 9.0).
constexpr unsigned kMaxThreads = 1024, kThreadsPerMultiprocessor = 2048, kBlocksPerMultiprocessor = 32;
constexpr size_t kMaxShared = 227 << 10, kSharedPerMultiprocessor = 228 << 10, kReservedShared = 1 << 10;
constexpr unsigned kMaxGridX = 0x7FFFFFFF, kMaxGridYZ = 65535;

using Observer = bool (*)(const char* kernel, const unsigned* grid, unsigned threads, size_t shared,
                          const void* arguments, size_t arguments_bytes, bool cooperative);

std::atomic<int> chosen_schedule = [] {
  const char* variable = std::getenv("FUSED_RES_SIM_SCHEDULE");
  return variable == nullptr ? 0 : std::atoi(variable);
}();
// Few, so that the cooperative launches of small tensors have few blocks.
std::atomic<int> multiprocessors = 4;
std::atomic<Observer> observer = nullptr;
std::atomic<bool> skips_kernels = false;

std::string mangled_name(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) return "?";
  return info.dli_sname;
}

std::string readable_name(const void* kernel) {
  const std::string mangled = mangled_name(kernel);
  int status;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : mangled;
}

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

void check(const Launch& launch) {
  const auto reject = [&](const std::string& reason) {
    throw std::runtime_error("cannot launch " + readable_name(launch.kernel) + ": " + reason);
  };
  const dim3 grid = launch.grid;
  if (launch.threads == 0 || launch.threads > kMaxThreads)
    reject("invalid block size, " + std::to_string(launch.threads) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ)
    reject("invalid grid " + text({grid.x, grid.y, grid.z}));
  if (launch.shared > kMaxShared) {
    reject(std::to_string(launch.shared) + " bytes of shared memory exceed the limit of " +
           std::to_string(kMaxShared));
  }
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  if (launch.cooperative && blocks > static_cast<size_t>(resident_blocks(launch.threads, launch.shared)))
    reject(std::to_string(blocks) + " blocks cannot be resident at once");
}

// --- one launch ---

class Machine {
 public:
  void run(const Launch& launch);
  void wait();
  void end(std::exception_ptr error);
  void wake(Thread& thread) { ready_.add(&thread); }
  const Launch& launch() const { return *launch_; }
  std::vector<Block>& blocks() { return blocks_; }

 private:
  void prepare(unsigned blocks);
  void start(Block& block, size_t number);
  void run_ready();
  void resume(Thread& thread);
  void recycle_contexts();
  std::string deadlock_message() const;

  const Launch* launch_ = nullptr;
  Context context_;
  ContextPool contexts_;
  ReadyQueue ready_;
  std::exception_ptr error_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;  // the resident ones
  std::vector<std::unique_ptr<SharedMemory>> shared_;
  size_t live_threads_ = 0;

  friend void thread_main();
};

Machine machine;

// Entry point of a thread's fiber.
void thread_main() {
  finish_context_switch(machine.context_);
  acquire(&machine.launch_);
  std::exception_ptr error;
  try {
    machine.launch_->call(machine.launch_->kernel, machine.launch_->arguments);
  } catch (...) {
    error = std::current_exception();
  }
  machine.end(std::move(error));
}

void Machine::run(const Launch& launch) {
  launch_ = &launch;
  const size_t blocks = static_cast<size_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  const unsigned resident = launch.cooperative ? blocks : 1;
  gridDim = launch.grid;
  blockDim = dim3(launch.threads);
  prepare(resident);
  const FaultHandler faults;
  error_ = nullptr;
  const BlockOrder order(blocks, schedule());
  for (size_t i = 0; i < blocks; i += resident) {
    for (unsigned j = 0; j < resident; ++j) start(blocks_[j], order[i + j]);
    run_ready();
    for (unsigned j = 0; j < resident && !error_; ++j) {
      if (shared_[j]->overrun()) {
        error_ = std::make_exception_ptr(std::runtime_error(
            "block " + text(blocks_[j].index) + " wrote past the end of its shared memory of " +
            std::to_string(launch.shared) + " bytes, or before it"));
      }
    }
    if (error_) break;
  }
  acquire(&error_);
  recycle_contexts();
  if (!error_) return;
  try {
    std::rethrow_exception(std::exchange(error_, nullptr));
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(readable_name(launch.kernel) + ": " + error.what());
  }
}

void Machine::prepare(unsigned blocks) {
  const unsigned threads = launch_->threads, warps = (threads + kWarpSize - 1) / kWarpSize;
  threads_.resize(std::max<size_t>(threads_.size(), static_cast<size_t>(blocks) * threads));
  warps_.resize(std::max<size_t>(warps_.size(), static_cast<size_t>(blocks) * warps));
  blocks_.resize(blocks);
  shared_.clear();
  for (unsigned i = 0; i < blocks; ++i) {
    shared_.push_back(std::make_unique<SharedMemory>(launch_->shared));
    blocks_[i] = {};
    blocks_[i].thread_count = threads;
    blocks_[i].threads = &threads_[static_cast<size_t>(i) * threads];
    blocks_[i].warps = &warps_[static_cast<size_t>(i) * warps];
    blocks_[i].shared_bytes = launch_->shared;
  }
  ready_.start(static_cast<size_t>(blocks) * threads, schedule());
  live_threads_ = 0;
}

void Machine::start(Block& block, size_t number) {
  const dim3 grid = launch_->grid;
  const size_t plane = static_cast<size_t>(grid.x) * grid.y;
  block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number % plane / grid.x),
                 static_cast<unsigned>(number / plane)};
  auto& shared = shared_[&block - blocks_.data()];
  // With ThreadSanitizer each block gets new memory: reuse by another block would be reported as a race.
  if (kThreadSanitizer) shared = std::make_unique<SharedMemory>(launch_->shared);
  shared->clear();
  release(&launch_);  // for ThreadSanitizer: the launch happens before the start of every thread
  block.shared = shared->begin;
  block.memory = shared.get();
  block.threads_arrived = block.barriers = 0;
  for (unsigned i = 0; i < block.thread_count; i += kWarpSize) {
    Warp& warp = block.warps[i / kWarpSize];
    warp.pending_count = 0;
    std::fill_n(warp.barriers, kWarpSize, 0);
  }
  for (unsigned i = 0; i < block.thread_count; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.index = i;
    thread.state = Thread::State::kNew;
    thread.copies_issued = thread.groups_committed = thread.copies_completed = thread.groups_completed = 0;
    ready_.add(&thread);
  }
  live_threads_ += block.thread_count;
}

void Machine::run_ready() {
  while (!ready_.empty()) {
    Thread& thread = *ready_.take();
    if (thread.state == Thread::State::kNew) thread.context = contexts_.allocate(thread_main);
    thread.state = Thread::State::kStarted;
    resume(thread);
    if (thread.state == Thread::State::kEnded) {
      contexts_.recycle(thread.context);
      --live_threads_;
    }
    if (error_) return;
  }
  if (live_threads_ != 0) error_ = std::make_exception_ptr(std::runtime_error(deadlock_message()));
}

void Machine::resume(Thread& thread) {
  current = &thread;
  blockIdx = thread.block->index;
  threadIdx.x = thread.index;
  switch_context(context_, thread.context);
  current = nullptr;
}

void Machine::wait() { switch_context(current->context, context_); }

void Machine::end(std::exception_ptr error) {
  if (error) error_ = std::move(error);
  release(&error_);
  current->state = Thread::State::kEnded;
  switch_context(current->context, context_, true);
}

// After an error the other threads stay suspended: their contexts are recycled without unwinding, because
// kernels own no resources.
void Machine::recycle_contexts() {
  for (Block& block : blocks_) {
    for (unsigned i = 0; i < block.thread_count; ++i) {
      if (block.threads[i].context.stack != nullptr) contexts_.recycle(block.threads[i].context);
    }
  }
}

// Returns where each thread waits, with adjacent threads of one location combined.
std::string Machine::deadlock_message() const {
  std::string message = "deadlock:";
  for (const Block& block : blocks_) {
    const auto where = [&](unsigned i) -> std::string {
      const Thread& thread = block.threads[i];
      if (thread.state == Thread::State::kEnded) return "ended";
      return "wait(s) at " + std::string(thread.what) + ", " + thread.site.file_name() + ":" +
             std::to_string(thread.site.line());
    };
    const bool ended =
        std::all_of(block.threads, block.threads + block.thread_count,
                    [](const Thread& thread) { return thread.state == Thread::State::kEnded; });
    if (ended) continue;
    for (unsigned i = 0, next; i < block.thread_count; i = next) {
      for (next = i + 1; next < block.thread_count && where(next) == where(i);) ++next;
      message += "\n  block " + text(block.index) + ", thread(s) " + std::to_string(i) +
                 (next > i + 1 ? "-" + std::to_string(next - 1) : "") + " " + where(i);
    }
  }
  return message;
}

std::mutex launch_mutex;

}  // namespace

int schedule() { return chosen_schedule; }

void fail(const std::string& message) {
  throw std::runtime_error("block " + text(current->block->index) + ", thread " +
                           std::to_string(current->index) + ": " + message);
}

void wait(const char* what, Site site, unsigned mask) {
  current->what = what;
  current->site = site;
  current->mask = mask;
  machine.wait();
}

void wake(Thread& thread) { machine.wake(thread); }

void abort_launch(const std::string& message) {
  try {
    fail(message);
  } catch (...) {
    machine.end(std::current_exception());
  }
  __builtin_unreachable();
}

void run(const Launch& launch) {
  check(launch);
  if (skips_kernels) return;
  // Before the lock: the callback may take other locks, such as Python's GIL.
  if (const Observer observe = observer) {
    const unsigned grid[] = {launch.grid.x, launch.grid.y, launch.grid.z};
    if (observe(mangled_name(launch.kernel).c_str(), grid, launch.threads, launch.shared, launch.arguments,
                launch.arguments_bytes, launch.cooperative))
      return;
  }
  const std::lock_guard lock(launch_mutex);
  machine.run(launch);
}

int resident_blocks(unsigned threads, size_t shared) {
  const unsigned warps = (threads + kWarpSize - 1) / kWarpSize;
  if (warps == 0 || shared > kMaxShared) return 0;
  const size_t each =
      std::min<size_t>({kBlocksPerMultiprocessor, kThreadsPerMultiprocessor / (warps * kWarpSize),
                        kSharedPerMultiprocessor / (shared + kReservedShared)});
  return static_cast<int>(each) * multiprocessors;
}

void fill_zero(void* memory, size_t bytes, Stream) { std::memset(memory, 0, bytes); }

// --- barriers of a block and of the grid ---

int block_barrier(Vote vote, bool value, const char* what, Site site) {
  Block& block = *current->block;
  if (block.threads_arrived++ == 0) {
    block.site = site;
    block.or_of_votes = block.count_of_votes = 0;
    block.and_of_votes = 1;
  } else if (block.site.line() != site.line() || std::strcmp(block.site.file_name(), site.file_name()) != 0) {
    fail(std::string("divergent barrier: ") + what + " at " + site.file_name() + ":" +
         std::to_string(site.line()) + ", while another thread waits at " + block.site.file_name() + ":" +
         std::to_string(block.site.line()));
  }
  block.or_of_votes |= value;
  block.and_of_votes &= value;
  block.count_of_votes += value;
  constexpr unsigned kBlockBarrierToken = 32;
  void* token = block.memory->token(kBlockBarrierToken, block.barriers);
  release(token);
  if (block.threads_arrived == block.thread_count) {
    block.threads_arrived = 0;
    ++block.barriers;
    const int result = vote == Vote::kOr    ? block.or_of_votes
                       : vote == Vote::kAnd ? block.and_of_votes
                                            : block.count_of_votes;
    for (unsigned i = 0; i < block.thread_count; ++i) {
      block.threads[i].value = result;
      wake(block.threads[i]);
    }
  }
  wait(what, site);
  acquire(token);
  return static_cast<int>(current->value);
}

void grid_barrier(unsigned* counter, unsigned arrivals, Site site) {
  if (!machine.launch().cooperative) fail("grid barrier in a launch that is not cooperative");
  Thread*& waiting = current->block->grid_barrier_waiter;
  if (waiting != nullptr) fail("grid barrier by more than one thread of a block");
  release(counter);
  ++*counter;
  current->grid_counter = counter;
  current->grid_arrivals = arrivals;
  waiting = current;
  for (Block& block : machine.blocks()) {
    const Thread* thread = block.grid_barrier_waiter;
    if (thread != nullptr && *thread->grid_counter >= thread->grid_arrivals)
      wake(*std::exchange(block.grid_barrier_waiter, nullptr));
  }
  wait("grid_barrier", site);
  acquire(counter);
}

}  // namespace fused_res::cuda::sim

// --- for tests ---

extern "C" {

// Sets the schedule and returns the previous one.
int fused_res_sim_schedule(int schedule) { return fused_res::cuda::sim::chosen_schedule.exchange(schedule); }

int fused_res_sim_multiprocessors(int count) { return fused_res::cuda::sim::multiprocessors.exchange(count); }

// Sets whether launches return without running their kernel, for measurements of what leads to a launch.
void fused_res_sim_skip_kernels(bool skip) { fused_res::cuda::sim::skips_kernels = skip; }

// Sets a callback for every launch, which is not simulated if the callback returns true. NULL removes it.
void fused_res_sim_observe(fused_res::cuda::sim::Observer observe) {
  fused_res::cuda::sim::observer = observe;
}
}
