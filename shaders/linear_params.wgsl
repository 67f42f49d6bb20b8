// Everything that the kernels of a linear map learn at run time. The Rust twin is src/linear/kernel.rs; a test
// holds the two equal by reflection. Offsets and strides are in elements.
struct Params {
    rows: u32,
    inputs: u32,
    outputs: u32,
    groups: u32, // workgroups that own a tile
    // Always 0, for shaders/common.wgsl: a linear map has no heads and no chunks.
    heads_q: u32,
    head_first: u32,
    row_first: u32,
    // Layouts. The last two strides are those of the matrix: of W, to the next output and to the next input.
    x_offset: u32,
    x_stride_b: u32,
    x_stride_h: u32,
    x_stride_s: u32,
    x_stride_d: u32,
    w_offset: u32,
    w_stride_b: u32,
    w_stride_h: u32,
    w_stride_s: u32,
    w_stride_d: u32,
    bias_offset: u32,
    bias_stride_b: u32,
    bias_stride_h: u32,
    bias_stride_s: u32,
    bias_stride_d: u32,
    y_offset: u32,
    y_stride_b: u32,
    y_stride_h: u32,
    y_stride_s: u32,
    y_stride_d: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
