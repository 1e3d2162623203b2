# How tests, and what only tests use, are compiled.
add_library(clce_test_options INTERFACE)
target_compile_options(clce_test_options INTERFACE -Wall -Wextra)
target_link_libraries(clce_test_options INTERFACE clce::family)
if(CLCE_SANITIZE)
  target_compile_options(clce_test_options INTERFACE -fsanitize=${CLCE_SANITIZE} -fno-sanitize-recover=undefined
                                                     -fno-omit-frame-pointer)
  target_link_options(clce_test_options INTERFACE -fsanitize=${CLCE_SANITIZE})
endif()

# A program that uses cpp_tests/check.h.
function(clce_add_test_program name)
  add_executable(${name} ${ARGN})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/cpp_tests)
  target_link_libraries(${name} PRIVATE clce_test_options)
endfunction()
