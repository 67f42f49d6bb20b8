//! The buffers of a call by themselves, or all as pieces of one, as memory pools make them.

use std::ops::Range;

use super::gpu::{Gpu, USAGE, download, upload};

pub struct Pieces<'a> {
    gpu: &'a Gpu,
    own: Vec<&'a wgpu::Buffer>,
    pool: Option<Pool>,
}

impl<'a> Pieces<'a> {
    pub fn new(gpu: &'a Gpu, own: Vec<&'a wgpu::Buffer>, pooled: bool) -> Self {
        let pool = pooled.then(|| Pool::new(gpu.attention.device(), gpu.attention.queue(), &own));
        Self { gpu, own, pool }
    }

    /// One of them.
    pub fn slice(&self, at: usize) -> wgpu::BufferSlice<'_> {
        match &self.pool {
            Some(pool) => pool.buffer.slice(pool.pieces[at].clone()),
            None => self.own[at].slice(..),
        }
    }

    /// Copies what was written back into the buffers that the pieces were made of.
    ///
    /// # Panics
    /// When anything of a pool but these outputs was written to.
    pub fn give_back(self, outputs: &[usize]) {
        let Some(Pool { buffer, mut before, pieces }) = self.pool else { return };
        let (device, queue) = (self.gpu.attention.device(), self.gpu.attention.queue());
        let after = download(device, queue, &buffer);
        for &at in outputs {
            let piece = pieces[at].start as usize..pieces[at].end as usize;
            queue.write_buffer(self.own[at], 0, &after[piece.clone()]);
            before[piece.clone()].copy_from_slice(&after[piece]);
        }
        let changed = before.iter().zip(&after).position(|(a, b)| a != b);
        assert_eq!(changed, None, "a byte of an input was overwritten: {pieces:?}");
    }
}

struct Pool {
    buffer: wgpu::Buffer,
    before: Vec<u8>,
    pieces: Vec<Range<u64>>,
}

impl Pool {
    /// Copies of these, in their order. Buffers that are one are one piece.
    fn new(device: &wgpu::Device, queue: &wgpu::Queue, buffers: &[&wgpu::Buffer]) -> Self {
        let align = device.limits().min_storage_buffer_offset_alignment as usize;
        // No piece begins with the pool.
        let (mut pieces, mut before) = (Vec::<Range<u64>>::new(), vec![0xff; align]);
        for buffer in buffers {
            let piece = match buffers[..pieces.len()].iter().position(|other| other == buffer) {
                Some(at) => pieces[at].clone(),
                None => {
                    let start = before.len() as u64;
                    before.extend(download(device, queue, buffer));
                    before.resize(before.len().next_multiple_of(align), 0xff);
                    start..start + buffer.size()
                }
            };
            pieces.push(piece);
        }
        Self { buffer: upload(device, "pool", &before, USAGE), before, pieces }
    }
}
