//! From a buffer on the device to bytes on the host, without blocking.

use std::ops::Range;

use futures_intrusive::channel::shared::oneshot_channel;

use crate::error::{Error, Result};
use crate::scope::scoped;

/// Who makes the device notice that its work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// The browser, or natively a short-lived thread: the caller's own must not block.
    Elsewhere,
    /// The calling thread.
    #[cfg(not(target_arch = "wasm32"))]
    Here,
}

/// Copies `range` (bytes, multiples of 4) of a buffer with `COPY_SRC` usage to the host. Submits one
/// copy; resolves when it has run.
///
/// Natively wgpu tells that work is done only to who polls the device: a short-lived thread does so until this copy
/// has run, and callbacks of yours that are due by then (of `map_async`, of `on_submitted_work_done`) run on it. In a
/// browser there is no such thread.
///
/// # Errors
/// [`Error::ReadRange`], [`Error::OutOfMemory`], [`Error::Driver`] and [`Error::DeviceLost`].
pub async fn read_buffer(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    buffer: &wgpu::Buffer,
    range: Range<u64>,
) -> Result<Vec<u8>> {
    let (size, whole) = (buffer.size(), |at: u64| at.is_multiple_of(wgpu::COPY_BUFFER_ALIGNMENT));
    let Range { start, end } = range;
    let refused = |why| Err(Error::ReadRange { start, end, size, why });
    if start > end {
        return refused("it ends before it begins");
    }
    if end > size {
        return refused("it ends behind the buffer");
    }
    if !whole(start) || !whole(end) {
        return refused("its ends are no multiples of 4");
    }
    if !buffer.usage().contains(wgpu::BufferUsages::COPY_SRC) {
        return refused("the buffer lacks the usage COPY_SRC");
    }
    let mut all = read_buffers(device, queue, &[(buffer, range)], Vec::new(), Wait::Elsewhere).await?;
    Ok(all.pop().unwrap_or_default())
}

/// Submits `commands`, then copies of the ranges, and waits for them.
pub(crate) async fn read_buffers(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    ranges: &[(&wgpu::Buffer, Range<u64>)],
    commands: Vec<wgpu::CommandBuffer>,
    wait: Wait,
) -> Result<Vec<Vec<u8>>> {
    // A buffer for each: together they may have more bytes than a buffer can.
    let (copies, submitted) = scoped(device, "readback memory", || {
        let mut encoder = device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("attention readback") });
        let stagings: Vec<_> = ranges
            .iter()
            .map(|(buffer, range)| {
                let size = range.end - range.start;
                (size > 0).then(|| {
                    let staging = device.create_buffer(&wgpu::BufferDescriptor {
                        label: Some("attention readback"),
                        size,
                        usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
                        mapped_at_creation: false,
                    });
                    encoder.copy_buffer_to_buffer(buffer, range.start, &staging, 0, size);
                    staging
                })
            })
            .collect();
        let submitted = queue.submit(commands.into_iter().chain([encoder.finish()]));
        let mapped = |staging: wgpu::Buffer| {
            let (sender, receiver) = oneshot_channel();
            staging.map_async(wgpu::MapMode::Read, .., move |result| {
                // The receiver may have been dropped: then nobody wants to know.
                let _ = sender.send(result.map_err(|error| error.to_string()));
            });
            (staging, receiver)
        };
        let copies: Vec<_> = stagings.into_iter().map(|staging| staging.map(mapped)).collect();
        (copies, submitted)
    })?;
    drive(device, submitted, wait)?;
    let mut read = Vec::with_capacity(copies.len());
    for copy in copies {
        let Some((staging, receiver)) = copy else {
            read.push(Vec::new());
            continue;
        };
        match receiver.receive().await {
            Some(Ok(())) => {}
            Some(Err(why)) => return Err(Error::DeviceLost { why }),
            None => return Err(Error::DeviceLost { why: "the readback was dropped".into() }),
        }
        let view = staging
            .get_mapped_range(..)
            .map_err(|error| Error::Driver { what: "readback memory".into(), why: error.to_string() })?;
        read.push(view.to_vec());
    }
    Ok(read)
}

#[cfg(target_arch = "wasm32")]
fn drive(_: &wgpu::Device, _: wgpu::SubmissionIndex, _: Wait) -> Result<()> {
    Ok(())
}

/// Natively a map callback runs only inside a poll. Work that was submitted later is not waited for.
#[cfg(not(target_arch = "wasm32"))]
fn drive(device: &wgpu::Device, submitted: wgpu::SubmissionIndex, wait: Wait) -> Result<()> {
    let poll = move |device: &wgpu::Device| {
        device.poll(wgpu::PollType::Wait { submission_index: Some(submitted), timeout: None })
    };
    match wait {
        Wait::Here => match poll(device) {
            Ok(_) => Ok(()),
            Err(error) => Err(Error::DeviceLost { why: error.to_string() }),
        },
        Wait::Elsewhere => {
            let device = device.clone();
            std::thread::Builder::new()
                .name("attention readback".into())
                .spawn(move || {
                    // An error reaches the caller through the map callback.
                    let _ = poll(&device);
                })
                .map(drop)
                .map_err(|error| Error::Driver { what: "readback thread".into(), why: error.to_string() })
        }
    }
}
