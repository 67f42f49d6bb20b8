// The boolean mask: one byte an element, non-zero keeps.
@group(0) @binding(BINDING) var<storage, read> mask_data: array<u32>;

fn mask_keeps(b: u32, h: u32, i: u32, j: u32) -> bool {
    let index = row_mask(b, h, i) + j * params.mask_stride_d;
    return ((mask_data[index / 4u] >> (8u * (index & 3u))) & 0xffu) != 0u;
}
