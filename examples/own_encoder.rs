//! Attention among an application's own commands: its device, its buffers (here one packed QKV
//! buffer), its encoder, its submission. `cargo run --release --example own_encoder`.

use wgpu_attention::{Attention, AttentionProblem, Layout, Operand, Operands, read_buffer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    pollster::block_on(run())
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    // What an application has anyway.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = instance.request_adapter(&wgpu::RequestAdapterOptions::default()).await?;
    let (device, queue) = adapter.request_device(&wgpu::DeviceDescriptor::default()).await?;

    // [batch, seq, 3, heads, head_dim]: what one projection writes. q, k and v are offsets into it.
    let (batch, seq, heads, head_dim) = (2, 48, 6, 32);
    let token = 3 * heads * head_dim;
    let q = Layout { offset: 0, strides: [seq * token, head_dim, token, 1] };
    let problem = AttentionProblem {
        q,
        k: q.at(heads * head_dim),
        v: q.at(2 * heads * head_dim),
        o: Layout::bshd(heads, seq, head_dim),
        ..AttentionProblem::new(batch, heads, heads, seq, seq, head_dim, head_dim)
    };
    let packed: Vec<f32> = (0..batch * seq * token).map(|i| (i as f32 * 0.19).sin()).collect();
    let qkv = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("qkv"),
        size: 4 * packed.len() as u64,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    queue.write_buffer(&qkv, 0, bytemuck::cast_slice(&packed));
    let o = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("o"),
        size: problem.buffer_bytes(Operand::O),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    });

    // Attention, on that device. It states what the device lacks, and serves it all the same.
    let attention = Attention::new(&device, &queue);
    for missing in attention.caps().missing() {
        println!("without {missing}");
    }
    let plan = attention.plan(&problem)?;
    print!("{plan}");

    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    // ... the application's own passes before ...
    attention.encode(
        &mut encoder,
        &plan,
        &Operands::new(qkv.slice(..), qkv.slice(..), qkv.slice(..), o.slice(..)),
    )?;
    // ... and after; then its own submission.
    queue.submit([encoder.finish()]);

    let bytes = read_buffer(&device, &queue, &o, 0..o.size()).await?;
    let o: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
    println!("o begins {:?}", &o[..4]);
    Ok(())
}
