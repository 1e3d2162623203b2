// Compiled for what every processor of the architecture has.
#define CLCE_TILE_NAMESPACE baseline
#include "cpu/tile_impl.h"
