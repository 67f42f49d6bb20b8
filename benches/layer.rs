//! The attention layer as its users run it, against the oracle, in the columns of `benches/peers`:
//!
//! ```text
//! cargo bench --bench layer -- --path gpu --shapes 1x512x768x12 --options plain,causal --repeat 10
//! ```
//!
//! `--path` is `cpu` or `gpu`, whose kernels the plan chooses. A shape is BxSxExH: a batch, tokens, width of x and y, heads of E/H numbers. The layer is that of
//! `torch.nn.MultiheadAttention`: packed weights of q, k and v, biases everywhere. A time is from the first
//! encoded command to the end of the work (x, weights and y stay where they are), the median of `--repeat`.

mod common;

use std::time::Instant;

use common::{Flags, Result, causal};
use wgpu_attention::{
    Align, Attention, AttentionProblem, DeviceRequest, Dtype, HostWeights, Layer, LayerInputs, LayerOperands,
    Tensor, cpu, reference,
};

fn main() -> Result<()> {
    let flags = Flags::new();
    let (path, repeat, dtype) = (flags.get("--path", "cpu"), flags.repeat()?, flags.dtype()?);
    let attention = match path.as_str() {
        "cpu" => None,
        "gpu" => {
            let adapter = std::env::var("WGPU_ATTENTION_ADAPTER").ok();
            let request = DeviceRequest { adapter, ..DeviceRequest::default() };
            Some(pollster::block_on(Attention::request(&request))?)
        }
        other => return Err(format!("--path {other}: want cpu or gpu").into()),
    };
    println!("peer,version,adapter,dtype,shape,options,ms,gflops,max_error");
    for shape in flags.get("--shapes", "1x512x768x12").split(',') {
        for option in flags.get("--options", "plain,causal").split(',') {
            let causal = causal(option)?;
            let layer = layer(shape, causal, dtype)?;
            let (ms, error) = measure(&layer, attention.as_ref(), repeat)?;
            let gpu = attention.as_ref().map(|attention| attention.caps().adapter.as_str());
            let adapter = format!("\"{}\"", gpu.map_or_else(processor, str::to_string));
            let gflops = flops(&layer) / ms / 1e6;
            let version = env!("CARGO_PKG_VERSION");
            println!(
                "wgpu-attention {path} layer,{version},{adapter},{dtype},{shape},{option},{ms:.4},{gflops:.2},{error:.3e}"
            );
        }
    }
    Ok(())
}

/// What the system calls the processor; `cpu` where it does not say.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find(|line| line.starts_with("model name"));
    let name = model.and_then(|line| Some(line.split_once(':')?.1.trim())).unwrap_or("cpu");
    match std::thread::available_parallelism() {
        Ok(threads) => format!("{name}, {threads} threads"),
        Err(_) => name.to_string(),
    }
}

fn layer(shape: &str, causal: Option<Align>, dtype: Dtype) -> Result<Layer> {
    let sizes: Vec<usize> = shape.split('x').map(str::parse).collect::<std::result::Result<_, _>>()?;
    let &[batch, tokens, width, heads] = sizes.as_slice() else {
        return Err(format!("{shape}: want BxSxExH").into());
    };
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(format!("{shape}: {heads} heads do not share a width of {width}").into());
    }
    let attention = AttentionProblem {
        causal,
        ..AttentionProblem::new(batch, heads, heads, tokens, tokens, width / heads, width / heads)
            .with_dtype(dtype)
    };
    let layer = Layer::new(&attention, width);
    Ok(Layer { weight_dtype: dtype, packed: true, bias: true, bias_o: true, ..layer })
}

fn flops(layer: &Layer) -> f64 {
    let (rows, width) = (layer.tokens() as f64, layer.width as f64);
    8.0 * rows * width * width + layer.attention.flops()
}

/// Milliseconds, and the largest error.
fn measure(layer: &Layer, attention: Option<&Attention>, repeat: usize) -> Result<(f64, f64)> {
    let width = layer.width;
    let numbers = |n: usize, size: f32, seed: f32| -> Vec<f32> {
        (0..n).map(|i| size * (i as f32 * seed).sin() * (1.0 + (i as f32 * 0.11).cos())).collect()
    };
    let small = 1.0 / (width as f32).sqrt();
    let made = |values: &[f32]| Tensor::from_f32(layer.weight_dtype, values);
    let weights = HostWeights {
        b_q: Some(made(&numbers(3 * width, 0.1, 1.3))),
        b_o: Some(made(&numbers(width, 0.1, 0.9))),
        ..HostWeights::new(
            made(&numbers(3 * width * width, small, 0.731)),
            made(&numbers(width * width, small, 0.577)),
        )
    };
    let x = Tensor::from_f32(layer.attention.dtype, &numbers(layer.tokens() * width, 1.0, 0.377));
    let inputs = LayerInputs::new(x.as_ref(), &weights);
    let (y, mut times) = match attention {
        None => on_cpu(layer, &inputs, repeat)?,
        Some(attention) => on_gpu(attention, layer, &x, &weights, repeat)?,
    };
    let golden = reference::layer(layer, &inputs)?;
    let errors = y.to_f32().into_iter().zip(&golden.y).map(|(a, b)| (f64::from(a) - b).abs());
    // NaN is the worst of all.
    let error = errors.fold(0.0, |worst, x| if x > worst || x.is_nan() { x } else { worst });
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2] * 1e3, error))
}

/// Seconds of each of so many calls, after two that count for nothing: the first compiles.
fn times(repeat: usize, mut call: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for _ in 0..repeat + 2 {
        let start = Instant::now();
        call()?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(times.split_off(2))
}

fn on_cpu(layer: &Layer, inputs: &LayerInputs<'_>, repeat: usize) -> Result<(Tensor, Vec<f64>)> {
    let mut y = Tensor::zeros(layer.attention.out_dtype, 0);
    let times = times(repeat, || {
        y = cpu::layer(layer, inputs)?;
        Ok(())
    })?;
    Ok((y, times))
}

fn on_gpu(
    attention: &Attention,
    layer: &Layer,
    x: &Tensor,
    weights: &HostWeights,
    repeat: usize,
) -> Result<(Tensor, Vec<f64>)> {
    let (device, queue) = (attention.device(), attention.queue());
    let upload = |tensor: &Tensor| {
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: tensor.as_ref().bytes().len() as u64,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        queue.write_buffer(&buffer, 0, tensor.as_ref().bytes());
        buffer
    };
    let y = Tensor::zeros(layer.attention.out_dtype, layer.tokens() * layer.out_width);
    let b = [x, &weights.w_q, &weights.w_o, &y].map(upload);
    let biases = [&weights.b_q, &weights.b_o].map(|bias| bias.as_ref().map(upload));
    let operands = LayerOperands {
        b_q: biases[0].as_ref().map(|b| b.slice(..)),
        b_o: biases[1].as_ref().map(|b| b.slice(..)),
        ..LayerOperands::new(b[0].slice(..), b[1].slice(..), b[2].slice(..), b[3].slice(..))
    };
    let times = times(repeat, || {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        attention.encode_layer(&mut encoder, layer, &operands)?;
        queue.submit([encoder.finish()]);
        device.poll(wgpu::PollType::wait_indefinitely())?;
        Ok(())
    })?;
    let bytes = pollster::block_on(wgpu_attention::read_buffer(device, queue, &b[3], 0..b[3].size()))?;
    Ok((Tensor::from_bytes(layer.attention.out_dtype, &bytes), times))
}
