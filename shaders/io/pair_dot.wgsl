fn pair(q: vec4<f32>, k: vec4<f32>, by: vec4<f32>) -> f32 {
    return dot(q, k);
}
