// Workgroup memory NAME in vectors of four.
var<workgroup> wg_NAME: array<vec4<TYPE>, SIZE_NAME>;

fn put_NAME(at: u32, x: vec4<TYPE>) {
    wg_NAME[at] = x;
}

fn get_NAME(at: u32) -> vec4<TYPE> {
    return wg_NAME[at];
}
