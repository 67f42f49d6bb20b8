// As bits, since those of -inf are no f32 to a compiler that assumes no infinity.
@group(0) @binding(BINDING) var<storage, read_write> lse_data: array<u32>;

fn store_lse(index: u32, bits: u32) {
    lse_data[index] = bits;
}
