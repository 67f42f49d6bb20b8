// Products of rows and a matrix, for each of several owners of both: what the kernels of a linear map ask for
// (shaders/kernel/linear_*.wgsl), (product_rows, width) @ (width, OUT).
var<private> owner: u32;
// Its batch entry and (first) query head, and where its matrix begins: found once.
var<private> owner_bh: vec2<u32>;
var<private> owner_w: u32;

fn product_w() -> u32 {
    return owner_w;
}

// Where a workgroup's rows are among those of its owner, in tiles.
fn band_of(band: u32) -> u32 {
    let bands = div_ceil(product_rows(), TILE_ROWS);
    owner = band / bands;
    enter_owner();
    return band % bands;
}

fn product_tiles() -> u32 {
    return product_owners() * div_ceil(product_rows(), TILE_ROWS) * div_ceil(params.OUT, 4u * TILE_QUADS);
}

// What is stored of a quad: 0 beyond the row's width.
fn kept(quad: u32, sum: vec4<f32>) -> vec4<f32> {
    let d = 4u * quad;
    return select(vec4<f32>(), sum, vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>(params.OUT));
}
