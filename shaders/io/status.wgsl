@group(0) @binding(BINDING) var<storage, read_write> status_data: array<atomic<u32>>;

fn report(wrong: u32) {
    if wrong != 0u {
        atomicOr(&status_data[0], wrong);
    }
}
