//! All buffers of a call as pieces of one, as memory pools make them.

use std::ops::Range;

use super::gpu::{USAGE, download, upload};

pub struct Pool {
    buffer: wgpu::Buffer,
    before: Vec<u8>,
    pieces: Vec<Range<u64>>,
}

impl Pool {
    /// Copies of these, in their order. Buffers that are one are one piece.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue, buffers: &[&wgpu::Buffer]) -> Self {
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

    /// The piece of one of them.
    pub fn slice(&self, at: usize) -> wgpu::BufferSlice<'_> {
        self.buffer.slice(self.pieces[at].clone())
    }

    /// Copies what was written back into the buffers that the pieces were made of.
    ///
    /// # Panics
    /// When anything but these outputs was written to.
    pub fn give_back(
        mut self,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        outputs: &[(usize, &wgpu::Buffer)],
    ) {
        let after = download(device, queue, &self.buffer);
        for &(at, buffer) in outputs {
            let piece = self.pieces[at].start as usize..self.pieces[at].end as usize;
            queue.write_buffer(buffer, 0, &after[piece.clone()]);
            self.before[piece.clone()].copy_from_slice(&after[piece]);
        }
        let changed = self.before.iter().zip(&after).position(|(a, b)| a != b);
        assert_eq!(changed, None, "a byte of an input was overwritten: {:?}", self.pieces);
    }
}
