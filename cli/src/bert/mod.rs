//! BERT with the attention of this crate: what the program and the example `sentence_embedding` share.
//!
//! Attention and the wide matrices run on the adapter, several texts as one ragged batch without padding;
//! what is left (embeddings, residuals, norms, GELU, pooling) is little, and stays on the host.

mod files;
pub(crate) mod host;

use std::ops::Range;

use wgpu::util::{BufferInitDescriptor, DeviceExt};
use wgpu_attention::{
    Attention, AttentionProblem, Cache, HostWeights, Layer, LayerOperands, LayerOptions, Layout,
    LinearOperands, LinearProblem, Tensor, read_buffer,
};

pub(crate) use files::{Checkpoint, Config, Tokens};

/// `Result` whose error is a line for the user.
pub(crate) type Result<T> = std::result::Result<T, String>;

/// A matrix `[outputs, inputs]` and its bias on the device.
struct Linear {
    w: wgpu::Buffer,
    bias: wgpu::Buffer,
    inputs: usize,
    outputs: usize,
}

/// One layer's weights on the device, and its norms.
struct Block {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    up: Linear,
    down: Linear,
    norm_attention: host::Norm,
    norm_output: host::Norm,
}

/// A model on a device.
pub(crate) struct Bert {
    attention: Attention,
    config: Config,
    embeddings: host::Embeddings,
    blocks: Vec<Block>,
}

/// The layer of so many texts, the longest of which has so many tokens.
pub(crate) fn attention_layer(config: &Config, texts: usize, longest: usize, total: usize) -> Layer {
    let (heads, dim) = (config.num_attention_heads, config.head_dim());
    let attention = AttentionProblem {
        total_q: Some(total),
        cache: Cache::Ragged { total },
        ..AttentionProblem::new(texts, heads, heads, longest, longest, dim, dim)
    };
    Layer { bias: true, bias_o: true, ..Layer::new(&attention, config.hidden_size) }
}

impl Bert {
    /// Puts the weights of a checkpoint on a device.
    pub(crate) fn new(checkpoint: Checkpoint, attention: Attention) -> Result<Self> {
        let Checkpoint { config, embeddings, layers, .. } = checkpoint;
        let mut bert = Self { attention, config, embeddings, blocks: Vec::new() };
        for layer in layers {
            let (hidden, between) = (bert.config.hidden_size, bert.config.intermediate_size);
            let HostWeights { w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, .. } = layer.attention;
            let square = |w: Option<Tensor>, b: Option<Tensor>| {
                let (w, b) = w.zip(b).ok_or("a layer without a matrix or a bias")?;
                bert.linear(&w.to_f32(), &b.to_f32(), hidden, hidden)
            };
            let block = Block {
                q: square(Some(w_q), b_q)?,
                k: square(w_k, b_k)?,
                v: square(w_v, b_v)?,
                o: square(Some(w_o), b_o)?,
                up: bert.linear(&layer.up.0, &layer.up.1, hidden, between)?,
                down: bert.linear(&layer.down.0, &layer.down.1, between, hidden)?,
                norm_attention: layer.norm_attention,
                norm_output: layer.norm_output,
            };
            bert.blocks.push(block);
        }
        Ok(bert)
    }

    /// How many layers there are.
    pub(crate) fn layers(&self) -> usize {
        self.blocks.len()
    }

    /// The adapter's name.
    pub(crate) fn adapter(&self) -> &str {
        &self.attention.caps().adapter
    }

    /// What enters each of the first `layers` layers, and what leaves the last of them:
    /// `[layers + 1][all tokens, hidden]`, one text after the other.
    pub(crate) fn hidden(&self, texts: &[Tokens], layers: usize) -> Result<Vec<Vec<f32>>> {
        let longest = texts.iter().map(|text| text.ids.len()).max().unwrap_or(0);
        let starts = starts(texts);
        let total = starts.last().copied().unwrap_or(0) as usize;
        let layer = attention_layer(&self.config, texts.len(), longest, total);
        let list = self.upload(bytemuck::cast_slice(&starts))?;

        let mut all = vec![self.embeddings.of(texts)];
        for block in self.blocks.iter().take(layers) {
            let x = &all[all.len() - 1];
            let mut after = self.attended(&layer, block, x, &list)?;
            block.norm_attention.of_sums(&mut after, x);
            let mut between = self.mapped(&block.up, &after)?;
            host::gelu(&mut between);
            let mut y = self.mapped(&block.down, &between)?;
            block.norm_output.of_sums(&mut y, &after);
            all.push(y);
        }
        Ok(all)
    }

    /// Queries and keys of a layer, of all heads side by side.
    pub(crate) fn queries_and_keys(&self, layer: usize, hidden: &[f32]) -> Result<[Vec<f32>; 2]> {
        let block = &self.blocks[layer];
        Ok([self.mapped(&block.q, hidden)?, self.mapped(&block.k, hidden)?])
    }

    /// The attention part of a layer: projections, attention, projection of the output.
    fn attended(&self, layer: &Layer, block: &Block, x: &[f32], list: &wgpu::Buffer) -> Result<Vec<f32>> {
        let y = self.empty(x.len())?;
        let x = self.upload(bytemuck::cast_slice(x))?;
        let operands = LayerOperands {
            w_k: Some(block.k.w.slice(..)),
            w_v: Some(block.v.w.slice(..)),
            b_q: Some(block.q.bias.slice(..)),
            b_k: Some(block.k.bias.slice(..)),
            b_v: Some(block.v.bias.slice(..)),
            b_o: Some(block.o.bias.slice(..)),
            options: LayerOptions {
                cu_seqlens_q: Some(list.slice(..)),
                cu_seqlens_k: Some(list.slice(..)),
                ..LayerOptions::default()
            },
            ..LayerOperands::new(x.slice(..), block.q.w.slice(..), block.o.w.slice(..), y.slice(..))
        };
        let mut encoder = self.attention.device().create_command_encoder(&Default::default());
        self.attention.encode_layer(&mut encoder, layer, &operands).map_err(|e| e.to_string())?;
        self.attention.queue().submit([encoder.finish()]);
        self.download(&y)
    }

    /// `x W + b` for rows of x.
    fn mapped(&self, linear: &Linear, x: &[f32]) -> Result<Vec<f32>> {
        let rows = x.len() / linear.inputs;
        let x = self.upload(bytemuck::cast_slice(x))?;
        let y = self.empty(rows * linear.outputs)?;
        let problem =
            LinearProblem::new(rows, linear.inputs, linear.outputs).with_bias(wgpu_attention::Dtype::F32);
        let operands = LinearOperands {
            bias: Some(linear.bias.slice(..)),
            ..LinearOperands::new(x.slice(..), linear.w.slice(..), y.slice(..))
        };
        let mut encoder = self.attention.device().create_command_encoder(&Default::default());
        self.attention.encode_linear(&mut encoder, &problem, &operands).map_err(|e| e.to_string())?;
        self.attention.queue().submit([encoder.finish()]);
        self.download(&y)
    }

    fn linear(&self, w: &[f32], bias: &[f32], inputs: usize, outputs: usize) -> Result<Linear> {
        let up = |x: &[f32]| self.upload(bytemuck::cast_slice(x));
        Ok(Linear { w: up(w)?, bias: up(bias)?, inputs, outputs })
    }

    fn upload(&self, contents: &[u8]) -> Result<wgpu::Buffer> {
        self.fits(contents.len() as u64)?;
        let usage = wgpu::BufferUsages::STORAGE;
        Ok(self.attention.device().create_buffer_init(&BufferInitDescriptor { label: None, contents, usage }))
    }

    fn empty(&self, numbers: usize) -> Result<wgpu::Buffer> {
        let size = numbers as u64 * 4;
        self.fits(size)?;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        Ok(self.attention.device().create_buffer(&descriptor))
    }

    /// wgpu ends the program over a buffer that is too large.
    fn fits(&self, bytes: u64) -> Result<()> {
        let most = self.attention.caps().max_buffer;
        if bytes > most {
            return Err(format!("a buffer of {bytes} bytes is needed, the adapter allows {most}"));
        }
        Ok(())
    }

    fn download(&self, buffer: &wgpu::Buffer) -> Result<Vec<f32>> {
        let (device, queue) = (self.attention.device(), self.attention.queue());
        let bytes = pollster::block_on(read_buffer(device, queue, buffer, 0..buffer.size()))
            .map_err(|error| error.to_string())?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }
}

/// Where each text begins among all tokens, and the last ends.
fn starts(texts: &[Tokens]) -> Vec<u32> {
    let mut starts = vec![0];
    for text in texts {
        starts.push(starts[starts.len() - 1] + text.ids.len() as u32);
    }
    starts
}

/// The tokens of each text among all.
pub(crate) fn ranges(texts: &[Tokens]) -> Vec<Range<usize>> {
    starts(texts).windows(2).map(|pair| pair[0] as usize..pair[1] as usize).collect()
}

/// Rows of all heads side by side, `[tokens, heads * dim]`, as attention wants them.
pub(crate) fn rows_of_heads(tokens: usize, heads: usize, dim: usize) -> Layout {
    let row = heads * dim;
    Layout { offset: 0, strides: [tokens * row, dim, row, 1] }
}
