// Norms of vectors, none below LEAST_NORM, none too large for its square.

const LEAST_NORM: f32 = 1e-8;
// 2^-80: the square of any number times this is finite.
const SHRINK: f32 = 8.271806e-25;

// A factor and a divisor that make a vector of length 1 of one with this sum of squares. `shrunk` is the sum
// of squares of the vector times SHRINK, for where the other is not finite.
fn to_unit(sum: f32, shrunk: f32) -> vec2<f32> {
    if !is_finite(sum) {
        return vec2<f32>(SHRINK, sqrt(shrunk));
    }
    return vec2<f32>(1.0, max(sqrt(sum), LEAST_NORM));
}

fn sum4(x: vec4<f32>) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}
