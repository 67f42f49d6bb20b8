// A thread by its index in the workgroup.
struct Place {
    index: u32,
}

fn thread_of(place: Place) -> u32 {
    return place.index;
}
