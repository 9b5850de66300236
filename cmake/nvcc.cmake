# Functions for CMakeLists.txt that find nvcc and the CUDA libraries and compile the CUDA kernels.

# Sets NVCC, NVCC_VERSION, CUDA_VERSION ("13.0"), CUDA_INCLUDES and CUDA_LIBRARY_DIRS, or NVCC_SKIP_REASON. CMake's own
# CUDA language is not used: it links a test program, and many installations of nvcc have no complete toolkit.
function(find_nvcc)
  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(NVCC $ENV{CUDACXX})
    set(why "CUDACXX=${NVCC} is not a working nvcc")
  elseif(NOT "$ENV{CUDA_HOME}" STREQUAL "")
    set(NVCC $ENV{CUDA_HOME}/bin/nvcc)
    set(why "CUDA_HOME=$ENV{CUDA_HOME} has no working bin/nvcc")
  else()
    find_program(NVCC nvcc PATHS /usr/local/cuda/bin NO_CACHE)
    set(why "nvcc was not found: install a CUDA toolkit, or set CUDA_HOME to an installed one")
  endif()
  execute_process(COMMAND ${NVCC} --version OUTPUT_VARIABLE version ERROR_QUIET)
  if(NOT version MATCHES "release ([0-9]+\\.[0-9]+), V([0-9.]+)")
    set(NVCC_SKIP_REASON "${why}" PARENT_SCOPE)
    return()
  endif()
  set(NVCC ${NVCC} PARENT_SCOPE)
  set(CUDA_VERSION ${CMAKE_MATCH_1} PARENT_SCOPE)
  set(NVCC_VERSION ${CMAKE_MATCH_2} PARENT_SCOPE)
  # nvcc on the PATH may be a script or a link. A dry run prints the directories of its toolkit.
  execute_process(COMMAND ${NVCC} --dryrun -x cu -c /dev/null -o unused OUTPUT_QUIET ERROR_VARIABLE settings)
  string(REGEX MATCHALL "\"-I[^\"]+" includes "${settings}")
  string(REGEX MATCHALL "\"-L[^\"]+" libraries "${settings}")
  list(TRANSFORM includes REPLACE "^\"-I" "")
  list(TRANSFORM libraries REPLACE "^\"-L" "")
  list(REMOVE_DUPLICATES includes)
  set(CUDA_INCLUDES ${includes} PARENT_SCOPE)
  set(CUDA_LIBRARY_DIRS ${libraries} PARENT_SCOPE)
endfunction()

# Sets ARCHITECTURES, a list of "sm_80" for machine code and "compute_80" for PTX, or NVCC_SKIP_REASON. The
# default is the lowest architecture of each major compute capability, whose machine code runs on all of its minor
# revisions, and PTX of the newest for future GPUs.
function(choose_architectures)
  execute_process(COMMAND ${NVCC} --list-gpu-arch OUTPUT_VARIABLE known)
  string(REGEX MATCHALL "[0-9]+" known "${known}")
  string(REGEX MATCHALL "[^ ;,]+" requested "$ENV{TORCH_CUDA_ARCH_LIST}")
  if(NOT requested)
    foreach(number 80 90 100 120)
      if(number IN_LIST known)
        list(APPEND architectures sm_${number})
        set(newest compute_${number})
      endif()
    endforeach()
    set(ARCHITECTURES ${architectures} ${newest} PARENT_SCOPE)
    return()
  endif()
  foreach(one IN LISTS requested)
    if(NOT one MATCHES "^([0-9]+)\\.([0-9])(\\+PTX)?$")
      set(why "'${one}' is not a compute capability; use numbers such as 8.0 or 9.0+PTX")
    elseif("${CMAKE_MATCH_1}${CMAKE_MATCH_2}" LESS 80)
      message(STATUS "TORCH_CUDA_ARCH_LIST: ${one} is left out, the CUDA kernels need 8.0 or newer")
    elseif(NOT "${CMAKE_MATCH_1}${CMAKE_MATCH_2}" IN_LIST known)
      set(why "nvcc ${NVCC_VERSION} does not support ${one}")
    else()
      list(APPEND architectures sm_${CMAKE_MATCH_1}${CMAKE_MATCH_2})
      if(CMAKE_MATCH_3)
        list(APPEND architectures compute_${CMAKE_MATCH_1}${CMAKE_MATCH_2})
      endif()
    endif()
  endforeach()
  if(NOT why AND NOT architectures)
    set(why "the CUDA kernels need 8.0 or newer")
  endif()
  if(why)
    set(NVCC_SKIP_REASON "TORCH_CUDA_ARCH_LIST=$ENV{TORCH_CUDA_ARCH_LIST}: ${why}" PARENT_SCOPE)
  endif()
  list(REMOVE_DUPLICATES architectures)
  set(ARCHITECTURES ${architectures} PARENT_SCOPE)
endfunction()

# Adds the target `cuda_objects`, which compiles the device sources, and sets CUDA_OBJECTS, the objects to link. It depends
# on the target `cuda_host`, which compiles the host sources. The output of ptxas is written to <object>.log. No -lineinfo,
# which would write this machine's paths into the library; to profile, set NVCC_APPEND_FLAGS=-lineinfo.
function(compile_cuda)
  foreach(architecture IN LISTS ARCHITECTURES)
    string(REPLACE sm_ compute_ virtual ${architecture})
    list(APPEND generate -gencode=arch=${virtual},code=${architecture})
  endforeach()
  foreach(source IN LISTS CUDA_DEVICE)
    set(object ${CMAKE_BINARY_DIR}/${source}.o)
    # In the shell command, $0 is the log file: it is shown only if nvcc fails.
    add_custom_command(
      OUTPUT ${object}
      COMMAND sh -c [["$@" > "$0" 2>&1 || { cat "$0"; exit 1; }]] ${object}.log
        ${NVCC} -ccbin=${CMAKE_CXX_COMPILER} ${NVCC_FLAGS} -Xcompiler=-fPIC ${generate} -Xptxas=-v --threads=2
        -I${CMAKE_SOURCE_DIR}/csrc -MD -MF ${object}.d -c ${CMAKE_SOURCE_DIR}/${source} -o ${object}
      DEPENDS ${source} ${NVCC}
      DEPFILE ${object}.d
      COMMENT "Building CUDA object ${source}.o"
      VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  add_library(cuda_host OBJECT EXCLUDE_FROM_ALL ${CUDA_HOST})
  # CPU-only torch lacks c10/cuda/impl/cuda_cmake_macros.h, which only defines C10_CUDA_BUILD_SHARED_LIBS.
  target_compile_definitions(cuda_host PRIVATE C10_CUDA_NO_CMAKE_CONFIGURE_FILE)
  target_include_directories(cuda_host PRIVATE csrc)
  target_include_directories(cuda_host SYSTEM PRIVATE ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include
    ${CUDA_INCLUDES})
  target_compile_options(cuda_host PRIVATE ${FLAGS})
  add_custom_target(cuda_objects DEPENDS ${objects})
  add_dependencies(cuda_objects cuda_host)
  set(CUDA_OBJECTS ${objects} PARENT_SCOPE)
endfunction()

# Sets C10_CUDA_LIBRARY and CUDART_LIBRARY, or CUDA_SKIP_REASON.
function(find_link_libraries)
  string(REGEX MATCH "^[0-9]+" major ${TORCH_CUDA})
  if(NOT CUDA_VERSION MATCHES "^${major}\\.")
    set(CUDA_SKIP_REASON "nvcc is CUDA ${CUDA_VERSION} and this torch was built with CUDA ${TORCH_CUDA}: the major versions \
must be equal, choose another nvcc with CUDA_HOME" PARENT_SCOPE)
    return()
  endif()
  if(NOT CUDA_VERSION STREQUAL TORCH_CUDA)
    message(WARNING "nvcc is CUDA ${CUDA_VERSION} and this torch was built with CUDA ${TORCH_CUDA}, which should be compatible.")
  endif()
  find_library(C10_CUDA_LIBRARY c10_cuda PATHS ${TORCH_DIR}/lib NO_DEFAULT_PATH REQUIRED)
  # Link the shared libcudart, which torch loads too. If the toolkit lacks it, use that of the nvidia-cuda-runtime wheel.
  find_library(CUDART_LIBRARY NAMES libcudart.so libcudart.so.${major} NAMES_PER_DIR NO_DEFAULT_PATH NO_CACHE
    PATHS ${CUDA_LIBRARY_DIRS} ${TORCH_DIR}/../nvidia/cu${major}/lib ${TORCH_DIR}/../nvidia/cuda_runtime/lib)
  set(CUDART_LIBRARY ${CUDART_LIBRARY} PARENT_SCOPE)
  if(NOT CUDART_LIBRARY)
    set(CUDA_SKIP_REASON "libcudart.so was not found, neither with ${NVCC} nor with torch" PARENT_SCOPE)
    return()
  endif()
  # Compile a probe, to detect a GCC that is too new for this nvcc, or a toolkit without headers, before the build.
  execute_process(
    COMMAND ${NVCC} -ccbin=${CMAKE_CXX_COMPILER} ${NVCC_FLAGS} -I${CMAKE_SOURCE_DIR}/csrc -x cu
      -c ${CMAKE_SOURCE_DIR}/csrc/cuda/launch.h -o ${CMAKE_BINARY_DIR}/probe.o
    RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed)
    string(REGEX MATCH "[^\n]*(error|fatal)[^\n]*" output "${output}")
    set(CUDA_SKIP_REASON "${NVCC} cannot compile with ${CMAKE_CXX_COMPILER}: ${output}" PARENT_SCOPE)
  endif()
endfunction()
