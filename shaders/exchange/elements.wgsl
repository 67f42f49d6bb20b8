// Workgroup memory NAME in elements.
var<workgroup> wg_NAME: array<TYPE, 4u * SIZE_NAME>;

fn put_NAME(at: u32, x: vec4<TYPE>) {
    wg_NAME[4u * at] = x.x;
    wg_NAME[4u * at + 1u] = x.y;
    wg_NAME[4u * at + 2u] = x.z;
    wg_NAME[4u * at + 3u] = x.w;
}

fn get_NAME(at: u32) -> vec4<TYPE> {
    let i = 4u * at;
    return vec4<TYPE>(wg_NAME[i], wg_NAME[i + 1u], wg_NAME[i + 2u], wg_NAME[i + 3u]);
}
