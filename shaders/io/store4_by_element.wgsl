// Four neighbours along the innermost dimension; those at and beyond its width are left out.
fn store4_o(at: u32, d: u32, x: vec4<f32>) {
    let step = params.o_stride_d;
    let index = at + d * step;
    store1_o(index, x.x);
    if d + 1u < params.head_dim_v {
        store1_o(index + step, x.y);
    }
    if d + 2u < params.head_dim_v {
        store1_o(index + 2u * step, x.z);
    }
    if d + 3u < params.head_dim_v {
        store1_o(index + 3u * step, x.w);
    }
}
