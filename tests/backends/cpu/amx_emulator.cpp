// Source of encodings, operations and exceptions: Intel 64 and IA-32 Architectures Software Developer's
// Manual, volume 2 (instruction pages, and section 2.10 "Intel AMX Instruction Exception Classes").
#include "amx_emulator.h"

#include <immintrin.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;  // palette 1

// The operand of ldtilecfg and sttilecfg.
struct Configuration {
  uint8_t palette, start_row, reserved_2[14];
  uint16_t colsb[kTiles];
  uint8_t reserved_32[16];
  uint8_t rows[kTiles];
  uint8_t reserved_56[8];
};
static_assert(sizeof(Configuration) == 64);

struct Tile {
  alignas(32) uint8_t row[kRows][kRowBytes];
};

struct TileFile {  // palette 0: not configured, the INIT state
  Configuration config;
  Tile tile[kTiles];
};

// initial-exec: the first access in a signal handler must not allocate, even in a shared library.
[[gnu::tls_model("initial-exec")]] thread_local TileFile tiles;

std::atomic<int64_t> counts[kAmxInstructions];
std::atomic<int64_t> configured_threads;
struct sigaction other_action;
bool emulating = false;  // false after a SIGILL went to the other action, which may replace itself
SetSignalAction* set_action;

// --- decoder -----------------------------------------------------------------------------------------------

struct Operation {
  AmxInstruction instruction;
  int length;         // bytes of machine code
  int reg, rm, vvvv;  // tile numbers
  uint8_t* address;   // memory operand: first row
  int64_t stride;     // bytes from row to row
};

constexpr int kGeneralRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                       REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                       REG_R12, REG_R13, REG_R14, REG_R15};

template <class T>
T read(const uint8_t* code) {
  T value;
  std::memcpy(&value, code, sizeof(T));
  return value;
}

// Decodes ModRM's memory operand at `code`, with SIB byte and displacement. Returns the code after it.
const uint8_t* decode_memory(const uint8_t* code, bool vex_x, bool vex_b, const gregset_t& registers,
                             Operation& operation) {
  const auto general_register = [&](int number) { return registers[kGeneralRegisters[number]]; };
  const int mod = *code >> 6, rm = *code & 7;
  ++code;
  int64_t base = 0;
  bool has_base = true, rip_relative = false;
  if (rm == 4) {
    const int scale = *code >> 6, index = (*code >> 3 & 7) | vex_x << 3, low_base = *code & 7;
    ++code;
    if (index != 4)
      operation.stride = static_cast<int64_t>(static_cast<uint64_t>(general_register(index)) << scale);
    has_base = low_base != 5 || mod != 0;
    if (has_base) base = general_register(low_base | vex_b << 3);
  } else {
    rip_relative = rm == 5 && mod == 0;
    has_base = !rip_relative;
    if (has_base) base = general_register(rm | vex_b << 3);
  }
  if (mod == 1) {
    base += read<int8_t>(code);
    code += 1;
  } else if (mod == 2 || !has_base) {
    base += read<int32_t>(code);
    code += 4;
  }
  if (rip_relative)
    base += reinterpret_cast<int64_t>(code);  // none of the instructions has an immediate after it
  operation.address = reinterpret_cast<uint8_t*>(base);
  return code;
}

// Decodes the instruction at `code`; false: not an instruction of this emulator.
bool decode(const uint8_t* code, const gregset_t& registers, Operation& operation) {
  const uint8_t* const begin = code;
  // Three-byte VEX prefix: C4, RXB and the opcode map, W vvvv L pp. Register bits are stored inverted.
  if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0)
    return false;  // map 0F38, W0, 128 bits
  const bool vex_r = !(code[1] & 0x80), vex_x = !(code[1] & 0x40), vex_b = !(code[1] & 0x20);
  const int vvvv = ~code[2] >> 3 & 15, prefix = code[2] & 3;  // prefix: none, 66, F3, F2
  const uint8_t opcode = code[3], modrm = code[4];
  const bool memory = modrm >> 6 != 3, sib = memory && (modrm & 7) == 4;
  code += 4;
  operation = {};
  operation.reg = (modrm >> 3 & 7) | vex_r << 3;
  operation.rm = (modrm & 7) | vex_b << 3;
  operation.vvvv = vvvv;

  if (opcode == 0x5C) {
    if (prefix != 2 || memory || operation.reg >= kTiles || operation.rm >= kTiles || vvvv >= kTiles)
      return false;
    operation.instruction = kTdpbf16ps;
  } else if (opcode == 0x4B) {
    constexpr AmxInstruction kByPrefix[4] = {kAmxInstructions, kTileloaddt1, kTilestored, kTileloadd};
    if (prefix == 0 || !sib || operation.reg >= kTiles || vvvv != 0) return false;
    operation.instruction = kByPrefix[prefix];
  } else if (opcode == 0x49 && vvvv == 0) {
    if (prefix <= 1 && memory && operation.reg == 0) {
      operation.instruction = prefix == 0 ? kLdtilecfg : kSttilecfg;
    } else if (prefix == 0 && modrm == 0xC0 && operation.rm == 0) {
      operation.instruction = kTilerelease;
    } else if (prefix == 3 && !memory && operation.rm == 0 && operation.reg < kTiles) {
      operation.instruction = kTilezero;
    } else {
      return false;
    }
  } else {
    return false;
  }
  code = memory ? decode_memory(code, vex_x, vex_b, registers, operation) : code + 1;
  if (opcode == 0x49) operation.address += operation.stride;  // one row: an index as in any other instruction
  operation.length = static_cast<int>(code - begin);
  return true;
}

// --- execution ---------------------------------------------------------------------------------------------

struct Fault {
  int signal = 0;  // 0: none
  char text[200];

  [[gnu::format(printf, 3, 4)]] void raise(int with_signal, const char* format, ...) {
    if (signal) return;
    signal = with_signal;
    va_list values;
    va_start(values, format);
    std::vsnprintf(text, sizeof(text), format, values);
    va_end(values);
  }
};
constexpr int kInvalidOpcode = SIGILL, kGeneralProtection = SIGSEGV;  // the signals of #UD and #GP

void set_init_state() {
  if (tiles.config.palette) configured_threads.fetch_sub(1, std::memory_order_relaxed);
  std::memset(&tiles, 0, sizeof(tiles));
}

void load_configuration(const uint8_t* address, Fault& fault) {
  uint8_t bytes[sizeof(Configuration)];
  Configuration config;
  std::memcpy(bytes, address, sizeof(bytes));
  std::memcpy(&config, bytes, sizeof(bytes));
  if (config.palette == 0) return set_init_state();
  if (config.palette != 1) fault.raise(kGeneralProtection, "palette %d", config.palette);
  for (int i = 2; i < 64; i = i == 15 ? 32 : i == 47 ? 56 : i + 1)
    if (bytes[i]) fault.raise(kGeneralProtection, "reserved byte %d is %d", i, bytes[i]);
  for (int i = 0; i < kTiles; ++i) {
    const int rows = config.rows[i], colsb = config.colsb[i];
    if (rows > kRows || colsb > kRowBytes || (rows == 0) != (colsb == 0))
      fault.raise(kGeneralProtection, "tile %d has %d rows of %d bytes", i, rows, colsb);
  }
  if (fault.signal) return;
  set_init_state();
  tiles.config = config;
  configured_threads.fetch_add(1, std::memory_order_relaxed);
}

void check_configured(int tile, Fault& fault) {
  if (!tiles.config.palette) {
    fault.raise(kInvalidOpcode, "tiles are not configured");
  } else if (!tiles.config.rows[tile]) {
    fault.raise(kInvalidOpcode, "tile %d is not configured", tile);
  } else if (tiles.config.colsb[tile] % 4) {
    fault.raise(kInvalidOpcode, "tile %d has rows of %d bytes, not a multiple of 4", tile,
                tiles.config.colsb[tile]);
  }
}

void move_tile(const Operation& operation, Fault& fault) {
  const int tile = operation.reg;
  check_configured(tile, fault);
  const int rows = tiles.config.rows[tile], colsb = tiles.config.colsb[tile], start = tiles.config.start_row;
  if (start >= rows)
    fault.raise(kInvalidOpcode, "start_row is %d, but tile %d has %d rows", start, tile, rows);
  if (fault.signal) return;
  const bool load = operation.instruction != kTilestored;
  uint8_t (*const data)[kRowBytes] = tiles.tile[tile].row;
  if (load) std::memset(data[start], 0, static_cast<size_t>(kRows - start) * kRowBytes);
  for (int row = start; row < rows; ++row) {
    uint8_t* const memory = operation.address + row * operation.stride;
    if (load) {
      std::memcpy(data[row], memory, static_cast<size_t>(colsb));
    } else {
      std::memcpy(memory, data[row], static_cast<size_t>(colsb));
    }
  }
}

[[gnu::target("avx2")]] inline __m256i row_part(const Tile& tile, int row, int part) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(tile.row[row]) + part);
}

// c[M][N] += a[M][K] b[K][N] in fp32, where an element of a and b is a pair of bf16: for each element of c,
// one sum over the even and one over the odd elements of a row of a, each a chain of FMAs that starts at
// zero; then c + (even + odd). Every operation rounds to nearest even, reads denormals as zero and flushes
// denormal results: MXCSR with DAZ and FTZ does exactly that here. Real hardware may differ in the last bits.
[[gnu::target("avx2,fma")]] void dot_products(Tile& c, const Tile& a, const Tile& b, int m, int n, int k) {
  const unsigned mxcsr_before = _mm_getcsr(), mxcsr = 0x1F80 | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON;
  // The memory clobber orders the loads and stores of tiles, and so the arithmetic between them.
  asm volatile("ldmxcsr %0" : : "m"(mxcsr) : "memory");
  const __m256i high_half = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
  for (int row = 0; row < m; ++row) {
    for (int part = 0; part < 2; ++part) {
      __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
      for (int i = 0; i < k; ++i) {
        const __m256i a_pair = _mm256_set1_epi32(read<int32_t>(&a.row[row][4 * i])),
                      b_pair = row_part(b, i, part);
        even = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a_pair, 16)),
                               _mm256_castsi256_ps(_mm256_slli_epi32(b_pair, 16)), even);
        odd = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a_pair, high_half)),
                              _mm256_castsi256_ps(_mm256_and_si256(b_pair, high_half)), odd);
      }
      const __m256 sum = _mm256_add_ps(_mm256_castsi256_ps(row_part(c, row, part)), _mm256_add_ps(even, odd));
      _mm256_store_ps(reinterpret_cast<float*>(c.row[row]) + 8 * part, sum);
    }
    std::memset(c.row[row] + 4 * n, 0, static_cast<size_t>(kRowBytes - 4 * n));
  }
  asm volatile("ldmxcsr %0" : : "m"(mxcsr_before) : "memory");
}

void multiply(const Operation& operation, Fault& fault) {
  const int c = operation.reg, a = operation.rm, b = operation.vvvv;
  if (c == a || c == b || a == b)
    fault.raise(kInvalidOpcode, "operands tmm%d, tmm%d, tmm%d are not distinct", c, a, b);
  for (const int tile : {c, a, b}) check_configured(tile, fault);
  const uint8_t (&rows)[kTiles] = tiles.config.rows;
  const uint16_t (&colsb)[kTiles] = tiles.config.colsb;
  if (rows[c] != rows[a] || colsb[c] != colsb[b] || colsb[a] / 4 != rows[b])
    fault.raise(kInvalidOpcode, "rows x bytes do not match: tmm%d %d x %d, tmm%d %d x %d, tmm%d %d x %d", c,
                rows[c], colsb[c], a, rows[a], colsb[a], b, rows[b], colsb[b]);
  if (fault.signal) return;
  dot_products(tiles.tile[c], tiles.tile[a], tiles.tile[b], rows[c], colsb[c] / 4, rows[b]);
}

void execute(const Operation& operation, Fault& fault) {
  switch (operation.instruction) {
    case kLdtilecfg:
      return load_configuration(operation.address, fault);
    case kSttilecfg:
      std::memcpy(operation.address, &tiles.config, sizeof(Configuration));
      return;
    case kTilerelease:
      return set_init_state();
    case kTilezero:
      check_configured(operation.reg, fault);
      std::memset(&tiles.tile[operation.reg], 0, sizeof(Tile));
      break;
    case kTdpbf16ps:
      multiply(operation, fault);
      break;
    default:
      move_tile(operation, fault);
  }
  tiles.config.start_row = 0;
}

// --- signal handler ----------------------------------------------------------------------------------------

// snprintf is not async-signal-safe; SIGILL is synchronous, and the process is about to end.
[[gnu::format(printf, 1, 2)]] void print(const char* format, ...) {
  char text[400];
  va_list values;
  va_start(values, format);
  const int length = std::vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  if (write(STDERR_FILENO, text, static_cast<size_t>(length)) < 0) return;
}

constexpr const char* kNames[kAmxInstructions] = {"ldtilecfg", "sttilecfg",   "tilerelease", "tilezero",
                                                  "tileloadd", "tileloaddt1", "tilestored",  "tdpbf16ps"};

// Restores the action of other SIGILLs: the instruction raises it again when the handler returns.
void pass_on() {
  emulating = false;
  set_action(SIGILL, &other_action, nullptr);
}

void handle(int, siginfo_t* info, void* context) {
  const int errno_before = errno;
  gregset_t& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* const code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  Operation operation;
  if (info->si_code <= 0) {  // sent by kill() or raise()
    pass_on();
    raise(SIGILL);
  } else if (!decode(code, registers, operation)) {
    print("amx_emulator: %p: not an emulated instruction: %02x %02x %02x %02x %02x\n",
          static_cast<const void*>(code), code[0], code[1], code[2], code[3], code[4]);
    pass_on();
  } else {
    Fault fault;
    execute(operation, fault);
    if (fault.signal) {
      print("amx_emulator: %p: %s: %s: %s\n", static_cast<const void*>(code), kNames[operation.instruction],
            fault.signal == kGeneralProtection ? "#GP" : "#UD", fault.text);
      if (fault.signal == kGeneralProtection) {
        raise(SIGSEGV);
      } else {
        pass_on();
      }
    } else {
      counts[operation.instruction].fetch_add(1, std::memory_order_relaxed);
      registers[REG_RIP] += operation.length;
    }
  }
  errno = errno_before;
}

}  // namespace

void amx_emulator_install(SetSignalAction* set) {
  set_action = set;
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  emulating = set_action(SIGILL, &action, &other_action) == 0;
}

void amx_emulator_replace_other_action(const struct sigaction* action, struct sigaction* previous) {
  if (!emulating) {
    set_action(SIGILL, action, previous);
    return;
  }
  if (previous) *previous = other_action;
  if (action) other_action = *action;
}

int64_t amx_emulator_executed(AmxInstruction instruction) {
  return counts[instruction].load(std::memory_order_relaxed);
}

void amx_emulator_reset() {
  for (std::atomic<int64_t>& count : counts) count.store(0, std::memory_order_relaxed);
}

int64_t amx_emulator_threads_with_tiles() { return configured_threads.load(std::memory_order_relaxed); }
