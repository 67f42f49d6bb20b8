// What the boolean mask does to the pairs of a tile, where it has been mapped: it drops them all, some
// (also where nobody knows), or none.
const TILE_DROPPED: u32 = 0u;
const TILE_MIXED: u32 = 1u;
const TILE_KEPT: u32 = 2u;
