fn pair(q: vec4<f32>, k: vec4<f32>, by: vec4<f32>) -> f32 {
    return fma(q.x, k.x, fma(q.y, k.y, fma(q.z, k.z, q.w * k.w)));
}
