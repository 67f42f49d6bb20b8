//! Reading the `.npy` arrays of the library's fixtures.

use std::path::Path;

use safetensors::Dtype;

use super::Stored;

/// An array in C order. `bf16` says that 16-bit integers are bfloat16.
pub(crate) fn read(path: &Path, bf16: bool) -> Stored {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(&bytes[..6], b"\x93NUMPY", "{}", path.display());
    let (start, length) = match bytes[6] {
        1 => (10, u16::from_le_bytes([bytes[8], bytes[9]]) as usize),
        _ => (12, u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize),
    };
    let header = std::str::from_utf8(&bytes[start..start + length]).unwrap();
    let field = |key: &str, until: char| {
        let at = header.find(&format!("'{key}':")).unwrap() + key.len() + 3;
        header[at..].trim_start().trim_start_matches(['\'', '(']).split(until).next().unwrap().to_string()
    };
    assert!(header.contains("'fortran_order': False"), "{}", path.display());
    let dtype = match field("descr", '\'').as_str() {
        "<f4" => Dtype::F32,
        "<f8" => Dtype::F64,
        "<f2" => Dtype::F16,
        "<u2" if bf16 => Dtype::BF16,
        "|b1" => Dtype::BOOL,
        other => panic!("{}: type {other}", path.display()),
    };
    let shape = field("shape", ')').split(',').filter_map(|n| n.trim().parse().ok()).collect();
    Stored { dtype, shape, bytes: bytes[start + length..].to_vec() }
}
