// What the SHARE threads of a quad that are neighbours have, together: each is alone.
fn shared_sum(mine: vec4<f32>) -> vec4<f32> {
    return mine;
}
