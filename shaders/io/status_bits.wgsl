// Bits of the status word: src/status.rs is the twin.
const STATUS_LENGTH = 1u;
const STATUS_BLOCK = 2u;
const STATUS_RAGGED = 4u;
const STATUS_FULL = 8u;
