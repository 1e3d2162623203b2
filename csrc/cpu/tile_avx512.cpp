// Compiled for AVX-512 (setup.py gives this file the flags); nothing in it runs on another processor.
#define CLCE_TILE_NAMESPACE avx512
#include "cpu/tile_impl.h"
