//! Error scopes: what wgpu would hand to the device's uncaptured-error handler (by default a
//! panic) comes back as [`Error`].

#[cfg(not(target_arch = "wasm32"))]
use crate::error::Error;
use crate::error::Result;

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
            Some(error) if is_lost(device) => Err(Error::DeviceLost { why: error.to_string() }),
            Some(wgpu::Error::OutOfMemory { .. }) => Err(Error::OutOfMemory { what: what.into() }),
            Some(error) => Err(Error::Driver { what: what.into(), why: error.to_string() }),
        }
    }
}

/// Whether the device is lost. wgpu tells that only to the application's own callback, and what a
/// lost device makes is invalid: such a buffer refuses to be mapped at once.
#[cfg(not(target_arch = "wasm32"))]
fn is_lost(device: &wgpu::Device) -> bool {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    let refused = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&refused);
    let scopes = [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory]
        .map(|filter| device.push_error_scope(filter));
    let probe = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("attention probe"),
        size: 8,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    probe.map_async(wgpu::MapMode::Read, .., move |result| told.store(result.is_err(), Ordering::Relaxed));
    let refused = refused.load(Ordering::Relaxed);
    scopes.into_iter().rev().for_each(|scope| drop(scope.pop()));
    refused
}
