// Compiled for what every processor of the architecture has.
#define CPU_CAPABILITY DEFAULT
#define CPU_CAPABILITY_DEFAULT
#define CLCE_TILE_NAMESPACE baseline
#include "cpu/tile_impl.h"
