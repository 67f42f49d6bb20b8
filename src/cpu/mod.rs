//! The fast CPU path.
