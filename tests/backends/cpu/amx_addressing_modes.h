// Part of amx_instructions.cpp: tile loads and stores in every addressing mode.
#pragma once

#include <sys/mman.h>

#include <vector>

#include "amx_instructions.h"

namespace {

// One routine for each base and index register (except %rsp), scale and displacement: load(base, index) loads
// tile 5, store(base, index) stores it. The table has the routine's address, scale and displacement.
asm(R"(
.macro addressing_mode name, instruction, base, index, scale, displacement
  .text
0:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  push %rdi
  push %rsi
  pop %\index
  pop %\base
  .ifc \instruction, tileloadd
    tileloadd \displacement(%\base,%\index,\scale), %tmm5
  .else
    tilestored %tmm5, \displacement(%\base,%\index,\scale)
  .endif
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
  .section .data.rel.ro.\name, "aw"
  .quad 0b, \scale, \displacement
.endm

.macro addressing_modes name, instruction
  .section .data.rel.ro.\name, "aw"
  \name:
  .irp base, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
    .irp index, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
      .ifnc \base, \index
        addressing_mode \name, \instruction, \base, \index, 1, 0
        addressing_mode \name, \instruction, \base, \index, 2, 64
        addressing_mode \name, \instruction, \base, \index, 4, -128
        addressing_mode \name, \instruction, \base, \index, 8, 4096
        addressing_mode \name, \instruction, \base, \index, 1, -4096
      .endif
    .endr
  .endr
  .section .data.rel.ro.\name, "aw"
  .quad 0
  .text
.endm

addressing_modes load_routines, tileloadd
addressing_modes store_routines, tilestored
.text
)");

struct Routine {
  void (*run)(const void* base, int64_t index);
  int64_t scale, displacement;
};
extern "C" const Routine load_routines[], store_routines[];

void test_addressing_modes(const Routine* routines, bool load) {
  // Large enough for all displacements and the largest stride, 8 x 64, in both directions.
  constexpr int64_t kSize = 32768;
  std::vector<uint8_t> memory(kSize);
  for (uint8_t& byte : memory) byte = static_cast<uint8_t>(random_bits());
  const std::vector<uint8_t> before = memory;
  long count = 0;
  for (const Routine* routine = routines; routine->run; ++routine, ++count) {
    const int64_t index = count % 2 ? -kRowBytes : kRowBytes, first = kSize / 2 + count % 5;
    const auto row_at = [&](int i) {
      return memory.data() + first + routine->displacement + i * index * routine->scale;
    };
    const TileData data = random_tile();
    if (!load) tileloadd(5, &data);
    routine->run(memory.data() + first, index);
    const TileData got = stored(5);
    for (int i = 0; i < kRows; ++i)
      check(!std::memcmp(got.row[i], row_at(i), kRowBytes), "addressing mode", count);
    if (!load) {
      for (int i = 0; i < kRows; ++i)
        std::memcpy(row_at(i), before.data() + (row_at(i) - memory.data()), kRowBytes);
      check(memory == before, "memory around a stored tile", count);
    }
  }
  check(count == 15 * 14 * 5, "the number of addressing modes", count);
}

// Stores tile 5 to its own stack frame and copies it to `to`.
asm(R"(
.text
store_to_stack:
  sub $1152, %rsp
  mov $64, %eax
  tilestored %tmm5, 64(%rsp,%rax,1)
  lea 64(%rsp), %rsi
  mov $1024, %ecx
  rep movsb
  add $1152, %rsp
  ret
)");
extern "C" void store_to_stack(void* to);

void test_all_addressing_modes() {
  ldtilecfg(full_configuration());
  test_addressing_modes(load_routines, true);
  test_addressing_modes(store_routines, false);

  TileData data = random_tile();
  tileloadd(5, &data);
  TileData got = {};
  store_to_stack(&got);
  check(got == data, "a tile stored relative to the stack pointer");

  // No index register: a stride of zero.
  asm volatile("tileloadd 64(%0), %%tmm5" : : "r"(&data) : "memory");
  got = stored(5);
  for (int i = 0; i < kRows; ++i)
    check(!std::memcmp(got.row[i], data.row[1], kRowBytes), "row without index", i);

  // No base register.
  void* const low = mmap(reinterpret_cast<void*>(0x10000000), 4096, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  check(low == reinterpret_cast<void*>(0x10000000), "mmap at a low address");
  std::memcpy(static_cast<char*>(low) + 128, &data, sizeof(data));
  asm volatile("tileloadd 0x10000080(,%0,4), %%tmm6" : : "r"(16l) : "memory");
  check(stored(6) == data, "a tile loaded without base register");
  munmap(low, 4096);
  tilerelease();
}

}  // namespace
