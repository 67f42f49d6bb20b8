//! GPU time of a compute pass, by timestamps.

use crate::error::Result;
use crate::readback::read_buffer;

/// Times one compute pass on the device's own clock.
///
/// ```no_run
/// # async fn f(device: wgpu::Device, queue: wgpu::Queue) -> wgpu_attention::Result<()> {
/// use wgpu_attention::GpuTimer;
/// if let Some(timer) = GpuTimer::new(&device, &queue) {
///     let mut encoder = device.create_command_encoder(&Default::default());
///     let pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
///         label: None,
///         timestamp_writes: Some(timer.pass_writes()),
///     });
///     drop(pass); // Attention::encode_in_pass goes here
///     timer.resolve(&mut encoder);
///     queue.submit([encoder.finish()]);
///     println!("{} ms", timer.read_ms(&device, &queue).await?);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GpuTimer {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    period_ns: f32,
}

impl GpuTimer {
    /// A timer, or `None` where the device has no `TIMESTAMP_QUERY`.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Option<Self> {
        device.features().contains(wgpu::Features::TIMESTAMP_QUERY).then(|| Self {
            queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("attention timer"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            }),
            resolved: device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("attention timer"),
                size: 16,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            }),
            period_ns: queue.get_timestamp_period(),
        })
    }

    /// What the pass descriptor's `timestamp_writes` wants.
    pub fn pass_writes(&self) -> wgpu::ComputePassTimestampWrites<'_> {
        wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: Some(0),
            end_of_pass_write_index: Some(1),
        }
    }

    /// Records the resolution of both timestamps; goes after the pass.
    pub fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        encoder.resolve_query_set(&self.queries, 0..2, &self.resolved, 0);
    }

    /// Milliseconds between the two timestamps, once the commands have been submitted.
    ///
    /// # Errors
    /// Those of [`read_buffer`].
    pub async fn read_ms(&self, device: &wgpu::Device, queue: &wgpu::Queue) -> Result<f64> {
        let bytes = read_buffer(device, queue, &self.resolved, 0..16).await?;
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&bytes);
        Ok(ticks[1].saturating_sub(ticks[0]) as f64 * f64::from(self.period_ns) * 1e-6)
    }
}
