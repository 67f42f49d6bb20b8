// slope * |query position - key position| (Press 2021).
fn alibi(b: u32, h: u32, i: u32, j: u32, len_k: u32) -> f32 {
    let position = i32(i) + position_offset(b, len_k);
    return bitcast<f32>(read_alibi_slopes(h)) * f32(abs(position - i32(j)));
}
