// Test of the AMX emulator (test_amx.py): every instruction with many addressing modes, tile numbers and
// configurations, and its exceptions. With an argument, one instruction that must raise an exception. As a
// shared library it exports run_all() and run_one(), and uses the emulator of the process.
#include "amx_instructions.h"

#include <csignal>
#include <string_view>
#include <thread>
#include <vector>

#include "amx_addressing_modes.h"
#include "amx_emulator.h"
#include "amx_products.h"

namespace {

// --- configuration, tile shapes and numbers ----------------------------------------------------------------

void test_configuration() {
  Configuration config = full_configuration(), read;
  sttilecfg(read);
  const Configuration zeros;
  check(!std::memcmp(&read, &zeros, sizeof(read)), "the initial configuration");
  for (int i = 0; i < kTiles; ++i) {
    config.rows[i] = static_cast<uint8_t>(2 * i), config.colsb[i] = static_cast<uint16_t>(8 * i);
  }
  ldtilecfg(config);
  check(amx_emulator_threads_with_tiles() == 1, "threads with tiles");
  sttilecfg(read);
  check(!std::memcmp(&read, &config, sizeof(read)), "the configuration");
  ldtilecfg(full_configuration());
  check(amx_emulator_threads_with_tiles() == 1, "threads with tiles after a second configuration");
  tilerelease();
  sttilecfg(read);
  check(!std::memcmp(&read, &zeros, sizeof(read)), "the released configuration");
  check(amx_emulator_threads_with_tiles() == 0, "threads with tiles after tilerelease");
  ldtilecfg(config);
  ldtilecfg(zeros);  // palette 0
  check(amx_emulator_threads_with_tiles() == 0, "threads with tiles after palette 0");
  asm volatile("ldtilecfg 64(%0,%1,4)"
               :
               : "r"(reinterpret_cast<char*>(&config) - 64 - 40), "r"(10l), "m"(config));
  sttilecfg(read);
  check(!std::memcmp(&read, &config, sizeof(read)), "the configuration from an indexed address");
  tilerelease();
  // GCC's constant-pool operand: RIP-relative in position-independent code.
  static const Configuration constant = full_configuration();
  asm volatile("ldtilecfg %0" : : "m"(constant));
  sttilecfg(read);
  check(!std::memcmp(&read, &constant, sizeof(read)), "the configuration from a constant");
  tilerelease();
}

void test_shapes() {
  for (int tile = 0; tile < kTiles; ++tile) {
    for (const int rows : {1, 5, 16}) {
      for (const int colsb : {4, 36, 64}) {
        Configuration config = full_configuration();
        config.rows[tile] = static_cast<uint8_t>(rows), config.colsb[tile] = static_cast<uint16_t>(colsb);
        ldtilecfg(config);
        const TileData data = random_tile();
        tileloadd(tile, &data);
        const TileData through_memory = stored(tile);
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kRowBytes; ++j)
            check(through_memory.row[i][j] == (i < rows && j < colsb ? data.row[i][j] : 0xEE),
                  "a partial tile", j);
        // ldtilecfg zeros all tiles.
        ldtilecfg(full_configuration());
        check(stored(tile) == TileData{}, "a tile after ldtilecfg", tile);
      }
    }
  }
  // Every number reaches its own tile.
  ldtilecfg(full_configuration());
  TileData data[kTiles];
  for (int tile = 0; tile < kTiles; ++tile) {
    data[tile] = random_tile();
    tile % 2 ? tileloadd(tile, &data[tile]) : tileloaddt1(tile, &data[tile]);
  }
  for (int tile = 0; tile < kTiles; ++tile) check(stored(tile) == data[tile], "tile", tile);
  for (int zeroed = 0; zeroed < kTiles; ++zeroed) {
    tilezero(zeroed);
    for (int tile = 0; tile < kTiles; ++tile)
      check(stored(tile) == (tile <= zeroed ? TileData{} : data[tile]), "tile after tilezero", tile);
  }
  tilerelease();
}

// An interrupted load resumes at start_row: it zeroes and loads only the rows from there on.
void test_start_row() {
  Configuration config = full_configuration(), read;
  config.start_row = 9;
  ldtilecfg(config);
  const TileData data = random_tile();
  tileloadd(2, &data);
  const TileData got = stored(2);
  for (int i = 0; i < kRows; ++i)
    check(!std::memcmp(got.row[i], i < 9 ? TileData{}.row[i] : data.row[i], kRowBytes), "row", i);
  sttilecfg(read);
  check(read.start_row == 0, "start_row after a load");
  tilerelease();
}

// --- threads and counts ------------------------------------------------------------------------------------

void test_threads() {
  std::vector<std::thread> threads;
  for (int number = 0; number < 3; ++number) {
    threads.emplace_back([number] {
      TileData data = {};
      for (int i = 0; i < 200; ++i) {
        ldtilecfg(full_configuration());
        data.row[i % kRows][0] = static_cast<uint8_t>(number + i);
        tileloadd(number, &data);
        check(stored(number) == data, "a tile of a thread", number);
        tilerelease();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void test_counts() {
  amx_emulator_reset();
  ldtilecfg(full_configuration());
  TileData data = {};
  Configuration config;
  sttilecfg(config);
  for (int i = 0; i < 3; ++i) tileloadd(0, &data);
  for (int i = 0; i < 4; ++i) tileloaddt1(1, &data);
  for (int i = 0; i < 5; ++i) tilestored(2, &data);
  for (int i = 0; i < 6; ++i) tilezero(3);
  for (int i = 0; i < 7; ++i) tdpbf16ps(0, 1, 2);
  tilerelease();
  constexpr int64_t expected[kAmxInstructions] = {1, 1, 1, 6, 3, 4, 5, 7};
  for (int i = 0; i < kAmxInstructions; ++i)
    check(amx_emulator_executed(AmxInstruction(i)) == expected[i], "count", i);
  // A thread that ends with configured tiles is found.
  check(amx_emulator_threads_with_tiles() == 0, "threads with tiles");
  std::thread([] { ldtilecfg(full_configuration()); }).join();
  check(amx_emulator_threads_with_tiles() == 1, "threads with tiles after a thread without tilerelease");
}

// --- exceptions --------------------------------------------------------------------------------------------

// Executes one instruction that must end the process. Returns false for an unknown name.
bool raise_exception(std::string_view name) {
  Configuration config = full_configuration();
  TileData data = {};
  if (name == "palette") {
    config.palette = 2;
  } else if (name == "reserved byte 2") {
    config.reserved_2[0] = 1;
  } else if (name == "reserved byte 15") {
    config.reserved_2[13] = 1;
  } else if (name == "reserved byte 32") {
    config.reserved_32[0] = 1;
  } else if (name == "reserved byte 47") {
    config.reserved_32[15] = 1;
  } else if (name == "reserved byte 63") {
    config.reserved_56[7] = 1;
  } else if (name == "17 rows") {
    config.rows[7] = 17;
  } else if (name == "65 bytes") {
    config.colsb[7] = 65;
  } else if (name == "rows of no bytes") {
    config.colsb[4] = 0;
  } else if (name == "no rows") {
    config.rows[4] = 0;
  } else if (name == "not configured") {
    tilezero(0);
  } else if (name == "after tilerelease") {
    ldtilecfg(config);
    tilerelease();
    tileloadd(0, &data);
  } else if (name == "unused tile") {
    config.rows[3] = config.colsb[3] = 0;
    ldtilecfg(config);
    tileloadd(2, &data);
    tileloadd(3, &data);
  } else if (name == "unused operand") {
    config.rows[3] = config.colsb[3] = 0;
    ldtilecfg(config);
    tdpbf16ps(0, 1, 3);
  } else if (name == "row of 6 bytes") {
    config.colsb[2] = 6;
    ldtilecfg(config);
    tilestored(2, &data);
  } else if (name == "start row") {
    config.start_row = 5, config.rows[2] = 5;
    ldtilecfg(config);
    tileloadd(2, &data);
  } else if (name == "equal operands") {
    ldtilecfg(config);
    asm volatile(
        ".byte 0xC4, 0xE2, 0x72, 0x5C, 0xC1");  // tdpbf16ps %tmm1, %tmm1, %tmm0, which assemblers reject
  } else if (name == "rows of C and A") {
    config.rows[0] = 8;
    ldtilecfg(config);
    tdpbf16ps(0, 1, 2);
  } else if (name == "columns of C and B") {
    config.colsb[0] = 32;
    ldtilecfg(config);
    tdpbf16ps(0, 1, 2);
  } else if (name == "columns of A and rows of B") {
    config.colsb[1] = 32;
    ldtilecfg(config);
    tdpbf16ps(0, 1, 2);
  } else if (name == "tdpbssd") {
    ldtilecfg(config);
    asm volatile("tdpbssd %tmm2, %tmm1, %tmm0");
  } else if (name == "ud2") {
    asm volatile("ud2");
  } else if (name == "raise") {
    raise(SIGILL);
  } else if (name == "W1") {  // of tilerelease, C4 E2 78 49 C0
    asm volatile(".byte 0xC4, 0xE2, 0xF8, 0x49, 0xC0");
  } else if (name == "256 bits") {
    asm volatile(".byte 0xC4, 0xE2, 0x7C, 0x49, 0xC0");
  } else if (name == "vvvv") {
    asm volatile(".byte 0xC4, 0xE2, 0x70, 0x49, 0xC0");
  } else if (name == "tile 8") {  // of tilezero %tmm0, C4 E2 7B 49 C0
    ldtilecfg(config);
    asm volatile(".byte 0xC4, 0x62, 0x7B, 0x49, 0xC0");
  } else if (name == "operand tile 8") {  // of tdpbf16ps %tmm2, %tmm1, %tmm0: C4 E2 6A 5C C1
    ldtilecfg(config);
    asm volatile(".byte 0xC4, 0xE2, 0x2A, 0x5C, 0xC1");
  } else {
    return false;
  }
  ldtilecfg(config);
  return true;
}

}  // namespace

extern "C" [[gnu::visibility("default")]] void run_all() {
  test_configuration();
  test_shapes();
  test_start_row();
  test_all_addressing_modes();
  test_products();
  test_special_products();
  test_product_operands();
  test_threads();
  test_counts();
  std::puts("all instructions are correct");
  std::fflush(stdout);
}

extern "C" [[gnu::visibility("default")]] void run_one(const char* name) {
  if (!raise_exception(name)) std::printf("unknown name: %s\n", name);
}

int main(int argc, char** argv) {
  amx_emulator_install();
  argc == 1 ? run_all() : run_one(argv[1]);
}
