# How the CUDA kernels are compiled and what has to be there for it: functions for CMakeLists.txt.

# Sets NVCC, NVCC_VERSION, CUDA_VERSION ("13.0"), CUDA_INCLUDES and CUDA_LIBRARY_DIRS, or WHY_NOT_COMPILED. Not
# CMake's own CUDA language: that links a test program, and many an nvcc has no complete toolkit around it.
function(find_nvcc)
  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(NVCC $ENV{CUDACXX})
    set(why "CUDACXX=${NVCC} is no nvcc that runs")
  elseif(NOT "$ENV{CUDA_HOME}" STREQUAL "")
    set(NVCC $ENV{CUDA_HOME}/bin/nvcc)
    set(why "CUDA_HOME=$ENV{CUDA_HOME} has no bin/nvcc that runs")
  else()
    find_program(NVCC nvcc PATHS /usr/local/cuda/bin NO_CACHE)
    set(why "nvcc was not found: install a CUDA toolkit, or say with CUDA_HOME where one is")
  endif()
  execute_process(COMMAND ${NVCC} --version OUTPUT_VARIABLE version ERROR_QUIET)
  if(NOT version MATCHES "release ([0-9]+\\.[0-9]+), V([0-9.]+)")
    set(WHY_NOT_COMPILED "${why}" PARENT_SCOPE)
    return()
  endif()
  set(NVCC ${NVCC} PARENT_SCOPE)
  set(CUDA_VERSION ${CMAKE_MATCH_1} PARENT_SCOPE)
  set(NVCC_VERSION ${CMAKE_MATCH_2} PARENT_SCOPE)
  # What is on the PATH may be a script or a link; nvcc itself knows where its toolkit is.
  execute_process(COMMAND ${NVCC} --dryrun -x cu -c /dev/null -o unused OUTPUT_QUIET ERROR_VARIABLE settings)
  string(REGEX MATCHALL "\"-I[^\"]+" includes "${settings}")
  string(REGEX MATCHALL "\"-L[^\"]+" libraries "${settings}")
  list(TRANSFORM includes REPLACE "^\"-I" "")
  list(TRANSFORM libraries REPLACE "^\"-L" "")
  list(REMOVE_DUPLICATES includes)
  set(CUDA_INCLUDES ${includes} PARENT_SCOPE)
  set(CUDA_LIBRARY_DIRS ${libraries} PARENT_SCOPE)
endfunction()

# Sets ARCHITECTURES, "sm_80" for its machine code and "compute_80" for its PTX, or WHY_NOT_COMPILED. By default
# one for each generation, whose code later members of that generation run, and PTX of the newest for what comes.
function(choose_architectures)
  execute_process(COMMAND ${NVCC} --list-gpu-arch OUTPUT_VARIABLE known)
  string(REGEX MATCHALL "[0-9]+" known "${known}")
  string(REGEX MATCHALL "[^ ;,]+" wanted "$ENV{TORCH_CUDA_ARCH_LIST}")
  if(NOT wanted)
    foreach(number 80 90 100 120)
      if(number IN_LIST known)
        list(APPEND architectures sm_${number})
        set(newest compute_${number})
      endif()
    endforeach()
    set(ARCHITECTURES ${architectures} ${newest} PARENT_SCOPE)
    return()
  endif()
  foreach(one IN LISTS wanted)
    if(NOT one MATCHES "^([0-9]+)\\.([0-9])(\\+PTX)?$")
      set(why "'${one}' is no compute capability; write numbers, such as 8.0 or 9.0+PTX")
    elseif("${CMAKE_MATCH_1}${CMAKE_MATCH_2}" LESS 80)
      message(STATUS "TORCH_CUDA_ARCH_LIST: ${one} is left out, the CUDA kernels need 8.0 or newer")
    elseif(NOT "${CMAKE_MATCH_1}${CMAKE_MATCH_2}" IN_LIST known)
      set(why "nvcc ${NVCC_VERSION} does not know ${one}")
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
    set(WHY_NOT_COMPILED "TORCH_CUDA_ARCH_LIST=$ENV{TORCH_CUDA_ARCH_LIST}: ${why}" PARENT_SCOPE)
  endif()
  list(REMOVE_DUPLICATES architectures)
  set(ARCHITECTURES ${architectures} PARENT_SCOPE)
endfunction()

# Defines `cuda_objects`: all that the library is linked from. With what nvcc makes lies what ptxas says of it,
# <object>.log. No -lineinfo, which would bring this machine's paths into the library: for a profiler's sake,
# NVCC_APPEND_FLAGS=-lineinfo does.
function(compile_cuda)
  foreach(architecture IN LISTS ARCHITECTURES)
    string(REPLACE sm_ compute_ virtual ${architecture})
    list(APPEND generate -gencode=arch=${virtual},code=${architecture})
  endforeach()
  foreach(source IN LISTS CUDA_DEVICE)
    set(object ${CMAKE_BINARY_DIR}/${source}.o)
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
  # The file that a torch without CUDA does not have says only that its library is shared.
  target_compile_definitions(cuda_host PRIVATE C10_CUDA_NO_CMAKE_CONFIGURE_FILE)
  target_include_directories(cuda_host PRIVATE csrc)
  target_include_directories(cuda_host SYSTEM PRIVATE ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include
    ${CUDA_INCLUDES})
  target_compile_options(cuda_host PRIVATE ${FLAGS})
  add_custom_target(cuda_objects DEPENDS ${objects})
  add_dependencies(cuda_objects cuda_host)
  set(CUDA_OBJECTS ${objects} PARENT_SCOPE)
endfunction()

# Sets C10_CUDA_LIBRARY and CUDART_LIBRARY, or WHY_NO_CUDA.
function(prepare_to_link)
  string(REGEX MATCH "^[0-9]+" major ${TORCH_CUDA})
  if(NOT CUDA_VERSION MATCHES "^${major}\\.")
    set(WHY_NO_CUDA "nvcc is CUDA ${CUDA_VERSION} and this torch was built with CUDA ${TORCH_CUDA}: the major version \
has to be the same, choose another nvcc with CUDA_HOME" PARENT_SCOPE)
    return()
  endif()
  if(NOT CUDA_VERSION STREQUAL TORCH_CUDA)
    message(WARNING "nvcc is CUDA ${CUDA_VERSION} and this torch was built with CUDA ${TORCH_CUDA}, which should do.")
  endif()
  find_library(C10_CUDA_LIBRARY c10_cuda PATHS ${TORCH_DIR}/lib NO_DEFAULT_PATH REQUIRED)
  # The shared one, which torch loads; its wheels bring it where a toolkit does not.
  find_library(CUDART_LIBRARY NAMES libcudart.so libcudart.so.${major} NAMES_PER_DIR NO_DEFAULT_PATH NO_CACHE
    PATHS ${CUDA_LIBRARY_DIRS} ${TORCH_DIR}/../nvidia/cu${major}/lib ${TORCH_DIR}/../nvidia/cuda_runtime/lib)
  set(CUDART_LIBRARY ${CUDART_LIBRARY} PARENT_SCOPE)
  if(NOT CUDART_LIBRARY)
    set(WHY_NO_CUDA "libcudart.so was not found, neither with ${NVCC} nor with torch" PARENT_SCOPE)
    return()
  endif()
  # A GCC that is too new for this nvcc, or a toolkit without headers, shall be known before anything is built.
  execute_process(
    COMMAND ${NVCC} -ccbin=${CMAKE_CXX_COMPILER} ${NVCC_FLAGS} -I${CMAKE_SOURCE_DIR}/csrc -x cu
      -c ${CMAKE_SOURCE_DIR}/csrc/cuda/launch.h -o ${CMAKE_BINARY_DIR}/probe.o
    RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
  if(failed)
    string(REGEX MATCH "[^\n]*(error|fatal)[^\n]*" said "${said}")
    set(WHY_NO_CUDA "${NVCC} cannot compile with ${CMAKE_CXX_COMPILER}: ${said}" PARENT_SCOPE)
  endif()
endfunction()
