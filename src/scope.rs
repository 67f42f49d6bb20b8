//! Error scopes: what wgpu would hand to the device's uncaptured-error handler (by default a
//! panic) comes back as [`Error`].

use crate::error::{Error, Result};

/// Runs `make` and gives what it made unless wgpu reported an error meanwhile.
///
/// Natively a scope's outcome is there at once. In a browser it arrives later, and the browser only
/// logs invalid calls, so nothing is awaited there.
pub(crate) fn scoped<T>(device: &wgpu::Device, what: &str, make: impl FnOnce() -> T) -> Result<T> {
    #[cfg(target_arch = "wasm32")]
    {
        let _ = (device, what);
        Ok(make())
    }
    #[cfg(not(target_arch = "wasm32"))]
    {
        use wgpu::ErrorFilter::{Internal, OutOfMemory, Validation};
        let scopes = [Validation, OutOfMemory, Internal].map(|filter| device.push_error_scope(filter));
        let made = make();
        // Scopes close in reverse order; all of them must, also after a first error.
        let errors: Vec<_> = scopes.into_iter().rev().map(|scope| pollster::block_on(scope.pop())).collect();
        match errors.into_iter().flatten().next() {
            None => Ok(made),
            Some(wgpu::Error::OutOfMemory { .. }) => Err(Error::OutOfMemory { what: what.into() }),
            Some(error) => Err(Error::Driver { what: what.into(), why: error.to_string() }),
        }
    }
}
