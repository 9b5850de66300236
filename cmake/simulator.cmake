# The simulator: the CUDA kernels compiled as C++ for the CPU, for tests (tools/cuda_sim). The source lists are those of
# CMakeLists.txt.

# Only CUDA's headers are needed, which Triton's package contains as well.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import os; from importlib import util
spec = util.find_spec('triton')
print(os.path.join(os.path.dirname(spec.origin), 'backends', 'nvidia', 'include') if spec else '')"
  OUTPUT_VARIABLE TRITON_INCLUDE OUTPUT_STRIP_TRAILING_WHITESPACE)
find_path(CUDA_INCLUDE cuda_bf16.h NO_DEFAULT_PATH
  PATHS $ENV{CUDA_HOME}/include ${CUDA_INCLUDES} /usr/local/cuda/include ${TRITON_INCLUDE})
if(NOT CUDA_INCLUDE)
  message(FATAL_ERROR "The simulator needs the CUDA headers: set CUDA_HOME, or install Triton.")
endif()

# Compile fma() to an instruction: calls of the library function would take most of the run time.
include(CheckCXXSourceRuns)
check_cxx_source_runs("int main() { return !__builtin_cpu_supports(\"fma\"); }" FUSED_RES_FMA)
# No strict aliasing: kernels store values of different types in the same shared memory, one after the other.
set(SIMULATOR_FLAGS ${FLAGS} -Wno-unknown-pragmas -fno-strict-aliasing -O2 $<$<BOOL:${FUSED_RES_FMA}>:-mfma>)
set(SIMULATOR ${CMAKE_SOURCE_DIR}/tools/cuda_sim)
file(GLOB SIMULATOR_RUNTIME CONFIGURE_DEPENDS ${SIMULATOR}/runtime/*.cpp)
file(GLOB SIMULATOR_CASES CONFIGURE_DEPENDS ${SIMULATOR}/sanitize/*.cpp)
file(GLOB SIMULATOR_BUGS CONFIGURE_DEPENDS ${SIMULATOR}/bugs/*.cu)
set_source_files_properties(${CUDA_DEVICE} ${SIMULATOR_BUGS} ${SIMULATOR}/unit_kernels.cu PROPERTIES
  LANGUAGE CXX COMPILE_OPTIONS "-xc++")

# Sets the options of a target that contains simulated CUDA code. Further arguments are compiler options.
function(configure_simulated_target target)
  target_compile_definitions(${target} PRIVATE FUSED_RES_SIMULATED)
  target_include_directories(${target} PRIVATE csrc ${SIMULATOR})
  target_include_directories(${target} SYSTEM PRIVATE ${CUDA_INCLUDE})
  target_compile_options(${target} PRIVATE ${SIMULATOR_FLAGS} ${ARGN})
  # dladdr() has to find the names of the kernels, so their symbols are exported.
  set_target_properties(${target} PROPERTIES
    CXX_VISIBILITY_PRESET default VISIBILITY_INLINES_HIDDEN OFF ENABLE_EXPORTS ON EXCLUDE_FROM_ALL ON)
endfunction()

# Programs without torch, plain and with each sanitizer: kernels with deliberate bugs, and all kernels at small shapes. The
# runtime is not instrumented by ThreadSanitizer, because its memory accesses are not those of a simulated thread; it
# annotates the synchronization instead.
set(SANITIZER_OPTIONS_plain "")
set(SANITIZER_OPTIONS_address -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined)
set(SANITIZER_OPTIONS_thread -O1 -g1 -fsanitize=thread)
set(RUNTIME_OPTIONS_plain "")
set(RUNTIME_OPTIONS_address ${SANITIZER_OPTIONS_address})
set(RUNTIME_OPTIONS_thread -g1 -DFUSED_RES_SIM_THREAD_SANITIZER)
foreach(sanitizer plain address thread)
  add_library(runtime_${sanitizer} OBJECT ${SIMULATOR_RUNTIME})
  configure_simulated_target(runtime_${sanitizer} ${RUNTIME_OPTIONS_${sanitizer}})
  foreach(version correct broken)
    add_library(bugs_${version}_${sanitizer} OBJECT ${SIMULATOR_BUGS})
    configure_simulated_target(bugs_${version}_${sanitizer} ${SANITIZER_OPTIONS_${sanitizer}})
    target_compile_definitions(bugs_${version}_${sanitizer} PRIVATE
      VERSION=${version} BROKEN=$<STREQUAL:${version},broken>)
    set_target_properties(bugs_${version}_${sanitizer} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
  endforeach()
  add_executable(fused_res_sim_bugs_${sanitizer} ${SIMULATOR}/bugs/main.cpp $<TARGET_OBJECTS:runtime_${sanitizer}>
    $<TARGET_OBJECTS:bugs_correct_${sanitizer}> $<TARGET_OBJECTS:bugs_broken_${sanitizer}>)
  add_executable(fused_res_sim_kernels_${sanitizer} ${SIMULATOR_CASES} ${CUDA_DEVICE}
    $<TARGET_OBJECTS:runtime_${sanitizer}>)
  foreach(program bugs kernels)
    set(target fused_res_sim_${program}_${sanitizer})
    configure_simulated_target(${target} ${SANITIZER_OPTIONS_${sanitizer}})
    target_link_options(${target} PRIVATE ${SANITIZER_OPTIONS_${sanitizer}})
    target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})
  endforeach()
endforeach()

add_library(fused_res_sim SHARED
  ${CUDA_DEVICE} ${CUDA_HOST} ${SIMULATOR}/guard.cpp $<TARGET_OBJECTS:runtime_plain>)
configure_simulated_target(fused_res_sim)
target_include_directories(fused_res_sim SYSTEM PRIVATE
  ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include)
target_link_libraries(fused_res_sim PRIVATE ${TORCH_CPU_LIBRARY} ${C10_LIBRARY} ${CMAKE_DL_LIBS})

# The simulator's own unit-test kernels; without torch.
add_library(fused_res_sim_unit_kernels SHARED ${SIMULATOR}/unit_kernels.cu $<TARGET_OBJECTS:runtime_plain>)
configure_simulated_target(fused_res_sim_unit_kernels)
target_link_libraries(fused_res_sim_unit_kernels PRIVATE ${CMAKE_DL_LIBS})
