// Bits of the status word: src/status.rs is the twin.
const STATUS_LENGTH = 1u;
const STATUS_BLOCK = 2u;
const STATUS_RAGGED = 4u;
const STATUS_FULL = 8u;

// The host cannot see these numbers: one beyond the keys that can exist counts as all of them.
fn key_length(b: u32) -> u32 {
    return min(asked_length(b), params.seq_kv);
}
