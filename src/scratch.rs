//! Memory that lives between kernels, and uniform blocks; both are kept and used again.

use std::collections::{HashMap, VecDeque};

use crate::slot::Slot;

/// Uniform blocks that are kept; the oldest goes first.
const KEPT_PARAMS: usize = 256;

/// The buffers of one device that outlive a call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    buffers: HashMap<Slot, wgpu::Buffer>,
    params: HashMap<Vec<u8>, wgpu::Buffer>,
    order: VecDeque<Vec<u8>>,
    /// Stands in for an operand without elements, which could not be bound.
    empty: Option<wgpu::Buffer>,
}

impl Scratch {
    /// A buffer of at least `bytes`. A larger one replaces a smaller one, which lives on as long as
    /// commands that use it.
    pub(crate) fn buffer(&mut self, device: &wgpu::Device, slot: Slot, bytes: u64) -> wgpu::Buffer {
        let kept = self.buffers.get(&slot).filter(|buffer| buffer.size() >= bytes);
        if let Some(buffer) = kept {
            return buffer.clone();
        }
        // The old one first: both together might not fit.
        self.buffers.remove(&slot);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("attention scratch"),
            size: bytes,
            usage: match slot {
                Slot::Launch => wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::INDIRECT,
                _ => wgpu::BufferUsages::STORAGE,
            },
            mapped_at_creation: false,
        });
        self.buffers.insert(slot, buffer.clone());
        buffer
    }

    /// A uniform buffer of exactly these bytes. Blocks are never rewritten, so that calls which have
    /// been recorded but not submitted keep theirs.
    pub(crate) fn params(&mut self, device: &wgpu::Device, bytes: Vec<u8>) -> wgpu::Buffer {
        if let Some(buffer) = self.params.get(&bytes) {
            return buffer.clone();
        }
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("attention params"),
            size: bytes.len() as u64,
            usage: wgpu::BufferUsages::UNIFORM,
            mapped_at_creation: true,
        });
        if let Ok(mut view) = buffer.get_mapped_range_mut(..) {
            view.copy_from_slice(&bytes);
        }
        buffer.unmap();
        if self.order.len() == KEPT_PARAMS {
            self.order.pop_front().map(|oldest| self.params.remove(&oldest));
        }
        self.order.push_back(bytes.clone());
        self.params.insert(bytes, buffer.clone());
        buffer
    }

    /// A small buffer that nothing reads.
    pub(crate) fn empty(&mut self, device: &wgpu::Device) -> wgpu::Buffer {
        self.empty
            .get_or_insert_with(|| {
                device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("attention empty operand"),
                    size: 16,
                    usage: wgpu::BufferUsages::STORAGE,
                    mapped_at_creation: false,
                })
            })
            .clone()
    }

    /// Forgets everything: after a failure a kept buffer may be an invalid one.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Bytes of scratch buffers.
    pub(crate) fn bytes(&self) -> u64 {
        self.buffers.values().map(wgpu::Buffer::size).sum()
    }
}
