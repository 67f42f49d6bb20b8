//! What is committed under docs/ is what its command makes.

#[path = "../examples/cache_layouts.rs"]
#[allow(dead_code)]
mod cache_layouts;

#[test]
fn the_picture_of_the_caches_is_what_its_example_draws() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/caches.svg");
    let committed = std::fs::read_to_string(path).expect("docs/caches.svg");
    assert_eq!(cache_layouts::svg(), committed, "cargo run --example cache_layouts -- docs/caches.svg");
    // A blank line would end the block of HTML that the crate's documentation makes of it.
    assert!(!committed.contains("\n\n"));
}
