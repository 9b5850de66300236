# The CUDA kernels as C++ for the CPU, for tests: see tools/cuda_sim. The sources are those of CMakeLists.txt.

# Of CUDA only headers are needed, which Triton's package carries too.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import os; from importlib import util
spec = util.find_spec('triton')
print(os.path.join(os.path.dirname(spec.origin), 'backends', 'nvidia', 'include') if spec else '')"
  OUTPUT_VARIABLE TRITON_INCLUDE OUTPUT_STRIP_TRAILING_WHITESPACE)
find_path(CUDA_INCLUDE cuda_bf16.h NO_DEFAULT_PATH
  PATHS $ENV{CUDA_HOME}/include ${CUDA_INCLUDES} /usr/local/cuda/include ${TRITON_INCLUDE})
if(NOT CUDA_INCLUDE)
  message(FATAL_ERROR "The simulator needs CUDA's headers: set CUDA_HOME, or install Triton.")
endif()

# fma() as an instruction: a call would take most of the time.
include(CheckCXXSourceRuns)
check_cxx_source_runs("int main() { return !__builtin_cpu_supports(\"fma\"); }" FUSED_RES_FMA)
# Kernels keep values of several types in the same shared memory, one after the other.
set(SIMULATOR_FLAGS ${FLAGS} -Wno-unknown-pragmas -fno-strict-aliasing -O2 $<$<BOOL:${FUSED_RES_FMA}>:-mfma>)
set(SIMULATOR ${CMAKE_SOURCE_DIR}/tools/cuda_sim)
file(GLOB SIMULATOR_RUN_TIME CONFIGURE_DEPENDS ${SIMULATOR}/run_time/*.cpp)
file(GLOB SIMULATOR_CASES CONFIGURE_DEPENDS ${SIMULATOR}/sanitize/*.cpp)
file(GLOB SIMULATOR_BUGS CONFIGURE_DEPENDS ${SIMULATOR}/bugs/*.cu)
set_source_files_properties(${CUDA_DEVICE} ${SIMULATOR_BUGS} ${SIMULATOR}/units.cu PROPERTIES
  LANGUAGE CXX COMPILE_OPTIONS "-xc++")

# The rest of the arguments are compiler's options.
function(simulated target)
  target_compile_definitions(${target} PRIVATE FUSED_RES_SIMULATED)
  target_include_directories(${target} PRIVATE csrc ${SIMULATOR})
  target_include_directories(${target} SYSTEM PRIVATE ${CUDA_INCLUDE})
  target_compile_options(${target} PRIVATE ${SIMULATOR_FLAGS} ${ARGN})
  # Kernels are known by their names, which the dynamic linker has to find.
  set_target_properties(${target} PROPERTIES
    CXX_VISIBILITY_PRESET default VISIBILITY_INLINES_HIDDEN OFF ENABLE_EXPORTS ON EXCLUDE_FROM_ALL ON)
endfunction()

# Programs without torch, plain and with each sanitizer: deliberate bugs, and all kernels at small shapes. What a
# run time does is no thread's doing: ThreadSanitizer shall not see it, only be told what happened.
set(SANITIZER_OPTIONS_plain "")
set(SANITIZER_OPTIONS_address -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined)
set(SANITIZER_OPTIONS_thread -O1 -g1 -fsanitize=thread)
set(RUN_TIME_OPTIONS_plain "")
set(RUN_TIME_OPTIONS_address ${SANITIZER_OPTIONS_address})
set(RUN_TIME_OPTIONS_thread -g1 -DFUSED_RES_SIM_THREAD_SANITIZER)
foreach(sanitizer plain address thread)
  add_library(run_time_${sanitizer} OBJECT ${SIMULATOR_RUN_TIME})
  simulated(run_time_${sanitizer} ${RUN_TIME_OPTIONS_${sanitizer}})
  foreach(version correct broken)
    add_library(bugs_${version}_${sanitizer} OBJECT ${SIMULATOR_BUGS})
    simulated(bugs_${version}_${sanitizer} ${SANITIZER_OPTIONS_${sanitizer}})
    target_compile_definitions(bugs_${version}_${sanitizer} PRIVATE
      VERSION=${version} BROKEN=$<STREQUAL:${version},broken>)
    set_target_properties(bugs_${version}_${sanitizer} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
  endforeach()
  add_executable(fused_res_sim_bugs_${sanitizer} ${SIMULATOR}/bugs/main.cpp $<TARGET_OBJECTS:run_time_${sanitizer}>
    $<TARGET_OBJECTS:bugs_correct_${sanitizer}> $<TARGET_OBJECTS:bugs_broken_${sanitizer}>)
  add_executable(fused_res_sim_kernels_${sanitizer} ${SIMULATOR_CASES} ${CUDA_DEVICE}
    $<TARGET_OBJECTS:run_time_${sanitizer}>)
  foreach(program bugs kernels)
    set(target fused_res_sim_${program}_${sanitizer})
    simulated(${target} ${SANITIZER_OPTIONS_${sanitizer}})
    target_link_options(${target} PRIVATE ${SANITIZER_OPTIONS_${sanitizer}})
    target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})
  endforeach()
endforeach()

add_library(fused_res_sim SHARED
  ${CUDA_DEVICE} ${CUDA_HOST} ${SIMULATOR}/guard.cpp $<TARGET_OBJECTS:run_time_plain>)
simulated(fused_res_sim)
target_include_directories(fused_res_sim SYSTEM PRIVATE
  ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include)
target_link_libraries(fused_res_sim PRIVATE ${TORCH_CPU_LIBRARY} ${C10_LIBRARY} ${CMAKE_DL_LIBS})

# Also without torch: for tests of the simulator itself.
add_library(fused_res_sim_units SHARED ${SIMULATOR}/units.cu $<TARGET_OBJECTS:run_time_plain>)
simulated(fused_res_sim_units)
target_link_libraries(fused_res_sim_units PRIVATE ${CMAKE_DL_LIBS})
