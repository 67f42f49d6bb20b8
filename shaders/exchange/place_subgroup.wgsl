// A thread by its place in a subgroup: WGSL does not say how the indices in a workgroup are dealt out to those.
struct Place {
    subgroup: u32,
    subgroups: u32,
    lane: u32,
}

// THREADS is a multiple of every subgroup size of the device, so that all subgroups are whole. Their size
// is taken from their number: some drivers report the largest size in the place of the real one. The
// remainder keeps addresses inside, whatever a driver reports.
fn thread_of(place: Place) -> u32 {
    return (place.subgroup * (THREADS / place.subgroups) + place.lane) % THREADS;
}
